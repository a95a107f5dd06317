"""Disk, memory, images and settings: what the system or the project refuses."""

import os
import resource
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file

from batchformer_panoptic.data import PanopticDatasetMapper
from batchformer_panoptic.data.io import write_atomically
from batchformer_panoptic.engine.prediction import PredictionFolder
from batchformer_panoptic.errors import command
from helpers.run_faults import Place, RunFault
from helpers.trained_files import Run, file_names

_TRAINING = {
    "SOLVER__IMS_PER_BATCH": 2,
    "SOLVER__MAX_ITER": 2,
    "SOLVER__STEPS": "()",
    "SOLVER__WARMUP_ITERS": 0,
    "SOLVER__CHECKPOINT_PERIOD": 1,
    "DATALOADER__NUM_WORKERS": 0,
    "DATASETS__CHECK": False,
}


def _train(place: Place, run: Run, *options: object, resume: bool = False) -> Path:
    output = place.folder / "out"
    flags = ["--resume"] if resume else []
    words = ["--config-file", run.config_file, *flags, "OUTPUT_DIR", output, *options]
    place.command("train_net.py", *words)
    return output


def _demo(place: Place, run: Run, images: Path) -> Path:
    output = place.folder / "drawn"
    place.command(
        *("demo/demo.py", "--config-file", run.config_file, "--input", images),
        *("--output", output, *run.opts),
    )
    return output


def _with_file_limit(place: Place, size: int, act: Callable[[], object]) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        act()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def _file_limit_in_training(place: Place) -> None:
    run = place.trained(**_TRAINING)
    output = _train(place, run)
    assert place.status == 0, place.words
    kept = {p.name: p.read_bytes() for p in output.iterdir() if p.name.startswith(("mod", "last"))}
    size = max(map(len, kept.values())) // 2
    _with_file_limit(place, size, lambda: _train(place, run, "SOLVER.MAX_ITER", 4, resume=True))
    assert {name: (output / name).read_bytes() for name in kept} == kept
    assert not [name for name in file_names(output) if name.startswith(".")]


def _full_disk_in_training(place: Place) -> None:
    run, save = place.trained(**_TRAINING), torch.save

    def fill(content: Any, file: Any) -> None:
        with open("/dev/full", "wb") as full:
            save(content, full)

    place.monkeypatch.setattr(torch, "save", fill)
    output = _train(place, run)
    assert not list(output.glob("*.pth")) + list(output.glob(".*"))
    assert not (output / "last_checkpoint").exists()


def _file_limit_in_demo(place: Place) -> None:
    run = place.trained()
    images = place.folder / "images"
    images.mkdir()
    noise = np.random.default_rng(0).integers(0, 255, (200, 200, 3), dtype=np.uint8)
    Image.fromarray(noise).save(images / "a.png")
    _with_file_limit(place, 1000, lambda: _demo(place, run, images))
    assert file_names(place.folder / "drawn") == []


def _file_limit_with_safetensors(place: Place) -> None:
    target = place.folder / "weights.safetensors"

    def main() -> int:
        content = {"weight": torch.zeros(10000)}
        write_atomically(str(target), lambda name: save_file(content, name))
        return 0

    _with_file_limit(place, 1000, lambda: _call(place, command(main)))
    assert file_names(place.folder) == []


def _call(place: Place, main: Callable[[], int]) -> None:
    place.capfd.readouterr()
    place.ended(main(), place.capfd.readouterr().err)


def _output_below_a_file(place: Place) -> None:
    run = place.trained()
    (place.folder / "drawn").write_text("")
    _demo(place, run, place.dataset.image_root)
    assert (place.folder / "drawn").read_text() == ""


def _too_many_files(place: Place) -> None:
    run = place.trained(**_TRAINING)
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    place.monkeypatch.setattr(resource, "getrlimit", lambda _kind: (100, 100))
    output = _train(place, run, "DATALOADER.NUM_WORKERS", 2)
    place.monkeypatch.undo()
    assert resource.getrlimit(resource.RLIMIT_NOFILE) == before
    assert not list(output.glob("*.pth"))


def _killed_worker(place: Place) -> None:
    run = place.trained(**{**_TRAINING, "DATALOADER__NUM_WORKERS": 1})

    def die(*_: object, **__: object) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    place.monkeypatch.setattr(PanopticDatasetMapper, "__call__", die)
    output = _train(place, run)
    assert not list(output.glob("*.pth"))


def _large_image(place: Place) -> None:
    run = place.trained(INPUT__MAX_PIXELS=3000)
    images = place.folder / "images"
    images.mkdir()
    Image.new("RGB", (100, 50)).save(images / "large.png")
    Image.new("RGB", (50, 50)).save(images / "small.png")
    drawn = _demo(place, run, images)
    assert file_names(drawn) == ["small.png"]


def _thin_image(place: Place) -> None:
    run = place.trained(INPUT__MAX_SIZE_TEST=64)
    images = place.folder / "images"
    images.mkdir()
    Image.new("RGB", (1000, 1)).save(images / "thin.png")
    drawn = _demo(place, run, images)
    with Image.open(drawn / "thin.png") as picture:
        assert picture.width * picture.height < 10**5


