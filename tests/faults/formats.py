"""Files of another format than their name or place says, and files that would run code."""

import io
import json
import pickle
import shutil
import struct
import zipfile
import zlib
from pathlib import Path
from typing import Any

import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image

from helpers.run_faults import Place, RunFault

UNCHANGED = "no prediction is written"
NO_CODE = "no code has run"


class Payload:
    """Unpickling it creates the file ``canary`` in the folder."""

    def __init__(self, folder: Path) -> None:
        self._canary = folder / "canary"

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        """Return the call that a pickle makes."""
        return eval, (f"open({str(self._canary)!r}, 'w')",)


def _predict(place: Place, weights: Path, *images: Path) -> None:
    run = place.trained()
    inputs = images or (place.dataset.image_root / "000.png",)
    output = ["--output", place.folder / "out", "--opts", "MODEL.WEIGHTS", weights]
    place.command("tools/predict.py", "--config-file", run.config_file, "--input", *inputs, *output)
    assert not list(place.folder.glob("out/panoptic/*"))
    assert not (place.folder / "canary").exists()


def _weights(place: Place, name: str, content: bytes) -> None:
    path = place.folder / name
    path.write_bytes(content)
    _predict(place, path)


def _image(place: Place, name: str, content: bytes) -> None:
    path = place.folder / name
    path.write_bytes(content)
    _predict(place, place.folder / "run" / "model_final.pth", path)


def _picture() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (64, 48)).save(buffer, "PNG")
    return buffer.getvalue()


def _saved(content: Any, **options: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer, **options)
    return buffer.getvalue()


