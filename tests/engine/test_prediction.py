"""Prediction: segments by name, drawing, supervision; the truth predicted scores PQ 100."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from panopticapi.evaluation import pq_compute

from batchformer_panoptic import Predictor
from batchformer_panoptic.data import ClassTable, load_dataset_dicts
from batchformer_panoptic.data.images import read_image
from batchformer_panoptic.data.segment_maps import read_segment_map
from batchformer_panoptic.engine.prediction import (
    PredictedSegment,
    Prediction,
    PredictionFolder,
    image_ids_of,
)
from batchformer_panoptic.errors import UserError
from helpers.tiny_dataset import TinyPanopticDataset
from helpers.trained_files import Run, write_run

TABLE = ClassTable(
    names=("box", "ground"),
    is_thing=(True, False),
    colors=((220, 20, 60), (110, 200, 110)),
    dataset_ids=(3, 7),
)


def hand_made() -> Prediction:
    segment_map = torch.zeros(6, 8, dtype=torch.int32)
    segment_map[3:] = 1
    segment_map[1:3, 2:7] = 2
    infos = [
        {"id": 1, "category_id": 1, "isthing": False, "area": 24, "score": 0.75},
        {"id": 2, "category_id": 0, "isthing": True, "area": 10, "score": 0.5},
    ]
    image = np.full((6, 8, 3), 100, dtype=np.uint8)
    return Prediction(image, {"panoptic_seg": (segment_map, infos)}, TABLE)


def test_segments_have_names_scores_areas_and_boxes() -> None:
    assert hand_made().segments == [
        PredictedSegment(1, 1, "ground", False, 0.75, 24, (0, 3, 8, 3)),
        PredictedSegment(2, 0, "box", True, 0.5, 10, (2, 1, 5, 2)),
    ]


def test_a_prediction_is_drawn_in_the_size_of_the_photograph() -> None:
    assert hand_made().draw().shape == (6, 8, 3)
    assert hand_made().draw(scale=None).shape == (384, 512, 3)


def test_supervision_gets_boxes_and_masks() -> None:
    supervision = pytest.importorskip("supervision")
    found = hand_made().to_supervision()
    assert isinstance(found, supervision.Detections)
    np.testing.assert_array_equal(found.xyxy, [[0, 3, 8, 6], [2, 1, 7, 3]])
    np.testing.assert_array_equal(found.mask.sum(axis=(1, 2)), [24, 10])
    np.testing.assert_array_equal(found.confidence, [0.75, 0.5])
    assert found.class_id.tolist() == [1, 0]
    assert found["class_name"].tolist() == ["ground", "box"]


def test_supervision_of_an_empty_prediction() -> None:
    pytest.importorskip("supervision")
    result = {"panoptic_seg": (torch.zeros(6, 8, dtype=torch.int32), [])}
    found = Prediction(np.zeros((6, 8, 3), dtype=np.uint8), result, TABLE).to_supervision()
    assert len(found) == 0


def test_supervision_is_named_where_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(name: str) -> Any:
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr("batchformer_panoptic.engine.prediction.import_module", refuse)
    with pytest.raises(UserError, match=r"needs supervision.*pip install"):
        hand_made().to_supervision()


@pytest.fixture
def run(tmp_path: Path, tiny_panoptic_dataset: TinyPanopticDataset) -> Run:
    return write_run(tmp_path / "run", tiny_panoptic_dataset)


def test_a_predictor_is_loaded_from_its_files(
    run: Run, tmp_path: Path, tiny_panoptic_dataset: TinyPanopticDataset
) -> None:
    image = tiny_panoptic_dataset.image_root / "000.png"
    prediction = Predictor.load(run.weights).predict(image)
    assert prediction.segments
    for segment in prediction.segments:
        assert (prediction.segment_map == segment.id).sum() == segment.area
        assert run.table.names[segment.class_id] == segment.class_name
    moved = tmp_path / "elsewhere.pth"
    run.weights.rename(moved)
    with pytest.raises(UserError, match=r"config\.yaml does not exist"):
        Predictor.load(moved)
    again = Predictor.load(moved, run.config_file, opts=["MODEL.DEVICE", "cpu"])
    assert again.predict(read_image(image)).segments == prediction.segments
    assert Predictor.load(moved, run.config_file, score_threshold=1.0).predict(image).segments == []


def test_the_identity_tells_models_apart(run: Run) -> None:
    first = Predictor.load(run.weights).identity
    assert Predictor.load(run.weights, opts=["OUTPUT_DIR", "other"]).identity == first
    other = Predictor.load(run.weights, score_threshold=0.123).identity
    assert other["weights"] == first["weights"]
    assert other["settings"] != first["settings"]
    checkpoint = torch.load(run.weights, weights_only=True)
    torch.save({**checkpoint, "note": "changed"}, run.weights)
    assert Predictor.load(run.weights).identity["weights"] != first["weights"]


def truth_as_result(dataset_dict: dict[str, Any]) -> dict[str, Any]:
    """The annotation without its crowds, as a model would predict it."""
    segments = [s for s in dataset_dict["segments_info"] if not s["iscrowd"]]
    true_map = read_segment_map(dataset_dict["pan_seg_file_name"])
    segment_map = np.zeros_like(true_map)
    for number, segment in enumerate(segments, 1):
        segment_map[true_map == segment["id"]] = number
    infos = [
        {"id": number, "category_id": segment["category_id"], "score": 1.0}
        for number, segment in enumerate(segments, 1)
    ]
    return {"panoptic_seg": (torch.from_numpy(segment_map), infos)}


def test_the_truth_predicted_scores_100_with_panopticapi(
    run: Run, tmp_path: Path, tiny_panoptic_dataset: TinyPanopticDataset
) -> None:
    data, out = tiny_panoptic_dataset, tmp_path / "out"
    dicts = load_dataset_dicts([data.name], filter_empty=False)
    with PredictionFolder(out, data.image_root, run.table, {}, overlays=False) as folder:
        for dataset_dict in dicts:
            image = read_image(dataset_dict["file_name"])
            prediction = Prediction(image, truth_as_result(dataset_dict), run.table)
            folder.add(dataset_dict["file_name"], prediction)
        images = [dataset_dict["file_name"] for dataset_dict in dicts]
        folder.finish(images, image_ids_of(str(data.panoptic_json)))
    assert len(json.loads((out / "panoptic.json").read_text())["annotations"]) == len(dicts)
    things = [
        segment["category_id"]
        for dataset_dict in dicts
        for segment in truth_as_result(dataset_dict)["panoptic_seg"][1]
        if run.table.is_thing[segment["category_id"]]
    ]
    instances = json.loads((out / "instances.json").read_text())
    assert [a["category_id"] for a in instances["annotations"]] == [
        run.table.dataset_ids[class_id] for class_id in things
    ]
    assert [category["name"] for category in instances["categories"]] == ["box", "disc"]
    found = pq_compute(
        str(data.panoptic_json),
        str(out / "panoptic.json"),
        str(data.panoptic_root),
        str(out / "panoptic"),
    )
    assert found["All"] == {"pq": 1.0, "sq": 1.0, "rq": 1.0, "n": 4}
