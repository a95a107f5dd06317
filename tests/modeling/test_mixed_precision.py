"""Under autocast the model computes in half precision, matcher and losses in float32."""

import pytest
import torch

from batchformer_panoptic.modeling.set_prediction.criterion import count_objects
from batchformer_panoptic.modeling.set_prediction.predictions import Predictions
from batchformer_panoptic.modeling.set_prediction.targets import TargetBatch, to_target
from helpers.tiny_model import random_inputs, tiny_model, total


def losses_of(model, logits, boxes, masks, targets):
    def select(layer, image, query):
        assert len(query) == len(masks)
        return masks

    predictions, batch = Predictions(logits, boxes, select), TargetBatch(targets)
    matching = model.matcher(predictions, batch)
    count = count_objects(targets, logits.device)
    return model.criterion(predictions, batch, matching, count), matching


@pytest.mark.parametrize("scoring", ["softmax", "focal"])
@pytest.mark.parametrize("resolution", ["target", "prediction"])
def test_matcher_and_losses_are_those_of_float32(monkeypatch, scoring, resolution):
    model = tiny_model(MODEL__DETR__SCORING=scoring, MODEL__MASK_HEAD__LOSS_RESOLUTION=resolution)
    inputs = random_inputs([(64, 64), (48, 64)], [3, 2])
    targets = [to_target(x, torch.device("cpu"), with_masks=True) for x in inputs]
    logits = torch.randn(2, 2, 6, model.scoring.num_outputs).bfloat16()
    boxes, masks = torch.rand(2, 2, 6, 4) * 0.4 + 0.2, torch.randn(5, 16, 16).bfloat16()
    expected, matching = losses_of(model, logits.float(), boxes, masks.float(), targets)
    cost, dtypes = model.scoring.cost, []

    def watched(logits, labels):
        dtypes.append(logits.dtype)
        return cost(logits, labels)

    monkeypatch.setattr(model.scoring, "cost", watched)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, same = losses_of(model, logits, boxes, masks, targets)
    assert dtypes == [torch.float32]
    assert torch.equal(matching.query, same.query)
    for name, value in expected.items():
        assert found[name].dtype == torch.float32, name
        assert torch.equal(found[name], value), name


@pytest.mark.parametrize("name", ["detr", "conditional", "smca", "smca_multiscale", "deformable"])
def test_a_step_has_float32_losses_and_gradients(name):
    model = tiny_model(
        MODEL__DETR__TRANSFORMER_NAME=name,
        MODEL__SMALL_RESNET__STAGE_STRIDES=[1, 2, 2, 2 if name == "smca_multiscale" else 1],
        MODEL__BATCHFORMER__ENABLED=True,
    ).train()
    seen = []
    model.mask_head.predictor.register_forward_hook(lambda m, x, y: seen.append(y.dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = model(random_inputs([(64, 64), (48, 64)]))
    assert seen == [torch.bfloat16]
    for key, value in losses.items():
        assert value.dtype == torch.float32, key
        assert value.isfinite(), key
    total(losses).backward()
    for key, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, key
            assert parameter.grad.isfinite().all(), key
