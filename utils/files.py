"""Files that neither an interruption nor a full disk leaves half-written, and the files of a folder."""

import csv
import errno
import io
import os
import secrets
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from utils.errors import InputError

PARTIAL = ".partial-"           # what names begin with of files that are not whole yet
# What network shares and other file systems answer that cannot be asked when a file is safe.
CANNOT_FLUSH = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EBADF, errno.EACCES, errno.EPERM)
# Folders that NAS systems, macOS and Windows make beside pictures: thumbnails, deleted files and the like.
SYSTEM_FOLDERS = ("@eaDir", "@Recycle", "@Recently-Snapshot", "#recycle", "#snapshot", "__MACOSX",
                  "$RECYCLE.BIN", "System Volume Information", "lost+found")


@contextmanager
def naming_file(path: Path) -> Iterator[None]:
    """Give an OSError the name of `path`: a full disk's has none, others may have a temporary file's."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) if error.errno else error from None


def write_atomically(path: Path, write: Callable[[str], None], check: Callable[[str], None] | None = None,
                     previous: Path | None = None) -> None:
    """Let `write` fill a temporary file beside `path`, flush it to the disk and rename it, so none is half.

    check: sees the temporary file before it takes its place. previous: where the file at `path` goes.
    """
    with naming_file(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f"{partial_start(path)}{secrets.token_hex(4)}{path.suffix}")
        try:
            write(str(temporary))
            flush(temporary)
            if check:
                check(str(temporary))
            if previous and path.exists():
                os.replace(path, previous)
            os.replace(temporary, path)
            flush(path.parent)
        except RuntimeError:                # torch.save's, which hides what the file system said: ask again
            append_text(temporary, " " * 2**20)
            raise
        finally:
            temporary.unlink(missing_ok=True)


def flush(path: Path) -> None:
    """Wait until a file, or a folder's list of files, is on the disk, where that can be asked for."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno not in CANNOT_FLUSH:
            raise


def write_text(path: Path, text: str) -> None:
    write_atomically(path, lambda temporary: append_text(Path(temporary), text))


def append_text(path: Path, text: str) -> None:
    """Add to the end of a text file and close it: nothing stays in a buffer."""
    with naming_file(path), open(path, "a", encoding="utf-8", errors="surrogateescape", newline="") as file:
        file.write(text)


def append_row(path: Path, *rows: Sequence) -> None:
    text = io.StringIO(newline="")
    csv.writer(text).writerows(rows)
    append_text(path, text.getvalue())


def write_csv(path: Path, rows: Iterable[Sequence]) -> None:
    write_atomically(path, lambda temporary: append_row(Path(temporary), *rows))


def cut_table(path: Path, columns: Sequence[str], step: int) -> None:
    """Begin a CSV file, or cut an earlier one back to its rows up to `step`; nan where a column is new."""
    rows = []
    if step and path.exists():
        rows = [row for row in csv.DictReader(io.StringIO(path.read_text("utf-8")))
                if None not in row and None not in row.values()             # cut off, or glued
                and row["step"].isdigit() and int(row["step"]) <= step]
    write_csv(path, [columns, *([row.get(name, "nan") for name in columns] for row in rows)])


def partial_start(path: Path) -> str:
    """What a file's name begins with until it is whole: short, whatever its own length."""
    return f"{PARTIAL}{zlib.crc32(os.fsencode(path.name)):08x}-"


def remove_partial(folder: Path, file: Path | None = None) -> None:
    """Remove what killed processes left half-written in a folder, of one file or of all."""
    for path in folder.glob(f"{partial_start(file) if file else PARTIAL}*"):
        path.unlink(missing_ok=True)


def list_files(folder: Path, extensions: Collection[str] | None = None,
               unreadable: list[str] | None = None) -> list[Path]:
    """All files below a folder and the folders that it links to, sorted, without hidden and system ones.

    extensions: in lower case, of the files to list; None for all. unreadable: takes a line on each folder
    that cannot be listed; None: InputError. What is no regular file is listed: reading it names it.
    """
    found, seen, closed = [], {os.path.realpath(folder)}, []    # each folder once: links may make circles
    for parent, folders, files in os.walk(folder, followlinks=True, onerror=closed.append):
        for name in sorted(folders):
            place = os.path.realpath(os.path.join(parent, name))
            if name.startswith(".") or name in SYSTEM_FOLDERS or place in seen:
                folders.remove(name)
            seen.add(place)
        found += [Path(parent, name) for name in files if not name.startswith(".")]
    lines = [f"{error.filename}: a folder that cannot be read ({error.strerror})" for error in closed]
    if unreadable is not None:
        unreadable += lines
    elif lines:
        raise InputError(lines[0])
    return sorted(path for path in found if extensions is None or path.suffix.lower() in extensions)
