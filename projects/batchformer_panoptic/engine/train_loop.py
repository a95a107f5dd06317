"""One training step: losses per stream, mixed precision, clipping, averaging, logging."""

import contextlib
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from detectron2.engine import SimpleTrainer
from detectron2.utils import comm
from detectron2.utils.events import get_event_storage
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..errors import UserError
from ..solver.build import GradientClipper
from .ema import WeightAverage
from .metrics import FiniteCheck, MetricWindow
from .seeding import seed_iteration
from .stream_losses import StreamLosses, combine_streams

LOG_PERIOD = 20


class NonFiniteLossError(UserError):
    """The loss became infinite or NaN; the message names iteration, terms and images."""


class StreamTrainLoop(SimpleTrainer):
    """Detectron2's simple loop with a step that knows about streams.

    The data loader may be set later, before the first step.

    Args:
        model: returns a dict of losses in training (see ``combine_streams``); may be wrapped for
            distributed training.
        optimizer: over the model's trainable parameters.
        clipper: clips the gradients and returns their total norm.
        stream_weights: factor of each stream's losses, by stream name.
        seed: of the run; every iteration seeds anew from (seed, iteration, rank).
        amp: mixed precision: float16 with loss scaling on CUDA, bfloat16 elsewhere.
        accumulation: batches whose gradients are averaged for one step; an iteration is a step.
            Random numbers are seeded anew for each of them, as for an iteration with one.
        ema: moving average to update after each step.
        log_period: iterations between two transfers of metrics; the first and the last iteration
            are always logged.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        clipper: GradientClipper,
        stream_weights: Mapping[str, float],
        seed: int,
        amp: bool = False,
        accumulation: int = 1,
        ema: WeightAverage | None = None,
        log_period: int = LOG_PERIOD,
    ) -> None:
        super().__init__(model, None, optimizer)
        self.seed = seed
        self.data_loader: Iterable[list[dict[str, Any]]] | None
        self._clip = clipper
        self._stream_weights = dict(stream_weights)
        self._accumulation = accumulation
        self._ema = ema
        self._log_period = log_period
        self._window = MetricWindow()
        self._core = model.module if isinstance(model, DistributedDataParallel) else model
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        self._device = self._parameters[0].device.type
        self._amp = amp
        self._scaler = torch.amp.GradScaler(self._device, enabled=amp and self._device == "cuda")

    def run_step(self) -> None:
        """Make one step of the optimizer, from one batch or the mean of several.

        Raises:
            NonFiniteLossError: before the step that would spoil the weights.
        """
        self.optimizer.zero_grad()
        data_time = 0.0
        metrics: dict[str, Tensor] = {}
        for part in range(self._accumulation):
            number = self.iter * self._accumulation + part
            seed_iteration(self.seed, number, comm.get_rank())
            start = time.perf_counter()
            batch = next(self._data_loader_iter)
            data_time += time.perf_counter() - start
            for name, value in self._accumulate(batch, last=part + 1 == self._accumulation).items():
                share = value.detach() / self._accumulation
                metrics[name] = metrics[name] + share if name in metrics else share
        self.after_backward()

        self._scaler.unscale_(self.optimizer)
        grad_norm = self._clip(self._parameters)
        self._scaler.step(self.optimizer)
        self._scaler.update()
        if self._ema is not None:
            self._ema.update()
        self._log({**metrics, "grad_norm": grad_norm}, data_time)

    def state_dict(self) -> dict[str, Any]:
        """Return iteration, optimizer, seed and loss scale."""
        state: dict[str, Any] = super().state_dict()
        state["seed"] = self.seed
        state["grad_scaler"] = self._scaler.state_dict()
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned."""
        super().load_state_dict(state_dict)
        self.seed = state_dict["seed"]
        if self._scaler.is_enabled() and state_dict["grad_scaler"]:
            self._scaler.load_state_dict(state_dict["grad_scaler"])

    def _accumulate(self, batch: list[dict[str, Any]], *, last: bool) -> dict[str, Tensor]:
        """Add the gradients of one batch; return its losses and metrics.

        Processes exchange gradients with the last batch of a step alone.
        """
        alone = not last and isinstance(self.model, DistributedDataParallel)
        with self.model.no_sync() if alone else contextlib.nullcontext():
            losses, combined, failure = self._forward(batch)
            total = (
                torch.tensor(math.nan, device=self._device) if combined is None else combined.total
            )
            check = FiniteCheck(total)
            if combined is None or (check.is_ready and not check.passed()):
                raise NonFiniteLossError(_describe_non_finite(self.iter, losses, failure, batch))
            self._scaler.scale(total / self._accumulation).backward()
        if not check.passed():
            raise NonFiniteLossError(_describe_non_finite(self.iter, losses, failure, batch))
        return {**combined.logged, **getattr(self._core, "training_metrics", {})}

    def _forward(
        self, batch: list[dict[str, Any]]
    ) -> tuple[Mapping[str, Tensor], StreamLosses | None, str]:
        """Losses, their combination, and, instead of both, what the model says is not finite.

        A model may notice infinities before there is a loss (in the matching cost). The error waits
        until all processes know of it.
        """
        try:
            with self._autocast():
                losses = self.model(batch)
        except FloatingPointError as error:
            return {}, None, str(error)
        return losses, combine_streams(losses, self._stream_weights), ""

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        if not self._amp:
            return contextlib.nullcontext()
        dtype = torch.float16 if self._device == "cuda" else torch.bfloat16
        return torch.autocast(self._device, dtype=dtype)

    def _log(self, metrics: Mapping[str, Tensor], data_time: float) -> None:
        storage = get_event_storage()
        storage.put_scalar("data_time", data_time)
        self._window.add(metrics)
        if not self.is_logged(self.iter):
            return
        # Loss scaling overflows now and then, and JSON has no word for infinity.
        means = {k: v for k, v in self._window.flush().items() if math.isfinite(v)}
        if comm.is_main_process():
            storage.put_scalars(**means, smoothing_hint=False)

    def is_logged(self, iteration: int) -> bool:
        """Whether the metrics of an iteration are transferred."""
        first, last = self.start_iter, self.max_iter - 1
        return iteration in (first, last) or (iteration + 1) % self._log_period == 0


def _describe_non_finite(
    iteration: int,
    losses: Mapping[str, Tensor],
    failure: str,
    batch: Sequence[Mapping[str, Any]],
) -> str:
    """One line for the whole run; all processes must call."""
    terms = [f"{k}={v.item()}" for k, v in losses.items() if not torch.isfinite(v)]
    terms += [failure] if failure else []
    images = [f"{x.get('image_id')} ({x.get('file_name')})" for x in batch] if terms else []
    everyone = comm.all_gather((terms, images))
    all_terms = list(dict.fromkeys(term for found, _ in everyone for term in found))
    all_images = [image for _, found in everyone for image in found]
    if not all_terms:
        all_terms, all_images = ["their sum"], []
    return (
        f"the loss is not finite at iteration {iteration}: {', '.join(all_terms)}; images of the "
        f"batch: {', '.join(all_images)}; the state before this step is in model_nonfinite.pth; "
        "look at these images, lower SOLVER.BASE_LR or switch SOLVER.AMP.ENABLED off"
    )
