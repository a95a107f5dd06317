"""Conversion of the public Conditional-DETR and SMCA, and what is refused."""

import argparse
import re

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.data.datasets.builtin_meta import COCO_CATEGORIES
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_model

from batchformer_panoptic import add_batchformer_panoptic_config
from batchformer_panoptic.checkpoint.conversion import SOURCES, Request
from batchformer_panoptic.checkpoint.conversion.detr import open_questions, settings_of_args
from batchformer_panoptic.data.class_table import ClassTable
from batchformer_panoptic.errors import UserError
from batchformer_panoptic.modeling.transformer import build_transformer
from helpers.conversion_models import DYNAMIC_SCALE_OF_FLAG, R50_DEPTHS, official_backbone
from helpers.golden_files import load_golden

FILES = {
    "conditional": load_golden("conditional_detr.pt"),
    "smca": load_golden("smca_detr.pt"),
    "smca_multiscale": load_golden("smca_multiscale_detr.pt"),
}
CASES = [(name, variant) for name, golden in FILES.items() for variant in golden["variants"]]
each_case = pytest.mark.parametrize(("name", "variant"), CASES)
each_name = pytest.mark.parametrize("name", FILES)
DETECTION = ClassTable.from_categories([c for c in COCO_CATEGORIES if c["isthing"]])


def channels_of(name):
    """Of res2 to res5; a bottleneck needs multiples of 4."""
    return tuple(FILES[name]["config"]["channels"].get(f"res{i}", 4 * i) for i in range(2, 6))


def official(name, variant=None):
    """Recorded weights behind a random backbone."""
    variants = FILES[name]["variants"]
    state = variants[variant or next(iter(variants))]["state_dict"]
    return {
        **official_backbone(widths=channels_of(name), depths=R50_DEPTHS),
        **{key: value.float() for key, value in state.items()},
    }


def convert(name, state, classes=None):
    return SOURCES[f"{name.split('_')[0]}_detr"].convert(state, Request(classes))


def config_with(settings):
    cfg = get_cfg()
    add_batchformer_panoptic_config(cfg)
    cfg.MODEL.DEVICE = "cpu"
    cfg.merge_from_list([part for pair in settings.items() for part in pair])
    return cfg


@each_case
def test_settings_build_the_transformer_that_the_weights_fit(name, variant):
    config, args = FILES[name]["config"], FILES[name]["variants"][variant]["args"]
    state = official(name, variant)
    converted = convert(name, state)
    assert not converted.dropped
    assert converted.settings["MODEL.DETR.SCORING"] == "focal"
    cfg = config_with(converted.settings)
    assert name == cfg.MODEL.DETR.TRANSFORMER_NAME
    assert config["num_queries"] == cfg.MODEL.DETR.NUM_OBJECT_QUERIES
    if name != "conditional":
        assert config["nheads"] == cfg.MODEL.DETR.NHEADS
        assert DYNAMIC_SCALE_OF_FLAG[args["dynamic_scale"]] == cfg.MODEL.SMCA.DYNAMIC_SCALE
    shapes = {
        f"res{i}": ShapeSpec(channels=c, stride=2**i)
        for i, c in enumerate(channels_of(name), start=2)
    }
    prefix = "transformer."
    build_transformer(cfg, shapes).load_state_dict(
        {k.removeprefix(prefix): v for k, v in converted.model.items() if k.startswith(prefix)}
    )
    # One number for each tensor: nothing is lost or made up. SMCA has one class row too many.
    unused = state["class_embed.weight"][-1:] if name != "conditional" else torch.zeros(0)
    ours = sum(value.numel() for value in converted.model.values())
    rest = unused.numel() + len(unused)
    assert ours + rest == sum(value.numel() for value in state.values())


