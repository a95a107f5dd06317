"""Models for comparison with this project's inference: naive mask heads, and transformers' DETR."""

import copy
import tempfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from detectron2.config import CfgNode
from torch import Tensor, nn
from torch.nn import functional as F

from batchformer_panoptic import PanopticDETR
from batchformer_panoptic.checkpoint.conversion.export import to_huggingface
from batchformer_panoptic.modeling.heads import MaskHead
from batchformer_panoptic.modeling.panoptic_detr import ModelPredictions
from batchformer_panoptic.modeling.set_prediction.predictions import MaskSelector
from batchformer_panoptic.modeling.transformer import TransformerOutput


class Case(NamedTuple):
    """A config, its model in evaluation mode, and an input with one image."""

    cfg: CfgNode
    model: PanopticDETR
    inputs: list[dict[str, Any]]


def predict(case: Case) -> ModelPredictions:
    images = case.model.preprocess(case.inputs)
    size = tuple(images.tensor.shape[-2:])
    return case.model.predict(case.model.backbone(images.tensor), images.image_sizes, size)


class AllQueries(nn.Module):
    """Decodes the masks of all queries with a mask head, and then selects the needed ones."""

    def __init__(self, head: MaskHead) -> None:
        super().__init__()
        self.head = head

    def forward(self, output: TransformerOutput, features: Mapping[str, Tensor]) -> MaskSelector:
        def select(layer: Tensor | int, image: Tensor, query: Tensor) -> Tensor:
            (layer,) = set(torch.as_tensor(layer).flatten().tolist())  # masks of one layer only
            entries, queries = output.hidden_states.shape[1:3]
            everything = image.new_ones(entries, queries).nonzero()
            masks = self.decode(output, features, layer, everything[:, 0], everything[:, 1])
            return masks.unflatten(0, (entries, queries))[image, query]

        return select

    def decode(
        self,
        output: TransformerOutput,
        features: Mapping[str, Tensor],
        layer: int,
        image: Tensor,
        query: Tensor,
    ) -> Tensor:
        return self.head.decode(output, features, layer, image, query)


class Naive(AllQueries):
    """Decodes as the public code does: maps are copied for every query."""

    def decode(
        self,
        output: TransformerOutput,
        features: Mapping[str, Tensor],
        layer: int,
        image: Tensor,
        query: Tensor,
    ) -> Tensor:
        head, streams = self.head, output.streams
        padding_mask = streams.expand(output.padding_mask)
        source = streams.image_of(image, len(output.projected_map))
        queries = output.hidden_states[layer, image, query]
        attention = head.attention(queries, output.memory_map, padding_mask, image)
        x = torch.cat([output.projected_map[source], attention], dim=1)
        x = F.relu(plain_norm(head.norms[0], head.convs[0](x)))
        x = F.relu(plain_norm(head.norms[1], head.convs[1](x)))
        for name, adapter, conv, norm in zip(
            head.in_features, head.adapters, head.convs[2:], head.norms[2:], strict=True
        ):
            adapted = adapter(features[name])[source]
            x = adapted + F.interpolate(x, size=adapted.shape[-2:], mode="nearest")
            x = F.relu(plain_norm(norm, conv(x)))
        return head.predictor(x)[:, 0]


def plain_norm(norm: nn.GroupNorm, x: Tensor) -> Tensor:
    """Group norm and nothing else, whatever else the module of a head does."""
    return F.group_norm(x, norm.num_groups, norm.weight, norm.bias, norm.eps)


def with_head(model: PanopticDETR, kind: type[AllQueries]) -> PanopticDETR:
    """Return a copy of the model with shared weights whose mask head decodes in another way."""
    assert isinstance(model.mask_head, MaskHead)
    other = copy.copy(model)
    other._modules = {**model._modules, "mask_head": kind(model.mask_head)}
    return other


class Peer:
    """The same weights in transformers, with its panoptic post-processing."""

    def __init__(self, case: Case, threshold: float, stuff: set[int]) -> None:
        import transformers  # an extra

        with tempfile.TemporaryDirectory() as folder:
            to_huggingface(
                case.model.state_dict(), Path(folder) / "model", cfg=case.cfg, classes=None
            )
            loaded = transformers.DetrForSegmentation.from_pretrained(Path(folder) / "model")
        self.model = loaded.eval()
        self.process = partial(
            transformers.DetrImageProcessor().post_process_panoptic_segmentation,
            threshold=threshold,
            # Masks of random weights overlap and have probabilities close to 0.5.
            mask_threshold=0.1,
            overlap_mask_area_threshold=0.0,
            label_ids_to_fuse=stuff,
            target_sizes=[tuple(case.inputs[0]["image"].shape[-2:])],
        )
        self.pixels = case.model.preprocess(case.inputs).tensor

    @torch.no_grad()
    def outputs(self) -> Any:
        return self.model(
            pixel_values=self.pixels, pixel_mask=torch.ones_like(self.pixels[:, 0]).long()
        )

    def __call__(self) -> Any:
        return self.process(self.outputs())

    def largest_difference(self, case: Case) -> float:
        """Return the largest difference of raw predictions and masks; assert that it is small."""
        theirs = self.outputs()
        assert self.process(theirs)[0]["segments_info"], "nothing is found: no fair comparison"
        predictions = predict(case)
        threshold = case.model.inference_options.panoptic.score_threshold
        scores = case.model.scoring.decode(predictions.logits[-1]).scores[0]
        queries = (scores > threshold).nonzero()[:, 0]
        masks = predictions.last_masks(torch.zeros_like(queries), queries)
        pairs = [
            (predictions.logits[-1], theirs.logits),
            (predictions.boxes[-1], theirs.pred_boxes),
            (masks, theirs.pred_masks[0, queries]),
        ]
        difference = max((ours - other).abs().max().item() for ours, other in pairs)
        assert difference < 1e-3, difference
        return difference
