"""Export of Conditional-DETR and Deformable-DETR to transformers, whose models predict the same."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from batchformer_panoptic.checkpoint.conversion.export import not_exported, to_huggingface
from batchformer_panoptic.errors import UserError
from helpers.exported_models import TABLE
from helpers.tiny_model import random_inputs, tiny_cfg, tiny_model

transformers = pytest.importorskip("transformers")

MODELS: dict[str, dict[str, Any]] = {
    "conditional": {},
    "deformable": {},
    "deformable refined": {"MODEL__DEFORMABLE__BOX_REFINE": True},
    "deformable two-stage": {
        "MODEL__DEFORMABLE__BOX_REFINE": True,
        "MODEL__DEFORMABLE__TWO_STAGE": True,
    },
}
COMMON = {
    "MODEL__DETR__SCORING": "focal",
    "MODEL__BATCHFORMER__ENABLED": True,
    "MODEL__DEFORMABLE__SEE_PADDING": True,  # as in transformers
    "MODEL__BACKBONE__NAME": "build_resnet_backbone",
    "MODEL__RESNETS__DEPTH": 18,
    "MODEL__RESNETS__RES2_OUT_CHANNELS": 64,
    "MODEL__RESNETS__STRIDE_IN_1X1": False,
    "INPUT__FORMAT": "RGB",
}


def overrides_of(name: str) -> dict[str, Any]:
    return {"MODEL__DETR__TRANSFORMER_NAME": name.split()[0], **COMMON, **MODELS[name]}


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_transformers_predicts_the_same(tmp_path: Path, name: str) -> None:
    overrides = overrides_of(name)
    model = tiny_model(**overrides).eval()
    for head in model.box_head.parameters():
        nn.init.normal_(head, std=0.1)  # box heads start at zero
    cfg, state = tiny_cfg(**overrides), model.state_dict()
    to_huggingface(state, tmp_path / "folder", cfg=cfg, classes=TABLE)
    theirs = transformers.AutoModelForObjectDetection.from_pretrained(tmp_path / "folder").eval()
    assert theirs.config.id2label == dict(enumerate(TABLE.names))
    inputs = random_inputs([(64, 96), (50, 80)])
    images = model.preprocess(inputs)
    mask = torch.zeros(2, 64, 96, dtype=torch.int64)
    for covered, (height, width) in zip(mask, images.image_sizes, strict=True):
        covered[:height, :width] = 1
    found = theirs(pixel_values=images.tensor, pixel_mask=mask)
    expected = model.predict(model.backbone(images.tensor), images.image_sizes, (64, 96))
    assert expected.boxes is not None
    torch.testing.assert_close(found.logits, expected.logits[-1], atol=3e-5, rtol=1e-4)
    torch.testing.assert_close(found.pred_boxes, expected.boxes[-1], atol=1e-5, rtol=1e-4)
    left_out = dict(not_exported(state, with_block=False, masks=False))
    assert "transformers has no masks for this model" in left_out.values()
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "folder")
    assert list(processor.image_mean) == [128 / 255] * 3


def test_a_backbone_that_transformers_lacks_is_refused(tmp_path: Path) -> None:
    overrides = overrides_of("conditional")
    model = tiny_model(**overrides)
    state = {**model.state_dict(), "backbone.extra.weight": torch.zeros(2)}
    with pytest.raises(UserError, match=r"ConditionalDetrForObjectDetection can express"):
        to_huggingface(state, tmp_path / "folder", cfg=tiny_cfg(**overrides), classes=TABLE)
    assert not (tmp_path / "folder").exists()
