"""A model whose masks are the ground truth, inside the real pipeline: only resolution is lost."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from batchformer_panoptic import PanopticDETR
from batchformer_panoptic.modeling.panoptic_detr import ModelPredictions
from batchformer_panoptic.modeling.postprocessing.results import InferenceOptions
from batchformer_panoptic.modeling.set_prediction.scoring import SoftmaxScoring
from helpers.panoptic_sets import CATEGORIES, CONTIGUOUS, PanopticImage

STRIDE = 4
LOGIT = 10.0


class PassOn(nn.Module):
    """Replaces the backbone: returns the padded batch."""

    def __init__(self, size_divisibility: int) -> None:
        super().__init__()
        self.size_divisibility = size_divisibility

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return {"truth": images}


class PerfectModel(PanopticDETR):
    """Takes its predictions from its input; batching, padding, resizing and merging are real.

    An "image" is (2, H, W): the segment of each pixel and its class, both numbered from 1; 0 is
    void and padding. See `perfect_inputs`.
    """

    def __init__(
        self,
        options: InferenceOptions,
        *,
        num_classes: int,
        num_queries: int = 20,
        size_divisibility: int = 0,
    ) -> None:
        super().__init__(
            backbone=PassOn(size_divisibility),
            transformer=nn.Identity(),
            box_head=nn.Identity(),
            mask_head=nn.Identity(),
            scoring=SoftmaxScoring(num_classes),
            matcher=None,
            criterion=None,
            inference_options=options,
            pixel_mean=[0.0, 0.0],
            pixel_std=[1.0, 1.0],
        )
        self.num_queries = num_queries
        self.eval()

    def predict(
        self,
        features: dict[str, Tensor],
        image_sizes: Sequence[tuple[int, int]],
        padded_size: tuple[int, int],
    ) -> ModelPredictions:
        truth = features["truth"]
        shape = (1, len(truth), self.num_queries, self.scoring.num_outputs)
        logits = torch.full(shape, -LOGIT)
        logits[..., -1] = 0.0  # no object
        for index, (numbers, classes) in enumerate(truth):
            for number in numbers.unique().int().tolist():
                if number > 0:
                    label = int(classes[numbers == number][0]) - 1
                    logits[0, index, number - 1, label] = LOGIT
        boxes = torch.full((*shape[:3], 4), 0.5)
        masks = partial(self.draw_masks, truth)
        return ModelPredictions(logits, boxes, masks, transformer=None, padded_size=padded_size)

    def draw_masks(
        self, truth: Tensor, layer_index: Tensor, image_index: Tensor, query_index: Tensor
    ) -> Tensor:
        numbers = truth[image_index, 0]
        size = [-(-side // STRIDE) for side in numbers.shape[-2:]]
        masks = (numbers == query_index[:, None, None] + 1).float()
        share = F.interpolate(masks[:, None], size=size, mode="area")[:, 0]
        return torch.where(share > 0.5, LOGIT, -LOGIT)


def perfect_inputs(
    segment_map: np.ndarray, class_of_id: dict[int, int], image_id: int, size: tuple[int, int]
) -> dict[str, Any]:
    """The model's input for one image.

    Args:
        segment_map: (H, W) ids; 0 and those not in ``class_of_id`` are void.
        class_of_id: contiguous class of each segment.
        image_id: as in the annotation.
        size: (height, width) at which the model sees the image.
    """
    truth = torch.zeros(2, *segment_map.shape)
    for number, (segment_id, label) in enumerate(class_of_id.items(), 1):
        mask = torch.from_numpy(segment_map == segment_id)
        truth[0][mask], truth[1][mask] = number, label + 1
    resized = F.interpolate(truth[None], size=size, mode="nearest-exact")[0]
    height, width = segment_map.shape
    return {"image": resized, "image_id": image_id, "height": height, "width": width}


def shapes_image(
    seed: int, size: tuple[int, int], num_things: int = 3, min_share: float = 0.03
) -> PanopticImage:
    """Sky over grass under some discs, of the categories of `panoptic_sets`; a void corner."""
    rng = np.random.default_rng(seed)
    height, width = size
    rows, columns = np.mgrid[:height, :width]
    segment_map = np.where(rows < height * 0.5 + 0.1 * columns, 11, 22)
    classes = {11: 200, 22: 7}
    for number in range(num_things):
        radius = rng.uniform(0.15, 0.22) * min(size)
        y, x = rng.uniform(0.2, 0.8) * height, rng.uniform(0.2, 0.8) * width
        segment_map[(rows - y) ** 2 + (columns - x) ** 2 < radius**2] = 300 + number
        classes[300 + number] = int(rng.choice([3, 90]))
    segment_map[: height // 10, : width // 10] = 0
    # Segments that are almost hidden cannot be predicted at a stride of 4.
    areas = {segment_id: int((segment_map == segment_id).sum()) for segment_id in classes}
    for segment_id, area in areas.items():
        if area < min_share * segment_map.size:
            segment_map[segment_map == segment_id] = 0
    segments_info = [
        {"id": segment_id, "category_id": classes[segment_id], "iscrowd": 0, "area": area}
        for segment_id, area in areas.items()
        if area >= min_share * segment_map.size
    ]
    return PanopticImage(segment_map, segments_info)


def inputs_of(images: list[PanopticImage], scale: float = 1.0) -> list[dict[str, Any]]:
    """Inputs for a data set written with `panoptic_sets.registered`."""
    return [
        perfect_inputs(
            image.segment_map,
            {info["id"]: CONTIGUOUS[info["category_id"]] for info in image.segments_info},
            image_id,
            (round(scale * image.segment_map.shape[0]), round(scale * image.segment_map.shape[1])),
        )
        for image_id, image in enumerate(images, 100)
    ]


THING_CLASS_IDS = tuple(CONTIGUOUS[row["id"]] for row in CATEGORIES if row["isthing"])
