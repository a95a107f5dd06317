"""Conditional-DETR: the recorded numbers of the public code."""

import pytest

from batchformer_panoptic.checkpoint.conversion.conditional_smca import official_conditional_to_ours
from helpers.golden_compare import OUTPUTS
from helpers.golden_models import (
    assert_near,
    assert_padding_and_positions,
    assert_training_step,
    conditional_model,
    load_golden,
)

GOLDEN = load_golden("conditional_detr.pt")
CONFIG = GOLDEN["config"]
VARIANTS = GOLDEN["variants"]
CASES = [
    (name, targets) for name, v in VARIANTS.items() for targets in GOLDEN["targets"] if targets in v
]


def name_in_model(official):
    name = official_conditional_to_ours(official)
    assert name is not None, f"no name of ours for {official}"
    return name


def make_model(name):
    model = conditional_model(CONFIG)
    state = VARIANTS[name]["state_dict"]
    model.load_state_dict({name_in_model(key): value.float() for key, value in state.items()})
    return model


@pytest.mark.parametrize(("name", "targets"), CASES)
def test_training_step(name, targets, device):
    recorded, model = VARIANTS[name][targets], make_model(name).to(device)
    objects = GOLDEN["targets"][targets]
    predictions = assert_training_step(model, GOLDEN, objects, recorded, name_in_model)
    if "outputs" in recorded:
        points = recorded["intermediates"]["reference_points"]
        for layer in predictions.transformer.reference_points.sigmoid():
            assert_near(layer, points, OUTPUTS, "reference_points")


def test_padding_masks_and_positions():
    assert_padding_and_positions(GOLDEN, make_model(next(iter(VARIANTS))).transformer)
