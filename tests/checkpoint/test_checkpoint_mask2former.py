"""Mask2Former weights: other classes, other numbers of queries, other maps."""

from pathlib import Path

import pytest
import torch
from torch import nn

from batchformer_panoptic.checkpoint import PanopticCheckpointer, SettingsRecord
from batchformer_panoptic.errors import UserError
from helpers.small_checkpoint import load_weights
from helpers.tiny_model import MASK2FORMER, tiny_cfg, tiny_model

MAPS = "MODEL__MASK2FORMER__IN_FEATURES"


@pytest.fixture
def weights(tmp_path: Path) -> str:
    settings = SettingsRecord(tiny_cfg(**MASK2FORMER))
    PanopticCheckpointer(tiny_model(**MASK2FORMER), str(tmp_path), settings=settings).save("w")
    return str(tmp_path / "w.pth")


def other_values(model: nn.Module) -> nn.Module:
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    return model


def test_training_on_other_classes_starts_from_everything_but_the_class_layer(weights: str) -> None:
    source = tiny_model(**MASK2FORMER).state_dict()
    target = other_values(tiny_model(**MASK2FORMER, MODEL__DETR__NUM_CLASSES=7))
    with pytest.raises(UserError, match=r"trained on other classes: .*use --init-from"):
        load_weights(target, weights, training=True)
    PanopticCheckpointer(target, training=True).load_for_other_classes(weights)
    fresh = {
        name
        for name, value in target.state_dict().items()
        if value.shape != source[name].shape or not torch.equal(value, source[name])
    }
    assert fresh == {"box_head.class_embed.weight", "box_head.class_embed.bias"}


def test_another_number_of_queries_is_named(weights: str) -> None:
    target = tiny_model(**MASK2FORMER, MODEL__DETR__NUM_OBJECT_QUERIES=9)
    with pytest.raises(UserError, match=r"has 6 queries: set .*NUM_OBJECT_QUERIES 6"):
        load_weights(target, weights)


def test_other_maps_of_equal_channels_are_refused(weights: str) -> None:
    other = tiny_cfg(**MASK2FORMER, **{MAPS: ["res2", "res4", "res5"]})
    target = tiny_model(**MASK2FORMER)
    with pytest.raises(UserError, match=r"MASK2FORMER\.IN_FEATURES is \['res2', 'res3', 'res4'"):
        load_weights(target, weights, settings=SettingsRecord(other))
    # Other transformers do not read the key.
    load_weights(target, weights, settings=SettingsRecord(tiny_cfg(**{MAPS: ["res2"]})))


def test_training_starts_from_a_backbone(tmp_path: Path) -> None:
    model = tiny_model(**MASK2FORMER)
    backbone = {k: v for k, v in model.state_dict().items() if k.startswith("backbone.")}
    torch.save({"model": backbone}, tmp_path / "backbone.pth")
    load_weights(tiny_model(**MASK2FORMER), str(tmp_path / "backbone.pth"), training=True)
    with pytest.raises(UserError, match="keys missing"):
        load_weights(tiny_model(**MASK2FORMER), str(tmp_path / "backbone.pth"), training=False)


@pytest.mark.parametrize("training", [False, True])
def test_the_label_embedding_of_pilot_queries_may_be_absent_or_superfluous(
    tmp_path: Path, training: bool
) -> None:
    pilot = {"MODEL__MASK2FORMER__PILOT__ENABLED": True}
    for ours, theirs in ({}, pilot), (pilot, {}):
        source = other_values(tiny_model(**MASK2FORMER, **theirs))
        target = tiny_model(**MASK2FORMER, **ours)
        PanopticCheckpointer(source, str(tmp_path)).save("w")
        load_weights(target, str(tmp_path / "w.pth"), training=training)
        state = source.state_dict()
        for name, value in target.state_dict().items():
            assert "pilot" in name or torch.equal(value, state[name]), name


def test_other_classes_start_with_a_new_label_embedding(tmp_path: Path) -> None:
    pilot = {**MASK2FORMER, "MODEL__MASK2FORMER__PILOT__ENABLED": True}
    PanopticCheckpointer(tiny_model(**pilot), str(tmp_path)).save("w")
    target = tiny_model(**pilot, MODEL__DETR__NUM_CLASSES=7)
    before = target.transformer.pilot.label_embed.weight.clone()
    with pytest.raises(UserError, match=r"trained on other classes: .*use --init-from"):
        load_weights(target, str(tmp_path / "w.pth"), training=True)
    PanopticCheckpointer(target, training=True).load_for_other_classes(str(tmp_path / "w.pth"))
    assert torch.equal(target.transformer.pilot.label_embed.weight, before)
