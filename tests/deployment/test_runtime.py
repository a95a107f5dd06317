"""The program beside an exported model: without torch, with the results of the model itself."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from PIL import Image

from batchformer_panoptic import PanopticDETR
from batchformer_panoptic.data import PanopticDatasetMapper
from batchformer_panoptic.deployment import runtime
from batchformer_panoptic.deployment.runtime import ModelError, Predictor, main, read_image
from helpers.exported_models import PANOPTIC, TABLE, exported
from helpers.tiny_model import tiny_cfg

SETTINGS = PANOPTIC | {"INPUT__MIN_SIZE_TEST": 64, "INPUT__MAX_SIZE_TEST": 90}
WITHOUT_TORCH = """
import runpy, sys
for name in ("torch", "detectron2", "batchformer_panoptic", "onnx", "cv2"):
    sys.modules[name] = None
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture(name="folder", scope="module")
def _folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("deployed")


@pytest.fixture(name="model", scope="module", autouse=True)
def _model(folder: Path) -> PanopticDETR:
    generator = np.random.default_rng(0)
    coarse = generator.integers(0, 256, (9, 13, 3), np.uint8)
    Image.fromarray(coarse).resize((131, 90)).save(folder / "photo.png")
    return exported(folder, **SETTINGS)


def test_segments_are_those_of_the_model(model: PanopticDETR, folder: Path) -> None:
    prediction = Predictor.load(folder / "model.onnx").predict(folder / "photo.png")
    mapper = PanopticDatasetMapper(tiny_cfg(**SETTINGS), is_train=False)
    bgr = np.asarray(Image.open(folder / "photo.png").convert("RGB"))[:, :, ::-1]
    expected_map, expected = model([mapper.map_image(bgr)])[0]["panoptic_seg"]
    assert prediction.segment_map is not None
    assert prediction.segment_map.shape == (90, 131)
    assert (prediction.segment_map != expected_map.numpy()).mean() <= 1e-4
    assert [s.class_id for s in prediction.segments] == [s["category_id"] for s in expected]
    for segment in prediction.segments:
        rows, columns = (prediction.segment_map == segment.id).nonzero()
        x, y, width, height = segment.bbox_xywh
        assert (x, y) == (columns.min(), rows.min())
        assert (x + width, y + height) == (columns.max() + 1, rows.max() + 1)
        assert segment.area == len(rows)
        assert segment.class_name == TABLE.names[segment.class_id]


def test_metadata_describe_the_model(folder: Path) -> None:
    model = onnx.load(folder / "model.onnx")
    described = json.loads({p.key: p.value for p in model.metadata_props}[runtime.METADATA_KEY])
    assert [entry["name"] for entry in described["classes"]] == list(TABLE.names)
    assert described["pixel_mean"] == [128.0] * 3
    assert described["outputs"] == "results"
    assert {node.domain for node in model.graph.node} <= {"", "ai.onnx"}
    assert "GridSample" not in {node.op_type for node in model.graph.node}
    assert (folder / "predict.py").read_text() == Path(runtime.__file__).read_text()


def test_the_command_needs_no_torch(folder: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", WITHOUT_TORCH, "predict.py", "model.onnx", "photo.png"]
    done = subprocess.run(
        [*command, "--output", str(tmp_path)], cwd=folder, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    entries = json.loads((tmp_path / "photo.json").read_text())
    ids = np.asarray(Image.open(tmp_path / "photo.png")).astype(int) @ [1, 256, 65536]
    assert entries
    for entry in entries:
        assert (ids == entry["id"]).sum() == entry["area"]
        assert entry["category_id"] in TABLE.dataset_ids
    assert Image.open(tmp_path / "photo_overlay.jpg").size == (131, 90)


def test_a_higher_threshold_keeps_fewer_segments(folder: Path) -> None:
    everything = Predictor.load(folder / "model.onnx", score_threshold=0.0)
    nothing = Predictor.load(folder / "model.onnx", score_threshold=1.0)
    assert everything.predict(folder / "photo.png").segments
    found = nothing.predict(folder / "photo.png")
    assert found.segments == []
    assert found.segment_map is not None
    assert not found.segment_map.any()
    assert found.overlay().size == (131, 90)


def test_mistakes_get_one_line(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, photo = str(folder / "model.onnx"), str(folder / "photo.png")
    damaged = tmp_path / "damaged.onnx"
    damaged.write_bytes((folder / "model.onnx").read_bytes()[:1000])
    other = tmp_path / "other.onnx"
    content = onnx.load(folder / "model.onnx")
    del content.metadata_props[:]
    onnx.save(content, other)
    (tmp_path / "empty.jpg").touch()
    (tmp_path / "nothing").mkdir()
    cases = {
        "damaged.onnx cannot be loaded": [str(damaged), photo],
        "missing.onnx cannot be loaded": [str(tmp_path / "missing.onnx"), photo],
        "not exported by batchformer_panoptic": [str(other), photo],
        "empty.jpg cannot be read": [model, str(tmp_path / "empty.jpg")],
        "no image in": [model, str(tmp_path / "nothing")],
        "must be from 0 to 1": [model, photo, "--score-threshold", "2"],
    }
    for message, arguments in cases.items():
        assert main([*arguments, "--output", str(tmp_path / "out")]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert len(error.splitlines()) == 1


def test_images_are_rotated_and_deep_ones_scaled(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (30, 20)).save(tmp_path / "turned.jpg", exif=exif)
    assert read_image(tmp_path / "turned.jpg").size == (20, 30)
    values = np.array([[0, 256, 65535]], np.uint16)
    Image.fromarray(values).save(tmp_path / "deep.png")
    assert np.asarray(read_image(tmp_path / "deep.png"))[0, :, 0].tolist() == [0, 1, 255]
    with pytest.raises(ModelError, match="cannot be read"):
        read_image(tmp_path / "missing.png")
