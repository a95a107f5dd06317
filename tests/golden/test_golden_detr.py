"""DETR with masks: the recorded numbers of the public code."""

import pytest
import torch
from torch import nn

from batchformer_panoptic.modeling.postprocessing.results import InferenceOptions
from helpers.golden_compare import OUTPUTS
from helpers.golden_models import (
    assert_masks,
    assert_near,
    assert_outputs,
    assert_padding_and_positions,
    assert_states,
    assert_training_step,
    features_of,
    load_golden,
    our_name,
    panoptic_model,
    sizes_of,
)

GOLDEN = load_golden("detr_panoptic.pt")
CONFIG = GOLDEN["config"]
TARGETS = {"targets": GOLDEN} | GOLDEN["extra_targets"]  # each with its ``targets`` and results

METRICS = ("class_error", "cardinality_error")


def predict(model):
    return model.predict(features_of(GOLDEN), *sizes_of(GOLDEN))


class RecordedMaps(nn.Module):
    """In place of a backbone: the maps of the file, whatever the images."""

    size_divisibility = 0

    def forward(self, images):
        assert tuple(images.shape[-2:]) == sizes_of(GOLDEN)[1]
        return features_of(GOLDEN)


@pytest.mark.parametrize("training", [True, False])
def test_outputs_and_masks(training):
    model = panoptic_model(GOLDEN).train(training)
    predictions = predict(model)
    assert_outputs(predictions, GOLDEN["outputs"], last_only=not training)
    states = GOLDEN["intermediates"]
    assert_states(predictions.transformer, states)
    masks, attention_map = GOLDEN["outputs"]["pred_masks"], states["bbox_attention_map"]
    assert_masks(model, GOLDEN, predictions, masks, attention_map)


@pytest.mark.parametrize("name", TARGETS)
def test_matching_losses_and_gradients(name, device):
    recorded, model = TARGETS[name], panoptic_model(GOLDEN).to(device)
    assert_training_step(model, GOLDEN, recorded["targets"], recorded, metrics=METRICS)


def test_boxes_and_scores_of_inference():
    """Evaluation on the recorded maps, best first; boxes are clipped to the image."""
    recorded = GOLDEN["postprocess_bbox"]
    model = panoptic_model(GOLDEN).eval()
    model.backbone = RecordedMaps()
    model.inference_options = InferenceOptions(
        thing_class_ids=tuple(range(CONFIG["num_classes"])),
        max_instances=CONFIG["num_queries"],
        pad_images=True,
    )
    sizes = recorded["target_sizes"].tolist()
    inputs = [
        {"image": torch.zeros(3, *size), "height": height, "width": width}
        for size, (height, width) in zip(sizes_of(GOLDEN)[0], sizes, strict=True)
    ]
    results = model(inputs)
    assert len(results) == len(recorded["results"])
    for ours, theirs, size in zip(results, recorded["results"], sizes, strict=True):
        ours = ours["instances"]
        limits = torch.tensor([size[1], size[0]] * 2)
        scores, order = theirs["scores"].sort(descending=True)
        boxes = theirs["boxes"][order].clamp(min=0).minimum(limits)
        ours = ours[ours.scores.argsort(descending=True)]
        assert_near(ours.scores, scores, OUTPUTS, "scores")
        assert torch.equal(ours.pred_classes, theirs["labels"][order])
        assert_near(ours.pred_boxes.tensor, boxes, OUTPUTS * max(size), "boxes in pixels")


def test_padding_masks_and_positions():
    assert_padding_and_positions(GOLDEN, panoptic_model(GOLDEN).transformer)


def test_frozen_stage_trains_what_the_published_code_trains():
    model = panoptic_model(GOLDEN)
    model.freeze_all_but_mask_head()
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {our_name(name) for name in GOLDEN["trainable_when_frozen"]}
