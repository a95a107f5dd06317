"""Export: transformers loads the folder and predicts the same; unsupported models are refused."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.config import CfgNode
from PIL import Image
from torch import Tensor

from batchformer_panoptic.checkpoint.conversion import SOURCES, Request
from batchformer_panoptic.checkpoint.conversion.export import (
    check_config,
    check_official_input,
    not_exported,
    to_huggingface,
    to_official,
)
from batchformer_panoptic.data.class_table import ClassTable
from batchformer_panoptic.engine.setup import load_config
from batchformer_panoptic.errors import UserError
from helpers.commands import REPO_ROOT
from helpers.conversion_models import (
    R50_DEPTHS,
    assert_same,
    official_boxes,
    official_panoptic,
    our_model,
    random_images,
    run_ours,
    run_theirs,
)

SIZES = [(96, 128), (70, 100)]
BLOCK = "transformer.encoder.batchformer.blocks.shared.linear1.weight"


def converted(official: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    result = SOURCES["detr"].convert(official, Request())
    return result.model, result.settings


def config(settings: dict[str, Any], *opts: Any) -> CfgNode:
    cfg = load_config(str(REPO_ROOT / "configs/Base-DETR.yaml"))
    cfg.merge_from_list([part for pair in settings.items() for part in pair] + list(opts))
    return cfg


def table(num_classes: int) -> ClassTable:
    names = tuple(f"class {i}" for i in range(num_classes))
    return ClassTable(
        names, (True,) * num_classes, ((0, 0, 0),) * num_classes, tuple(range(num_classes))
    )


@pytest.mark.parametrize("masks", [True, False])
def test_transformers_predicts_the_same(masks: bool, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    official = official_panoptic(depths=R50_DEPTHS)
    if not masks:
        outside = ("mask_head.", "bbox_attention.")
        official = {k: v for k, v in official.items() if not k.startswith(outside)}
    state, settings = converted(official)
    folder = tmp_path / "exported"
    to_huggingface(state, folder, cfg=config(settings), classes=table(7))
    kind = transformers.DetrForSegmentation if masks else transformers.DetrForObjectDetection
    model, info = kind.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    assert model.config.id2label[6] == "class 6"
    assert model.config.architectures == [kind.__name__]
    images, valid = random_images(SIZES)
    ours = run_ours(our_model(settings, state), images, SIZES)
    assert_same(ours, run_theirs(model, images, valid))
    assert list(tmp_path.iterdir()) == [folder]


def test_the_image_processor_prepares_images_alike(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    state, settings = converted(official_panoptic(depths=R50_DEPTHS))
    cfg = config(settings, "INPUT.MIN_SIZE_TEST", 32, "INPUT.MAX_SIZE_TEST", 64)
    to_huggingface(state, tmp_path / "exported", cfg=cfg, classes=None)
    processor = transformers.DetrImageProcessor.from_pretrained(tmp_path / "exported")
    image = torch.randint(0, 256, (3, 32, 48), dtype=torch.uint8)
    pixels = processor(images=image, return_tensors="pt")["pixel_values"][0]
    statistics = (cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in statistics)
    torch.testing.assert_close(pixels, (image - mean) / std, atol=1e-5, rtol=0)


def test_the_pipeline_finds_the_segments_of_our_predictions(tmp_path: Path) -> None:
    """Our logits and masks under the merge of transformers, against the whole pipeline."""
    transformers = pytest.importorskip("transformers")
    state, settings = converted(official_panoptic(depths=R50_DEPTHS))
    ours = our_model(settings, state)
    pixels = torch.nn.functional.interpolate(255 * torch.rand(1, 3, 5, 6), size=(128, 160)).byte()
    images = (pixels - ours.pixel_mean) / ours.pixel_std
    head = ours.box_head.class_embed
    with torch.no_grad():  # random queries agree on "no object": remove what they have in common
        ours.transformer.query_embed.weight.mul_(30)
        features = ours.predict(ours.backbone(images), [(128, 160)], (128, 160))
        common = features.transformer.hidden_states[-1, 0].mean(0)
        head.bias.copy_(-head.weight @ common)
        for parameter in (head.weight, head.bias):
            parameter.mul_(160)
        head.weight[-1], head.bias[-1] = 0, -50
        ours.mask_head.predictor.weight.mul_(100)
    folder = tmp_path / "exported"
    cfg = config(settings, "INPUT.MIN_SIZE_TEST", 128, "INPUT.MAX_SIZE_TEST", 160)
    to_huggingface(ours.state_dict(), folder, cfg=cfg, classes=table(7))
    rules = {"threshold": 0.5, "mask_threshold": 0.5, "overlap_mask_area_threshold": 0.01}
    predicted = run_ours(ours, images, [(128, 160)])
    processor = transformers.DetrImageProcessor.from_pretrained(folder)
    (expected,) = processor.post_process_panoptic_segmentation(
        SimpleNamespace(logits=predicted.logits, pred_masks=predicted.masks),
        target_sizes=[(128, 160)],
        **rules,
    )
    picture = Image.fromarray(pixels[0].permute(1, 2, 0).numpy())
    found = transformers.pipeline("image-segmentation", model=str(folder))(picture, **rules)
    assert len({item["label"] for item in found}) > 2
    assert len(found) == len(expected["segments_info"])
    for item, segment in zip(found, expected["segments_info"], strict=True):
        assert item["label"] == f"class {segment['label_id']}"
        assert item["score"] == pytest.approx(segment["score"], abs=1e-3)
        wrong = (torch.from_numpy(np.array(item["mask"])) > 0) != (
            expected["segmentation"] == segment["id"]
        )
        assert wrong.float().mean() < 1e-3


def test_blocks_may_be_left_out() -> None:
    state, _ = converted(official_boxes())
    for name in list(state):
        if name.startswith("transformer.encoder.layers.0."):
            tail = name.removeprefix("transformer.encoder.layers.0.")
            state[f"{BLOCK.partition('shared.')[0]}shared.{tail}"] = state[name]
    assert "transformer.bf.linear1.weight" in to_official(state)
    assert to_official(state, with_block=False).keys() == official_boxes().keys()
    assert BLOCK in [name for name, _ in not_exported(state, with_block=False)]
    assert not_exported(state, with_block=True) == []


def test_training_heads_and_counts_of_batches_stay_here() -> None:
    state, _ = converted(official_boxes())
    extra = ["semantic_head.predictors.0.weight", "backbone.stem.conv1.norm.num_batches_tracked"]
    state.update(dict.fromkeys(extra, torch.tensor(0)))
    assert to_official(state).keys() == official_boxes().keys()
    assert [name for name, _ in not_exported(state, with_block=True)] == extra


def test_another_transformer_has_no_place_there() -> None:
    state, _ = converted(official_boxes())
    state["transformer.decoder.ref_point_head.layers.0.weight"] = torch.zeros(32, 32)
    with pytest.raises(UserError, match=r"left over: transformer\.decoder\.ref_point_head"):
        to_official(state)


def test_narrow_mask_heads_have_no_place_there() -> None:
    state, _ = converted(official_panoptic())
    assert to_official(state)
    width = 64
    for name, value in state.items():
        state[name] = _shrunk(name, value, width)
    with pytest.raises(UserError, match="HIDDEN_DIM must be a multiple of 128"):
        to_official(state)


def _shrunk(name: str, value: Tensor, width: int) -> Tensor:
    """The same state dict at half the width, where no mask head of 8 groups fits."""
    if name.startswith("backbone.") or name.endswith("attn.in_proj_bias"):
        return value if name.startswith("backbone.") else value[: 3 * width]
    sizes = {128: width, 384: 3 * width, 136: width + 8, 64: 32, 32: 16, 16: 8, 8: 4}
    if name.startswith("mask_head.") and not name.startswith("mask_head.attention."):
        keep_input = ".adapters." in name
        rows = sizes.get(value.shape[0], value.shape[0])
        if value.dim() == 1 or keep_input:
            return value[:rows]
        return value[:rows, : sizes[value.shape[1]]]
    sizes = {128: width, 384: 3 * width}
    rows = sizes.get(value.shape[0], value.shape[0])
    if value.dim() == 1 or name.endswith("input_proj.weight"):
        return value[:rows]
    return value[:rows, : sizes.get(value.shape[1], value.shape[1])]


@pytest.mark.parametrize(
    ("opts", "message"),
    [
        (["MODEL.DETR.NUM_OBJECT_QUERIES", 5], "NUM_OBJECT_QUERIES"),
        (["MODEL.DETR.NHEADS", 4], "NHEADS"),
        (["MODEL.MASK_ON", False], "MASK_ON"),
        (["MODEL.DETR.SCORING", "focal"], "SCORING"),
        (["MODEL.MASK_HEAD.IN_FEATURES", ["res4", "res3", "res3"]], "IN_FEATURES"),
    ],
)
def test_the_config_must_be_that_of_the_weights(opts: list[Any], message: str) -> None:
    state, settings = converted(official_panoptic(depths=R50_DEPTHS))
    check_config(state, config(settings))
    with pytest.raises(UserError, match=message):
        check_config(state, config(settings, *opts))


def test_a_config_with_masks_is_not_that_of_a_model_of_boxes() -> None:
    state, settings = converted(official_boxes())
    check_config(state, config(settings))
    with pytest.raises(UserError, match="MASK_ON"):
        check_config(state, config(settings, "MODEL.MASK_ON", True))


@pytest.mark.parametrize(
    ("opts", "message"),
    [
        (["MODEL.RESNETS.RES5_DILATION", 2], "RES5_DILATION"),
        (["INPUT.FORMAT", "BGR"], "FORMAT"),
        (["MODEL.RESNETS.NUM_GROUPS", 32], "NUM_GROUPS"),
    ],
)
def test_what_transformers_cannot_express_is_refused(
    opts: list[Any], message: str, tmp_path: Path
) -> None:
    pytest.importorskip("transformers")
    state, settings = converted(official_panoptic(depths=R50_DEPTHS))
    with pytest.raises(UserError, match=message):
        to_huggingface(state, tmp_path / "x", cfg=config(settings, *opts), classes=None)
    assert list(tmp_path.iterdir()) == []


def test_a_class_table_of_another_length_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    state, settings = converted(official_panoptic(depths=R50_DEPTHS))
    with pytest.raises(UserError, match="7 classes, the class table 6"):
        to_huggingface(state, tmp_path / "x", cfg=config(settings), classes=table(6))


def test_a_failed_export_keeps_the_earlier_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    transformers = pytest.importorskip("transformers")
    state, settings = converted(official_panoptic(depths=R50_DEPTHS))
    folder = tmp_path / "exported"
    to_huggingface(state, folder, cfg=config(settings), classes=None)
    before = json.loads((folder / "config.json").read_text())

    def fail(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(transformers.DetrImageProcessor, "save_pretrained", fail)
    with pytest.raises(UserError, match="No space left"):
        to_huggingface(state, folder, cfg=config(settings), classes=table(7))
    assert list(tmp_path.iterdir()) == [folder]
    assert json.loads((folder / "config.json").read_text()) == before


def test_without_transformers_the_extra_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    state, settings = converted(official_boxes())
    with pytest.raises(UserError, match=r"pip install 'batchformer-panoptic\[huggingface\]'"):
        to_huggingface(state, tmp_path / "x", cfg=config(settings), classes=None)


@pytest.mark.parametrize(
    ("opts", "message"),
    [
        (["INPUT.FORMAT", "BGR"], "INPUT.FORMAT is BGR"),
        (["MODEL.PIXEL_STD", [1.0, 1.0, 1.0]], "MODEL.PIXEL_STD is"),
        (["MODEL.RESNETS.STRIDE_IN_1X1", True], "STRIDE_IN_1X1"),
    ],
)
def test_images_prepared_otherwise_have_no_place_in_the_public_code(
    opts: list[Any], message: str
) -> None:
    check_official_input(config({}))
    with pytest.raises(UserError, match=message):
        check_official_input(config({}, *opts))
