"""What stop signals do to a process, to its workers, and to what its parent leaves behind."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from torch.utils.data import DataLoader

from batchformer_panoptic import signals
from batchformer_panoptic.data.loader import prepare_worker
from batchformer_panoptic.errors import Stopped, command
from batchformer_panoptic.signals import STOP_SIGNALS, StopRequest, handling, stop_at_once


def send(number: int) -> None:
    os.kill(os.getpid(), number)


@pytest.fixture
def ignored_hangup() -> Iterator[None]:
    """As under ``nohup``."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("number", STOP_SIGNALS, ids=lambda number: number.name)
def test_a_command_reports_each_signal_by_its_status(
    number: int, capsys: pytest.CaptureFixture[str]
) -> None:
    before = signal.getsignal(number)

    @command
    def main() -> int:
        with handling(stop_at_once):
            send(number)
        return 0

    assert main() == 128 + number
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "interrupted" if number == signal.SIGINT else f"stopped by {signal.Signals(number).name}"
    ]
    assert signal.getsignal(number) is before


def test_what_another_process_says_is_not_said_twice(capsys: pytest.CaptureFixture[str]) -> None:
    @command
    def main() -> int:
        raise Stopped("", signal.SIGTERM, together=True)

    assert main() == 143
    assert capsys.readouterr().err == ""


@pytest.mark.usefixtures("ignored_hangup")
def test_an_ignored_signal_stays_ignored() -> None:
    with handling(stop_at_once):
        send(signal.SIGHUP)
        with pytest.raises(Stopped):
            send(signal.SIGUSR1)
    assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN


def test_a_thread_changes_no_handlers() -> None:
    found = []

    def read() -> None:
        with handling(stop_at_once):
            found.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=read)
    thread.start()
    thread.join()
    assert found == [signal.getsignal(signal.SIGTERM)]


def test_a_request_waits_and_a_second_ctrl_c_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(signals.time, "monotonic", lambda: now)
    request = StopRequest()
    with handling(request):
        assert not request.received
        send(signal.SIGINT)
        now += 0.5  # once more from the launcher
        send(signal.SIGINT)
        now += 5
        send(signal.SIGTERM)
        assert request.number == signal.SIGINT
        with pytest.raises(Stopped):
            send(signal.SIGINT)


def test_a_request_raises_where_there_is_no_step_to_finish() -> None:
    request = StopRequest()
    with handling(request):
        with pytest.raises(Stopped), request.raising():
            send(signal.SIGTERM)
        send(signal.SIGTERM)
        with pytest.raises(Stopped), request.raising():
            pytest.fail("a signal that came before counts")


def test_a_loader_worker_leaves_signals_to_the_main_process() -> None:
    batches = iter(DataLoader(list(range(100)), num_workers=1, worker_init_fn=prepare_worker))
    assert next(batches) == 0
    worker = batches._workers[0]
    for number in STOP_SIGNALS:
        # From another process, as a scheduler would.
        if os.fork() == 0:
            os.kill(worker.pid, number)
            os._exit(0)
    for _ in STOP_SIGNALS:
        os.wait()
    assert [int(next(batches)) for _ in range(20)] == list(range(1, 21))
    worker.terminate()  # as PyTorch does with a worker that does not end
    worker.join(timeout=5)
    assert worker.exitcode == 0
    del batches


def test_a_process_follows_its_parent(tmp_path: Path) -> None:
    ended = tmp_path / "ended"
    launcher = os.fork()
    if launcher == 0:
        if os.fork() == 0:
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # as in the background of a script
            signal.signal(signal.SIGTERM, lambda *_: (ended.touch(), os._exit(0)))
            signals.follow_parent()
            (tmp_path / "started").touch()
            time.sleep(20)
            os._exit(0)
        while not (tmp_path / "started").exists():
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(launcher, 0)
    deadline = time.monotonic() + 10
    while not ended.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert ended.exists()
