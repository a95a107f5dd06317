"""Settings are stored with weights, and different ones are refused."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from batchformer_panoptic.checkpoint import PanopticCheckpointer, SettingsRecord, read_weights
from batchformer_panoptic.errors import UserError
from helpers.small_checkpoint import (
    Model,
    assert_loaded,
    load_weights,
    resnet_cfg,
    save_weights,
    write_image_net_pkl,
)
from helpers.tiny_model import tiny_cfg


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("INPUT.FORMAT", "BGR", "INPUT.FORMAT is RGB for the file and BGR in the config"),
        ("MODEL.PIXEL_MEAN", [103.53, 116.28, 123.675], "MODEL.PIXEL_MEAN is [123.675, 116.28"),
        ("MODEL.PIXEL_STD", [1.0, 1.0, 1.0], "[1.0, 1.0, 1.0] in the config"),
        ("MODEL.RESNETS.STRIDE_IN_1X1", True, "STRIDE_IN_1X1 is False for the file and True"),
        ("MODEL.RESNETS.RES5_DILATION", 2, "RES5_DILATION is 1 for the file and 2 in the config"),
        ("MODEL.DETR.NHEADS", 8, "Add MODEL.DETR.NHEADS 4 to the command line"),
        ("MODEL.DETR.PRE_NORM", True, "PRE_NORM is False for the file"),
        ("MODEL.DETR.SCORING", "focal", "Add MODEL.DETR.SCORING softmax to the command line"),
        ("MODEL.BATCHFORMER.NUM_HEADS", 2, "NUM_HEADS is 4 for the file and 2 in the config"),
    ],
)
@pytest.mark.parametrize("resume", [False, True])
def test_other_settings_are_refused(
    tmp_path: Path, key: str, value: Any, words: str, resume: bool
) -> None:
    block = {"MODEL__BATCHFORMER__ENABLED": True}
    own = SettingsRecord(resnet_cfg(**block))
    path = str(tmp_path / "w.pth")
    PanopticCheckpointer(Model(), str(tmp_path), settings=own).save("w")
    load_weights(Model(), path, settings=own)
    other = SettingsRecord(resnet_cfg(**block, **{key.replace(".", "__"): value}))
    with pytest.raises(UserError) as error:
        PanopticCheckpointer(Model(), str(tmp_path), settings=other).resume_or_load(
            path, resume=resume
        )
    assert words in str(error.value)
    assert str(error.value).count(" for the file and ") == 1
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("dilation", [1, 2])
def test_whose_dilation_it_is_matters_where_there_is_one(tmp_path: Path, dilation: int) -> None:
    # The first block of res5 is dilated in one and not in the other; names and shapes are equal.
    dilated = {"MODEL__RESNETS__RES5_DILATION": dilation}
    dc5 = resnet_cfg(**dilated, MODEL__BACKBONE__NAME="build_resnet_dc5_backbone")
    PanopticCheckpointer(Model(), str(tmp_path), settings=SettingsRecord(dc5)).save("w")
    target = SettingsRecord(resnet_cfg(**dilated, MODEL__BACKBONE__NAME="build_resnet_backbone"))
    if dilation == 1:
        load_weights(Model(), str(tmp_path / "w.pth"), settings=target)
    else:
        with pytest.raises(UserError, match=r"Add MODEL\.BACKBONE\.NAME build_resnet_dc5_"):
            load_weights(Model(), str(tmp_path / "w.pth"), settings=target)


def test_every_other_setting_is_named_with_its_remedy(tmp_path: Path) -> None:
    settings = {"INPUT.FORMAT": "BGR", "MODEL.PIXEL_STD": [1.0, 1.0, 1.0]}
    path = save_weights(tmp_path / "w.pth", Model(), settings=settings)
    with pytest.raises(UserError) as error:
        load_weights(Model(), path, settings=SettingsRecord(resnet_cfg()))
    remedy = 'Add INPUT.FORMAT BGR MODEL.PIXEL_STD "[1.0, 1.0, 1.0]" to the command line'
    assert remedy in str(error.value)


def test_settings_that_do_not_matter_are_passed_over(tmp_path: Path) -> None:
    source = SettingsRecord(resnet_cfg(MODEL__BATCHFORMER__ENABLED=True))
    PanopticCheckpointer(Model(), str(tmp_path), settings=source).save("w")
    # No block, no ResNet: their settings play no part. Thresholds are a choice of the user.
    target = resnet_cfg(
        MODEL__BATCHFORMER__NUM_HEADS=2,
        MODEL__BACKBONE__NAME="build_small_resnet_backbone",
        MODEL__RESNETS__STRIDE_IN_1X1=True,
        MODEL__PANOPTIC__SCORE_THRESHOLD_TEST=0.3,
        INPUT__MIN_SIZE_TEST=32,
    )
    load_weights(Model(), str(tmp_path / "w.pth"), settings=SettingsRecord(target))


def test_rounded_pixel_statistics_are_the_same(tmp_path: Path) -> None:
    settings = {"MODEL.PIXEL_MEAN": [123.68, 116.28, 103.53]}
    path = save_weights(tmp_path / "w.pth", Model(), settings=settings)
    load_weights(Model(), path, settings=SettingsRecord(resnet_cfg()))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"MODEL.DETR.NUM_OBJECT_QUERIES": 100}, "NUM_OBJECT_QUERIES is 100 for the file and 6 in"),
        ({"MODEL.NO.SUCH_KEY": 1}, "MODEL.NO.SUCH_KEY is 1 for the file and unknown in"),
        ([1], "its 'settings' are not a mapping"),
    ],
)
def test_settings_of_converted_files(tmp_path: Path, settings: Any, words: str) -> None:
    path = save_weights(tmp_path / "w.pth", Model(), settings=settings)
    with pytest.raises(UserError) as error:
        load_weights(Model(), path, settings=SettingsRecord(resnet_cfg()))
    assert words in str(error.value)


def test_settings_name_the_timm_model_and_not_its_weights(tmp_path: Path) -> None:
    timm = {"MODEL__BACKBONE__NAME": "build_timm_backbone"}
    path = save_weights(
        tmp_path / "w.pth", Model(), settings={"MODEL.TIMM.NAME": "resnet50.a1_in1k"}
    )
    load_weights(
        Model(), path, settings=SettingsRecord(tiny_cfg(**timm, MODEL__TIMM__NAME="resnet50"))
    )
    other = SettingsRecord(tiny_cfg(**timm, MODEL__TIMM__NAME="resnet50d"))
    with pytest.raises(UserError, match=r"MODEL\.TIMM\.NAME"):
        load_weights(Model(), path, settings=other)


def test_checkpoints_without_settings_load_as_before(tmp_path: Path) -> None:
    source, target = Model(), Model()
    path = save_weights(tmp_path / "w.pth", source)
    load_weights(target, path, settings=SettingsRecord(resnet_cfg()))
    assert_loaded(target, source.state_dict())


def test_msra_weights_under_the_settings_of_torchvision(tmp_path: Path) -> None:
    path = write_image_net_pkl(tmp_path / "R-50.pkl", {"stem.conv1.bias": np.ones(3)})
    with pytest.raises(UserError, match="weights of MSRA") as error:
        load_weights(Model(), path, training=True, settings=SettingsRecord(resnet_cfg()))
    for key in ("INPUT.FORMAT", "MODEL.PIXEL_STD", "MODEL.RESNETS.STRIDE_IN_1X1"):
        assert key in str(error.value)
    own = resnet_cfg(
        INPUT__FORMAT="BGR",
        MODEL__PIXEL_STD=[1.0, 1.0, 1.0],
        MODEL__RESNETS__STRIDE_IN_1X1=True,
    )
    load_weights(Model(), path, training=True, settings=SettingsRecord(own))


def test_torchvision_weights_are_not_taken_for_those_of_msra(tmp_path: Path) -> None:
    path = write_image_net_pkl(tmp_path / "R-50.pkl", {})
    load_weights(Model(), path, training=True, settings=SettingsRecord(resnet_cfg()))


@pytest.mark.parametrize(
    "overrides",
    [
        {"MODEL__BACKBONE__NAME": "build_resnet_backbone"},
        {"MODEL__BACKBONE__NAME": "build_small_resnet_backbone"},
        {"MODEL__BACKBONE__NAME": "build_timm_backbone"},
        {"MODEL__DETR__TRANSFORMER_NAME": "smca"},
        {"MODEL__BATCHFORMER__ENABLED": True},
    ],
)
def test_saved_settings_are_plain(tmp_path: Path, overrides: dict[str, Any]) -> None:
    cfg = tiny_cfg(**overrides)
    cfg.MODEL.PIXEL_STD = (1.0, 2.0, 3.0)
    PanopticCheckpointer(Model(), str(tmp_path), settings=SettingsRecord(cfg)).save("w")
    stored = read_weights(str(tmp_path / "w.pth"))["settings"]
    assert stored == json.loads(json.dumps(stored))
    assert stored["MODEL.PIXEL_STD"] == [1.0, 2.0, 3.0]
    block = overrides.get("MODEL__BATCHFORMER__ENABLED", False)
    assert ("MODEL.BATCHFORMER.NUM_HEADS" in stored) == block
