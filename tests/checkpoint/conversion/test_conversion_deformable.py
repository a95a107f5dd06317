"""Conversion of the public Deformable-DETR, and what is refused."""

import re

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.data.datasets.builtin_meta import COCO_CATEGORIES
from detectron2.layers import ShapeSpec

from batchformer_panoptic import add_batchformer_panoptic_config
from batchformer_panoptic.checkpoint.conversion import SOURCES, Request
from batchformer_panoptic.data.class_table import ClassTable
from batchformer_panoptic.errors import UserError
from batchformer_panoptic.modeling.build import build_prediction_head, build_scoring_from_config
from batchformer_panoptic.modeling.transformer import build_transformer
from helpers.conversion_models import R50_DEPTHS, official_backbone
from helpers.golden_files import load_golden

GOLDEN = load_golden("deformable_detr.pt")
CONFIG, VARIANTS = GOLDEN["config"], GOLDEN["variants"]
each_variant = pytest.mark.parametrize("name", VARIANTS)
DETECTION = ClassTable.from_categories([c for c in COCO_CATEGORIES if c["isthing"]])
CHANNELS = {f"res{i}": CONFIG["channels"].get(f"res{i}", 4 * i) for i in range(2, 6)}


def official(name):
    """Recorded weights under all their names, behind a random backbone."""
    variant = VARIANTS[name]
    stored = {key: value.float() for key, value in variant["state_dict"].items()}
    aliases = {alias: stored[key] for alias, key in variant["state_dict_aliases"].items()}
    backbone = official_backbone(widths=tuple(CHANNELS.values()), depths=R50_DEPTHS)
    return {**backbone, **stored, **aliases}


def convert(state, classes=None):
    return SOURCES["deformable_detr"].convert(state, Request(classes))


def parts(name, converted):
    """Transformer and box head of the settings, without those unknown from the weights."""
    cfg = get_cfg()
    add_batchformer_panoptic_config(cfg)
    cfg.merge_from_list([part for pair in converted.settings.items() for part in pair])
    cfg.MODEL.DETR.NHEADS = CONFIG["nheads"]
    cfg.MODEL.DETR.NUM_OBJECT_QUERIES = CONFIG["num_queries"]
    cfg.MODEL.DEFORMABLE.ENC_POINTS = CONFIG["enc_n_points"]
    cfg.MODEL.DEFORMABLE.DEC_POINTS = CONFIG["dec_n_points"]
    cfg.MODEL.DETR.NUM_CLASSES = CONFIG["num_classes"]
    shapes = {name: ShapeSpec(channels=c, stride=1) for name, c in CHANNELS.items()}
    transformer = build_transformer(cfg, shapes)
    head = build_prediction_head(cfg, build_scoring_from_config(cfg), transformer)
    return cfg, {"transformer.": transformer, "box_head.": head}


@each_variant
def test_settings_build_the_model_that_the_weights_fit(name):
    args = VARIANTS[name]["args"]
    converted = convert(official(name))
    cfg, modules = parts(name, converted)
    assert args["with_box_refine"] == cfg.MODEL.DEFORMABLE.BOX_REFINE
    assert args["two_stage"] == cfg.MODEL.DEFORMABLE.TWO_STAGE
    assert list(CONFIG["channels"]) == cfg.MODEL.DEFORMABLE.IN_FEATURES
    assert converted.settings["MODEL.DETR.DEC_LAYERS"] == CONFIG["dec_layers"]
    assert converted.settings["MODEL.RESNETS.DEPTH"] == 50
    for prefix, module in modules.items():
        ours = {k: v for k, v in converted.model.items() if k.startswith(prefix)}
        module.load_state_dict({k.removeprefix(prefix): v for k, v in ours.items()})
    # One number for each stored tensor: nothing is lost or made up.
    stored = [*VARIANTS[name]["state_dict"].values()]
    backbone = [v for k, v in official(name).items() if k.startswith("backbone.")]
    assert sum(v.numel() for v in converted.model.values()) == sum(
        v.numel() for v in [*stored, *backbone]
    )
    dropped = dict(converted.dropped)
    assert set(dropped) == set(VARIANTS[name]["state_dict_aliases"])
    assert all("the same tensor as" in reason for reason in dropped.values())


