"""Errors that a user can mend: the scripts print one line and exit with non-zero status, no traceback."""

import contextlib
import difflib
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path


class InputError(ValueError):
    """Wrong input or options. One line: where, what was found, what expected. status: the script's exit."""

    def __init__(self, message: str, status: int = 1) -> None:
        self.status = status
        if message.startswith("Caught InputError in DataLoader worker"):    # a traceback, then our line
            message = message.strip().splitlines()[-1].removeprefix("utils.errors.InputError: ")
        super().__init__(printable(message))


def printable(text: str) -> str:
    """A text on one line: names of and out of files may hold anything."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def one_line(error: Exception | str, most: int = 300) -> str:
    """The first characters of a text that may have several lines."""
    return " ".join(str(error).split())[:most]


def out_of_memory(error: Exception) -> bool:
    """Whether an error says that a device's memory ran out: NumPy's, torch's on CUDA or a CPU, oneDNN's."""
    return any(text in repr(error) for text in ("MemoryError", "DefaultCPUAllocator", "Unable to allocate",
                                                "could not allocate memory", "Storage size calculation"))


def first_few(names: Iterable[str], count: int = 3) -> str:
    """The first of many names, for one line."""
    names = list(names)
    return "; ".join(names[:count]) + ("; ..." if len(names) > count else "")


def did_you_mean(name: str | Path, there: Iterable[str | Path]) -> str:
    """", did you mean X?" for a name that is not there, or nothing; names are compared without folders."""
    by_name = {Path(other).name.lower(): other for other in there}
    wanted = Path(name).name.lower()
    near = difflib.get_close_matches(wanted, by_name, n=3, cutoff=0.5)
    near.sort(key=lambda other: not wanted.startswith(other))       # of a1x2, a1 is meant, a2 as similar
    return f", did you mean {by_name[near[0]]}?" if near else ""


def count(number: int, thing: str) -> str:
    """"1 file", "2 files"."""
    return f"{number} {thing}" + "s" * (number != 1)


@contextlib.contextmanager
def naming(where: str) -> Iterator[None]:
    """A ValueError as an InputError that begins with where the value stands."""
    try:
        yield
    except ValueError as error:
        raise InputError(f"{where}: {error}") from None


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """End the process at an error that a user can mend, or Ctrl-C, with `error: <message>` and its status."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")   # a name may hold letters that its encoding lacks
    try:
        yield
    except (InputError, OSError, MemoryError, RuntimeError, KeyboardInterrupt) as error:
        message, status = str(error), getattr(error, "status", 1)
        if isinstance(error, KeyboardInterrupt):
            message, status = "interrupted", 130                # as shells have it
        elif out_of_memory(error):
            message = f"not enough memory ({one_line(error, 200)}), expected a smaller one"
        elif isinstance(error, RuntimeError):
            raise
        elif getattr(error, "filename", None):
            message = f"{error.filename}: {error.strerror}"
        sys.stderr.write(f"error: {printable(message)}\n")
        raise SystemExit(status) from None
