"""Activation checkpointing does not change losses and gradients, and needs support of a part."""

import copy
import itertools

import pytest
import torch

from batchformer_panoptic.errors import UserError
from helpers.tiny_model import MASK2FORMER, random_inputs, tiny_model, total

PARTS = ["backbone", "encoder", "decoder", "mask_head"]
SIZES = [(64, 64), (48, 64)]


def losses_gradients_and_calls(parts, name):
    overrides = {
        "MODEL__ACTIVATION_CHECKPOINTING": parts,
        "MODEL__SMALL_RESNET__NORM": "GN",
        "MODEL__SMALL_RESNET__STEM_CHANNELS": 32,
        "MODEL__SMALL_RESNET__STAGE_CHANNELS": [32, 64, 96, 128],
        "MODEL__DETR__TRANSFORMER_NAME": name,
        "MODEL__SMALL_RESNET__STAGE_STRIDES": [1, 2, 2, 2 if name == "smca_multiscale" else 1],
        "MODEL__DETR__DROPOUT": 0.2,
        "MODEL__BATCHFORMER__ENABLED": True,
        "MODEL__BATCHFORMER__DROPOUT": 0.5,
    }
    model = tiny_model(**overrides | (MASK2FORMER if name == "mask2former" else {})).train()
    calls = dict.fromkeys(PARTS, 0)
    modules = {
        "backbone": model.backbone.res3[0],
        "encoder": model.transformer.encoder.layers[1],
        "decoder": model.transformer.decoder.layers[1],
        "mask_head": getattr(model.mask_head, "attention", model.mask_head),
    }
    for part, module in modules.items():

        def count(*_, part=part):
            calls[part] += 1

        module.register_forward_pre_hook(count)
    torch.manual_seed(5)
    losses = model(random_inputs(SIZES))
    total(losses).backward()
    return losses, {n: p.grad for n, p in model.named_parameters()}, calls


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        *itertools.product(
            ["detr", "conditional", "smca", "smca_multiscale", "deformable"],
            [["backbone", "encoder"], ["decoder", "mask_head"]],
        ),
        ("mask2former", ["backbone", "encoder"]),
        ("mask2former", ["decoder"]),
    ],
)
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
    norm = {"MODEL__SMALL_RESNET__NORM": "FrozenBN"}
    model = tiny_model(MODEL__ACTIVATION_CHECKPOINTING=PARTS, **norm).eval()
    plain = tiny_model(**norm).eval()
    inputs = random_inputs(SIZES)
    for a, b in zip(model(inputs), plain(inputs), strict=True):
        assert torch.equal(a["panoptic_seg"][0], b["panoptic_seg"][0])


def test_checkpointed_stages_keep_their_names_and_can_be_copied():
    norm = {"MODEL__SMALL_RESNET__NORM": "FrozenBN"}
    model = tiny_model(MODEL__ACTIVATION_CHECKPOINTING=["backbone"], **norm)
    plain = tiny_model(**norm)
    assert list(model.state_dict()) == list(plain.state_dict())
    copied = copy.deepcopy(model)
    for one in (model, copied):
        assert all(
            one.backbone.get_submodule(name) is stage
            for name, stage in zip(one.backbone.stage_names, one.backbone.stages, strict=True)
        )


def test_norms_that_would_count_a_batch_twice_are_refused():
    with pytest.raises(UserError, match=r"res2 has and would update twice.*FrozenBN or GN"):
        tiny_model(MODEL__ACTIVATION_CHECKPOINTING=["backbone"], MODEL__SMALL_RESNET__NORM="BN")


def test_a_mask_head_without_parameters_is_refused():
    with pytest.raises(UserError, match=r"'mask_head', but query_mask_head .* nothing"):
        tiny_model(**MASK2FORMER, MODEL__ACTIVATION_CHECKPOINTING=["mask_head"])


def test_other_backbones_are_refused():
    with pytest.raises(UserError, match=r"for the ResNets of Detectron2.*not for TimmBackbone"):
        tiny_model(
            MODEL__ACTIVATION_CHECKPOINTING=["backbone"],
            MODEL__BACKBONE__NAME="build_timm_backbone",
            MODEL__TIMM__NAME="resnet10t",
            INPUT__FORMAT="RGB",
        )
