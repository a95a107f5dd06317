"""Conditional-DETR: the recorded numbers of the public code."""

import pytest
import torch
from golden_models import conditional_model, features_of, load_golden, our_name, rename, sizes_of

from batchformer_panoptic.modeling.targets import ImageTarget

GOLDEN = load_golden("conditional_detr.pt")
VARIANTS = GOLDEN["variants"]
each_variant = pytest.mark.parametrize("name", VARIANTS)


def make_model(name):
    model = conditional_model(GOLDEN).train()
    model.load_state_dict(rename(VARIANTS[name]["state_dict"]))
    return model


@each_variant
def test_forward(name):
    model = make_model(name)
    predictions = model.predict(features_of(GOLDEN), *sizes_of(GOLDEN))
    outputs = VARIANTS[name]["full"]["outputs"]
    layers = [*outputs["aux_outputs"], outputs]
    for key, ours in (("pred_logits", predictions.logits), ("pred_boxes", predictions.boxes)):
        recorded = torch.stack([x[key] for x in layers])
        torch.testing.assert_close(ours, recorded, atol=1e-4, rtol=0.0)


@each_variant
@pytest.mark.parametrize("targets", ["full", "with_empty_image"])
def test_matching_losses_and_gradients(name, targets):
    recorded, model = VARIANTS[name][targets], make_model(name)
    objects = [ImageTarget(t["labels"], t["boxes"]) for t in GOLDEN["targets"][targets]]
    features = features_of(GOLDEN)
    predictions = model.predict(features, *sizes_of(GOLDEN))
    matching = model.matcher(predictions.logits, predictions.boxes, objects)
    layers = [*recorded["indices"]["aux"], recorded["indices"]["final"]]
    for layer, images in enumerate(layers):
        for image, (queries, local) in enumerate(images):
            here = (matching.layer == layer) & (matching.image == image)
            assert torch.equal(matching.query[here], queries)
            assert torch.equal(matching.local_target[here], local)

    losses = model.losses(predictions, features, objects)
    total = torch.stack(list(losses.values())).sum()
    assert total.item() == pytest.approx(recorded["weighted_total"], rel=1e-5)
    total.backward()
    parameters = dict(model.named_parameters())
    for key, gradient in recorded.get("grads", {}).items():
        scale = gradient.abs().max().item()
        ours = parameters[our_name(key)].grad
        torch.testing.assert_close(ours, gradient, atol=1e-4 * scale, rtol=0.0)
    norm = torch.stack([p.grad.norm() for p in parameters.values()]).norm()
    assert norm.item() == pytest.approx(recorded["grad_total_norm"], rel=1e-4)
