"""Exceptions for problems that a user can correct, their wording, and how commands report them."""

import contextlib
import difflib
import errno
import functools
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any, ParamSpec, cast

_P = ParamSpec("_P")

# The exit status of every command after a user's mistake; argparse uses the same one.
USER_ERROR_STATUS = 2
# Those that shells give to a program that Ctrl-C has ended, and to one whose reader has gone.
INTERRUPTED_STATUS, BROKEN_PIPE_STATUS = 130, 141

# Refusals of the system that a user can remedy: place, rights, limits, names.
_REFUSALS = frozenset(
    {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO}
    | {errno.ENOENT, errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP}
    | {errno.EMFILE, errno.ENFILE, errno.ENOMEM}
)
# How PyTorch (CPU, CUDA) and OpenCV word it; their exceptions have no class of their own.
_OUT_OF_MEMORY = re.compile(r"can't allocate memory|out of memory|Insufficient memory")
_WORKER_ENDED = re.compile(r"DataLoader worker \(pid\S* [\d, ]+\) (is killed|exited)")
# How libraries written in Rust name the system's error.
_OS_ERROR = re.compile(r"\(os error (\d+)\)")
# Control characters except those of plain text: escape sequences of terminals, and marks that turn
# the order of letters.
_CONTROL = re.compile(
    r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)


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


def printable(text: str) -> str:
    """Return a text with its control characters written as escapes.

    Names of files and classes come from others, and a terminal would obey what they contain. Line
    breaks and tabs are kept.
    """
    return _CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


class PrintableStream:
    """A text stream that writes `printable` text, and is otherwise the stream that it wraps."""

    def __init__(self, stream: Any) -> None:
        self.stream = stream

    def write(self, text: str) -> int:
        """Write a text; the result counts the characters of its printable form."""
        written: int = self.stream.write(printable(text))
        return written

    def __getattr__(self, name: str) -> Any:
        """Everything else is that of the stream."""
        return getattr(self.stream, name)


@contextlib.contextmanager
def printable_output() -> Iterator[None]:
    """Make standard output and standard error a `PrintableStream` inside the block."""
    with (
        contextlib.redirect_stdout(cast(Any, PrintableStream(sys.stdout))),
        contextlib.redirect_stderr(cast(Any, PrintableStream(sys.stderr))),
    ):
        yield


def refusal_of(error: BaseException) -> OSError | None:
    """Return the system's refusal (disk full, no rights, ...) behind an error, or None.

    PyTorch reports its own errors while it handles that of a file, and libraries written in Rust
    give the number in the text.
    """
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError) and seen.errno in _REFUSALS:
            return seen
        found = _OS_ERROR.search(str(seen))
        if found is not None and int(found[1]) in _REFUSALS:
            return OSError(int(found[1]), os.strerror(int(found[1])))
        seen = seen.__cause__ or seen.__context__
    return None


def command(main: Callable[_P, int]) -> Callable[_P, int]:
    """Decorate the ``main`` of a command: report mistakes in one line instead of a traceback.

    The line goes to standard error as ``error: MESSAGE``, and the exit status is 2, as for the
    mistakes that argparse finds. Reported are a `UserError`, a refusal of the system (disk full, no
    rights, too many files), and a lack of memory. Ctrl-C is one line, too, with status 130, and so
    is another signal that `Stopped` reports, with its status. A reader that has gone (``| head``)
    ends the command quietly with status 141. Every other exception passes.
    """

    @functools.wraps(main)
    def report(*args: _P.args, **kwargs: _P.kwargs) -> int:
        with printable_output():
            try:
                status = main(*args, **kwargs)
                sys.stdout.flush()  # here, where its failure is still reported
                return status
            except Stopped as stop:
                sys.stderr.write(f"{stop}\n" if str(stop) else "")
                return stop.status
            except KeyboardInterrupt:
                sys.stderr.write("interrupted\n")
                return INTERRUPTED_STATUS
            except BrokenPipeError:
                _discard_unwritable_output()
                return BROKEN_PIPE_STATUS
            except Exception as error:
                message = user_message(error)
                if message is None:
                    raise
                _discard_unwritable_output()
                message = message.replace("\r", "\\r").replace("\n", "\\n")
                sys.stderr.write(f"error: {message}\n")
                return USER_ERROR_STATUS

    return report


def user_message(error: BaseException) -> str | None:
    """Return the line for the user; None for an error that is not the user's."""
    if isinstance(error, UserError):
        return str(error)
    if _WORKER_ENDED.search(str(error)):
        return (
            "a worker process that reads images was killed, most often for lack of memory: set a "
            "smaller DATALOADER.NUM_WORKERS (0 reads in the main process), and --resume"
        )
    if isinstance(error, MemoryError) or _OUT_OF_MEMORY.search(str(error)):
        return (
            f"not enough memory ({one_line(error, first_line_only=True)}): use fewer images at a "
            "time, smaller ones, or a machine with more memory"
        )
    refusal = refusal_of(error)
    if refusal is None:
        return None
    if refusal.errno in (errno.EMFILE, errno.ENFILE):
        return "too many open files: raise the limit (ulimit -n), or use fewer processes"
    name = refusal.filename2 or refusal.filename
    return f"{'output' if name is None else os.fsdecode(name)}: {refusal.strerror}"


def _discard_unwritable_output() -> None:
    """Drop what standard output cannot take, so that Python does not fail again at its end."""
    try:
        sys.stdout.flush()
    except OSError:
        with contextlib.suppress(OSError, ValueError):  # it may be an object without a file
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
