"""Attention runs through PyTorch's fused function, and no unused attention weights are computed."""

import pytest
import torch
from torch.nn import functional as F

from helpers.tiny_model import MASK2FORMER, random_inputs, tiny_model, total

# Tiny models have two layers each. DETR: self-attention of the encoder, self- and cross-attention
# of the decoder, batch attention. Deformable-DETR samples instead of attending to all tokens, and
# the multi-scale encoder of SMCA convolves; its cross-attention has a softmax for each level.
CALLS = {
    "detr": 2 + 2 * 2 + 1,
    "conditional": 2 + 2 * 2 + 1,
    "smca": 2 + 2 * 2 + 1,
    "smca_multiscale": 2 * (1 + 4) + 1,
    "deformable": 2 + 1,
    "mask2former": 2 * 3 + 1,  # three layers, one for each level
}
WITH_BOXES = [name for name in CALLS if name != "mask2former"]


def make_model(name, **overrides):
    return tiny_model(
        **{
            "MODEL__DETR__TRANSFORMER_NAME": name,
            "MODEL__SMALL_RESNET__STAGE_STRIDES": [1, 2, 2, 2 if name == "smca_multiscale" else 1],
            "MODEL__MASK_ON": False,
        }
        | overrides
        | (MASK2FORMER | {"MODEL__MASK_ON": True} if name == "mask2former" else {})
    )


@pytest.mark.parametrize("mask_padding", [False, True])
@pytest.mark.parametrize("sizes", [[(64, 64)] * 2, [(64, 64), (48, 64)]], ids=["full", "padded"])
@pytest.mark.parametrize("name", CALLS)
def test_every_attention_is_the_fused_function(monkeypatch, name, sizes, mask_padding):
    model = make_model(
        name,
        MODEL__DETR__DROPOUT=0.1,
        MODEL__BATCHFORMER__ENABLED=True,
        MODEL__BATCHFORMER__MASK_PADDING=mask_padding,
    ).train()
    fused, softmax = F.scaled_dot_product_attention, F.softmax
    calls, sizes_of_softmax = [], []

    def count(*args, **kwargs):
        calls.append(args[0].shape)
        return fused(*args, **kwargs)

    def watch(x, *args, **kwargs):
        sizes_of_softmax.append(x.shape)
        return softmax(x, *args, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", count)
    monkeypatch.setattr(F, "softmax", watch)
    total(model(random_inputs(sizes))).backward()
    assert len(calls) == CALLS[name]
    assert sizes_of_softmax == []


@pytest.mark.parametrize("name", WITH_BOXES)
def test_padding_is_not_attended_to(name):
    """The content of the padding does not influence the tokens and queries of the image."""
    model = make_model(name).eval()
    inputs = random_inputs([(64, 64), (64, 32)])
    images = model.preprocess(inputs)
    features = model.backbone(images.tensor)
    boxes = []
    for filling in (0.0, 7.0):
        filled = {key: x.clone() for key, x in features.items()}
        for x in filled.values():
            x[1, :, :, x.shape[-1] // 2 :] = filling
        boxes.append(model.predict(filled, images.image_sizes, (64, 64)).boxes[-1, 1])
    torch.testing.assert_close(boxes[0], boxes[1])
