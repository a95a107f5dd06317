"""AP of the things of panoptic data sets, and the choice of evaluators."""

import json
import logging
import os
from pathlib import Path

import numpy as np
import pycocotools.mask as mask_util
import pytest
import torch
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import COCOEvaluator
from detectron2.structures import Boxes, Instances

from batchformer_panoptic.config import add_batchformer_panoptic_config
from batchformer_panoptic.errors import UserError
from batchformer_panoptic.evaluation import (
    PanopticEvaluator,
    ThingAPEvaluator,
    build_evaluator,
)
from batchformer_panoptic.evaluation import coco_ap as annotations_module
from batchformer_panoptic.evaluation.coco_ap import cached_thing_annotations, thing_annotations
from batchformer_panoptic.evaluation.panoptic_ground_truth import PanopticGroundTruth
from helpers.panoptic_sets import (
    CATEGORIES,
    CONTIGUOUS,
    SIZE,
    PanopticImage,
    model_inputs,
    model_output,
    random_set,
    registered,
    resize_png,
)

TASKS = ("bbox", "segm")


def _instances(image: PanopticImage, classes: dict[int, int]) -> Instances:
    """All segments of an image except crowds as instances, stuff included."""
    infos = [info for info in image.segments_info if not info["iscrowd"]]
    masks = torch.stack([torch.from_numpy(image.segment_map == info["id"]) for info in infos])
    boxes = []
    for mask in masks.numpy():
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        boxes.append([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1])
    return Instances(
        SIZE,
        pred_boxes=Boxes(torch.tensor(boxes, dtype=torch.float32)),
        scores=torch.linspace(0.9, 0.5, len(infos)),
        pred_classes=torch.tensor([classes[info["category_id"]] for info in infos]),
        pred_masks=masks,
    )


def _average_precision(name, folder, truths, classes):
    evaluator = ThingAPEvaluator(name, str(folder), TASKS)
    evaluator.reset()
    outputs = [{"instances": _instances(truth, classes)} for truth in truths]
    evaluator.process(model_inputs(len(truths)), outputs)
    return evaluator.evaluate()


def test_perfect_instances_score_100_and_leave_the_catalog_alone(tmp_path):
    truths, _ = random_set(0, num_images=3)
    with registered("ap_set", tmp_path / "truth", truths) as name:
        before = {**MetadataCatalog.get(name).as_dict()}
        names = set(MetadataCatalog.list())
        results = _average_precision(name, tmp_path / "out", truths, CONTIGUOUS)
        assert MetadataCatalog.get(name).as_dict() == before
        assert set(MetadataCatalog.list()) == names
    assert set(results) == set(TASKS)
    for task in TASKS:
        assert results[task]["AP"] == pytest.approx(100.0)
        assert results[task]["AP-cat"] == pytest.approx(100.0)
        assert results[task]["AP-dog"] == pytest.approx(100.0)
        assert "AP-grass" not in results[task]


def test_wrong_classes_score_0(tmp_path):
    truths, _ = random_set(0, num_images=3)
    swapped = {3: CONTIGUOUS[201], 90: CONTIGUOUS[201], 7: 1, 200: 3}
    with registered("ap_set", tmp_path / "truth", truths) as name:
        results = _average_precision(name, tmp_path / "out", truths, swapped)
    assert [results[task]["AP"] for task in TASKS] == [0.0, 0.0]


@pytest.mark.parametrize("category_ids", [(3, 7, 90), (90,)])
def test_model_output_is_not_modified(tmp_path, category_ids):
    truths, _ = random_set(0, num_images=1, category_ids=category_ids)
    output = {"instances": _instances(truths[0], CONTIGUOUS)}
    classes = output["instances"].pred_classes.clone()
    with registered("ap_set", tmp_path / "truth", truths) as name:
        evaluator = ThingAPEvaluator(name, str(tmp_path / "out"))
        evaluator.reset()
        evaluator.process(model_inputs(1), [output])
    assert torch.equal(output["instances"].pred_classes, classes)
    assert set(output["instances"].get_fields()) == {
        "pred_boxes",
        "scores",
        "pred_classes",
        "pred_masks",
    }


