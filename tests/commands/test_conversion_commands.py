"""tools/convert_checkpoint.py: converts a file, or reports an error and writes nothing."""

import argparse
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import IO, Any

import pytest
import torch
import torchvision
from detectron2.modeling import build_model
from safetensors.torch import save_file

from batchformer_panoptic.checkpoint import PanopticCheckpointer, SettingsRecord
from batchformer_panoptic.checkpoint.conversion.export import to_official
from batchformer_panoptic.checkpoint.files import read_weights
from batchformer_panoptic.data.class_table import ClassTable
from helpers.commands import load_script
from helpers.conversion_models import coco_panoptic, official_boxes, our_model, save_checkpoint
from helpers.mask2former_models import random_model, tiny_config


@pytest.fixture(name="convert")
def _convert() -> ModuleType:
    return load_script("tools/convert_checkpoint.py")


@pytest.mark.parametrize("ending", ["pth", "safetensors"])
def test_a_training_checkpoint_is_converted(
    convert: ModuleType, tmp_path: Path, ending: str, capsys: pytest.CaptureFixture[str]
) -> None:
    training = {
        "args": argparse.Namespace(nheads=8, dilation=False, lr=1e-4),
        "optimizer": {"state": {}, "param_groups": [{"lr": 1e-4}]},
        "epoch": 3,
    }
    state = {**coco_panoptic(), "detr.backbone.0.body.bn1.num_batches_tracked": torch.tensor(7)}
    src, dst = save_checkpoint(state, tmp_path / "src.pth", **training), tmp_path / f"dst.{ending}"
    options = [src, str(dst), "--source", "detr", "--classes", "coco_panoptic"]
    assert convert.main(options) == 0
    content = read_weights(str(dst))
    assert content["converted_from"] == "detr"
    assert content["settings"]["MODEL.RESNETS.RES5_DILATION"] == 1
    assert content["settings"]["INPUT.FORMAT"] == "RGB"
    assert content["class_table"][132]["id"] == 200
    bias = content["model"]["box_head.class_embed.bias"]
    assert bias.shape == (134,)
    assert bias[[0, 132, 133]].tolist() == [1, 200, 250]
    assert "optimizer" not in content
    printed = capsys.readouterr().out
    assert "left out, a frozen batch norm does not count its batches: detr.backbone" in printed
    assert "133 of 250 class rows are kept" in printed
    assert "MODEL.DETR.NUM_OBJECT_QUERIES 12" in printed
    assert "not determine" not in printed


