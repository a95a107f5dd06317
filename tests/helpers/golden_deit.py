"""Image classifiers with the weights and settings of a golden file of DeiT.

Everything comes from the file: sizes, layers, heads, insertions, label smoothing.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
from torch import Tensor

from batchformer_panoptic.batchformer import BatchFormerHook, IdentityHook
from batchformer_panoptic.modeling.image_classifier import HookedVisionTransformer, ImageClassifier

MODEL, BLOCK = "vit.model.", "vit.batchformer.blocks.shared."
# What the public code calls a shared block, by its place among the blocks.
OFFICIAL_BLOCK = ".encoder_layers."


def classifier(golden: Mapping[str, Any], insert_layers: Sequence[int]) -> ImageClassifier:
    """The model of a variant in training mode, with its weights; no layers: without block."""
    config = golden["config"]
    model = ImageClassifier(
        vit=HookedVisionTransformer(timm_model(golden), _hook(config, insert_layers)),
        mixing=None,
        label_smoothing=config["label_smoothing"],
        image_size=config["img_size"],
        pixel_mean=[0.0] * 3,
        pixel_std=[1.0] * 3,
    )
    weights = {MODEL + name: value.float() for name, value in golden["state_dict_vit"].items()}
    if insert_layers:
        block = golden["batchformer_layer"].items()
        weights |= {BLOCK + name: value.float() for name, value in block}
    model.load_state_dict(weights)
    return model.train()


def timm_model(golden: Mapping[str, Any]) -> Any:
    """timm's own model, with the weights of the file."""
    config = golden["config"]
    transformer = pytest.importorskip("timm.models.vision_transformer")
    names = ("img_size", "patch_size", "embed_dim", "depth", "num_heads", "mlp_ratio")
    model = transformer.VisionTransformer(
        **{name: config[name] for name in names}, num_classes=config["num_classes"]
    )
    assert model.norm.eps == config["norm_eps_vit"]
    model.load_state_dict({k: v.float() for k, v in golden["state_dict_vit"].items()})
    return model


def batch_of(golden: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The images and labels of the file as the model takes them."""
    inputs = golden["inputs"]
    pairs = zip(inputs["images"].float(), inputs["labels"].tolist(), strict=True)
    return [{"image": image, "label": label} for image, label in pairs]


def name_in_model(official: str) -> str:
    """The official name of a parameter in the names of a model with blocks."""
    if OFFICIAL_BLOCK in official:
        return BLOCK + official.partition(OFFICIAL_BLOCK)[2]
    return MODEL + official


def blocks_left_out(official: str, insert_layers: Sequence[int]) -> str:
    """An official name as it would be without blocks, each of which moves what is behind it."""
    head, _, rest = official.partition("blocks.")
    if head or OFFICIAL_BLOCK in official:
        return official
    number, _, tail = rest.partition(".")
    before = sum(int(number) > layer + i for i, layer in enumerate(sorted(insert_layers), start=1))
    return f"blocks.{int(number) - before}.{tail}"


def _hook(
    config: Mapping[str, Any], insert_layers: Sequence[int]
) -> BatchFormerHook | IdentityHook:
    if not insert_layers:
        return IdentityHook()
    hook = BatchFormerHook(
        config["embed_dim"],
        insert_layers=insert_layers,
        num_heads=config["bt_num_heads"],
        dropout=0.0,
        shared=True,
    )
    assert hook.blocks["shared"].norm1.eps == config["norm_eps_batchformer"]
    return hook


def total(losses: Mapping[str, Tensor]) -> Tensor:
    """What is minimised."""
    return sum(losses.values(), start=next(iter(losses.values())).new_zeros(()))
