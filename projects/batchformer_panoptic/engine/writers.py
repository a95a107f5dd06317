"""Output of a run: log, console line, periodic writing, best checkpoint, and the last lines."""

import contextlib
import datetime
import logging
import mmap
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from detectron2.engine.hooks import BestCheckpointer as Detectron2BestCheckpointer
from detectron2.engine.hooks import PeriodicCheckpointer, PeriodicWriter
from detectron2.utils import comm
from detectron2.utils.events import (
    EventStorage,
    EventWriter,
    TensorboardXWriter,
    get_event_storage,
)
from detectron2.utils.logger import setup_logger

from ..checkpoint.search import numbered_checkpoints
from ..data.io import read_json, write_json, writing
from ..errors import UserError, one_line, printable

logger = logging.getLogger(__name__)

BEST_RECORD = "model_best.json"


def start_logging(output_dir: str, *, with_tables: bool) -> None:
    """Log everything to ``log.txt``, and what helps to follow the run to the console.

    Args:
        output_dir: the folder of ``log.txt``.
        with_tables: show messages of several lines on the console, too.
    """
    for name in ("detectron2", "fvcore", "batchformer_panoptic"):
        log = setup_logger(output_dir, distributed_rank=comm.get_rank(), name=name)
        for handler in log.handlers:
            handler.addFilter(_with_printable_message)
            if not isinstance(handler, logging.StreamHandler):
                continue
            report = partial(_drop_unwritable, handler.handleError)
            handler.handleError = report  # type: ignore[method-assign]
            if handler.stream is sys.stdout:
                handler.addFilter(_is_for_console)
                # Its colors are escape sequences; those of messages are escaped by the filter.
                handler.setStream(getattr(sys.stdout, "stream", sys.stdout))
                if not with_tables:
                    handler.addFilter(_is_one_line)


def _with_printable_message(record: logging.LogRecord) -> bool:
    record.msg, record.args = printable(record.getMessage()), None
    return True


def _drop_unwritable(
    report: Callable[[logging.LogRecord], None], record: logging.LogRecord
) -> None:
    """Leave out a line of the log that cannot be written, since disks fill up; not a reader's end.

    Files that a run cannot do without end it with their own message.
    """
    error = sys.exc_info()[1]
    if isinstance(error, BrokenPipeError):
        raise error
    if not isinstance(error, OSError):
        report(record)


def _is_for_console(record: logging.LogRecord) -> bool:
    if record.levelno != logging.INFO:
        return record.levelno > logging.INFO
    if record.name == "detectron2.evaluation.evaluator":
        return record.getMessage().startswith("Inference done")
    return record.name.startswith(("batchformer_panoptic", "fvcore.common.checkpoint"))


def _is_one_line(record: logging.LogRecord) -> bool:
    return record.levelno > logging.INFO or "\n" not in record.getMessage()


@contextlib.contextmanager
def warning_of_failure(action: str) -> Iterator[None]:
    """Log an error as a warning: a run is worth more than what describes it."""
    try:
        yield
    except Exception as error:
        logger.warning(f"{action} failed: {type(error).__name__}: {one_line(error)}")
        logger.debug(f"{action} failed", exc_info=True)


def memory_in_use() -> dict[str, float]:
    """Return the memory of this process in MiB, by the name of the metric.

    ``gpu_memory``, with CUDA: the most that PyTorch has allocated on the current GPU since the
    start. ``cpu_memory``, on Linux: what the process occupies now.
    """
    memory = {}
    if torch.cuda.is_initialized():
        memory["gpu_memory"] = torch.cuda.max_memory_allocated() / 2**20
    pages = Path("/proc/self/statm")
    if pages.exists():
        memory["cpu_memory"] = int(pages.read_text().split()[1]) * mmap.PAGESIZE / 2**20
    return memory


class LogWriter(PeriodicWriter):
    """Detectron2's periodic writer; writes when the training loop does, and after evaluations.

    Args:
        writers: called at each of these iterations.
        is_logged: tells whether the training loop logs an iteration.
        eval_period: iterations between two evaluations, 0: none. Without a call in between, the
            results of the next evaluation would overwrite those of the last one.
        output_dir: the folder of their files, named when one cannot be written.
    """

    def __init__(
        self,
        writers: list[EventWriter],
        is_logged: Callable[[int], bool],
        eval_period: int,
        output_dir: str,
    ) -> None:
        super().__init__(writers)
        self._output_dir = output_dir
        self._all_writers = writers
        self._is_logged = is_logged
        self._eval_period = eval_period

    def after_step(self) -> None:
        """Write if the training loop has just logged or the model was just evaluated."""
        iteration = self.trainer.iter
        evaluated = self._eval_period > 0 and (iteration + 1) % self._eval_period == 0
        with writing(self._output_dir):
            for writer in self._all_writers if evaluated or self._is_logged(iteration) else ():
                writer.write()

    def after_train(self) -> None:
        """Write what is left, and close the files."""
        with writing(self._output_dir):
            super().after_train()


class TensorBoardWriter(TensorboardXWriter):
    """Detectron2's writer of TensorBoard events, for runs that are killed and resumed.

    Args:
        log_dir: the folder of ``events.out.tfevents.*``.
        first_step: returns the first iteration of this run, known when it starts. TensorBoard does
            not show what an earlier run has written of it and later ones.
    """

    def __init__(self, log_dir: str, first_step: Callable[[], int]) -> None:
        super().__init__(log_dir)
        self._first_step = first_step

    def write(self) -> None:
        """Write to the disk; torch would keep values for two minutes, which a kill would lose."""
        self._writer_args["purge_step"] = self._first_step()
        super().write()
        self._writer.flush()


