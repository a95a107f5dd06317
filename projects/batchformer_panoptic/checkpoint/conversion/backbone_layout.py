"""What a backbone consists of, and weights that are not that."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .rules import refuse_misfit

OURS = "backbone."
COUNTER = "num_batches_tracked"  # of batch norms; nothing that a map depends on
CLASSIFIER = "classifier of ImageNet"


class BackboneLayout(NamedTuple):
    """What a backbone consists of.

    Attributes:
        what: its name for messages.
        shapes: of each parameter and buffer, in this project's names.
        settings: config keys that build it.
    """

    what: str
    shapes: dict[str, tuple[int, ...]]
    settings: dict[str, Any]

    def refuse_misfit(self, model: Mapping[str, Tensor], leftovers: list[str]) -> None:
        """Raise UserError unless ``model`` is exactly this, counters of batch norms apart."""
        both = model.keys() & self.shapes.keys()
        refuse_misfit(
            f"the weights are no {self.what}",
            leftovers=[*leftovers, *(model.keys() - self.shapes.keys())],
            missing=[k for k in self.shapes.keys() - model.keys() if not k.endswith(COUNTER)],
            wrong_shape=[
                f"{name}: {tuple(model[name].shape)} instead of {self.shapes[name]}"
                for name in both
                if tuple(model[name].shape) != self.shapes[name]
            ],
            remedy="name another --source, or allow keys that may be left over",
        )


def as_tensors(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """Model zoo files hold arrays; a copy, so that what is added does not reach the caller."""
    return {key: torch.as_tensor(value) for key, value in state.items()}
