"""Image classification through ``train_net.py``: train, evaluate, resume, and mistakes."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from detectron2.config import CfgNode

from batchformer_panoptic.engine import load_config
from helpers.commands import REPO_ROOT, load_script
from helpers.image_folders import unique_name, write_image_folder

SMALL = [["patch_size", 4], ["embed_dim", 16], ["depth", 2], ["num_heads", 2]]


@pytest.fixture
def config_file(tmp_path: Path) -> str:
    """The config of the digits with tiny folders, a tiny model and few steps."""
    rows = [
        [unique_name(), str(write_image_folder(tmp_path / split, counts))]
        for split, counts in (("train", (3, 3, 3)), ("val", (2, 3, 1)))
    ]
    config: dict[str, Any] = {
        "_BASE_": str(REPO_ROOT / "configs" / "classification" / "digits_vit.yaml"),
        "OUTPUT_DIR": str(tmp_path / "output"),
        "DATASETS": {
            "CUSTOM_IMAGE_FOLDERS": rows,
            "TRAIN": [rows[0][0]],
            "TEST": [rows[1][0]],
        },
        "SOLVER": {"MAX_ITER": 4, "IMS_PER_BATCH": 4, "CHECKPOINT_PERIOD": 2, "WARMUP_ITERS": 1},
        "MODEL": {
            "DEVICE": "cpu",
            "CLASSIFIER": {"TIMM_KWARGS": SMALL, "MIXUP_ALPHA": 0.8},
            "BATCHFORMER": {"INSERT_LAYERS": [0]},
        },
        "TEST": {"EVAL_PERIOD": 2, "IMS_PER_BATCH": 4},
    }
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    return str(path)


def run(config_file: str, *argv: object) -> int:
    words = ["--config-file", config_file, *map(str, argv)]
    return load_script("train_net.py").main(words)


def results(folder: Path) -> dict[str, Any]:
    return json.loads(next((folder / "inference").rglob("classification_results.json")).read_text())


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return torch.load(folder / "model_final.pth", weights_only=True)["model"]


@pytest.mark.parametrize("block", [False, True])
def test_train_resume_and_evaluate(tmp_path: Path, config_file: str, block: bool) -> None:
    through, stopped = tmp_path / "through", tmp_path / "stopped"
    opts = ["MODEL.BATCHFORMER.ENABLED", block, "INPUT.CLASSIFICATION.REPEATED_AUGMENTATION", 3]
    assert run(config_file, *opts, "OUTPUT_DIR", through) == 0
    checkpoint = torch.load(through / "model_final.pth", weights_only=True)
    assert [c["name"] for c in checkpoint["class_table"]] == ["ant", "bee", "cat"]
    assert checkpoint["settings"]["MODEL.CLASSIFIER.TIMM_KWARGS"] == SMALL
    assert any("batchformer" in name for name in checkpoint["model"]) == block
    best = json.loads((through / "model_best.json").read_text())
    assert best["metric"] == "classification/top1"
    assert list(best["per_class"]) == ["ant", "bee", "cat"]
    assert "Accuracy per class" in (through / "report.html").read_text()
    logged = [json.loads(line) for line in (through / "metrics.json").read_text().splitlines()]
    assert any("classification/top1" in record for record in logged)
    assert any("batchformer/loss_class" in record for record in logged) == block

    stopped.mkdir()
    shutil.copy(through / "model_0000001.pth", stopped)
    (stopped / "last_checkpoint").write_text("model_0000001.pth")
    assert run(config_file, "--resume", *opts, "OUTPUT_DIR", stopped) == 0
    first, second = weights(through), weights(stopped)
    assert all(torch.equal(second[name], value) for name, value in first.items())
    assert results(stopped) == results(through)

    # Without the block, the same weights give the same results for any batch.
    plain = ["MODEL.WEIGHTS", through / "model_final.pth", "MODEL.BATCHFORMER.ENABLED", False]
    evaluated = tmp_path / "evaluated"
    more = ["TEST.IMS_PER_BATCH", 1, "OUTPUT_DIR", evaluated]
    assert run(config_file, "--eval-only", *plain, *more) == 0
    assert results(evaluated) == results(through)
    assert results(through)["num_images"] == 6


def test_another_step_gives_other_weights(tmp_path: Path, config_file: str) -> None:
    for folder, steps in (("a", 1), ("b", 2)):
        opts = ["SOLVER.MAX_ITER", steps, "TEST.EVAL_PERIOD", 0, "OUTPUT_DIR", tmp_path / folder]
        assert run(config_file, *opts) == 0
    first, second = weights(tmp_path / "a"), weights(tmp_path / "b")
    assert not torch.equal(first["vit.model.head.weight"], second["vit.model.head.weight"])


def test_start_from_a_model_of_other_classes(
    tmp_path: Path, config_file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    short = ["SOLVER.MAX_ITER", 1, "TEST.EVAL_PERIOD", 0]
    assert run(config_file, *short) == 0
    source = tmp_path / "output" / "model_final.pth"
    name, root = unique_name(), write_image_folder(tmp_path / "two", (2, 2))
    other = ["DATASETS.CUSTOM_IMAGE_FOLDERS", [[name, str(root)]], "DATASETS.TRAIN", (name,)]
    other += ["DATASETS.TEST", (name,), "OUTPUT_DIR", tmp_path / "other", "SOLVER.BASE_LR", 1e-9]
    capsys.readouterr()
    assert run(config_file, *short, *other, "MODEL.WEIGHTS", source) == 2
    assert "trained on other classes" in capsys.readouterr().err
    assert run(config_file, "--init-from", source, *short, *other) == 0
    old, new = weights(tmp_path / "output"), weights(tmp_path / "other")
    trunk = "vit.model.blocks.0.attn.qkv.weight"
    torch.testing.assert_close(new[trunk], old[trunk], rtol=0, atol=1e-6)
    assert (len(old["vit.model.head.bias"]), len(new["vit.model.head.bias"])) == (3, 2)


def test_weights_of_another_model_are_told(
    tmp_path: Path, config_file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    short = ["SOLVER.MAX_ITER", 1, "TEST.EVAL_PERIOD", 0]
    torch.save({"model": {"fc.weight": torch.zeros(3, 4)}}, tmp_path / "other.pth")
    assert run(config_file, *short, "MODEL.WEIGHTS", tmp_path / "other.pth") == 2
    assert "keys missing" in capsys.readouterr().err
    assert run(config_file, *short) == 0
    heads = [["num_heads", 4] if pair[0] == "num_heads" else pair for pair in SMALL]
    argv = ["MODEL.WEIGHTS", tmp_path / "output" / "model_final.pth"]
    argv += ["MODEL.CLASSIFIER.TIMM_KWARGS", heads]
    capsys.readouterr()
    assert run(config_file, "--eval-only", *argv) == 2
    assert "MODEL.CLASSIFIER.TIMM_KWARGS is" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("opts", "message"),
    [
        (["MODEL.META_ARCHITECTURE", "PanopticDETR"], "has one label for each image"),
        (["DATASETS.TRAIN", ("gone",)], "unknown data set 'gone'"),
        (["INPUT.CLASSIFICATION.AUTO_AUGMENT", "nonsense"], "timm does not support"),
        (["INPUT.CLASSIFICATION.CROP", 1], "unknown config key"),
        (["MODEL.CLASSIFIER.NUM_CLASSES", 7], "but the data sets have 3 classes"),
    ],
)
def test_mistakes_are_one_line(
    config_file: str, capsys: pytest.CaptureFixture[str], opts: list[Any], message: str
) -> None:
    assert run(config_file, *opts) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert message in errors[0]


def test_a_damaged_image_is_one_line(
    tmp_path: Path, config_file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "train" / "ant" / "0.png").write_bytes(b"no picture")
    assert run(config_file) == 2
    assert "ant/0.png cannot be read" in capsys.readouterr().err.splitlines()[-1]


def test_the_best_metric_names_the_data_set_when_there_are_two() -> None:
    from batchformer_panoptic.engine.trainer import _best_metric

    cfg: CfgNode = load_config("")
    cfg.DATASETS.TEST = ("a", "b")
    assert _best_metric(cfg) == "a/bbox/AP"


def test_the_model_can_be_analysed(config_file: str, capsys: pytest.CaptureFixture[str]) -> None:
    tool = load_script("tools/analyze_model.py")
    tasks = ["--tasks", "parameter", "flop", "--num-inputs", "1"]
    assert tool.main(["--config-file", config_file, *tasks]) == 0
    assert "8x8 pixels" in capsys.readouterr().out


def test_a_model_can_be_analysed_without_its_data_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    tool = load_script("tools/analyze_model.py")
    argv = ["--tasks", "parameter", "flop", "--num-inputs", "1"]
    config = str(REPO_ROOT / "configs" / "classification" / "deit_tiny_imagenet.yaml")
    assert tool.main(["--config-file", config, *argv]) == 2
    assert "or give --opts MODEL.CLASSIFIER.NUM_CLASSES N" in capsys.readouterr().err
    opts = ["--opts", "MODEL.CLASSIFIER.NUM_CLASSES", "1000", "MODEL.DEVICE", "cpu"]
    assert tool.main(["--config-file", config, *argv, *opts]) == 0
    out = capsys.readouterr().out
    assert "total 5.717 million parameters" in out  # of DeiT-Ti, as published: 5 million
    assert "224x224 pixels" in out


def test_pictures_of_a_classifier_are_refused_in_one_line(
    tmp_path: Path, config_file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    demo = load_script("demo/demo.py")
    argv = ["--input", "a.png", "--output", str(tmp_path / "drawn")]
    assert demo.main(["--config-file", config_file, *argv]) == 2
    assert "ImageClassifier predicts neither" in capsys.readouterr().err
