"""Backbones: the dilated ResNet of DETR, and timm models of several families."""

import sys

import pytest
import torch
import torchvision
from detectron2.modeling import build_backbone
from torch import nn
from torchvision.models._utils import IntermediateLayerGetter

from batchformer_panoptic.checkpoint.conversion import Request
from batchformer_panoptic.checkpoint.conversion.backbones import convert_torchvision_resnet
from batchformer_panoptic.engine.solver import build_optimizer
from batchformer_panoptic.errors import UserError
from batchformer_panoptic.modeling.backbone import (
    TESTED_TIMM_MODELS,
    FoldedConv2d,
    fold_frozen_norms,
)
from helpers.tiny_model import MASK2FORMER, random_inputs, tiny_cfg, tiny_model, total

TIMM = {"MODEL__BACKBONE__NAME": "build_timm_backbone", "INPUT__FORMAT": "RGB"}
# A ResNet-50 of an eighth of the width.
TINY_RESNET = {
    "MODEL__RESNETS__STEM_OUT_CHANNELS": 8,
    "MODEL__RESNETS__RES2_OUT_CHANNELS": 32,
    "MODEL__RESNETS__WIDTH_PER_GROUP": 8,
}
HEAVY = {"resnet50", "swin_tiny_patch4_window7_224"}
LEVELS = {f"layer{i}": f"res{i + 1}" for i in (1, 2, 3, 4)}
SIZES = [(48, 64), (50, 70)]  # the second one is not a multiple of any stride


def timm_cfg(name, **overrides):
    pytest.importorskip("timm")
    return tiny_cfg(**{**TIMM, "MODEL__TIMM__NAME": name, **overrides})


def timm_model(name, **overrides):
    pytest.importorskip("timm")
    return tiny_model(**{**TIMM, "MODEL__TIMM__NAME": name, **overrides})


def with_random_norms(network):
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.4, 0.8)
            nn.init.normal_(module.bias, std=0.2)
            module.running_mean.normal_(std=0.2)
            module.running_var.uniform_(0.5, 2.0)
    return network.eval()


@torch.no_grad()
def dilated_pair(builder):
    """The maps of torchvision's dilated ResNet-50 and of a builder with its weights."""
    theirs = with_random_norms(
        torchvision.models.resnet50(replace_stride_with_dilation=[False, False, True])
    )
    converted = convert_torchvision_resnet(theirs.state_dict(), Request())
    cfg = tiny_cfg(MODEL__BACKBONE__NAME=builder, MODEL__RESNETS__RES5_DILATION=2)
    cfg.merge_from_list([x for item in converted.settings.items() for x in item])
    ours = build_backbone(cfg).eval()
    ours.load_state_dict({k.removeprefix("backbone."): v for k, v in converted.model.items()})
    images = torch.randn(1, 3, 96, 80)
    return IntermediateLayerGetter(theirs, LEVELS)(images), ours(images)


def test_dilated_resnet_is_torchvisions():
    theirs, ours = dilated_pair("build_resnet_dc5_backbone")
    assert ours["res5"].shape[-2:] == ours["res4"].shape[-2:]
    for name, expected in theirs.items():
        torch.testing.assert_close(ours[name], expected, rtol=1e-4, atol=1e-5)


def test_detectron2_dilates_one_convolution_more():
    theirs, ours = dilated_pair("build_resnet_backbone")
    torch.testing.assert_close(ours["res4"], theirs["res4"], rtol=1e-4, atol=1e-5)
    assert (ours["res5"] - theirs["res5"]).abs().max() > 0.01 * theirs["res5"].abs().max()


def test_without_dilation_the_builders_agree():
    plain = tiny_cfg(**TINY_RESNET, MODEL__BACKBONE__NAME="build_resnet_backbone")
    same = tiny_cfg(**TINY_RESNET, MODEL__BACKBONE__NAME="build_resnet_dc5_backbone")
    one, other = build_backbone(plain), build_backbone(same)
    other.load_state_dict(one.state_dict())
    images = torch.randn(1, 3, 64, 64)
    assert torch.equal(one(images)["res5"], other(images)["res5"])


