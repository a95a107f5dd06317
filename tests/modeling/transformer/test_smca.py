"""SMCA, of one scale and of several, in whole models: streams, batch invariants, settings."""

import math

import pytest
import torch
from torch import nn

from batchformer_panoptic.errors import UserError
from batchformer_panoptic.modeling.transformer import build_transformer
from batchformer_panoptic.modeling.transformer.smca import DYNAMIC_SCALES
from helpers.tiny_model import random_inputs, tiny_cfg, tiny_model, total

SIZES = [(48, 64), (64, 56), (40, 40)]
FOCAL = {"MODEL__DETR__SCORING": "focal"}
ONE_SCALE = FOCAL | {"MODEL__DETR__TRANSFORMER_NAME": "smca"}
# Levels of stride 8, 16, 32 and 64.
SCALES = FOCAL | {
    "MODEL__DETR__TRANSFORMER_NAME": "smca_multiscale",
    "MODEL__SMALL_RESNET__STAGE_STRIDES": [1, 2, 2, 2],
}
KINDS = {"smca": ONE_SCALE, "smca_multiscale": SCALES} | {
    f"smca_{name}": ONE_SCALE | {"MODEL__SMCA__DYNAMIC_SCALE": name}
    for name in DYNAMIC_SCALES
    if name != "per_axis"
}
BLOCK = {"MODEL__BATCHFORMER__ENABLED": True}
each_kind = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
each_name = pytest.mark.parametrize("kind", [ONE_SCALE, SCALES], ids=["smca", "smca_multiscale"])
each_task = pytest.mark.parametrize("mask_on", [False, True], ids=["boxes", "panoptic"])
each_block = pytest.mark.parametrize("block", [{}, BLOCK], ids=["plain", "batchformer"])


def random_model(kind, **overrides):
    """A model without initial values such as scales of one and biases of zero."""
    model = tiny_model(**kind, **overrides)
    with torch.no_grad():
        for name, parameter in model.transformer.named_parameters():
            if "prior" in name or "center_head" in name or "level_embed" in name:
                parameter.normal_(std=0.3)
    return model


def pair_of_models(kind, **overrides):
    """A model with the block, and the plain model with the same weights otherwise."""
    with_block, plain = random_model(kind | BLOCK, **overrides), tiny_model(**kind, **overrides)
    state = {k: v for k, v in with_block.state_dict().items() if "batchformer" not in k}
    plain.load_state_dict(state)
    return with_block, plain


def predictions(model):
    images = model.preprocess(random_inputs(SIZES))
    features = model.backbone(images.tensor)
    return model.predict(features, images.image_sizes, tuple(images.tensor.shape[-2:]))


def random_features(model, size):
    shapes = model.backbone.output_shape()
    return {
        name: torch.randn(
            1, s.channels, math.ceil(size[0] / s.stride), math.ceil(size[1] / s.stride)
        )
        for name, s in shapes.items()
    }


def pasted(features, model, padded):
    """Features at the origin of larger maps, with large values in the padding."""
    result = {name: 50 * x for name, x in random_features(model, padded).items()}
    for name, x in features.items():
        result[name][..., : x.shape[-2], : x.shape[-1]] = x
    return result


@each_kind
@each_block
@each_task
def test_a_training_step_reaches_every_parameter(kind, block, mask_on):
    model = tiny_model(**kind, **block, MODEL__MASK_ON=mask_on).train()
    losses = model(random_inputs(SIZES))
    assert ("loss_mask" in {name.split("/")[0] for name in losses}) == mask_on
    total(losses).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
    silent = {n for n, p in model.named_parameters() if p.grad.abs().amax() == 0}
    # The queries of the first self-attention have no content: its values are constant.
    still = ("decoder.layers.0.self_attn", "decoder.layers.0.norm1")
    assert all(any(part in name for part in still) for name in silent), silent


@each_name
@each_task
def test_evaluation_is_that_of_the_plain_model_bit_for_bit(kind, mask_on):
    with_block, plain = pair_of_models(kind, MODEL__MASK_ON=mask_on)
    a, b = predictions(with_block.eval()), predictions(plain.eval())
    assert torch.equal(a.logits, b.logits)
    assert torch.equal(a.boxes, b.boxes)
    for ours, theirs in zip(
        with_block(random_inputs(SIZES)), plain(random_inputs(SIZES)), strict=True
    ):
        assert torch.equal(ours["instances"].scores, theirs["instances"].scores)
        if mask_on:
            assert torch.equal(ours["panoptic_seg"][0], theirs["panoptic_seg"][0])


