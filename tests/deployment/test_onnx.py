"""Exported graphs against the model, for sizes and batches that the export has not seen."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor

from batchformer_panoptic.deployment.onnx import export_pt2
from batchformer_panoptic.deployment.runtime import Predictor
from helpers.exported_models import PANOPTIC, TABLE, description_of, exported
from helpers.tiny_model import MASK2FORMER, random_inputs, tiny_model

BOXES_ONLY = {"MODEL__MASK_ON": False}
MODELS: dict[str, dict[str, Any]] = {
    "detr": {},
    "conditional": {},
    "smca": {},
    "smca_multiscale": {
        "MODEL__SMCA__IN_FEATURES": ["res2", "res3", "res4"],
        "MODEL__DETR__IN_FEATURE": "res4",
    },
    "deformable": {},
    "deformable two-stage": {
        "MODEL__DEFORMABLE__TWO_STAGE": True,
        "MODEL__DEFORMABLE__BOX_REFINE": True,
        "MODEL__DETR__SCORING": "focal",
    },
    "mask2former": MASK2FORMER,
}
# Of one image; of three that are padded to a common size.
BATCHES = [[(61, 90)], [(64, 64)], [(75, 52), (40, 80), (66, 66)]]


# An export takes ten seconds or more.
EACH = [pytest.param(name, marks=pytest.mark.slow) for name in MODELS]


def overrides_of(name: str) -> dict[str, Any]:
    one = {"MODEL__DETR__TRANSFORMER_NAME": name.split()[0], "MODEL__DETR__ENC_LAYERS": 1}
    return one | MODELS[name]


def session_of(folder: Path) -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(folder / "model.onnx")


def padded(inputs: list[dict[str, Any]], divisor: int) -> dict[str, Any]:
    sizes = [tuple(entry["image"].shape[1:]) for entry in inputs]
    height, width = (-(-max(axis) // divisor) * divisor for axis in zip(*sizes, strict=True))
    images = np.full((len(inputs), 3, height, width), 99, np.float32)
    for image, entry in zip(images, inputs, strict=True):
        h, w = entry["image"].shape[1:]
        image[:, :h, :w] = entry["image"].numpy()
    return {"images": images, "image_sizes": np.array(sizes, np.int64)}


def bytes_of_weights(folder: Path) -> int:
    graph = onnx.load(folder / "model.onnx").graph
    return sum(onnx.numpy_helper.to_array(weight).nbytes for weight in graph.initializer)


def run(session: onnxruntime.InferenceSession, feeds: dict[str, Any]) -> dict[str, Tensor]:
    names = [output.name for output in session.get_outputs()]
    values = session.run(None, feeds)
    return {name: torch.from_numpy(value) for name, value in zip(names, values, strict=True)}


@pytest.mark.parametrize("name", EACH)
def test_raw_predictions_of_every_transformer(tmp_path: Path, name: str) -> None:
    model = exported(tmp_path, outputs="raw", **overrides_of(name))
    session = session_of(tmp_path)
    for sizes in BATCHES:
        inputs = random_inputs(sizes)
        feeds = padded(inputs, model.size_divisibility)
        found = run(session, feeds)
        with torch.no_grad():
            images = model.preprocess(inputs)
            features = model.backbone(images.tensor)
            predictions = model.predict(
                features, images.image_sizes, tuple(images.tensor.shape[-2:])
            )
            batch, queries = predictions.logits.shape[1:3]
            masks = predictions.last_masks(
                torch.arange(batch).repeat_interleave(queries), torch.arange(queries).repeat(batch)
            )
        expected = {"logits": predictions.logits[-1], "masks": masks.unflatten(0, (batch, queries))}
        if predictions.boxes is not None:
            expected["boxes"] = predictions.boxes[-1]
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            torch.testing.assert_close(found[key], value, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", EACH)
def test_segments_of_every_transformer(tmp_path: Path, name: str) -> None:
    overrides = PANOPTIC | overrides_of(name) | {"MODEL__DETR__PAD_IN_TEST": True}
    # With a sigmoid for each class every query of a random model is an object.
    overrides |= {"MODEL__DETR__SCORING": "focal", "MODEL__PANOPTIC__SCORE_THRESHOLD_TEST": 0.0}
    model = exported(tmp_path, **overrides)
    session = session_of(tmp_path)
    pixels = different = segments = 0
    for sizes in BATCHES:
        inputs = random_inputs(sizes)
        for entry in inputs:
            entry["height"] += 21
        outputs = [(entry["height"], entry["width"]) for entry in inputs]
        found = run(
            session,
            padded(inputs, model.size_divisibility)
            | {
                "output_sizes": np.array(outputs, np.int64),
                "score_threshold": np.array(0.0, np.float32),
            },
        )
        for i, result in enumerate(model(inputs)):
            expected_map, expected = result["panoptic_seg"]
            height, width = outputs[i]
            different += int((found["segment_map"][i, :height, :width] != expected_map).sum())
            pixels += height * width
            segments += len(expected)
            assert not found["areas"][i, len(expected) :].any()
            assert found["labels"][i, : len(expected)].tolist() == [
                segment["category_id"] for segment in expected
            ]
            torch.testing.assert_close(
                found["scores"][i, : len(expected)],
                torch.tensor([segment["score"] for segment in expected]),
                atol=1e-4,
                rtol=1e-4,
            )
    assert segments > 0
    assert different <= pixels / 5000  # where masks of random weights tie


@pytest.mark.slow
@pytest.mark.parametrize("name", ["detr", "deformable two-stage"])
def test_boxes_of_a_model_without_masks(tmp_path: Path, name: str) -> None:
    focal = {"MODEL__DETR__SCORING": "focal", "MODEL__DETR__PAD_IN_TEST": True}
    model = exported(tmp_path, **overrides_of(name) | BOXES_ONLY | focal)
    session = session_of(tmp_path)
    inputs = random_inputs(BATCHES[2])
    outputs = [(entry["height"], entry["width"]) for entry in inputs]
    feeds = padded(inputs, model.size_divisibility) | {
        "output_sizes": np.array(outputs, np.int64),
        "score_threshold": np.array(0.0, np.float32),
    }
    found = run(session, feeds)
    for i, result in enumerate(model(inputs)):
        expected = result["instances"]
        count = len(expected)
        assert count > 0
        assert int((found["scores"][i] > 0).sum()) == count
        torch.testing.assert_close(found["scores"][i, :count], expected.scores)
        assert found["labels"][i, :count].tolist() == expected.pred_classes.tolist()
        torch.testing.assert_close(
            found["boxes"][i, :count], expected.pred_boxes.tensor, atol=1e-3, rtol=1e-4
        )


@pytest.mark.slow
@pytest.mark.parametrize("name", ["detr", "mask2former"])
def test_float16_halves_the_weights(tmp_path: Path, name: str) -> None:
    overrides = overrides_of(name)
    exported(tmp_path, outputs="raw", **overrides)
    precise, size = session_of(tmp_path), bytes_of_weights(tmp_path)
    exported(tmp_path, outputs="raw", float16=True, **overrides)
    half = session_of(tmp_path)
    assert bytes_of_weights(tmp_path) < 0.65 * size  # norms, biases and tables stay as they are
    feeds = padded(random_inputs(BATCHES[2]), 32)
    for key, value in run(precise, feeds).items():
        found = run(half, feeds)[key]
        assert found.dtype == torch.float32
        assert (found - value).abs().max() <= 0.02 * value.abs().max()
        assert (found != value).any()


@pytest.mark.slow
def test_a_graph_of_one_size(tmp_path: Path) -> None:
    exported(tmp_path, size=(64, 96), **PANOPTIC)
    assert session_of(tmp_path).get_inputs()[0].shape[2:] == [64, 96]
    photo = np.random.default_rng(0).integers(0, 256, (50, 40, 3), np.uint8)
    found = Predictor.load(tmp_path / "model.onnx", score_threshold=0.0).predict(photo)
    assert found.segment_map is not None
    assert found.segment_map.shape == (50, 40)
    assert found.segments


@pytest.mark.slow
def test_pt2_runs_in_pytorch(tmp_path: Path) -> None:
    overrides = PANOPTIC | {"MODEL__DETR__PAD_IN_TEST": True}
    model = tiny_model(**overrides).eval()
    export_pt2(model, description_of(model, **overrides), tmp_path / "model.pt2")
    extra = {"description.json": ""}
    graph = torch.export.load(tmp_path / "model.pt2", extra_files=extra).module()
    assert TABLE.names[0] in extra["description.json"]
    inputs = random_inputs(BATCHES[2])
    feeds = {
        key: torch.from_numpy(value)
        for key, value in padded(inputs, model.size_divisibility).items()
    }
    found = graph(feeds["images"], feeds["image_sizes"], feeds["image_sizes"], torch.tensor(0.2))
    for i, result in enumerate(model(inputs)):
        expected = result["panoptic_seg"][0]
        height, width = expected.shape
        assert (found["segment_map"][i, :height, :width] == expected).all()
