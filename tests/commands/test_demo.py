"""demo/demo.py through its main: images, folders, globs, a video, and mistakes."""

import re
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from helpers.commands import load_script
from helpers.tiny_dataset import TinyPanopticDataset
from helpers.tiny_model import MASK2FORMER
from helpers.trained_files import Run, file_names, write_run

demo = load_script("demo/demo.py")


@pytest.fixture(scope="module")
def box_run(
    tmp_path_factory: pytest.TempPathFactory, tiny_panoptic_dataset: TinyPanopticDataset
) -> Run:
    run = write_run(tmp_path_factory.mktemp("boxes"), tiny_panoptic_dataset, MODEL__MASK_ON=False)
    checkpoint = torch.load(run.weights, weights_only=True)
    checkpoint["model"]["box_head.class_embed.bias"][0] += 3  # a thing, with scores below 1
    torch.save(checkpoint, run.weights)
    return run


@pytest.fixture
def images(tmp_path: Path, tiny_panoptic_dataset: TinyPanopticDataset) -> Path:
    folder = tmp_path / "images"
    shutil.copytree(tiny_panoptic_dataset.image_root, folder)
    (folder / "notes.txt").write_text("not an image")
    return folder


@pytest.fixture(autouse=True)
def _headless(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "has_display", lambda: False)


def call(run: Run, *arguments: object) -> int:
    return demo.main(["--config-file", str(run.config_file), *map(str, arguments), *run.opts])


