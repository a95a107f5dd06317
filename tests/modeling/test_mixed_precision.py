"""Under autocast the model computes in half precision, matcher and losses in float32."""

import pytest
import torch

from batchformer_panoptic.modeling.set_prediction.criterion import count_objects
from batchformer_panoptic.modeling.set_prediction.predictions import Predictions, QueryMasks
from batchformer_panoptic.modeling.set_prediction.targets import TargetBatch, to_targets
from helpers.tiny_model import MASK2FORMER, random_inputs, tiny_model, total


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
    targets = to_targets(inputs, torch.device("cpu"), with_masks=True)
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


def test_costs_and_losses_at_points_are_close_to_those_of_float32():
    """Masks are products of half precision, which moves some uncertain points."""
    model = tiny_model(**MASK2FORMER)
    inputs = random_inputs([(64, 64), (48, 64)], [3, 2])
    targets = TargetBatch(to_targets(inputs, torch.device("cpu"), with_masks=True))
    logits = torch.randn(2, 2, 6, model.scoring.num_outputs).bfloat16()
    embeddings, features = torch.randn(2, 2, 6, 8).bfloat16(), torch.randn(2, 8, 16, 16).bfloat16()

    def run(logits, embeddings, features):
        torch.manual_seed(3)
        masks = QueryMasks(embeddings, features, (64, 64))
        predictions = Predictions(logits, None, masks)
        matching = model.matcher(predictions, targets)
        count = count_objects(targets.targets, logits.device)
        return model.criterion(predictions, targets, matching, count), matching

    expected, matching = run(logits.float(), embeddings.float(), features.float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, same = run(logits, embeddings, features)
    assert torch.equal(matching.query, same.query)
    for name, value in expected.items():
        assert found[name].dtype == torch.float32, name
        torch.testing.assert_close(found[name], value, rtol=0.05, atol=0)


@pytest.mark.parametrize(
    "name", ["detr", "conditional", "smca", "smca_multiscale", "deformable", "mask2former"]
)
def test_a_step_has_float32_losses_and_gradients(name, device):
    overrides = {
        "MODEL__DETR__TRANSFORMER_NAME": name,
        "MODEL__SMALL_RESNET__STAGE_STRIDES": [1, 2, 2, 2 if name == "smca_multiscale" else 1],
        "MODEL__BATCHFORMER__ENABLED": True,
    }
    model = tiny_model(**overrides | (MASK2FORMER if name == "mask2former" else {})).train()
    model.to(device)
    seen = []
    last = model.transformer.pixel_decoder.mask_features if name == "mask2former" else None
    last = last or model.mask_head.predictor
    last.register_forward_hook(lambda m, x, y: seen.append(y.dtype))
    with torch.autocast(device.type, dtype=torch.bfloat16):
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
