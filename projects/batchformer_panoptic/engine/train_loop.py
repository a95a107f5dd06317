"""The training step: stream losses, mixed precision, clipping, weight averaging and logging."""

import contextlib
import math
import random
import time
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from detectron2.engine import SimpleTrainer
from detectron2.utils import comm
from detectron2.utils.events import get_event_storage
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from ..batchformer import BatchFormerHook
from ..checkpoint.files import non_finite
from ..checkpoint.mismatch import first
from ..errors import NonFiniteError, UserError
from ..modeling.precision import HalfWeights
from ..signals import StopRequest
from .solver import GradientClipper, resumed_state
from .writers import memory_in_use

# Random numbers.


def seed_iteration(seed: int, iteration: int, rank: int) -> None:
    """Seed torch (all devices), numpy and random for one training iteration of one process.

    No generator state has to be saved: an iteration draws the same numbers in an uninterrupted and
    in a resumed run, with or without an evaluation in between.

    Args:
        seed: the seed of the run, at least 0, the same in all processes.
        iteration: from 0.
        rank: the rank of the process; processes draw different numbers.
    """
    mixed = int(np.random.SeedSequence([seed, iteration, rank]).generate_state(1)[0])
    random.seed(mixed)
    np.random.seed(mixed)
    torch.manual_seed(mixed)


# Weight averaging.


