"""Output of a run: log, console line, periodic writing, best checkpoint, and the last lines."""

import datetime
import json
import logging
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from detectron2.engine.hooks import BestCheckpointer as Detectron2BestCheckpointer
from detectron2.engine.hooks import PeriodicWriter
from detectron2.utils import comm
from detectron2.utils.events import EventStorage, EventWriter, get_event_storage
from detectron2.utils.logger import setup_logger

from ..data.io import write_json, writing
from ..errors import printable

logger = logging.getLogger(__name__)


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


class LogWriter(PeriodicWriter):
    """Detectron2's periodic writer; also writes after the first iteration and each evaluation.

    Args:
        writers: called at each of these iterations.
        period: iterations between two calls.
        eval_period: iterations between two evaluations, 0: none. Without a call in between, the
            results of the next evaluation would overwrite those of the last one.
        output_dir: the folder of their files, named when one cannot be written.
    """

    def __init__(
        self, writers: list[EventWriter], period: int, eval_period: int, output_dir: str
    ) -> None:
        super().__init__(writers, period)
        self._output_dir = output_dir
        self._all_writers = writers
        self._eval_period = eval_period

    def after_step(self) -> None:
        """Write if the training loop has just logged or the model was just evaluated."""
        iteration = self.trainer.iter
        evaluated = self._eval_period > 0 and (iteration + 1) % self._eval_period == 0
        with writing(self._output_dir):
            if iteration == self.trainer.start_iter or evaluated:
                for writer in self._all_writers:
                    writer.write()
            else:
                super().after_step()

    def after_train(self) -> None:
        """Write what is left, and close the files."""
        with writing(self._output_dir):
            super().after_train()


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
        if torch.cuda.is_available():
            parts.append(f"max_mem: {torch.cuda.max_memory_allocated() / 2**20:.0f}M")
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
        self._record = Path(output_dir) / "model_best.json"
        self._written: int | None = None  # the iteration

    def before_train(self) -> None:
        """Read the best value of a resumed run."""
        if self.trainer.start_iter > 0 and self._record.is_file():
            record = json.loads(self._record.read_text())
            if record["metric"] == self._metric and record["iteration"] < self.trainer.start_iter:
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
        write_json(self._record, record, indent=2)
        self._written = self.best_iter
