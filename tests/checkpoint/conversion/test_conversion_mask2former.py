"""Weights of facebookresearch/Mask2Former: every key in and out again, rows, settings, errors."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from batchformer_panoptic.checkpoint import SettingsRecord
from batchformer_panoptic.checkpoint.conversion import SOURCES, Request
from batchformer_panoptic.checkpoint.conversion.export import (
    check_config,
    check_official_input,
    not_exported,
    to_official,
)
from batchformer_panoptic.data.class_table import ClassTable
from batchformer_panoptic.errors import UserError
from helpers.commands import load_script
from helpers.golden_files import load_golden
from helpers.mask2former_models import (
    BACKBONES,
    NUM_CLASSES,
    config,
    model_with,
    predict_ours,
    random_model,
    tiny_config,
)

CONVERT = SOURCES["mask2former"].convert
NORM = {"weight", "bias"}
# The names of the public Swin, written down here independently of the package's table.
PUBLIC_SWIN = {
    *(f"patch_embed.{part}.{tail}" for part in ("proj", "norm") for tail in NORM),
    *(f"norm#.{tail}" for tail in NORM),
    *(
        f"layers.#.blocks.#.{part}.{tail}"
        for part in ("norm#", "attn.qkv", "attn.proj", "mlp.fc#")
        for tail in NORM
    ),
    "layers.#.blocks.#.attn.relative_position_bias_table",
    "layers.#.downsample.reduction.weight",
    *(f"layers.#.downsample.norm.{tail}" for tail in NORM),
}
PUBLIC_RESNET = {
    "stem.conv#.weight",
    "res#.#.conv#.weight",
    "res#.#.shortcut.weight",
    *(
        f"{part}.norm.{tail}"
        for part in ("stem.conv#", "res#.#.conv#", "res#.#.shortcut")
        for tail in ("weight", "bias", "running_mean", "running_var")
    ),
}


@pytest.fixture(scope="module", name="states")
def _states() -> dict[str, dict[str, Tensor]]:
    """A random model of each backbone, in this project's names."""
    return {name: random_model(tiny_config(name)).state_dict() for name in BACKBONES}


def numbers_out(names: Any) -> set[str]:
    return {re.sub(r"\d+", "#", name) for name in names}


@pytest.mark.parametrize("backbone", BACKBONES)
def test_official_out_and_in_again(states: dict[str, dict[str, Tensor]], backbone: str) -> None:
    state = states[backbone]
    official = to_official(state, no_object_weight=0.2)
    converted = CONVERT(official, Request())
    assert converted.dropped == [
        (
            "criterion.empty_weight",
            "class weights of the loss, here MODEL.DETR.NO_OBJECT_WEIGHT",
        )
    ]
    assert official["criterion.empty_weight"].tolist() == pytest.approx([1.0] * NUM_CLASSES + [0.2])
    assert converted.model.keys() == state.keys()
    assert all(torch.equal(converted.model[name], value) for name, value in state.items())
    cfg = tiny_config(backbone)
    SettingsRecord(cfg).check(converted.settings, "converted")
    check_config(state, cfg)
    built = model_with(
        config(
            converted.settings,
            {"MODEL.DETR.COSTS": ["class_cost"], "MODEL.DETR.LOSSES": ["class_loss"]},
        ),
        converted.model,
    )
    images = torch.randn(1, 3, 64, 96)
    ours = predict_ours(model_with(cfg, state), images)
    assert all(torch.equal(a, b) for a, b in zip(ours, predict_ours(built, images), strict=True))


@pytest.mark.parametrize("backbone", BACKBONES)
def test_names_are_those_of_the_public_code(
    states: dict[str, dict[str, Tensor]], backbone: str
) -> None:
    official = to_official(states[backbone])
    head = {f"sem_seg_head.{name}" for name in load_golden("mask2former.pt")["state_dict"]}
    public = {"resnet": PUBLIC_RESNET, "swin": PUBLIC_SWIN}[backbone]
    expected = numbers_out(head) | {f"backbone.{name}" for name in public}
    assert numbers_out(official) == expected | {"criterion.empty_weight"}


def test_older_names_are_accepted(states: dict[str, dict[str, Tensor]]) -> None:
    official = to_official(states["resnet"])
    older = {
        name.replace("sem_seg_head.pixel_decoder.", "sem_seg_head.").replace(
            "query_feat", "static_query"
        ): value
        for name, value in official.items()
    }
    assert older.keys() != official.keys()
    converted = CONVERT(older, Request())
    assert converted.model.keys() == states["resnet"].keys()


def test_the_file_states_the_version_of_its_names(
    states: dict[str, dict[str, Tensor]], tmp_path: Path
) -> None:
    torch.save({"model": to_official(states["resnet"])}, tmp_path / "x.pth")
    model = torch.load(tmp_path / "x.pth", weights_only=True)["model"]
    assert model._metadata["sem_seg_head"] == {"version": 2}


def test_buffers_without_weights_are_left_out(states: dict[str, dict[str, Tensor]]) -> None:
    official = to_official(states["swin"])
    index = "backbone.layers.0.blocks.0.attn.relative_position_index"
    official[index] = torch.zeros(9, 9, dtype=torch.int64)
    assert index in [name for name, _ in CONVERT(official, Request()).dropped]
    official = to_official(states["resnet"])
    count = "backbone.stem.conv1.norm.num_batches_tracked"
    official[count] = torch.tensor(3)
    assert count in [name for name, _ in CONVERT(official, Request()).dropped]


