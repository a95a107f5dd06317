"""``train_net.py`` on real files with the real model, tiny."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from helpers.commands import load_script
from helpers.tiny_dataset import TinyPanopticDataset


@pytest.fixture
def config_file(tmp_path: Path, tiny_panoptic_dataset: TinyPanopticDataset) -> str:
    name = tiny_panoptic_dataset.row[0]
    config: dict[str, Any] = {
        "VERSION": 2,
        "SEED": 5,
        "OUTPUT_DIR": str(tmp_path / "output"),
        "DATASETS": {
            "CUSTOM_PANOPTIC": [tiny_panoptic_dataset.row],
            "TRAIN": [name],
            "TEST": [name],
        },
        "DATALOADER": {"NUM_WORKERS": 0, "ASPECT_RATIO_GROUPING": False},
        "INPUT": {"MIN_SIZE_TRAIN": [32], "MIN_SIZE_TEST": 32, "FORMAT": "RGB"},
        "SOLVER": {"MAX_ITER": 4, "IMS_PER_BATCH": 2, "STEPS": [], "CHECKPOINT_PERIOD": 2},
        "MODEL": {
            "DEVICE": "cpu",
            "META_ARCHITECTURE": "PanopticDETR",
            "MASK_ON": True,
            "WEIGHTS": "",
            "BACKBONE": {"NAME": "build_small_resnet_backbone"},
            "SMALL_RESNET": {"STEM_CHANNELS": 8, "STAGE_CHANNELS": [8, 12, 16, 24]},
            "RESNETS": {"OUT_FEATURES": ["res2", "res3", "res4", "res5"]},
            "DETR": {"HIDDEN_DIM": 32, "NHEADS": 4, "DIM_FEEDFORWARD": 32, "ENC_LAYERS": 1},
            "BATCHFORMER": {"ENABLED": True},
            "PANOPTIC": {"SCORE_THRESHOLD_TEST": 0.0},
        },
    }
    config["MODEL"]["DETR"].update(DEC_LAYERS=2, NUM_OBJECT_QUERIES=8)
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    return str(path)


def _run(*argv: str) -> int:
    return load_script("train_net.py").main(list(argv))


def _last_quality(folder: Path) -> dict[str, float]:
    records = [json.loads(line) for line in (folder / "metrics.json").read_text().splitlines()]
    merged = {k: v for record in records for k, v in record.items()}
    return {k: v for k, v in merged.items() if k.startswith("panoptic_seg/")}


def test_train_stop_resume_and_evaluate(tmp_path: Path, config_file: str) -> None:
    through, stopped = tmp_path / "through", tmp_path / "stopped"
    base = ["--config-file", config_file]
    assert _run(*base, "OUTPUT_DIR", str(through)) == 0
    assert "panoptic_seg/PQ" in _last_quality(through)

    # As if the run had been killed after its checkpoint at iteration 2.
    stopped.mkdir()
    (stopped / "model_0000001.pth").write_bytes((through / "model_0000001.pth").read_bytes())
    (stopped / "last_checkpoint").write_text("model_0000001.pth")
    assert _run(*base, "--resume", "OUTPUT_DIR", str(stopped)) == 0
    models = [
        torch.load(folder / "model_final.pth", weights_only=True)["model"]
        for folder in (through, stopped)
    ]
    assert all(torch.equal(models[1][name], value) for name, value in models[0].items())
    assert _last_quality(stopped) == _last_quality(through)

    plain = [
        "MODEL.WEIGHTS",
        str(through / "model_final.pth"),
        "MODEL.BATCHFORMER.ENABLED",
        "False",
    ]
    assert _run(*base, "--eval-only", *plain, "OUTPUT_DIR", str(tmp_path / "evaluated")) == 0
    results = [
        next((tmp_path / run / "inference").rglob(name)).read_text()
        for run in ("through", "evaluated")
        for name in ("panoptic_results.json", "coco_instances_results.json")
    ]
    assert results[:2] == results[2:]

    for batch in ("2", "4"):
        folder = tmp_path / f"batch_{batch}"
        arguments = [*plain, "TEST.IMS_PER_BATCH", batch, "OUTPUT_DIR", str(folder)]
        assert _run(*base, "--eval-only", *arguments) == 0
        assert _counts(folder) == _counts(through)


def _counts(folder: Path) -> list[tuple[str, int, int, int]]:
    results = json.loads(next(folder.rglob("panoptic_results.json")).read_text())
    return [(c["name"], c["tp"], c["fp"], c["fn"]) for c in results["per_class"]]


def test_evaluating_nothing_is_an_error(
    config_file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _run("--config-file", config_file, "--eval-only") == 2
    assert "error: --eval-only needs weights" in capsys.readouterr().err


@pytest.mark.distributed
def test_error_of_a_launched_process_is_one_line(
    config_file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["--config-file", config_file, "--num-gpus", "2", "SOLVER.IMS_PER_BATCH", "3"]
    assert _run(*argv) == 2
    errors = capsys.readouterr().err.splitlines()
    assert [e for e in errors if e.startswith("error: SOLVER.IMS_PER_BATCH is 3")] == errors[-1:]
