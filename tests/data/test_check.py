"""The check of a run's data sets before the model is built."""

import logging
from pathlib import Path
from typing import Any

import pytest
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog

from batchformer_panoptic.data import check, setup_datasets
from batchformer_panoptic.data.check import check_before_run
from batchformer_panoptic.errors import UserError
from helpers.config_files import default_config
from helpers.data_faults import change, delete, only_crowds, set_value, write_sound_set


@pytest.fixture
def roots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Path]:
    monkeypatch.setenv("FVCORE_CACHE", str(tmp_path / "cache"))
    return {
        name: write_sound_set(tmp_path / name, seed) for seed, name in enumerate(("train", "val"))
    }


@pytest.fixture
def cfg(roots: dict[str, Path], tmp_path: Path) -> CfgNode:
    cfg = default_config()
    cfg.MODEL.META_ARCHITECTURE = "PanopticDETR"
    for key, (name, root) in zip(("TRAIN", "TEST"), roots.items(), strict=True):
        paths = [str(root / path) for path in ("images", "panoptic", "set.json")]
        cfg.DATASETS.CUSTOM_PANOPTIC.append([f"{name}_{tmp_path.name}", *paths])
        cfg.DATASETS[key] = (f"{name}_{tmp_path.name}",)
    cfg.DATALOADER.NUM_WORKERS = 0
    setup_datasets(cfg)
    return cfg


@pytest.fixture
def checked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The JSON files that are checked, one entry each time."""
    found: list[str] = []
    check_files = check.check_files

    def record(paths: Any, depth: Any) -> Any:
        found.append(Path(paths["panoptic_json"]).parent.name)
        return check_files(paths, depth)

    monkeypatch.setattr(check, "check_files", record)
    return found


def test_both_splits_are_checked_once(
    cfg: CfgNode, roots: dict[str, Path], checked: list[str]
) -> None:
    for _ in range(2):
        check_before_run(cfg, eval_only=False)
    assert checked == ["train", "val"]
    check_before_run(cfg, eval_only=True)
    assert checked == ["train", "val", "val"]
    # Another time of modification: the content may have changed.
    (roots["train"] / "panoptic/12.png").touch()
    check_before_run(cfg, eval_only=True)
    assert len(checked) == 3
    check_before_run(cfg, eval_only=False)
    assert len(checked) == 5


def test_an_error_is_never_kept(cfg: CfgNode, roots: dict[str, Path]) -> None:
    (roots["val"] / "panoptic/12.png").unlink()
    set_value("annotations.0.segments_info.0.area", 8)(roots["val"])
    for _ in range(2):
        with pytest.raises(UserError) as caught:
            check_before_run(cfg, eval_only=False)
        sentence = str(caught.value)
        assert sentence.startswith(f"{roots['val'] / 'set.json'}: 11.png, segment 70000: area is 8")
        assert sentence.endswith("(1 more: tools/check_dataset.py lists them)")


def test_the_check_can_be_left_out(
    cfg: CfgNode, roots: dict[str, Path], checked: list[str]
) -> None:
    (roots["val"] / "panoptic/12.png").unlink()
    cfg.DATASETS.CHECK = False
    check_before_run(cfg, eval_only=False)
    assert checked == []


def test_warnings_are_one_line_for_each_set_and_are_repeated(
    cfg: CfgNode, roots: dict[str, Path], caplog: pytest.LogCaptureFixture
) -> None:
    delete("annotations.0.segments_info.0.bbox")(roots["train"])
    delete("annotations.0.segments_info.0.area")(roots["train"])
    (roots["val"] / "images/11.jpg").write_bytes((roots["train"] / "images/11.jpg").read_bytes())
    for _ in range(2):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            check_before_run(cfg, eval_only=False)
        first, second = (record.message for record in caplog.records)
        train, val = cfg.DATASETS.TRAIN[0], cfg.DATASETS.TEST[0]
        explained = "tools/check_dataset.py explains these warnings"
        assert first == f"{train}: no area (1), no bbox (1); {explained}"
        assert second.startswith(f"1 images of {train} are in {val}, too")


def test_a_set_that_becomes_one_for_validation_is_checked_again(
    cfg: CfgNode, checked: list[str]
) -> None:
    first, second = cfg.DATASETS.TRAIN[0], cfg.DATASETS.TEST[0]
    cfg.DATASETS.TRAIN = (first, second)
    check_before_run(cfg, eval_only=False)
    assert len(checked) == 2
    cfg.DATASETS.TRAIN = (first,)
    # The same sets, but images in both of them are now in training and validation.
    check_before_run(cfg, eval_only=False)
    assert len(checked) == 4


def test_limits_of_the_model_are_compared_again_when_they_change(
    cfg: CfgNode, caplog: pytest.LogCaptureFixture
) -> None:
    check_before_run(cfg, eval_only=False)
    assert "more objects" not in caplog.text
    cfg.MODEL.DETR.NUM_OBJECT_QUERIES, cfg.TEST.DETECTIONS_PER_IMAGE = 1, 1
    for _ in range(2):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            check_before_run(cfg, eval_only=False)
        lines = [record.message for record in caplog.records]
        # A person and a wall in each image; the wall is no thing, so that AP is not affected.
        said = "2 of 2 images have more objects (up to 2, in 11.jpg) than the model has queries"
        names = (cfg.DATASETS.TRAIN[0], cfg.DATASETS.TEST[0])
        assert [line.partition(" (MODEL")[0] for line in lines] == [f"{n}: {said}" for n in names]


def test_a_training_without_targets_is_refused_and_an_evaluation_is_not(
    cfg: CfgNode, roots: dict[str, Path]
) -> None:
    for root in roots.values():
        change(only_crowds)(root)
    check_before_run(cfg, eval_only=True)
    with pytest.raises(UserError, match=r"no image of DATASETS.TRAIN \(train_.*nothing to learn"):
        check_before_run(cfg, eval_only=False)
    # One set with targets is enough.
    cfg.DATASETS.TRAIN = (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST)
    set_value("annotations.0.segments_info.0.iscrowd", 0)(roots["val"])
    check_before_run(cfg, eval_only=False)


def test_data_sets_of_other_formats_are_left_to_their_owners(
    cfg: CfgNode, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    name = f"other_{tmp_path.name}"
    DatasetCatalog.register(name, list)
    cfg.DATASETS.TRAIN = (name,)
    with caplog.at_level(logging.INFO):
        check_before_run(cfg, eval_only=False)
    assert f"{name} is not a local data set of a known format: not checked" in caplog.text
    DatasetCatalog.remove(name)
    MetadataCatalog.pop(name)


def test_a_cache_that_cannot_be_written_does_not_stop_a_run(
    cfg: CfgNode, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache/batchformer_panoptic").write_text("no folder")
    with caplog.at_level(logging.INFO):
        check_before_run(cfg, eval_only=False)
    assert "is not kept: cannot write" in caplog.text
