"""Box AP on handmade annotations: perfect, missing and wrong predictions."""

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2.data import MetadataCatalog
from detectron2.structures import Boxes, Instances

from batchformer_panoptic.data import register_instances_dataset
from batchformer_panoptic.errors import UserError
from batchformer_panoptic.evaluation import build_box_evaluator
from batchformer_panoptic.evaluation.coco_ap import completed
from helpers.instance_files import SIZES, content, write_instances

CLASS_OF_CATEGORY = {4: 0, 9: 1}


def predictions(annotations: list[dict[str, Any]], swap_classes: bool = False) -> list[Any]:
    outputs = []
    for k, size in enumerate(SIZES):
        mine = [a for a in annotations if a["image_id"] == 10 + k and not a["iscrowd"]]
        instances = Instances(size)
        xywh = torch.tensor([a["bbox"] for a in mine], dtype=torch.float32).view(-1, 4)
        instances.pred_boxes = Boxes(torch.cat([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], 1))
        instances.scores = torch.linspace(0.9, 0.5, len(mine))
        classes = torch.tensor([CLASS_OF_CATEGORY[a["category_id"]] for a in mine])
        instances.pred_classes = (1 - classes if swap_classes else classes).long()
        outputs.append({"instances": instances})
    return outputs


def ap(name: str, output_dir: Path, outputs: list[Any]) -> dict[str, float]:
    evaluator = build_box_evaluator(name, str(output_dir))
    evaluator.reset()
    for k, output in enumerate(outputs):
        evaluator.process([{"image_id": 10 + k}], [output])
    return evaluator.evaluate()["bbox"]


@pytest.fixture
def name(tmp_path: Path) -> str:
    name = f"box_ap_{tmp_path.name}_{id(tmp_path)}"
    register_instances_dataset(*write_instances(tmp_path / "set").row(name))
    return name


def test_perfect_boxes_score_100(name: str, tmp_path: Path) -> None:
    result = ap(name, tmp_path / "out", predictions(content()["annotations"]))
    assert result["AP"] == pytest.approx(100.0)
    assert result["AP-cat"] == result["AP-dog"] == pytest.approx(100.0)


def test_wrong_classes_score_nothing_and_no_boxes_nothing_at_all(name: str, tmp_path: Path) -> None:
    annotations = content()["annotations"]
    assert ap(name, tmp_path / "out", predictions(annotations, swap_classes=True))["AP"] == 0.0
    assert math.isnan(ap(name, tmp_path / "out", predictions([]))["AP"])


def test_the_users_files_and_metadata_stay_as_they_are(name: str, tmp_path: Path) -> None:
    metadata = copy.deepcopy(MetadataCatalog.get(name).as_dict())
    before = Path(metadata["json_file"]).read_bytes()
    names = set(MetadataCatalog.list())
    ap(name, tmp_path / "out", predictions(content()["annotations"]))
    assert MetadataCatalog.get(name).as_dict() == metadata
    assert Path(metadata["json_file"]).read_bytes() == before
    assert set(MetadataCatalog.list()) == names


@pytest.mark.parametrize(("max_detections", "expected"), [(100, 66), (150, 100)])
def test_ap_counts_more_than_100_detections_if_the_model_returns_them(
    tmp_path: Path, max_detections: int, expected: int
) -> None:
    annotations = [
        {"image_id": 10, "category_id": 9, "bbox": [k % 15 * 4, k // 15 * 4, 4, 4], "iscrowd": 0}
        for k in range(150)
    ]
    numbered = [{**annotation, "id": k + 1} for k, annotation in enumerate(annotations)]
    name = f"box_ap_many_{max_detections}_{id(tmp_path)}"
    register_instances_dataset(*write_instances(tmp_path / "set", annotations=numbered).row(name))
    evaluator = build_box_evaluator(name, str(tmp_path / "out"), max_detections=max_detections)
    evaluator.reset()
    evaluator.process([{"image_id": 10}], predictions(annotations)[:1])
    assert evaluator.evaluate()["bbox"]["AP"] == pytest.approx(expected, abs=0.5)


def test_what_is_completed() -> None:
    original = content()
    before = copy.deepcopy(original)
    new = completed(original)
    assert original == before
    assert new is not None
    assert [a["id"] for a in new["annotations"]] == [1, 2, 3, 4, 5, 6]
    assert [a["area"] for a in new["annotations"][:3]] == [120, 280, 240]
    assert [a["iscrowd"] for a in new["annotations"][:3]] == [0, 0, 1]
    assert completed(new) is None
    without_area = [{k: v for k, v in a.items() if k != "area"} for a in new["annotations"]]
    without_area[0]["id"] = 70
    again = completed({**new, "annotations": without_area})
    assert again is not None
    assert [a["id"] for a in again["annotations"]] == [70, 2, 3, 4, 5, 6]


def test_complete_annotations_are_used_as_they_are(tmp_path: Path) -> None:
    files = write_instances(tmp_path / "set", **(completed(content()) or {}))
    name = f"box_ap_complete_{id(tmp_path)}"
    register_instances_dataset(*files.row(name))
    result = ap(name, tmp_path / "out", predictions(content()["annotations"]))
    assert result["AP"] == pytest.approx(100.0)
    assert not (tmp_path / "out" / "annotations_completed.json").exists()


def test_annotations_that_cannot_be_read(name: str, tmp_path: Path) -> None:
    path = Path(MetadataCatalog.get(name).json_file)
    for text, words in (
        ("{", "is not valid JSON"),
        (json.dumps({"annotations": [{"id": 1}]}), "image_id None is not among the images"),
        (json.dumps([1]), "holds a list"),
    ):
        path.write_text(text)
        with pytest.raises(UserError, match=words) as caught:
            build_box_evaluator(name, str(tmp_path))
        assert "\n" not in str(caught.value)


def test_a_data_set_without_json_shows_how_to_register_it(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"names no 'json_file': register it with DATASETS\.CUSTOM"):
        build_box_evaluator("box_ap_without_json", str(tmp_path))
    MetadataCatalog.pop("box_ap_without_json")
