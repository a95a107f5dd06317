"""Conversion of facebookresearch/detr, its BatchFormer fork and its Detectron2 wrapper."""

import argparse
from typing import Any

import pytest
import torch
import torchvision
from detectron2.config import get_cfg
from detectron2.layers import ShapeSpec
from detectron2.modeling.backbone import build_resnet_backbone
from torch import Tensor
from torchvision.ops import FrozenBatchNorm2d

from batchformer_panoptic.checkpoint.conversion import (
    SOURCES,
    Converted,
    Request,
    official_to_ours,
    ours_to_official,
)
from batchformer_panoptic.checkpoint.conversion.detr import open_questions, settings_of_args
from batchformer_panoptic.checkpoint.conversion.export import to_official
from batchformer_panoptic.checkpoint.conversion.layout import settings_of
from batchformer_panoptic.errors import UserError
from helpers.conversion_models import (
    R50_DEPTHS,
    WIDTHS,
    official_boxes,
    official_panoptic,
    our_model,
    randomise,
    recorded,
)

BLOCKS = "transformer.encoder.batchformer.blocks."


def convert(source: str, state: dict[str, Tensor], *, allow: tuple[str, ...] = ()) -> Converted:
    return SOURCES[source].convert(state, Request(None, allow))


def fork(*, shared: bool) -> dict[str, Tensor]:
    """A DETR of the fork as its state dict has it: separate blocks twice, a shared one once."""
    state = official_panoptic()
    for name, value in recorded("detr_batchformer_two_stream.pt", "bf_state_dict").items():
        if not shared:
            state[name] = value
            state[name.replace("transformer.bf.", "transformer.encoder.bf.")] = value
        elif ".bf.0." in name:
            state[name.replace(".bf.0.", ".bf.")] = value
    return state


