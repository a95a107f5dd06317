"""The contract of all transformers, their registry, and builders that they share."""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.utils.registry import Registry
from torch import Tensor, nn

from ...batchformer import BatchFormerHook, IdentityHook, StreamState
from ...batchformer.batchformer import ATTENDS
from ...errors import UserError
from .layers import BatchPadding, CheckpointedLayer
from .mask_pilot import PilotOutput

TRANSFORMER_REGISTRY = Registry("TRANSFORMER")
TRANSFORMER_REGISTRY.__doc__ = """
Transformers, found by ``MODEL.DETR.TRANSFORMER_NAME``.

Register a function ``(cfg, input_shape) -> Transformer`` under the name that configs use. The
module is called as ``transformer(features, padding, box_head)``:

* ``features``: feature maps by name, each (B, C_in, H, W);
* ``padding``: the :class:`BatchPadding` of the batch, which also makes the masks of maps;
* ``box_head``: the head that is applied to the result. Decoders that refine boxes from layer to
  layer call it as a :class:`BoxPredictor`; the others ignore it, and may get a head for classes
  only where they are of ``predicts_boxes = False``.

In training, a transformer that sets ``uses_targets`` is given the targets of the images as a fourth
argument; it must also run without.

It returns a :class:`TransformerOutput` and names the maps it reads in ``in_features``.

Optional: ``transformer.encoder.layers`` and ``transformer.decoder.layers``, iterables of
:class:`CheckpointedLayer` (``transformer/layers.py``). ``MODEL.ACTIVATION_CHECKPOINTING`` acts on
them through :func:`build_transformer`, and refuses a transformer without them. An encoder for
BatchFormerV2 runs its layers by ``batchformer.encode`` with the hook of
:func:`build_batchformer_hook` as its attribute ``batchformer``.
"""


# --- the contract --------------------------------------------------------------------------------


class BoxPredictor(Protocol):
    """The methods of the box head that a transformer may call."""

    def classify(self, layer: int, states: Tensor) -> Tensor:
        """Class logits (B', Q, K) from the states (B', Q, C) of one decoder layer.

        Args:
            layer: decoder layer, from 0; the number of decoder layers stands for the encoder's
                proposals, where there are any.
            states: (B', Q, C).
        """
        ...

    def predict_boxes(self, layer: int, states: Tensor, reference_points: Tensor | None) -> Tensor:
        """Box logits (B', Q, 4) float32, before the sigmoid, from the states of one layer.

        Args:
            layer: see :meth:`classify`.
            states: (B', Q, C).
            reference_points: None, or (B', Q, 2 or 4) logits to which boxes are offsets.
        """
        ...


class Proposals(NamedTuple):
    """Boxes that the encoder proposes, one for each token (two-stage Deformable-DETR).

    Attributes:
        logits: (B', N, K) class logits.
        boxes: (B', N, 4) float32 cxcywh in 0 to 1; all ones for tokens without a proposal.
    """

    logits: Tensor
    boxes: Tensor


