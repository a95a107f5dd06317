"""tools/export_checkpoint.py: export and back, or an error and nothing written."""

import json
from pathlib import Path
from types import ModuleType

import pytest
import torch

from batchformer_panoptic import Predictor
from batchformer_panoptic.checkpoint.conversion import SOURCES, Request
from batchformer_panoptic.checkpoint.conversion.export import to_official
from batchformer_panoptic.checkpoint.conversion.model_card import model_card
from batchformer_panoptic.checkpoint.files import read_weights
from batchformer_panoptic.deployment.runtime import Predictor as Deployed
from helpers.commands import REPO_ROOT, load_script
from helpers.conversion_models import R50_DEPTHS, coco_panoptic, official_panoptic, save_checkpoint
from helpers.mask2former_models import BACKBONES, random_model, tiny_config
from helpers.tiny_dataset import TinyPanopticDataset
from helpers.trained_files import write_run

CONFIG = str(REPO_ROOT / "configs/Base-DETR.yaml")


@pytest.fixture(name="convert")
def _convert() -> ModuleType:
    return load_script("tools/convert_checkpoint.py")


@pytest.fixture(name="export")
def _export() -> ModuleType:
    return load_script("tools/export_checkpoint.py")


def test_official_in_and_out_again(convert: ModuleType, export: ModuleType, tmp_path: Path) -> None:
    state = coco_panoptic()
    src, ours, back = (tmp_path / name for name in ("src.pth", "ours.pth", "back.pth"))
    save_checkpoint(state, src)
    assert convert.main([str(src), str(ours), "--source", "detr"]) == 0
    opts = opts_for(ours)
    options = [str(ours), str(back), "--format", "official", "--config-file", CONFIG]
    assert export.main([*options, "--opts", *opts]) == 0
    exported = read_weights(str(back))["model"]
    assert exported.keys() == state.keys()
    assert all(torch.equal(exported[name], value) for name, value in state.items())
    assert export.main([*options, "--opts", *opts]) == 2  # there already


def opts_for(checkpoint: Path) -> list[str]:
    settings = read_weights(str(checkpoint))["settings"]
    return [str(part) for pair in settings.items() for part in pair]


def test_huggingface_out_and_in_again(
    convert: ModuleType, export: ModuleType, tmp_path: Path
) -> None:
    pytest.importorskip("transformers")
    src, ours, back = (tmp_path / name for name in ("src.pth", "ours.pth", "back.safetensors"))
    save_checkpoint(coco_panoptic(), src)
    options = ["--source", "detr", "--classes", "coco_panoptic"]
    assert convert.main([str(src), str(ours), *options]) == 0
    folder = tmp_path / "exported"
    options = [str(ours), str(folder), "--format", "huggingface", "--config-file", CONFIG]
    options += ["--overwrite", "--opts", *opts_for(ours)]
    assert export.main(options) == 0
    assert json.loads((folder / "config.json").read_text())["id2label"]["132"] == "rug-merged"
    card = (folder / "README.md").read_text()
    assert "pipeline_tag: image-segmentation" in card
    assert "| 132 | rug-merged | stuff |" in card
    assert "No evaluation is recorded" in card
    options = ["--source", "huggingface", "--classes", "coco_panoptic"]
    assert convert.main([str(folder), str(back), *options]) == 0
    expected, found = (read_weights(str(path)) for path in (ours, back))
    assert found["model"].keys() == expected["model"].keys()
    for name, value in expected["model"].items():
        assert torch.equal(found["model"][name], value), name
    assert found["class_table"] == expected["class_table"]


def test_the_card_has_the_recorded_evaluation(export: ModuleType, tmp_path: Path) -> None:
    result = {
        "metric": "panoptic_seg/PQ",
        "value": 84.595,
        "iteration": 40,
        "per_class": {"a|b": 7},
    }
    (tmp_path / "model_best.json").write_text(json.dumps(result))
    assert export.evaluation_of(tmp_path / "model_final.pth") is None
    evaluation = export.evaluation_of(tmp_path / "model_best.pth")
    card = model_card(tiny_config("resnet"), None, evaluation, class_name="Mask2Former")
    assert "PQ in percent after 40 steps" in card
    assert "| all classes | 84.6 |" in card
    assert r"| a\|b | 7.0 |" in card
    assert "`SOLVER.MAX_ITER`" in card


