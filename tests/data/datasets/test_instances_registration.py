"""Data sets of boxes from a config row, and mistakes in their JSON."""

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pycocotools.mask as mask_util
import pytest
from detectron2.config import CfgNode, get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_coco_json

from batchformer_panoptic import add_batchformer_panoptic_config, register_instances_dataset
from batchformer_panoptic.data import (
    PanopticDatasetMapper,
    load_dataset_dicts,
    load_instances_json,
    setup_datasets,
)
from batchformer_panoptic.data.check import check_files
from batchformer_panoptic.data.validation import Depth
from batchformer_panoptic.errors import UserError
from batchformer_panoptic.evaluation.coco_ap import build_box_evaluator
from helpers.instance_files import content, write_instances
from helpers.tiny_dataset import TinyPanopticDataset

_numbers = itertools.count()


def unique_name() -> str:
    return f"test_instances_{next(_numbers)}"


@pytest.fixture
def cfg() -> CfgNode:
    cfg = get_cfg()
    add_batchformer_panoptic_config(cfg)
    return cfg


def test_setup_registers_and_derives_the_classes(cfg: CfgNode, tmp_path: Path) -> None:
    name = unique_name()
    cfg.DATASETS.CUSTOM_INSTANCES = [write_instances(tmp_path / "set").row(name)]
    cfg.DATASETS.TRAIN = cfg.DATASETS.TEST = (name,)
    setup_datasets(cfg)
    assert cfg.MODEL.DETR.NUM_CLASSES == 2
    assert cfg.MODEL.PANOPTIC.THING_CLASS_IDS == [0, 1]
    metadata = MetadataCatalog.get(name)
    assert metadata.thing_classes == ["cat", "dog"]
    assert metadata.evaluator_type == "coco"
    before = cfg.dump()
    setup_datasets(cfg)
    assert cfg.dump() == before


def test_images_boxes_and_crowds(cfg: CfgNode, tmp_path: Path) -> None:
    name = unique_name()
    register_instances_dataset(*write_instances(tmp_path / "set").row(name))
    dicts = load_dataset_dicts([name], filter_empty=False)
    assert [len(d["annotations"]) for d in dicts] == [3, 3, 0]
    cfg.INPUT.FORMAT, cfg.INPUT.RANDOM_FLIP = "RGB", "none"
    cfg.INPUT.MIN_SIZE_TRAIN = (48,)
    mapped = PanopticDatasetMapper(cfg, is_train=True)(dicts[0])["instances"]
    assert mapped.gt_classes.tolist() == [1, 0]
    assert mapped.gt_boxes.tensor.tolist() == [[2, 3, 12, 15], [15, 8, 29, 28]]
    assert len(PanopticDatasetMapper(cfg, is_train=True)(dicts[2])["instances"]) == 0


def test_dicts_equal_those_of_detectron2(tmp_path: Path) -> None:
    code = mask_util.encode(np.asfortranarray(np.eye(48, 64, dtype=np.uint8)))
    annotations = content()["annotations"]
    annotations[0]["segmentation"] = [[1, 2, 3, 4, 5, 6.5], [1, 2]]
    annotations[1]["segmentation"] = {**code, "counts": code["counts"].decode()}
    images = content()["images"][::-1]
    files = write_instances(tmp_path / "set", annotations=annotations, images=images)
    name = unique_name()
    mine = load_instances_json(str(files.json_file), str(files.image_root))
    theirs = load_coco_json(str(files.json_file), str(files.image_root), name)
    assert mine == theirs


@pytest.mark.parametrize("segmentation", [[[1, 2, 3, 4]], [], [["a"] * 6], {"counts": 3}, 7])
def test_a_box_with_an_unusable_mask_is_still_trained_on(
    tmp_path: Path, segmentation: object
) -> None:
    annotations = content()["annotations"]
    annotations[0]["segmentation"] = segmentation
    files = write_instances(tmp_path / "set", annotations=annotations)
    found = load_instances_json(str(files.json_file), str(files.image_root))[0]["annotations"]
    assert [item["bbox"] for item in found] == [item["bbox"] for item in annotations[:3]]
    assert not any("segmentation" in item for item in found)
    paths = {"image_root": files.image_root, "json_file": files.json_file}
    kinds = [problem.kind for problem in check_files(paths, Depth()).problems]
    assert kinds == ["bad segmentation"] * bool(segmentation)


