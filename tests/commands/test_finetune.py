"""configs/finetune: public COCO weights are converted and trained for a step on new classes."""

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from batchformer_panoptic.checkpoint import read_weights
from batchformer_panoptic.checkpoint.conversion.export import to_huggingface, to_official
from helpers.commands import REPO_ROOT, load_script
from helpers.conversion_models import coco_panoptic, save_checkpoint
from helpers.mask2former_models import random_model, tiny_config
from helpers.tiny_dataset import TinyPanopticDataset

# New name of each class of the tiny data set, and COCO's number of the class that it has.
NAMES = {
    "box": ("Person", 0),
    "ground": ("grass", 125),
    "disc": ("cone", None),
    "sky": ("sky", 119),
}
NO_OBJECT = 133
SMALL: dict[str, Any] = {
    "INPUT.MIN_SIZE_TRAIN": (48,),
    "INPUT.MIN_SIZE_TEST": 48,
    "INPUT.RESIZE_OR_CROP.ENABLED": False,
    "INPUT.LARGE_SCALE_JITTER.SIZE": 64,
    "MODEL.MASK2FORMER.NUM_POINTS": 64,
    "SOLVER.MAX_ITER": 1,
    "SOLVER.IMS_PER_BATCH": 2,
    # What was loaded is what is saved. The cosine schedule would divide by 0.
    "SOLVER.BASE_LR": 0.0,
    "SOLVER.LR_SCHEDULER_NAME": "WarmupMultiStepLR",
    "DATALOADER.NUM_WORKERS": 0,
}


def official_detr(folder: Path) -> str:
    return save_checkpoint(coco_panoptic(), folder / "detr-r50-panoptic.pth")


def official_mask2former(folder: Path) -> str:
    state = random_model(tiny_config("resnet", MODEL__DETR__NUM_CLASSES=133)).state_dict()
    arrays = {name: value.numpy() for name, value in to_official(state).items()}
    path = folder / "model_final.pkl"
    path.write_bytes(pickle.dumps({"model": arrays, "__author__": "third party"}))
    return str(path)


def huggingface_mask2former(folder: Path) -> str:
    pytest.importorskip("transformers")
    cfg = tiny_config("swin", MODEL__DETR__NUM_CLASSES=133)
    to_huggingface(random_model(cfg).state_dict(), folder / "hub", cfg=cfg, classes=None)
    return str(folder / "hub")


@pytest.fixture
def data(tmp_path: Path, tiny_panoptic_dataset: TinyPanopticDataset) -> dict[str, Any]:
    """The tiny data set under other class names, as config keys."""
    content = json.loads(tiny_panoptic_dataset.panoptic_json.read_text())
    for category in content["categories"]:
        category["name"], _ = NAMES[category["name"]]
    path = tmp_path / "panoptic.json"
    path.write_text(json.dumps(content))
    name = f"finetune_{tmp_path.name}"
    roots = tiny_panoptic_dataset.image_root, tiny_panoptic_dataset.panoptic_root
    return {
        "DATASETS.CUSTOM_PANOPTIC": [[name, *map(str, roots), str(path)]],
        "DATASETS.TRAIN": (name,),
        "DATASETS.TEST": (name,),
    }


@pytest.mark.parametrize(
    ("config", "source", "write"),
    [
        ("detr_R50", "detr", official_detr),
        ("mask2former_R50", "mask2former", official_mask2former),
        ("mask2former_swin_tiny", "huggingface", huggingface_mask2former),
    ],
)
def test_public_weights_are_fine_tuned(
    tmp_path: Path,
    data: dict[str, Any],
    config: str,
    source: str,
    write: Callable[[Path], str],
) -> None:
    converted, output = tmp_path / "converted.pth", tmp_path / "output"
    argv = [write(tmp_path), str(converted), "--source", source, "--classes", "coco_panoptic"]
    assert load_script("tools/convert_checkpoint.py").main(argv) == 0
    content = read_weights(str(converted))
    options = {**content["settings"], **SMALL, **data, "OUTPUT_DIR": str(output)}
    # The number of classes is that of the new data.
    options.pop("MODEL.DETR.NUM_CLASSES", None)
    config_file = REPO_ROOT / "configs" / "finetune" / f"{config}.yaml"
    argv = ["--config-file", str(config_file), "--init-from", str(converted)]
    argv += [str(part) for pair in options.items() for part in pair]
    assert load_script("train_net.py").main(argv) == 0

    before, after = content["model"], read_weights(str(output / "model_final.pth"))["model"]
    _assert_kept(before, after)
    log = (output / "log.txt").read_text()
    kept = 'Person (person), grass (grass-merged), sky (sky-other-merged), "no object"'
    assert f"class rows kept by name: {kept}; new: cone\n" in log
    assert "SOLVER.EPOCHS 50 of 5 images, 2 per iteration: SOLVER.STEPS" in log
    (results,) = output.glob("inference/*/panoptic_results.json")
    assert json.loads(results.read_text())["all"]["pq"] >= 0


def _assert_kept(before: dict[str, Tensor], after: dict[str, Tensor]) -> None:
    assert after.keys() >= before.keys()
    for name, value in before.items():
        if not name.startswith("box_head.class_embed."):
            assert torch.equal(after[name], value), name
            continue
        for row, coco in enumerate([*(number for _, number in NAMES.values()), NO_OBJECT]):
            assert coco is None or torch.equal(after[name][row], value[coco]), (name, row)
        assert len(after[name]) == len(NAMES) + 1
