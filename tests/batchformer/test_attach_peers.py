"""attach() on models of timm, torchvision, torch and transformers, with random weights.

Each: a training step in two streams with finite gradients for block and trunk, and evaluation
equal to the untouched model before, while and after it is attached.
"""

import copy
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from batchformer_panoptic.batchformer import AttachedBatchFormer, attach

BATCH = 3
CLASSES = 5
IMAGE = 64


class Peer(NamedTuple):
    """A model of another library.

    Attributes:
        build: returns the model.
        inputs: keyword arguments of the model, made from no labels.
        options: of ``attach``.
        loss: the loss of the outputs for both streams, through the handle.
        outputs: what of the model's outputs is compared.
    """

    build: Callable[[], nn.Module]
    inputs: Callable[[], dict[str, Any]]
    options: dict[str, Any]
    loss: Callable[[nn.Module, dict[str, Any], AttachedBatchFormer], Tensor]
    outputs: tuple[str, ...] = ()


def images() -> Tensor:
    return torch.rand(BATCH, 3, IMAGE, IMAGE)


def class_labels() -> Tensor:
    return torch.arange(BATCH) % CLASSES


def cross_entropy(model: nn.Module, inputs: dict[str, Any], handle: AttachedBatchFormer) -> Tensor:
    return F.cross_entropy(model(**inputs), handle.expand(class_labels()))


def _timm(name: str, **options: Any) -> Callable[[], nn.Module]:
    timm = pytest.importorskip("timm")
    return lambda: timm.create_model(name, img_size=IMAGE, num_classes=CLASSES, **options)


def timm_vit() -> Peer:
    return Peer(
        build=_timm("vit_tiny_patch16_224"),
        inputs=lambda: {"x": images()},
        options={"after": ["blocks.8"], "layout": "BNC", "embed_dim": 192},
        loss=cross_entropy,
    )


def timm_deit() -> Peer:
    return Peer(
        build=_timm("deit_tiny_patch16_224", drop_path_rate=0.1),
        inputs=lambda: {"x": images()},
        options={"after": ["blocks.8", "blocks.10"], "layout": "BNC", "embed_dim": 192},
        loss=cross_entropy,
    )


def timm_swin() -> Peer:
    return Peer(
        build=_timm("swin_tiny_patch4_window7_224", window_size=2),
        inputs=lambda: {"x": images()},
        options={"after": ["layers.2.blocks.3"], "layout": "BHWC", "embed_dim": 384},
        loss=cross_entropy,
    )


def timm_pooled() -> Peer:
    """BatchFormer v1: one token an image, on pooled features of a convolutional network."""
    timm = pytest.importorskip("timm")
    return Peer(
        build=lambda: timm.create_model("resnet10t", num_classes=CLASSES),
        inputs=lambda: {"x": images()},
        options={"after": ["global_pool"], "layout": "BC", "embed_dim": 512},
        loss=cross_entropy,
    )


def torchvision_vit() -> Peer:
    models = pytest.importorskip("torchvision.models")

    def build() -> nn.Module:
        model = models.vit_b_16(image_size=IMAGE, num_classes=CLASSES)
        nn.init.normal_(model.heads.head.weight, std=0.1)  # zero-initialised: all logits alike
        return model

    return Peer(
        build=build,
        inputs=lambda: {"x": images()},
        options={
            "after": ["encoder.layers.encoder_layer_8"],
            "layout": "BNC",
            "embed_dim": 768,
        },
        loss=cross_entropy,
    )