def _zip_bomb() -> bytes:
    """100 MB of zeros in 100 kB."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({}))
        archive.writestr("archive/data/0", b"\0" * 10**8)
    return buffer.getvalue()


def _png_bomb() -> bytes:
    """A PNG that announces 60 000 x 60 000 pixels and has none of them."""
    header = b"IHDR" + struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    return b"\x89PNG\r\n\x1a\n" + chunk + _picture()[33:]


def _config(place: Place, text: str) -> None:
    path = place.folder / "config.yaml"
    path.write_text(text)
    place.command("train_net.py", "--config-file", path, "OUTPUT_DIR", place.folder / "out")
    assert not (place.folder / "out").exists()
    assert not (place.folder / "canary").exists()


def _yaml_with_python(place: Place) -> None:
    canary = place.folder / "canary"
    _config(place, f"SEED: !!python/object/apply:os.system ['touch {canary}']\n")


def _train(place: Place, json_file: Path, panoptic_root: Path) -> None:
    run, name = place.trained(), "mine"
    row = [name, str(place.dataset.image_root), str(panoptic_root), str(json_file)]
    data = ["DATASETS.CUSTOM_PANOPTIC", [row], "DATASETS.TRAIN", name, "DATASETS.TEST", name]
    output = ["OUTPUT_DIR", place.folder / "out", *data]
    place.command("train_net.py", "--config-file", run.config_file, *output)
    DatasetCatalog.pop(name, None)
    MetadataCatalog.pop(name, None)
    assert not list(place.folder.glob("out/*.pth"))


def _annotations(place: Place, content: bytes) -> None:
    """Train on the tiny data set with another file as its JSON."""
    path = place.folder / "panoptic.json"
    path.write_bytes(content)
    _train(place, path, place.dataset.panoptic_root)


def _label_map(place: Place, content: bytes) -> None:
    """Train on the tiny data set with another file as its first panoptic PNG."""
    folder = place.folder / "panoptic"
    shutil.copytree(place.dataset.panoptic_root, folder)
    (folder / "000.png").write_bytes(content)
    shutil.copy(place.dataset.panoptic_json, place.folder)
    _train(place, place.folder / "panoptic.json", folder)


def _trainer_state(place: Place) -> None:
    """A checkpoint to resume from whose state of the optimizer would run code."""
    run = place.trained()
    folder = run.config_file.parent
    content = torch.load(run.weights, weights_only=True)
    run.weights.write_bytes(_saved({**content, "optimizer": Payload(place.folder)}))
    arguments = ["--config-file", run.config_file, "--resume", "OUTPUT_DIR", folder]
    place.command("train_net.py", *arguments)
    assert not (place.folder / "canary").exists()


def _metrics(place: Place) -> None:
    path = place.folder / "metrics.json"
    path.write_bytes(_picture())
    place.command("tools/plot_metrics.py", path, "--output", place.folder / "curves.png")
    assert not (place.folder / "curves.png").exists()


def _metrics_of_coco(place: Place) -> None:
    path = Path(shutil.copy(place.dataset.panoptic_json, place.folder / "metrics.json"))
    place.command("tools/plot_metrics.py", path, "--output", place.folder / "curves.png")
    assert not (place.folder / "curves.png").exists()


def _converted(place: Place, name: str, content: bytes) -> None:
    path, target = place.folder / name, place.folder / "converted.pth"
    path.write_bytes(content)
    place.command("tools/convert_checkpoint.py", path, target, "--source", "detr")
    assert not target.exists()
    assert not (place.folder / "canary").exists()


PREDICT, TRAIN, RESUME = "`tools/predict.py`", "`train_net.py`", "`train_net.py --resume`"
CONVERT, PLOT = "`tools/convert_checkpoint.py`", "`tools/plot_metrics.py`"

FAULTS = [
    RunFault(
        "a picture as weights", PREDICT, UNCHANGED, lambda p: _weights(p, "w.pth", _picture())
    ),
    RunFault(
        "a picture as .safetensors",
        PREDICT,
        UNCHANGED,
        lambda p: _weights(p, "w.safetensors", _picture()),
    ),
    RunFault(
        "weights named .safetensors that torch.save has written",
        PREDICT,
        UNCHANGED,
        lambda p: _weights(p, "w.safetensors", _saved({"model": {"a": torch.zeros(1)}})),
    ),
    RunFault(
        "a text file as weights", PREDICT, UNCHANGED, lambda p: _weights(p, "w.pth", b"weights\n")
    ),
    RunFault(
        "a zip bomb as weights", PREDICT, UNCHANGED, lambda p: _weights(p, "w.pth", _zip_bomb())
    ),
    RunFault(
        "weights with an object that would run code",
        PREDICT,
        NO_CODE,
        lambda p: _weights(p, "w.pth", _saved({"model": {"a": Payload(p.folder)}})),
    ),
    RunFault(
        "the same in the format of old versions of torch",
        PREDICT,
        NO_CODE,
        lambda p: _weights(
            p,
            "w.pth",
            _saved({"model": {"a": Payload(p.folder)}}, _use_new_zipfile_serialization=False),
        ),
    ),
    RunFault(
        "a .pkl with an object that would run code",
        PREDICT,
        NO_CODE,
        lambda p: _weights(p, "w.pkl", pickle.dumps({"model": {"a": Payload(p.folder)}})),
    ),
    RunFault(
        "a .pkl that would run code, as a source",
        CONVERT,
        NO_CODE,
        lambda p: _converted(p, "w.pkl", pickle.dumps(Payload(p.folder))),
    ),
    RunFault(
        "annotations as weights",
        CONVERT,
        "no file is written",
        lambda p: _converted(p, "w.pth", p.dataset.panoptic_json.read_bytes()),
    ),
    RunFault("an optimizer state that would run code", RESUME, NO_CODE, _trainer_state),
    RunFault(
        "a text file named .png as an image",
        PREDICT,
        UNCHANGED,
        lambda p: _image(p, "a.png", b"no picture\n"),
        status=1,
    ),
    RunFault(
        "a checkpoint named .jpg as an image",
        PREDICT,
        UNCHANGED,
        lambda p: _image(p, "a.jpg", _saved({"a": torch.zeros(1)})),
        status=1,
    ),
    RunFault(
        "an SVG named .png as an image",
        PREDICT,
        UNCHANGED,
        lambda p: _image(p, "a.png", b"<svg xmlns='http://www.w3.org/2000/svg'/>"),
        status=1,
    ),
    RunFault(
        "a PNG of 60 000 x 60 000 pixels as an image",
        PREDICT,
        UNCHANGED,
        lambda p: _image(p, "a.png", _png_bomb()),
        status=1,
    ),
    RunFault("a config with a Python tag", TRAIN, NO_CODE, _yaml_with_python),
    RunFault(
        "a config that is a picture",
        TRAIN,
        "no folder is made",
        lambda p: _config(p, _picture().decode("latin1")),
    ),
    RunFault(
        "a config that is JSON of annotations",
        TRAIN,
        "no folder is made",
        lambda p: _config(p, p.dataset.panoptic_json.read_text()),
    ),
    RunFault(
        "a picture as annotations",
        TRAIN,
        "no weights are written",
        lambda p: _annotations(p, _picture()),
    ),
    RunFault(
        "a list as annotations",
        TRAIN,
        "no weights are written",
        lambda p: _annotations(p, b"[1, 2]"),
    ),
    RunFault(
        "annotations nested 100 000 times",
        TRAIN,
        "no weights are written",
        lambda p: _annotations(p, b'{"images":' + b"[" * 100_000),
    ),
    RunFault(
        "JSON as a panoptic PNG",
        TRAIN,
        "no weights are written",
        lambda p: _label_map(p, json.dumps({"id": 1}).encode()),
    ),
    RunFault(
        "a PNG of 60 000 x 60 000 pixels as a panoptic PNG",
        TRAIN,
        "no weights are written",
        lambda p: _label_map(p, _png_bomb()),
    ),
    RunFault("a picture as metrics.json", PLOT, "no picture is written", _metrics),
    RunFault("annotations as metrics.json", PLOT, "no picture is written", _metrics_of_coco),
]
