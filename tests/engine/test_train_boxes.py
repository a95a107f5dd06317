"""Box detection through the commands: train, evaluate, demo, pictures, analysis. No masks."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image

from helpers.commands import load_script
from helpers.instance_files import InstanceFiles, write_instances


@pytest.fixture
def files(tmp_path: Path) -> InstanceFiles:
    return write_instances(tmp_path / "set")


@pytest.fixture
def config_file(tmp_path: Path, files: InstanceFiles) -> str:
    name = f"boxes_{tmp_path.name}_{id(tmp_path)}"
    config: dict[str, Any] = {
        "VERSION": 2,
        "SEED": 3,
        "OUTPUT_DIR": str(tmp_path / "output"),
        "DATASETS": {"CUSTOM_INSTANCES": [files.row(name)], "TRAIN": [name], "TEST": [name]},
        "DATALOADER": {"NUM_WORKERS": 0},
        "INPUT": {"MIN_SIZE_TRAIN": [32], "MIN_SIZE_TEST": 32, "FORMAT": "RGB"},
        "SOLVER": {"MAX_ITER": 2, "IMS_PER_BATCH": 2, "STEPS": []},
        "MODEL": {
            "DEVICE": "cpu",
            "META_ARCHITECTURE": "PanopticDETR",
            "WEIGHTS": "",
            "BACKBONE": {"NAME": "build_small_resnet_backbone"},
            "SMALL_RESNET": {"STEM_CHANNELS": 8, "STAGE_CHANNELS": [8, 12, 16, 24]},
            "RESNETS": {"OUT_FEATURES": ["res5"]},
            "DETR": {"HIDDEN_DIM": 32, "NHEADS": 4, "DIM_FEEDFORWARD": 32, "ENC_LAYERS": 1},
            "BATCHFORMER": {"ENABLED": True},
        },
    }
    config["MODEL"]["DETR"].update(DEC_LAYERS=2, NUM_OBJECT_QUERIES=8)
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    return str(path)


def run(script: str, *argv: object) -> int:
    return load_script(script).main([str(argument) for argument in argv])


@pytest.mark.parametrize(
    ("transformer", "scoring"), [("detr", "softmax"), ("conditional", "focal")]
)
def test_train_evaluate_and_draw(
    tmp_path: Path,
    config_file: str,
    files: InstanceFiles,
    capsys: pytest.CaptureFixture[str],
    transformer: str,
    scoring: str,
) -> None:
    base = ["--config-file", config_file]
    model = ["MODEL.DETR.TRANSFORMER_NAME", transformer, "MODEL.DETR.SCORING", scoring]
    assert run("train_net.py", *base, *model) == 0
    records = (tmp_path / "output" / "metrics.json").read_text().splitlines()
    metrics = {k: v for line in records for k, v in json.loads(line).items()}
    assert {"bbox/AP", "bbox/AP-cat", "bbox/AP-dog"} <= set(metrics)
    assert not [key for key in metrics if key.startswith(("panoptic_seg/", "segm/"))]
    assert "AP of boxes per class" in (tmp_path / "output" / "report.html").read_text()

    weights = tmp_path / "output" / "model_final.pth"
    checkpoint = torch.load(weights, weights_only=True)
    assert [(c["id"], c["name"]) for c in checkpoint["class_table"]] == [(4, "cat"), (9, "dog")]
    folder = tmp_path / "evaluated"
    # Without the block the same weights give the same boxes.
    plain = ["MODEL.WEIGHTS", weights, "MODEL.BATCHFORMER.ENABLED", "False", "OUTPUT_DIR", folder]
    assert run("train_net.py", *base, "--eval-only", *model, *plain) == 0
    results = [
        next(parent.rglob("coco_instances_results.json")).read_text()
        for parent in (tmp_path / "output" / "inference", folder / "inference")
    ]
    assert results[0] == results[1]
    assert {box["category_id"] for box in json.loads(results[0])} <= {4, 9}

    capsys.readouterr()
    opts = ["--opts", "MODEL.WEIGHTS", weights, *model]
    image, drawn = files.image_root / "0.png", tmp_path / "drawn"
    arguments = ["--input", image, "--output", drawn, "--confidence-threshold", "0"]
    assert run("demo/demo.py", *base, *arguments, *opts) == 0
    found = re.search(r"0.png: (\d+) objects, ", capsys.readouterr().out)
    assert found is not None
    # A softmax query is one detection; a focal one may be one of each class.
    assert int(found[1]) == 8 if scoring == "softmax" else int(found[1]) >= 8
    assert Image.open(drawn / "0.png").size == (512, 384)
    pictures = tmp_path / "pictures"
    arguments = ["--num", 3, "--output", pictures]
    assert run("tools/visualize_predictions.py", *base, *arguments, *opts) == 0
    assert len(list(pictures.iterdir())) == 4
    assert run("tools/visualize_data.py", *base, *arguments) == 0


def test_the_model_can_be_analysed(config_file: str, capsys: pytest.CaptureFixture[str]) -> None:
    tasks = ["--tasks", "parameter", "flop", "activation", "structure", "speed"]
    argv = ["--config-file", config_file, *tasks, "--num-inputs", "1"]
    assert run("tools/analyze_model.py", *argv) == 0
    out = capsys.readouterr().out
    assert "G multiply-adds an image" in out
    assert "mask_head" not in out
