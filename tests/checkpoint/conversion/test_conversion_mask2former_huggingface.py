"""Mask2Former of transformers: equal logits, masks and segments; conversion without loss."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.config import CfgNode
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from batchformer_panoptic.checkpoint import SettingsRecord
from batchformer_panoptic.checkpoint.conversion import SOURCES, Request
from batchformer_panoptic.checkpoint.conversion.export import to_huggingface
from batchformer_panoptic.checkpoint.conversion.mask2former_huggingface import _ALLOWED
from batchformer_panoptic.checkpoint.conversion.sources import open_folder
from batchformer_panoptic.data.class_table import ClassTable
from batchformer_panoptic.errors import UserError
from helpers.mask2former_models import (
    BACKBONES,
    COMMON,
    NUM_CLASSES,
    config,
    predict_ours,
    predict_theirs,
    random_model,
    tiny_config,
)

transformers: Any = pytest.importorskip("transformers")

THINGS = [0, 2, 5]
ATOL = 1e-4


def table() -> ClassTable:
    names = tuple(f"class {i}" for i in range(NUM_CLASSES))
    things = tuple(i in THINGS for i in range(NUM_CLASSES))
    return ClassTable(names, things, ((0, 0, 0),) * NUM_CLASSES, tuple(range(NUM_CLASSES)))


def export(cfg: CfgNode, state: dict[str, Tensor], folder: Path) -> Any:
    """Export the weights and load them in transformers, without a missing or unused key."""
    to_huggingface(state, folder, cfg=cfg, classes=table())
    kind = transformers.Mask2FormerForUniversalSegmentation
    model, info = kind.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    return model.eval()


@pytest.mark.parametrize("backbone", BACKBONES)
def test_out_and_in_again_with_the_same_predictions(backbone: str, tmp_path: Path) -> None:
    cfg, folder = tiny_config(backbone), tmp_path / "exported"
    ours = random_model(cfg)
    state = {name: value.clone() for name, value in ours.state_dict().items()}
    theirs = export(cfg, state, folder)
    assert theirs.config.id2label[6] == "class 6"
    # 96 x 160: no multiple of the windows, so that padding and shifts matter.
    images = torch.randn(2, 3, 96, 160, dtype=torch.float64)
    for mine, other in zip(predict_ours(ours, images), predict_theirs(theirs, images), strict=True):
        assert other.std(dim=1).mean() > 20 * ATOL, "all queries predict nearly the same"
        torch.testing.assert_close(mine, other, atol=1e-6, rtol=0)

    weights, settings = open_folder(folder)
    converted = SOURCES["huggingface"].convert(load_file(weights), Request(table()))
    assert converted.model.keys() == state.keys()
    assert all(torch.equal(converted.model[name], value) for name, value in state.items())
    SettingsRecord(cfg).check({**converted.settings, **settings}, "the folder")
    reasons = {reason for _, reason in converted.dropped}
    assert reasons <= {reason for _, reason in _ALLOWED}


@pytest.mark.parametrize("backbone", BACKBONES)
def test_files_of_transformers_are_read_completely(backbone: str, tmp_path: Path) -> None:
    """A model that transformers created itself comes back with all of its keys."""
    exported = export(
        tiny_config(backbone),
        random_model(tiny_config(backbone)).state_dict(),
        tmp_path / "exported",
    )
    created = transformers.Mask2FormerForUniversalSegmentation(exported.config)
    created.save_pretrained(tmp_path / "created")
    written = load_file(tmp_path / "created" / "model.safetensors")
    converted = SOURCES["huggingface"].convert(written, Request())
    to_huggingface(converted.model, tmp_path / "again", cfg=tiny_config(backbone), classes=None)
    again = load_file(tmp_path / "again" / "model.safetensors")
    assert again.keys() == written.keys()
    assert all(torch.equal(again[name], written[name]) for name in again)


def confident_model() -> tuple[CfgNode, Any]:
    """A tiny model whose scores are close to 0 or 1, with the published panoptic inference."""
    cfg = tiny_config(
        "resnet",
        MODEL__PANOPTIC__THING_CLASS_IDS=THINGS,
        MODEL__PANOPTIC__MERGE_TEST="mask2former",
        MODEL__PANOPTIC__SCORE_THRESHOLD_TEST=0.8,
        MODEL__PANOPTIC__OVERLAP_THRESHOLD_TEST=0.1,
        MODEL__DETR__NUM_OBJECT_QUERIES=30,
        MODEL__DETR__DEC_LAYERS=1,
    )
    model = random_model(cfg)
    image = torch.randn(1, 3, 384, 384)
    head, last = model.box_head.class_embed, model.transformer.decoder.mask_embed.layers[-1]
    with torch.no_grad():
        model.transformer.decoder.query_feat.weight.mul_(10)
        # What all queries have in common is removed, so that they differ in classes and masks.
        for layer, factor in ((last, 100.0), (head, 100.0)):
            output = model.predict(model.backbone(image), [(384, 384)], (384, 384)).transformer
            common = output.hidden_states[-1, 0] if layer is head else output.mask_embeddings[-1, 0]
            if layer is head:
                layer.bias.copy_(-layer.weight @ common.mean(0))
            else:
                layer.bias.sub_(common.mean(0))
            layer.weight.mul_(factor)
            layer.bias.mul_(factor)
        head.bias[-1] = -50.0
    return cfg, model


@pytest.mark.parametrize("seed", range(3))
def test_panoptic_segments_are_those_of_transformers(seed: int, tmp_path: Path) -> None:
    """Segments agree where both rules do.

    transformers compares score times probability with the threshold, which is the probability for a
    score of 1, and keeps the pixels of a segment whose probability is below the threshold, which
    are void in the published code. It works on maps of 384 x 384.
    """
    cfg, ours = confident_model()
    theirs = export(cfg, ours.state_dict(), tmp_path / "exported")
    torch.manual_seed(seed)
    image = torch.randint(0, 256, (3, 384, 384)).float()
    blobs = torch.nn.functional.interpolate(torch.rand(1, 3, 6, 6) * 255, size=(384, 384))[0]
    image = 0.2 * image + 0.8 * blobs
    segment_map, segments = ours([{"image": image}])[0]["panoptic_seg"]
    with torch.no_grad():
        output = theirs(pixel_values=(image - ours.pixel_mean)[None] / ours.pixel_std)
    processor = transformers.Mask2FormerImageProcessor.from_pretrained(tmp_path / "exported")
    (result,) = processor.post_process_panoptic_segmentation(
        output,
        threshold=0.8,
        mask_threshold=0.5,
        overlap_mask_area_threshold=0.1,
        label_ids_to_fuse=set(),
    )
    # Queries of one stuff class are joined here: transformers itself gives the id of a later
    # segment to two segments after it has joined one to an earlier.
    new_id, found = {0: 0}, dict[Any, tuple[int, float]]()
    for segment in result["segments_info"]:
        label, score = segment["label_id"], segment["score"]
        key = ("thing", segment["id"]) if label in THINGS else label
        found[key] = (label, max(score, found.get(key, (label, 0.0))[1]))
        new_id[segment["id"]] = list(found).index(key) + 1
    assert len(segments) > 2
    assert len({segment["isthing"] for segment in segments}) == 2
    assert [segment["category_id"] for segment in segments] == [
        label for label, _ in found.values()
    ]
    scores = [score for _, score in found.values()]
    assert [segment["score"] for segment in segments] == pytest.approx(scores, abs=1e-5)
    covered = segment_map > 0
    assert covered.float().mean() > 0.2
    theirs_map = result["segmentation"].clone().apply_(lambda old: new_id[int(old)])
    # A pixel on the border of two segments may go to either by rounding.
    assert (segment_map != theirs_map)[covered].float().mean() < 1e-4


def test_the_pipeline_finds_the_same_segments(tmp_path: Path) -> None:
    """``pipeline("image-segmentation")`` on the exported folder; rules as in the test above."""
    cfg, ours = confident_model()
    cfg.INPUT.MIN_SIZE_TEST = 384
    to_huggingface(ours.state_dict(), tmp_path / "exported", cfg=cfg, classes=table())
    torch.manual_seed(0)
    blobs = torch.nn.functional.interpolate(torch.rand(1, 3, 6, 6) * 255, size=(384, 384))[0]
    image = blobs.byte()
    segment_map, segments = ours([{"image": image}])[0]["panoptic_seg"]
    pipeline = transformers.pipeline("image-segmentation", model=str(tmp_path / "exported"))
    picture = Image.fromarray(image.permute(1, 2, 0).numpy())
    found = pipeline(picture, threshold=0.8, overlap_mask_area_threshold=0.1)
    masks = [(item["label"], torch.from_numpy(np.array(item["mask"])) > 0) for item in found]
    covered = segment_map > 0
    assert len(segments) > 2
    for segment in segments:
        label, mine = f"class {segment['category_id']}", segment_map == segment["id"]
        same_class = [mask & covered for name, mask in masks if name == label]
        if not segment["isthing"]:  # the pipeline does not join the queries of a stuff class
            same_class = [torch.stack(same_class).any(0)]
        overlap = max(float((mine & mask).sum() / (mine | mask).sum()) for mask in same_class)
        assert overlap > 0.99, label
    assert {name for name, _ in masks} == {f"class {s['category_id']}" for s in segments}


def test_the_image_processor_prepares_images_alike(tmp_path: Path) -> None:
    cfg = tiny_config("resnet", INPUT__MIN_SIZE_TEST=32, INPUT__MAX_SIZE_TEST=64)
    export(cfg, random_model(cfg).state_dict(), tmp_path / "exported")
    processor = transformers.Mask2FormerImageProcessor.from_pretrained(tmp_path / "exported")
    image = torch.randint(0, 256, (3, 32, 64), dtype=torch.uint8)
    pixels = processor(images=image, return_tensors="pt")["pixel_values"][0]
    mean, std = (
        torch.tensor(values).view(3, 1, 1) for values in (cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD)
    )
    torch.testing.assert_close(pixels, (image - mean) / std, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pre_norm": True}, "pre_norm"),
        ({"activation_function": "gelu"}, "activation_function"),
        ({"common_stride": 8}, "common_stride"),
        ({"backbone_config": {"model_type": "focalnet"}}, "model_type 'focalnet'"),
        ({"backbone_config": {"model_type": "swin", "hidden_act": "relu"}}, "hidden_act"),
        ({"backbone_config": {"use_absolute_embeddings": True}}, "absolute_embeddings"),
    ],
)
def test_an_unsupported_config_is_refused(
    change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    (tmp_path / "model.safetensors").touch()
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mask2former", **change}))
    with pytest.raises(UserError, match=message):
        open_folder(tmp_path)


def test_strides_are_read_from_the_config(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").touch()
    backbone = {"model_type": "resnet", "downsample_in_bottleneck": True}
    content = {"model_type": "mask2former", "backbone_config": backbone, "num_attention_heads": 2}
    (tmp_path / "config.json").write_text(json.dumps(content))
    assert open_folder(tmp_path).settings == {
        "MODEL.DETR.NHEADS": 2,
        "MODEL.RESNETS.STRIDE_IN_1X1": True,
    }


@pytest.mark.parametrize(
    ("further", "message"),
    [
        ({"INPUT__FORMAT": "BGR"}, "INPUT.FORMAT"),
        ({"MODEL__RESNETS__RES5_DILATION": 2}, "RES5_DILATION"),
        ({"MODEL__DETR__HIDDEN_DIM": 40}, "multiple of 32"),
        ({"MODEL__RESNETS__NUM_GROUPS": 2, "MODEL__RESNETS__WIDTH_PER_GROUP": 2}, "NUM_GROUPS"),
        ({"MODEL__RESNETS__WIDTH_PER_GROUP": 8}, "quarter"),
    ],
)
def test_an_inexpressible_model_is_refused(
    further: dict[str, Any], message: str, tmp_path: Path
) -> None:
    cfg = tiny_config("resnet", **further)
    with pytest.raises(UserError, match=message):
        to_huggingface(random_model(cfg).state_dict(), tmp_path / "x", cfg=cfg, classes=None)
    assert list(tmp_path.iterdir()) == []


def test_a_class_table_of_another_length_is_refused(tmp_path: Path) -> None:
    cfg = tiny_config("resnet")
    classes = ClassTable(("a",), (True,), ((0, 0, 0),), (0,))
    with pytest.raises(UserError, match="7 classes, the class table 1"):
        to_huggingface(random_model(cfg).state_dict(), tmp_path / "x", cfg=cfg, classes=classes)


@pytest.mark.slow
@pytest.mark.parametrize("backbone", BACKBONES)
def test_full_size_models_are_those_of_transformers(
    backbone: str, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    """R50 and Swin-T in the published sizes, in single precision."""
    settings = {
        **COMMON,
        "MODEL.DETR.ENC_LAYERS": 6,
        "MODEL.DETR.DEC_LAYERS": 9,
        "MODEL.BACKBONE.NAME": BACKBONES[backbone].get(
            "MODEL.BACKBONE.NAME", "build_resnet_backbone"
        ),
    }
    cfg = config(settings, num_classes=133)
    ours = random_model(cfg)
    with torch.no_grad():  # else the queries become alike in nine random layers
        ours.transformer.decoder.query_embed.weight.mul_(5)
        ours.transformer.decoder.query_feat.weight.mul_(20)
    state = {name: value.clone() for name, value in ours.state_dict().items()}
    to_huggingface(state, tmp_path / "exported", cfg=cfg, classes=None)
    kind = transformers.Mask2FormerForUniversalSegmentation
    theirs = kind.from_pretrained(tmp_path / "exported")
    images = torch.nn.functional.interpolate(torch.randn(1, 3, 10, 12), size=(160, 192))
    images = images + 0.3 * torch.randn(1, 3, 160, 192)
    pairs = zip(predict_ours(ours, images), predict_theirs(theirs, images), strict=True)
    for name, (mine, other) in zip(("class logits", "masks"), pairs, strict=True):
        assert other.std(dim=1).mean() > 20 * ATOL, "all queries predict nearly the same"
        difference = (mine - other).abs().max().item()
        record_property(f"largest difference of {name}", difference)
        assert difference < ATOL, name
    written = load_file(tmp_path / "exported" / "model.safetensors")
    converted = SOURCES["huggingface"].convert(written, Request())
    assert converted.model.keys() == state.keys()
    assert all(torch.equal(converted.model[name], value) for name, value in state.items())
