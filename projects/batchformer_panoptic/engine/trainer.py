"""Detectron2's trainer with two streams, exact resuming, weight averaging and CPU processes."""

import contextlib
import logging
import shlex
import textwrap
import weakref
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.engine import DefaultTrainer, TrainerBase, hooks
from detectron2.evaluation import DatasetEvaluator
from detectron2.evaluation.testing import verify_results
from detectron2.utils import comm
from detectron2.utils.events import (
    EventWriter,
    JSONWriter,
    get_event_storage,
    has_event_storage,
)
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.nn.parallel import DistributedDataParallel

from ..batchformer.batchformer import TWO_STREAMS
from ..checkpoint import PanopticCheckpointer, RunRecord, SettingsRecord
from ..checkpoint.search import FINAL
from ..config import classifies
from ..data import CheckedLoader, build_test_loader, build_train_loader
from ..data.class_table import ClassTable
from ..data.io import write_text
from ..errors import Stopped, UserError, one_line, user_message
from ..evaluation import OverlappedEvaluator, build_evaluator, main_metric, per_class_values
from ..modeling.compiled import compile_regions
from ..modeling.fast_inference import model_for_evaluation
from ..modeling.precision import amp_dtype
from ..signals import StopRequest, describe, handling, ignore
from ..visualization import side_by_side
from ..visualization.curves import METRICS_NAME
from ..visualization.report import example_pictures, has_examples, write_report
from .output_folder import cut_metrics, hold, last_logged, logged_values, release
from .processes import is_failed_collective
from .solver import build_gradient_clipper, build_lr_scheduler, build_optimizer
from .threads import limit_threads
from .trackers import LOGGERS
from .train_loop import NonFiniteError, StreamTrainLoop, WeightAverage
from .writers import (
    BestCheckpointer,
    ConsoleWriter,
    KeptCheckpoints,
    LogWriter,
    best_record,
    warning_of_failure,
)

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
        images = cfg.SOLVER.IMS_PER_BATCH // comm.get_world_size()
        limit_threads(cfg, model, images, training=True, workers=cfg.DATALOADER.NUM_WORKERS)
        optimizer = self.build_optimizer(cfg, model)
        self.ema = WeightAverage(model, cfg.SOLVER.EMA_DECAY) if cfg.SOLVER.EMA_DECAY > 0 else None
        if cfg.SOLVER.COMPILE:
            compile_regions(model)
        self._unwrapped = model
        self._stop = StopRequest()
        self._trainer = StreamTrainLoop(
            _distribute(model, cfg),
            optimizer,
            clipper=build_gradient_clipper(cfg),
            stream_weights=dict(
                zip(TWO_STREAMS.names, cfg.MODEL.BATCHFORMER.STREAM_WEIGHTS, strict=True)
            ),
            seed=cfg.SEED,
            amp=amp_dtype(cfg) if cfg.SOLVER.AMP.ENABLED else None,
            accumulation=cfg.SOLVER.GRADIENT_ACCUMULATION,
            ema=self.ema,
            stop=self._stop,
            checkpoint_period=cfg.SOLVER.CHECKPOINT_PERIOD,
        )
        self.scheduler = self.build_lr_scheduler(cfg, optimizer)
        self._record = RunRecord(cfg, comm.get_world_size())
        self.checkpointer = PanopticCheckpointer(
            self.model,
            cfg.OUTPUT_DIR,
            training=True,
            class_table=_classes_of(cfg.DATASETS.TRAIN[0]),
            settings=SettingsRecord(cfg),
            ema=self.ema,
            run=self._record,
            # A proxy, as in DefaultTrainer: no reference cycle.
            trainer=weakref.proxy(self),
        )
        self.start_iter = 0
        self.is_resumed = False
        self.max_iter = cfg.SOLVER.MAX_ITER
        self.cfg = cfg
        self._last_eval_results: dict[str, Any] | None = None
        self._is_between_steps = False
        # Of a resumed run: the file, the values logged in its last iteration, and whether what
        # followed it in that iteration was cut off.
        self._resumed_from = ""
        self._last_values: dict[str, float] = {}
        self._is_cut_off = False
        self.register_hooks(self.build_hooks())

    def resume_or_load(self, resume: bool = True) -> None:
        """Resume from the last whole checkpoint of ``OUTPUT_DIR``, or load initial weights.

        Initial weights are ``MODEL.INIT_FROM``, a model of other classes, or ``MODEL.WEIGHTS``.

        Raises:
            UserError: the checkpoint cannot be read or does not fit, or the folder has a run but no
                whole checkpoint.
        """
        source, weights = self.cfg.MODEL.INIT_FROM, self.cfg.MODEL.WEIGHTS
        self.is_resumed = resume
        self._resumed_from = self.checkpointer.find_checkpoint() if resume else ""
        if self._resumed_from:
            if source:
                logger.info(f"resuming the run: --init-from {source} is ignored")
            self._resume(self._resumed_from)
        elif resume and last_logged(Path(self.cfg.OUTPUT_DIR)) >= self.cfg.SOLVER.CHECKPOINT_PERIOD:
            raise UserError(
                f"OUTPUT_DIR {self.cfg.OUTPUT_DIR} has the metrics of a run, but none of its "
                "checkpoints: restore them, or start anew with --overwrite"
            )
        elif source:
            if weights:
                logger.warning(f"--init-from overrides MODEL.WEIGHTS {weights}")
            self.checkpointer.load_for_other_classes(source)
        else:
            self.checkpointer.load(weights, checkpointables=[])
        if self.start_iter == 0 and self.ema is not None:
            self.ema.copy_live()
        if self._trainer.seed != self.cfg.SEED:
            logger.info(f"resuming with the seed of the run: {self._trainer.seed}")
            self.cfg = self.cfg.clone()
            self.cfg.defrost()
            self.cfg.SEED = self._trainer.seed
            self.cfg.freeze()

    def _resume(self, path: str) -> None:
        self.checkpointer.load(path)
        self.start_iter = self.iter + 1
        if not self._record.is_loaded:
            logger.info(f"{path} is of an older version: changed settings are not named")

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the state of a checkpoint; the schedule is that of the config."""
        super().load_state_dict(state_dict)
        if self.iter >= self.max_iter:
            raise UserError(
                f"cannot resume: SOLVER.MAX_ITER is {self.max_iter}, and the checkpoint has "
                f"{self.iter + 1} iterations; give as many or more"
            )
        self._last_values = state_dict.get("values", {})
        self.scheduler.last_epoch = self.iter + 1
        groups = self.optimizer.param_groups
        self.scheduler.base_lrs = [group["initial_lr"] for group in groups]
        for group, rate in zip(groups, self.scheduler.get_lr(), strict=True):
            group["lr"] = rate

    def state_dict(self) -> dict[str, Any]:
        """Return iteration, optimizer and what this iteration has logged so far."""
        state: dict[str, Any] = super().state_dict()
        if has_event_storage():
            storage = get_event_storage()
            hints = storage.smoothing_hints()
            latest = storage.latest().items()
            # Those with a hint are times.
            state["values"] = {k: v for k, (v, i) in latest if i == self.iter and not hints[k]}
        return state

    def train(self) -> dict[str, Any] | None:
        """Train to ``SOLVER.MAX_ITER`` and return the results of the last evaluation.

        Ctrl-C, SIGTERM and the other `STOP_SIGNALS` end the run after its current step, or in its
        evaluation, with a checkpoint to resume from. Several processes stop after the same step,
        whichever of them gets the signal. Ctrl-C pressed twice ends the run at once.

        Raises:
            NonFiniteError: after the state before the failing step was saved as
                ``model_nonfinite.pth``.
            Stopped: after a signal.
        """
        self._trainer.start_iter, self._trainer.max_iter = self.start_iter, self.max_iter
        if self.start_iter < self.max_iter:
            first_batch = self.start_iter * self.cfg.SOLVER.GRADIENT_ACCUMULATION
            self.data_loader = self.build_train_loader(self.cfg, start_iter=first_batch)
            if isinstance(self.data_loader, CheckedLoader) and self.data_loader.images:
                self._record.set_images(self.data_loader.images)
        with self._owning_output():
            with _without_traceback_of_user_errors(), self._stopping_on_signals():
                super().train()
            if comm.is_main_process():
                self._log_outcome()
        return self._last_eval_results

    @contextlib.contextmanager
    def _stopping_on_signals(self) -> Iterator[None]:
        """Save the state after a signal and name the file in `Stopped`."""
        with handling(self._stop):
            try:
                yield
            except Stopped as stop:
                with handling(ignore):  # saving takes a moment
                    logging.disable(logging.INFO)  # the user gets one line
                    raise self._save_stopped(stop) from None
            except RuntimeError as error:
                # The main process has left an evaluation to save, without the others.
                if self._stop.number is None or not is_failed_collective(error):
                    raise
                raise Stopped("", self._stop.number) from None
            finally:
                logging.disable(logging.NOTSET)

    @contextlib.contextmanager
    def _owning_output(self) -> Iterator[None]:
        """Keep other runs out of ``OUTPUT_DIR``; make its files those of a resumed checkpoint."""
        folder = Path(self.cfg.OUTPUT_DIR)
        try:
            if comm.is_main_process():
                hold(folder)
                if self.is_resumed:
                    self._continue_files(folder)
            self._is_cut_off = comm.all_gather(self._is_cut_off)[0]
            yield
        finally:
            if comm.is_main_process():
                release(folder)

    def _continue_files(self, folder: Path) -> None:
        """Find out what a kill has cut off after the checkpoint, and drop what is repeated."""
        best_record(folder)  # a damaged one ends the run here
        last = self.start_iter - 1
        if last >= 0:
            values = logged_values(folder, last)
            period = self.cfg.TEST.EVAL_PERIOD if len(self.cfg.DATASETS.TEST) else 0
            is_evaluated = period > 0 and self.start_iter % period == 0
            if is_evaluated and self.start_iter < self.max_iter:
                self._is_cut_off = _best_metric(self.cfg) not in values
            else:
                self._is_cut_off = self._trainer.is_logged(last) and not values
        cut_metrics(folder, self._first_written())
        write_text(folder / "config.yaml", self.cfg.dump())

    def _first_written(self) -> int:
        """The first iteration that this run writes metrics of."""
        return self.start_iter - int(self._is_cut_off)

    def before_train(self) -> None:
        """Run the hooks; complete the iteration of the checkpoint that the run is resumed from."""
        super().before_train()
        if self._resumed_from:
            self.iter = self.storage.iter = self.start_iter - 1
            self._complete_iteration()
            self.iter = self.storage.iter = self.start_iter

    def _complete_iteration(self) -> None:
        """Make up for what a kill has cut off after the checkpoint: final file, evaluation, log."""
        is_last = self.start_iter == self.max_iter
        if is_last and Path(self._resumed_from).name != FINAL:
            self.checkpointer.save(Path(FINAL).stem, iteration=self.iter)
        if self._is_cut_off:
            self.storage.put_scalars(**self._last_values, smoothing_hint=False)
            for hook in self._hooks:
                if isinstance(hook, hooks.EvalHook | BestCheckpointer | LogWriter):
                    hook.after_step()

    def after_train(self) -> None:
        """Run the hooks; without a step the iteration is the same as after one."""
        self.iter = min(self.iter, self.max_iter)
        super().after_train()

    def _save_stopped(self, stop: Stopped) -> Stopped:
        """Save the state between two iterations; return the exception with the user's line."""
        number = stop.number
        if stop.together:  # the signal may have reached only some processes
            number = next(n for n in comm.all_gather(self._stop.number) if n is not None)
        if not comm.is_main_process():
            return Stopped("", number, stop.together)
        folder, reason = self.cfg.OUTPUT_DIR, describe(number)
        if self.iter >= self.max_iter:
            line = f"{reason} in the last evaluation: the weights are {folder}/model_final.pth"
        elif not self._is_between_steps:
            line = f"{reason} in a step, without saving: --resume continues the last checkpoint"
        else:
            name = f"model_{self.iter:07d}"
            self.checkpointer.save(name, iteration=self.iter)
            older = ", but the evaluation is of earlier ones" if self._last_eval_results else ""
            _write_report(self.cfg, self._last_eval_results, f"{name}.pth{older}")
            line = (
                f"{reason} after iteration {self.iter + 1} of {self.max_iter}: --resume continues "
                f"from {folder}/{name}.pth"
            )
        return Stopped(line, number, stop.together)

    def after_step(self) -> None:
        """Run the hooks; stop here after a signal."""
        self._is_between_steps = True
        try:
            super().after_step()
        except NonFiniteError:  # the weights are not worth saving, nor evaluating
            self.iter -= 1
            raise
        self._stop_if_due()
        self._is_between_steps = False

    def _stop_if_due(self) -> None:
        """Raise `Stopped` if all processes know of a signal."""
        together = comm.get_world_size() > 1
        if self._stop.agreed if together else self._stop.received:
            raise Stopped("", self._stop.number or 0, together)

    def _log_outcome(self) -> None:
        """Write the report, and log the last lines: best file, its values, what to look at."""
        folder = Path(self.cfg.OUTPUT_DIR)
        record = best_record(folder)
        if record is not None:
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
        """Run one iteration; keep the state when its loss or gradient is not finite."""
        try:
            super().run_step()
        except NonFiniteError as error:
            # This iteration has not happened.
            self.iter -= 1
            raise NonFiniteError(f"{error}; {self._keep_state()}", error.entries) from None

    def _keep_state(self) -> str:
        """Save the state before an iteration that failed; return the words about it.

        All processes must call. The first one to leave would end the one that is saving.
        """
        name = "model_nonfinite"
        words = f"the state before this iteration is in {self.cfg.OUTPUT_DIR}/{name}.pth"
        try:
            self.checkpointer.save(name, iteration=self.iter)
        except NonFiniteError:
            words = "there is no state worth saving"
        except UserError as error:
            words = f"the state before this iteration is not saved: {error}"
        of_main: str = comm.all_gather(words)[0]
        return of_main

    def build_hooks(self) -> list[hooks.HookBase]:
        """Return Detectron2's hooks: timer, schedule, checkpoints, evaluation, writers.

        The order matters: the best checkpointer reads the results of the evaluation before it, and
        the writers come last to see all scalars of the iteration.
        """
        cfg = self.cfg
        main = comm.is_main_process()

        def evaluate() -> dict[str, Any]:
            self._stop_if_due()
            model = self._unwrapped if self.ema is None else self.ema.model
            with self._stop.raising() if main else contextlib.nullcontext():
                self._last_eval_results = self.test(cfg, model)
                # Only TensorBoard takes pictures; those that it does not take would pile up.
                if main and "tensorboard" in cfg.LOGGERS:
                    with warning_of_failure("drawing predictions"):
                        self._store_pictures(_by_dataset(cfg, self._last_eval_results))
            return self._last_eval_results

        built = [hooks.IterationTimer(), hooks.LRScheduler()]
        if main:
            period, kept = cfg.SOLVER.CHECKPOINT_PERIOD, cfg.SOLVER.CHECKPOINTS_KEPT
            built.append(KeptCheckpoints(self.checkpointer, period, kept, cfg.OUTPUT_DIR))
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
            writers, is_logged = self.build_writers(), self._trainer.is_logged
            built.append(LogWriter(writers, is_logged, cfg.TEST.EVAL_PERIOD, cfg.OUTPUT_DIR))
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
        """Return the writers of console, ``LOGGERS`` and ``metrics.json``.

        The last one comes last: an iteration in it is complete.
        """
        output_dir = Path(self.cfg.OUTPUT_DIR)
        output_dir.mkdir(parents=True, exist_ok=True)
        trainer = weakref.proxy(self)
        return [
            ConsoleWriter(self.max_iter),
            *(LOGGERS[name](self.cfg, trainer._first_written) for name in self.cfg.LOGGERS),
            JSONWriter(str(output_dir / METRICS_NAME)),
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
        """Return the evaluator, which writes to ``OUTPUT_DIR/inference/<data set>``.

        It processes a batch while the model predicts the next one.
        """
        folder = str(_inference_dir(cfg, dataset_name))
        return OverlappedEvaluator(build_evaluator(cfg, dataset_name, folder))

    @classmethod
    def test(
        cls,
        cfg: CfgNode,
        model: nn.Module,
        evaluators: DatasetEvaluator | Sequence[DatasetEvaluator] | None = None,
    ) -> dict[str, Any]:
        """Evaluate on ``DATASETS.TEST``; ``TEST.FAST`` evaluates a faster copy of the model."""
        # A compiled training is evaluated as an uncompiled one.
        is_eager = cfg.SOLVER.COMPILE and not cfg.TEST.FAST.COMPILE
        stance = torch.compiler.set_stance("force_eager") if is_eager else contextlib.nullcontext()
        with stance:
            results: dict[str, Any] = super().test(
                cfg, model_for_evaluation(cfg, model), evaluators
            )
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
        limit_threads(cfg, model, cfg.TEST.IMS_PER_BATCH, workers=cfg.DATALOADER.NUM_WORKERS)
        checkpointer = PanopticCheckpointer(
            model,
            cfg.OUTPUT_DIR,
            class_table=_classes_of(cfg.DATASETS.TEST[0]),
            settings=SettingsRecord(cfg),
        )
        weights = (checkpointer.find_checkpoint() if resume else "") or cfg.MODEL.WEIGHTS
        if not weights:
            raise UserError("--eval-only needs weights: MODEL.WEIGHTS FILE, or --resume")
        checkpointer.load(weights)
        results: dict[str, Any] = cls.test(cfg, model)
        if not comm.is_main_process():
            return results
        _write_report(cfg, results, weights, trained=False)
        if cfg.TEST.EXPECTED_RESULTS:
            verify_results(cfg, results)
        return results


def _classes_of(dataset_name: str) -> ClassTable:
    return ClassTable.from_metadata(MetadataCatalog.get(dataset_name))


_GRADIENT_COMPRESSIONS = {"none": None, "bfloat16": bf16_compress_hook}


def _distribute(model: nn.Module, cfg: CfgNode) -> nn.Module:
    """Wrap a model so that several processes average their gradients; one process needs nothing.

    Raises:
        UserError: an unknown ``SOLVER.GRADIENT_COMPRESSION``.
    """
    name = cfg.SOLVER.GRADIENT_COMPRESSION
    if name not in _GRADIENT_COMPRESSIONS:
        known = ", ".join(_GRADIENT_COMPRESSIONS)
        raise UserError(f"SOLVER.GRADIENT_COMPRESSION is {name!r}; known: {known}")
    return model if comm.get_world_size() == 1 else parallel(model, cfg)


def parallel(model: nn.Module, cfg: CfgNode) -> DistributedDataParallel:
    """Wrap a model so that the processes of the group average their gradients.

    Not as a static graph: it would save the search for parameters without a gradient, of which only
    a block that rests or has no effect has some, and in outputs other than plain containers of
    tensors it skips the first average without a word.
    """
    block = cfg.MODEL.BATCHFORMER
    has_unused = block.ENABLED and (block.EVERY > 1 or block.ATTEND == "none")
    # The current GPU, since srun may show each process only one.
    device_ids = [torch.cuda.current_device()] if next(model.parameters()).is_cuda else None
    wrapped = DistributedDataParallel(
        model,
        device_ids=device_ids,
        broadcast_buffers=False,
        find_unused_parameters=has_unused,
        gradient_as_bucket_view=True,
    )
    hook = _GRADIENT_COMPRESSIONS[cfg.SOLVER.GRADIENT_COMPRESSION]
    if hook is not None:
        wrapped.register_comm_hook(None, hook)
    return wrapped


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


def _write_report(
    cfg: CfgNode, results: dict[str, Any] | None, weights: str, *, trained: bool = True
) -> None:
    with warning_of_failure("the report"):
        by_dataset = _by_dataset(cfg, results) if results else None
        logger.info(f"report: {write_report(cfg, by_dataset, weights=weights, trained=trained)}")


def _best_metric(cfg: CfgNode) -> str:
    metric = main_metric(cfg, cfg.DATASETS.TEST[0])
    # With several data sets, Detectron2 prefixes the results with the name of the data set.
    return metric if len(cfg.DATASETS.TEST) == 1 else f"{cfg.DATASETS.TEST[0]}/{metric}"


def _warn_about_single_images(cfg: CfgNode) -> None:
    node, processes = cfg.MODEL.BATCHFORMER, comm.get_world_size()
    images = cfg.SOLVER.IMS_PER_BATCH // (1 if node.SYNC else processes)
    if node.ENABLED and node.ATTEND == "batch" and images == 1:
        others = ", or set MODEL.BATCHFORMER.SYNC True" if processes > 1 else ""
        logger.warning(
            "BatchFormerV2 attends over the images of one process, and each process has ONE image, "
            "so the block has no effect across images. Raise SOLVER.IMS_PER_BATCH to at least "
            f"{2 * processes}{others}."
        )


@contextlib.contextmanager
def _without_traceback_of_user_errors() -> Iterator[None]:
    """Suppress the traceback that Detectron2's loop logs for errors that the command reports."""
    loop_logger = logging.getLogger("detectron2.engine.train_loop")

    def keep(record: logging.LogRecord) -> bool:
        error = record.exc_info[1] if record.exc_info else None
        return error is None or (user_message(error) is None and not is_failed_collective(error))

    loop_logger.addFilter(keep)
    try:
        yield
    finally:
        loop_logger.removeFilter(keep)
