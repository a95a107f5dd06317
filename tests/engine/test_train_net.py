"""``train_net.py`` on real files with the real model, tiny."""

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from batchformer_panoptic.engine import trainer
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


FAST = ("SOLVER.MAX_ITER", "2", "TEST.EVAL_PERIOD", "1")


def test_a_small_model_runs_on_one_thread(
    config_file: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    before = torch.get_num_threads()
    weights = ("MODEL.WEIGHTS", str(tmp_path / "output" / "model_final.pth"))
    try:
        for arguments in (FAST, ("--eval-only", *weights)):
            torch.set_num_threads(2)
            assert _run("--config-file", config_file, *arguments) == 0
            assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


def test_the_console_shows_lines_and_the_log_everything(
    tmp_path: Path, config_file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _run("--config-file", config_file, *FAST) == 0
    output = tmp_path / "output"
    lines = capsys.readouterr().out.splitlines()
    first_step = next(number for number, line in enumerate(lines) if "iter: 1/2" in line)
    assert first_step <= 30
    starts = ("[", "WARNING [")  # no second lines, and no prints
    assert [line for line in lines if not line.startswith(starts)] == []
    assert sum(": panoptic_seg PQ " in line for line in lines) == 2  # evaluations

    best = json.loads((output / "model_best.json").read_text())
    per_class = ", ".join(f"{name} {value:.1f}" for name, value in best["per_class"].items())
    last = [line.partition("]: ")[2] for line in lines[-4:]]
    assert last == [
        f"best: {output}/model_best.pth, panoptic_seg/PQ {best['value']:.2f} after iteration "
        f"{min(best['iteration'] + 1, 2)}",
        f"PQ per class: {per_class}",
        f"report: {output}/report.html",
        "look at predictions: python tools/visualize_predictions.py --config-file "
        f"{output}/config.yaml --output {output}/pictures --opts MODEL.WEIGHTS "
        f"{output}/model_best.pth",
    ]
    script, *arguments = last[-1].partition("python ")[2].split()
    assert load_script(script).main(arguments) == 0

    log = (output / "log.txt").read_text()
    for expected in ("OUTPUT_DIR:", "PyTorch", "(mask_head): ", "| ground", "Average Precision"):
        assert expected in log
    assert "\x1b" not in log
    assert "<h2>Evaluation on" in (output / "report.html").read_text()


def test_tensorboard_shows_predictions(tmp_path: Path, config_file: str) -> None:
    assert _run("--config-file", config_file, *FAST) == 0
    events = EventAccumulator(str(tmp_path / "output"), size_guidance={"images": 0}).Reload()
    names = {tag.rpartition("/")[2] for tag in events.Tags()["images"]}
    assert names == {"000.png", "001.jpg", "002.png", "003.jpg"}
    assert [image.step for image in events.Images(events.Tags()["images"][0])] == [0, 2]


def test_an_earlier_run_is_kept_unless_told_otherwise(
    tmp_path: Path, config_file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    base = ["--config-file", config_file]
    output = tmp_path / "output"
    assert _run(*base, "SOLVER.MAX_ITER", "1") == 0
    before = (output / "metrics.json").read_text()
    assert _run(*base, "SOLVER.MAX_ITER", "2") == 2
    assert "has an earlier run: continue it with --resume" in capsys.readouterr().err
    weights = ["MODEL.WEIGHTS", str(output / "model_final.pth")]
    assert _run(*base, "--overwrite", *weights) == 2
    assert "would delete" in capsys.readouterr().err
    assert _run(*base, "--overwrite", "--resume") == 2
    assert (output / "metrics.json").read_text() == before

    config = (output / "config.yaml").read_text()
    assert _run(*base, "--eval-only", *weights, "TEST.IMS_PER_BATCH", "2") == 0
    assert (output / "config.yaml").read_text() == config
    (output / "mine.txt").write_text("not of the run")
    (output / "inference" / "old.json").write_text("of the run")
    assert _run(*base, "--overwrite", "SOLVER.MAX_ITER", "2") == 0
    records = (output / "metrics.json").read_text().splitlines()
    assert [json.loads(record)["iteration"] for record in records].count(0) == 1
    assert not (output / "model_0000000.pth").exists()
    assert not (output / "inference" / "old.json").exists()
    assert (output / "mine.txt").exists()


def test_a_lost_report_is_a_warning(
    tmp_path: Path,
    config_file: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*_args: object, **_kwargs: object) -> None:
        raise RuntimeError("no\nmemory")

    monkeypatch.setattr(trainer, "write_report", fail)
    assert _run("--config-file", config_file, "SOLVER.MAX_ITER", "1") == 0
    assert "the report failed: RuntimeError: no memory" in capsys.readouterr().out
    assert (tmp_path / "output" / "model_final.pth").exists()


@pytest.mark.parametrize("place", ["step", "evaluation"])
def test_ctrl_c_saves_and_leaves_in_one_line(
    tmp_path: Path,
    config_file: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    place: str,
) -> None:
    base = ["--config-file", config_file, "DATALOADER.NUM_WORKERS", "1", "TEST.EVAL_PERIOD", "3"]
    through, stopped = tmp_path / "through", tmp_path / "stopped"
    assert _run(*base, "OUTPUT_DIR", str(through)) == 0
    name = {"step": "run_step", "evaluation": "test"}[place]
    method, handler = getattr(trainer.PanopticTrainer, name), signal.getsignal(signal.SIGINT)

    def interrupted(*args: Any) -> Any:
        if place == "evaluation" or args[0].iter == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return method(*args)

    capsys.readouterr()
    with monkeypatch.context() as patched:
        patched.setattr(trainer.PanopticTrainer, name, interrupted)
        assert _run(*base, "OUTPUT_DIR", str(stopped)) == 130
    shown = capsys.readouterr()
    assert [line for line in shown.err.splitlines() if line.strip()] == [
        f"interrupted after iteration 3 of 4: --resume continues from {stopped}/model_0000002.pth"
    ]
    assert "Traceback" not in shown.out
    assert "iter: 3/4" in shown.out.splitlines()[-1]
    assert (stopped / "report.html").exists()
    assert signal.getsignal(signal.SIGINT) is handler
    assert _run("--resume", *base, "OUTPUT_DIR", str(stopped)) == 0
    models = [
        torch.load(folder / "model_final.pth", weights_only=True)["model"]
        for folder in (through, stopped)
    ]
    assert all(torch.equal(models[1][name], value) for name, value in models[0].items())
