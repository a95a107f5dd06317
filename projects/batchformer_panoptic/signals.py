"""Signals that end a run: which ones, what they do at each moment, and who passes them on."""

import contextlib
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType

from .errors import Stopped

# What terminals, users and schedulers send to end a job, as far as the system has them.
STOP_SIGNALS = tuple(
    signal.Signals[name]
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU")
    if hasattr(signal, name)
)
# A Ctrl-C may reach a process twice, from the terminal and from its launcher.
_SAME_CTRL_C = 1.0  # seconds
# Time to save after the end of the launcher; torchrun and torch's `start_processes` give as much.
_GRACE = 30.0  # seconds

Handler = Callable[[int, FrameType | None], None]


@contextlib.contextmanager
def handling(handler: Handler) -> Iterator[None]:
    """Handle the stop signals until the end of the block.

    Ignored signals stay ignored: SIGHUP under ``nohup``, SIGINT in the background of a script. A
    thread other than the main one gets no signals, so that nothing changes there.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    changed = {n: old for n, old in before.items() if old not in (signal.SIG_IGN, None)}
    for number in changed:
        signal.signal(number, handler)
    try:
        yield
    finally:
        for number, old in changed.items():
            signal.signal(number, old)


def describe(number: int) -> str:
    """Return "interrupted" for Ctrl-C, and else "stopped by" with the name of the signal."""
    name = signal.Signals(number).name
    return "interrupted" if number == signal.SIGINT else f"stopped by {name}"


def stop_at_once(number: int, _frame: FrameType | None) -> None:
    """Handle a signal where there is nothing to save."""
    raise Stopped(describe(number), number)


def ignore(_number: int, _frame: FrameType | None) -> None:
    """Handle a signal in a process that is about to end."""


class StopRequest:
    """A signal handler for training: remembers the signal, and the loop stops after its step.

    Attributes:
        number: the first signal, None before it.
        agreed: whether all processes know of a signal in one of them; set by the training loop.
    """

    def __init__(self) -> None:
        self.number: int | None = None
        self.agreed = False
        self._raises = False
        self._time = 0.0

    @property
    def received(self) -> bool:
        """Whether this process has got a signal."""
        return self.number is not None

    @contextlib.contextmanager
    def raising(self) -> Iterator[None]:
        """Raise `Stopped` for a signal inside the block, and for one before it."""
        self._raises = True
        try:
            if self.number is not None:
                stop_at_once(self.number, None)
            yield
        finally:
            self._raises = False

    def __call__(self, number: int, _frame: FrameType | None) -> None:
        """Remember a signal; raise `Stopped` for a second Ctrl-C."""
        now = time.monotonic()
        is_second = self.received and number == signal.SIGINT and now - self._time > _SAME_CTRL_C
        if not self.received:
            self.number, self._time = number, now
        if self._raises or is_second:
            raise Stopped(describe(number), number)


def leave_signals_to_main_process() -> None:
    """Make a worker process of a data loader ignore stop signals that are not its parent's.

    Terminals and schedulers send signals to all processes of a job, but the main process needs its
    workers for the last step. PyTorch ends a worker that does not end by itself with SIGTERM, and
    a system call is needed to tell the senders apart.
    """
    for number in STOP_SIGNALS:
        if number != signal.SIGTERM:
            signal.signal(number, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # Linux
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_by_parent, daemon=True).start()


def _end_by_parent() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)


def follow_parent() -> None:
    """Send SIGTERM to this process when the one that has started it ends, and later SIGKILL."""
    known = multiprocessing.parent_process()
    parent = known.pid if known is not None else os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(_GRACE)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()
