"""Exceptions for problems that a user can correct, their wording, and how commands report them."""

import difflib
import functools
import sys
from collections.abc import Callable, Iterable
from typing import ParamSpec

_P = ParamSpec("_P")

# The exit status of every command after a user's mistake; argparse uses the same one.
USER_ERROR_STATUS = 2
# The one that shells give to a program that Ctrl-C has ended: 128 and the number of the signal.
INTERRUPTED_STATUS = 130


class UserError(ValueError):
    """A mistake in a command line, a config, a data set or a checkpoint.

    The message is one line: the offending value, and how to correct it. Commands print it without
    a traceback and exit with status 2.
    """


class NonFiniteError(UserError):
    """A matching cost or a loss is NaN or infinite: training has diverged.

    Args:
        message: the terms that are not finite, and of which images.
        entries: positions in the batch that are affected, where they are known.
    """

    def __init__(self, message: str, entries: Iterable[int] = ()) -> None:
        super().__init__(message)
        self.entries = tuple(entries)


class Stopped(KeyboardInterrupt):
    """A signal has ended a run; like Ctrl-C, this is no error.

    Args:
        message: one line about the state that is left; "": another process says it.
        number: of the signal.
        together: whether all processes of the run stop at this place.
    """

    def __init__(self, message: str, number: int, together: bool = False) -> None:
        super().__init__(message, number, together)
        self.message = message
        self.number = number
        self.together = together

    def __str__(self) -> str:
        """Return the message."""
        return self.message

    @property
    def status(self) -> int:
        """The exit status of the command, as shells report a signal: 128 and its number."""
        return 128 + self.number


def one_line(error: BaseException | str, *, first_line_only: bool = False) -> str:
    """Return the message of another library's error on one line.

    Args:
        error: the error, or its message.
        first_line_only: leave out everything after the first line, such as the C++ frames that
            PyTorch appends.
    """
    text = str(error).strip()
    return text.partition("\n")[0].strip() if first_line_only else " ".join(text.split())


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return ``"; did you mean X or Y?"`` for the known names close to ``name``, or ``""``."""
    close = difflib.get_close_matches(name, list(known), n=3)
    return f"; did you mean {' or '.join(close)}?" if close else ""


def command(main: Callable[_P, int]) -> Callable[_P, int]:
    """Decorate the ``main`` of a command: report a `UserError` in one line instead of a traceback.

    The line goes to standard error as ``error: MESSAGE``, and the exit status is 2, as for the
    mistakes that argparse finds. Ctrl-C is one line, too, with status 130, and so is another signal
    that `Stopped` reports, with its status. Every other exception passes.
    """

    @functools.wraps(main)
    def report(*args: _P.args, **kwargs: _P.kwargs) -> int:
        try:
            return main(*args, **kwargs)
        except UserError as error:
            sys.stderr.write(f"error: {error}\n")
            return USER_ERROR_STATUS
        except Stopped as stop:
            sys.stderr.write(f"{stop}\n" if str(stop) else "")
            return stop.status
        except KeyboardInterrupt:
            sys.stderr.write("interrupted\n")
            return INTERRUPTED_STATUS

    return report
