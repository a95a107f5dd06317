"""The result of a model's training step."""

from collections.abc import Mapping

from torch import Tensor


class Losses(dict[str, Tensor]):
    """Weighted 0-d losses by name, whose sum is the objective, with metrics besides.

    It is a plain dict for every trainer that adds up the values.

    Attributes:
        metrics: detached 0-d tensors to log that are not part of the objective.
    """

    def __init__(self, losses: Mapping[str, Tensor], metrics: Mapping[str, Tensor]) -> None:
        super().__init__(losses)
        self.metrics = {name: value.detach() for name, value in metrics.items()}
