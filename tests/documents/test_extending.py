"""The page "How to add ...": its code is that of the toy parts, which train without an edit."""

import re

import pytest
import torch

from batchformer_panoptic.errors import UserError
from helpers import toy_parts
from helpers.commands import REPO_ROOT
from helpers.tiny_model import random_inputs, tiny_model, total

PAGE = (REPO_ROOT / "docs" / "extending.md").read_text()
TOYS = {
    "MODEL__BACKBONE__NAME": "build_two_convolutions",
    "MODEL__DETR__TRANSFORMER_NAME": "pooling",
    "MODEL__DETR__IN_FEATURE": "res3",
    "MODEL__MASK_HEAD__NAME": "dot_product_mask_head",
    "MODEL__DETR__COSTS": ["class_cost", "box_centre_cost"],
    "MODEL__DETR__LOSSES": ["class_loss", "box_l1_loss", "mask_loss", "box_centre_loss"],
}
SIZES = [(48, 64), (40, 56)]


def test_the_code_of_the_page_is_that_of_the_toy_parts():
    source = (REPO_ROOT / "tests" / "helpers" / "toy_parts.py").read_text()
    blocks = re.findall(r"```python\n(.*?)```", PAGE, re.S)
    assert len(blocks) >= 5
    for block in blocks:
        assert block.strip() in source


@pytest.mark.parametrize("block", [False, True])
def test_toy_parts_train_and_predict(block):
    model = tiny_model(**TOYS, MODEL__BATCHFORMER__ENABLED=block).train()
    assert isinstance(model.transformer, toy_parts.PoolingTransformer)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    inputs = random_inputs(SIZES)
    first = None
    for _ in range(8):
        optimizer.zero_grad()
        losses = model(inputs)
        total(losses).backward()
        missing = [n for n, p in model.named_parameters() if p.grad is None]
        assert not missing
        optimizer.step()
        first = first or total(losses).item()
    names = {"loss_ce", "loss_bbox", "loss_mask", "loss_dice", "loss_centre"}
    assert {name.partition("/")[0] for name in losses} == names
    assert len(losses) == len(names) * (1 + block)
    assert total(losses).item() < first
    (result, _) = model.eval()(inputs)
    assert result["panoptic_seg"][0].shape == SIZES[0]
    assert result["instances"].has("pred_masks")


def test_padding_of_the_page_is_kept_out_of_the_batch_attention():
    totals = []
    for mask_padding in (False, True):
        block = {
            "MODEL__BATCHFORMER__ENABLED": True,
            "MODEL__BATCHFORMER__MASK_PADDING": mask_padding,
        }
        model = tiny_model(**TOYS, **block).train()
        totals.append(total(model(random_inputs(SIZES))))
    assert not torch.equal(*totals)


def test_activation_checkpointing_needs_layers_that_support_it():
    with pytest.raises(UserError, match=r"ACTIVATION_CHECKPOINTING.*encoder"):
        tiny_model(**TOYS, MODEL__ACTIVATION_CHECKPOINTING=["encoder"])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"MODEL__DETR__LOSSES": ["box_center_loss"]}, "LOSSES.*did you mean box_centre_loss"),
        ({"MODEL__DETR__LOSSES": ["class_loss"] * 2}, "LOSSES names 'class_loss' twice"),
        ({"MODEL__DETR__COSTS": []}, "COSTS is empty"),
        ({"MODEL__MASK_HEAD__NAME": "dot"}, "MASK_HEAD.NAME: unknown name 'dot'"),
    ],
)
def test_unknown_parts_are_named(overrides, message):
    with pytest.raises(UserError, match=message):
        tiny_model(**{**TOYS, **overrides})
