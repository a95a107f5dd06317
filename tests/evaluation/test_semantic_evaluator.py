"""Mean IoU of class maps: the truth scores 100, a loop over pixels gives the same numbers."""

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import inference_on_dataset

from batchformer_panoptic.errors import UserError
from batchformer_panoptic.evaluation import SemanticEvaluator, build_evaluator
from batchformer_panoptic.modeling.postprocessing.results import InferenceOptions
from helpers.panoptic_sets import (
    CATEGORIES,
    CONTIGUOUS,
    model_inputs,
    random_set,
    registered,
    resize_png,
)
from helpers.perfect_masks import THING_CLASS_IDS, PerfectModel, inputs_of, shapes_image
from helpers.tiny_model import tiny_cfg

VOID = -1


def class_map(image):
    """(H, W) contiguous classes, -1 at void and crowds."""
    classes = np.full(image.segment_map.shape, VOID)
    for info in image.segments_info:
        if not info["iscrowd"]:
            classes[image.segment_map == info["id"]] = CONTIGUOUS[info["category_id"]]
    return classes


def scores(classes):
    """Scores whose largest is that of the class; void pixels get class 0."""
    one_hot = torch.nn.functional.one_hot(torch.tensor(classes).clamp(min=0), len(CATEGORIES))
    return {"sem_seg": one_hot.permute(2, 0, 1).float()}


def evaluate(folder, truths, outputs):
    with registered("semantic_set", folder, truths) as name:
        evaluator = SemanticEvaluator(name)
        inputs = model_inputs(len(truths))
        evaluator.process(inputs, outputs)
        evaluator.process(inputs[:1], outputs[-1:])  # an image counts once
        results = evaluator.evaluate()["sem_seg"]
    left = {*DatasetCatalog.list(), *MetadataCatalog.list()}
    assert not any("semantic_set" in name for name in left)
    return results


def test_the_truth_scores_100(tmp_path):
    truths, _ = random_set(3)
    results = evaluate(tmp_path / "set", truths, [scores(class_map(image)) for image in truths])
    assert results["mIoU"] == results["fwIoU"] == results["mACC"] == results["pACC"] == 100
    assert results["IoU-sky"] == 100
    assert np.isnan(results["IoU-never seen"])


def test_the_mean_is_that_of_a_loop_over_classes(tmp_path):
    truths, predictions = random_set(4)
    true, found = ([class_map(image) for image in images] for images in (truths, predictions))
    results = evaluate(tmp_path / "set", truths, [scores(classes) for classes in found])
    true, found = (np.concatenate([m.ravel() for m in maps]) for maps in (true, found))
    found = np.maximum(found, 0)[true != VOID]
    true = true[true != VOID]
    ious = [((true == k) & (found == k)).sum() / ((true == k) | (found == k)).sum() for k in (0, 1)]
    assert results["IoU-cat"] == pytest.approx(100 * ious[0])
    assert results["IoU-grass"] == pytest.approx(100 * ious[1])
    present = [k for k in range(len(CATEGORIES)) if (true == k).any()]
    each = [
        ((true == k) & (found == k)).sum() / ((true == k) | (found == k)).sum() for k in present
    ]
    assert results["mIoU"] == pytest.approx(100 * np.mean(each))
    assert results["mIoU"] < 90


def test_a_model_with_perfect_masks_through_the_evaluator_of_the_config(tmp_path):
    images = [shapes_image(seed, (96, 128)) for seed in range(3)]
    options = InferenceOptions(THING_CLASS_IDS, semantic=True, instances=False)
    model = PerfectModel(options, num_classes=len(CATEGORIES))
    cfg = tiny_cfg(MODEL__PANOPTIC__SEMANTIC_TEST=True, MODEL__PANOPTIC__INSTANCES_TEST=False)
    with registered("semantic_set", tmp_path / "set", images) as name:
        evaluator = build_evaluator(cfg, name, str(tmp_path))
        batches = [[entry] for entry in inputs_of_files(images)]
        results = inference_on_dataset(model, batches, evaluator)
    assert results["sem_seg"]["mIoU"] > 95
    assert results["panoptic_seg"]["PQ"] > 90


def inputs_of_files(images):
    return [{**x, "file_name": f"{i}.jpg"} for i, x in enumerate(inputs_of(images))]


def test_a_png_of_another_size_than_the_image_is_one_line(tmp_path):
    truths, _ = random_set(5, num_images=1)
    with registered("semantic_set", tmp_path / "set", truths) as name:
        resize_png(tmp_path / "set" / "000100.png")
        with pytest.raises(UserError, match=r"000100\.png is 5x7, but its image is 56x40$"):
            SemanticEvaluator(name).process(model_inputs(1), [scores(class_map(truths[0]))])


def test_mistakes_are_explained(tmp_path):
    truths, _ = random_set(5, num_images=1)
    with registered("semantic_set", tmp_path / "set", truths) as name:
        evaluator = SemanticEvaluator(name)
        with pytest.raises(UserError, match="enable its semantic inference"):
            evaluator.process(model_inputs(1), [{}])
        with pytest.raises(UserError, match=r"image 7 is not annotated in .*set\.json"):
            evaluator.process([{"image_id": 7}], [scores(class_map(truths[0]))])