def _postscript(place: Place) -> None:
    run = place.trained()
    images = place.folder / "images"
    images.mkdir()
    mark = place.folder / "started"
    text = "%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n%%EOF\n"
    (images / "drawing.png").write_text(text)
    program = place.folder / "gs"
    program.write_text(f"#!/bin/sh\ntouch {mark}\n")
    program.chmod(0o755)
    place.monkeypatch.setenv("PATH", str(place.folder), prepend=os.pathsep)
    _demo(place, run, images)
    assert not mark.exists()


def _outside(place: Place) -> None:
    run = place.trained()
    folder = place.folder / "predictions"

    def main() -> int:
        with PredictionFolder(folder, place.folder / "run", run.table, {}) as predictions:
            predictions.name_of(str(place.folder / "photograph.jpg"))
        return 0

    _call(place, command(main))
    assert file_names(place.folder) == ["predictions", "run"]


def _escapes(place: Place) -> None:
    place.command("train_net.py", "--config-file", "\x1b]0;title\x07\x1b[31mred.yaml")
    assert "\x1b" not in place.words
    assert r"\x1b[31mred.yaml" in place.words


def _setting(*words: object) -> Callable[[Place], None]:
    def act(place: Place) -> None:
        output = _train(place, place.trained(**_TRAINING), *words)
        assert not output.exists()

    return act


def _cycle(place: Place) -> None:
    first, second = place.folder / "a.yaml", place.folder / "b.yaml"
    first.write_text("_BASE_: b.yaml\n")
    second.write_text("_BASE_: a.yaml\n")
    place.command("train_net.py", "--config-file", first)


def _incomplete_optimizer(place: Place) -> None:
    run = place.trained(**_TRAINING)
    output = _train(place, run)
    checkpoint = output / (output / "last_checkpoint").read_text()
    content = torch.load(checkpoint, weights_only=True)
    for state in content["trainer"]["_trainer"]["optimizer"]["state"].values():
        state.pop("exp_avg", None)
    torch.save(content, checkpoint)
    before = checkpoint.read_bytes()
    _train(place, run, "SOLVER.MAX_ITER", 4, resume=True)
    assert checkpoint.read_bytes() == before


_NOTHING = "no output folder"

FAULTS = [
    RunFault(
        "a limit on the size of files",
        "`train_net.py --resume`",
        "the checkpoints and `last_checkpoint` as before, no half file",
        _file_limit_in_training,
    ),
    RunFault(
        "a full disk, while weights are saved",
        "`train_net.py`",
        "no weights, no half file, no `last_checkpoint`",
        _full_disk_in_training,
    ),
    RunFault(
        "a limit on the size of files, with pictures",
        "`demo.py`",
        "an empty output folder",
        _file_limit_in_demo,
    ),
    RunFault(
        "a limit on the size of files, with safetensors",
        "writing `.safetensors`",
        "no file",
        _file_limit_with_safetensors,
    ),
    RunFault("a file as output folder", "`demo.py`", "the file as before", _output_below_a_file),
    RunFault("too few open files for the workers", "`train_net.py`", "no weights", _too_many_files),
    RunFault("a killed worker of the loader", "`train_net.py`", "no weights", _killed_worker),
    RunFault("an image that is too large", "`demo.py`", "the others are drawn", _large_image, 1),
    RunFault("an image of 1000 x 1 pixels", "`demo.py`", "it is drawn", _thin_image, 0),
    RunFault("PostScript named .png", "`demo.py`", "no program is started", _postscript, 1),
    RunFault("a photograph outside its folder", "predictions", "no file of it", _outside),
    RunFault("escape sequences in a file name", "`train_net.py`", "they are text", _escapes),
    RunFault(
        "heads that do not divide the width",
        "`train_net.py`",
        _NOTHING,
        _setting("MODEL.DETR.NHEADS", 5),
    ),
    RunFault("a seed of 33 bits", "`train_net.py`", _NOTHING, _setting("SEED", 2**32)),
    RunFault("-1 workers", "`train_net.py`", _NOTHING, _setting("DATALOADER.NUM_WORKERS", -1)),
    RunFault(
        "a negative learning rate", "`train_net.py`", _NOTHING, _setting("SOLVER.BASE_LR", -1.0)
    ),
    RunFault(
        "a learning rate of 0 with a cosine",
        "`train_net.py`",
        _NOTHING,
        _setting("SOLVER.BASE_LR", 0.0, "SOLVER.LR_SCHEDULER_NAME", "WarmupCosineLR"),
    ),
    RunFault(
        "no size of images", "`train_net.py`", _NOTHING, _setting("INPUT.MIN_SIZE_TRAIN", "()")
    ),
    RunFault(
        "one mean for three channels",
        "`train_net.py`",
        _NOTHING,
        _setting("MODEL.PIXEL_MEAN", "[1.0]"),
    ),
    RunFault(
        "a device without support", "`train_net.py`", _NOTHING, _setting("MODEL.DEVICE", "mps")
    ),
    RunFault(
        "a number of 40 digits",
        "`train_net.py`",
        _NOTHING,
        _setting("SOLVER.MAX_ITER", "1" * 40),
    ),
    RunFault("`_BASE_` files in a circle", "`train_net.py`", _NOTHING, _cycle),
    RunFault(
        "an optimizer's state without its moments",
        "`train_net.py --resume`",
        "the checkpoint as before",
        _incomplete_optimizer,
    ),
]
