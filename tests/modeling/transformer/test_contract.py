"""The registry's contract: a small transformer from outside of the package, and its limits."""

import pytest
import torch
from torch import Tensor, nn

from batchformer_panoptic.batchformer.batchformer import SINGLE
from batchformer_panoptic.errors import UserError
from batchformer_panoptic.modeling.transformer import (
    TRANSFORMER_REGISTRY,
    Transformer,
    TransformerOutput,
)
from batchformer_panoptic.modeling.transformer.layers import CheckpointedLayer
from helpers.tiny_model import random_inputs, tiny_model, total

SIZES = [(48, 64), (64, 56)]


class Blend(CheckpointedLayer):
    """A decoder layer without attention: queries plus the mean of the memory."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)
        self.calls = 0

    def forward(self, queries: Tensor, memory: Tensor) -> Tensor:
        self.calls += 1
        return queries + self.linear(memory.mean(1, keepdim=True))


class Toy(Transformer):
    """A projection and learned queries; no encoder, and decoder layers only on request."""

    in_features = ("res5",)

    def __init__(self, channels: int, width: int, *, layered: bool) -> None:
        super().__init__()
        self.projection = nn.Conv2d(channels, width, 1)
        self.queries = nn.Embedding(5, width)
        self.blend = Blend(width)
        if layered:
            self.decoder = nn.Module()
            self.decoder.layers = [self.blend]

    def forward(self, features, padding, box_head) -> TransformerOutput:
        projected = self.projection(features["res5"])
        queries = self.queries.weight.expand(len(projected), -1, -1)
        states = self.blend(queries, projected.flatten(2).transpose(1, 2))
        mask = padding.mask_like(projected)
        return TransformerOutput(states[None], None, projected, projected, mask, SINGLE)


@pytest.fixture(params=[False, True], ids=["plain", "layered"])
def layered(request, monkeypatch) -> bool:
    def toy(cfg, input_shape):
        channels = input_shape["res5"].channels
        return Toy(channels, cfg.MODEL.DETR.HIDDEN_DIM, layered=request.param)

    monkeypatch.setitem(TRANSFORMER_REGISTRY._obj_map, "toy", toy)
    return request.param


def test_a_transformer_without_layers_trains_a_step(layered):
    model = tiny_model(MODEL__DETR__TRANSFORMER_NAME="toy").train()
    losses = model(random_inputs(SIZES))
    total(losses).backward()
    assert all(p.grad.isfinite().all() for p in model.transformer.parameters())
    assert model.transformer.blend.calls == 1


@pytest.mark.parametrize("part", ["encoder", "decoder"])
def test_activation_checkpointing_needs_layers_that_support_it(part, layered):
    overrides = {"MODEL__DETR__TRANSFORMER_NAME": "toy"}
    overrides["MODEL__ACTIVATION_CHECKPOINTING"] = [part]
    if part == "decoder" and layered:
        model = tiny_model(**overrides).train()
        total(model(random_inputs(SIZES))).backward()
        assert model.transformer.blend.calls == 2
        return
    with pytest.raises(UserError, match=rf"names '{part}', which the transformer 'toy' does not"):
        tiny_model(**overrides)


def test_layers_that_ignore_activation_checkpointing_are_refused(monkeypatch):
    def toy(cfg, input_shape):
        transformer = Toy(input_shape["res5"].channels, cfg.MODEL.DETR.HIDDEN_DIM, layered=True)
        transformer.decoder.layers = [nn.Identity()]
        return transformer

    monkeypatch.setitem(TRANSFORMER_REGISTRY._obj_map, "toy", toy)
    with pytest.raises(UserError, match=r"needs decoder\.layers of CheckpointedLayer\): remove it"):
        tiny_model(MODEL__DETR__TRANSFORMER_NAME="toy", MODEL__ACTIVATION_CHECKPOINTING=["decoder"])


def test_an_unknown_name_lists_the_known_ones():
    message = r"TRANSFORMER_NAME is 'none'; known: conditional, deformable, detr, mask2former"
    with pytest.raises(UserError, match=message):
        tiny_model(MODEL__DETR__TRANSFORMER_NAME="none")


def test_the_toy_evaluates(layered):
    model = tiny_model(MODEL__DETR__TRANSFORMER_NAME="toy").eval()
    with torch.no_grad():
        (result,) = model(random_inputs(SIZES[:1]))
    assert result["panoptic_seg"][0].shape == SIZES[0]
    assert model.transformer.blend.calls == 1
