"""The error that a user can mend: the scripts print its one line and exit with status 1, without a traceback."""

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
    """Turn an InputError into `error: <message>` on stderr and exit status 1."""
    try:
        yield
    except InputError as error:
        sys.stderr.write(f"error: {error}\n")
        raise SystemExit(1) from None
