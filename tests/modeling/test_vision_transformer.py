"""Vision Transformers of timm: supported models, their arguments, and error messages."""

import sys

import pytest
import torch

from batchformer_panoptic.batchformer import BatchFormerHook, IdentityHook
from batchformer_panoptic.errors import UserError
from batchformer_panoptic.modeling.image_classifier import (
    HookedVisionTransformer,
    build_vision_transformer,
)
from helpers.tiny_classifier import ARGUMENTS, classifier_cfg, tiny_classifier


def build(**overrides):
    return build_vision_transformer(classifier_cfg(**overrides))


@pytest.mark.parametrize(
    ("name", "width"),
    [
        ("deit_tiny_patch16_224", 192),
        ("deit_small_patch16_224", 384),
        ("deit_base_patch16_224", 768),
        ("deit_small_patch16_224.fb_in1k", 384),
        ("vit_small_patch16_224", 384),
    ],
)
def test_published_sizes(name, width):
    overrides = {
        "MODEL__CLASSIFIER__NAME": name,
        "MODEL__CLASSIFIER__IMAGE_SIZE": 224,
        "MODEL__CLASSIFIER__TIMM_KWARGS": [],
        "MODEL__CLASSIFIER__DROP_PATH": 0.1,
        "MODEL__BATCHFORMER__ENABLED": True,
        "MODEL__BATCHFORMER__INSERT_LAYERS": [8],
    }
    with torch.device("meta"):
        vit = build(**overrides)
    assert len(vit.model.blocks) == 12
    assert vit.model.blocks[-1].drop_path1.drop_prob == pytest.approx(0.1)
    block = vit.batchformer.blocks["8"]
    assert block.linear1.weight.shape == (width, width)
    assert block.self_attn.num_heads == 4
    assert vit.model.head.weight.shape == (5, width)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("vit_tiny_patch16_224", []),
        ("deit3_small_patch16_224", []),  # layer scale
        ("vit_small_patch14_reg4_dinov2", [["reg_tokens", 2]]),  # more tokens before the patches
        ("vit_base_patch16_siglip_gap_224", []),  # mean over the tokens, no class token
        ("vit_base_patch16_clip_224", []),  # a norm before the blocks
        ("flexivit_small", []),
    ],
)
def test_members_of_the_family_give_their_own_logits(name, arguments):
    sizes = {key: value for key, value in ARGUMENTS if key != "patch_size"}
    pairs = [["patch_size", 8], *([k, v] for k, v in sizes.items()), *arguments]
    overrides = {"MODEL__CLASSIFIER__NAME": name, "MODEL__CLASSIFIER__TIMM_KWARGS": pairs}
    vit = build(**overrides, MODEL__BATCHFORMER__ENABLED=True)
    images = torch.randn(2, 3, 16, 16)
    two_streams, streams = vit(images)
    assert two_streams.shape == (4, 5)
    assert streams.num_streams == 2
    vit.eval()
    logits, streams = vit(images)
    assert torch.equal(logits, vit.model(images))
    assert streams.num_streams == 1


def test_drop_path_draws_for_each_stream():
    vit = tiny_classifier(MODEL__CLASSIFIER__DROP_PATH=0.5, MODEL__BATCHFORMER__ENABLED=True).vit
    kept = []
    vit.model.blocks[3].drop_path1.register_forward_hook(
        lambda module, inputs, output: kept.append(output.flatten(1).abs().sum(1) > 0)
    )
    vit(torch.randn(32, 3, 16, 16))
    original, other = kept[0].tensor_split(2)
    assert not torch.equal(original, other)


def test_channels_follow_the_pixel_statistics():
    vit = build(MODEL__PIXEL_MEAN=[100.0], MODEL__PIXEL_STD=[50.0])
    assert vit(torch.randn(2, 1, 16, 16))[0].shape == (2, 5)


def test_several_blocks_and_a_shared_one():
    node = {"MODEL__BATCHFORMER__ENABLED": True, "MODEL__BATCHFORMER__INSERT_LAYERS": [0, 3]}
    assert list(build(**node).batchformer.blocks) == ["0", "3"]
    shared = build(**node, MODEL__BATCHFORMER__SHARED=True)
    assert list(shared.batchformer.blocks) == ["shared"]
    assert shared(torch.randn(2, 3, 16, 16))[0].shape == (4, 5)
    assert isinstance(build().batchformer, IdentityHook)


