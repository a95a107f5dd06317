"""Every fault of a data set: the words of both commands, their exit statuses, and the document.

`UPDATE_FAULT_TABLE=1 pytest tests/data/validation/test_fault_table.py` writes docs/data_faults.md.
"""

import importlib
import json
import logging
import os
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from batchformer_panoptic.data.validation import Problem
from helpers.commands import load_script
from helpers.data_faults import DOCUMENT, FAULTS, WARNINGS, Fault, Outcome, render, write_sound_set

BUILT = "the model is built"
# Parts of the lines that depend on the run.
_FOLDERS = r"{}/|_{}"
ALL = {fault.done: fault for fault in (*FAULTS, *WARNINGS)}


def doctor(root: Path, *options: str) -> int:
    folders = ["--image-root", str(root / "images"), "--panoptic-root", str(root / "panoptic")]
    arguments = ["--json", str(root / "set.json"), *folders, *options]
    return load_script("tools/check_dataset.py").main(arguments)


def write_config(folder: Path, train: Path, val: Path, **keys: Any) -> Path:
    rows = [
        [
            f"{part}_{folder.parent.name}_{folder.name}",
            str(root / "images"),
            str(root / "panoptic"),
            str(root / "set.json"),
        ]
        for part, root in (("train", train), ("val", val))
    ]
    datasets = {"CUSTOM_PANOPTIC": rows, "TRAIN": [rows[0][0]], "TEST": [rows[1][0]], **keys}
    model = {"DEVICE": "cpu", "MASK_ON": True, "META_ARCHITECTURE": "PanopticDETR"}
    content = {"DATASETS": datasets, "MODEL": model, "OUTPUT_DIR": str(folder / "out")}
    content["DATALOADER"] = {"NUM_WORKERS": 0}
    (folder / "config.yaml").write_text(yaml.safe_dump(content))
    return folder / "config.yaml"


class Built(Exception):
    """Raised instead of building the model."""


def refuse_to_build(_cfg: Any) -> None:
    raise Built


@pytest.fixture
def _no_model(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FVCORE_CACHE", str(tmp_path / "cache"))
    # The package has a function named like the module.
    run_module = importlib.import_module("batchformer_panoptic.engine.run")
    monkeypatch.setattr(run_module, "PanopticTrainer", refuse_to_build)
    setup_module = importlib.import_module("batchformer_panoptic.engine.setup")
    for name in ("start_logging", "collect_env_info"):  # slow; and logs are to reach caplog
        monkeypatch.setattr(setup_module, name, lambda *args, **kwargs: None)


def train(config: Path) -> int:
    try:
        return load_script("train_net.py").main(["--config-file", str(config)])
    except Built:
        return 0


OUTCOMES: dict[str, Outcome] = {}


def run_both(fault: Fault, tmp_path: Path, capsys: Any, caplog: Any, **datasets: Any) -> Outcome:
    """Spoil the validation set, and run both commands on it."""
    sound, root = write_sound_set(tmp_path / "sound", seed=1), write_sound_set(tmp_path / "SET")
    fault.spoil(root)
    report = tmp_path / "report.json"
    capsys.readouterr()
    doctor_status = doctor(root, "--json-out", str(report))
    assert capsys.readouterr().err.count("error:") == 0
    problems = json.loads(report.read_text())["problems"]
    (problem, *_) = [row for row in problems if row["kind"] == fault.kind]
    del problem["data_set"]
    line = str(Problem(**problem))
    with caplog.at_level(logging.WARNING):
        trainer_status = train(write_config(tmp_path, sound, root, **datasets))
    error = capsys.readouterr().err.strip()
    warnings = [record.message for record in caplog.records if "data.check" in record.name]
    trainer = error.splitlines()[-1] if trainer_status else " ".join(warnings)
    outcome = Outcome(f"{problem['severity']}: {line}", doctor_status, trainer, trainer_status)
    texts = [
        re.sub(_FOLDERS.format(tmp_path, f"{tmp_path.parent.name}_{tmp_path.name}"), "", text)
        for text in (outcome.doctor, outcome.trainer)
    ]
    OUTCOMES[fault.done] = Outcome(texts[0], doctor_status, texts[1], trainer_status)
    return outcome._replace(doctor=line)


@pytest.mark.usefixtures("_no_model")
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.done)
def test_both_commands_refuse_a_fault_in_the_same_words(
    fault: Fault,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    outcome = run_both(fault, tmp_path, capsys, caplog)
    assert (outcome.doctor_status, outcome.trainer_status) == (1, 2)
    assert outcome.trainer.startswith("error: ")
    assert outcome.doctor in outcome.trainer


@pytest.mark.usefixtures("_no_model")
@pytest.mark.parametrize("fault", WARNINGS, ids=lambda fault: fault.done)
def test_both_commands_read_a_set_with_a_warning(
    fault: Fault,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    # The sound set might have other classes; a set without targets is for evaluation only.
    name = f"{'train' if fault.kind == 'no targets' else 'val'}_"
    name += f"{tmp_path.parent.name}_{tmp_path.name}"
    outcome = run_both(fault, tmp_path, capsys, caplog, TRAIN=[name])
    assert (outcome.doctor_status, outcome.trainer_status) == (0, 0)
    is_note = OUTCOMES[fault.done].doctor.startswith("note: ")
    assert (fault.kind in outcome.trainer) != is_note


def test_the_document_is_current() -> None:
    if OUTCOMES.keys() != ALL.keys():
        pytest.skip("needs the outcomes of all tests of this file")
    text = render(OUTCOMES)
    if os.environ.get("UPDATE_FAULT_TABLE"):
        DOCUMENT.write_text(text, encoding="utf-8")
    assert DOCUMENT.read_text(encoding="utf-8") == text