@pytest.mark.parametrize(
    ("bbox", "has_pixels"),
    [
        ([0, 0, 64, 48], True),
        ([63.5, 47.5, 10, 10], True),
        ([-5, -5, 6, 6], True),
        ([3, 4, 0, 5], False),
        ([64, 4, 5, 5], False),
        ([3, 48, 5, 5], False),
        ([-5, 4, 5, 5], False),
    ],
)
def test_a_box_that_training_leaves_out_is_named(
    cfg: CfgNode, tmp_path: Path, bbox: list[float], has_pixels: bool
) -> None:
    annotations = [{**content()["annotations"][0], "bbox": bbox}, *content()["annotations"][1:]]
    files = write_instances(tmp_path / "set", annotations=annotations)
    paths = {"image_root": files.image_root, "json_file": files.json_file}
    kinds = [problem.kind for problem in check_files(paths, Depth()).problems]
    assert kinds == ([] if has_pixels else ["box without pixels"])
    cfg.INPUT.FORMAT, cfg.INPUT.RANDOM_FLIP, cfg.INPUT.MIN_SIZE_TRAIN = "RGB", "none", (48,)
    found = load_instances_json(str(files.json_file), str(files.image_root))[0]
    assert len(PanopticDatasetMapper(cfg, is_train=True)(found)["instances"]) == 1 + has_pixels


