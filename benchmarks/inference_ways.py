"""Models for comparison with this project's inference: naive mask heads, and transformers' DETR."""

import copy
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from detectron2.config import CfgNode
from detectron2.structures import ImageList
from torch import Tensor
from torch.nn import functional as F

from batchformer_panoptic import PanopticDETR
from batchformer_panoptic.checkpoint.conversion.export import to_huggingface
from batchformer_panoptic.modeling.panoptic_detr import Predictions


class Case(NamedTuple):
    """A config, its model in evaluation mode, and an input with one image."""

    cfg: CfgNode
    model: PanopticDETR
    inputs: list[dict[str, Any]]


def predict(case: Case) -> tuple[Predictions, dict[str, Tensor]]:
    images = case.model.preprocess(case.inputs)
    features = case.model.backbone(images.tensor)
    size = tuple(images.tensor.shape[-2:])
    return case.model.predict(features, images.image_sizes, size), features


def as_class(model: PanopticDETR, kind: type[PanopticDETR]) -> PanopticDETR:
    """Return a copy of the model with the same weights and the methods of another class."""
    other = copy.copy(model)
    other.__class__ = kind
    return other


class AllQueries(PanopticDETR):
    """Decodes the masks of all queries and then selects the needed ones."""

    decode: Callable[..., Tensor] = PanopticDETR.predict_masks

    def predict_masks(
        self,
        predictions: Predictions,
        features: dict[str, Tensor],
        image_index: Tensor,
        query_index: Tensor,
    ) -> Tensor:
        images, queries = predictions.logits.shape[1:3]
        everything = torch.ones(images, queries).nonzero()
        masks = self.decode(predictions, features, everything[:, 0], everything[:, 1])
        return masks.unflatten(0, (images, queries))[image_index, query_index]


class Naive(AllQueries):
    """Decodes as the public code does: maps in default layout, copied for every query."""

    def preprocess(self, batched_inputs: list[dict[str, Any]]) -> ImageList:
        images = super().preprocess(batched_inputs)
        images.tensor = images.tensor.contiguous()
        return images

    def decode(
        self,
        predictions: Predictions,
        features: dict[str, Tensor],
        image_index: Tensor,
        query_index: Tensor,
    ) -> Tensor:
        head, output = self.mask_head, predictions.transformer
        queries = output.hidden_states[-1][image_index, query_index]
        attention = head.attention(queries, output.memory_map, output.padding_mask, image_index)
        x = torch.cat([output.projected_map[image_index], attention], dim=1)
        x = F.relu(head.norms[0](head.convs[0](x)))
        x = F.relu(head.norms[1](head.convs[1](x)))
        for name, adapter, conv, norm in zip(
            self.mask_features, head.adapters, head.convs[2:], head.norms[2:], strict=True
        ):
            adapted = adapter(features[name])[image_index]
            x = adapted + F.interpolate(x, size=adapted.shape[-2:], mode="nearest")
            x = F.relu(norm(conv(x)))
        return head.predictor(x)[:, 0]


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
        predictions, features = predict(case)
        threshold = case.model.inference_options.panoptic.score_threshold
        scores = case.model.scoring.decode(predictions.logits[-1]).scores[0]
        queries = (scores > threshold).nonzero()[:, 0]
        masks = case.model.predict_masks(predictions, features, torch.zeros_like(queries), queries)
        pairs = [
            (predictions.logits[-1], theirs.logits),
            (predictions.boxes[-1], theirs.pred_boxes),
            (masks, theirs.pred_masks[0, queries]),
        ]
        difference = max((ours - other).abs().max().item() for ours, other in pairs)
        assert difference < 1e-3, difference
        return difference