class TransformerOutput(NamedTuple):
    """The result of all transformers. B' is the number of streams times B.

    Attributes:
        hidden_states: (L, B', Q, C), normalised query states after each decoder layer.
        reference_points: None (DETR), or (L, B', Q, 2 or 4) float32 logits to which the box head
            adds its offsets before the sigmoid.
        projected_map: (B, C, H, W), the projected backbone map under ``memory_map``, that of
            MODEL.DETR.IN_FEATURE or the coarsest of several; not expanded.
        memory_map: (B', C, H, W), the encoder's output at the same positions.
        padding_mask: (B, H, W) bool, True where a cell is padding; not expanded.
        streams: the streams along dimension 0 of everything that is B'.
        proposals: of the encoder, to be supervised as well; None where there are none.
        mask_embeddings: (L, B', Q, C_m) where the decoder predicts masks as products with
            ``mask_features``; otherwise None.
        mask_features: (B', C_m, h, w) per-pixel features for ``mask_embeddings``.
        padded_size: (height, width) in pixels that ``mask_features`` cover.
        box_logits: (L, B', Q, 4) float32 where the decoder has refined boxes with the box head,
            which then has only the classes left to predict; otherwise None.
        pilot: queries that are supervised with given objects; None in evaluation.
    """

    hidden_states: Tensor
    reference_points: Tensor | None
    projected_map: Tensor
    memory_map: Tensor
    padding_mask: Tensor
    streams: StreamState
    proposals: Proposals | None = None
    box_logits: Tensor | None = None
    mask_embeddings: Tensor | None = None
    mask_features: Tensor | None = None
    padded_size: tuple[int, int] | None = None
    pilot: PilotOutput | None = None

    def from_layer(self, first: int) -> "TransformerOutput":
        """The same output with the decoder layers from ``first`` on; -1 keeps the last only."""
        points, boxes, masks = self.reference_points, self.box_logits, self.mask_embeddings
        return self._replace(
            hidden_states=self.hidden_states[first:],
            reference_points=None if points is None else points[first:],
            box_logits=None if boxes is None else boxes[first:],
            mask_embeddings=None if masks is None else masks[first:],
            pilot=None if self.pilot is None else self.pilot.from_layer(first),
        )


class Transformer(nn.Module):
    """Base of all transformers; see :data:`TRANSFORMER_REGISTRY`.

    Attributes:
        in_features: names of the backbone maps that :meth:`forward` reads.
        predicts_boxes: whether queries have boxes; otherwise the model predicts classes and masks.
        embeds_masks: whether the output has mask embeddings and per-pixel features.
        box_biases: initial box logits, one entry per box head: a single entry is shared by all
            decoder layers, several entries belong to one layer each (and one to the proposals).
            None keeps the default initialisation of the head.
        size_divisibility: images are padded to a multiple of it, in addition to what the backbone
            needs.
        uses_targets: whether :meth:`forward` takes the targets of the B images, a sequence of
            ``ImageTarget``, as a fourth argument in training.
    """

    in_features: tuple[str, ...]
    predicts_boxes: bool = True
    embeds_masks: bool = False
    box_biases: tuple[tuple[float, ...] | None, ...] = (None,)
    size_divisibility: int = 0
    uses_targets: bool = False

    def forward(
        self, features: dict[str, Tensor], padding: BatchPadding, box_head: BoxPredictor
    ) -> TransformerOutput:
        """See :data:`TRANSFORMER_REGISTRY`."""
        raise NotImplementedError


# --- building ------------------------------------------------------------------------------------


