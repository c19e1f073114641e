"""Errors that a user can mend: the scripts print one line and exit with a non-zero status, without a traceback."""

import contextlib
import sys
from collections.abc import Iterable, Iterator


class InputError(ValueError):
    """Wrong input or options. The message is one line: where, what was found, what was expected."""

    def __init__(self, message: str) -> None:
        if message.startswith("Caught InputError in DataLoader worker"):    # re-raised with its traceback: the last line is ours
            message = message.strip().splitlines()[-1].removeprefix("utils.errors.InputError: ")
        # Names out of files may hold anything: nothing in them starts a new line or moves the terminal's cursor.
        super().__init__("".join(c if c.isprintable() else ascii(c)[1:-1] for c in message))


def first_few(names: Iterable[str], count: int = 3) -> str:
    """The first of many names, for one line."""
    names = list(names)
    return "; ".join(names[:count]) + ("; ..." if len(names) > count else "")


def count(number: int, thing: str) -> str:
    """"1 file", "2 files"."""
    return f"{number} {thing}" + ("" if number == 1 else "s")


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """Turn an InputError, or a file that cannot be read or written, into `error: <message>` on stderr and exit status 1.

    Ctrl-C ends with status 130, as shells have it.
    """
    try:
        yield
    except InputError as error:
        message, status = str(error), 1
    except OSError as error:
        message, status = f"{error.filename}: {error.strerror}" if error.filename else str(error), 1
    except KeyboardInterrupt:
        message, status = "interrupted", 130
    else:
        return
    sys.stderr.write(f"error: {message}\n")
    raise SystemExit(status)
