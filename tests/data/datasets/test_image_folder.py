"""Image folders: registration, classes, and the errors of unusable ones."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from detectron2.config import CfgNode, get_cfg
from detectron2.data import MetadataCatalog

from batchformer_panoptic import add_batchformer_panoptic_config, register_image_folder
from batchformer_panoptic.data import (
    ClassTable,
    load_dataset_dicts,
    register_instances_dataset,
    setup_datasets,
)
from batchformer_panoptic.errors import UserError
from helpers.image_folders import CLASSES, unique_name, write_image_folder


@pytest.fixture
def cfg() -> CfgNode:
    cfg = get_cfg()
    add_batchformer_panoptic_config(cfg)
    cfg.MODEL.META_ARCHITECTURE = "ImageClassifier"
    return cfg


def name_in(cfg: CfgNode, root: Path, *splits: str) -> str:
    name = unique_name()
    cfg.DATASETS.CUSTOM_IMAGE_FOLDERS = [
        *cfg.DATASETS.CUSTOM_IMAGE_FOLDERS,
        [name, str(root)],
    ]
    for split in splits:
        cfg.DATASETS[split] = (*cfg.DATASETS[split], name)
    return name


def test_setup_registers_and_derives_the_classes(cfg: CfgNode, tmp_path: Path) -> None:
    name = name_in(cfg, write_image_folder(tmp_path / "set"), "TRAIN", "TEST")
    setup_datasets(cfg)
    assert cfg.MODEL.CLASSIFIER.NUM_CLASSES == 3
    assert (cfg.MODEL.DETR.NUM_CLASSES, cfg.MODEL.PANOPTIC.THING_CLASS_IDS) == (0, [])
    metadata = MetadataCatalog.get(name)
    assert metadata.evaluator_type == "classification"
    assert metadata.classes == list(CLASSES)
    assert ClassTable.from_metadata(metadata).names == CLASSES
    before = cfg.dump()
    setup_datasets(cfg)
    assert cfg.dump() == before


def test_images_have_ids_and_labels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = write_image_folder(tmp_path / "set")
    (root / "bee" / "notes.txt").write_text("no image")
    (root / "bee" / "more").mkdir()
    os.replace(root / "bee" / "2.png", root / "bee" / "more" / "2.PNG")
    (root / ".cache").mkdir()  # no class
    (root / "readme.md").write_text("no class either")
    monkeypatch.setenv("SOMEWHERE", str(tmp_path))
    name = unique_name()
    register_image_folder(name, "$SOMEWHERE/set")
    records = load_dataset_dicts([name], filter_empty=False)
    assert [record["image_id"] for record in records] == list(range(6))
    assert [record["label"] for record in records] == [0, 0, 1, 1, 1, 2]
    found = [str(Path(record["file_name"]).relative_to(root)) for record in records]
    bees = ["bee/0.png", "bee/1.jpg", "bee/more/2.PNG"]
    assert found == ["ant/0.png", "ant/1.jpg", *bees, "cat/0.png"]


def test_a_name_is_taken_once(tmp_path: Path) -> None:
    root, name = write_image_folder(tmp_path / "set"), unique_name()
    register_image_folder(name, str(root))
    register_image_folder(name, str(root))
    with pytest.raises(UserError, match="already registered with other paths"):
        register_image_folder(name, str(tmp_path))


def use(name: str, root: Path) -> None:
    register_image_folder(name, str(root))
    load_dataset_dicts([name], filter_empty=False)


def no_such_root(root: Path) -> None:
    os.replace(root, root.with_name("moved"))


def no_folders(root: Path) -> None:
    no_such_root(root)
    root.mkdir()
    (root / "0.png").write_bytes(b"")
    (root / ".git").mkdir()


def a_file(root: Path) -> None:
    no_such_root(root)
    root.write_text("")


def empty_class(root: Path) -> None:
    (root / "wasp").mkdir()
    (root / "wasp" / "picture.gif").write_bytes(b"")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (no_such_root, r"image_root '.*set' does not exist; correct the path"),
        (no_folders, "set: an image folder holds one folder for each class"),
        (a_file, "set: an image folder holds one folder for each class"),
        (empty_class, r"class folder 'wasp' has no images \(1 of 4 folders are empty\)"),
    ],
)
def test_unusable_folders_are_reported(
    tmp_path: Path, spoil: Callable[[Path], None], message: str
) -> None:
    root, name = write_image_folder(tmp_path / "set"), unique_name()
    spoil(root)
    with pytest.raises(UserError, match=message) as error:
        use(name, root)
    assert "\n" not in str(error.value)


def test_a_folder_that_is_removed_later_is_reported(tmp_path: Path) -> None:
    root, name = write_image_folder(tmp_path / "set"), unique_name()
    register_image_folder(name, str(root))
    no_such_root(root)
    with pytest.raises(UserError, match="does not exist"):
        load_dataset_dicts([name], filter_empty=False)


def test_train_and_test_share_their_classes(cfg: CfgNode, tmp_path: Path) -> None:
    name_in(cfg, write_image_folder(tmp_path / "train"), "TRAIN")
    other = write_image_folder(tmp_path / "val")
    os.replace(other / "bee", other / "wasp")
    name_in(cfg, other, "TEST")
    with pytest.raises(UserError, match=r"class 1 is 'bee' against 'cat'"):
        setup_datasets(cfg)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"MODEL.CLASSIFIER.NUM_CLASSES": 1000}, r"MODEL\.CLASSIFIER\.NUM_CLASSES is 1000, but"),
        ({"MODEL.META_ARCHITECTURE": "PanopticDETR"}, "has one label for each image, and MODEL"),
        ({"MODEL.MASK_ON": True}, "MASK_ON needs masks"),
        ({"DATASETS.CUSTOM_IMAGE_FOLDERS": [["a", "b", "c"]]}, r"list of two texts \[name, root\]"),
    ],
)
def test_settings_that_do_not_fit(
    cfg: CfgNode, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    name_in(cfg, write_image_folder(tmp_path / "set"), "TRAIN", "TEST")
    cfg.merge_from_list([word for pair in changes.items() for word in pair])
    with pytest.raises(UserError, match=message):
        setup_datasets(cfg)


def test_a_classifier_cannot_learn_from_boxes(cfg: CfgNode, tmp_path: Path) -> None:
    from helpers.instance_files import write_instances

    name = unique_name()
    register_instances_dataset(*write_instances(tmp_path / "set").row(name))
    cfg.DATASETS.TRAIN = (name,)
    with pytest.raises(UserError, match="has segments or boxes, and MODEL"):
        setup_datasets(cfg)


def test_an_unknown_name_shows_how_to_add_a_folder(cfg: CfgNode) -> None:
    cfg.DATASETS.TRAIN = ("nobody_knows",)
    with pytest.raises(UserError, match=r"CUSTOM_IMAGE_FOLDERS as \[name, root\]"):
        setup_datasets(cfg)
