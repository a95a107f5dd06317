"""Deliberate defects, one at a time: the golden comparisons are far off with each of them.

Each defect is put into one place of the package, and must be seen through tolerances that are
``SLACK`` times as wide as those of the golden tests.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from batchformer_panoptic.batchformer import BatchFormerHook, BatchFormerV2, StreamState
from batchformer_panoptic.modeling import panoptic_detr as meta_arch
from batchformer_panoptic.modeling.heads.mask import AttentionMap
from batchformer_panoptic.modeling.set_prediction import matcher
from batchformer_panoptic.modeling.set_prediction.criterion import MaskLoss
from batchformer_panoptic.modeling.set_prediction.scoring import SoftmaxScoring
from batchformer_panoptic.modeling.set_prediction.targets import ImageTarget
from batchformer_panoptic.modeling.transformer.layers import DETRDecoder, DETREncoder
from helpers.defects import attend_over_tokens, swap_streams
from helpers.dense_masks import DenseMasks
from helpers.golden_models import (
    assert_evaluates_as_plain,
    assert_masks,
    assert_training_step,
    features_of,
    load_golden,
    panoptic_model,
    sizes_of,
    two_stream_model,
)

SLACK = 20.0

PLAIN = load_golden("detr_panoptic.pt")
TWO_STREAMS = load_golden("detr_batchformer_two_stream.pt")
VARIANTS = TWO_STREAMS["variants"]
EMPTY = [case for case in PLAIN["extra_targets"].values() if case["num_targets_used"] == 0]


def run_plain(slack):
    assert_training_step(panoptic_model(PLAIN), PLAIN, PLAIN["targets"], PLAIN, slack=slack)


def run_padded(slack):
    skip_unless_padded()
    run_plain(slack)


def run_masks(slack):
    model = panoptic_model(PLAIN)
    predictions = model.predict(features_of(PLAIN), *sizes_of(PLAIN))
    attention_map = PLAIN["intermediates"]["bbox_attention_map"]
    masks = PLAIN["outputs"]["pred_masks"]
    assert_masks(model, PLAIN, predictions, masks, attention_map, slack=slack)


def run_padded_masks(slack):
    skip_unless_padded()
    run_masks(slack)


def skip_unless_padded():
    if not PLAIN["inputs"]["pixel_mask"].any():
        pytest.skip("no image of the file is padded")


def run_without_objects(slack):
    if not EMPTY:
        pytest.skip("the file has no batch without objects")
    for case in EMPTY:
        assert_training_step(panoptic_model(PLAIN), PLAIN, case["targets"], case, slack=slack)


def run_two_streams(slack, *, insertions=1):
    names = [name for name, v in VARIANTS.items() if len(v["insert_idx"]) >= insertions]
    if not names:
        pytest.skip(f"no variant of the file inserts {insertions} blocks")
    model = two_stream_model(PLAIN, TWO_STREAMS, names[0])
    recorded = VARIANTS[names[0]]
    assert_training_step(model, PLAIN, PLAIN["targets"], recorded, slack=slack)


def run_two_insertions(slack):
    run_two_streams(slack, insertions=2)


def run_evaluation(slack):
    model = two_stream_model(PLAIN, TWO_STREAMS, next(iter(VARIANTS)))
    assert_evaluates_as_plain(model, panoptic_model(PLAIN), PLAIN)


# --- defects: functions that stand in for the method or function they are given ------------------


def lose_targets_of_the_second_stream(expand_list):
    def expand(self, items):
        if self.num_streams == 1 or not isinstance(items[0], ImageTarget):
            return expand_list(self, items)
        nothing = [
            ImageTarget(t.labels[:0], t.boxes_cxcywh[:0], DenseMasks(t.masks.masks[:0]))
            for t in items
        ]
        return [*items, *nothing]

    return expand


def count_one_stream(count_objects):
    return lambda targets, device: count_objects(targets[: len(targets) // 2], device)


def count_without_clamp(_):
    return lambda targets, device: torch.tensor(float(sum(map(len, targets))), device=device)


def ignore_padding(forward):
    def is_mask(value):
        return isinstance(value, torch.Tensor) and value.dtype == torch.bool

    return lambda self, *args: forward(self, *(None if is_mask(x) else x for x in args))


def ignore_padding_in_mask_head(forward):
    return lambda self, queries, memory, mask, image: forward(
        self, queries, memory, torch.zeros_like(mask), image
    )


def positions_of_the_first_stream_only(expand):
    def expand_masks_alone(self, x):
        expanded = expand(self, x)
        if x.is_floating_point():
            expanded = expanded.clone()
            expanded[len(x) :] = 0
        return expanded

    return expand_masks_alone


def softmax_of_each_head(forward):
    def normalise(self, *args):
        weights = forward(self, *args)
        return weights / weights.sum(dim=(-2, -1), keepdim=True)

    return normalise


def at_prediction_resolution(call):
    def losses(self, *args):
        self.resolution = "prediction"
        return call(self, *args)

    return losses


def without_no_object_weight(loss):
    def unweighted(self, *args):
        self.no_object_weight = 1.0
        return loss(self, *args)

    return unweighted


def match_streams_jointly(assign):
    def joint(cost, counts):
        streams = np.split(cost, 2, axis=1)
        return assign(np.concatenate([sum(streams) / 2] * 2, axis=1), counts)

    return joint


def alter_the_original_stream(after_layer):
    def alter(self, index, tokens, streams, mask):
        result, now = after_layer(self, index, tokens, streams, mask)
        if streams.num_streams == 2 and index in self.insert_layers:
            original, other = now.split(result)
            block = self.blocks["shared" if self.shared else str(index)]
            result = now.join([block(original), other])
        return result, now

    return alter


def act_in_evaluation(after_layer):
    def act(self, *args):
        self.training = True
        return after_layer(self, *args)

    return act


class Defect(NamedTuple):
    """What is replaced by what, which comparison is run, and the quantity that differs."""

    owner: Any
    name: str
    replacement: Callable[[Any], Any]
    run: Callable[[float], None]
    complaint: str


DEFECTS = {
    "batch attention over tokens": Defect(
        BatchFormerV2, "forward", attend_over_tokens, run_two_streams, "pred_logits"
    ),
    "streams swapped": Defect(StreamState, "join", swap_streams, run_two_streams, "pred_logits"),
    "targets not doubled": Defect(
        StreamState,
        "expand_list",
        lose_targets_of_the_second_stream,
        run_two_streams,
        "num_targets_used",
    ),
    "normaliser of one stream": Defect(
        meta_arch, "count_objects", count_one_stream, run_two_streams, "loss_bbox"
    ),
    "normaliser not clamped": Defect(
        meta_arch, "count_objects", count_without_clamp, run_without_objects, "loss_bbox"
    ),
    "padding ignored in the encoder": Defect(
        DETREncoder, "forward", ignore_padding, run_padded, "pred_logits"
    ),
    "padding ignored in the decoder": Defect(
        DETRDecoder, "forward", ignore_padding, run_padded, "pred_logits"
    ),
    "padding ignored in the mask head": Defect(
        AttentionMap, "forward", ignore_padding_in_mask_head, run_padded_masks, "bbox_attention_map"
    ),
    "positions not expanded": Defect(
        StreamState, "expand", positions_of_the_first_stream_only, run_two_streams, "pred_logits"
    ),
    "softmax of each head": Defect(
        AttentionMap, "forward", softmax_of_each_head, run_masks, "bbox_attention_map"
    ),
    "mask loss at prediction resolution": Defect(
        MaskLoss, "__call__", at_prediction_resolution, run_plain, "loss_mask"
    ),
    "no-object weight missing": Defect(
        SoftmaxScoring, "loss", without_no_object_weight, run_plain, "loss_ce"
    ),
    "streams matched jointly": Defect(
        matcher, "_assign", match_streams_jointly, run_two_streams, "indices"
    ),
    "original stream altered by a later block": Defect(
        BatchFormerHook,
        "after_layer",
        alter_the_original_stream,
        run_two_insertions,
        "pred_logits",
    ),
    "block active in evaluation": Defect(
        BatchFormerHook, "after_layer", act_in_evaluation, run_evaluation, "evaluation"
    ),
}


@pytest.mark.parametrize("defect", DEFECTS.values(), ids=DEFECTS)
def test_defect_is_seen(defect, monkeypatch):
    defect.run(1.0)  # without it everything is as recorded
    replacement = defect.replacement(getattr(defect.owner, defect.name))
    monkeypatch.setattr(defect.owner, defect.name, replacement)
    with pytest.raises(AssertionError, match=defect.complaint):
        defect.run(SLACK)
