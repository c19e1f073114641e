"""Errors that a user can mend: the scripts print one line and exit with a non-zero status, without a traceback."""

import contextlib
import sys
from collections.abc import Iterator


class InputError(ValueError):
    """Wrong input or options. The message is one line: where, what was found, what was expected."""

    def __init__(self, message: str) -> None:
        # A DataLoader worker re-raises with its traceback in the message; the line for the user is the last one.
        super().__init__(message.strip().splitlines()[-1].removeprefix("utils.errors.InputError: "))


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
