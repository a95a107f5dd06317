"""Mask classification through the training command: all results, and none of the block's traces."""

import json
from pathlib import Path
from typing import Any

from helpers.commands import load_script
from helpers.tiny_dataset import TinyPanopticDataset
from helpers.tiny_model import MASK2FORMER
from helpers.trained_files import write_run


def results_of(folder: Path) -> dict[str, Any]:
    records = (folder / "metrics.json").read_text().splitlines()
    return {key: value for line in records for key, value in json.loads(line).items()}


def test_train_and_evaluate(tiny_panoptic_dataset: TinyPanopticDataset, tmp_path: Path) -> None:
    overrides = {
        **MASK2FORMER,
        "MODEL__PANOPTIC__SEMANTIC_TEST": True,
        "MODEL__BATCHFORMER__ENABLED": True,
        "SOLVER__MAX_ITER": 2,
        "SOLVER__IMS_PER_BATCH": 2,
        "SOLVER__STEPS": [],
        "DATALOADER__NUM_WORKERS": 0,
        "SEED": 3,
        "OUTPUT_DIR": str(tmp_path / "output"),
    }
    run = write_run(tmp_path / "run", tiny_panoptic_dataset, **overrides)
    main = load_script("train_net.py").main
    config = ["--config-file", str(run.config_file)]
    assert main(config) == 0
    trained = results_of(tmp_path / "output")
    wanted = {"panoptic_seg/PQ", "sem_seg/mIoU", "segm/AP", "bbox/AP", "total_loss"}
    assert wanted <= set(trained)
    assert not [key for key in trained if key.startswith(("loss_bbox", "loss_giou"))]
    again = tmp_path / "again"
    plain = ["MODEL.BATCHFORMER.ENABLED", "False", "OUTPUT_DIR", str(again)]
    weights = ["MODEL.WEIGHTS", str(tmp_path / "output" / "model_final.pth")]
    assert main([*config, "--eval-only", *weights, *plain]) == 0
    files = [folder / "inference" for folder in (tmp_path / "output", again)]
    pq = [next(f.rglob("panoptic_results.json")).read_text() for f in files]
    assert pq[0] == pq[1]
    instances = [next(f.rglob("coco_instances_results.json")).read_text() for f in files]
    assert instances[0] == instances[1]
    assert json.loads(instances[0])