def test_what_is_not_known_is_said(
    convert: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    src = save_checkpoint(official_boxes(), tmp_path / "src.pth")
    assert convert.main([src, str(tmp_path / "dst.pth"), "--source", "detr"]) == 0
    printed = capsys.readouterr().out
    assert "the weights do not determine MODEL.DETR.NHEADS" in printed
    assert "the weights do not determine whether res5 is dilated" in printed
    assert "class_table" not in read_weights(str(tmp_path / "dst.pth"))


def test_classes_from_a_file(convert: ModuleType, tmp_path: Path) -> None:
    categories = [
        {"id": 5, "name": "tree", "isthing": 0},
        {"id": 2, "name": "cat", "isthing": 1},
    ]
    (tmp_path / "c.json").write_text(json.dumps({"categories": categories, "images": []}))
    src, dst = save_checkpoint(official_boxes(), tmp_path / "src.pth"), tmp_path / "dst.pth"
    options = [src, str(dst), "--source", "detr", "--classes", str(tmp_path / "c.json")]
    assert convert.main(options) == 0
    bias = read_weights(str(dst))["model"]["box_head.class_embed.bias"]
    assert torch.equal(bias, official_boxes()["class_embed.bias"][[2, 5, 7]])


@pytest.mark.parametrize("ending", ["pkl", "pth"])
def test_a_published_mask2former_is_converted(
    convert: ModuleType, tmp_path: Path, ending: str, capsys: pytest.CaptureFixture[str]
) -> None:
    cfg = tiny_config("resnet", MODEL__DETR__NUM_CLASSES=19)
    state = random_model(cfg).state_dict()
    src, dst = tmp_path / f"src.{ending}", tmp_path / "dst.pth"
    official = to_official(state)
    if ending == "pkl":  # as in the model zoo: arrays
        arrays = {name: value.numpy() for name, value in official.items()}
        src.write_bytes(pickle.dumps({"model": arrays, "__author__": "third party"}))
    else:
        save_checkpoint(official, src, iteration=3)
    options = [str(src), str(dst), "--source", "mask2former", "--classes", "cityscapes_panoptic"]
    assert convert.main(options) == 0
    printed = capsys.readouterr().out
    assert "all 19 class rows are kept" in printed
    assert "MODEL.MASK2FORMER.MASK_DIM 24" in printed
    assert "not determine" not in printed
    content = read_weights(str(dst))
    assert content["class_table"][0]["name"] == "road"
    assert content["model"].keys() == state.keys()
    model = build_model(cfg)
    settings = SettingsRecord(cfg)
    PanopticCheckpointer(model, settings=settings).load(str(dst), checkpointables=[])
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_a_published_swin_raises_no_question(
    convert: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    src = save_checkpoint(
        to_official(random_model(tiny_config("swin")).state_dict()), tmp_path / "src.pth"
    )
    assert convert.main([src, str(tmp_path / "dst.pth"), "--source", "mask2former"]) == 0
    printed = capsys.readouterr().out
    assert "not determine" not in printed
    assert "MODEL.SWIN.WINDOW_SIZE 3" in printed


def test_fine_tuning_keeps_rows_of_the_class_head_by_name(
    convert: ModuleType, tmp_path: Path
) -> None:
    state = random_model(tiny_config("resnet", MODEL__DETR__NUM_CLASSES=19)).state_dict()
    src, dst = save_checkpoint(to_official(state), tmp_path / "src.pth"), tmp_path / "dst.pth"
    options = [src, str(dst), "--source", "mask2former", "--classes", "cityscapes_panoptic"]
    assert convert.main(options) == 0
    cfg = tiny_config("resnet", MODEL__DETR__NUM_CLASSES=3)
    model = build_model(cfg)
    initial = {name: value.clone() for name, value in model.state_dict().items()}
    names = ("cone", "Traffic_Light", "road")
    classes = ClassTable(names, (True, False, False), ((0, 0, 0),) * 3, (1, 2, 3))
    checkpointer = PanopticCheckpointer(
        model, training=True, settings=SettingsRecord(cfg), class_table=classes
    )
    checkpointer.load_for_other_classes(str(dst))
    for name, value in model.state_dict().items():
        expected = state[name]
        if name.startswith("box_head.class_embed."):  # 6 is the traffic light, 0 the road
            expected = torch.cat([initial[name][:1], state[name][[6, 0, 19]]])
        assert torch.equal(value, expected), name


class _Bomb:
    """Unpickling it would leave a file behind."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def _malicious(folder: Path) -> Path:
    (folder / "src.pth").write_bytes(pickle.dumps({"model": {"x": _Bomb(folder / "executed")}}))
    return folder / "src.pth"


def _malicious_torch(folder: Path) -> Path:
    torch.save({"model": official_boxes(), "args": _Bomb(folder / "executed")}, folder / "src.pth")
    return folder / "src.pth"


def _truncated(folder: Path) -> Path:
    path = Path(save_checkpoint(official_boxes(), folder / "src.pth"))
    path.write_bytes(path.read_bytes()[:-5000])
    return path


def _truncated_safetensors(folder: Path) -> Path:
    path = folder / "src.safetensors"
    save_file(official_boxes(), path)
    path.write_bytes(path.read_bytes()[:-5000])
    return path


def _incomplete(folder: Path) -> Path:
    state = official_boxes()
    del state["input_proj.weight"]
    return Path(save_checkpoint(state, folder / "src.pth"))


@pytest.mark.parametrize(
    "source",
    [_malicious, _malicious_torch, _truncated, _truncated_safetensors, _incomplete],
    ids=lambda make: make.__name__.strip("_"),
)
@pytest.mark.parametrize("there_before", [True, False])
def test_a_bad_file_leaves_the_target_untouched(
    convert: ModuleType,
    tmp_path: Path,
    source: Callable[[Path], Path],
    there_before: bool,
    capsys: pytest.CaptureFixture[str],
) -> None:
    src, dst = source(tmp_path), tmp_path / "dst.pth"
    if there_before:
        dst.write_bytes(b"precious")
    before = sorted(tmp_path.iterdir())
    options = [str(src), str(dst), "--source", "detr", "--overwrite"]
    assert convert.main(options) == 2
    assert sorted(tmp_path.iterdir()) == before
    assert not there_before or dst.read_bytes() == b"precious"
    assert capsys.readouterr().err.startswith("error: ")


def test_a_failing_write_leaves_the_target_untouched(
    convert: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    src, dst = save_checkpoint(official_boxes(), tmp_path / "src.pth"), tmp_path / "dst.pth"
    dst.write_bytes(b"precious")

    def fail(content: Any, file: IO[bytes]) -> None:
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", fail)
    assert convert.main([src, str(dst), "--source", "detr", "--overwrite"]) == 2
    assert dst.read_bytes() == b"precious"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dst.pth", "src.pth"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--source", "yolo"], "--source yolo is unknown; known: "),
        (["--source", "detr", "--classes", "lvis"], "--classes lvis"),
        (["--source", "detr", "--classes", "nowhere.json"], "nowhere.json cannot be read"),
        (["--source", "detr", "--classes", "coco_panoptic"], "7 class rows"),
        (["--source", "detr_batchformer"], "have no BatchFormer block"),
    ],
)
def test_mistakes_are_one_clear_error(
    convert: ModuleType,
    tmp_path: Path,
    options: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    src, dst = save_checkpoint(official_boxes(), tmp_path / "src.pth"), tmp_path / "dst.pth"
    assert convert.main([src, str(dst), *options]) == 2
    assert message in capsys.readouterr().err
    assert not dst.exists()


def test_a_backbone_has_no_class_rows_to_choose(
    convert: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # With a class table, the file would be refused for every other data set.
    src, dst = str(tmp_path / "src.pth"), tmp_path / "dst.pth"
    torch.save(torchvision.models.resnet18().state_dict(), src)
    options = [src, str(dst), "--source", "torchvision_resnet"]
    assert convert.main([*options, "--classes", "coco_panoptic"]) == 2
    assert "--classes coco_panoptic: torchvision_resnet" in capsys.readouterr().err
    assert not dst.exists()
    assert convert.main(options) == 0


@pytest.mark.parametrize("content", [{"images": []}, [{"id": 1, "name": "b"}], 3])
def test_a_bad_file_of_classes_is_named(
    convert: ModuleType, tmp_path: Path, content: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    classes = tmp_path / "c.json"
    classes.write_text(json.dumps(content))
    src, dst = save_checkpoint(official_boxes(), tmp_path / "src.pth"), tmp_path / "dst.pth"
    assert convert.main([src, str(dst), "--source", "detr", "--classes", str(classes)]) == 2
    assert capsys.readouterr().err.startswith(f"error: --classes {classes}: ")


def test_a_checkpoint_of_this_project_needs_no_conversion(
    convert: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    src, dst = save_checkpoint(official_boxes(), tmp_path / "src.pth"), tmp_path / "dst.pth"
    assert convert.main([src, str(dst), "--source", "detr"]) == 0
    assert convert.main([str(dst), str(tmp_path / "again.pth"), "--source", "detr"]) == 2
    assert f"{dst} is already a checkpoint of this project" in capsys.readouterr().err


def test_an_existing_target_needs_overwrite(
    convert: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    src, dst = save_checkpoint(official_boxes(), tmp_path / "src.pth"), tmp_path / "dst.pth"
    dst.write_bytes(b"precious")
    assert convert.main([src, str(dst), "--source", "detr"]) == 2
    assert "--overwrite replaces it" in capsys.readouterr().err
    assert dst.read_bytes() == b"precious"
    assert convert.main([src, str(dst), "--source", "detr", "--overwrite"]) == 0
    assert len(read_weights(str(dst))["model"]) > 100
    assert convert.main([src, src, "--source", "detr", "--overwrite"]) == 2
    assert "is the source itself" in capsys.readouterr().err


def test_leftovers_may_be_allowed(
    convert: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = {**official_boxes(), "ema.decay": torch.ones(1)}
    src, dst = save_checkpoint(state, tmp_path / "src.pth"), tmp_path / "dst.pth"
    assert convert.main([src, str(dst), "--source", "detr"]) == 2
    assert "left over: ema.decay" in capsys.readouterr().err
    assert convert.main([src, str(dst), "--source", "detr", "--allow", "ema.*"]) == 0
    assert "left out, --allow ema.*: ema.decay" in capsys.readouterr().out


def test_a_folder_is_for_huggingface(
    convert: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert convert.main([str(tmp_path), str(tmp_path / "dst.pth"), "--source", "detr"]) == 2
    assert "only --source huggingface reads folders" in capsys.readouterr().err


def test_a_converted_checkpoint_loads_by_its_name(convert: ModuleType, tmp_path: Path) -> None:
    src, dst = save_checkpoint(coco_panoptic(), tmp_path / "src.pth"), tmp_path / "dst.pth"
    assert convert.main([src, str(dst), "--source", "detr", "--classes", "coco_panoptic"]) == 0
    content = read_weights(str(dst))
    model = our_model(content["settings"], content["model"])
    torch.nn.init.zeros_(model.transformer.query_embed.weight)
    PanopticCheckpointer(model).load(str(dst), checkpointables=[])
    expected = content["model"]["transformer.query_embed.weight"]
    assert torch.equal(model.transformer.query_embed.weight, expected)