class WeightAverage:
    """Exponential moving average of a model's parameters; buffers are copied from the model.

    The average starts from the weights after the first update. In a checkpoint, the averaged
    weights are stored under "model", where evaluation reads them. `state_dict` therefore returns
    the *live* weights, those being trained.

    Args:
        model: the live model, not wrapped for distributed training.
        decay: weight of the old average in each update, in (0, 1).
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self._live = model
        self._averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay))

    @property
    def model(self) -> nn.Module:
        """A copy of the model with averaged weights, for evaluation."""
        return self._averaged.module

    def update(self) -> None:
        """Update the average with the live weights; called after each optimizer step."""
        self._averaged.update_parameters(self._live)

    def copy_live(self) -> None:
        """Set the average to the live weights."""
        self._averaged.module.load_state_dict(self._live.state_dict())

    def averaged_state_dict(self) -> dict[str, Tensor]:
        """Return the averaged weights with the model's own keys."""
        return self._averaged.module.state_dict()

    def state_dict(self) -> dict[str, Any]:
        """Return the live weights and the number of updates of the average."""
        return {"weights": self._live.state_dict(), "steps": int(self._averaged.n_averaged)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore both; called after the averaged weights were loaded into the live model."""
        self.copy_live()
        self._averaged.n_averaged.fill_(state["steps"])
        self._live.load_state_dict(state["weights"])


# Metrics and checks without host synchronisation.


class MetricWindow:
    """Averages 0-d tensors over iterations and processes with one transfer per window.

    Between two calls of `flush`, all values stay on the device, and an iteration costs one stack
    and one addition. Iterations may have different names (``MODEL.BATCHFORMER.EVERY``), each set of
    them with a transfer of its own, but must have the same ones in all processes.
    """

    def __init__(self) -> None:
        self._sums: dict[tuple[str, ...], tuple[Tensor, int]] = {}

    def add(self, metrics: Mapping[str, Tensor]) -> None:
        """Add the values of one iteration."""
        values = torch.stack([value.detach().float() for value in metrics.values()])
        total, count = self._sums.get(tuple(metrics), (0.0, 0))
        self._sums[tuple(metrics)] = (total + values, count + 1)

    def flush(self) -> dict[str, float]:
        """Return the mean of each name since the last call, and start a new window.

        A collective operation; only the main process gets the means over all processes.
        """
        found: dict[str, list[tuple[float, int]]] = {}
        for names, (total, count) in self._sums.items():
            mean = total / (count * comm.get_world_size())
            if comm.get_world_size() > 1:
                torch.distributed.reduce(mean, dst=0)
            for name, value in zip(names, mean.tolist(), strict=True):
                found.setdefault(name, []).append((value, count))
        self._sums = {}
        return {
            name: sum(value * count for value, count in parts) / sum(count for _, count in parts)
            for name, parts in found.items()
        }


class FiniteCheck:
    """Checks in every iteration whether a value of the step is finite.

    On CUDA, the values are copied to pinned memory, and `passed` waits for this copy only. In a run
    of one process, that of the loss is read after the backward pass has been queued, so that the
    device does not idle. That of the gradient norm is read before the optimizer's step is queued.

    Args:
        values: 0-d or 1-d float, the same in all processes; the first one is checked.
    """

    def __init__(self, values: Tensor) -> None:
        values = values.detach().reshape(-1)
        self._event: torch.cuda.Event | None = None
        if values.is_cuda:
            self._values = torch.empty(values.shape, pin_memory=True)
            self._values.copy_(values, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()
        else:
            self._values = values

    @property
    def is_ready(self) -> bool:
        """Whether `passed` returns without waiting for the device."""
        return self._event is None

    def passed(self) -> bool:
        """Whether the first value is finite."""
        return math.isfinite(self.read()[0])

    def read(self) -> list[float]:
        """Return the values."""
        if self._event is not None:
            self._event.synchronize()
        values: list[float] = self._values.tolist()
        return values


class KeptBuffers:
    """Copies of a model's buffers, such as the statistics of its batch norms.

    The forward pass of a training step updates them, also if the step fails later.

    Args:
        model: its buffers are copied by one operation for each type.
    """

    def __init__(self, model: nn.Module) -> None:
        self._groups: dict[torch.dtype, list[Tensor]] = {}
        for buffer in model.buffers():
            self._groups.setdefault(buffer.dtype, []).append(buffer)
        self._copies: dict[torch.dtype, Tensor] = {}

    def keep(self) -> None:
        """Copy the current values."""
        for dtype, buffers in self._groups.items():
            self._copies[dtype] = torch.cat([buffer.flatten() for buffer in buffers])

    def restore(self) -> None:
        """Set the buffers to the values of the last `keep`."""
        for dtype, buffers in self._groups.items():
            sizes = [buffer.numel() for buffer in buffers]
            for buffer, copy in zip(buffers, self._copies[dtype].split(sizes), strict=True):
                buffer.copy_(copy.view_as(buffer))


# Losses of the streams.


class StreamLosses(NamedTuple):
    """Result of `combine_streams`: total loss with its graph, and detached 0-d tensors to log."""

    total: Tensor
    logged: dict[str, Tensor]


def combine_streams(
    losses: Mapping[str, Tensor], stream_weights: Mapping[str, float]
) -> StreamLosses:
    """Sum the losses of a model over terms and weighted streams.

    The model returns ``term`` or ``term/stream``, each scaled so that the sum of all of them is the
    published total, the mean over the streams. The logged values are

    * ``total_loss`` and each ``term``: the minimised values, weighted sums over the streams;
    * ``stream/term`` and ``stream/total_loss``: the loss of one stream, unweighted and multiplied
      by the number of streams, which is the value of a run with only this stream.

    Args:
        losses: 0-d tensors.
        stream_weights: factor of each stream, by name; 1 for all gives the published total.

    Raises:
        UserError: a stream without a weight.
    """
    names = tuple(losses)
    streams = dict.fromkeys(name.split("/", 1)[1] for name in names if "/" in name)
    unknown = [stream for stream in streams if stream not in stream_weights]
    if unknown:
        raise UserError(f"MODEL.BATCHFORMER.STREAM_WEIGHTS has no weight for stream {unknown[0]!r}")
    weights = tuple((stream, stream_weights[stream]) for stream in streams)
    values = torch.stack(list(losses.values()))
    logged_names, factors = _factors_of_logged(names, weights, values.device)
    weighted = values if all(weight == 1.0 for _, weight in weights) else values * factors[0]
    logged = (factors * values.detach()).sum(1)
    return StreamLosses(weighted.sum(), dict(zip(logged_names, logged.unbind(), strict=True)))


@lru_cache(maxsize=16)
def _factors_of_logged(
    names: tuple[str, ...], weights: tuple[tuple[str, float], ...], device: torch.device
) -> tuple[list[str], Tensor]:
    """Names of the logged values, and for each a row of the factors of all losses in it.

    The first row is that of the total. Rows are kept, so that no step copies them to the device.
    """
    parts = [name.partition("/") for name in names]
    weight_of = {"": 1.0, **dict(weights)}
    rows = {"total_loss": [weight_of[stream] for _, _, stream in parts]}
    for term, _, _ in parts:
        rows[term] = [weight_of[stream] * (name == term) for name, _, stream in parts]
    for stream, _ in weights:
        rows[f"{stream}/total_loss"] = [float(len(weights) * (of == stream)) for *_, of in parts]
    for index, (term, _, stream) in enumerate(parts):
        if stream:
            rows[f"{stream}/{term}"] = [
                float(len(weights) * (index == i)) for i in range(len(names))
            ]
    return list(rows), torch.tensor(list(rows.values()), device=device)


# The training loop.

LOG_PERIOD = 20  # iterations
# With float16, a gradient that overflows halves the loss scale, 65536 at first. Below this scale,
# after 30 such steps in a row, the gradient itself is at fault.
_SMALLEST_LOSS_SCALE = 1e-4


class StreamTrainLoop(SimpleTrainer):
    """Detectron2's simple training loop with a step for the losses of several streams.

    The data loader is set after construction, before the first step.

    Args:
        model: returns a dict of losses in training (see ``combine_streams``); may be wrapped for
            distributed training.
        optimizer: over the model's trainable parameters.
        clipper: clips the gradients and returns their total norm.
        stream_weights: factor of each stream's losses, by stream name.
        seed: the seed of the run; each batch is seeded from (seed, number of the batch, rank).
        amp: the dtype of mixed precision, float16 with loss scaling; None: float32.
        accumulation: number of batches whose gradients are averaged for one step (an iteration).
        ema: moving average that is updated after each step.
        stop: a signal to stop; its attribute ``agreed`` is set if any process has got one.
        log_period: iterations between two transfers of metrics; the first and the last iteration
            are always logged.
        checkpoint_period: iterations between two checkpoints, whose iterations are logged, too, so
            that a resumed run averages metrics over the same iterations; 0: none.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        clipper: GradientClipper,
        stream_weights: Mapping[str, float],
        seed: int,
        amp: torch.dtype | None = None,
        accumulation: int = 1,
        ema: WeightAverage | None = None,
        stop: StopRequest | None = None,
        log_period: int = LOG_PERIOD,
        checkpoint_period: int = 0,
    ) -> None:
        super().__init__(model, None, optimizer)
        self.seed = seed
        self.data_loader: Iterable[list[dict[str, Any]]] | None
        self._clip = clipper
        self._stream_weights = dict(stream_weights)
        self._accumulation = accumulation
        self._ema = ema
        self._stop = stop or StopRequest()
        self._log_periods = [period for period in (log_period, checkpoint_period) if period]
        self._window = MetricWindow()
        self._images, self._seconds, self._begin = 0, 0.0, 0.0  # of the window, and of the step
        self._buffers = KeptBuffers(model)
        self._block_hooks = [part for part in model.modules() if isinstance(part, BatchFormerHook)]
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        unwrapped = model.module if isinstance(model, DistributedDataParallel) else model
        self._weights = dict(unwrapped.named_parameters())
        names = {id(parameter): name for name, parameter in self._weights.items()}
        self._names = [names[id(p)] for group in optimizer.param_groups for p in group["params"]]
        self._device = self._parameters[0].device.type
        self._amp = amp
        self._half_weights = None if amp is None else HalfWeights(model, amp)
        self._scaler = torch.amp.GradScaler(self._device, enabled=amp == torch.float16)

    def run_step(self) -> None:
        """Run one optimizer step on the mean gradient of one or several batches.

        Raises:
            NonFiniteError: before the step that would spoil the weights. Weights, buffers and
                optimizer are as before this call.
        """
        self._buffers.keep()
        try:
            self._run_step()
        except NonFiniteError:
            self._buffers.restore()
            raise

    def _run_step(self) -> None:
        self.optimizer.zero_grad()
        for hook in self._block_hooks:
            hook.step, hook.measures_entropy = self.iter, self.is_logged(self.iter)
        self._begin = time.perf_counter()
        data_time = 0.0
        metrics: dict[str, Tensor] = {}
        images: list[str] = []
        for part in range(self._accumulation):
            number = self.iter * self._accumulation + part
            seed_iteration(self.seed, number, comm.get_rank())
            start = time.perf_counter()
            batch = next(self._data_loader_iter)
            data_time += time.perf_counter() - start
            images += _names_of(batch)
            self._images += len(batch)
            for name, value in self._accumulate(batch, last=part + 1 == self._accumulation).items():
                share = value / self._accumulation if self._accumulation > 1 else value
                metrics[name] = metrics[name] + share if name in metrics else share
        self.after_backward()

        self._scaler.unscale_(self.optimizer)
        grad_norm = self._clip(self._parameters)
        is_finite = FiniteCheck(grad_norm).passed()
        if not is_finite:
            self._refuse_gradient(grad_norm, images)
        self._scaler.step(self.optimizer)
        self._scaler.update()
        if self._ema is not None:
            self._ema.update()
        if self._scaler.is_enabled():
            metrics["skipped_steps"] = ~torch.isfinite(grad_norm)
        self._log({**metrics, "grad_norm": grad_norm} if is_finite else metrics, data_time)

    def state_dict(self) -> dict[str, Any]:
        """Return iteration, optimizer, the names of its parameters, seed and loss scale."""
        state: dict[str, Any] = super().state_dict()
        state["parameters"] = self._names
        state["seed"] = self.seed
        state["grad_scaler"] = self._scaler.state_dict()
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the result of `state_dict`; learning rate and decay stay those of the config.

        Raises:
            ValueError: the optimizer's state is not that of its parameters.
        """
        saved = state_dict["optimizer"]
        # Checkpoints of older versions have no names, but their parameters in the same order.
        optimizer = resumed_state(
            self.optimizer, self._names, saved, state_dict.get("parameters") or self._names
        )
        super().load_state_dict({**state_dict, "optimizer": optimizer})
        for group in self.optimizer.param_groups:
            for parameter in group["params"]:
                _check_moments(self.optimizer.state.get(parameter, {}), parameter)
        self.seed = state_dict["seed"]
        if self._scaler.is_enabled() and state_dict["grad_scaler"]:
            self._scaler.load_state_dict(state_dict["grad_scaler"])

    def _accumulate(self, batch: list[dict[str, Any]], *, last: bool) -> dict[str, Tensor]:
        """Accumulate the gradients of one batch; return its losses and metrics.

        Processes exchange gradients only with the last batch of a step.
        """
        is_local = not last and isinstance(self.model, DistributedDataParallel)
        with (
            self.model.no_sync() if is_local else contextlib.nullcontext(),
            contextlib.nullcontext() if self._half_weights is None else self._half_weights.in_use(),
        ):
            losses, combined, failure = self._forward(batch)
            total = (
                torch.tensor(math.nan, device=self._device) if combined is None else combined.total
            )
            check = FiniteCheck(self._over_processes(total))
            # A process whose model has raised takes no part in a backward pass, in which the others
            # would wait for it.
            is_first_read = check.is_ready or comm.get_world_size() > 1
            if combined is None or (is_first_read and not check.passed()):
                raise NonFiniteError(self._describe_losses(losses, failure, batch))
            share = total / self._accumulation if self._accumulation > 1 else total
            self._scaler.scale(share).backward()
        if not check.passed():
            raise NonFiniteError(self._describe_losses(losses, failure, batch))
        self._stop.agreed = self._stop.agreed or check.read()[1] > 0
        metrics = {**combined.logged, **getattr(losses, "metrics", {})}
        for hook in self._block_hooks:
            metrics |= {f"attention_entropy_{k}": value for k, value in hook.entropies.items()}
            hook.entropies.clear()
        return metrics

    def _over_processes(self, total: Tensor) -> Tensor:
        """Sum over the processes: a loss, finite only if all are, and how many are to stop."""
        loss = total.detach().float()
        values = torch.stack([loss, torch.full_like(loss, float(self._stop.received))])
        if comm.get_world_size() > 1:
            torch.distributed.all_reduce(values)
        return values

    def _refuse_gradient(self, norm: Tensor, images: Sequence[str]) -> None:
        """Raise `NonFiniteError` unless it is an overflow of float16, whose step is skipped."""
        found = f"the gradient is not finite at iteration {self.iter}: its norm is {norm.item()}"
        if self._scaler.is_enabled():
            scale = self._scaler.get_scale()
            if scale >= _SMALLEST_LOSS_SCALE:
                return
            found += f", though the loss scale has fallen to {scale:g}"
        everyone = [name for names in comm.all_gather(images) for name in names]
        raise NonFiniteError(self._describe(found, everyone))

    def _describe_losses(
        self, losses: Mapping[str, Tensor], failure: str, batch: Sequence[Mapping[str, Any]]
    ) -> str:
        """Describe losses that are not finite, for the whole run; all processes must call."""
        terms = [f"{k}={v.item()}" for k, v in losses.items() if not torch.isfinite(v)]
        terms += [failure] if failure else []
        everyone = comm.all_gather((terms, _names_of(batch) if terms else []))
        all_terms = list(dict.fromkeys(term for found, _ in everyone for term in found))
        found = f"the loss is not finite at iteration {self.iter}: "
        found += ", ".join(all_terms or ["their sum"])
        return self._describe(found, [name for _, names in everyone for name in names])

    def _describe(self, found: str, images: Sequence[str]) -> str:
        """Add the cause: weights that were not finite before the step, or else the images.

        All processes must call.
        """
        spoiled = non_finite(self._weights)
        for names in filter(None, comm.all_gather(first(spoiled) if spoiled else "")):
            return f"{found}; an earlier iteration has spoiled {names}: lower SOLVER.BASE_LR"
        return (
            f"{found}; images of the batch: {', '.join(images)}; look at these images, lower "
            "SOLVER.BASE_LR or switch SOLVER.AMP.ENABLED off"
        )

    def _forward(
        self, batch: list[dict[str, Any]]
    ) -> tuple[Mapping[str, Tensor], StreamLosses | None, str]:
        """Return the losses and their combination, or the message of the model's `NonFiniteError`.

        A model may notice infinities before there is a loss (in the matching cost). The error waits
        until all processes know of it.
        """
        try:
            with self._autocast():
                losses = self.model(batch)
        except NonFiniteError as error:
            return {}, None, str(error)
        return losses, combine_streams(losses, self._stream_weights), ""

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        if self._amp is None:
            return contextlib.nullcontext()
        return torch.autocast(self._device, dtype=self._amp)

    def _log(self, metrics: Mapping[str, Tensor], data_time: float) -> None:
        storage = get_event_storage()
        storage.put_scalar("data_time", data_time)
        self._window.add(metrics)
        if not self.is_logged(self.iter):
            self._seconds += time.perf_counter() - self._begin
            return
        means = self._window.flush()
        # The device has finished the steps of the window: the transfer has waited for it.
        seconds = self._seconds + time.perf_counter() - self._begin
        means["images_per_second"] = self._images * comm.get_world_size() / seconds
        self._images, self._seconds = 0, 0.0
        if comm.is_main_process():
            storage.put_scalars(**means, **memory_in_use(), smoothing_hint=False)

    def is_logged(self, iteration: int) -> bool:
        """Whether the metrics are transferred and logged after an iteration."""
        is_due = any((iteration + 1) % period == 0 for period in self._log_periods)
        return is_due or iteration in (0, self.max_iter - 1)


def _names_of(batch: Sequence[Mapping[str, Any]]) -> list[str]:
    return [f"{x.get('image_id')} ({x.get('file_name')})" for x in batch]


def _check_moments(state: Mapping[str, Any], parameter: Tensor) -> None:
    """Refuse moments that are missing or of another shape; they would fail in the next step."""
    missing = {"exp_avg", "exp_avg_sq"} - state.keys() if "step" in state else set()
    shapes = {
        tuple(value.shape)
        for value in state.values()
        if isinstance(value, Tensor) and value.ndim > 0
    }
    if missing or shapes - {tuple(parameter.shape)}:
        raise ValueError(
            f"the optimizer's state of a parameter of shape {tuple(parameter.shape)} is incomplete "
            f"({', '.join(sorted(missing)) or f'shapes {sorted(shapes)}'})"
        )