def test_a_folder_is_drawn(
    run: Run, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(run, "--input", images, "--output", tmp_path / "out") == 0
    assert file_names(tmp_path / "out") == ["000.png", "001.jpg", "002.png", "003.jpg", "004.png"]
    drawn = np.asarray(Image.open(tmp_path / "out" / "000.png"))
    assert drawn.shape == (384, 512, 3)
    original = np.asarray(Image.open(images / "000.png").resize((512, 384)))
    assert abs(drawn.astype(int) - original).mean() > 5
    *lines, drawn, others = capsys.readouterr().out.splitlines()
    assert drawn == "5 images drawn"
    assert others == f"1 other file passed over: {images / 'notes.txt'}"
    assert len(lines) == 5
    for line in lines:
        assert "segment" in line
        assert " s -> " in line


def test_a_model_without_boxes_is_drawn(
    tiny_panoptic_dataset: TinyPanopticDataset, images: Path, tmp_path: Path
) -> None:
    run = write_run(tmp_path / "run", tiny_panoptic_dataset, **MASK2FORMER)
    assert call(run, "--input", images / "000.png", "--output", tmp_path / "drawn.png") == 0
    assert np.asarray(Image.open(tmp_path / "drawn.png")).shape == (384, 512, 3)


def test_globs_and_files_go_together_without_repetition(
    run: Run, images: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    assert call(run, "--input", images / "00[01].*", images / "000.png", "--output", out) == 0
    assert file_names(out) == ["000.png", "001.jpg"]


def test_one_image_goes_to_one_file(run: Run, images: Path, tmp_path: Path) -> None:
    out = tmp_path / "drawn.jpg"
    assert call(run, "--input", images / "000.png", "--output", out) == 0
    assert out.is_file()


def test_equal_names_and_inputs_are_not_overwritten(run: Run, images: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    shutil.copy(images / "000.png", other)
    before = (images / "000.png").read_bytes()
    inputs = [images / "000.png", other / "000.png"]
    assert call(run, "--input", *inputs, "--output", images) == 0
    assert (images / "000.png").read_bytes() == before
    assert {"000_2.png", "000_3.png"} <= set(file_names(images))


def test_unreadable_images_are_named_and_the_others_drawn(
    run: Run, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (images / "001.jpg").write_bytes(b"damaged")
    out = tmp_path / "out"
    inputs = [images / "absent.png", images / "001.jpg", images / "000.png"]
    assert call(run, "--input", *inputs, "--output", out) == 1
    assert file_names(out) == ["000.png"]
    errors = capsys.readouterr().err.splitlines()
    assert [line for line in errors if line.startswith("error:")] == errors
    assert "absent.png does not exist" in errors[0]
    assert "001.jpg cannot be read" in errors[1]
    assert "2 of 3 images could not be read" in errors[2]


def test_files_that_are_passed_over_are_counted(
    run: Run, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in (".hidden", ".git/config", "drawn/000.png", "list.csv", "a/b.svg", "c/d", "e/f"):
        path = images / name
        path.parent.mkdir(exist_ok=True)
        path.touch()
    (images / "001.jpg").write_bytes(b"damaged")
    before = images / "002.png"
    assert call(run, "--input", images, before, "--output", images / "drawn") == 1
    captured = capsys.readouterr()
    *_, drawn, others = captured.out.splitlines()
    assert drawn == "4 images drawn"
    names = [images / name for name in ("list.csv", "notes.txt", "a/b.svg", "c/d", "e/f")]
    assert others == f"5 other files passed over: {', '.join(map(str, names))}"
    (images / "z").touch()
    assert call(run, "--input", images, "--output", images / "drawn") == 1
    assert capsys.readouterr().out.splitlines()[-1].startswith("6 other files passed over: ")
    assert call(run, "--input", before, "--output", images / "drawn") == 0
    assert capsys.readouterr().out.splitlines()[-1] == "1 image drawn"


def test_the_threshold_decides_what_is_drawn(
    box_run: Run, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for threshold, expected in (("0", "6 objects"), ("1", "0 objects")):
        arguments = ["--input", images / "000.png", "--output", tmp_path]
        assert call(box_run, *arguments, "--confidence-threshold", threshold) == 0
        assert f"000.png: {expected}, " in capsys.readouterr().out


def write_video(path: Path, frames: int = 3) -> Path:
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"mp4v"), 5.0, (64, 48))
    for number in range(frames):
        writer.write(np.full((48, 64, 3), 60 * number, dtype=np.uint8))
    writer.release()
    return path


def read_video(path: Path) -> tuple[list[np.ndarray], float]:
    capture = cv2.VideoCapture(str(path))
    frames = []
    while (read := capture.read())[0]:
        frames.append(read[1])
    return frames, capture.get(cv2.CAP_PROP_FPS)


@pytest.mark.parametrize("output", ["folder", "drawn.mp4"])
def test_a_video_keeps_its_frames_and_speed(run: Run, tmp_path: Path, output: str) -> None:
    video = write_video(tmp_path / "in.mp4")
    assert call(run, "--video-input", video, "--output", tmp_path / output) == 0
    written = tmp_path / ("folder/in.mp4" if output == "folder" else output)
    frames, frames_per_second = read_video(written)
    assert len(frames) == 3
    assert frames[0].shape == (384, 512, 3)
    assert frames_per_second == pytest.approx(5.0)
    assert abs(frames[0].astype(int)).mean() > 5, "the black frame is drawn on"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--input", "{tmp}/*.png", "--output", "{tmp}"], "no images in"),
        (["--input", "{tmp}", "--output", "{tmp}"], "no images in"),
        (["--input", "{images}/000.png"], "no display .* give --output"),
        (["--input", "{images}", "--output", "{tmp}/x.png"], "one file, not 5"),
        (["--webcam"], "no display .* --webcam needs one"),
        (["--webcam", "--output", "{tmp}"], "--webcam shows a window"),
        (["--video-input", "{tmp}/absent.mp4", "--output", "{tmp}/o"], "absent.mp4 does not exist"),
        (["--video-input", "{images}/notes.txt", "--output", "{tmp}/o"], "notes.txt"),
        (["--video-input", "{tmp}", "--output", "{tmp}/o"], "does not exist"),
        (
            ["--input", "{images}", "--output", "{tmp}", "--confidence-threshold", "2"],
            "threshold is 2.0",
        ),
        (
            ["--input", "{images}", "--output", "{images}/notes.txt"],
            "cannot write",
        ),
    ],
)
def test_mistakes_get_one_line(
    run: Run,
    images: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    filled = [argument.format(tmp=tmp_path / "empty", images=images) for argument in arguments]
    (tmp_path / "empty").mkdir()
    assert call(run, *filled) == 2
    errors = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(errors) == 1
    assert re.search(message, errors[0])


def test_a_video_is_not_overwritten(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    video = write_video(tmp_path / "in.mp4")
    before = video.read_bytes()
    assert call(run, "--video-input", video, "--output", tmp_path) == 2
    assert "would overwrite the input" in capsys.readouterr().err
    assert video.read_bytes() == before


def test_absent_weights_get_one_line(
    run: Run, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--config-file", str(run.config_file), "--input", str(images)]
    arguments += ["--output", str(tmp_path / "out"), "--opts", "MODEL.WEIGHTS", "absent.pth"]
    assert demo.main(arguments) == 2
    assert "error: checkpoint absent.pth not found" in capsys.readouterr().err
