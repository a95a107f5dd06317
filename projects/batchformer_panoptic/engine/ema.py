"""Exponential moving average of the weights."""

from typing import Any

from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn


class WeightAverage:
    """Keeps the moving average of a model's parameters; buffers are those of the model.

    The average starts from the weights after the first step that it sees. As an object to be saved
    in a checkpoint it stands for the *live* weights, the ones being trained: the checkpoint keeps
    the averaged weights under "model", where evaluation looks for weights.

    Args:
        model: the live model, not wrapped for distributed training.
        decay: share of the old average that each step keeps, in (0, 1).
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self._live = model
        self._averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay))

    @property
    def model(self) -> nn.Module:
        """The model with averaged weights, for evaluation."""
        return self._averaged.module

    def update(self) -> None:
        """Take the live weights into the average; call after each optimizer step."""
        self._averaged.update_parameters(self._live)

    def copy_live(self) -> None:
        """Make the average equal to the live weights, as before any step."""
        self._averaged.module.load_state_dict(self._live.state_dict())

    def averaged_state_dict(self) -> dict[str, Tensor]:
        """Return the averaged weights with the model's own keys."""
        return self._averaged.module.state_dict()

    def state_dict(self) -> dict[str, Any]:
        """Return the live weights and how many steps the average has seen."""
        return {"weights": self._live.state_dict(), "steps": int(self._averaged.n_averaged)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore both: to be called when the live model has just received the averaged weights."""
        self.copy_live()
        self._averaged.n_averaged.fill_(state["steps"])
        self._live.load_state_dict(state["weights"])
