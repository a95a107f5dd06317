"""``train_net.py --init-from``: training on other classes starts from a trained model."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from batchformer_panoptic.checkpoint import SettingsRecord, read_weights
from helpers.commands import load_script
from helpers.tiny_dataset import TinyPanopticDataset
from helpers.trained_files import Run, write_run

CLASS_HEAD = ("box_head.class_embed.", "semantic_head.")
SOLVER = ["SOLVER.MAX_ITER", "1", "SOLVER.IMS_PER_BATCH", "2", "SOLVER.STEPS", "()"]
# Nothing moves, so that what was loaded is what is saved.
SOLVER += ["SOLVER.BASE_LR", "0.0", "DATALOADER.NUM_WORKERS", "0", "DATASETS.TEST", "()"]


@pytest.fixture
def source(tmp_path: Path, tiny_panoptic_dataset: TinyPanopticDataset) -> Run:
    run = write_run(
        tmp_path / "source",
        tiny_panoptic_dataset,
        MODEL__SEMANTIC_AUX__ENABLED=True,
        MODEL__SMALL_RESNET__NORM="FrozenBN",
    )
    settings = SettingsRecord(run.cfg).state_dict()
    torch.save({**read_weights(str(run.weights)), "settings": settings}, run.weights)
    return run


@pytest.fixture
def other_classes(tmp_path: Path, tiny_panoptic_dataset: TinyPanopticDataset) -> str:
    """The same pictures under a fifth class; the value of DATASETS.CUSTOM_PANOPTIC."""
    content = json.loads(tiny_panoptic_dataset.panoptic_json.read_text())
    content["categories"].append({"id": 5, "name": "cone", "isthing": 1})
    path = tmp_path / "other.json"
    path.write_text(json.dumps(content))
    roots = tiny_panoptic_dataset.image_root, tiny_panoptic_dataset.panoptic_root
    return repr([[f"other_{tmp_path.name}", *map(str, roots), str(path)]])


def _train(
    run: Run, output: Path, *opts: str, flags: Sequence[str] = (), data: str | None = None
) -> int:
    opts = (*SOLVER, "OUTPUT_DIR", str(output), *opts)
    if data is not None:
        name = data.split("'")[1]
        opts += ("DATASETS.CUSTOM_PANOPTIC", data, "DATASETS.TRAIN", repr((name,)))
    return load_script("train_net.py").main(["--config-file", str(run.config_file), *flags, *opts])


def _start(run: Run) -> list[str]:
    return ["--init-from", str(run.weights)]


def _weights(folder: Path) -> dict[str, Tensor]:
    weights: dict[str, Tensor] = read_weights(str(folder / "model_final.pth"))["model"]
    return weights


def _error(capsys: pytest.CaptureFixture[str]) -> str:
    lines = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error: ")]
    assert len(lines) == 1
    return lines[0]


@pytest.mark.parametrize("ema", ["0.0", "0.5"])
def test_all_but_the_row_of_the_new_class_is_loaded(
    tmp_path: Path, source: Run, other_classes: str, ema: str
) -> None:
    output = tmp_path / "output"
    config = source.config_file.read_text()
    source.config_file.write_text(config.replace("WEIGHTS: ''", "WEIGHTS: never_read.pth"))
    opts = ["SOLVER.EMA_DECAY", ema]
    assert _train(source, output, *opts, flags=_start(source), data=other_classes) == 0
    before, after = _weights(source.weights.parent), _weights(output)
    assert after.keys() == before.keys()
    for name, value in after.items():
        if name.startswith(CLASS_HEAD):
            assert len(value) == len(before[name]) + 1
            assert torch.equal(torch.cat([value[:1], value[2:]]), before[name]), name
        else:
            assert torch.equal(value, before[name]), name
    log = (output / "log.txt").read_text()
    assert 'class rows kept by name: box, ground, disc, sky, "no object"; new: cone\n' in log
    assert "--init-from overrides MODEL.WEIGHTS never_read.pth" in log


def test_the_same_classes_are_loaded_as_a_whole(tmp_path: Path, source: Run) -> None:
    output = tmp_path / "output"
    assert _train(source, output, flags=_start(source)) == 0
    before, after = _weights(source.weights.parent), _weights(output)
    assert after.keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in after.items())


def test_resuming_does_not_read_it_again(tmp_path: Path, source: Run, other_classes: str) -> None:
    output = tmp_path / "output"
    flags = [*_start(source), "--resume"]
    assert _train(source, output, flags=flags, data=other_classes) == 0  # nothing to resume yet
    first = _weights(output)
    source.weights.unlink()
    assert _train(source, output, "SOLVER.MAX_ITER", "2", flags=flags, data=other_classes) == 0
    assert f"--init-from {source.weights} is ignored" in (output / "log.txt").read_text()
    second = _weights(output)
    assert all(torch.equal(value, first[name]) for name, value in second.items())


def test_other_classes_through_weights_are_refused(
    tmp_path: Path, source: Run, other_classes: str, capsys: pytest.CaptureFixture[str]
) -> None:
    opts = ["MODEL.WEIGHTS", str(source.weights)]
    assert _train(source, tmp_path / "output", *opts, data=other_classes) == 2
    line = _error(capsys)
    assert "5 classes against 4" in line
    assert f"--init-from {source.weights}" in line


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--eval-only"], "with --eval-only give MODEL.WEIGHTS"),
        (["MODEL.WEIGHTS", "w.pth"], "from MODEL.WEIGHTS w.pth or from --init-from"),
        (["MODEL.MASK_HEAD.FREEZE_DETR", "True"], "would freeze the class head"),
        (["MODEL.DETR.NUM_OBJECT_QUERIES", "9"], "set MODEL.DETR.NUM_OBJECT_QUERIES 6"),
        (["MODEL.MASK_ON", "False", "MODEL.SEMANTIC_AUX.ENABLED", "False"], "MODEL.MASK_ON True"),
        (["MODEL.DETR.NHEADS", "8"], "MODEL.DETR.NHEADS is 4 for the file and 8 in the config"),
        (["MODEL.DETR.ENC_LAYERS", "1"], "keys unknown"),
    ],
)
def test_mistakes(
    tmp_path: Path, source: Run, argv: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "output"
    flags = [*_start(source), *(x for x in argv if x.startswith("--"))]
    opts = [x for x in argv if not x.startswith("--")]
    assert _train(source, output, *opts, flags=flags) == 2
    assert words in _error(capsys)
    assert not list(output.glob("*.pth"))


def test_missing_file(source: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _train(source, tmp_path / "output", flags=["--init-from", "nowhere.pth"]) == 2
    assert "nowhere.pth not found; see --init-from" in _error(capsys)


def test_config_of_such_a_run_evaluates(tmp_path: Path, source: Run) -> None:
    """The key in config.yaml, unlike the argument, says how the training started."""
    opts = ["MODEL.INIT_FROM", "gone.pth", "MODEL.WEIGHTS", str(source.weights)]
    opts += ["DATASETS.TEST", repr(tuple(source.cfg.DATASETS.TRAIN))]
    assert _train(source, tmp_path / "output", *opts, flags=["--eval-only"]) == 0


def test_checkpoints_of_a_training_carry_settings(tmp_path: Path, source: Run) -> None:
    assert _train(source, tmp_path / "output", "INPUT.FORMAT", "RGB") == 0
    stored = read_weights(str(tmp_path / "output" / "model_final.pth"))["settings"]
    assert stored["INPUT.FORMAT"] == "RGB"
    assert stored["MODEL.PIXEL_STD"] == [64.0] * 3
    opts = ["MODEL.WEIGHTS", str(tmp_path / "output" / "model_final.pth")]
    opts += ["DATASETS.TEST", repr(tuple(source.cfg.DATASETS.TRAIN))]
    assert _train(source, tmp_path / "evaluated", *opts, flags=["--eval-only"]) == 2
    opts += ["INPUT.FORMAT", "RGB"]
    assert _train(source, tmp_path / "evaluated", *opts, flags=["--eval-only"]) == 0
