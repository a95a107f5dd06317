"""Detectron2's trainer with two streams, exact resuming, weight averaging and CPU processes."""

import contextlib
import logging
import shlex
import signal
import textwrap
import threading
import weakref
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.engine import DefaultTrainer, TrainerBase, create_ddp_model, hooks
from detectron2.evaluation import DatasetEvaluator
from detectron2.evaluation.testing import verify_results
from detectron2.utils import comm
from detectron2.utils.events import EventWriter, JSONWriter, TensorboardXWriter
from torch import nn

from ..batchformer.batchformer import TWO_STREAMS
from ..checkpoint import PanopticCheckpointer, SettingsRecord
from ..config import classifies
from ..data import build_test_loader, build_train_loader
from ..data.class_table import ClassTable
from ..data.io import read_json
from ..errors import UserError, one_line, user_message
from ..evaluation import build_evaluator, main_metric, per_class_values
from ..modeling.fast_inference import model_for_evaluation
from ..visualization import side_by_side
from ..visualization.report import example_pictures, has_examples, write_report
from .solver import build_gradient_clipper, build_lr_scheduler, build_optimizer
from .train_loop import LOG_PERIOD, NonFiniteError, StreamTrainLoop, WeightAverage
from .writers import BestCheckpointer, ConsoleWriter, LogWriter

logger = logging.getLogger(__name__)