def test_an_unknown_depth_is_noted(states: dict[str, dict[str, Tensor]]) -> None:
    official = to_official(states["resnet"])
    kept = {k: v for k, v in official.items() if not k.startswith("backbone.res4.5.")}
    converted = CONVERT(kept, Request())
    assert "the numbers of blocks of the ResNet match no MODEL.RESNETS.DEPTH" in converted.notes


def test_blocks_are_left_out_of_an_export() -> None:
    cfg = tiny_config("resnet", MODEL__BATCHFORMER__ENABLED=True)
    state = random_model(cfg).state_dict()
    plain = to_official(state)
    assert not any("batchformer" in name for name in plain)
    dropped = [name for name, _ in not_exported(state, with_block=True)]
    assert dropped
    assert all("batchformer.blocks.0" in name for name in dropped)
    assert CONVERT(plain, Request()).model.keys() == state.keys() - set(dropped)


def test_the_label_embedding_of_pilot_queries_is_left_out_of_an_export() -> None:
    state = random_model(
        tiny_config("resnet", MODEL__MASK2FORMER__PILOT__ENABLED=True)
    ).state_dict()
    plain = to_official(state)
    dropped = [name for name, _ in not_exported(state, with_block=True)]
    assert dropped == ["transformer.pilot.label_embed.weight"]
    assert CONVERT(plain, Request()).model.keys() == state.keys() - set(dropped)


@pytest.mark.parametrize(
    ("removed", "missing"),
    [
        ("sem_seg_head.predictor.query_embed.weight", "transformer.decoder.query_embed.weight"),
        (
            "sem_seg_head.predictor.transformer_ffn_layers.1.linear1.bias",
            "transformer.decoder.layers.1.linear1.bias",
        ),
        ("backbone.layers.1.blocks.0.attn.relative_position_bias_table", None),
        ("backbone.norm2.weight", None),
    ],
)
def test_a_renamed_key_is_listed_twice(
    states: dict[str, dict[str, Tensor]], removed: str, missing: str | None
) -> None:
    official = to_official(states["swin"])
    official[f"{removed}_renamed"] = official.pop(removed)
    with pytest.raises(UserError) as caught:
        CONVERT(official, Request())
    assert f"missing: {missing or removed}" in str(caught.value)
    if "bias_table" not in removed:
        assert f"left over: {removed}_renamed" in str(caught.value)


def test_a_wrong_shape_is_listed(states: dict[str, dict[str, Tensor]]) -> None:
    official = to_official(states["resnet"])
    name = "sem_seg_head.pixel_decoder.layer_1.weight"
    official[name] = official[name][:, :, :1, :1]
    with pytest.raises(UserError, match=r"output\.weight: \(32, 32, 1, 1\) instead of"):
        CONVERT(official, Request())


def test_an_impossible_size_is_refused(states: dict[str, dict[str, Tensor]]) -> None:
    official = to_official(states["resnet"])
    name = "sem_seg_head.pixel_decoder.transformer.encoder.layers.0.self_attn.attention_weights"
    official[f"{name}.bias"] = torch.zeros(3 * 4 * 5)
    with pytest.raises(UserError, match="no model has its sizes"):
        CONVERT(official, Request())


def test_another_decoder_is_not_exported(states: dict[str, dict[str, Tensor]]) -> None:
    state = {**states["resnet"], "transformer.decoder.extra.weight": torch.zeros(1)}
    with pytest.raises(UserError, match="not a published Mask2Former"):
        to_official(state)
    with pytest.raises(UserError, match=r"MODEL\.DETR\.NHEADS is 4 for the"):
        check_config(states["resnet"], tiny_config("resnet", MODEL__DETR__NHEADS=8))
    check_official_input(tiny_config("resnet", INPUT__FORMAT="BGR"))


# Class rows.


def with_classes(state: dict[str, Tensor], num_classes: int) -> dict[str, Tensor]:
    official = to_official(state)
    official["sem_seg_head.predictor.class_embed.weight"] = torch.randn(num_classes + 1, 32)
    official["sem_seg_head.predictor.class_embed.bias"] = torch.arange(num_classes + 1.0)
    return official


@pytest.mark.parametrize(
    ("name", "num_classes", "things"),
    [("coco_panoptic", 133, 80), ("ade20k_panoptic", 150, 100), ("cityscapes_panoptic", 19, 8)],
)
def test_rows_are_in_contiguous_order(
    states: dict[str, dict[str, Tensor]], name: str, num_classes: int, things: int
) -> None:
    table = load_script("tools/convert_checkpoint.py").load_classes(name)
    assert (table.num_classes, sum(table.is_thing)) == (num_classes, things)
    converted = CONVERT(with_classes(states["resnet"], num_classes), Request(table))
    bias = converted.model["box_head.class_embed.bias"]
    assert torch.equal(bias, torch.arange(num_classes + 1.0))


def test_rows_are_never_indexed_by_ids(states: dict[str, dict[str, Tensor]]) -> None:
    # The ids 1 to 90 of COCO detection exist as rows, which belong to other classes.
    table = load_script("tools/convert_checkpoint.py").load_classes("coco_detection")
    with pytest.raises(UserError, match=r"133 class rows in contiguous order.* 80 classes"):
        CONVERT(with_classes(states["resnet"], 133), Request(table))
    shuffled = ClassTable(("a", "b"), (True, False), ((0, 0, 0), (1, 1, 1)), (1, 0))
    converted = CONVERT(with_classes(states["resnet"], 2), Request(shuffled))
    assert converted.model["box_head.class_embed.bias"].tolist() == [0.0, 1.0, 2.0]
