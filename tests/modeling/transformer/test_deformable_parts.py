"""Parts of Deformable-DETR: projection, levels, refinement, proposals, box heads."""

import math

import pytest
import torch
from torch.nn import functional as F

from batchformer_panoptic.modeling.heads import BoxHead, LayerwiseBoxHead
from batchformer_panoptic.modeling.transformer.deformable import token_boxes
from batchformer_panoptic.modeling.transformer.layers import BatchPadding
from batchformer_panoptic.modeling.transformer.multi_scale import (
    LevelProjection,
    Levels,
    cell_centers,
)
from helpers.deformable_models import BLOCK, DEFORMABLE, REFINE, SIZES, TWO_STAGE, make, predictions
from helpers.tiny_model import random_inputs, tiny_model, total


@pytest.mark.parametrize("num_levels", [1, 3])
def test_projection_of_a_padded_image_is_that_of_the_image(num_levels):
    torch.manual_seed(0)
    projection = LevelProjection(
        in_channels=[6], embed_dim=16, num_levels=num_levels, see_padding=False
    ).double()
    for _, norm in projection.levels:
        torch.nn.init.normal_(norm.weight), torch.nn.init.normal_(norm.bias)
    image = torch.randn(1, 6, 5, 3, dtype=torch.float64)
    batch = 9 * torch.randn(2, 6, 8, 12, dtype=torch.float64)
    batch[1, :, :5, :3] = image
    single, _ = projection([image], BatchPadding([(40, 24)], (40, 24)))
    together, masks = projection([batch], BatchPadding([(64, 96), (40, 24)], (64, 96)))
    assert len(single) == num_levels
    for ours, wanted, mask in zip(together, single, masks, strict=True):
        height, width = wanted.shape[-2:]
        torch.testing.assert_close(ours[1:, :, :height, :width], wanted, rtol=0, atol=1e-12)
        assert (~mask[1]).sum() == height * width


def test_narrow_models_have_groups_that_fit():
    model = tiny_model(**DEFORMABLE, MODEL__DETR__HIDDEN_DIM=48, MODEL__MASK_ON=False)
    assert {norm.num_groups for _, norm in model.transformer.projection.levels} == {16}
    assert len(model(random_inputs(SIZES))) > 0


# --- levels --------------------------------------------------------------------------------------


def test_reference_points_of_tokens_are_the_same_place_on_every_level():
    mask = torch.zeros(1, 4, 8, dtype=torch.bool)
    mask[:, :, 4:] = True  # the right half is padding
    centers = cell_centers(mask)
    assert centers.shape == (1, 32, 2)
    torch.testing.assert_close(centers[0, 0], torch.tensor([0.125, 0.125]))
    torch.testing.assert_close(centers[0, 9], torch.tensor([0.375, 0.375]))  # row 1, column 1
    ratios = torch.tensor([[[0.5, 1.0], [0.75, 1.0]]])
    levels = Levels(((4, 8),), torch.zeros(1, 32, 4), None, ratios, centers)
    points = levels.cell_centers()
    torch.testing.assert_close(points[0, 9], torch.tensor([[0.1875, 0.375], [0.28125, 0.375]]))
    boxes = levels.on_each_level(torch.tensor([[[0.4, 0.4, 0.2, 0.2]]]))
    torch.testing.assert_close(boxes[0, 0, 0], torch.tensor([0.2, 0.4, 0.1, 0.2]))


def test_the_encoder_expands_its_levels():
    model = make(**BLOCK).train()
    seen = []
    encoder = model.transformer.encoder
    encoder.register_forward_hook(lambda _, inputs, output: seen.append((inputs[1], output)))
    predictions(model)
    levels, (memory, expanded, streams) = seen[0]
    assert expanded.shapes == levels.shapes
    assert memory.shape[0] == 2 * len(SIZES)
    for before, after in zip(levels[1:], expanded[1:], strict=True):
        assert torch.equal(after, streams.expand(before))


