"""Reading and registering COCO-panoptic data sets, and the config that follows from them."""

import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from detectron2.config import CfgNode, get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog

from batchformer_panoptic.config import add_batchformer_panoptic_config
from batchformer_panoptic.data import load_panoptic_json, register_panoptic_dataset, setup_datasets
from batchformer_panoptic.errors import UserError

_numbers = itertools.count()


def unique_name() -> str:
    return f"test_registration_{next(_numbers)}"


@pytest.fixture
def cfg() -> CfgNode:
    cfg = get_cfg()
    add_batchformer_panoptic_config(cfg)
    return cfg


def test_dataset_dicts(tiny_panoptic_dataset: Any) -> None:
    dicts = DatasetCatalog.get(tiny_panoptic_dataset.name)
    assert [d["image_id"] for d in dicts] == [100, 101, 102, 103, 104]
    assert [(d["height"], d["width"]) for d in dicts[:2]] == [(48, 64), (40, 32)]
    assert dicts[0]["file_name"] == str(tiny_panoptic_dataset.image_root / "000.png")
    assert dicts[1]["file_name"] == str(tiny_panoptic_dataset.image_root / "001.jpg")
    assert dicts[1]["pan_seg_file_name"] == str(tiny_panoptic_dataset.panoptic_root / "001.png")
    assert dicts[4]["segments_info"] == []
    summary = [
        (s["id"], s["category_id"], s["isthing"], s["iscrowd"]) for s in dicts[0]["segments_info"]
    ]
    assert summary == [
        (1, 3, False, 0),
        (300, 1, False, 0),
        (70_000, 0, True, 1),
        (5, 0, True, 0),
        (6, 0, True, 0),
        (200_000, 2, True, 0),
    ]


def test_metadata(tiny_panoptic_dataset: Any) -> None:
    metadata = MetadataCatalog.get(tiny_panoptic_dataset.name)
    assert metadata.thing_classes == ["box", "ground", "disc", "sky"]
    assert metadata.stuff_classes == metadata.thing_classes
    assert metadata.thing_dataset_id_to_contiguous_id == {3: 0, 12: 2}
    assert metadata.stuff_dataset_id_to_contiguous_id == {3: 0, 7: 1, 12: 2, 90: 3}
    assert metadata.thing_colors[0] == [220, 20, 60]
    assert metadata.evaluator_type == "coco_panoptic_seg"
    assert (metadata.ignore_label, metadata.label_divisor) == (255, 1000)
    assert metadata.panoptic_json == str(tiny_panoptic_dataset.panoptic_json)


def test_registering_reads_categories_only_and_is_repeatable(
    tiny_panoptic_dataset: Any, tmp_path: Path
) -> None:
    _, image_root, panoptic_root, panoptic_json = tiny_panoptic_dataset.row
    content = json.loads(Path(panoptic_json).read_text())
    content["annotations"] = [{"image_id": "no such image"}]
    broken = tmp_path / "broken.json"
    broken.write_text(json.dumps(content))
    name = unique_name()
    register_panoptic_dataset(name, image_root, panoptic_root, str(broken))
    register_panoptic_dataset(name, image_root, panoptic_root, str(broken))
    with pytest.raises(UserError, match="no such image"):
        DatasetCatalog.get(name)
    with pytest.raises(UserError, match="already registered"):
        register_panoptic_dataset(name, image_root, panoptic_root, panoptic_json)


@pytest.mark.parametrize("wrong", [1, 2, 3])
def test_missing_path_is_named(tiny_panoptic_dataset: Any, wrong: int) -> None:
    row = [unique_name(), *tiny_panoptic_dataset.row[1:]]
    row[wrong] = "/nowhere/at_all"
    with pytest.raises(UserError, match="/nowhere/at_all"):
        register_panoptic_dataset(*row)
    assert row[0] not in DatasetCatalog