class PanopticTrainer(DefaultTrainer):
    """Trains and evaluates the model of a config.

    A run that is stopped and resumed equals an uninterrupted one. The checkpoint has weights,
    optimizer, schedule, loss scale, average, iteration and seed. The random numbers of an iteration
    depend only on (SEED, iteration, rank), and the data loader is built when training starts, for
    the first iteration to be run.

    Args:
        cfg: from ``setup_cfg``; ``SEED`` is at least 0.
    """

    def __init__(self, cfg: CfgNode) -> None:
        # DefaultTrainer's constructor passes device_ids to DistributedDataParallel, which fails on
        # CPU, and builds the data loader before the first iteration is known.
        TrainerBase.__init__(self)
        cfg = DefaultTrainer.auto_scale_workers(cfg, comm.get_world_size())
        _warn_about_single_images(cfg)
        model = self.build_model(cfg)
        optimizer = self.build_optimizer(cfg, model)
        self.ema = WeightAverage(model, cfg.SOLVER.EMA_DECAY) if cfg.SOLVER.EMA_DECAY > 0 else None
        self._unwrapped = model
        self._trainer = StreamTrainLoop(
            _distribute(model, has_rests=_block_rests(cfg)),
            optimizer,
            clipper=build_gradient_clipper(cfg),
            stream_weights=dict(
                zip(TWO_STREAMS.names, cfg.MODEL.BATCHFORMER.STREAM_WEIGHTS, strict=True)
            ),
            seed=cfg.SEED,
            amp=cfg.SOLVER.AMP.ENABLED,
            accumulation=cfg.SOLVER.GRADIENT_ACCUMULATION,
            ema=self.ema,
        )
        self.scheduler = self.build_lr_scheduler(cfg, optimizer)
        self.checkpointer = PanopticCheckpointer(
            self.model,
            cfg.OUTPUT_DIR,
            training=True,
            class_table=_classes_of(cfg.DATASETS.TRAIN[0]),
            settings=SettingsRecord(cfg),
            ema=self.ema,
            # A proxy, as in DefaultTrainer: no reference cycle.
            trainer=weakref.proxy(self),
        )
        self.start_iter = 0
        self.max_iter = cfg.SOLVER.MAX_ITER
        self.cfg = cfg
        self._last_eval_results: dict[str, Any] | None = None
        self._is_between_steps = self._is_evaluating = self._is_interrupted = False
        self.register_hooks(self.build_hooks())

    def resume_or_load(self, resume: bool = True) -> None:
        """Resume from the last checkpoint of ``OUTPUT_DIR``, or load initial weights.

        Initial weights are ``MODEL.INIT_FROM``, a model of other classes, or ``MODEL.WEIGHTS``.

        Raises:
            UserError: the checkpoint cannot be read or does not fit.
        """
        source, weights = self.cfg.MODEL.INIT_FROM, self.cfg.MODEL.WEIGHTS
        if not source or (resume and self.checkpointer.has_checkpoint()):
            if source:
                logger.info(f"resuming the run: --init-from {source} is ignored")
            super().resume_or_load(resume)
        else:
            if weights:
                logger.warning(f"--init-from overrides MODEL.WEIGHTS {weights}")
            self.checkpointer.load_for_other_classes(source)
        if self.start_iter == 0 and self.ema is not None:
            self.ema.copy_live()
        if self._trainer.seed != self.cfg.SEED:
            logger.info(f"resuming with the seed of the run: {self._trainer.seed}")
            self.cfg = self.cfg.clone()
            self.cfg.defrost()
            self.cfg.SEED = self._trainer.seed
            self.cfg.freeze()

    def train(self) -> dict[str, Any] | None:
        """Train to ``SOLVER.MAX_ITER`` and return the results of the last evaluation.

        Ctrl-C ends a run of one process after its current step, or in its evaluation, with a
        checkpoint to resume from. Pressed twice, it ends the run at once.

        Raises:
            NonFiniteError: after the state before the failing step was saved as
                ``model_nonfinite.pth``.
            KeyboardInterrupt: after Ctrl-C.
        """
        self._trainer.start_iter, self._trainer.max_iter = self.start_iter, self.max_iter
        if self.start_iter < self.max_iter:
            first_batch = self.start_iter * self.cfg.SOLVER.GRADIENT_ACCUMULATION
            self.data_loader = self.build_train_loader(self.cfg, start_iter=first_batch)
        with _without_traceback_of_user_errors(), self._stopping_on_interrupt():
            super().train()
        if comm.is_main_process():
            self._log_outcome()
        return self._last_eval_results

    @contextlib.contextmanager
    def _stopping_on_interrupt(self) -> Iterator[None]:
        """Save the state after a Ctrl-C and name the file in the `KeyboardInterrupt`.

        Several processes would stop at different iterations, and other threads get no signals.
        """
        is_main_thread = threading.current_thread() is threading.main_thread()
        if comm.get_world_size() > 1 or not is_main_thread:
            yield
            return

        def interrupt(_number: int, _frame: FrameType | None) -> None:
            if self._is_interrupted or self._is_evaluating:
                raise KeyboardInterrupt
            self._is_interrupted = True

        before = signal.signal(signal.SIGINT, interrupt)
        try:
            yield
        except KeyboardInterrupt:
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # saving takes a moment
            logging.disable(logging.INFO)  # the user gets one line
            raise KeyboardInterrupt(self._save_interrupted()) from None
        finally:
            logging.disable(logging.NOTSET)
            signal.signal(signal.SIGINT, before)

    def _save_interrupted(self) -> str:
        """Save the state between two iterations; return the line for the user."""
        folder = self.cfg.OUTPUT_DIR
        if self.iter >= self.max_iter:
            return f"interrupted in the last evaluation: the weights are {folder}/model_final.pth"
        if not self._is_between_steps:
            return "interrupted in a step, without saving: --resume continues the last checkpoint"
        name = f"model_{self.iter:07d}"
        self.checkpointer.save(name, iteration=self.iter)
        older = ", but the evaluation is of earlier ones" if self._last_eval_results else ""
        _write_report(self.cfg, self._last_eval_results, f"{name}.pth{older}")
        return (
            f"interrupted after iteration {self.iter + 1} of {self.max_iter}: --resume continues "
            f"from {folder}/{name}.pth"
        )

    def after_step(self) -> None:
        """Run the hooks; stop here after a Ctrl-C."""
        self._is_between_steps = True
        super().after_step()
        if self._is_interrupted:
            raise KeyboardInterrupt

    def _log_outcome(self) -> None:
        """Write the report, and log the last lines: best file, its values, what to look at."""
        folder = Path(self.cfg.OUTPUT_DIR)
        best = folder / "model_best.json"
        if best.is_file():
            record = read_json(best)
            weights = folder / "model_best.pth"
            # The last evaluation is logged as one iteration after the last step.
            iteration = min(record["iteration"] + 1, self.max_iter)
            metric = f"{record['metric']} {record['value']:.2f}"
            logger.info(f"best: {weights}, {metric} after iteration {iteration}")
            per_class = record.get("per_class", {})  # written by older versions without it
        else:
            weights = folder / "model_final.pth"
            logger.info(f"last weights: {weights}")
            results = self._last_eval_results
            per_class = per_class_values(self.cfg, results) if results else {}
        _log_per_class(self.cfg, per_class)
        _write_report(self.cfg, self._last_eval_results, "model_final.pth")
        if len(self.cfg.DATASETS.TEST) and not classifies(self.cfg):
            words = ["--config-file", str(folder / "config.yaml")]
            words += ["--output", str(folder / "pictures"), "--opts", "MODEL.WEIGHTS", str(weights)]
            command = shlex.join(["tools/visualize_predictions.py", *words])
            logger.info(f"look at predictions: python {command}")

    def run_step(self) -> None:
        """Run one iteration; keep the state when its loss is not finite."""
        self._is_between_steps = False
        try:
            super().run_step()
        except NonFiniteError:
            # This iteration has not happened.
            self.iter -= 1
            self.checkpointer.save("model_nonfinite", iteration=self.iter)
            raise

    def build_hooks(self) -> list[hooks.HookBase]:
        """Return Detectron2's hooks: timer, schedule, checkpoints, evaluation, writers.

        The order matters: the best checkpointer reads the results of the evaluation before it, and
        the writers come last to see all scalars of the iteration.
        """
        cfg = self.cfg
        main = comm.is_main_process()

        def evaluate() -> dict[str, Any]:
            if self._is_interrupted:  # in the last step
                raise KeyboardInterrupt
            model = self._unwrapped if self.ema is None else self.ema.model
            self._is_evaluating = True
            self._last_eval_results = self.test(cfg, model)
            if main:
                with _warning_of_failure("drawing predictions"):
                    self._store_pictures(_by_dataset(cfg, self._last_eval_results))
            self._is_evaluating = False
            return self._last_eval_results

        built = [hooks.IterationTimer(), hooks.LRScheduler()]
        if main:
            period = cfg.SOLVER.CHECKPOINT_PERIOD
            built.append(hooks.PeriodicCheckpointer(self.checkpointer, period))
        if len(cfg.DATASETS.TEST):
            built.append(hooks.EvalHook(cfg.TEST.EVAL_PERIOD, evaluate))
        if main:
            if len(cfg.DATASETS.TEST) and cfg.TEST.EVAL_PERIOD > 0:
                built.append(
                    BestCheckpointer(
                        cfg.TEST.EVAL_PERIOD,
                        self.checkpointer,
                        _best_metric(cfg),
                        cfg.OUTPUT_DIR,
                        lambda: per_class_values(cfg, self._last_eval_results or {}),
                    )
                )
            built.append(
                LogWriter(self.build_writers(), LOG_PERIOD, cfg.TEST.EVAL_PERIOD, cfg.OUTPUT_DIR)
            )
        return built

    def _store_pictures(self, results: Mapping[str, Mapping[str, Any]]) -> None:
        """Give TensorBoard the first images of each panoptic data set, truth beside prediction."""
        for name, of_dataset in results.items():
            folder = _inference_dir(self.cfg, name)
            if not has_examples(of_dataset, folder):
                continue
            for pictures in example_pictures(folder, ["first"]):
                picture = side_by_side(
                    [pictures.truth, pictures.prediction], ["ground truth", "prediction"]
                )
                self.storage.put_image(f"{name}/{pictures.file_name}", picture.transpose(2, 0, 1))

    def build_writers(self) -> list[EventWriter]:
        """Return the writers of console, ``metrics.json`` and TensorBoard."""
        output_dir = Path(self.cfg.OUTPUT_DIR)
        output_dir.mkdir(parents=True, exist_ok=True)
        return [
            ConsoleWriter(self.max_iter),
            JSONWriter(str(output_dir / "metrics.json")),
            TensorboardXWriter(str(output_dir)),
        ]

    @classmethod
    def build_model(cls, cfg: CfgNode) -> nn.Module:
        """Build the model on its device.

        Raises:
            UserError: the settings are not those of a model.
        """
        try:
            return super().build_model(cfg)
        except UserError:
            raise
        except (KeyError, ValueError) as error:
            raise UserError(f"the model cannot be built: {one_line(error.args[0])}") from error

    @classmethod
    def build_optimizer(cls, cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
        """See `engine.solver`."""
        return build_optimizer(cfg, model)

    @classmethod
    def build_lr_scheduler(cls, cfg: CfgNode, optimizer: torch.optim.Optimizer) -> Any:
        """See `engine.solver`."""
        return build_lr_scheduler(cfg, optimizer)

    @classmethod
    def build_train_loader(cls, cfg: CfgNode, *, start_iter: int = 0) -> Any:
        """Return an endless loader that starts with the batch of ``start_iter``."""
        return build_train_loader(cfg, start_iter=start_iter)

    @classmethod
    def build_test_loader(cls, cfg: CfgNode, dataset_name: str) -> Any:
        """Return a loader for one pass over a data set."""
        return build_test_loader(cfg, dataset_name)

    @classmethod
    def build_evaluator(cls, cfg: CfgNode, dataset_name: str) -> DatasetEvaluator:
        """Return the evaluator, which writes to ``OUTPUT_DIR/inference/<data set>``."""
        return build_evaluator(cfg, dataset_name, str(_inference_dir(cfg, dataset_name)))

    @classmethod
    def test(
        cls,
        cfg: CfgNode,
        model: nn.Module,
        evaluators: DatasetEvaluator | Sequence[DatasetEvaluator] | None = None,
    ) -> dict[str, Any]:
        """Evaluate on ``DATASETS.TEST``; ``TEST.FAST`` evaluates a faster copy of the model."""
        results: dict[str, Any] = super().test(cfg, model_for_evaluation(cfg, model), evaluators)
        if comm.is_main_process():
            for name, of_dataset in _by_dataset(cfg, results).items():
                logger.info(f"{name}: {_summary(of_dataset)}")
        return results

    @classmethod
    def evaluate_weights(cls, cfg: CfgNode, *, resume: bool = False) -> dict[str, Any]:
        """Evaluate ``MODEL.WEIGHTS``, or the last checkpoint of ``OUTPUT_DIR`` with ``resume``.

        Raises:
            UserError: there are no weights to load, or they do not fit.
        """
        model = cls.build_model(cfg)
        checkpointer = PanopticCheckpointer(
            model,
            cfg.OUTPUT_DIR,
            class_table=_classes_of(cfg.DATASETS.TEST[0]),
            settings=SettingsRecord(cfg),
        )
        if not cfg.MODEL.WEIGHTS and not (resume and checkpointer.has_checkpoint()):
            raise UserError("--eval-only needs weights: MODEL.WEIGHTS FILE, or --resume")
        checkpointer.resume_or_load(cfg.MODEL.WEIGHTS, resume=resume)
        results: dict[str, Any] = cls.test(cfg, model)
        if not comm.is_main_process():
            return results
        weights = cfg.MODEL.WEIGHTS or "last checkpoint"
        _write_report(cfg, results, weights, trained=False)
        if cfg.TEST.EXPECTED_RESULTS:
            verify_results(cfg, results)
        return results


def _classes_of(dataset_name: str) -> ClassTable:
    return ClassTable.from_metadata(MetadataCatalog.get(dataset_name))


def _block_rests(cfg: CfgNode) -> bool:
    """Whether there are steps in which the block's parameters have no gradient."""
    node = cfg.MODEL.BATCHFORMER
    return bool(node.ENABLED and (node.EVERY > 1 or node.ATTEND == "none"))


def _distribute(model: nn.Module, *, has_rests: bool) -> nn.Module:
    device_ids = {} if next(model.parameters()).is_cuda else {"device_ids": None}
    return create_ddp_model(
        model, broadcast_buffers=False, find_unused_parameters=has_rests, **device_ids
    )


def _inference_dir(cfg: CfgNode, dataset_name: str) -> Path:
    return Path(cfg.OUTPUT_DIR) / "inference" / dataset_name


def _by_dataset(cfg: CfgNode, results: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return results per data set; Detectron2 leaves this level out for a single one."""
    return results if len(cfg.DATASETS.TEST) > 1 else {cfg.DATASETS.TEST[0]: results}


_SUMMARISED = ("PQ", "SQ", "RQ", "PQ_th", "PQ_st", "AP", "mIoU", "top1", "top5")


def _summary(results: Mapping[str, Mapping[str, float]]) -> str:
    """The main results on one line, in percent."""
    tasks = {
        task: " ".join(f"{k} {metrics[k]:.2f}" for k in _SUMMARISED if k in metrics)
        for task, metrics in results.items()
    }
    return ", ".join(f"{task} {values}" for task, values in tasks.items())


def _log_per_class(cfg: CfgNode, values: Mapping[str, float]) -> None:
    """Log the values of all classes, several on a line."""
    if values:
        metric = main_metric(cfg, cfg.DATASETS.TEST[0]).rpartition("/")[2]
        text = ", ".join(f"{name} {value:.1f}" for name, value in values.items())
        for line in textwrap.wrap(f"{metric} per class: {text}", width=110):
            logger.info(line)


@contextlib.contextmanager
def _warning_of_failure(action: str) -> Iterator[None]:
    """Log an error as a warning: a run is worth more than what describes it."""
    try:
        yield
    except Exception as error:
        logger.warning(f"{action} failed: {type(error).__name__}: {one_line(error)}")
        logger.debug(f"{action} failed", exc_info=True)


def _write_report(
    cfg: CfgNode, results: dict[str, Any] | None, weights: str, *, trained: bool = True
) -> None:
    with _warning_of_failure("the report"):
        by_dataset = _by_dataset(cfg, results) if results else None
        logger.info(f"report: {write_report(cfg, by_dataset, weights=weights, trained=trained)}")


def _best_metric(cfg: CfgNode) -> str:
    metric = main_metric(cfg, cfg.DATASETS.TEST[0])
    # With several data sets, Detectron2 prefixes the results with the name of the data set.
    return metric if len(cfg.DATASETS.TEST) == 1 else f"{cfg.DATASETS.TEST[0]}/{metric}"


def _warn_about_single_images(cfg: CfgNode) -> None:
    images = cfg.SOLVER.IMS_PER_BATCH // comm.get_world_size()
    node = cfg.MODEL.BATCHFORMER
    if node.ENABLED and node.ATTEND == "batch" and images == 1:
        logger.warning(
            "BatchFormerV2 attends over the images of one process, and each process has ONE image, "
            "so the block has no effect across images. Raise SOLVER.IMS_PER_BATCH to at least "
            f"{2 * comm.get_world_size()}, or use fewer processes."
        )


@contextlib.contextmanager
def _without_traceback_of_user_errors() -> Iterator[None]:
    """Suppress the traceback that Detectron2's loop logs for errors that the command reports."""
    loop_logger = logging.getLogger("detectron2.engine.train_loop")

    def keep(record: logging.LogRecord) -> bool:
        error = None if record.exc_info is None else record.exc_info[1]
        return error is None or user_message(error) is None

    loop_logger.addFilter(keep)
    try:
        yield
    finally:
        loop_logger.removeFilter(keep)
