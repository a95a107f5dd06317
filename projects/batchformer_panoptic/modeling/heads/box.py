"""Heads that predict classes, and boxes where the model has them, from query states.

Shapes: B' = streams * B entries, L decoder layers, Q queries, C channels, K class logits.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ...layers import MLP


class BoxHead(nn.Module):
    """A linear layer for classes and a three-layer perceptron for boxes (DETR, section 3.2).

    All decoder layers share the weights.

    Args:
        embed_dim: channels C of the query states.
        num_class_outputs: class logits K of a query, as the scoring defines them.
        class_bias: initial bias of the class logits; None keeps the initialisation of the layer.
        box_bias: initial bias of the four box logits, whose weights then start at zero; None keeps
            the initialisation of the layer.
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
        self,
        hidden_states: Tensor,
        reference_points: Tensor | None,
        box_logits: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Predict for every decoder layer.

        Args:
            hidden_states: (L, B', Q, C).
            reference_points: None, or (L, B', Q, 2 or 4) logits to which the first 2 or 4 box
                coordinates are offsets.
            box_logits: (L, B', Q, 4) from a decoder that has refined boxes with this head; they are
                not computed again.

        Returns:
            Class logits (L, B', Q, K) and boxes (L, B', Q, 4) float32 as cxcywh in 0 to 1.
        """
        if box_logits is None:
            box_logits = self.predict_boxes(-1, hidden_states, reference_points)
        return self.class_embed(hidden_states), box_logits.sigmoid()

    def classify(self, layer: int, states: Tensor) -> Tensor:
        """Class logits (B', Q, K) of one decoder layer; see ``BoxPredictor``."""
        logits: Tensor = self.class_embed(states)
        return logits

    def predict_boxes(self, layer: int, states: Tensor, reference_points: Tensor | None) -> Tensor:
        """Box logits (B', Q, 4) float32 of one decoder layer; see ``BoxPredictor``."""
        boxes: Tensor = self.bbox_embed(states).float()
        if reference_points is None:
            return boxes
        known = reference_points.shape[-1]
        return torch.cat([boxes[..., :known] + reference_points, boxes[..., known:]], -1)


class LayerwiseBoxHead(nn.Module):
    """One :class:`BoxHead` per decoder layer, for boxes that are refined from layer to layer.

    Args:
        heads: one per decoder layer, optionally followed by one for the encoder's proposals.
        num_layers: number of decoder layers.
    """

    def __init__(self, heads: Sequence[BoxHead], *, num_layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(heads)
        self.num_layers = num_layers

    def forward(
        self,
        hidden_states: Tensor,
        reference_points: Tensor | None,
        box_logits: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Predict for the last L decoder layers; see :meth:`BoxHead.forward`."""
        layers = range(self.num_layers - len(hidden_states), self.num_layers)
        logits = [self.classify(i, x) for i, x in zip(layers, hidden_states, strict=True)]
        if box_logits is None:
            references = [None] * len(layers) if reference_points is None else reference_points
            box_logits = torch.stack(
                [
                    self.predict_boxes(layer, states, points)
                    for layer, states, points in zip(layers, hidden_states, references, strict=True)
                ]
            )
        return torch.stack(logits), box_logits.sigmoid()

    def classify(self, layer: int, states: Tensor) -> Tensor:
        """Class logits of one decoder layer, or of the proposals; see ``BoxPredictor``."""
        return self._head(layer).classify(layer, states)

    def predict_boxes(self, layer: int, states: Tensor, reference_points: Tensor | None) -> Tensor:
        """Box logits of one decoder layer, or of the proposals; see ``BoxPredictor``."""
        return self._head(layer).predict_boxes(layer, states, reference_points)

    def _head(self, layer: int) -> BoxHead:
        head = self.layers[layer]
        assert isinstance(head, BoxHead)
        return head


class ClassHead(nn.Module):
    """A linear layer for classes, for models that predict masks and no boxes.

    Args:
        embed_dim: channels C of the query states.
        num_class_outputs: class logits K of a query, as the scoring defines them.
        class_bias: initial bias of the class logits; None keeps the initialisation of the layer.
    """

    def __init__(
        self, *, embed_dim: int, num_class_outputs: int, class_bias: float | None = None
    ) -> None:
        super().__init__()
        self.class_embed = nn.Linear(embed_dim, num_class_outputs)
        if class_bias is not None:
            nn.init.constant_(self.class_embed.bias, class_bias)

    def forward(
        self,
        hidden_states: Tensor,
        reference_points: Tensor | None,
        box_logits: Tensor | None = None,
    ) -> tuple[Tensor, None]:
        """Class logits (L, B', Q, K) of (L, B', Q, C) states, and no boxes."""
        return self.class_embed(hidden_states), None