def build_transformer(cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> Transformer:
    """Build the transformer that ``cfg.MODEL.DETR.TRANSFORMER_NAME`` names.

    Raises:
        UserError: an unknown name, settings that the transformer refuses, or activation
            checkpointing of a part that does not support it.
    """
    name = cfg.MODEL.DETR.TRANSFORMER_NAME
    if name not in TRANSFORMER_REGISTRY:
        known = sorted(key for key, _ in TRANSFORMER_REGISTRY)
        raise UserError(f"MODEL.DETR.TRANSFORMER_NAME is {name!r}; known: {', '.join(known)}")
    transformer: Transformer = TRANSFORMER_REGISTRY.get(name)(cfg, input_shape)
    for part in ("encoder", "decoder"):
        if part not in cfg.MODEL.ACTIVATION_CHECKPOINTING:
            continue
        layers = list(getattr(getattr(transformer, part, None), "layers", ()))
        if not layers or not all(isinstance(layer, CheckpointedLayer) for layer in layers):
            raise UserError(
                f"MODEL.ACTIVATION_CHECKPOINTING names {part!r}, which the transformer {name!r} "
                f"does not support (it needs {part}.layers of CheckpointedLayer): remove it"
            )
        for layer in layers:
            layer.activation_checkpointing = True
    return transformer


def build_batchformer_hook(cfg: CfgNode) -> IdentityHook | BatchFormerHook:
    """Build the hook that ``cfg.MODEL.BATCHFORMER`` describes for the encoder of ``MODEL.DETR``."""
    num_layers = cfg.MODEL.DETR.ENC_LAYERS
    return build_hook(
        cfg,
        embed_dim=cfg.MODEL.DETR.HIDDEN_DIM,
        num_layers=num_layers,
        layers_are=f"MODEL.DETR.ENC_LAYERS is {num_layers}",
    )


def build_hook(
    cfg: CfgNode, *, embed_dim: int, num_layers: int, layers_are: str
) -> IdentityHook | BatchFormerHook:
    """Build the hook that ``cfg.MODEL.BATCHFORMER`` describes, for any encoder.

    Args:
        cfg: the whole config.
        embed_dim: channels of a token.
        num_layers: layers of the encoder.
        layers_are: the origin of this number, for messages ("MODEL.DETR.ENC_LAYERS is 6").

    Raises:
        UserError: a block would follow a layer that does not exist, an unknown value of
            ``ATTEND``, or ``SYNC`` with another one than "batch".
    """
    node = cfg.MODEL.BATCHFORMER
    if not node.ENABLED:
        return IdentityHook()
    if node.ATTEND not in ATTENDS:
        raise UserError(f"MODEL.BATCHFORMER.ATTEND is {node.ATTEND!r}; known: {', '.join(ATTENDS)}")
    if node.SYNC and node.ATTEND != "batch":
        raise UserError(
            f"MODEL.BATCHFORMER.SYNC has no effect with MODEL.BATCHFORMER.ATTEND {node.ATTEND!r}, "
            "which attends to no other image: set SYNC False, or ATTEND 'batch'"
        )
    _check_insert_layers(node.INSERT_LAYERS, num_layers, layers_are)
    return BatchFormerHook(
        embed_dim,
        insert_layers=node.INSERT_LAYERS,
        num_heads=node.NUM_HEADS,
        dim_feedforward=node.DIM_FEEDFORWARD or None,
        dropout=node.DROPOUT,
        shared=node.SHARED,
        mask_padding=node.MASK_PADDING,
        attend=node.ATTEND,
        every=node.EVERY,
        sync=node.SYNC,
    )


def _check_insert_layers(insert_layers: Sequence[int], num_layers: int, layers_are: str) -> None:
    layers = list(insert_layers)
    in_range = all(0 <= layer < num_layers for layer in layers)
    if not layers or not in_range or len(set(layers)) != len(layers):
        raise UserError(
            f"MODEL.BATCHFORMER.INSERT_LAYERS is {layers}; it must name distinct encoder layers "
            f"from 0 to {num_layers - 1} ({layers_are})"
        )


def feature_shapes(
    key: str, value: str | Sequence[str], input_shape: dict[str, ShapeSpec]
) -> list[ShapeSpec]:
    """Shapes of the backbone maps that the value of a config key names; at least one.

    Raises:
        UserError: no names, or a map that the backbone does not return.
    """
    names = [value] if isinstance(value, str) else list(value)
    missing = [name for name in names if name not in input_shape]
    if missing or not names:
        raise UserError(
            f"{key} is {value!r}, but the backbone returns {', '.join(sorted(input_shape))}; "
            "see its OUT_FEATURES"
        )
    return [input_shape[name] for name in names]


def mask_level(cfg: CfgNode, key: str, names: Sequence[str]) -> int:
    """Index of ``MODEL.DETR.IN_FEATURE``, the map for the mask head, among the maps of ``key``."""
    chosen = cfg.MODEL.DETR.IN_FEATURE
    if chosen not in names:
        raise UserError(
            f"MODEL.DETR.IN_FEATURE is {chosen!r}, which masks are read from; it must be one of "
            f"{key} {list(names)}"
        )
    return list(names).index(chosen)
