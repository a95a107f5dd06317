"""Vision Transformers of timm and DeiT as image classifiers."""

import json
from pathlib import Path

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.modeling import build_model

from batchformer_panoptic import add_batchformer_panoptic_config
from batchformer_panoptic.checkpoint import PanopticCheckpointer, SettingsRecord
from batchformer_panoptic.checkpoint.conversion import Request, source_named
from batchformer_panoptic.data.class_table import ClassTable
from batchformer_panoptic.errors import UserError
from helpers.commands import load_script

DEIT = "deit_tiny_patch16_224"


def timm_state(name, **arguments):
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    return timm.create_model(name, **arguments)


def convert(source, state, **request):
    return source_named(source).convert(state, Request(**request))


def cfg_of(settings, *options):
    cfg = get_cfg()
    add_batchformer_panoptic_config(cfg)
    cfg.MODEL.DEVICE = "cpu"
    cfg.merge_from_list([x for pair in settings.items() for x in pair] + list(options))
    return cfg


def files(tmp_path, state) -> tuple[str, str]:
    source = tmp_path / "theirs.pth"
    torch.save({"model": state}, source)
    return str(source), str(tmp_path / "ours.pth")


def logits_of(model):
    image = torch.randint(0, 256, (3, 224, 224), generator=torch.Generator().manual_seed(0))
    image = image.to(torch.uint8)
    normalised = (image - model.pixel_mean) / model.pixel_std
    return model.eval()([{"image": image}])[0]["class_logits"], normalised[None]


@pytest.mark.parametrize(("source", "name"), [("deit", DEIT), (f"timm_vit:{DEIT}", DEIT)])
def test_a_converted_file_gives_the_logits_of_timm(source, name, tmp_path, capsys):
    theirs = timm_state(name)
    src, dst = files(tmp_path, theirs.state_dict())
    command = load_script("tools/convert_checkpoint.py")
    assert command.main([src, dst, "--source", source]) == 0
    printed = capsys.readouterr().out
    assert "1000 classes: the data set must have the same ones in the same order" in printed
    settings = torch.load(dst, weights_only=True)["settings"]
    assert settings["MODEL.PIXEL_MEAN"] == [123.675, 116.28, 103.53]
    assert settings["MODEL.PIXEL_STD"] == [58.395, 57.12, 57.375]
    assert json.dumps(settings["MODEL.PIXEL_STD"]) in printed

    cfg = cfg_of(settings, "MODEL.BATCHFORMER.ENABLED", True)
    model = build_model(cfg)
    PanopticCheckpointer(model, settings=SettingsRecord(cfg)).load(dst)
    ours, images = logits_of(model)
    with torch.no_grad():
        assert torch.equal(ours[None], theirs.eval()(images))

    other = cfg_of(settings, "MODEL.PIXEL_MEAN", [127.5] * 3)
    with pytest.raises(UserError, match=r"MODEL\.PIXEL_MEAN is \[123"):
        PanopticCheckpointer(build_model(other), settings=SettingsRecord(other)).load(dst)


def test_other_classes_start_from_everything_but_the_head(tmp_path, caplog):
    theirs = timm_state(DEIT)
    src, dst = files(tmp_path, theirs.state_dict())
    assert load_script("tools/convert_checkpoint.py").main([src, dst, "--source", "deit"]) == 0
    settings = {**torch.load(dst, weights_only=True)["settings"]}
    settings["MODEL.CLASSIFIER.NUM_CLASSES"] = 7
    cfg = cfg_of(settings)
    model = build_model(cfg)
    checkpointer = PanopticCheckpointer(model, training=True, settings=SettingsRecord(cfg))
    with pytest.raises(UserError, match=r"NUM_CLASSES is 1000 for the file and 7 in the config"):
        checkpointer.load(dst, checkpointables=[])
    fresh = model.vit.model.head.weight.clone()
    checkpointer.load_for_other_classes(dst)
    assert torch.equal(model.vit.model.head.weight, fresh)
    assert torch.equal(model.vit.model.blocks[3].attn.qkv.weight, theirs.blocks[3].attn.qkv.weight)
    assert "vit.model.head.weight, vit.model.head.bias" in caplog.text


def test_the_number_of_classes_is_that_of_the_head():
    converted = convert("deit", timm_state(DEIT, num_classes=6).state_dict())
    assert converted.settings["MODEL.CLASSIFIER.NUM_CLASSES"] == 6
    assert converted.model["vit.model.head.weight"].shape[0] == 6


def test_weights_without_head():
    state = timm_state("vit_tiny_patch16_224", num_classes=0).state_dict()
    converted = convert("timm_vit:vit_tiny_patch16_224", state)
    assert "MODEL.CLASSIFIER.NUM_CLASSES" not in converted.settings
    assert converted.settings["MODEL.PIXEL_STD"] == [127.5] * 3
    assert converted.notes == [
        "the weights have no class head: start training from them with --init-from"
    ]


def test_distilled_weights_are_refused():
    state = timm_state("deit_tiny_distilled_patch16_224").state_dict()
    for source in ("deit", "timm_vit:deit_tiny_patch16_224"):
        with pytest.raises(UserError, match="second token and head"):
            convert(source, state)
    with pytest.raises(UserError, match=r"VisionTransformerDistilled; .* needs a plain"):
        convert("timm_vit:deit_tiny_distilled_patch16_224", {})


def test_weights_of_another_model_are_refused():
    state = timm_state(DEIT).state_dict()
    message = r"not those of timm's deit_small.*\n.*of another shape: blocks\.0"
    with pytest.raises(UserError, match=message):
        convert("timm_vit:deit_small_patch16_224", state)
    with pytest.raises(UserError, match=r"none of deit_tiny.*--source timm_vit:NAME"):
        convert("deit", {key: value for key, value in state.items() if key != "cls_token"})
    with pytest.raises(UserError, match=r"missing: cls_token"):
        convert(f"timm_vit:{DEIT}", {k: v for k, v in state.items() if k != "cls_token"})
    with pytest.raises(UserError, match=r"left over: extra"):
        convert(f"timm_vit:{DEIT}", {**state, "extra": torch.zeros(1)})
    allowed = convert(
        f"timm_vit:{DEIT}", {**state, "extra": torch.zeros(1)}, allowed_leftovers=["e*"]
    )
    assert allowed.dropped == [("extra", "--allow e*")]


def test_rows_are_not_chosen():
    table = ClassTable.from_json([{"id": 1, "name": "cat", "isthing": 1}])
    with pytest.raises(UserError, match="leave it out"):
        convert("deit", timm_state(DEIT).state_dict(), classes=table)


def test_models_are_named(tmp_path: Path):
    with pytest.raises(UserError, match=r"deit, timm:NAME, timm_vit:NAME"):
        source_named("timm_vit")
    with pytest.raises(UserError, match="did you mean deit_tiny_patch16_224"):
        convert("timm_vit:deit_tny_patch16_224", {})
