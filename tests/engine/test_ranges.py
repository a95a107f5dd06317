"""Every number of a config has a range, and keys without effect are named."""

import logging
import math

import pytest
from detectron2.config import CfgNode, get_cfg

from batchformer_panoptic import add_batchformer_panoptic_config
from batchformer_panoptic.engine.ranges import (
    RANGES,
    Range,
    check_values,
    warn_of_keys_without_effect,
)
from batchformer_panoptic.errors import UserError
from helpers.tiny_model import tiny_cfg


def numbers(node: CfgNode, prefix: str = ""):
    for key, value in node.items():
        first = value[0] if isinstance(value, list | tuple) and value else value
        if isinstance(value, CfgNode):
            yield from numbers(value, f"{prefix}{key}.")
        elif isinstance(first, int | float) and not isinstance(first, bool):
            yield prefix + key


def test_every_number_of_this_project_has_a_range():
    cfg, theirs = get_cfg(), set(numbers(get_cfg()))
    add_batchformer_panoptic_config(cfg)
    ours = set(numbers(cfg)) - theirs
    assert len(ours) > 80
    assert ours <= RANGES.keys()
    check_values(cfg)


@pytest.mark.parametrize(
    ("allowed", "fitting", "others"),
    [
        (Range(1), [1, 2.5, [3, 4], 2**31 - 1], [0, -1, [], [0], 10**40, math.inf, "2", True]),
        (Range(0, 1), [0, 1.0, 0.5], [1.1, -0.1, math.nan, None]),
        (Range(0, 1, open_low=True, open_high=True), [0.5], [0, 1]),
        (Range(0, length=3), [[0, 1, 2]], [1, [1], [1, 2, -1], [1, 2, "a"]]),
        (Range(0, may_be_empty=True), [[], (1,)], [[-1]]),
    ],
)
def test_a_range_allows_what_it_says(allowed, fitting, others):
    assert all(map(allowed.allows, fitting))
    assert not any(map(allowed.allows, others))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"MODEL__PIXEL_STD": [1.0, 0.0, 1.0]},
            "PIXEL_STD must be 3 numbers, each more than 0",
        ),
        ({"MODEL__DETR__DROPOUT": 1.5}, r"MODEL.DETR.DROPOUT must be from 0 to 1, not 1.5"),
        ({"SOLVER__EMA_DECAY": 1.0}, r"SOLVER.EMA_DECAY must be from 0 to less than 1, not 1.0"),
        ({"SOLVER__STEPS": (4, 2)}, r"SOLVER.STEPS must be in ascending order, not \[4, 2\]"),
        (
            {"INPUT__MIN_SIZE_TRAIN": (4, 5, 6), "INPUT__MIN_SIZE_TRAIN_SAMPLING": "range"},
            "range needs two INPUT.MIN_SIZE_TRAIN",
        ),
        ({"INPUT__CLASSIFICATION__SCALE": [0.5, 0.1]}, "SCALE must be the smallest and the larg"),
        (
            {"MODEL__BATCHFORMER__ENABLED": True, "MODEL__BATCHFORMER__NUM_HEADS": 5},
            "HIDDEN_DIM 32 must be a multiple of MODEL.BATCHFORMER.NUM_HEADS 5",
        ),
        (
            {
                "MODEL__BACKBONE__NAME": "build_swin_backbone",
                "MODEL__SWIN__NUM_HEADS": [3, 6, 5, 8],
            },
            "NUM_HEADS 5 must divide the 384 channels of stage 3",
        ),
        ({"MODEL__SMALL_RESNET__STAGE_STRIDES": [1]}, "they have 4 and 1"),
        ({"SOLVER__MAX_ITER": 10**99}, r"at most 2147483647, not 10+\.\.\. \(100 characters\)"),
        ({"SEED": 2**32}, "SEED must be from -1 to 4294901760, not 4294967296"),
        ({"SEED": -2}, "SEED must be from -1 to 4294901760, not -2"),
        ({"INPUT__MIN_SIZE_TRAIN": ()}, r"must be one or more numbers, each at least 1, not \[\]"),
    ],
)
def test_the_key_its_value_and_the_remedy_are_named(changes, message):
    with pytest.raises(UserError, match=message):
        check_values(tiny_cfg(**changes))


def test_keys_that_nothing_reads_are_named(caplog):
    with caplog.at_level(logging.WARNING):
        warn_of_keys_without_effect(tiny_cfg())
        assert not caplog.records
        # YAML has no tuples.
        weights = [[10.0, 10.0, 5.0, 5.0], [20.0, 20.0, 10.0, 10.0], [30.0, 30.0, 15.0, 15.0]]
        warn_of_keys_without_effect(tiny_cfg(MODEL__ROI_BOX_CASCADE_HEAD__BBOX_REG_WEIGHTS=weights))
        assert not caplog.records
        warn_of_keys_without_effect(
            tiny_cfg(TEST__AUG__ENABLED=True, MODEL__ROI_HEADS__NUM_CLASSES=3)
        )
    assert caplog.messages == [
        "without effect in this project: MODEL.ROI_HEADS.NUM_CLASSES, TEST.AUG.ENABLED"
    ]
