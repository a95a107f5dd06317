"""A long run with real loader and evaluation: memory, files, threads and step time stay flat."""

import os
import statistics
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from batchformer_panoptic.engine import PanopticTrainer
from batchformer_panoptic.engine.setup import load_config, setup_datasets
from batchformer_panoptic.engine.writers import memory_in_use
from helpers.tiny_dataset import TinyPanopticDataset
from helpers.trained_files import write_run

ITERATIONS = 2000
SETTLED = 500  # from here on, caches and pools are filled
MEMORY = 20.0  # MiB, most growth from there to the end
SLOWER = 1.5  # at most, median step of the last quarter over that of the second


class Watched(PanopticTrainer):
    """Notes its use of the system in every iteration."""

    def run_step(self) -> None:
        """Time the step."""
        start = time.process_time()
        super().run_step()
        used = memory_in_use()["cpu_memory"], len(os.listdir("/proc/self/fd"))
        self.seen.append((*used, threading.active_count(), time.process_time() - start))


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_long_run_uses_no_more_of_the_system(
    tmp_path: Path, tiny_panoptic_dataset: TinyPanopticDataset
) -> None:
    block: dict[str, Any] = {"MODEL__BATCHFORMER__ENABLED": True, "MODEL__DETR__DROPOUT": 0.1}
    run = write_run(tmp_path / "config", tiny_panoptic_dataset, **block)
    options = ["OUTPUT_DIR", str(tmp_path / "run"), "SOLVER.MAX_ITER", str(ITERATIONS)]
    options += ["SOLVER.IMS_PER_BATCH", "2", "DATALOADER.NUM_WORKERS", "1", "SEED", "1"]
    options += ["TEST.EVAL_PERIOD", "250", "SOLVER.CHECKPOINT_PERIOD", "500"]
    cfg = load_config(str(run.config_file), options)
    setup_datasets(cfg)
    cfg.freeze()
    trainer = Watched(cfg)
    trainer.seen = []
    trainer.train()

    memory, files, threads, seconds = zip(*trainer.seen, strict=True)
    assert len(memory) == ITERATIONS
    assert max(memory[-100:]) - max(memory[SETTLED : SETTLED + 100]) < MEMORY
    assert max(files[SETTLED:]) == max(files[:SETTLED])
    assert max(threads[SETTLED:]) == max(threads[:SETTLED])
    quarter = ITERATIONS // 4
    slower = statistics.median(seconds[-quarter:]) / statistics.median(
        seconds[quarter : 2 * quarter]
    )
    assert slower < SLOWER