@pytest.mark.parametrize("transformer", ["detr", "conditional"])
def test_dilated_model_trains_and_evaluates(transformer):
    model = tiny_model(
        **TINY_RESNET,
        MODEL__BACKBONE__NAME="build_resnet_dc5_backbone",
        MODEL__RESNETS__RES5_DILATION=2,
        MODEL__DETR__TRANSFORMER_NAME=transformer,
        MODEL__BATCHFORMER__ENABLED=True,
    )
    assert [shape.stride for shape in model.backbone.output_shape().values()] == [4, 8, 16, 16]
    assert_trains_and_evaluates(model)


def test_dilation_and_deformable_convolution_exclude_each_other():
    cfg = tiny_cfg(
        MODEL__BACKBONE__NAME="build_resnet_dc5_backbone",
        MODEL__RESNETS__RES5_DILATION=2,
        MODEL__RESNETS__DEFORM_ON_PER_STAGE=[False, False, False, True],
    )
    with pytest.raises(UserError, match="DEFORM_ON_PER_STAGE"):
        build_backbone(cfg)


def assert_trains_and_evaluates(model):
    inputs = random_inputs(SIZES)
    loss = total(model.train()(inputs))
    loss.backward()
    assert loss.isfinite()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:  # nothing unused: DDP needs that
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name
    results = model.eval()(inputs)
    for one, result in zip(inputs, results, strict=True):
        assert result["panoptic_seg"][0].shape == one["image"].shape[-2:]
        assert result["instances"].scores.isfinite().all()


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=pytest.mark.slow if n in HEAVY else []) for n in TESTED_TIMM_MODELS],
)
def test_timm_model_trains_and_evaluates(name):
    model = timm_model(name, MODEL__BATCHFORMER__ENABLED=True)
    shapes = model.backbone.output_shape()
    assert {n: shape.stride for n, shape in shapes.items()} == {
        "res2": 4,
        "res3": 8,
        "res4": 16,
        "res5": 32,
    }
    assert model.backbone.size_divisibility == 32
    maps = model.backbone(torch.randn(1, 3, 64, 96))
    for level, shape in shapes.items():
        assert maps[level].shape == (1, shape.channels, 64 // shape.stride, 96 // shape.stride)
    assert_trains_and_evaluates(model)


@pytest.mark.parametrize(
    "name",
    [
        "tf_efficientnet_lite0",
        pytest.param("swin_tiny_patch4_window7_224", marks=pytest.mark.slow),
    ],
)
def test_mask_classification_takes_timm_models(name):
    assert_trains_and_evaluates(timm_model(name, **MASK2FORMER, MODEL__BATCHFORMER__ENABLED=True))


def test_timm_results_do_not_depend_on_batch_mates():
    model = timm_model("tf_efficientnet_lite0").eval()
    inputs = random_inputs(SIZES)
    for together, one in zip(model(inputs), inputs, strict=True):
        (single,) = model([one])
        torch.testing.assert_close(together["instances"].scores, single["instances"].scores)
        assert torch.equal(together["panoptic_seg"][0], single["panoptic_seg"][0])


def test_timm_maps_in_another_order_keep_their_names():
    backbone = build_backbone(timm_cfg("resnet18", MODEL__TIMM__OUT_FEATURES=["res4", "res2"]))
    assert list(backbone.output_shape()) == ["res4", "res2"]
    assert backbone.size_divisibility == 16
    maps = backbone(torch.randn(1, 3, 32, 48))
    assert maps["res2"].shape == (1, 64, 8, 12)
    assert maps["res4"].shape == (1, 256, 2, 3)
    # What comes after the last map is not built: it would get no gradient.
    assert not any("layer4" in name for name, _ in backbone.named_parameters())


def test_weights_of_a_whole_timm_model_serve_a_shorter_one(caplog):
    whole = build_backbone(timm_cfg("resnet18"))
    short = build_backbone(timm_cfg("resnet18", MODEL__TIMM__OUT_FEATURES=["res2", "res3"]))
    state = whole.state_dict()
    names = set(state)
    with caplog.at_level("INFO"):
        assert short.load_state_dict(state).unexpected_keys == []
    assert "after the maps res1, res2, res3 are not used" in caplog.text
    assert set(state) == names
    images = torch.randn(1, 3, 32, 32)
    assert torch.equal(whole(images)["res3"], short(images)["res3"])
    state["features.model.unknown"] = torch.zeros(1)
    with pytest.raises(RuntimeError, match="unknown"):
        short.load_state_dict(state)


def test_timm_freezing_follows_the_maps():
    model = timm_model("regnetx_002", MODEL__TIMM__FROZEN_BN=False)
    before = {name: value.clone() for name, value in model.backbone.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    total(model.train()(random_inputs(SIZES))).backward()
    optimizer.step()
    changed = {k for k, v in model.backbone.state_dict().items() if not torch.equal(v, before[k])}
    assert not any(key.startswith(("features.model.stem", "features.model.s1.")) for key in changed)
    for part in ("weight", "running_mean"):
        assert f"features.model.s2.b1.conv3.bn.{part}" in changed


def test_timm_frozen_norms_do_not_change():
    model = timm_model("regnetx_002", MODEL__BACKBONE__FREEZE_AT=0)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in model.backbone.modules())
    trained = [name for name, p in model.backbone.named_parameters() if p.requires_grad]
    assert "features.model.stem.conv.weight" in trained
    assert not any(".bn" in name for name in trained)


def test_the_trial_run_does_not_change_a_timm_model():
    cfg = timm_cfg("regnetx_002", MODEL__TIMM__FROZEN_BN=False, MODEL__BACKBONE__FREEZE_AT=0)
    backbone = build_backbone(cfg)
    means = [m.running_mean for m in backbone.modules() if isinstance(m, nn.BatchNorm2d)]
    assert means
    assert all(mean.abs().max() == 0 for mean in means)
    assert all(module.training for module in backbone.modules())


def test_timm_backbone_has_the_learning_rate_of_backbones():
    cfg = timm_cfg("mobilenetv3_small_050", SOLVER__BASE_LR=1.0, SOLVER__BACKBONE_MULTIPLIER=0.5)
    model = timm_model("mobilenetv3_small_050")
    rates = {
        id(p): group["lr"]
        for group in build_optimizer(cfg, model).param_groups
        for p in group["params"]
    }
    trained = {name: rates[id(p)] for name, p in model.named_parameters() if p.requires_grad}
    assert {rate for name, rate in trained.items() if name.startswith("backbone.")} == {0.5}
    assert {rate for name, rate in trained.items() if not name.startswith("backbone.")} == {1.0}


def test_one_stride_serves_boxes():
    model = timm_model(
        "vit_tiny_patch16_224",
        MODEL__TIMM__OUT_FEATURES=["res4"],
        MODEL__DETR__IN_FEATURE="res4",
        MODEL__BACKBONE__FREEZE_AT=0,
        MODEL__MASK_ON=False,
    )
    inputs = random_inputs(SIZES)
    total(model.train()(inputs)).backward()
    for name, parameter in model.named_parameters():
        assert not parameter.requires_grad or parameter.grad is not None, name
    assert len(model.eval()(inputs)) == 2


@pytest.mark.parametrize(
    ("name", "overrides", "message"),
    [
        ("resnt18", {}, "no model 'resnt18'; did you mean resnet18"),
        ("vit_tiny_patch16_224", {}, r"no map res2, res3, res5: it has res4 \(strides 16\)"),
        ("coatnext_nano_rw_224", {}, "images of one size only"),
        ("resnet18", {"INPUT__FORMAT": "BGR"}, "INPUT.FORMAT RGB, not BGR"),
        ("resnet18", {"MODEL__TIMM__OUT_FEATURES": ["c2"]}, "no map c2"),
        ("convnext_atto", {"MODEL__BACKBONE__FREEZE_AT": 1}, "choose 0 or one of 2, 3, 4, 5"),
    ],
)
def test_models_that_do_not_fit_are_explained(name, overrides, message):
    with pytest.raises(UserError, match=message):
        build_backbone(timm_cfg(name, **overrides))


def test_missing_timm_is_explained(monkeypatch):
    cfg = tiny_cfg(**TIMM, MODEL__TIMM__NAME="resnet18")
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(UserError, match=r"pip install timm"):
        build_backbone(cfg)


def refuse_downloads(monkeypatch):
    timm = pytest.importorskip("timm")
    create = timm.create_model

    def offline(name, *, pretrained, **arguments):
        if pretrained:
            raise OSError("Name or service not known\nand a long explanation")
        return create(name, pretrained=False, **arguments)

    monkeypatch.setattr(timm, "create_model", offline)


def test_failed_download_is_one_line(monkeypatch):
    refuse_downloads(monkeypatch)
    with pytest.raises(UserError, match="OSError: Name or service not known") as error:
        build_backbone(timm_cfg("resnet18", MODEL__TIMM__PRETRAINED=True))
    assert "\n" not in str(error.value)


def test_pretrained_weights_need_their_pixel_statistics(monkeypatch):
    timm = pytest.importorskip("timm")
    create = timm.create_model
    monkeypatch.setattr(
        timm, "create_model", lambda name, *, pretrained, **k: create(name, pretrained=False, **k)
    )
    with pytest.raises(UserError, match=r"set MODEL.PIXEL_MEAN \[123.675, 116.28, 103.53\]"):
        build_backbone(timm_cfg("resnet18", MODEL__TIMM__PRETRAINED=True))
    statistics = {
        "MODEL__PIXEL_MEAN": [123.675, 116.28, 103.53],
        "MODEL__PIXEL_STD": [58.395, 57.12, 57.375],
    }
    build_backbone(timm_cfg("resnet18", MODEL__TIMM__PRETRAINED=True, **statistics))


def test_maps_of_timm_are_normalised_on_request():
    images = torch.randn(2, 3, 64, 64)
    plain, normalised = (
        build_backbone(timm_cfg("resnet18", MODEL__TIMM__NORMALIZE_MAPS=on)).eval()
        for on in (False, True)
    )
    normalised.load_state_dict(plain.state_dict())
    for name, maps in normalised(images).items():
        expected = plain(images)[name]
        expected = expected - expected.mean(1, keepdim=True)
        expected = expected / (expected.var(1, keepdim=True, unbiased=False) + 1e-5).sqrt()
        torch.testing.assert_close(maps, expected, atol=1e-4, rtol=1e-4)


def test_training_folds_frozen_norms_into_convolutions():
    """With the outputs and gradients of Detectron2's layers, also after a change of statistics."""
    cfg = tiny_cfg(MODEL__SMALL_RESNET__NORM="FrozenBN")
    theirs, ours = build_backbone(cfg).double(), build_backbone(cfg).double()
    fold_frozen_norms(ours)
    images = torch.randn(2, 3, 48, 64, dtype=torch.float64, requires_grad=True)
    for _ in range(2):
        state = {k: torch.rand_like(v) * 0.5 + 0.2 for k, v in theirs.state_dict().items()}
        for network in (theirs, ours):
            network.load_state_dict(state)
            network.zero_grad()
            sum(x.square().mean() for x in network(images).values()).backward()
        assert sum(isinstance(m, FoldedConv2d) for m in ours.modules()) == 12
        for (name, wanted), parameter in zip(
            theirs.named_parameters(), ours.parameters(), strict=True
        ):
            torch.testing.assert_close(parameter.grad, wanted.grad, msg=name)
    with torch.no_grad():
        for name, wanted in theirs.eval()(images).items():
            assert torch.equal(ours.eval()(images)[name], wanted)