@each_variant
def test_what_the_weights_do_not_tell_is_said(name):
    converted = convert(official(name))
    products = [CONFIG["nheads"] * CONFIG[f"{part}_n_points"] for part in ("enc", "dec")]
    published = products == [32, 32]
    assert published == ("MODEL.DETR.NHEADS" in converted.settings)
    notes = " ".join(converted.notes)
    if not published:
        assert f"must be {products[0]} for MODEL.DEFORMABLE.ENC_POINTS and {products[1]}" in notes
    two_stage = VARIANTS[name]["args"]["two_stage"]
    assert ("NUM_OBJECT_QUERIES; published: 300" in notes) == two_stage
    assert ("MODEL.DETR.NUM_OBJECT_QUERIES" in converted.settings) != two_stage


def test_published_heads_and_points_are_settings():
    state = official("plain")
    for key in list(state):
        if "attention_weights" in key or "sampling_offsets" in key:
            numbers = CONFIG["num_feature_levels"] * 32 * (2 if "offsets" in key else 1)
            state[key] = torch.zeros(numbers, *state[key].shape[1:])
    settings = convert(state).settings
    assert settings["MODEL.DETR.NHEADS"] == 8
    assert settings["MODEL.DEFORMABLE.ENC_POINTS"] == 4
    assert settings["MODEL.DEFORMABLE.DEC_POINTS"] == 4


@each_variant
def test_class_rows_of_coco_become_contiguous_but_for_row_0_of_the_proposals(name):
    state = official(name)
    for key in state:
        if "class_embed" in key:
            rows = torch.arange(91.0)
            width = CONFIG["d_model"]
            state[key] = rows[:, None].expand(-1, width) if key.endswith("weight") else rows
    converted = convert(state, DETECTION)
    expected = torch.tensor(DETECTION.dataset_ids, dtype=torch.float32)
    biases = {k: v for k, v in converted.model.items() if k.endswith("class_embed.bias")}
    args = VARIANTS[name]["args"]
    heads = CONFIG["dec_layers"] + args["two_stage"] if args["with_box_refine"] else 1
    assert len(biases) == heads
    for index, bias in enumerate(biases.values()):
        wanted = expected.clone()
        if args["two_stage"] and index == heads - 1:
            wanted[0] = 0.0
        assert torch.equal(bias, wanted)
    assert "80 of 91 class rows are kept" in " ".join(converted.notes)


@each_variant
def test_missing_left_over_and_wrong_keys_are_named(name):
    state = official(name)
    refines = VARIANTS[name]["args"]["with_box_refine"]
    del state["transformer.decoder.layers.1.norm3.bias"]
    del state["backbone.0.body.layer3.0.conv2.weight"]
    state["something.else"] = torch.zeros(1)
    state["transformer.bf.0.linear1.weight"] = torch.zeros(2, 2)
    state["transformer.enc_output.bias"] = torch.zeros(5)
    for prefix in ("", "transformer.decoder."):
        if f"{prefix}bbox_embed.1.layers.2.bias" in state:
            state[f"{prefix}bbox_embed.1.layers.2.bias"] = torch.zeros(5)
    with pytest.raises(UserError) as error:
        convert(state)
    lines = [
        "missing: transformer.decoder.layers.1.norm3.bias",
        "missing: backbone.res4.0.conv2.weight",
        "left over: something.else",
        "left over: transformer.bf.0.linear1.weight",
    ]
    if refines:
        lines.append("of another shape: box_head.layers.1.bbox_embed.layers.2.bias: (5,) instead")
    else:
        lines.append("left over: bbox_embed.1.layers.2.bias (differs from bbox_embed.0.layers.2")
    text = str(error.value)
    if VARIANTS[name]["args"]["two_stage"]:
        lines.append("of another shape: transformer.proposal_stage.enc_output.bias: (5,) instead")
    else:
        lines.append("left over: transformer.proposal_stage.enc_output.bias")
    for line in lines:
        assert line in text
    assert len(set(text.splitlines())) == len(text.splitlines())