@pytest.mark.parametrize("backbone", BACKBONES)
def test_a_mask2former_out_and_in_again(
    convert: ModuleType, export: ModuleType, tmp_path: Path, backbone: str
) -> None:
    pytest.importorskip("transformers")
    state = random_model(tiny_config(backbone, MODEL__DETR__NUM_CLASSES=19)).state_dict()
    src = save_checkpoint(to_official(state), tmp_path / "src.pth")
    ours, folder, again = (tmp_path / name for name in ("ours.pth", "folder", "again.pth"))
    options = ["--classes", "cityscapes_panoptic"]
    assert convert.main([src, str(ours), "--source", "mask2former", *options]) == 0
    rest = ["--config-file", CONFIG, "--opts", *opts_for(ours)]
    assert export.main([str(ours), str(folder), "--format", "huggingface", *rest]) == 0
    assert json.loads((folder / "config.json").read_text())["id2label"]["0"] == "road"
    assert convert.main([str(folder), str(again), "--source", "huggingface", *options]) == 0
    official = tmp_path / "official.pth"
    assert export.main([str(again), str(official), "--format", "official", *rest]) == 0
    expected, found = (read_weights(str(path)) for path in (src, official))
    assert found["model"].keys() == expected["model"].keys()
    assert all(torch.equal(found["model"][k], value) for k, value in expected["model"].items())
    contents = [read_weights(str(path)) for path in (ours, again)]
    assert contents[0]["class_table"] == contents[1]["class_table"]
    assert contents[0]["settings"] == contents[1]["settings"]


def test_an_export_never_replaces_other_folders(
    export: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "home"
    folder.mkdir()
    (folder / "thesis.tex").touch()
    options = ["--format", "huggingface", "--config-file", CONFIG, "--overwrite"]
    assert export.main([str(tmp_path / "src.pth"), str(folder), *options]) == 2
    assert "not the folder of an earlier export" in capsys.readouterr().err
    assert (folder / "thesis.tex").exists()


def test_an_export_under_another_config_is_refused(
    export: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    converted = SOURCES["detr"].convert(official_panoptic(depths=R50_DEPTHS), Request())
    src = save_checkpoint(converted.model, tmp_path / "src.pth", settings=converted.settings)
    options = [src, str(tmp_path / "dst.pth"), "--format", "official", "--config-file", CONFIG]
    assert export.main(options) == 2
    assert "MODEL.DETR.NUM_OBJECT_QUERIES is 12 for the file" in capsys.readouterr().err
    assert not (tmp_path / "dst.pth").exists()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["onnx", "pt2"])
def test_a_trained_model_as_a_graph(
    export: ModuleType,
    tmp_path: Path,
    tiny_panoptic_dataset: TinyPanopticDataset,
    kind: str,
) -> None:
    run = write_run(tmp_path / "run", tiny_panoptic_dataset)
    target = tmp_path / "deployed" / f"model.{kind}"
    options = [str(run.weights), str(target), "--format", kind]
    assert export.main([*options, "--config-file", str(run.config_file)]) == 0
    assert export.main([*options, "--config-file", str(run.config_file)]) == 2  # there already
    assert target.stat().st_size > 10_000
    if kind == "onnx":
        photo = str(tiny_panoptic_dataset.image_root / "000.png")
        config, opts = run.config_file, ["MODEL.DEVICE", "cpu"]
        expected = Predictor.load(run.weights, config, opts=opts).predict(photo)
        found = Deployed.load(target).predict(photo)
        assert len(found.segments) == len(expected.segments) > 0
        assert (found.segment_map == expected.segment_map).mean() > 0.999
        for ours, theirs in zip(found.segments, expected.segments, strict=True):
            assert ours.class_name == theirs.class_name
            assert ours.bbox_xywh == theirs.bbox_xywh


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("model.pth", ["--format", "onnx"], "must end in .onnx"),
        ("model.onnx", ["--format", "pt2"], "must end in .pt2"),
        ("model.pt2", ["--format", "pt2", "--float16"], "no effect with --format pt2"),
        ("folder", ["--format", "huggingface", "--size", "3", "4"], "no effect with --format"),
        ("model.onnx", ["--format", "onnx", "--size", "0", "4"], "both must be at least 1"),
    ],
)
def test_options_that_contradict_each_other(
    export: ModuleType,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    name: str,
    options: list[str],
    message: str,
) -> None:
    words = ["src.pth", str(tmp_path / name), *options, "--config-file", CONFIG]
    assert export.main(words) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / name).exists()
