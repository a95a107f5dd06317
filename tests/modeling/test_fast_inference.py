"""The faster copy: equal up to rounding, the original untouched, refusals in one line."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2.layers import Conv2d, FrozenBatchNorm2d
from detectron2.modeling import build_backbone
from torch import nn

from batchformer_panoptic import prepare_for_inference
from batchformer_panoptic.engine import load_config
from batchformer_panoptic.errors import UserError
from batchformer_panoptic.modeling import fast_inference
from batchformer_panoptic.modeling.backbone import TESTED_TIMM_MODELS
from batchformer_panoptic.modeling.fast_inference import (
    InBFloat16,
    breaks_channels_last,
    check_fast,
    fuse_conv_bn,
    model_for_evaluation,
)
from batchformer_panoptic.modeling.postprocessing.panoptic import MERGES
from helpers.tiny_model import MASK2FORMER, random_inputs, tiny_cfg, tiny_model, total

ROOT = Path(__file__).resolve().parents[2]
SIZES = [(48, 64), (64, 56), (48, 64)]
TRANSFORMERS: dict[str, dict[str, Any]] = {
    name: {"MODEL__DETR__TRANSFORMER_NAME": name}
    for name in ("detr", "conditional", "smca", "deformable")
} | {"mask2former": MASK2FORMER}


def batch_norms(model: nn.Module) -> list[str]:
    return [
        n for n, m in model.named_modules() if isinstance(m, nn.BatchNorm2d | FrozenBatchNorm2d)
    ]


def network(model, inputs):
    """Logits, the masks of all queries of one batch and, if the model has them, boxes."""
    images = model.preprocess(inputs)
    features = model.backbone(images.tensor)
    predictions = model.predict(features, images.image_sizes, tuple(images.tensor.shape[-2:]))
    everything = predictions.logits.new_ones(predictions.logits.shape[1:3]).nonzero()
    masks = predictions.last_masks(everything[:, 0], everything[:, 1])
    boxes = [] if predictions.boxes is None else [predictions.boxes]
    return [predictions.logits, masks, *boxes]


def randomise(module: nn.Module) -> None:
    """Norms that do something, trained or frozen."""
    for name, value in [*module.named_parameters(), *module.named_buffers()]:
        if name.endswith("running_var"):
            value.data.uniform_(0.5, 2.0)
        elif name.endswith("running_mean") or (name.endswith("bias") and value.dim() == 1):
            value.data.normal_(std=0.2)
        elif value.dim() == 1 and value.is_floating_point():
            value.data.uniform_(0.5, 1.5)


@pytest.mark.parametrize("norm", ["BN", "FrozenBN"])
@pytest.mark.parametrize("name", TRANSFORMERS)
@torch.no_grad()
def test_predictions_are_equal_up_to_rounding(name, norm, device):
    model = tiny_model(**TRANSFORMERS[name], MODEL__SMALL_RESNET__NORM=norm).eval().to(device)
    randomise(model.backbone)
    fast = prepare_for_inference(model)
    assert batch_norms(model)
    assert not batch_norms(fast)
    inputs = random_inputs(SIZES[:2])
    tolerance = {"cpu": 1e-5, "cuda": 1e-4}[device.type]
    for ours, expected in zip(network(fast, inputs), network(model, inputs), strict=True):
        torch.testing.assert_close(ours, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    ("overrides", "merge"),
    [
        *(({"MODEL__DETR__SCORING": "focal"}, merge) for merge in MERGES),
        (MASK2FORMER | {"MODEL__PANOPTIC__SEMANTIC_TEST": True}, "mask2former"),
    ],
    ids=[*MERGES, "transformer-mask2former"],
)
def test_segments_and_instances_are_identical_in_double_precision(overrides, merge):
    model = tiny_model(**overrides | {"MODEL__PANOPTIC__MERGE_TEST": merge}).eval()
    model.double()
    inputs = random_inputs(SIZES)
    for fast, expected in zip(prepare_for_inference(model)(inputs), model(inputs), strict=True):
        assert torch.equal(fast["panoptic_seg"][0], expected["panoptic_seg"][0])
        ours, others = fast["panoptic_seg"][1], expected["panoptic_seg"][1]
        assert [(s["id"], s["category_id"], s["area"]) for s in ours] == [
            (s["id"], s["category_id"], s["area"]) for s in others
        ]
        assert others or merge == "mask2former"
        assert torch.equal(fast["instances"].pred_masks, expected["instances"].pred_masks)
        assert torch.equal(fast["instances"].pred_classes, expected["instances"].pred_classes)
        if "sem_seg" in expected:
            torch.testing.assert_close(fast["sem_seg"], expected["sem_seg"])


def test_the_original_is_unchanged():
    model = tiny_model(MODEL__BATCHFORMER__ENABLED=True).train()
    before = copy.deepcopy(model.state_dict())
    inputs = random_inputs(SIZES)
    fast = prepare_for_inference(model)
    assert not fast.training
    assert not any(p.requires_grad for p in fast.parameters())
    fast(inputs)
    assert model.training
    assert list(model.state_dict()) == list(before)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.requires_grad for p in model.parameters())
    total(model(inputs)).backward()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_it_can_be_made_without_gradients(mode):
    model = tiny_model().eval()
    expected = batch_norms(prepare_for_inference(model))
    with mode():
        fast = prepare_for_inference(model)
        fast(random_inputs(SIZES[:1], [1]))
    assert batch_norms(fast) == expected


WIDE = {  # no strided 1 x 1 convolution of fewer than 16 channels
    "MODEL__SMALL_RESNET__STEM_CHANNELS": 16,
    "MODEL__SMALL_RESNET__STAGE_CHANNELS": [16, 20, 24, 28],
}


@pytest.mark.parametrize("wide", [True, False])
def test_maps_are_channels_last_unless_a_convolution_breaks_it(wide):
    fast = prepare_for_inference(tiny_model(**WIDE) if wide else tiny_model())
    images = torch.randn(1, 3, 32, 32)
    for name, features in fast.backbone(images).items():
        assert features.is_contiguous(memory_format=torch.channels_last) == wide, name


@pytest.mark.parametrize(
    ("convolution", "breaks"),
    [
        (nn.Conv2d(8, 32, 1, stride=2), True),
        (nn.Conv2d(32, 32, 1, stride=2, groups=4), True),
        (nn.Conv2d(8, 32, 1, stride=(1, 2)), True),
        (nn.Conv2d(16, 32, 1, stride=2), False),
        (nn.Conv2d(8, 32, 1), False),
        (nn.Conv2d(8, 32, 3, stride=2, padding=1), False),
        (nn.Conv2d(8, 32, 1, stride=2, device="meta"), False),
    ],
)
def test_convolutions_that_break_channels_last(convolution, breaks):
    assert breaks_channels_last(nn.Sequential(nn.Conv2d(3, 8, 3), convolution)) == breaks


def test_the_published_backbone_is_channels_last():
    published = load_config(str(ROOT / "configs/coco/panoptic/detr_R50_joint_300ep.yaml"), [])
    assert not breaks_channels_last(build_backbone(published))


def test_the_switch_is_off_by_default_and_returns_the_model_itself():
    model = tiny_model()
    assert model_for_evaluation(tiny_cfg(), model) is model


@pytest.mark.parametrize("bfloat16", [False, True])
def test_the_switch(bfloat16):
    cfg = tiny_cfg(TEST__FAST__ENABLED=True, TEST__FAST__BFLOAT16=bfloat16)
    model = tiny_model()
    fast = model_for_evaluation(cfg, model)
    assert fast is not model
    assert isinstance(fast, InBFloat16) == bfloat16


@pytest.mark.parametrize("key", ["COMPILE", "BFLOAT16"])
def test_parts_of_the_switch_without_the_switch_are_refused(key):
    cfg = tiny_cfg(**{f"TEST__FAST__{key}": True})
    with pytest.raises(UserError, match=rf"TEST\.FAST\.{key} is on.*ENABLED is not"):
        model_for_evaluation(cfg, tiny_model())


def test_a_compiler_that_does_not_work_is_explained_in_one_line(monkeypatch):
    def no_compiler(function):
        def call(*args):
            raise RuntimeError("no C++ compiler was found\nand more")

        return call

    monkeypatch.setattr(fast_inference.torch, "compile", no_compiler)
    with pytest.raises(UserError, match=r"^torch\.compile does not .*no C\+\+ compiler") as info:
        prepare_for_inference(tiny_model(), compile=True)
    assert "\n" not in str(info.value)
    cfg = tiny_cfg(TEST__FAST__ENABLED=True, TEST__FAST__COMPILE=True)
    with pytest.raises(UserError, match=r"TEST\.FAST\.COMPILE: .*compiler.* set it to False$"):
        check_fast(cfg)


@pytest.mark.slow
@torch.no_grad()
def test_a_compiled_copy_predicts_the_same(device):
    model = tiny_model().eval().to(device)
    try:
        fast = prepare_for_inference(model, compile=True)
    except UserError as error:
        pytest.skip(str(error))
    for size in SIZES[:2]:
        inputs = random_inputs([size])
        for ours, expected in zip(network(fast, inputs), network(model, inputs), strict=True):
            torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_bfloat16_is_close_and_returns_float32(device):
    model = tiny_model(MODEL__DETR__SCORING="focal").eval().to(device)
    inputs = random_inputs(SIZES[:1])
    dtypes, maps = [], []
    fast = prepare_for_inference(model, bfloat16=True)
    fast.model.backbone.register_forward_hook(lambda *call: dtypes.append(call[-1]["res5"].dtype))
    for one in (fast.model, model):
        one.mask_head.attention.register_forward_hook(lambda *call: maps.append(call[-1].float()))
    (ours,), (expected,) = fast(inputs), model(inputs)
    assert dtypes == [torch.bfloat16]
    torch.testing.assert_close(maps[0], maps[1], atol=0.02, rtol=0.1)
    for one in (ours, expected):
        assert one["instances"].scores.dtype == torch.float32
        assert one["instances"].pred_boxes.tensor.dtype == torch.float32
    scores = [one["instances"].scores.sort().values for one in (ours, expected)]
    torch.testing.assert_close(*scores, atol=0.02, rtol=0.05)
    assert not torch.equal(*scores)


@torch.no_grad()
def test_bfloat16_is_close_without_boxes_too():
    model = tiny_model(**MASK2FORMER, MODEL__PANOPTIC__SEMANTIC_TEST=True).eval()
    inputs = random_inputs(SIZES[:2])
    fast = prepare_for_inference(model, bfloat16=True)
    for ours, expected in zip(fast(inputs), model(inputs), strict=True):
        assert ours["instances"].scores.dtype == ours["sem_seg"].dtype == torch.float32
        torch.testing.assert_close(ours["sem_seg"], expected["sem_seg"], atol=0.1, rtol=0.1)
        assert not torch.equal(ours["sem_seg"], expected["sem_seg"])


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize(
    "name", [name for name in TESTED_TIMM_MODELS if not name.startswith(("swin", "convnext"))]
)
@torch.no_grad()
def test_norms_of_timm_models_are_fused(name, frozen, caplog):
    pytest.importorskip("timm")
    overrides = {
        "MODEL__BACKBONE__NAME": "build_timm_backbone",
        "MODEL__BACKBONE__FREEZE_AT": 0,
        "MODEL__TIMM__NAME": name,
        "MODEL__TIMM__FROZEN_BN": frozen,
        "INPUT__FORMAT": "RGB",
    }
    levels = ["res3", "res4", "res5"] if name == "fastvit_t8" else ["res2", "res3", "res4", "res5"]
    overrides["MODEL__TIMM__OUT_FEATURES"] = levels
    overrides["MODEL__MASK_ON"] = False
    model = tiny_model(**overrides).eval()
    randomise(model.backbone)
    fast = prepare_for_inference(model)
    before, after = (
        [m for m in one.backbone.modules() if hasattr(m, "running_mean")] for one in (model, fast)
    )
    # Convolutions that pad as TensorFlow does are a subclass; norms of sums have no convolution.
    remaining = {"tf_efficientnet_lite0": 5, "fastvit_t8": 24}.get(name, 0)
    assert "not fused" not in caplog.text
    assert len(after) == remaining
    assert len(before) > remaining
    images = torch.randn(1, 3, 64, 96)
    for level, expected in model.backbone(images).items():
        found = fast.backbone(images)[level]
        scale = expected.abs().max().item()
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=2e-5 * scale)


class Net(nn.Module):
    """A network that runs its modules in the order of registration, or its first norm too late."""

    def __init__(self, in_order: bool) -> None:
        super().__init__()
        self.one, self.norm_one = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.two, self.norm_two = nn.Conv2d(4, 4, 1, bias=False), nn.BatchNorm2d(4)
        self.three, self.norm_three = nn.Conv2d(4, 6, 1), nn.BatchNorm2d(4)
        self.in_order = in_order

    def forward(self, x):
        x = self.one(x)
        x = self.norm_one(x) if self.in_order else x + self.norm_one(x)
        x = self.norm_three(self.norm_two(self.two(x)))
        return [self.three(x).relu()]


@torch.no_grad()
def test_norms_are_fused_into_the_convolution_before_them():
    net = Net(in_order=True).eval()
    randomise(net)
    example = torch.randn(2, 3, 9, 9)
    fused = fuse_conv_bn(net, example)
    assert batch_norms(net) == ["norm_one", "norm_two", "norm_three"]
    assert batch_norms(fused) == ["norm_three"]  # another width than the convolution before it
    torch.testing.assert_close(fused(example)[0], net(example)[0])
    assert net(example)[0].abs().max() > 0


@torch.no_grad()
def test_a_network_that_fusion_would_change_is_returned_as_it_is(caplog):
    net = Net(in_order=False).eval()
    randomise(net)
    assert fuse_conv_bn(net, torch.randn(2, 3, 9, 9)) is net
    assert "changes the outputs of Net" in caplog.text
    assert batch_norms(net) == ["norm_one", "norm_two", "norm_three"]


@torch.no_grad()
def test_norms_in_training_mode_and_other_norms_stay():
    net = nn.Sequential(
        Conv2d(3, 4, 3, norm=nn.BatchNorm2d(4)), Conv2d(4, 4, 3, norm=nn.GroupNorm(2, 4)).eval()
    )
    example = torch.randn(2, 3, 9, 9)
    assert batch_norms(fuse_conv_bn(net, example)) == ["0.norm"]
    fused = fuse_conv_bn(net.eval(), example)
    assert fused[0].norm is None
    assert isinstance(fused[1].norm, nn.GroupNorm)
    torch.testing.assert_close(fused(example), net(example))