@pytest.mark.parametrize(
    ("lost", "named"),
    [
        ("query_embed.weight", "transformer.query_embed.weight"),
        ("transformer.level_embed", "transformer.level_embed"),
        ("class_embed.0.weight", "box_head.class_embed.weight"),
        ("input_proj.1.0.weight", "transformer.projection.levels.1.0.weight"),
        ("transformer.reference_points.bias", "transformer.reference_points.bias"),
    ],
)
def test_a_missing_key_is_named(lost, named):
    state = official("plain")
    for key in [
        lost,
        *(k for k, v in VARIANTS["plain"]["state_dict_aliases"].items() if v == lost),
    ]:
        del state[key]
    with pytest.raises(UserError, match=rf"missing: {re.escape(named)}"):
        convert(state)


def test_heads_that_are_not_shared_are_refused_without_refinement():
    state = official("plain")
    state["class_embed.1.bias"] = state["class_embed.1.bias"] + 1
    with pytest.raises(UserError, match=r"class_embed\.1\.bias \(differs from class_embed\.0"):
        convert(state)


def test_weights_of_another_model_are_refused():
    detr = load_golden("detr_box_batchformer_small.pt")["state_dict"]
    with pytest.raises(UserError, match=r"missing: transformer\.level_embed"):
        convert({key: value.float() for key, value in detr.items()})


FORK = load_golden("deformable_detr_batchformer.pt")


def blocks_of(args):
    """The fork's block keys: one shared block once, separate ones under two names."""
    layers = [{k: v.float() for k, v in layer.items()} for layer in FORK["bf_layers"]]
    if args["share_bf"]:
        return {f"transformer.bf.{key}": value for key, value in layers[0].items()}
    return {
        f"{prefix}{index}.{key}": value
        for prefix in ("transformer.bf.", "transformer.encoder.bf.")
        for index in args["insert_idx"]
        for key, value in layers[index].items()
    }


@pytest.mark.parametrize("name", FORK["variants"])
def test_blocks_of_the_fork_are_kept(name):
    variant = FORK["variants"][name]
    state = {**official(variant["base_variant"]), **blocks_of(variant["args"])}
    converted = SOURCES["deformable_detr_batchformer"].convert(state, Request())
    shared = bool(variant["args"]["share_bf"])
    names = ["shared"] if shared else [str(i) for i in variant["args"]["insert_idx"]]
    for index, block in enumerate(names):
        for key, value in FORK["bf_layers"][0 if shared else int(block)].items():
            ours = converted.model[f"transformer.encoder.batchformer.blocks.{block}.{key}"]
            assert torch.equal(ours, value.float()), (index, key)
    plain = convert(official(variant["base_variant"]))
    rest = {k: v for k, v in converted.model.items() if ".batchformer." not in k}
    assert rest.keys() == plain.model.keys()
    assert any("MODEL.BATCHFORMER.ENABLED True" in note for note in converted.notes)


def test_blocks_must_be_there_and_whole():
    source = SOURCES["deformable_detr_batchformer"]
    state = official("plain" if "plain" in VARIANTS else next(iter(VARIANTS)))
    with pytest.raises(UserError, match="have no BatchFormer block"):
        source.convert(state, Request())
    blocks = blocks_of({"share_bf": 1})
    del blocks["transformer.bf.linear2.bias"]
    with pytest.raises(UserError, match=r"missing: .*shared\.linear2\.bias"):
        source.convert({**state, **blocks}, Request())
    with pytest.raises(UserError, match=r"left over: transformer\.bf\.linear1\.weight"):
        convert({**state, **blocks})
