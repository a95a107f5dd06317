"""From the loss dict of a model to the total to minimise and the numbers to log."""

from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor

from ..errors import UserError


class StreamLosses(NamedTuple):
    """The total with its graph, and the detached 0-d tensors to log, by name."""

    total: Tensor
    logged: dict[str, Tensor]


def combine_streams(
    losses: Mapping[str, Tensor], stream_weights: Mapping[str, float]
) -> StreamLosses:
    """Weight the streams of a model's losses and add everything up.

    The model gives ``term`` or ``term/stream``, each already divided such that the sum over
    everything is the published total, an average over the streams. Logged are

    * ``total_loss`` and each ``term``: what is minimised, the weighted sum over the streams;
    * ``stream/term`` and ``stream/total_loss``: the stream's own loss times the number of streams
      and not weighted, that is the value a run with this stream alone would report.

    Args:
        losses: 0-d tensors.
        stream_weights: factor of each stream, by name; [1, 1] gives the published total.

    Raises:
        UserError: a stream without weight.
    """
    streams = list(dict.fromkeys(name.split("/", 1)[1] for name in losses if "/" in name))
    unknown = [stream for stream in streams if stream not in stream_weights]
    if unknown:
        raise UserError(f"MODEL.BATCHFORMER.STREAM_WEIGHTS has no weight for stream {unknown[0]!r}")
    terms: dict[str, list[Tensor]] = {}
    own: dict[str, Tensor] = {}
    for name, loss in losses.items():
        term, _, stream = name.partition("/")
        weight = stream_weights[stream] if stream else 1.0
        terms.setdefault(term, []).append(loss if weight == 1.0 else loss * weight)
        if stream:
            own[f"{stream}/{term}"] = loss.detach() * len(streams)
    term_totals = {term: _add(parts) for term, parts in terms.items()}
    total = _add(list(term_totals.values()))
    logged = {"total_loss": total.detach()}
    logged.update({term: value.detach() for term, value in term_totals.items()})
    for stream in streams:
        logged[f"{stream}/total_loss"] = _add(
            [value for name, value in own.items() if name.startswith(f"{stream}/")]
        )
    logged.update(own)
    return StreamLosses(total, logged)


def _add(values: list[Tensor]) -> Tensor:
    total = values[0]
    for value in values[1:]:
        total = total + value
    return total
