"""Changed files of every kind: each command ends with status 0, 1 or 2, runs no code, never hangs.

`FUZZ_MINUTES=10 pytest -m slow tests/fuzz` searches longer than the 3 minutes of each slow test.
"""

import io
import itertools
import json
import os
import pickle
import pickletools
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save as save_safetensors

from helpers.fuzzing import changed_bytes, changed_json, ended_well, fuzz
from helpers.instance_files import write_instances
from helpers.tiny_dataset import TinyPanopticDataset, write_tiny_dataset
from helpers.trained_files import Run, write_run

MINUTES = float(os.environ.get("FUZZ_MINUTES", 3))
ONE_STEP = ["SOLVER.MAX_ITER", 1, "SOLVER.IMS_PER_BATCH", 2, "DATALOADER.NUM_WORKERS", 0]
Target = tuple[st.SearchStrategy[Any], Callable[[Any], None]]


class Workshop:
    """A folder with a tiny data set and a tiny model, and one target for each kind of file."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        self.dataset: TinyPanopticDataset = write_tiny_dataset(folder)
        self.run: Run = write_run(folder / "run", self.dataset)
        self._numbers = itertools.count()
        self._canary = folder / "canary"
        monkeypatch.chdir(folder)

    def annotations(self) -> Target:
        """The JSON and one PNG of a panoptic data set, in training and in the doctor."""
        dataset = self.dataset
        png = dataset.panoptic_root / "000.png"
        sound = dataset.panoptic_json.read_bytes(), png.read_bytes()
        changed = changed_json(json.loads(sound[0])), changed_bytes(sound[1])
        case = st.tuples(changed[0], st.just(sound[1])) | st.tuples(st.just(sound[0]), changed[1])

        def check(case: tuple[bytes, bytes]) -> None:
            dataset.panoptic_json.write_bytes(case[0])
            png.write_bytes(case[1])
            self._train_and_diagnose("CUSTOM_PANOPTIC", dataset.row[1:])

        return case, check

    def instances(self) -> Target:
        """The JSON of a data set of boxes, in training and in the doctor."""
        files = write_instances(self.folder / "boxes")

        def check(case: bytes) -> None:
            files.json_file.write_bytes(case)
            self._train_and_diagnose("CUSTOM_INSTANCES", files.row("")[1:], "MODEL.MASK_ON", False)

        return changed_json(json.loads(files.json_file.read_text())), check

    def _train_and_diagnose(self, key: str, paths: list[str], *options: object) -> None:
        name = f"fuzzed_{next(self._numbers)}"
        rows = [f"DATASETS.{key}", [[name, *paths]], "DATASETS.TRAIN", name, "DATASETS.TEST", name]
        config, changes = ["--config-file", self.run.config_file], [*rows, *options]
        checking = [*config, "--processes", 1, "--opts", *changes]
        diagnosis = ended_well("tools/check_dataset.py", *checking)
        output = ["--overwrite", "OUTPUT_DIR", self.folder / "out"]
        trained = ended_well("train_net.py", *config, *output, *changes, *ONE_STEP)
        assert (diagnosis == 0) == (trained == 0), (diagnosis, trained)
        DatasetCatalog.pop(name, None)
        MetadataCatalog.pop(name, None)

    def doctor(self) -> Target:
        """The JSON and all PNGs of a panoptic data set, and its correction."""
        dataset = self.dataset
        pngs = sorted(dataset.panoptic_root.iterdir())
        parts = st.tuples(
            changed_json(json.loads(dataset.panoptic_json.read_text())),
            changed_bytes(*(png.read_bytes() for png in pngs)),
            st.integers(0, len(pngs) - 1),
        )

        def check(case: tuple[bytes, bytes, int]) -> None:
            dataset.panoptic_json.write_bytes(case[0])
            kept = pngs[case[2]].read_bytes()
            pngs[case[2]].write_bytes(case[1])
            fixed = self.folder / "fixed"
            ended_well(
                *("tools/check_dataset.py", "--json", dataset.panoptic_json, "--processes", 1),
                *("--image-root", dataset.image_root, "--panoptic-root", dataset.panoptic_root),
                *("--fix", fixed, "--json-out", self.folder / "problems.json"),
            )
            shutil.rmtree(fixed, ignore_errors=True)
            pngs[case[2]].write_bytes(kept)

        return parts, check

    def checkpoint(self) -> Target:
        """Weights in every format, and pickles that would create a file."""
        content = torch.load(self.run.weights, weights_only=True)
        small = {name: value for name, value in content["model"].items() if value.numel() < 64}
        originals = {
            "zip.pth": self.run.weights.read_bytes(),
            "small.pth": _saved({"model": small}),
            "legacy.pth": _saved({"model": small}, _use_new_zipfile_serialization=False),
            "arrays.pkl": pickle.dumps({"model": {k: v.numpy() for k, v in small.items()}}),
            "plain.safetensors": save_safetensors(small, {"settings": "{}"}),
        }
        payload = st.lists(_opcodes(self._canary), min_size=3, max_size=12).map(b"".join)
        case = st.tuples(
            st.sampled_from(list(originals)), changed_bytes(*originals.values()) | payload
        )

        def check(case: tuple[str, bytes]) -> None:
            weights = self.folder / case[0]
            weights.write_bytes(case[1])
            config = ["--config-file", self.run.config_file]
            image = ["--input", self.dataset.image_root / "001.jpg"]
            output = ["--output", self.folder / "out", "--overwrite", "--no-overlays"]
            options = ["--opts", "MODEL.WEIGHTS", weights]
            shutil.rmtree(self.folder / "out", ignore_errors=True)
            ended_well("tools/predict.py", *config, *image, *output, *options)
            assert not self._canary.exists()

        return case, check

    def resuming(self) -> Target:
        """The last checkpoint of a training, which has the state of optimizer and schedule."""
        folder = self.folder / "resumed"
        command = ["train_net.py", "--config-file", self.run.config_file, "OUTPUT_DIR", folder]
        command += ["DATASETS.TEST", (), *ONE_STEP]
        assert ended_well(*command) == 0
        last = folder / (folder / "last_checkpoint").read_text()
        state = torch.load(last, weights_only=True)
        originals = last.read_bytes(), _saved(state, _use_new_zipfile_serialization=False)

        def check(data: bytes) -> None:
            last.write_bytes(data)
            ended_well(*command, "--resume", "SOLVER.MAX_ITER", 2)

        return changed_bytes(*originals), check

    def images(self) -> Target:
        """Eight pictures of all formats."""
        originals = list(_pictures())
        folder = self.folder / "pictures"
        folder.mkdir()

        def check(case: list[tuple[str, bytes]]) -> None:
            for number, (suffix, data) in enumerate(case):
                (folder / f"{number}{suffix}").write_bytes(data)
            shutil.rmtree(self.folder / "out", ignore_errors=True)
            ended_well(
                *("tools/predict.py", "--config-file", self.run.config_file, "--input", folder),
                *("--output", self.folder / "out", "--no-overlays", *self.run.opts),
            )
            for path in folder.iterdir():
                path.unlink()

        suffixes = st.sampled_from([".png", ".jpg", ".tif", ".webp", ".gif", ".bmp", ".heic"])
        one = st.tuples(suffixes, changed_bytes(*originals))
        return st.lists(one, min_size=1, max_size=8), check


def _saved(content: dict[str, Any], **options: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer, **options)
    return buffer.getvalue()


def _opcodes(canary: Path) -> st.SearchStrategy[bytes]:
    """Operations of a pickle, those among them that call a function."""
    attack = f"cbuiltins\nopen\n(V{canary}\nVw\ntR.".encode()
    shell = f"cposix\nsystem\n(Vtouch {canary}\ntR.".encode()
    names = b"cbuiltins\neval\n", b"ctorch\nload\n", b"cnumpy\nload\n", b"ccodecs\nopen\n"
    simple = [opcode.code.encode("latin1") for opcode in pickletools.opcodes if not opcode.arg]
    text = st.sampled_from(
        [f"V{canary}\n".encode(), b"Vw\n", b"K\x01", b"}", b"]", b"(", b"\x80\x02"]
    )
    return st.sampled_from([attack, shell, *names]) | st.sampled_from(simple) | text


def _pictures() -> list[bytes]:
    pixels = np.random.default_rng(0).integers(0, 256, (24, 32, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    exif = Image.Exif()
    exif[0x0112] = 6  # turned
    found = []
    for name in ("PNG", "JPEG", "BMP", "GIF", "TIFF", "WEBP", "PPM", "JPEG2000", "AVIF", "DDS"):
        with io.BytesIO() as buffer:
            image.save(buffer, name, **({"exif": exif} if name in ("PNG", "JPEG", "WEBP") else {}))
            found.append(buffer.getvalue())
    for mode in ("L", "P", "LA", "RGBA", "I;16", "1"):
        with io.BytesIO() as buffer:
            image.convert("L").convert(mode).save(buffer, "PNG")
            found.append(buffer.getvalue())
    return found


TARGETS = ("annotations", "instances", "doctor", "checkpoint", "resuming", "images")


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(
    "seconds", [5, pytest.param(60 * MINUTES, marks=pytest.mark.slow)], ids=["short", "long"]
)
@pytest.mark.filterwarnings("ignore")
def test_changed_files_end_with_a_status(
    target: str, seconds: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    strategy, check = getattr(Workshop(tmp_path, monkeypatch), target)()
    assert fuzz(strategy, check, seconds) >= 1
