"""Parts that run again in the backward pass give the same losses and gradients."""

import pytest
import torch
from tiny_model import random_inputs, tiny_model, total

PARTS = ["encoder", "decoder", "mask_head"]
SIZES = [(64, 64), (48, 64)]


def losses_gradients_and_calls(parts, name):
    model = tiny_model(
        MODEL__ACTIVATION_CHECKPOINTING=parts,
        MODEL__DETR__TRANSFORMER_NAME=name,
        MODEL__SMALL_RESNET__STAGE_STRIDES=[1, 2, 2, 2 if name == "smca_multiscale" else 1],
        MODEL__DETR__DROPOUT=0.2,
        MODEL__BATCHFORMER__ENABLED=True,
        MODEL__BATCHFORMER__DROPOUT=0.5,
    ).train()
    calls = dict.fromkeys(PARTS, 0)
    modules = {
        "encoder": model.transformer.encoder.layers[1],
        "decoder": model.transformer.decoder.layers[1],
        "mask_head": model.mask_head,
    }
    for part, module in modules.items():

        def count(*_, part=part):
            calls[part] += 1

        module.register_forward_pre_hook(count)
    torch.manual_seed(5)
    losses = model(random_inputs(SIZES))
    total(losses).backward()
    return losses, {n: p.grad for n, p in model.named_parameters()}, calls


@pytest.mark.parametrize("name", ["detr", "conditional", "smca", "smca_multiscale", "deformable"])
@pytest.mark.parametrize("parts", [["encoder"], ["decoder", "mask_head"]])
def test_losses_and_gradients_are_the_same(name, parts):
    losses, gradients, calls = losses_gradients_and_calls([], name)
    again, again_gradients, again_calls = losses_gradients_and_calls(parts, name)
    assert calls == dict.fromkeys(PARTS, 1)
    assert again_calls == {part: 2 if part in parts else 1 for part in PARTS}
    for key, value in losses.items():
        assert torch.equal(value, again[key]), key
    for key, value in gradients.items():
        torch.testing.assert_close(again_gradients[key], value, rtol=1e-5, atol=1e-7)


def test_evaluation_runs_every_part_once():
    model = tiny_model(MODEL__ACTIVATION_CHECKPOINTING=PARTS).eval()
    plain = tiny_model().eval()
    inputs = random_inputs(SIZES)
    for a, b in zip(model(inputs), plain(inputs), strict=True):
        assert torch.equal(a["panoptic_seg"][0], b["panoptic_seg"][0])
