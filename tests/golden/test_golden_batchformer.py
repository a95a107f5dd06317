"""BatchFormerV2 in DETR with masks, two streams: the recorded numbers of the public fork."""

import re

import pytest
import torch

from helpers.golden_compare import OUTPUTS
from helpers.golden_models import (
    assert_evaluates_as_plain,
    assert_masks,
    assert_near,
    assert_training_step,
    features_of,
    load_golden,
    our_name,
    panoptic_model,
    sizes_of,
    two_stream_model,
)

RECORDED = load_golden("detr_batchformer_two_stream.pt")
BASE = load_golden(RECORDED["base_file"])  # weights, inputs and targets are those of this file
GOLDEN = BASE | {"config": BASE["config"] | RECORDED["config"]}
VARIANTS = RECORDED["variants"]
each_variant = pytest.mark.parametrize("name", VARIANTS)

METRICS = ("class_error", "cardinality_error")


def make_model(name):
    return two_stream_model(BASE, RECORDED, name)


def trace_blocks(model):
    """What goes through the blocks, call after call, once the model has run."""
    hook = model.transformer.encoder.batchformer
    calls = []
    for block in hook.blocks.values():
        block.register_forward_hook(lambda _, inputs, output: calls.append((inputs[0], output)))
    return calls


@each_variant
def test_training_step(name, device):
    variant, model = VARIANTS[name], make_model(name).to(device)
    assert_training_step(model, GOLDEN, BASE["targets"], variant, metrics=METRICS)


@each_variant
def test_masks_of_both_streams(name):
    variant, model = VARIANTS[name], make_model(name)
    predictions = model.predict(features_of(GOLDEN), *sizes_of(GOLDEN))
    # The original stream is the plain model's.
    masks = [BASE["outputs"]["pred_masks"], variant["outputs"]["pred_masks_second_half"]]
    assert_masks(model, GOLDEN, predictions, torch.cat(masks))

    logits = predictions.streams.split(predictions.logits[-1])
    assert_near(logits[0], BASE["outputs"]["pred_logits"], OUTPUTS, "pred_logits as the plain ones")
    assert variant["second_half_differs_max_abs"] > 100 * OUTPUTS  # the streams are not alike


@each_variant
def test_tokens_before_and_after_each_block(name):
    recorded, model = VARIANTS[name]["intermediates"], make_model(name)
    calls = trace_blocks(model)
    model.predict(features_of(GOLDEN), *sizes_of(GOLDEN))
    layers = model.transformer.encoder.batchformer.insert_layers
    assert layers == tuple(sorted(int(k) for k in re.findall(r"bf(\d+)_in", " ".join(recorded))))
    assert len(calls) == len(layers)
    for layer, (tokens, output) in zip(layers, calls, strict=True):
        assert_near(tokens, recorded[f"bf{layer}_in"], OUTPUTS, f"bf{layer}_in")
        assert_near(output, recorded[f"bf{layer}_out"], OUTPUTS, f"bf{layer}_out")


@each_variant
def test_evaluation_is_plain_detr(name):
    variant = VARIANTS[name]
    predictions = assert_evaluates_as_plain(make_model(name), panoptic_model(BASE), GOLDEN)
    assert predictions.logits.shape[1] == variant["eval_batch"]
    assert_near(predictions.logits[-1], variant["eval_pred_logits"], OUTPUTS, "eval_pred_logits")
    assert_near(predictions.boxes[-1], variant["eval_pred_boxes"], OUTPUTS, "eval_pred_boxes")


@each_variant
def test_parameters_of_the_blocks(name):
    ours = {n for n, _ in make_model(name).named_parameters() if "batchformer" in n}
    assert ours == {our_name(n) for n in VARIANTS[name]["named_parameters_bf"]}


def test_both_published_names_of_a_block_are_known():
    """The fork registers its blocks twice; ``bf_state_dict_key_alias`` says so."""
    names = RECORDED["official_bf_keys_in_state_dict"]
    ours = {our_name(name) for name in names}
    assert ours <= {our_name(name) for name in RECORDED["bf_state_dict"]}