class SequenceFirst(nn.Module):
    """torch.nn.TransformerEncoder with the padding mask that it is called with."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 4, 32)
        self.encoder = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
        self.head = nn.Linear(16, CLASSES)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.head(self.encoder(x, src_key_padding_mask=mask).mean(0))


def torch_encoder() -> Peer:
    return Peer(
        build=SequenceFirst,
        inputs=lambda: {
            "x": torch.rand(7, BATCH, 16),
            "mask": torch.arange(7) >= torch.tensor([[7], [5], [6]]),
        },
        options={
            "after": ["encoder.layers.0"],
            "layout": "NBC",
            "embed_dim": 16,
            "context": {"encoder.layers.*": {"src_key_padding_mask": 0}},
        },
        loss=cross_entropy,
    )


def huggingface_vit() -> Peer:
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=4, num_attention_heads=4, intermediate_size=64,
        image_size=IMAGE, patch_size=16, num_labels=CLASSES,
    )  # fmt: skip

    def loss(model: nn.Module, inputs: dict[str, Any], handle: AttachedBatchFormer) -> Tensor:
        return model(**inputs, labels=handle.expand(class_labels())).loss

    return Peer(
        build=lambda: transformers.ViTForImageClassification(config),
        inputs=lambda: {"pixel_values": images()},
        options={"after": ["vit.layers.1"], "layout": "BNC", "embed_dim": 32},
        loss=loss,
        outputs=("logits",),
    )


def _small_resnet(transformers: Any) -> Any:
    return transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 1, 1], layer_type="basic",
        out_features=["stage4"],
    )  # fmt: skip


def huggingface_detr() -> Peer:
    transformers = pytest.importorskip("transformers")
    config = transformers.DetrConfig(
        use_timm_backbone=False, use_pretrained_backbone=False, backbone=None,
        backbone_config=_small_resnet(transformers), d_model=32, encoder_layers=3,
        decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4,
        encoder_ffn_dim=64, decoder_ffn_dim=64, num_queries=6, num_labels=CLASSES,
    )  # fmt: skip

    def inputs() -> dict[str, Any]:
        mask = torch.ones(BATCH, IMAGE, IMAGE, dtype=torch.long)
        mask[1, :, 40:] = 0  # a smaller image, padded
        return {"pixel_values": images(), "pixel_mask": mask}

    def loss(model: nn.Module, inputs: dict[str, Any], handle: AttachedBatchFormer) -> Tensor:
        labels = [
            {"class_labels": torch.tensor([i]), "boxes": torch.tensor([[0.5, 0.5, 0.2, 0.3]])}
            for i in range(BATCH)
        ]
        return model(**inputs, labels=handle.expand(labels)).loss

    return Peer(
        build=lambda: transformers.DetrForObjectDetection(config),
        inputs=inputs,
        options={
            "after": ["model.encoder.layers.0"],
            "layout": "BNC",
            "embed_dim": 32,
            "context": {
                "model.encoder.layers.*": {"attention_mask": 0, "spatial_position_embeddings": 0},
                "model.decoder": {
                    "inputs_embeds": 0,
                    "encoder_attention_mask": 0,
                    "spatial_position_embeddings": 0,
                    "object_queries_position_embeddings": 0,
                },
            },
        },
        loss=loss,
        outputs=("logits", "pred_boxes"),
    )


def huggingface_mask2former() -> Peer:
    transformers = pytest.importorskip("transformers")
    backbone = transformers.SwinConfig(
        image_size=IMAGE, embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 2, 2], window_size=2,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )  # fmt: skip
    config = transformers.Mask2FormerConfig(
        backbone_config=backbone, feature_size=32, mask_feature_size=32, hidden_dim=32,
        encoder_feedforward_dim=64, encoder_layers=3, decoder_layers=3, num_attention_heads=4,
        dim_feedforward=64, num_queries=6, num_labels=CLASSES, train_num_points=32,
    )  # fmt: skip
    encoder = "model.pixel_level_module.decoder.encoder.layers"

    def loss(model: nn.Module, inputs: dict[str, Any], handle: AttachedBatchFormer) -> Tensor:
        masks = torch.zeros(BATCH, 1, IMAGE, IMAGE)
        masks[:, :, 8:40, 8:40] = 1
        labels = [torch.tensor([i]) for i in range(BATCH)]
        doubled = handle.expand({"mask_labels": list(masks), "class_labels": labels})
        return model(**inputs, **doubled).loss

    return Peer(
        build=lambda: transformers.Mask2FormerForUniversalSegmentation(config),
        inputs=lambda: {"pixel_values": images()},
        options={
            "after": [f"{encoder}.0"],
            "layout": "BNC",
            "embed_dim": 32,
            "context": {
                f"{encoder}.*": {
                    "attention_mask": 0,
                    "position_embeddings": 0,
                    "reference_points": 0,
                },
                # A finer backbone map joins the tokens after the encoder.
                "model.pixel_level_module.decoder.adapter_1": {"input": 0},
            },
        },
        loss=loss,
        outputs=("class_queries_logits", "masks_queries_logits"),
    )


PEERS = {
    make.__name__: make
    for make in (
        timm_vit,
        timm_deit,
        timm_swin,
        timm_pooled,
        torchvision_vit,
        torch_encoder,
        huggingface_vit,
        huggingface_detr,
        huggingface_mask2former,
    )
}


def evaluate(model: nn.Module, inputs: Mapping[str, Any], peer: Peer) -> list[Tensor]:
    model.eval()
    with torch.no_grad():
        outputs = model(**inputs)
    return [outputs[name] for name in peer.outputs] if peer.outputs else [outputs]


def assert_equal(one: list[Tensor], other: list[Tensor]) -> None:
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    assert all(len(a) == BATCH for a in one)


@pytest.mark.parametrize("name", PEERS)
def test_trains_in_two_streams_and_evaluates_as_before(name: str) -> None:
    peer = PEERS[name]()
    torch.manual_seed(0)
    model = peer.build()
    untouched = copy.deepcopy(model)
    inputs = peer.inputs()
    handle = attach(model, **peer.options)
    assert_equal(evaluate(model, inputs, peer), evaluate(untouched, inputs, peer))

    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    loss = peer.loss(model, inputs, handle)
    loss.backward()
    assert loss.isfinite()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert all(gradient.isfinite().all() for gradient in gradients.values())
    block = [n for n, _ in model.named_parameters() if n.startswith("batchformer.")]
    assert len(block) == 12 * len(peer.options["after"])
    assert all(gradients[n].any() for n in block if "in_proj_bias" not in n)
    first, last = [n for n in gradients if n not in block][:: len(gradients) - len(block) - 1]
    assert gradients[first].any()
    assert gradients[last].any()
    optimizer.step()

    trained = evaluate(model, inputs, peer)
    untouched.load_state_dict(handle.plain_state_dict())
    assert_equal(trained, evaluate(untouched, inputs, peer))
    handle.detach()
    assert list(model.state_dict()) == list(untouched.state_dict())
    assert_equal(evaluate(model, inputs, peer), trained)


@pytest.mark.parametrize("name", PEERS)
def test_original_stream_is_the_model_without_the_block(name: str) -> None:
    """Without dropout, which draws other numbers for twice as many images."""
    peer = PEERS[name]()
    torch.manual_seed(0)
    model = peer.build()
    for module in model.modules():
        for key in ("dropout", "drop_path_rate", "drop_prob", "p", "dropout_prob"):
            if isinstance(getattr(module, key, None), float):
                setattr(module, key, 0.0)
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.momentum = 0.0  # statistics of the batch, which come before the streams
    model.train()
    inputs = peer.inputs()

    def outputs() -> list[Tensor]:
        with torch.no_grad():
            found = model(**inputs)
        return [found[name] for name in peer.outputs] if peer.outputs else [found]

    plain = outputs()
    handle = attach(model, **peer.options, dropout=0.0)
    both = outputs()
    for one, expected in zip(handle.original(both), plain, strict=True):
        torch.testing.assert_close(one, expected, atol=1e-4, rtol=1e-4)
    mixed = handle.split(both)["batchformer"]
    assert not any(torch.allclose(a, b) for a, b in zip(mixed, plain, strict=True))