def changed(key: str, index: int, **changes: Any) -> dict[str, Any]:
    records = content()[key]
    records[index] = {k: v for k, v in {**records[index], **changes}.items() if v != "absent"}
    return {key: records}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (changed("annotations", 3, id=1), "2 annotations have the id 1"),
        (changed("annotations", 3, id="absent"), "entry 3 of the list 'annotations' has no 'id'"),
        (
            changed("annotations", 3, image_id=99),
            "annotation 3: image_id 99 is not among the images",
        ),
        (
            changed("annotations", 3, category_id=2),
            "annotation 3: category_id 2 is not among the categories",
        ),
        (changed("annotations", 3, bbox="absent"), "annotation 3: bbox is None; give"),
        (changed("annotations", 3, bbox=[1, 2, -3, 4]), r"bbox is \[1, 2, -3, 4\]; give"),
        (changed("annotations", 3, bbox=[float("nan"), 2, 3, 4]), "nan, 2, 3, 4]; give"),
        (changed("annotations", 3, bbox=[1, 2, 3]), r"\[1, 2, 3\]; give"),
        (changed("images", 1, id=10), "2 image records have the id 10"),
        (changed("images", 1, height="absent"), "1.png: the image record has the height None"),
        (changed("images", 1, width="32"), "width '32' \\(a text: write 32 without quotes\\)"),
        (
            changed("images", 1, id="11"),
            r"image ids are texts \(1\) and numbers \(2\); use one type",
        ),
        (
            changed("annotations", 3, image_id="11"),
            r"image_id '11' is not among the images \(a text",
        ),
        (changed("annotations", 3, category_id="9"), "category_id '9' is not among the categories"),
        (changed("annotations", 3, category_id=None), "category_id None is not among"),
        (changed("annotations", 3, iscrowd="0"), r"iscrowd is '0'; write 0 or 1 \(a text: write 0"),
        (changed("annotations", 3, iscrowd=None), "annotation 3: iscrowd is None; write 0 or 1"),
        (changed("annotations", 3, area="120"), "annotation 3: area is '120'; write a number"),
        (changed("annotations", 3, area=None), "annotation 3: area is None; write a number"),
        (changed("annotations", 3, ignore=1), "annotation 3: ignore is 1, which COCO's evaluation"),
        (changed("annotations", 3, bbox=None), "annotation 3: bbox is None; give"),
        (changed("images", 1, file_name="absent"), "image 11 has no 'file_name'"),
        (changed("images", 0, file_name="gone.png"), r"gone.png does not exist; is .*images the"),
        ({"images": [], "annotations": []}, "the list 'images' is empty"),
    ],
)
def test_mistakes_in_the_records_are_named(
    tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    name = unique_name()
    files = write_instances(tmp_path / "set", **changes)
    register_instances_dataset(*files.row(name))
    with pytest.raises(UserError, match=words) as caught:
        load_instances_json(str(files.json_file), str(files.image_root))
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(str(files.json_file))
    with pytest.raises(UserError, match=words):
        load_dataset_dicts([name], filter_empty=False)
    paths = {"image_root": files.image_root, "json_file": files.json_file}
    errors = check_files(paths, Depth()).errors
    assert any(error.message in str(caught.value) for error in errors)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (changed("annotations", 3, iscrowd="0"), "iscrowd is '0'"),
        (changed("annotations", 3, area=None), "area is None"),
        (changed("annotations", 3, id=None), "entry 3 of the list 'annotations' has no 'id'"),
        ({"images": 3}, "the JSON has no list 'images'"),
    ],
)
def test_evaluation_refuses_the_values_that_training_refuses(
    tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    name = unique_name()
    files = write_instances(tmp_path / "set")
    register_instances_dataset(*files.row(name))
    files.json_file.write_text(json.dumps({**content(), **changes}))
    with pytest.raises(UserError, match=words):
        build_box_evaluator(name, str(tmp_path / "out"))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"categories": []}, "the list 'categories' is empty"),
        (
            {"categories": [{"id": 1, "name": "a"}, {"id": 1, "name": "b"}]},
            "2 categories have the id 1",
        ),
        ({"categories": [{"id": 1}]}, "has no 'name'"),
        ({"annotations": None}, "the JSON has no list 'annotations'"),
    ],
)
def test_mistakes_in_the_categories_show_at_registration(
    tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    name = unique_name()
    with pytest.raises(UserError, match=words) as caught:
        register_instances_dataset(*write_instances(tmp_path / "set", **changes).row(name))
    assert str(caught.value).count("boxes.json") == 1
    assert name not in DatasetCatalog


def test_paths(tmp_path: Path) -> None:
    name = unique_name()
    files = write_instances(tmp_path / "set")
    with pytest.raises(UserError, match=r"json_file '.*gone.json' does not exist"):
        register_instances_dataset(name, str(files.image_root), str(tmp_path / "gone.json"))
    register_instances_dataset(*files.row(name))
    register_instances_dataset(*files.row(name))
    with pytest.raises(UserError, match="already registered with other paths"):
        register_instances_dataset(name, str(tmp_path), str(files.json_file))


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (["a", "b"], r"\['a', 'b'\] is not a list of three texts \[name, image_root, json_file\]"),
        ("abc", "not a list of three texts"),
        (["a", "b", 3], "not a list of three texts"),
    ],
)
def test_wrong_rows(cfg: CfgNode, row: object, words: str) -> None:
    cfg.DATASETS.CUSTOM_INSTANCES = [row]
    with pytest.raises(UserError, match=f"DATASETS.CUSTOM_INSTANCES: .*{words}|{words}"):
        setup_datasets(cfg)


def test_masks_are_not_learned_from_boxes(
    cfg: CfgNode, tmp_path: Path, tiny_panoptic_dataset: TinyPanopticDataset
) -> None:
    name = unique_name()
    register_instances_dataset(*write_instances(tmp_path / "set").row(name))
    cfg.MODEL.MASK_ON = True
    cfg.DATASETS.TRAIN = (name,)
    cfg.MODEL.SEMANTIC_AUX.ENABLED = True
    changes = "set MODEL.MASK_ON False MODEL.SEMANTIC_AUX.ENABLED False to train on boxes"
    with pytest.raises(UserError, match=f"{name}' has no panoptic PNGs .* {changes}"):
        setup_datasets(cfg)
    cfg.DATASETS.TRAIN = (tiny_panoptic_dataset.name,)
    setup_datasets(cfg)
