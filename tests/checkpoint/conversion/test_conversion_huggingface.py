"""DETR of transformers: equal logits, boxes and masks after conversion in both directions."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from batchformer_panoptic.checkpoint.conversion import SOURCES, Converted, Request
from batchformer_panoptic.checkpoint.conversion.huggingface import (
    merge_projections,
    split_projections,
)
from batchformer_panoptic.checkpoint.conversion.sources import open_folder
from batchformer_panoptic.data.class_table import ClassTable
from batchformer_panoptic.errors import UserError
from helpers.conversion_models import (
    R50_DEPTHS,
    WIDTHS,
    assert_same,
    our_model,
    random_images,
    randomise,
    run_ours,
    run_theirs,
)

transformers: Any = pytest.importorskip("transformers")

SIZES = [(96, 128), (70, 100)]
RESNET_18 = {
    "layer_type": "basic",
    "depths": [2, 2, 2, 2],
    "embedding_size": 64,
    "hidden_sizes": [64, 128, 256, 512],
}


def theirs(*, masks: bool, resnet: dict[str, Any] | None = None, **config: Any) -> Any:
    """A random DETR of transformers on its own tiny ResNet."""
    backbone = {
        "embedding_size": WIDTHS[0],
        "hidden_sizes": list(WIDTHS),
        "depths": list(R50_DEPTHS),
        "out_features": ["stage1", "stage2", "stage3", "stage4"],
        **(resnet or {}),
    }
    return build(
        masks=masks,
        use_timm_backbone=False,
        backbone_config=transformers.ResNetConfig(**backbone),
        **config,
    )


def build(*, masks: bool, **config: Any) -> Any:
    kind = transformers.DetrForSegmentation if masks else transformers.DetrForObjectDetection
    sizes = {
        "d_model": 128,
        "encoder_layers": 1,
        "decoder_layers": 2,
        "encoder_ffn_dim": 48,
        "decoder_ffn_dim": 48,
        "num_queries": 7,
        "num_labels": 5,
    }
    model = kind(transformers.DetrConfig(**{**sizes, **config}))
    randomise(model)
    return model.eval()


def convert_folder(folder: Path, classes: ClassTable | None = None) -> Converted:
    weights, settings = open_folder(folder)
    converted = SOURCES["huggingface"].convert(load_file(weights), Request(classes))
    return converted._replace(settings={**converted.settings, **settings})


@pytest.mark.parametrize(
    "their_model",
    [
        lambda: theirs(masks=True),
        lambda: theirs(
            masks=False, d_model=32, encoder_attention_heads=4, decoder_attention_heads=4
        ),
        lambda: theirs(masks=True, resnet={"downsample_in_bottleneck": True}),
        lambda: theirs(masks=False, resnet=RESNET_18),
    ],
    ids=["panoptic", "boxes", "stride in the 1x1", "basic blocks"],
)
def test_the_converted_model_predicts_the_same(their_model: Any, tmp_path: Path) -> None:
    model = their_model()
    model.save_pretrained(tmp_path)
    converted = convert_folder(tmp_path)
    images, valid = random_images(SIZES)
    ours = run_ours(our_model(converted.settings, converted.model), images, SIZES)
    assert_same(ours, run_theirs(model, images, valid))


def test_names_of_timm_are_those_of_the_hub(tmp_path: Path) -> None:
    pytest.importorskip("timm")
    model = build(
        masks=False,
        d_model=32,
        backbone_config={
            "model_type": "timm_backbone",
            "backbone": "resnet50",
            "out_indices": [1, 2, 3, 4],
            "use_pretrained_backbone": False,
        },
    )
    model.save_pretrained(tmp_path)
    assert "model.backbone.conv_encoder.model.layer1.0.bn1.bias" in load_file(
        tmp_path / "model.safetensors"
    )
    converted = convert_folder(tmp_path)
    images, valid = random_images([(64, 96)])
    ours = run_ours(our_model(converted.settings, converted.model), images, [(64, 96)])
    assert_same(ours, run_theirs(model, images, valid))


def test_class_rows_are_chosen_as_for_official_weights(tmp_path: Path) -> None:
    model = theirs(masks=False)
    with torch.no_grad():
        model.class_labels_classifier.bias.copy_(torch.arange(6.0))
    model.save_pretrained(tmp_path)
    classes = ClassTable(("a", "b"), (True, False), ((0, 0, 0), (1, 1, 1)), (1, 4))
    bias = convert_folder(tmp_path, classes).model["box_head.class_embed.bias"]
    assert bias.tolist() == [1.0, 4.0, 5.0]


def test_projections_are_stacked_as_query_key_value() -> None:
    parts = {which: torch.full((2, 2), float(i)) for i, which in enumerate("qkv")}
    model = {f"a.self_attn.{which}_proj.weight": value for which, value in parts.items()}
    model["a.self_attn.out_proj.weight"] = torch.ones(2, 2)
    merged = merge_projections(model)
    assert merged.keys() == {"a.self_attn.in_proj_weight", "a.self_attn.out_proj.weight"}
    assert merged["a.self_attn.in_proj_weight"][:, 0].tolist() == [0, 0, 1, 1, 2, 2]
    again = split_projections(merged)
    assert again.keys() == model.keys()
    assert all(torch.equal(again[name], value) for name, value in model.items())


def tiny_files(folder: Path) -> dict[str, Tensor]:
    theirs(masks=True).save_pretrained(folder)
    return load_file(folder / "model.safetensors")


def test_an_incomplete_attention_lists_its_parts(tmp_path: Path) -> None:
    state = tiny_files(tmp_path)
    del state["detr.model.decoder.layers.1.encoder_attn.k_proj.bias"]
    missing = r"missing: transformer\.decoder\.layers\.1\.multihead_attn\.k_proj\.bias"
    with pytest.raises(UserError, match=missing):
        SOURCES["huggingface"].convert(state, Request())


@pytest.mark.parametrize(
    ("name", "ours"),
    [
        (
            "detr.model.backbone.conv_encoder.model.embedder.embedder.normalization.running_mean",
            "backbone.stem.conv1.norm.running_mean",
        ),
        ("detr.model.encoder.layers.0.fc1.bias", "transformer.encoder.layers.0.linear1.bias"),
        ("mask_head.lay2.weight", "mask_head.convs.1.weight"),
    ],
)
def test_a_renamed_key_is_listed_twice(tmp_path: Path, name: str, ours: str) -> None:
    state = tiny_files(tmp_path)
    state[f"{name}_renamed"] = state.pop(name)
    with pytest.raises(UserError) as caught:
        SOURCES["huggingface"].convert(state, Request())
    assert f"left over: {name}_renamed" in str(caught.value)
    assert f"missing: {ours}" in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "yolos"}, "model_type 'yolos'"),
        ({"position_embedding_type": "learned"}, "position_embedding_type"),
        ({"activation_function": "gelu"}, "activation_function"),
        ({"decoder_attention_heads": 4}, "attention_heads"),
    ],
)
def test_what_is_not_built_here_is_refused(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    write_config(tmp_path, change)
    with pytest.raises(UserError, match=message):
        open_folder(tmp_path)


def write_config(folder: Path, change: dict[str, Any]) -> None:
    (folder / "model.safetensors").touch()
    content = {"model_type": "detr", "encoder_attention_heads": 8, "decoder_attention_heads": 8}
    (folder / "config.json").write_text(json.dumps({**content, **change}))


def test_the_config_tells_of_strides_and_dilation(tmp_path: Path) -> None:
    write_config(
        tmp_path, {"dilation": True, "backbone_config": {"downsample_in_bottleneck": True}}
    )
    assert open_folder(tmp_path).settings == {
        "MODEL.DETR.NHEADS": 8,
        "MODEL.RESNETS.STRIDE_IN_1X1": True,
        "MODEL.RESNETS.RES5_DILATION": 2,
        "MODEL.BACKBONE.NAME": "build_resnet_dc5_backbone",
    }


@pytest.mark.parametrize(
    ("written", "mean", "std"),
    [
        (
            {"image_mean": [0.5, 0.25, 0.0], "image_std": [0.5] * 3},
            [127.5, 63.75, 0.0],
            [127.5] * 3,
        ),
        ({"do_normalize": False}, [0.0] * 3, [255.0] * 3),
        (
            {"do_rescale": False, "image_mean": [100] * 3, "image_std": [2] * 3},
            [100.0] * 3,
            [2.0] * 3,
        ),
    ],
    ids=["other statistics", "not normalised", "0 to 255"],
)
def test_pixel_statistics_are_those_of_the_folder(
    tmp_path: Path, written: dict[str, Any], mean: list[float], std: list[float]
) -> None:
    write_config(tmp_path, {})
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(written))
    settings = open_folder(tmp_path).settings
    assert settings["MODEL.PIXEL_MEAN"] == pytest.approx(mean)
    assert settings["MODEL.PIXEL_STD"] == pytest.approx(std)


@pytest.mark.parametrize(
    "content",
    ["{", "3", '{"image_mean": 0.5}', '{"image_std": [0.5, 0.5]}', '{"rescale_factor": 0}'],
)
def test_unreadable_pixel_statistics_are_refused(tmp_path: Path, content: str) -> None:
    write_config(tmp_path, {})
    (tmp_path / "preprocessor_config.json").write_text(content)
    with pytest.raises(UserError, match=r"preprocessor_config\.json"):
        open_folder(tmp_path)


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"neither model\.safetensors nor pytorch_model\.bin"):
        open_folder(tmp_path)


def test_an_unreadable_config_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").touch()
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config\.json cannot be read"):
        open_folder(tmp_path)