class KeptCheckpoints(PeriodicCheckpointer):
    """Detectron2's periodic checkpointer, which can delete all but the newest numbered files.

    Detectron2's own limit does not count the files from before a resumed run.

    Args:
        checkpointer: writes the files.
        period: iterations between two of them.
        kept: how many are kept; 0: all.
        folder: the folder of the checkpoints.
    """

    def __init__(self, checkpointer: Any, period: int, kept: int, folder: str) -> None:
        super().__init__(checkpointer, period)
        self._kept = kept
        self._folder = Path(folder)

    def before_train(self) -> None:
        """Delete what a killed run has not deleted any more."""
        super().before_train()
        self._thin(self.trainer.start_iter - 1)

    def after_step(self) -> None:
        """Save if it is time to, and delete the oldest."""
        super().after_step()
        if (self.trainer.iter + 1) % self.period == 0:
            self._thin(self.trainer.iter)

    def _thin(self, iteration: int) -> None:
        # Files of later iterations are of a run from before, and no reason to delete this one's.
        numbered = numbered_checkpoints(self._folder)
        paths = [path for number, path in numbered.items() if number <= iteration]
        for path in paths[: -self._kept] if self._kept else []:
            path.unlink()


class ConsoleWriter(EventWriter):
    """Logs one line with progress, ETA, totals, losses of the last layer, gradient norm and times.

    Detectron2's printer shows every scalar with "loss" in its name: about a hundred with auxiliary
    layers and two streams. ``metrics.json`` and TensorBoard have all of them.

    Args:
        max_iter: number of iterations of the run.
    """

    def __init__(self, max_iter: int) -> None:
        self._max_iter = max_iter

    def write(self) -> None:
        """Log the line, except after the last iteration."""
        storage = get_event_storage()
        if storage.iter >= self._max_iter:
            return
        parts = [f"iter: {storage.iter + 1}/{self._max_iter}", f"eta: {self._eta(storage)}"]
        latest = {name: value for name, (value, _) in storage.latest().items()}
        shown = [name for name in latest if self._is_shown(name)]
        parts += [f"{name}: {latest[name]:.4g}" for name in shown]
        if "lr" in latest:
            parts.append(f"lr: {latest['lr']:.3g}")
        parts += [
            f"{name}: {latest[name]:.3f}s" for name in ("time", "data_time") if name in latest
        ]
        if "images_per_second" in latest:
            parts.append(f"images/s: {latest['images_per_second']:.3g}")
        memory = latest.get("gpu_memory", latest.get("cpu_memory"))
        if memory is not None:
            parts.append(f"memory: {memory:.0f}M")
        logger.info("  ".join(parts))

    @staticmethod
    def _is_shown(name: str) -> bool:
        if name.endswith("total_loss") or name == "grad_norm":
            return True
        # No auxiliary layers ("loss_ce_0") and no terms of a single stream ("original/loss_ce").
        return name.startswith("loss_") and "/" not in name and not name[-1].isdigit()

    def _eta(self, storage: EventStorage) -> str:
        if "time" not in storage.histories():
            return "?"
        seconds = storage.history("time").median(1000) * (self._max_iter - storage.iter - 1)
        storage.put_scalar("eta_seconds", seconds, smoothing_hint=False)
        return str(datetime.timedelta(seconds=int(seconds)))


def best_record(folder: Path) -> dict[str, Any] | None:
    """Return the content of ``model_best.json``, None without the file.

    Raises:
        UserError: the file is damaged.
    """
    path = folder / BEST_RECORD
    if not path.is_file():
        return None
    try:
        record = read_json(path)
        if isinstance(record, dict) and {"metric", "value", "iteration"} <= record.keys():
            return record
        reason = f"{path} is no record of the best evaluation"
    except UserError as error:
        reason = str(error)
    raise UserError(f"{reason}; restore it, or delete it to look for the best among later ones")


class BestCheckpointer(Detectron2BestCheckpointer):
    """Detectron2's best checkpointer; a resumed run continues with the best value so far.

    Writes ``model_best.pth``, and ``model_best.json`` with metric, value, iteration and the values
    per class.

    Args:
        eval_period: iterations between two evaluations.
        checkpointer: writes the file.
        metric: "task/metric"; higher is better.
        output_dir: the folder of ``model_best.json``.
        per_class: returns the values of the last evaluation, in percent.
    """

    def __init__(
        self,
        eval_period: int,
        checkpointer: Any,
        metric: str,
        output_dir: str,
        per_class: Callable[[], dict[str, float]],
    ) -> None:
        super().__init__(eval_period, checkpointer, metric)
        self._per_class = per_class
        self._metric = metric
        self._folder = Path(output_dir)
        self._written: int | None = None  # the iteration

    def before_train(self) -> None:
        """Read the best value of a resumed run."""
        record = best_record(self._folder) if self.trainer.is_resumed else None
        has_weights = (self._folder / "model_best.pth").is_file()
        if record is not None and record["metric"] == self._metric and has_weights:
            self.best_metric, self.best_iter = record["value"], record["iteration"]
            self._written = self.best_iter

    def after_step(self) -> None:
        """Save if the evaluation of this iteration is the best so far."""
        super().after_step()
        self._write_record()

    def after_train(self) -> None:
        """Save if the last evaluation is the best."""
        super().after_train()
        self._write_record()

    def _write_record(self) -> None:
        if self.best_metric is None or self.best_iter == self._written:
            return
        record = {
            "metric": self._metric,
            "value": self.best_metric,
            "iteration": self.best_iter,
            "per_class": self._per_class(),
        }
        write_json(self._folder / BEST_RECORD, record, indent=2)
        self._written = self.best_iter
