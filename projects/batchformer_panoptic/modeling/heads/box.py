"""Classes and boxes from query states."""

import torch
from torch import Tensor, nn

from ...layers import MLP


class BoxHead(nn.Module):
    """One linear layer for classes, a three-layer perceptron for boxes (DETR, section 3.2).

    Args:
        embed_dim: channels C of the query states.
        num_class_outputs: logits of a query; what it includes is up to the scoring.
        class_bias: initial bias of the class logits.
    """

    def __init__(self, *, embed_dim: int, num_class_outputs: int, class_bias: float | None) -> None:
        super().__init__()
        self.class_embed = nn.Linear(embed_dim, num_class_outputs)
        self.bbox_embed = MLP(input_dim=embed_dim, hidden_dim=embed_dim, output_dim=4, num_layers=3)
        if class_bias is not None:
            nn.init.constant_(self.class_embed.bias, class_bias)

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
