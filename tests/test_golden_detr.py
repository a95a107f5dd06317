"""DETR with masks and its BatchFormerV2 fork: the recorded numbers of the public code."""

import pytest
import torch
from golden_models import (
    features_of,
    image_targets,
    load_golden,
    loss_weights,
    our_name,
    panoptic_model,
    rename,
    sizes_of,
)

from batchformer_panoptic.modeling.padding import padding_mask

OUTPUTS = {"atol": 1e-4, "rtol": 0.0}
LOSSES = 1e-5
GRADIENTS = 1e-4  # of the tensor's largest value

PLAIN = load_golden("detr_panoptic.pt")
TWO_STREAMS = load_golden("detr_batchformer_two_stream.pt")
CASES = {"plain": (None, PLAIN)} | {
    name: (variant["insert_idx"], variant) for name, variant in TWO_STREAMS["variants"].items()
}
each_case = pytest.mark.parametrize(("insert_layers", "recorded"), CASES.values(), ids=CASES)


def make_model(insert_layers):
    model = panoptic_model(PLAIN, insert_layers)
    state = rename(PLAIN["state_dict"])
    if insert_layers is not None:
        kept = tuple(f"detr.transformer.bf.{i}." for i in insert_layers)
        blocks = TWO_STREAMS["bf_state_dict"]
        state |= rename({k: v for k, v in blocks.items() if k.startswith(kept)})
    model.load_state_dict(state)
    return model


def predict(model):
    return model.predict(features_of(PLAIN), *sizes_of(PLAIN))


def all_masks(model, predictions):
    entries, queries = predictions.logits.shape[1:3]
    image = torch.arange(entries).repeat_interleave(queries)
    query = torch.arange(queries).repeat(entries)
    masks = model.predict_masks(predictions, features_of(PLAIN), image, query)
    return masks.unflatten(0, (entries, queries))


@each_case
def test_forward(insert_layers, recorded):
    model = make_model(insert_layers).train()
    predictions = predict(model)
    outputs = recorded["outputs"]
    layers = [*outputs["aux_outputs"], outputs]
    for key, ours in (("pred_logits", predictions.logits), ("pred_boxes", predictions.boxes)):
        torch.testing.assert_close(ours, torch.stack([x[key] for x in layers]), **OUTPUTS)
    masks = all_masks(model, predictions)
    num_images = len(sizes_of(PLAIN)[0])
    torch.testing.assert_close(masks[:num_images], PLAIN["outputs"]["pred_masks"], **OUTPUTS)
    if insert_layers is not None:
        second = outputs["pred_masks_second_half"]
        torch.testing.assert_close(masks[num_images:], second, **OUTPUTS)


@each_case
def test_matching(insert_layers, recorded):
    model = make_model(insert_layers).train()
    predictions = predict(model)
    targets = predictions.streams.expand_list(image_targets(PLAIN["targets"]))
    matching = model.matcher(predictions.logits, predictions.boxes, targets)
    layers = [*recorded["indices"]["aux"], recorded["indices"]["final"]]
    for layer, images in enumerate(layers):
        for image, (queries, objects) in enumerate(images):
            here = (matching.layer == layer) & (matching.image == image)
            assert torch.equal(matching.query[here], queries)
            assert torch.equal(matching.local_target[here], objects)


@each_case
def test_losses_and_gradients(insert_layers, recorded):
    model = make_model(insert_layers).train()
    losses = model.losses(predict(model), features_of(PLAIN), image_targets(PLAIN["targets"]))
    weights = loss_weights(PLAIN)
    compared = 0
    for name, value in recorded["losses"].items():
        parts = [loss for key, loss in losses.items() if key.split("/")[0] == name]
        if parts:
            ours = sum(parts).item() / weights[name.split("_")[1]]
            assert ours == pytest.approx(value, rel=LOSSES), name
            compared += len(parts)
    assert compared == len(losses)
    assert model.training_metrics["class_error"] == pytest.approx(recorded["losses"]["class_error"])
    assert model.training_metrics["cardinality_error"] == pytest.approx(
        recorded["losses"]["cardinality_error"]
    )
    total = torch.stack(list(losses.values())).sum()
    assert total.item() == pytest.approx(recorded["weighted_total"], rel=LOSSES)
    total.backward()
    parameters = dict(model.named_parameters())
    for name, gradient in recorded["grads"].items():
        scale = gradient.abs().max().item()
        ours = parameters[our_name(name)].grad
        torch.testing.assert_close(ours, gradient, atol=GRADIENTS * scale, rtol=0.0)
    norm = torch.stack([p.grad.norm() for p in parameters.values()]).norm()
    assert norm.item() == pytest.approx(recorded["grad_total_norm"], rel=1e-4)


@pytest.mark.parametrize("name", PLAIN["extra_targets"])
def test_losses_with_images_without_objects(name):
    recorded = PLAIN["extra_targets"][name]
    model = make_model(None).train()
    losses = model.losses(predict(model), features_of(PLAIN), image_targets(recorded["targets"]))
    total = torch.stack(list(losses.values())).sum()
    assert total.item() == pytest.approx(recorded["weighted_total"], rel=LOSSES)
    total.backward()
    norm = torch.stack([p.grad.norm() for p in model.parameters()]).norm()
    assert norm.item() == pytest.approx(recorded["grad_total_norm"], rel=1e-4)


@pytest.mark.parametrize("name", TWO_STREAMS["variants"])
def test_evaluation_with_the_block_is_plain_detr(name):
    variant = TWO_STREAMS["variants"][name]
    predictions = predict(make_model(variant["insert_idx"]).eval())
    plain = predict(make_model(None).eval())
    assert torch.equal(predictions.logits, plain.logits)
    assert torch.equal(predictions.boxes, plain.boxes)
    torch.testing.assert_close(predictions.logits[-1], variant["eval_pred_logits"], **OUTPUTS)
    torch.testing.assert_close(predictions.boxes[-1], variant["eval_pred_boxes"], **OUTPUTS)


def test_masks_and_positions():
    sizes, padded = sizes_of(PLAIN)
    for name, mask in PLAIN["inputs"]["masks"].items():
        ours = padding_mask(sizes, padded, tuple(mask.shape[-2:]), torch.device("cpu"))
        assert torch.equal(ours, mask), name
    encoding = make_model(None).transformer.position_encoding
    for name, pos in PLAIN["inputs"]["pos"].items():
        ours = encoding(PLAIN["inputs"]["masks"][name]).permute(0, 3, 1, 2)
        torch.testing.assert_close(ours, pos, atol=1e-5, rtol=0.0)


def test_frozen_stage_trains_what_the_official_code_trains():
    model = make_model(None)
    model.freeze_detr = True
    model._freeze_all_but_mask_head()
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {our_name(name) for name in PLAIN["trainable_when_frozen"]}


def test_the_recorded_streams_would_notice_a_swap():
    """Sensitivity: the other order of streams, and attention over tokens, are far off."""
    recorded = TWO_STREAMS["variants"]["insert_0"]
    model = make_model(recorded["insert_idx"]).train()
    first, second = predict(model).streams.split(predict(model).logits[-1])
    assert (torch.cat([second, first]) - recorded["outputs"]["pred_logits"]).abs().max() > 0.1
    block = model.transformer.encoder.batchformer.blocks["0"]
    tokens, out = recorded["intermediates"]["bf0_in"], recorded["intermediates"]["bf0_out"]
    torch.testing.assert_close(block(tokens), out, **OUTPUTS)
    assert (block(tokens.transpose(0, 1)).transpose(0, 1) - out).abs().max() > 0.1
