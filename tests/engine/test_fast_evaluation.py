"""TEST.FAST in the commands: the same numbers, and the trained model is not modified."""

from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2.config import CfgNode

from batchformer_panoptic.data import load_dataset_dicts, setup_datasets
from batchformer_panoptic.engine import trainer as trainer_module
from batchformer_panoptic.engine.predictor import Predictor
from batchformer_panoptic.engine.trainer import PanopticTrainer
from batchformer_panoptic.errors import UserError
from batchformer_panoptic.visualization import read_image
from helpers.tiny_dataset import TinyPanopticDataset
from helpers.tiny_model import tiny_model
from helpers.trained_files import write_run


@pytest.fixture
def cfg(tmp_path: Path, tiny_panoptic_dataset: TinyPanopticDataset) -> CfgNode:
    run = write_run(tmp_path, tiny_panoptic_dataset)
    run.cfg.MODEL.WEIGHTS, run.cfg.OUTPUT_DIR = str(run.weights), str(tmp_path / "output")
    run.cfg.DATALOADER.NUM_WORKERS = 0
    setup_datasets(run.cfg)
    return run.cfg


def fast(cfg: CfgNode, **changes: Any) -> CfgNode:
    changed = cfg.clone()
    changed.TEST.FAST.ENABLED = True
    for key, value in changes.items():
        changed.TEST.FAST[key] = value
    return changed


@pytest.fixture
def evaluated(monkeypatch: pytest.MonkeyPatch) -> list[torch.nn.Module]:
    """The models that were evaluated."""
    models: list[torch.nn.Module] = []
    for_evaluation = trainer_module.model_for_evaluation

    def remember(cfg: CfgNode, model: torch.nn.Module) -> torch.nn.Module:
        models.append(for_evaluation(cfg, model))
        return models[-1]

    monkeypatch.setattr(trainer_module, "model_for_evaluation", remember)
    return models


def test_evaluation_gives_the_same_numbers(cfg: CfgNode, evaluated: list[torch.nn.Module]) -> None:
    expected = PanopticTrainer.evaluate_weights(cfg)["panoptic_seg"]
    found = PanopticTrainer.evaluate_weights(fast(cfg))["panoptic_seg"]
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, abs=0.5, nan_ok=True), name
    norms = [[n for n in model.state_dict() if "running_mean" in n] for model in evaluated]
    assert norms[0]
    assert norms[1] == []


def test_evaluation_of_a_model_in_training_leaves_it_alone(cfg: CfgNode) -> None:
    model = tiny_model(MODEL__PANOPTIC__THING_CLASS_IDS=[0, 2]).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    PanopticTrainer.test(fast(cfg), model)
    assert model.training
    assert all(p.requires_grad for p in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_predictions_that_are_drawn_are_the_same(
    cfg: CfgNode, tiny_panoptic_dataset: TinyPanopticDataset
) -> None:
    plain, quick = Predictor(cfg), Predictor(fast(cfg))
    assert not any("running_mean" in name for name in quick.model.state_dict())
    (first, *_) = load_dataset_dicts([tiny_panoptic_dataset.name], filter_empty=False)
    image = read_image(first["file_name"])
    (map_a, a), (map_b, b) = plain(image)["panoptic_seg"], quick(image)["panoptic_seg"]
    assert [s["category_id"] for s in a] == [s["category_id"] for s in b]
    assert a
    assert (map_a != map_b).float().mean() < 0.01


def test_half_a_switch_is_refused(cfg: CfgNode) -> None:
    half = fast(cfg, BFLOAT16=True)
    half.TEST.FAST.ENABLED = False
    for call in (Predictor, PanopticTrainer.evaluate_weights):
        with pytest.raises(UserError, match=r"TEST\.FAST\.BFLOAT16"):
            call(half)