def test_what_smca_divides_by_comes_from_its_command_line_or_is_asked_for():
    known = convert("smca", official("smca")).settings
    assert "MODEL.SMCA.SMOOTH" not in known  # not determined by the weights
    assert any("MODEL.SMCA.SMOOTH" in line for line in open_questions(known))
    settings = settings_of_args(argparse.Namespace(smooth=4))
    assert settings == {"MODEL.SMCA.SMOOTH": 4.0}
    assert not any("SMOOTH" in line for line in open_questions({**known, **settings}))
    conditional = convert("conditional", official("conditional")).settings
    assert not any("SMOOTH" in line for line in open_questions(conditional))


def test_a_whole_model_of_several_scales_loads():
    converted = convert("smca_multiscale", official("smca_multiscale"))
    cfg = config_with(converted.settings)
    cfg.MODEL.META_ARCHITECTURE = "PanopticDETR"
    cfg.MODEL.BACKBONE.NAME = "build_resnet_backbone"
    cfg.MODEL.RESNETS.OUT_FEATURES = ["res2", "res3", "res4", "res5"]
    cfg.MODEL.DETR.NUM_CLASSES = converted.model["box_head.class_embed.bias"].numel()
    build_model(cfg).load_state_dict(converted.model)


@pytest.mark.parametrize(("name", "rows"), [("conditional", 91), ("smca", 92)])
def test_class_rows_of_coco_become_contiguous(name, rows):
    state, width = official(name), FILES[name]["config"]["d_model"]
    state["class_embed.bias"] = torch.arange(float(rows))
    state["class_embed.weight"] = torch.arange(float(rows))[:, None].expand(-1, width)
    converted = convert(name, state, DETECTION)
    expected = torch.tensor(DETECTION.dataset_ids, dtype=torch.float32)
    assert torch.equal(converted.model["box_head.class_embed.bias"], expected)
    assert torch.equal(converted.model["box_head.class_embed.weight"][:, 0], expected)
    notes = " ".join(converted.notes)
    assert "80 of 91 class rows are kept" in notes
    assert "sigmoid" in notes
    everything = convert(name, state)
    assert torch.equal(everything.model["box_head.class_embed.bias"], torch.arange(91.0))
    assert "NUM_CLASSES 91" in " ".join(everything.notes)


@each_name
@pytest.mark.parametrize(
    "lost",
    [
        "query_embed.weight",
        "class_embed.weight",
        "transformer.encoder.layers.0.linear1.weight",
        "transformer.decoder.layers.1.norm3.bias",
        "backbone.0.body.layer3.0.conv2.weight",
    ],
)
def test_a_missing_key_is_named(name, lost):
    state = official(name)
    ours = {"query_embed.weight": "query_embed", "class_embed.weight": "class_embed"}
    del state[lost]
    last = ours.get(lost, lost.split(".", 3)[-1].replace("layer3.", ""))
    with pytest.raises(UserError, match=rf"missing: \S*{re.escape(last)}"):
        convert(name, state)


@each_name
def test_left_over_and_wrong_keys_are_named(name):
    state = official(name)
    state["transformer.bf.0.linear1.weight"] = torch.zeros(2, 2)
    state["something.else"] = torch.zeros(1)
    state["query_embed.weight"] = torch.zeros(3, FILES[name]["config"]["d_model"])
    state["bbox_embed.layers.2.bias"] = torch.zeros(5)
    with pytest.raises(UserError) as error:
        convert(name, state)
    text = str(error.value)
    for line in (
        "left over: something.else",
        "left over: transformer.bf.0.linear1.weight",
        "of another shape: box_head.bbox_embed.layers.2.bias: (5,) instead of (4,)",
    ):
        assert line in text


def test_sizes_that_no_model_has_are_refused():
    state = official("conditional")
    state["query_embed.weight"] = torch.zeros(3, 30)
    with pytest.raises(UserError, match=r"no model has its sizes \(.*HIDDEN_DIM 30"):
        convert("conditional", state)


def test_weights_of_another_model_are_refused():
    with pytest.raises(UserError, match=r"missing: transformer\.decoder\.center_head"):
        convert("smca", official("conditional"))
    with pytest.raises(UserError, match=r"left over: transformer\.decoder\.layers\.0\.norm4"):
        convert("conditional", official("smca"))