@pytest.mark.parametrize("name", ["res3", "res5"])
def test_masks_are_read_from_the_level_that_the_config_names(name):
    model = make(MODEL__DETR__IN_FEATURE=name).train()
    memories = []
    model.transformer.encoder.register_forward_hook(
        lambda _, inputs, output: memories.append(output[0])
    )
    output = predictions(model).transformer
    areas = [8 * 8, 4 * 4, 4 * 4, 2 * 2]  # 64 x 64 pixels, strides 8, 16, 16 and 32
    level = ["res3", "res4", "res5"].index(name)
    tokens = memories[0].split(areas, dim=1)[level]
    torch.testing.assert_close(output.memory_map.flatten(2).transpose(1, 2), tokens)
    assert output.projected_map.shape == output.memory_map.shape
    assert output.padding_mask.shape == output.memory_map[:, 0].shape
    assert output.padding_mask.any()


def test_more_levels_than_maps_come_from_the_last_one():
    names = ["res4", "res5"]
    model = make(MODEL__DEFORMABLE__IN_FEATURES=names, MODEL__DEFORMABLE__NUM_FEATURE_LEVELS=4)
    strides = [conv.stride for conv, _ in model.transformer.projection.levels]
    assert strides == [(1, 1), (1, 1), (2, 2), (2, 2)]
    assert model.transformer.in_features == ("res4", "res5")
    assert total(model.train()(random_inputs(SIZES))).isfinite()


# --- boxes and proposals -------------------------------------------------------------------------


def test_refinement_starts_where_the_layer_before_ended_and_stops_gradients():
    model = make(**REFINE, MODEL__DETR__DEC_LAYERS=3).train()
    output = predictions(model)
    references = output.transformer.reference_points
    ends = output.boxes.logit()
    torch.testing.assert_close(references[1:], ends[:-1].detach(), rtol=1e-3, atol=1e-3)
    assert not references[0, ..., 2:].any()
    output.boxes[-1].sum().backward()
    first, last = (model.box_head.layers[i].bbox_embed for i in (0, -1))
    assert not any(p.grad.any() for p in first.parameters())
    assert all(p.grad.any() for p in last.parameters())


def test_heads_run_once_per_layer_where_boxes_are_refined(monkeypatch):
    model, calls = make(**REFINE).train(), []
    for name in ("classify", "predict_boxes"):
        original = getattr(LayerwiseBoxHead, name)

        def watched(self, layer, *arguments, name=name, original=original):
            calls.append((name, layer, torch.is_grad_enabled()))
            return original(self, layer, *arguments)

        monkeypatch.setattr(LayerwiseBoxHead, name, watched)
    predictions(model)
    expected = [(name, layer, True) for name in ("classify", "predict_boxes") for layer in (0, 1)]
    assert sorted(calls) == expected


def test_without_refinement_all_layers_start_from_the_same_points():
    references = predictions(make().train()).transformer.reference_points
    assert references.shape[-1] == 2
    assert torch.equal(references[0], references[1])


def test_proposals_are_those_of_each_stream():
    model = make(**TWO_STAGE, **BLOCK).train()
    output = predictions(model)
    proposals = output.transformer.proposals
    num_tokens = 8 * 8 + 4 * 4 + 4 * 4 + 2 * 2
    assert proposals.logits.shape == (2 * len(SIZES), num_tokens, 4)
    original, mixed = output.streams.split(proposals.logits)
    assert not torch.allclose(original, mixed, atol=1e-3)
    references = output.transformer.reference_points[0]
    best = proposals.logits[..., 0].topk(references.shape[1]).indices
    chosen = proposals.boxes.gather(1, best[..., None].expand(-1, -1, 4))
    torch.testing.assert_close(references.sigmoid(), chosen, rtol=1e-4, atol=2e-5)
    assert not references.requires_grad


