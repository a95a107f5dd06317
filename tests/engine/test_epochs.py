"""``SOLVER.EPOCHS``: the schedule follows from the number of images."""

import shutil
from pathlib import Path

import pytest
import torch
from detectron2.config import CfgNode

from batchformer_panoptic.checkpoint import read_weights
from batchformer_panoptic.engine.run import argument_parser
from batchformer_panoptic.engine.setup import setup_cfg
from batchformer_panoptic.engine.solver import apply_epochs
from batchformer_panoptic.errors import UserError
from helpers.commands import load_script
from helpers.tiny_dataset import TinyPanopticDataset
from helpers.tiny_model import tiny_cfg
from helpers.trained_files import Run, write_run


def _schedule(cfg: CfgNode) -> tuple[int, tuple[int, ...], int, int, int]:
    solver = cfg.SOLVER
    periods = solver.CHECKPOINT_PERIOD, cfg.TEST.EVAL_PERIOD
    return solver.MAX_ITER, solver.STEPS, solver.WARMUP_ITERS, *periods


@pytest.fixture
def cfg() -> CfgNode:
    """90 % of the iterations before a drop of the learning rate, 100 for the warm-up."""
    return tiny_cfg(
        SOLVER__EPOCHS=7,
        SOLVER__IMS_PER_BATCH=4,
        SOLVER__MAX_ITER=1000,
        SOLVER__STEPS=(500, 900),
        SOLVER__WARMUP_ITERS=100,
    )


def test_the_schedule_follows_from_epochs_and_images(cfg: CfgNode) -> None:
    line = apply_epochs(cfg, num_images=101, fixed=())
    assert _schedule(cfg) == (177, (88, 159), 17, 23, 23)  # 7 * 101 / 4 = 176.75
    assert cfg.SOLVER.EPOCHS == 0
    assert line.startswith("SOLVER.EPOCHS 7 of 101 images, 4 per iteration: SOLVER.MAX_ITER 177")


def test_a_long_training_keeps_its_warm_up_and_counts_accumulated_batches(cfg: CfgNode) -> None:
    cfg.SOLVER.GRADIENT_ACCUMULATION = 2
    apply_epochs(cfg, num_images=8000, fixed=())
    assert _schedule(cfg) == (7000, (3500, 6300), 100, 875, 875)


def test_keys_of_the_command_line_keep_their_value(cfg: CfgNode) -> None:
    line = apply_epochs(cfg, num_images=101, fixed=["SOLVER.MAX_ITER", "TEST.EVAL_PERIOD"])
    assert _schedule(cfg) == (1000, (500, 900), 100, 125, 0)
    assert "MAX_ITER" not in line


@pytest.mark.parametrize("key", ["IMS_PER_BATCH", "MAX_ITER"])
def test_numbers_below_one_are_refused(cfg: CfgNode, key: str) -> None:
    cfg.SOLVER[key] = 0
    with pytest.raises(UserError, match=rf"SOLVER\.{key} must be at least 1, not 0"):
        apply_epochs(cfg, num_images=5, fixed=["SOLVER.MAX_ITER"])


@pytest.fixture
def run(tmp_path: Path, tiny_panoptic_dataset: TinyPanopticDataset) -> Run:
    return write_run(
        tmp_path / "run",
        tiny_panoptic_dataset,
        SOLVER__EPOCHS=2,
        SOLVER__IMS_PER_BATCH=2,
        SOLVER__LR_SCHEDULER_NAME="WarmupCosineLR",
        DATALOADER__NUM_WORKERS=0,
        TEST__EVAL_PERIOD=0,
        SEED=3,
    )


def _setup(config_file: Path, output: Path, *opts: str) -> CfgNode:
    argv = ["--config-file", str(config_file), *opts, "OUTPUT_DIR", str(output)]
    return setup_cfg(argument_parser().parse_args(argv))


def test_a_run_logs_its_schedule_and_writes_it_to_its_config(tmp_path: Path, run: Run) -> None:
    cfg = _setup(run.config_file, tmp_path / "a", "SOLVER.WARMUP_ITERS", "9")
    assert _schedule(cfg) == (5, (4,), 9, 1, 1)
    log = (tmp_path / "a" / "log.txt").read_text()
    assert "SOLVER.EPOCHS 2 of 5 images, 2 per iteration: SOLVER.MAX_ITER 5" in log
    assert "SOLVER.MAX_ITER 5 ends within the warm-up of 9 iterations" in log
    assert "set SOLVER.WARMUP_ITERS 0" in log
    # The same schedule from config.yaml, without the command line.
    again = _setup(tmp_path / "a" / "config.yaml", tmp_path / "b")
    assert _schedule(again) == _schedule(cfg)
    assert again.SOLVER.EPOCHS == 0


def test_evaluation_needs_no_training_images(tmp_path: Path, run: Run) -> None:
    cfg = _setup(run.config_file, tmp_path / "a", "--eval-only")
    assert cfg.SOLVER.EPOCHS == 2
    assert "ends within the warm-up" not in (tmp_path / "a" / "log.txt").read_text()


def test_resuming_equals_an_uninterrupted_run(tmp_path: Path, run: Run) -> None:
    def train(output: Path, *flags: str) -> None:
        argv = ["--config-file", str(run.config_file), *flags, "OUTPUT_DIR", str(output)]
        assert load_script("train_net.py").main([*argv, "DATASETS.TEST", "()"]) == 0

    through, stopped = tmp_path / "through", tmp_path / "stopped"
    train(through)
    stopped.mkdir()
    shutil.copy(through / "model_0000002.pth", stopped)
    (stopped / "last_checkpoint").write_text("model_0000002.pth")
    train(stopped, "--resume")
    mine, theirs = (read_weights(str(x / "model_final.pth")) for x in (stopped, through))
    assert mine["iteration"] == theirs["iteration"] == 4
    assert all(torch.equal(value, theirs["model"][k]) for k, value in mine["model"].items())