def test_paths_are_expanded(
    tiny_panoptic_dataset: Any, monkeypatch: pytest.MonkeyPatch, cfg: CfgNode
) -> None:
    root = tiny_panoptic_dataset.panoptic_json.parent
    monkeypatch.setenv("TINY_ROOT", str(root))
    monkeypatch.setenv("HOME", str(root))
    monkeypatch.chdir(root)
    name = unique_name()
    cfg.DATASETS.CUSTOM_PANOPTIC = [[name, "images", "~/png", "$TINY_ROOT/panoptic.json"]]
    setup_datasets(cfg)
    monkeypatch.chdir("/")
    assert len(DatasetCatalog.get(name)) == 5
    assert MetadataCatalog.get(name).image_root == str(root / "images")


def _drop_image(content: dict[str, Any]) -> None:
    del content["images"][1]


def _drop_segments_info(content: dict[str, Any]) -> None:
    del content["annotations"][1]["segments_info"]


def _unknown_category(content: dict[str, Any]) -> None:
    content["annotations"][1]["segments_info"][0]["category_id"] = 77


def _repeat_segment(content: dict[str, Any]) -> None:
    segments = content["annotations"][1]["segments_info"]
    segments[1]["id"] = segments[0]["id"]


def _void_segment(content: dict[str, Any]) -> None:
    content["annotations"][1]["segments_info"][0]["id"] = 0


def _repeat_image(content: dict[str, Any]) -> None:
    content["images"].append(content["images"][1])


def _repeat_annotation(content: dict[str, Any]) -> None:
    content["annotations"].append(content["annotations"][1])


def _no_file_name(content: dict[str, Any]) -> None:
    del content["images"][1]["file_name"]


def _no_image_file(content: dict[str, Any]) -> None:
    content["images"][0]["file_name"] = "lost.jpg"


def _no_annotations(content: dict[str, Any]) -> None:
    content["annotations"] = []


def _no_list(content: dict[str, Any]) -> None:
    del content["images"]


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (_drop_image, "001.png: image_id 101 is not among the images"),
        (_drop_segments_info, "001.png: annotation without a list 'segments_info'"),
        (_unknown_category, "001.png, segment 1: category_id 77 is not among the categories"),
        (_repeat_segment, "001.png, segment 1: 2 entries of segments_info have the id 1"),
        (_void_segment, "001.png: segment id 0 is not in 1"),
        (_repeat_image, "2 image records have the id 101"),
        (_repeat_annotation, "2 annotations have the image_id 101"),
        (_no_file_name, "101: image record without file_name"),
        (_no_image_file, "lost.jpg does not exist; is .* the right folder"),
        (_no_annotations, "the list 'annotations' is empty"),
        (_no_list, "no list 'images'"),
    ],
)
def test_damaged_json_is_explained(
    tiny_panoptic_dataset: Any,
    tmp_path: Path,
    damage: Callable[[dict[str, Any]], None],
    words: str,
) -> None:
    content = json.loads(tiny_panoptic_dataset.panoptic_json.read_text())
    damage(content)
    path = tmp_path / "damaged.json"
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match=words) as caught:
        load_panoptic_json(str(path), *tiny_panoptic_dataset.row[1:3])
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_not_json(tiny_panoptic_dataset: Any, tmp_path: Path) -> None:
    path = tmp_path / "text.json"
    path.write_text("{")
    with pytest.raises(UserError, match=r"text\.json is not valid JSON"):
        register_panoptic_dataset(unique_name(), *tiny_panoptic_dataset.row[1:3], str(path))