def test_queries_of_tokens_without_a_proposal_start_at_the_bound_of_the_logits():
    model = make(**TWO_STAGE, MODEL__DETR__NUM_OBJECT_QUERIES=100).train()  # all tokens
    output = predictions(model)
    references = output.transformer.reference_points
    assert references.abs().max() == pytest.approx(math.log(1e5), abs=1e-4)
    assert output.boxes.max() < 1.0
    torch.testing.assert_close(output.transformer.proposals.boxes.max(), torch.tensor(1.0))


def test_losses_of_proposals_depend_on_objects_and_not_on_classes():
    model = make(**TWO_STAGE).train()
    inputs = random_inputs(SIZES)
    losses = model(inputs)
    for x in inputs:
        x["instances"].gt_classes = (x["instances"].gt_classes + 1) % 4
    others = model(inputs)
    for term in ("ce", "bbox", "giou"):
        torch.testing.assert_close(losses[f"loss_{term}_enc"], others[f"loss_{term}_enc"])
    assert not torch.allclose(losses["loss_ce"], others["loss_ce"])


def test_tokens_at_the_edge_and_in_the_padding_have_no_proposal():
    mask = torch.zeros(1, 60, 60, dtype=torch.bool)
    mask[:, 40:] = True
    shapes, centers = ((60, 60),), cell_centers(mask)
    levels = Levels(shapes, torch.zeros(1), mask.flatten(1), torch.ones(1, 1, 2), centers)
    boxes, usable = token_boxes(levels)
    usable = usable.view(60, 60)
    expected = torch.zeros(60, 60, dtype=torch.bool)
    expected[:40, 1:59] = True  # half a cell is 1/120 wide and 1/80 high, the margin 1/100
    assert torch.equal(usable, expected)
    boxes = boxes.view(60, 60, 4)
    assert boxes[~usable].isposinf().all()
    torch.testing.assert_close(
        boxes[25, 30].sigmoid(), torch.tensor([30.5 / 60, 25.5 / 40, 0.05, 0.05])
    )
    coarse = levels._replace(shapes=((30, 60), (30, 60)))
    sizes = token_boxes(coarse)[0].sigmoid().view(2, 30, 60, 4)[:, 5, 30, 2]
    torch.testing.assert_close(sizes, torch.tensor([0.05, 0.1]))


def test_boxes_start_as_published():
    small, unchanged = torch.tensor([0.0, 0.0, -2.0, -2.0]), torch.zeros(4)
    for kind, biases in (
        ({}, [small]),
        (REFINE, [small, unchanged]),
        (TWO_STAGE, [unchanged, unchanged, unchanged]),
    ):
        head = tiny_model(**DEFORMABLE, **kind).box_head
        heads = [head] if isinstance(head, BoxHead) else list(head.layers)
        assert len(heads) == len(biases)
        for one, bias in zip(heads, biases, strict=True):
            last = one.bbox_embed.layers[-1]
            assert torch.equal(last.bias, bias)
            assert not last.weight.any()
            torch.testing.assert_close(one.class_embed.bias, torch.full((4,), -4.59512))


def test_layerwise_head_counts_layers_from_the_end():
    heads = [BoxHead(embed_dim=8, num_class_outputs=3, class_bias=None) for _ in range(3)]
    head = LayerwiseBoxHead(heads, num_layers=2)  # the third is for proposals
    states, references = torch.randn(2, 1, 5, 8), torch.randn(2, 1, 5, 4)
    logits, boxes = head(states, references)
    for layer in range(2):
        expected = heads[layer].classify(0, states[layer])
        box_logits = heads[layer].predict_boxes(0, states[layer], references[layer])
        torch.testing.assert_close(logits[layer], expected)
        torch.testing.assert_close(boxes[layer], box_logits.sigmoid())
    last = head(states[-1:], references[-1:])
    torch.testing.assert_close(last[0], logits[-1:])
    torch.testing.assert_close(head(states, None)[1][1], F.sigmoid(heads[1].bbox_embed(states[1])))
