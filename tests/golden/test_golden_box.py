"""BatchFormerV2 in DETR for boxes, all ways to insert it: the recorded numbers of the fork."""

import pytest

from helpers.golden_models import (
    assert_evaluates_as_plain,
    assert_outputs,
    assert_padding_and_positions,
    assert_training_step,
    detr_model,
    insertion_of,
    load_golden,
    our_name,
    rename,
)

GOLDEN = load_golden("detr_box_batchformer_small.pt")
CONFIG = GOLDEN["config"]
VARIANTS = GOLDEN["variants"]
CASES = [
    (name, targets)
    for name, variant in VARIANTS.items()
    for targets in GOLDEN["targets"]
    if targets in variant
]
# Every variant is the plain model in evaluation; the file keeps these outputs once.
EVALUATION = next(v["eval_outputs"] for v in VARIANTS.values() if v["eval_outputs"] is not None)

METRICS = ("class_error", "cardinality_error")


def make_model(name):
    """The model of a variant; ``bf_layers_use`` in the file says which block goes where."""
    flags = {"bf": 0} if name is None else VARIANTS[name]["args"]
    if flags["bf"] == 1 and CONFIG["pre_norm"]:
        pytest.skip("published: one block behind the encoder's last norm; here: in front of it")
    insertion = insertion_of(CONFIG | flags)
    model = detr_model(CONFIG, insertion)
    state = dict(GOLDEN["state_dict"])
    if insertion is not None:
        places = {0: ""} if insertion.shared else {k: f"{k}." for k in insertion.layers}
        for layer, place in places.items():
            block = GOLDEN["bf_layers"][layer]
            state |= {f"transformer.bf.{place}{key}": value for key, value in block.items()}
    model.load_state_dict(rename(state))
    return model


@pytest.mark.parametrize(("name", "targets"), CASES)
def test_training_step(name, targets, device):
    recorded, model = VARIANTS[name][targets], make_model(name).to(device)
    assert_training_step(model, GOLDEN, GOLDEN["targets"][targets], recorded, metrics=METRICS)


@pytest.mark.parametrize("name", VARIANTS)
def test_evaluation_is_plain_detr(name):
    predictions = assert_evaluates_as_plain(make_model(name), make_model(None), GOLDEN)
    assert_outputs(predictions, EVALUATION, last_only=True)


@pytest.mark.parametrize("name", VARIANTS)
def test_parameters_of_the_blocks(name):
    ours = {n for n, _ in make_model(name).named_parameters() if "batchformer" in n}
    assert ours == {our_name(n) for n in VARIANTS[name]["bf_parameter_names"]}


def test_padding_masks_and_positions():
    assert_padding_and_positions(GOLDEN, make_model(None).transformer)
