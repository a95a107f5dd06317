"""Classes and boxes from query states."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ...layers import MLP


class BoxHead(nn.Module):
    """One linear layer for classes, a three-layer perceptron for boxes (DETR, section 3.2).

    Args:
        embed_dim: channels C of the query states.
        num_class_outputs: logits of a query; what it includes is up to the scoring.
        class_bias: initial bias of the class logits.
        box_bias: box logits (4 numbers) that every query starts from; None: the layer's default.
    """

    def __init__(
        self,
        *,
        embed_dim: int,
        num_class_outputs: int,
        class_bias: float | None,
        box_bias: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        self.class_embed = nn.Linear(embed_dim, num_class_outputs)
        self.bbox_embed = MLP(input_dim=embed_dim, hidden_dim=embed_dim, output_dim=4, num_layers=3)
        if class_bias is not None:
            nn.init.constant_(self.class_embed.bias, class_bias)
        if box_bias is not None:
            last = self.bbox_embed.layers[-1]
            assert isinstance(last, nn.Linear)
            nn.init.zeros_(last.weight)
            with torch.no_grad():
                last.bias.copy_(torch.tensor(box_bias))

    def forward(
        self, hidden_states: Tensor, reference_points: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Predict for every decoder layer.

        Args:
            hidden_states: (L, B', Q, C).
            reference_points: None, or (L, B', Q, 2 or 4) logits that the first 2 or 4 box
                coordinates are offsets from.

        Returns:
            Class logits (L, B', Q, K) and boxes (L, B', Q, 4) float32 as cxcywh in 0 to 1.
        """
        logits, box_logits = self.predict_layer(-1, hidden_states, reference_points)
        return logits, box_logits.sigmoid()

    def predict_layer(
        self, layer: int, states: Tensor, reference_points: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Class and box logits of one layer (all share their weights); see ``BoxPredictor``."""
        boxes = self.bbox_embed(states).float()
        if reference_points is not None:
            known = reference_points.shape[-1]
            boxes = torch.cat([boxes[..., :known] + reference_points, boxes[..., known:]], -1)
        return self.class_embed(states), boxes


class LayerwiseBoxHead(nn.Module):
    """A :class:`BoxHead` of its own for each decoder layer, for boxes refined layer by layer.

    Args:
        heads: one for each decoder layer, then perhaps one for the encoder's proposals.
        num_layers: decoder layers.
    """

    def __init__(self, heads: Sequence[BoxHead], *, num_layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(heads)
        self.num_layers = num_layers

    def forward(
        self, hidden_states: Tensor, reference_points: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Predict for the last L decoder layers; see :meth:`BoxHead.forward`."""
        first = self.num_layers - len(hidden_states)
        results = [
            self.predict_layer(
                first + index, states, None if reference_points is None else reference_points[index]
            )
            for index, states in enumerate(hidden_states)
        ]
        logits, box_logits = (torch.stack(part) for part in zip(*results, strict=True))
        return logits, box_logits.sigmoid()

    def predict_layer(
        self, layer: int, states: Tensor, reference_points: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Class and box logits of one layer, or of the proposals; see ``BoxPredictor``."""
        head = self.layers[layer]
        assert isinstance(head, BoxHead)
        return head.predict_layer(layer, states, reference_points)