def test_annotations_are_the_thing_segments(tmp_path):
    truths, _ = random_set(1, num_images=2)
    with registered("ap_set", tmp_path / "truth", truths) as name:
        content = thing_annotations(PanopticGroundTruth(MetadataCatalog.get(name)))
    assert [row["id"] for row in content["annotations"]] == list(
        range(1, len(content["annotations"]) + 1)
    )
    assert [row["name"] for row in content["categories"]] == ["cat", "dog", "never seen"]
    things = [
        (100 + index, truth.segment_map == info["id"], info)
        for index, truth in enumerate(truths)
        for info in truth.segments_info
        if info["category_id"] in (3, 90)
    ]
    assert {info["iscrowd"] for _, _, info in things} == {0, 1}
    for row, (image_id, mask, info) in zip(content["annotations"], things, strict=True):
        assert (row["image_id"], row["category_id"]) == (image_id, info["category_id"])
        assert (row["iscrowd"], row["area"]) == (info["iscrowd"], info["area"])
        np.testing.assert_array_equal(mask_util.decode(row["segmentation"]), mask)
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        left, top = columns[0], rows[0]
        assert row["bbox"] == [left, top, columns[-1] + 1 - left, rows[-1] + 1 - top]


def test_a_segment_without_pixels_is_refused(tmp_path):
    truths, _ = random_set(1, num_images=1)
    truths[0].segments_info.append({"id": 1, "category_id": 3, "iscrowd": 0, "area": 0})
    with registered("ap_set", tmp_path / "truth", truths) as name:
        truth = PanopticGroundTruth(MetadataCatalog.get(name))
        with pytest.raises(
            UserError, match=r"000100\.png, segment 1: listed in segments_info, but no pixel has"
        ):
            thing_annotations(truth)


def test_a_png_of_another_size_than_stated_is_one_line(tmp_path):
    truths, _ = random_set(1, num_images=1)
    with registered("ap_set", tmp_path / "truth", truths) as name:
        json_file = Path(MetadataCatalog.get(name).panoptic_json)
        images = [{"id": 100, "file_name": "100.jpg", "height": 40, "width": 56}]
        json_file.write_text(json.dumps({**json.loads(json_file.read_text()), "images": images}))
        resize_png(tmp_path / "truth" / "000100.png")
        truth = PanopticGroundTruth(MetadataCatalog.get(name))
        with pytest.raises(UserError, match=r"000100\.png is 5x7, but its image is 56x40$"):
            thing_annotations(truth)


def test_a_missing_png_is_named(tmp_path):
    truths, _ = random_set(1, num_images=1)
    with registered("ap_set", tmp_path / "truth", truths) as name:
        truth = PanopticGroundTruth(MetadataCatalog.get(name))
        (tmp_path / "truth" / "000100.png").unlink()
        with pytest.raises(UserError, match=r"panoptic PNG .*000100\.png does not exist"):
            cached_thing_annotations(truth, str(tmp_path / "out"))


def _truncate(cache, folder):
    cache.write_text(cache.read_text()[:-20])


def _empty(cache, folder):
    cache.write_text("{}")


def _change_json(cache, folder):
    path = folder.with_suffix(".json")
    path.write_text(path.read_text() + "\n")


def _change_png(cache, folder):
    os.utime(folder / "000100.png", ns=(1, 1))


@pytest.mark.parametrize("damage", [None, _truncate, _empty, _change_json, _change_png])
def test_the_cache_is_used_unless_stale_or_corrupt(tmp_path, monkeypatch, damage):
    truths, _ = random_set(2, num_images=1)
    made = []
    original = annotations_module.thing_annotations
    monkeypatch.setattr(
        annotations_module, "thing_annotations", lambda truth: made.append(1) or original(truth)
    )
    with registered("ap_set", tmp_path / "truth", truths) as name:
        truth = PanopticGroundTruth(MetadataCatalog.get(name))
        cache = tmp_path / "out" / "ap_set_things.json"
        assert cached_thing_annotations(truth, str(tmp_path / "out")) == str(cache)
        first = json.loads(cache.read_text())
        if damage is not None:
            damage(cache, tmp_path / "truth")
        cached_thing_annotations(truth, str(tmp_path / "out"))
        again = json.loads(cache.read_text())
    assert len(made) == (1 if damage is None else 2)
    assert again["annotations"] == first["annotations"]
    assert os.listdir(tmp_path / "out") == [cache.name]


def test_an_existing_instances_json_is_preferred(tmp_path):
    truths, _ = random_set(0, num_images=2)
    path = tmp_path / "instances.json"
    with registered("ap_set", tmp_path / "truth", truths, json_file=str(path)) as name:
        content = thing_annotations(PanopticGroundTruth(MetadataCatalog.get(name)))
        for row in content["annotations"]:  # a truth that contradicts the panoptic one
            row["category_id"] = 201
        path.write_text(json.dumps({"info": {}, **content}))
        results = _average_precision(name, tmp_path / "out", truths, CONTIGUOUS)
        assert not (tmp_path / "out" / "ap_set_things.json").exists()
        assert results["bbox"]["AP"] == 0.0
        content["categories"] = content["categories"][1:]
        path.write_text(json.dumps(content))
        with pytest.raises(UserError, match=r"instances\.json are not the things"):
            ThingAPEvaluator(name, str(tmp_path / "out"))