def wrapped(official: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same weights as the Detectron2 wrapper saves them."""
    state = {}
    for name, value in official.items():
        head, found, tail = name.partition("backbone.0.body.")
        if found:
            ours = official_to_ours(found + tail)
            assert ours is not None
            name = f"{head}backbone.0.{ours}"
        state[f"detr.{name}"] = value
    return {**state, "criterion.empty_weight": torch.ones(8)}


@pytest.mark.parametrize(
    ("name", "opts"),
    [
        ("resnet18", ["MODEL.RESNETS.DEPTH", 18, "MODEL.RESNETS.RES2_OUT_CHANNELS", 64]),
        ("resnet50", ["MODEL.RESNETS.DEPTH", 50]),
    ],
)
def test_torchvision_resnets_become_detectron2s(name: str, opts: list[Any]) -> None:
    cfg = get_cfg()
    opts = [*opts, "MODEL.RESNETS.STRIDE_IN_1X1", False, "MODEL.RESNETS.OUT_FEATURES", ["res5"]]
    cfg.merge_from_list(opts)
    ours = build_resnet_backbone(cfg, ShapeSpec(channels=3)).eval()
    theirs = torchvision.models.get_model(name, norm_layer=FrozenBatchNorm2d).eval()
    theirs.fc, theirs.avgpool = torch.nn.Identity(), torch.nn.Identity()
    randomise(theirs)
    renamed = {
        str(official_to_ours(f"backbone.0.body.{key}")): value
        for key, value in theirs.state_dict().items()
    }
    ours.load_state_dict({k.removeprefix("backbone."): v for k, v in renamed.items()})
    images = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    with torch.no_grad():
        found, expected = ours.double()(images)["res5"], theirs.double()(images)
    torch.testing.assert_close(found.flatten(1), expected)


@pytest.mark.parametrize(
    "name",
    [
        "backbone.0.body.bn1.num_batches_tracked",
        "backbone.0.body.layer5.0.conv1.weight",
        "backbone.0.body.layer1.00.conv1.weight",
        "transformer.encoder.layers.0.self_attn.sampling_offsets.weight",
        "transformer.encoder.layers.0.norm3.weight",
        "mask_head.lay6.weight",
        "query_embed.bias",
        "class_embed.0.weight",
    ],
)
def test_unknown_official_names_have_none(name: str) -> None:
    assert official_to_ours(name) is None
    assert official_to_ours(f"detr.{name}") is None


@pytest.mark.parametrize("name", ["semantic_head.0.weight", "transformer.decoder.query_scale.x"])
def test_unknown_names_of_ours_have_none(name: str) -> None:
    assert ours_to_official(name) is None


@pytest.mark.parametrize(
    ("source", "state"),
    [
        ("detr", official_panoptic),
        ("detr", official_boxes),
        ("detr_batchformer", lambda: fork(shared=False)),
        ("detr_batchformer", lambda: fork(shared=True)),
    ],
    ids=["panoptic", "boxes", "separate blocks", "shared block"],
)
def test_round_trip(source: str, state: Any) -> None:
    official = state()
    back = to_official(convert(source, official).model)
    assert back.keys() == official.keys()
    for name, value in official.items():
        assert torch.equal(back[name], value), name


def test_blocks_are_kept_under_the_layer_they_follow() -> None:
    state = fork(shared=False)
    model = convert("detr_batchformer", state).model
    for layer in (0, 1):
        expected = state[f"detr.transformer.bf.{layer}.linear1.weight"]
        assert torch.equal(model[f"{BLOCKS}{layer}.linear1.weight"], expected)
    shared = fork(shared=True)
    model = convert("detr_batchformer", shared).model
    expected = shared["detr.transformer.bf.linear1.weight"]
    assert torch.equal(model[f"{BLOCKS}shared.linear1.weight"], expected)


@pytest.mark.parametrize(("shared", "hint"), [(False, "LAYERS [0, 1]"), (True, "SHARED True")])
def test_blocks_say_which_config_trains_on(shared: bool, hint: str) -> None:
    assert any(hint in note for note in convert("detr_batchformer", fork(shared=shared)).notes)


def test_the_second_copy_of_a_block_must_be_the_same() -> None:
    state = fork(shared=False)
    alias = "detr.transformer.encoder.bf.1.norm2.bias"
    assert alias in [key for key, _ in convert("detr_batchformer", state).dropped]
    state[alias] = state[alias] + 1
    with pytest.raises(UserError, match=rf"left over: {alias} \(differs from"):
        convert("detr_batchformer", state)


def test_a_plain_detr_is_no_fork_and_the_reverse() -> None:
    with pytest.raises(UserError, match="have no BatchFormer block"):
        convert("detr_batchformer", official_panoptic())
    with pytest.raises(UserError, match=r"left over: detr\.transformer\.bf\.0\.linear1\.weight"):
        convert("detr", fork(shared=False))


def test_settings_build_the_model() -> None:
    converted = convert("detr", official_panoptic(depths=R50_DEPTHS))
    model = our_model(converted.settings, converted.model)  # loads strictly
    assert model.mask_head is not None
    assert model.transformer.query_embed.num_embeddings == 12
    assert converted.settings["MODEL.DETR.NHEADS"] == 8
    assert converted.settings["MODEL.DETR.PRE_NORM"] is False


def test_what_the_weights_do_not_tell_is_asked() -> None:
    settings = convert("detr", official_boxes()).settings
    assert "MODEL.DETR.NHEADS" not in settings
    assert len(open_questions(settings)) == 2
    known = settings_of_args(argparse.Namespace(nheads=4, dilation=True, lr=1e-4))
    assert known["MODEL.DETR.NHEADS"] == 4
    assert known["MODEL.RESNETS.RES5_DILATION"] == 2
    assert open_questions({**settings, **known}) == []
    assert settings_of_args({"nheads": 4}) == {}


def test_pre_norm_shows() -> None:
    state = official_boxes()
    for part in ("weight", "bias"):
        state[f"transformer.encoder.norm.{part}"] = torch.ones(32)
    assert convert("detr", state).settings["MODEL.DETR.PRE_NORM"] is True


@pytest.mark.parametrize(
    "name",
    [
        "detr.backbone.0.body.conv1.weight",
        "detr.backbone.0.body.bn1.running_var",
        "detr.backbone.0.body.layer2.0.downsample.1.bias",
        "detr.backbone.0.body.layer4.0.bn3.weight",
        "detr.transformer.encoder.layers.0.self_attn.in_proj_bias",
        "detr.transformer.decoder.layers.1.norm3.weight",
        "detr.transformer.decoder.norm.bias",
        "detr.query_embed.weight",
        "detr.input_proj.bias",
        "detr.class_embed.weight",
        "detr.bbox_embed.layers.2.bias",
        "bbox_attention.k_linear.bias",
        "mask_head.gn5.weight",
        "mask_head.adapter3.weight",
        "mask_head.out_lay.bias",
    ],
)
def test_a_missing_and_a_renamed_key_are_listed(name: str) -> None:
    state = official_panoptic()
    value = state.pop(name)
    with pytest.raises(UserError, match=f"missing: {official_to_ours(name)}"):
        convert("detr", state)
    state[f"{name}_renamed"] = value
    with pytest.raises(UserError) as caught:
        convert("detr", state)
    assert f"left over: {name}_renamed" in str(caught.value)
    assert f"missing: {official_to_ours(name)}" in str(caught.value)


def test_a_missing_layer_in_the_middle_is_listed() -> None:
    state = official_panoptic()
    state = {k: v for k, v in state.items() if ".decoder.layers.1." not in k}
    with pytest.raises(UserError) as caught:
        convert("detr", state)
    assert "18 keys are missing" in str(caught.value)


def test_a_forged_layer_number_is_refused_soon() -> None:
    state = {
        **official_boxes(),
        "transformer.encoder.layers.99999999999.norm1.bias": torch.ones(32),
    }
    with pytest.raises(UserError, match="keys are missing"):
        convert("detr", state)


def test_all_leftovers_are_listed_and_may_be_allowed() -> None:
    extra = {"transformer.level_embed": torch.ones(2), "backbone.1.row_embed": torch.ones(3)}
    state = {**official_boxes(), **extra}
    with pytest.raises(UserError) as caught:
        convert("detr", state)
    assert all(f"left over: {name}" in str(caught.value) for name in extra)
    converted = convert("detr", state, allow=("*level_embed", "backbone.1.*"))
    assert {key for key, _ in converted.dropped} == set(extra)
    assert all("--allow" in reason for _, reason in converted.dropped)


def test_counts_of_batches_are_dropped_with_a_reason() -> None:
    name = "backbone.0.body.bn1.num_batches_tracked"
    converted = convert("detr", {**official_boxes(), name: torch.tensor(0)})
    assert [key for key, _ in converted.dropped] == [name]


def test_another_shape_is_listed() -> None:
    state = official_panoptic()
    state["mask_head.lay3.weight"] = torch.zeros(48, 64, 3, 3)
    with pytest.raises(UserError, match=r"of another shape: mask_head\.convs\.2\.weight: \(48,"):
        convert("detr", state)


@pytest.mark.parametrize("inner", [official_boxes, official_panoptic], ids=["boxes", "panoptic"])
def test_the_detectron2_wrapper_holds_the_same(inner: Any) -> None:
    official = inner()
    converted = convert("detr_detectron2", wrapped(official))
    expected = convert("detr", official)
    assert converted.model.keys() == expected.model.keys()
    for name, value in expected.model.items():
        assert torch.equal(converted.model[name], value), name
    assert [key for key, _ in converted.dropped] == ["criterion.empty_weight"]
    assert not any("copy of the first class" in note for note in converted.notes)


def test_the_wrappers_own_converter_leaves_a_trace() -> None:
    official = official_boxes()
    for name in ("class_embed.weight", "class_embed.bias"):
        official[name][-1] = official[name][0]
    notes = convert("detr_detectron2", wrapped(official)).notes
    assert any("copy of the first class" in note for note in notes)


def test_leftovers_of_the_wrapper_are_listed() -> None:
    state = wrapped(official_boxes())
    state["detr.backbone.0.backbone.res6.0.conv1.weight"] = torch.ones(1)
    state["pixel_mean"] = torch.ones(3)
    with pytest.raises(UserError, match=r"2 keys are left over") as error:
        convert("detr_detectron2", state)
    for key in ("detr.backbone.0.backbone.res6.0.conv1.weight", "pixel_mean"):
        assert f"left over: {key}" in str(error.value), "in the words of the file"


def test_what_may_be_left_over_is_named_in_the_words_of_the_file() -> None:
    state = wrapped(official_boxes())
    key = "detr.backbone.0.backbone.res6.0.conv1.weight"
    state[key] = torch.ones(1)
    request = Request(allowed_leftovers=("*.res6.*",))
    converted = SOURCES["detr_detectron2"].convert(state, request)
    assert (key, "--allow *.res6.*") in converted.dropped


def test_the_numbers_of_blocks_need_not_be_known() -> None:
    converted = convert("detr", official_boxes())
    assert "MODEL.RESNETS.DEPTH" not in converted.settings
    assert converted.settings["MODEL.RESNETS.RES2_OUT_CHANNELS"] == 8 != WIDTHS[0]
    assert any("no MODEL.RESNETS.DEPTH" in note for note in converted.notes)


@pytest.mark.parametrize(("groups", "width"), [(1, 8), (4, 2)])
def test_groups_of_a_resnet_are_read_off_its_weights(groups: int, width: int) -> None:
    cfg = get_cfg()
    sizes = {"NUM_GROUPS": groups, "WIDTH_PER_GROUP": width, "RES2_OUT_CHANNELS": 16}
    for key, value in sizes.items():
        cfg.MODEL.RESNETS[key] = value
    cfg.MODEL.RESNETS.OUT_FEATURES = ["res5"]
    state = build_resnet_backbone(cfg, ShapeSpec(channels=3)).state_dict()
    of_detr = {official_to_ours(name): value for name, value in official_boxes().items()}
    settings = settings_of({**of_detr, **{f"backbone.{k}": v for k, v in state.items()}})
    assert {key: settings[f"MODEL.RESNETS.{key}"] for key in sizes} == sizes