@each_name
@pytest.mark.parametrize("layers", [[0], [1], [0, 1]])
def test_the_original_stream_is_the_plain_model_in_training(kind, layers):
    with_block, plain = pair_of_models(kind, MODEL__BATCHFORMER__INSERT_LAYERS=layers)
    a, b = predictions(with_block.train()), predictions(plain.train())
    original, other = a.streams.split(a.logits[-1])
    torch.testing.assert_close(original, b.logits[-1])
    assert not torch.allclose(other, b.logits[-1], atol=1e-3)


@each_kind
@pytest.mark.parametrize("pad_in_test", [False, True])
def test_padding_changes_nothing_from_features_on(kind, pad_in_test):
    model = random_model(kind, MODEL__DETR__PAD_IN_TEST=pad_in_test).eval()
    features = random_features(model, (64, 64))
    single = model.predict(features, [(64, 64)], (64, 64))
    batched = model.predict(pasted(features, model, (128, 192)), [(64, 64)], (128, 192))
    torch.testing.assert_close(single.logits, batched.logits, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(single.boxes, batched.boxes, rtol=1e-4, atol=1e-5)
    valid = batched.transformer.memory_map[
        ..., : 64 // model_stride(model), : 64 // model_stride(model)
    ]
    torch.testing.assert_close(single.transformer.memory_map, valid, rtol=1e-4, atol=1e-5)


def model_stride(model):
    return model.backbone.output_shape()[model.transformer.in_features[-1]].stride


def test_the_published_encoder_sees_the_padding():
    model = random_model(SCALES, MODEL__SMCA__SEE_PADDING=True).eval()
    features = random_features(model, (64, 64))
    single = model.predict(features, [(64, 64)], (64, 64))
    batched = model.predict(pasted(features, model, (128, 192)), [(64, 64)], (128, 192))
    assert (single.logits - batched.logits).abs().max() > 0.01


@each_name
@pytest.mark.parametrize("pad_in_test", [False, True])
def test_results_do_not_depend_on_batch_mates(kind, pad_in_test):
    """Images of one size, so that the backbone reads no padding at their borders."""
    model = random_model(kind, MODEL__DETR__PAD_IN_TEST=pad_in_test).eval()
    inputs = random_inputs([(64, 64)] * 3 if pad_in_test else [(48, 64), (64, 56), (48, 64)])
    single = [model([x])[0]["instances"] for x in inputs]
    for order in ([0, 1, 2], [2, 0, 1]):
        together = model([inputs[i] for i in order])
        for i, result in zip(order, together, strict=True):
            ours = result["instances"]
            torch.testing.assert_close(ours.scores, single[i].scores, rtol=1e-4, atol=1e-8)
            boxes = ours.pred_boxes.tensor
            torch.testing.assert_close(boxes, single[i].pred_boxes.tensor, rtol=1e-5, atol=1e-4)


@each_name
def test_permuting_images_permutes_predictions(kind):
    model = random_model(kind).eval()
    features = {
        n: torch.cat([x, x.flip(-1), -x]) for n, x in random_features(model, (64, 64)).items()
    }
    sizes, order = [(64, 64), (32, 64), (64, 40)], [2, 0, 1]
    straight = model.predict(features, sizes, (64, 64))
    shuffled = model.predict(
        {n: x[order] for n, x in features.items()}, [sizes[i] for i in order], (64, 64)
    )
    torch.testing.assert_close(shuffled.logits, straight.logits[:, order])
    torch.testing.assert_close(shuffled.boxes, straight.boxes[:, order])


@each_name
def test_reference_points_are_the_centres_of_all_layers(kind):
    model = random_model(kind | BLOCK).train()
    out = predictions(model).transformer
    num_layers, entries, queries, _ = out.hidden_states.shape
    assert out.reference_points.shape == (num_layers, entries, queries, 2)
    assert torch.equal(out.reference_points[0], out.reference_points[-1])
    assert out.projected_map.shape[0] * 2 == out.memory_map.shape[0] == entries
    assert out.projected_map.shape[1:] == out.memory_map.shape[1:]
    assert out.padding_mask.shape[1:] == out.memory_map.shape[2:]


def test_a_gaussian_draws_attention_to_its_centre():
    """With a narrow Gaussian, the prediction of a query depends only on the cell at its centre."""
    model = random_model(
        ONE_SCALE, MODEL__SMCA__SMOOTH=1e-3, MODEL__SMCA__DYNAMIC_SCALE="fixed"
    ).eval()
    for layer in model.transformer.decoder.layers:
        nn.init.zeros_(layer.prior.offset_head.weight)
        nn.init.zeros_(layer.prior.offset_head.bias)
    memory = torch.randn(1, 16, 32)
    grid_of = []
    model.transformer.decoder.register_forward_hook(lambda m, args, out: grid_of.append(args))
    model.predict(random_features(model, (64, 64)), [(64, 64)], (64, 64))
    query_pos, _, pos, mask, grid = grid_of[0]
    assert grid.map_sizes == [(4, 4)]
    memory.requires_grad_()
    states, references = model.transformer.decoder(query_pos, memory, pos, mask, grid)
    cell = (references[0, 0].sigmoid() * 64 / model_stride(model)).round().clamp(max=3).long()
    for query, (x, y) in enumerate(cell.tolist()):
        (gradient,) = torch.autograd.grad(
            states[0, 0, query].sum() + states[0, 0, query, 0], memory, retain_graph=True
        )
        seen = gradient.abs().sum(-1)[0].view(4, 4)
        assert seen[y, x] > 0.99 * seen.sum()


def test_training_starts_with_gaussians_of_unit_scale():
    for kind in (ONE_SCALE, SCALES):
        for layer in tiny_model(**kind).transformer.decoder.layers:
            assert torch.equal(
                layer.prior.scale_head.weight, torch.zeros_like(layer.prior.scale_head.weight)
            )
            assert torch.equal(
                layer.prior.scale_head.bias, torch.ones_like(layer.prior.scale_head.bias)
            )


@pytest.mark.parametrize(("name", "stride"), [("res3", 8), ("res4", 16), ("res5", 32)])
def test_masks_are_read_from_the_chosen_map(name, stride):
    model = random_model(SCALES, MODEL__DETR__IN_FEATURE=name).eval()
    output = predictions(model).transformer
    for feature_map in (output.projected_map, output.memory_map, output.padding_mask):
        assert feature_map.shape[-2:] == (64 // stride, 64 // stride)


@pytest.mark.parametrize(
    ("kind", "overrides", "message"),
    [
        (ONE_SCALE, {"MODEL__SMCA__DYNAMIC_SCALE": "type3"}, "'type3'; known: fixed, isotropic"),
        (ONE_SCALE, {"MODEL__DETR__PRE_NORM": True}, "the transformer 'smca' is post-norm"),
        (SCALES, {"MODEL__DETR__PRE_NORM": True}, "'smca_multiscale' is post-norm"),
        (ONE_SCALE, {"MODEL__SMCA__SMOOTH": 0.0}, "SMOOTH is 0.0; it must be positive"),
        (
            ONE_SCALE,
            {"MODEL__DETR__IN_FEATURE": "res6"},
            r"IN_FEATURE is 'res6', but the backbone returns res2",
        ),
        (SCALES, {"MODEL__SMCA__IN_FEATURES": ["res3", "res6"]}, "'res6'.*returns res2, res3"),
        (SCALES, {"MODEL__SMCA__IN_FEATURES": []}, r"IN_FEATURES is \[\]"),
        (SCALES, {"MODEL__SMCA__IN_FEATURES": ["res3", "res5"]}, r"strides \[8, 32\].*twice"),
        (SCALES, {"MODEL__DETR__IN_FEATURE": "res2"}, r"'res2'.*one of MODEL\.SMCA\.IN_FEATURES"),
    ],
)
def test_wrong_settings_are_explained(kind, overrides, message):
    from detectron2.layers import ShapeSpec

    shapes = {f"res{i}": ShapeSpec(channels=8, stride=2**i) for i in range(2, 6)}
    with pytest.raises(UserError, match=message):
        build_transformer(tiny_cfg(**kind, **overrides), shapes)
