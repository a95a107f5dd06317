"""Deformable-DETR in the whole model: streams, neighbours and padding, errors."""

import pytest
import torch
from detectron2.layers import ShapeSpec

from batchformer_panoptic.batchformer import BATCHFORMER, ORIGINAL
from batchformer_panoptic.errors import UserError
from batchformer_panoptic.modeling.set_prediction.matcher import HungarianMatcher
from batchformer_panoptic.modeling.transformer import build_transformer
from helpers.deformable_models import (
    BLOCK,
    DEFORMABLE,
    KINDS,
    REFINE,
    SIZES,
    TWO_STAGE,
    make,
    predictions,
)
from helpers.tiny_model import random_inputs, tiny_cfg, tiny_model, total

each_kind = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)


def random_features(size, batch=1):
    height, width = size
    strides = {"res2": (8, 4), "res3": (12, 8), "res4": (16, 16), "res5": (20, 16)}
    return {
        name: torch.randn(batch, channels, height // stride, width // stride)
        for name, (channels, stride) in strides.items()
    }


def into_padding(features, size):
    """Maps of one image within larger maps that are full of large numbers."""
    padded = {name: 50 * value for name, value in random_features(size).items()}
    for name, value in features.items():
        padded[name][..., : value.shape[-2], : value.shape[-1]] = value
    return padded


# --- training and evaluation ---------------------------------------------------------------------


@each_kind
@pytest.mark.parametrize("block", [{}, BLOCK], ids=["no_block", "block"])
@pytest.mark.parametrize("mask_on", [True, False], ids=["panoptic", "boxes"])
def test_training_step(mask_on, block, kind):
    model = make(**kind, **block, MODEL__MASK_ON=mask_on).train()
    losses = model(random_inputs(SIZES))
    total(losses).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
    moving = ("sampling_offsets", "level_embed", "reference_points", "proposal_stage", "query_emb")
    for name, parameter in model.named_parameters():
        if any(part in name for part in moving):
            assert parameter.grad.abs().amax() > 0, name
    assert any(name.split("/")[0].endswith("_enc") for name in losses) == (kind is TWO_STAGE)
    streams = (ORIGINAL, BATCHFORMER) if block else ()
    assert {name.partition("/")[2] for name in losses} == (set(streams) or {""})


def test_proposals_are_matched_without_costs_of_masks():
    class MaskCost:
        name, weight, needs = "mask", 1.0, frozenset({"masks"})

        def __call__(self, predictions, targets):
            assert predictions.masks is not None
            return torch.zeros(*predictions.logits.shape[:3], max(targets.counts))

    model = make(**TWO_STAGE).train()
    model.matcher = HungarianMatcher([*model.matcher.costs, MaskCost()])
    assert any(name.split("/")[0].endswith("_enc") for name in model(random_inputs(SIZES)))


@each_kind
@pytest.mark.parametrize("counts", [[0, 0], [3, 0]])
def test_images_without_objects_train(counts, kind):
    model = make(**kind, **BLOCK).train()
    losses = model(random_inputs([(48, 64), (40, 40)], counts))
    total(losses).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


@each_kind
def test_start_is_finite_and_trains(kind):
    """With the published initialisation all points are at centres of cells."""
    model = tiny_model(**DEFORMABLE, **kind, **BLOCK).train()
    total(model(random_inputs(SIZES))).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


def pair_of_models(**overrides):
    """A model with the block, and the plain model with the same weights otherwise."""
    with_block, plain = make(**BLOCK, **overrides), make(**overrides)
    state = with_block.state_dict()
    plain.load_state_dict({k: v for k, v in state.items() if "batchformer" not in k})
    return with_block, plain


@each_kind
@pytest.mark.parametrize("mask_on", [True, False], ids=["panoptic", "boxes"])
def test_evaluation_is_that_of_the_plain_model_bit_for_bit(mask_on, kind):
    with_block, plain = pair_of_models(**kind, MODEL__MASK_ON=mask_on)
    with_block.eval(), plain.eval()
    a, b = predictions(with_block), predictions(plain)
    assert torch.equal(a.logits, b.logits)
    assert torch.equal(a.boxes, b.boxes)
    assert torch.equal(a.transformer.memory_map, b.transformer.memory_map)
    inputs = random_inputs(SIZES)
    for ours, theirs in zip(with_block(inputs), plain(inputs), strict=True):
        assert torch.equal(ours["instances"].scores, theirs["instances"].scores)
        assert ("panoptic_seg" in ours) == mask_on
        if mask_on:
            assert torch.equal(ours["panoptic_seg"][0], theirs["panoptic_seg"][0])


@each_kind
@pytest.mark.parametrize("layers", [[0], [1], [0, 1]])
def test_original_stream_is_the_plain_model_in_training(layers, kind):
    with_block, plain = pair_of_models(**kind, MODEL__BATCHFORMER__INSERT_LAYERS=layers)
    a, b = predictions(with_block.train()), predictions(plain.train())
    original, mixed = a.streams.split(a.logits.transpose(0, 1))
    torch.testing.assert_close(original.transpose(0, 1), b.logits, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(mixed.transpose(0, 1), b.logits, atol=1e-3)


# --- images and their neighbours -----------------------------------------------------------------


@each_kind
def test_padding_and_neighbours_change_nothing_from_features_on(kind):
    model = make(**kind).eval()
    torch.manual_seed(0)
    alone_features, neighbour = random_features((48, 80)), random_features((96, 128))
    single = model.predict(alone_features, [(48, 80)], (48, 80))
    padded = into_padding(alone_features, (96, 128))
    batch = {name: torch.cat([neighbour[name], padded[name]]) for name in padded}
    together = model.predict(batch, [(96, 128), (48, 80)], (96, 128))
    for ours, theirs in ((together.logits, single.logits), (together.boxes, single.boxes)):
        torch.testing.assert_close(ours[:, 1:], theirs, rtol=1e-4, atol=1e-5)
    memory, wanted = together.transformer.memory_map[1:], single.transformer.memory_map
    valid = memory[..., : wanted.shape[-2], : wanted.shape[-1]]
    torch.testing.assert_close(valid, wanted, rtol=1e-4, atol=1e-5)


@each_kind
def test_permuting_images_permutes_outputs(kind):
    model = make(**kind).eval()
    torch.manual_seed(0)
    sizes = [(48, 64), (64, 56), (40, 40)]
    features, order = random_features((64, 64), batch=3), [2, 0, 1]
    ours = model.predict(features, sizes, (64, 64))
    permuted = model.predict(
        {name: value[order] for name, value in features.items()},
        [sizes[i] for i in order],
        (64, 64),
    )
    torch.testing.assert_close(permuted.logits, ours.logits[:, order], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(permuted.boxes, ours.boxes[:, order], rtol=1e-4, atol=1e-5)


def test_published_projection_sees_padding_and_is_the_same_without():
    ours, published = make(), make(MODEL__DEFORMABLE__SEE_PADDING=True)
    published.load_state_dict(ours.state_dict())
    torch.manual_seed(0)
    features = random_features((64, 64))
    for size, same in (((64, 64), True), ((48, 64), False)):
        a, b = (m.eval().predict(features, [size], (64, 64)).logits for m in (ours, published))
        assert torch.equal(a, b) == same


# --- errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"MODEL__DEFORMABLE__TWO_STAGE": True}, r"TWO_STAGE needs MODEL\.DEFORMABLE\.BOX_REFINE"),
        ({**TWO_STAGE, "MODEL__DETR__SCORING": "softmax"}, "'focal' instead of 'softmax'"),
        ({**REFINE, "MODEL__DETR__DEEP_SUPERVISION": False}, "DEEP_SUPERVISION"),
        ({"MODEL__DETR__PRE_NORM": True}, "post-norm"),
        ({"MODEL__DEFORMABLE__IN_FEATURES": ["res3", "res6"]}, r"res6.*backbone returns res2"),
        ({"MODEL__DEFORMABLE__IN_FEATURES": []}, r"IN_FEATURES is \[\]"),
        ({"MODEL__DEFORMABLE__NUM_FEATURE_LEVELS": 2}, "is 2, fewer than the 3 maps"),
        ({"MODEL__DETR__IN_FEATURE": "res2"}, r"'res2'.*one of MODEL\.DEFORMABLE\.IN_FEATURES"),
    ],
)
def test_configs_that_cannot_be_built_are_explained(overrides, message):
    shapes = {f"res{i}": ShapeSpec(channels=8, stride=2**i) for i in range(2, 6)}
    with pytest.raises(UserError, match=message):
        build_transformer(tiny_cfg(**{**DEFORMABLE, **overrides}), shapes)


def test_more_queries_than_tokens_are_explained():
    model = make(**TWO_STAGE, MODEL__DETR__NUM_OBJECT_QUERIES=101)
    with pytest.raises(
        UserError, match="num_queries is 101, but images of this size have only 100"
    ):
        predictions(model)
