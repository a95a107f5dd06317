"""Mistakes on the command line are one line and exit status 2."""

from pathlib import Path

import pytest
import torch

from batchformer_panoptic.engine import argument_parser, load_config
from batchformer_panoptic.errors import UserError
from helpers.commands import load_script

CPU = ["MODEL.DEVICE", "cpu"]


def _error(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    assert load_script("train_net.py").main(list(argv)) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    return lines[0]


@pytest.mark.parametrize(
    ("yaml", "words"),
    [
        ("MODEL: {DETR: {NUM_CLASES: 3}}", "unknown config key MODEL.DETR.NUM_CLASES"),
        ("MODEL: {DETR: {NUM_CLASES: 3}}", "did you mean MODEL.DETR.NUM_CLASSES"),
        ("SOLVER: {MAX_ITER: many}", "SOLVER.MAX_ITER"),
        ("MODEL: [", "not a readable YAML file"),
        ("MODEL: !!python/object/apply:os.getcwd []", "not a readable YAML file"),
        ("_BASE_: nowhere.yaml", "nowhere.yaml does not exist"),
        ("just words", "not a mapping of config keys"),
    ],
)
def test_config_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], yaml: str, words: str
) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(yaml)
    line = _error(capsys, "--config-file", str(config), *CPU)
    assert words in line
    assert "config.yaml" in line


@pytest.mark.parametrize(
    ("opts", "words"),
    [
        (["SOLVER.BASE_LT", "1"], "unknown config key SOLVER.BASE_LT; did you mean SOLVER.BASE_LR"),
        (["SOLVER.MAX_ITER", "many"], "bad value for SOLVER.MAX_ITER"),
        (["SOLVER.MAX_ITER"], "pairs KEY VALUE"),
        (["MODEL.DEVICE", "abacus"], "unknown MODEL.DEVICE 'abacus'"),
        (["MODEL.META_ARCHITECTURE", "PanopticDETER"], "PanopticDETR"),
        (["MODEL.BACKBONE.NAME", "build_small_resnt_backbone"], "build_small_resnet_backbone"),
        (["DATASETS.TRAIN", "('coco_2017_train_panoptik',)"], "coco_2017_train_panoptic"),
        (["DATASETS.TRAIN", "()"], "DATASETS.TRAIN is empty"),
        (["MODEL.BATCHFORMER.STREAM_WEIGHTS", "[1.0]"], "STREAM_WEIGHTS must be 2 numbers"),
        (["MODEL.BATCHFORMER.EVERY", "0"], "MODEL.BATCHFORMER.EVERY must be at least 1, not 0"),
        (["SOLVER.CHECKPOINT_PERIOD", "0"], "SOLVER.CHECKPOINT_PERIOD"),
        (["SOLVER.EMA_DECAY", "1.5"], "SOLVER.EMA_DECAY"),
        (["SOLVER.EPOCHS", "-1"], "SOLVER.EPOCHS must be at least 0, not -1"),
        (["SOLVER.GRADIENT_ACCUMULATION", "0"], "SOLVER.GRADIENT_ACCUMULATION"),
        (
            ["MODEL.ACTIVATION_CHECKPOINTING", "['encode']"],
            "MODEL.ACTIVATION_CHECKPOINTING names 'encode'",
        ),
        (["SOLVER.AMP.DTYPE", "float16"], "SOLVER.AMP.DTYPE float16 is for GPUs"),
        (["TEST.FAST.BFLOAT16", "True"], "TEST.FAST.BFLOAT16 is on, TEST.FAST.ENABLED is not"),
    ],
)
def test_options(capsys: pytest.CaptureFixture[str], opts: list[str], words: str) -> None:
    base = ["DATASETS.TRAIN", "('coco_2017_train_panoptic',)", "DATASETS.TEST", "()"]
    base += ["MODEL.META_ARCHITECTURE", "PanopticDETR"]
    assert words in _error(capsys, *CPU, *base, *opts)


def test_one_data_set_needs_no_tuple() -> None:
    opts = ["DATASETS.TRAIN", "mine_train", "DATASETS.TEST", "('mine_val', 'mine_test')"]
    cfg = load_config("", [*CPU, *opts])
    assert cfg.DATASETS.TRAIN == ("mine_train",)
    assert cfg.DATASETS.TEST == ("mine_val", "mine_test")
    for written in ("['mine-val.2']", "'mine-val.2',", "mine-val.2"):
        assert load_config("", [*CPU, "DATASETS.TEST", written]).DATASETS.TEST == ("mine-val.2",)
    assert load_config("", [*CPU, "DATASETS.TRAIN", "2024"]).DATASETS.TRAIN == ("2024",)


@pytest.mark.parametrize("argv", [["--opts", "KEY", "1"], ["KEY", "1"]])
def test_options_follow_a_flag_or_come_last(argv: list[str]) -> None:
    args = argument_parser().parse_args(["--config-file", "a.yaml", "--resume", *argv])
    assert (args.config_file, args.resume, args.opts) == ("a.yaml", True, ["KEY", "1"])


def test_without_options() -> None:
    args = argument_parser().parse_args(["--num-gpus", "0"])
    assert (args.config_file, args.opts, args.num_gpus, args.dist_url) == ("", [], 0, None)


def test_a_config_is_found_in_the_checkout_from_any_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "configs/quickstart/mask2former_shapes.yaml"
    monkeypatch.chdir(tmp_path)
    assert load_config(name, CPU).MODEL.DETR.TRANSFORMER_NAME == "mask2former"
    own = tmp_path / name
    own.parent.mkdir(parents=True)
    own.write_text("MODEL: {DETR: {TRANSFORMER_NAME: smca}}")
    assert load_config(name, CPU).MODEL.DETR.TRANSFORMER_NAME == "smca"


def test_missing_config_file(capsys: pytest.CaptureFixture[str]) -> None:
    assert "nothing.yaml does not exist" in _error(capsys, "--config-file", "nothing.yaml", *CPU)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_cuda_without_cuda() -> None:
    with pytest.raises(UserError, match=r"CUDA is not available; use MODEL\.DEVICE cpu"):
        load_config("", ["MODEL.DEVICE", "cuda:0"])


def test_options_overrule_the_file(tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text("SOLVER: {MAX_ITER: 5, BASE_LR: 0.5}")
    cfg = load_config(str(config), [*CPU, "SOLVER.MAX_ITER", "7"])
    assert (cfg.SOLVER.MAX_ITER, cfg.SOLVER.BASE_LR) == (7, 0.5)