def test_unannotated_images_are_reported(
    tiny_panoptic_dataset: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    content = json.loads(tiny_panoptic_dataset.panoptic_json.read_text())
    del content["annotations"][2]
    path = tmp_path / "fewer.json"
    path.write_text(json.dumps(content))
    dicts = load_panoptic_json(str(path), *tiny_panoptic_dataset.row[1:3])
    assert [d["image_id"] for d in dicts] == [100, 101, 103, 104]
    assert "1 of 5 images have no annotation" in caplog.text


def test_setup_derives_the_classes(tiny_panoptic_dataset: Any, cfg: CfgNode) -> None:
    cfg.DATASETS.CUSTOM_PANOPTIC = [tiny_panoptic_dataset.row]
    cfg.DATASETS.TRAIN = (tiny_panoptic_dataset.name,)
    cfg.DATASETS.TEST = (tiny_panoptic_dataset.name,)
    setup_datasets(cfg)
    assert cfg.MODEL.DETR.NUM_CLASSES == 4
    assert cfg.MODEL.PANOPTIC.THING_CLASS_IDS == [0, 2]
    before = cfg.dump()
    setup_datasets(cfg)
    assert cfg.dump() == before


@pytest.mark.parametrize(
    ("names", "num_classes", "num_things"),
    [
        (("coco_2017_train_panoptic", "coco_2017_val_panoptic"), 133, 80),
        (("coco_2017_train", "coco_2017_val"), 80, 80),
    ],
)
def test_setup_knows_detectron2s_names_without_their_files(
    cfg: CfgNode, names: tuple[str, str], num_classes: int, num_things: int
) -> None:
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = names[:1], names[1:]
    setup_datasets(cfg)
    assert num_classes == cfg.MODEL.DETR.NUM_CLASSES
    assert list(range(num_things)) == cfg.MODEL.PANOPTIC.THING_CLASS_IDS


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("DATASETS.TRAIN", ("coco_2017_train_panoptik",), "did you mean coco_2017_train_panoptic"),
        ("DATASETS.TRAIN", ("zzz",), "CUSTOM_PANOPTIC"),
        ("DATASETS.TRAIN", ("coco_2017_val_panoptic_separated",), "separately"),
        ("DATASETS.TRAIN", ("coco_2017_train",), "80 classes against 133"),
        ("MODEL.DETR.NUM_CLASSES", 91, "have 133 classes"),
        ("MODEL.PANOPTIC.THING_CLASS_IDS", [1, 2], r"THING_CLASS_IDS is \[1, 2\]"),
        ("DATASETS.CUSTOM_PANOPTIC", [["a", "b", "c"]], "four texts"),
        ("DATASETS.CUSTOM_PANOPTIC", ["abcd"], "four texts"),
        ("DATASETS.CUSTOM_PANOPTIC", [["a", "b", "c", 4]], "four texts"),
    ],
)
def test_setup_refuses(cfg: CfgNode, key: str, value: object, words: str) -> None:
    cfg.DATASETS.TEST = ("coco_2017_val_panoptic",)
    cfg.merge_from_list([key, value])
    with pytest.raises(UserError, match=words):
        setup_datasets(cfg)


def test_setup_without_data_sets_leaves_the_config(cfg: CfgNode) -> None:
    cfg.MODEL.DETR.NUM_CLASSES = 7
    before = cfg.dump()
    setup_datasets(cfg)
    assert cfg.dump() == before


def test_box_data_set_that_learns_its_classes_when_read(cfg: CfgNode, tmp_path: Path) -> None:
    from detectron2.data.datasets import register_coco_instances

    path = tmp_path / "boxes.json"
    path.write_text(
        json.dumps(
            {
                "info": {},
                "images": [{"id": 1, "file_name": "a.png", "height": 4, "width": 4}],
                "annotations": [
                    {"id": 1, "image_id": 1, "category_id": 5, "bbox": [0, 0, 2, 2], "area": 4}
                ],
                "categories": [{"id": 5, "name": "five"}, {"id": 2, "name": "two"}],
            }
        )
    )
    name = unique_name()
    register_coco_instances(name, {}, str(path), str(tmp_path))
    cfg.DATASETS.TRAIN = (name,)
    setup_datasets(cfg)
    assert cfg.MODEL.DETR.NUM_CLASSES == 2
    assert cfg.MODEL.PANOPTIC.THING_CLASS_IDS == [0, 1]


def test_a_copy_elsewhere_reads_the_same(tiny_panoptic_dataset: Any, tmp_path: Path) -> None:
    root = tmp_path / "copy"
    shutil.copytree(tiny_panoptic_dataset.panoptic_json.parent, root)
    dicts = load_panoptic_json(str(root / "panoptic.json"), str(root / "images"), str(root / "png"))
    original = DatasetCatalog.get(tiny_panoptic_dataset.name)
    assert [d["segments_info"] for d in dicts] == [d["segments_info"] for d in original]
    assert all(d["file_name"].startswith(str(root)) for d in dicts)