@pytest.mark.parametrize(
    ("section", "key", "words"),
    [
        ("annotations", "image_id", r"image_id '\d+' is not among the images \(a text"),
        ("annotations", "category_id", r"category_id '\d+' is not among the categories"),
        ("annotations", "iscrowd", r"iscrowd is '0'; write 0 or 1"),
        ("categories", "id", r"instances\.json are not the things"),
    ],
)
def test_texts_for_numbers_in_an_instances_json_are_refused(tmp_path, section, key, words):
    truths, _ = random_set(0, num_images=2)
    path = tmp_path / "instances.json"
    with registered("ap_set", tmp_path / "truth", truths, json_file=str(path)) as name:
        content = thing_annotations(PanopticGroundTruth(MetadataCatalog.get(name)))
        content[section][0][key] = str(content[section][0][key])
        path.write_text(json.dumps(content))
        with pytest.raises(UserError, match=words):
            ThingAPEvaluator(name, str(tmp_path / "out"))


def _config(mask_on):
    cfg = get_cfg()
    add_batchformer_panoptic_config(cfg)
    cfg.MODEL.MASK_ON = mask_on
    return cfg


@pytest.mark.parametrize(
    ("mask_on", "tasks"), [(True, {"panoptic_seg", "bbox", "segm"}), (False, {"bbox"})]
)
def test_built_evaluators_measure_what_the_model_predicts(tmp_path, mask_on, tasks):
    truths, _ = random_set(3, num_images=2)
    outputs = []
    for truth in truths:
        instances = _instances(truth, CONTIGUOUS)
        if mask_on:
            outputs.append({"instances": instances, **model_output(truth)})
        else:
            instances.remove("pred_masks")
            outputs.append({"instances": instances})
    with registered("ap_set", tmp_path / "truth", truths) as name:
        evaluator = build_evaluator(_config(mask_on), name, str(tmp_path / "out"))
        evaluator.reset()
        evaluator.process(model_inputs(2), outputs)
        results = evaluator.evaluate()
    assert set(results) == tasks
    assert results["bbox"]["AP"] == pytest.approx(100.0)


def test_a_model_without_instances_has_no_ap(tmp_path, caplog):
    truths, _ = random_set(3, num_images=1)
    cfg = _config(True)
    cfg.MODEL.PANOPTIC.INSTANCES_TEST = False
    with (
        registered("ap_set", tmp_path / "truth", truths) as name,
        caplog.at_level(logging.INFO),
    ):
        evaluator = build_evaluator(cfg, name, str(tmp_path / "out"))
        evaluator.reset()
        evaluator.process(model_inputs(1), [model_output(truths[0])])
        assert set(evaluator.evaluate()) == {"panoptic_seg"}
    assert "INSTANCES_TEST is False" in caplog.text


def test_a_data_set_without_things_has_no_ap(tmp_path, caplog):
    stuff = [category for category in CATEGORIES if not category["isthing"]]
    truths, _ = random_set(4, num_images=1, category_ids=(7, 200))
    with (
        registered("ap_set", tmp_path / "truth", truths, stuff) as name,
        caplog.at_level(logging.INFO),
    ):
        evaluators = build_evaluator(_config(True), name, str(tmp_path))._evaluators
        assert [type(evaluator) for evaluator in evaluators] == [PanopticEvaluator]
        with pytest.raises(UserError, match="ap_set has no thing classes"):
            ThingAPEvaluator(name, str(tmp_path))
    assert "ap_set has no thing classes: AP is not measured" in caplog.text


def test_a_coco_instance_set_gets_detectron2s_evaluator(tmp_path):
    path = tmp_path / "instances.json"
    path.write_text(json.dumps({"info": {}, "images": [], "annotations": [], "categories": []}))
    MetadataCatalog.get("instance_set").set(json_file=str(path), evaluator_type="coco")
    try:
        evaluator = build_evaluator(_config(False), "instance_set", str(tmp_path))
    finally:
        MetadataCatalog.pop("instance_set")
    assert isinstance(evaluator, COCOEvaluator)
    assert evaluator._tasks == ("bbox",)


@pytest.mark.parametrize("evaluator_type", ["lvis", None])
def test_an_unknown_evaluator_type_lists_the_known(tmp_path, evaluator_type):
    metadata = MetadataCatalog.get("odd_set")
    if evaluator_type is not None:
        metadata.evaluator_type = evaluator_type
    try:
        known = "classification, coco, coco_panoptic_seg"
        with pytest.raises(UserError, match=rf"odd_set .* {evaluator_type!r}; known are: {known}"):
            build_evaluator(_config(True), "odd_set", str(tmp_path))
    finally:
        MetadataCatalog.pop("odd_set")
    assert "odd_set" not in DatasetCatalog.list()
