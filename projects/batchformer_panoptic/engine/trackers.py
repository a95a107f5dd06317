"""Where the metrics of a run go besides console and file: TensorBoard, Weights & Biases, MLflow."""

import importlib.util
import re
from abc import abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml
from detectron2.config import CfgNode
from detectron2.utils.events import EventWriter, get_event_storage

from ..data.io import write_text
from ..errors import UserError, did_you_mean, one_line
from .train_loop import LOG_PERIOD
from .writers import TensorBoardWriter, warning_of_failure


class TrackerWriter(EventWriter):
    """Sends all new scalars to a tracker, under the name of ``OUTPUT_DIR``.

    The run of the tracker starts with the first scalars. A resumed training continues it; the file
    ``<name>_run_id`` in ``OUTPUT_DIR`` has its id. Failures after the start are warnings.

    Args:
        cfg: of the run.

    Attributes:
        name: of the tracker, which is also the module that is imported.
    """

    name: str

    def __init__(self, cfg: CfgNode) -> None:
        self._folder = Path(cfg.OUTPUT_DIR)
        self._config = cfg.dump()
        self._is_started = False
        self._last_iteration = -1

    def write(self) -> None:
        """Send the scalars that have not been sent.

        Raises:
            UserError: the tracker does not start a run.
        """
        storage = get_event_storage()
        if not self._is_started:
            self._start(is_resumed=storage.iter > 0)
        rows: dict[int, dict[str, float]] = {}
        for name, (value, iteration) in storage.latest_with_smoothing_hint(LOG_PERIOD).items():
            if iteration > self._last_iteration:
                rows.setdefault(iteration, {})[name] = value
        self._last_iteration = max(rows, default=self._last_iteration)
        with warning_of_failure(f"sending metrics to {self.name}"):
            for iteration in sorted(rows):
                self.send(rows[iteration], iteration)

    def close(self) -> None:
        """End the run of the tracker."""
        if self._is_started:
            with warning_of_failure(f"ending the run of {self.name}"):
                self.end()

    def _start(self, *, is_resumed: bool) -> None:
        record = self._folder / f"{self.name}_run_id"
        known = record.read_text().strip() if is_resumed and record.is_file() else None
        try:
            run_id = self.start(known)
        except Exception as error:  # each tracker has its own errors
            raise UserError(
                f"LOGGERS: {self.name} does not start a run: {one_line(error)}"
            ) from error
        write_text(record, run_id + "\n")
        self._is_started = True

    @abstractmethod
    def start(self, run_id: str | None) -> str:
        """Continue the run with this id, or start a new one; return its id."""

    @abstractmethod
    def send(self, scalars: Mapping[str, float], iteration: int) -> None:
        """Send the scalars of one iteration."""

    @abstractmethod
    def end(self) -> None:
        """End the run."""


class WandbWriter(TrackerWriter):
    """Weights & Biases; its environment variables choose project, account and offline mode."""

    name = "wandb"

    def start(self, run_id: str | None) -> str:
        """See the base class."""
        import wandb

        self._run: Any = wandb.init(
            id=run_id,
            resume="allow",
            name=self._folder.name,
            dir=str(self._folder),
            config=yaml.safe_load(self._config),
        )
        return str(self._run.id)

    def send(self, scalars: Mapping[str, float], iteration: int) -> None:
        """See the base class."""
        self._run.log(dict(scalars), step=iteration)

    def end(self) -> None:
        """See the base class."""
        self._run.finish()


class MLflowWriter(TrackerWriter):
    """MLflow; its environment variables choose server and experiment."""

    name = "mlflow"

    def start(self, run_id: str | None) -> str:
        """See the base class."""
        import mlflow

        self._mlflow: Any = mlflow
        run = mlflow.start_run(run_id=run_id, run_name=self._folder.name)
        mlflow.log_text(self._config, "config.yaml")
        return str(run.info.run_id)

    def send(self, scalars: Mapping[str, float], iteration: int) -> None:
        """See the base class."""
        # Names of classes may have characters that MLflow refuses.
        named = {re.sub(r"[^\w\-. :/]", "_", name): value for name, value in scalars.items()}
        self._mlflow.log_metrics(named, step=iteration, synchronous=False)

    def end(self) -> None:
        """See the base class."""
        self._mlflow.end_run()


# Value of LOGGERS: the writer for a config and a function that returns the first iteration.
LOGGERS: dict[str, Callable[[CfgNode, Callable[[], int]], EventWriter]] = {
    "tensorboard": lambda cfg, first_step: TensorBoardWriter(cfg.OUTPUT_DIR, first_step),
    WandbWriter.name: lambda cfg, _: WandbWriter(cfg),
    MLflowWriter.name: lambda cfg, _: MLflowWriter(cfg),
}


def check_loggers(names: Any) -> None:
    """Refuse a value of ``LOGGERS``.

    Raises:
        UserError: it is not a list of known names, or the package of one is not installed.
    """
    for name in [names] if isinstance(names, str) else names:
        if name not in LOGGERS or isinstance(names, str):
            raise UserError(
                f"LOGGERS is a list of {', '.join(LOGGERS)}, not {names!r}"
                f"{did_you_mean(str(name), LOGGERS)}"
            )
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None:  # a folder of this name, as trackers make them
            raise UserError(f"LOGGERS names {name}, which is not installed: pip install {name}")