def test_a_block_acts_after_the_named_layer():
    vit = build(MODEL__BATCHFORMER__ENABLED=True)
    assert isinstance(vit, HookedVisionTransformer)
    assert isinstance(vit.batchformer, BatchFormerHook)
    batches = []
    for block in vit.model.blocks:
        block.register_forward_pre_hook(lambda module, inputs: batches.append(len(inputs[0])))
    vit(torch.randn(3, 3, 16, 16))
    assert batches == [3, 3, 3, 6]  # INSERT_LAYERS is [2]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"NAME": "deit_smal_patch16_224"}, "did you mean deit_small_patch16_224"),
        ({"NAME": "deit_tiny_distilled_patch16_224"}, "VisionTransformerDistilled, not a"),
        ({"NAME": "resnet18", "TIMM_KWARGS": []}, "resnet18 with .*img_size"),
        ({"NAME": "swin_tiny_patch4_window7_224", "TIMM_KWARGS": []}, "SwinTransformer, not a"),
        ({"NUM_CLASSES": 0}, "NUM_CLASSES is 0; set it"),
        ({"IMAGE_SIZE": 0}, "timm cannot build MODEL.CLASSIFIER.NAME vit_tiny_patch16_224 with"),
        ({"TIMM_KWARGS": [["depht", 4]]}, "depht=4"),
        ({"TIMM_KWARGS": [["embed_dim", 30], ["num_heads", 4]]}, "embed_dim=30"),
        ({"TIMM_KWARGS": [["depth"]]}, r"\['depth'\] is not a pair"),
        ({"TIMM_KWARGS": ["depth", 4]}, "'depth' is not a pair"),
        ({"TIMM_KWARGS": [["depth", 4], ["depth", 5]]}, "names depth twice"),
        ({"TIMM_KWARGS": [["img_size", 32]]}, "that is MODEL.CLASSIFIER.IMAGE_SIZE"),
        ({"TIMM_KWARGS": [["num_classes", 3]]}, "that is MODEL.CLASSIFIER.NUM_CLASSES"),
    ],
)
def test_models_that_do_not_fit_are_explained(overrides, message):
    with pytest.raises(UserError, match=message) as error:
        build(**{f"MODEL__CLASSIFIER__{key}": value for key, value in overrides.items()})
    assert "\n" not in str(error.value)


def test_a_layer_that_does_not_exist():
    with pytest.raises(UserError, match=r"INSERT_LAYERS is \[4\].* from 0 to 3 .* has 4 of them"):
        build(MODEL__BATCHFORMER__ENABLED=True, MODEL__BATCHFORMER__INSERT_LAYERS=[4])


def test_activation_checkpointing_of_missing_parts():
    with pytest.raises(UserError, match="names 'mask_head'; an image classifier"):
        build(MODEL__ACTIVATION_CHECKPOINTING=["encoder", "mask_head"])


def test_missing_timm_is_explained(monkeypatch):
    cfg = classifier_cfg()
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(UserError, match="pip install timm"):
        build_vision_transformer(cfg)


def test_pretrained_weights_need_a_download_and_their_pixel_statistics(monkeypatch):
    timm = pytest.importorskip("timm")
    create = timm.create_model
    pretrained = {"MODEL__CLASSIFIER__PRETRAINED": True}
    with pytest.raises(UserError, match=r"set INPUT\.FORMAT RGB, not BGR"):
        build(**pretrained, INPUT__FORMAT="BGR")

    def offline(name, **arguments):
        raise OSError("Name or service not known\nand a long explanation")

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(UserError, match=r"MODEL\.CLASSIFIER\.PRETRAINED: .*not known\)") as error:
        build(**pretrained)
    assert "\n" not in str(error.value)
    monkeypatch.setattr(
        timm, "create_model", lambda name, *, pretrained, **k: create(name, pretrained=False, **k)
    )
    with pytest.raises(UserError, match=r"set MODEL\.PIXEL_MEAN \[127.5, 127.5, 127.5\]"):
        build(**pretrained)
    statistics = {"MODEL__PIXEL_MEAN": [127.5] * 3, "MODEL__PIXEL_STD": [127.5] * 3}
    build(**pretrained, **statistics)
