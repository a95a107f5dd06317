"""Mask2Former models with the settings and the weights of a golden file."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from batchformer_panoptic import PanopticDETR
from batchformer_panoptic.batchformer import BatchFormerHook, IdentityHook
from batchformer_panoptic.checkpoint.conversion.mask2former import official_mask2former_to_ours
from batchformer_panoptic.modeling.heads import ClassHead, QueryMaskHead
from batchformer_panoptic.modeling.postprocessing.results import InferenceOptions
from batchformer_panoptic.modeling.set_prediction import point_losses
from batchformer_panoptic.modeling.set_prediction.criterion import ClassLoss, SetCriterion
from batchformer_panoptic.modeling.set_prediction.matcher import ClassCost, HungarianMatcher
from batchformer_panoptic.modeling.set_prediction.scoring import SoftmaxScoring
from batchformer_panoptic.modeling.transformer.deformable import (
    DeformableEncoder,
    DeformableEncoderLayer,
)
from batchformer_panoptic.modeling.transformer.mask2former import (
    Mask2Former,
    MaskedDecoder,
    MaskedDecoderLayer,
    PixelDecoder,
)


def our_name(official: str) -> str:
    """The official name of a parameter in this project's words; blocks are those of layer 0."""
    prefix = "block."
    if official.startswith(prefix):
        return f"transformer.encoder.batchformer.blocks.0.{official.removeprefix(prefix)}"
    name = official_mask2former_to_ours(official)
    assert name is not None, f"no name of ours for {official}"
    return name


def mask2former_model(golden: dict[str, Any], *, block: bool = False) -> PanopticDETR:
    """The recorded model, in training mode; with the recorded block after encoder layer 0."""
    config = golden["config"]
    hook: IdentityHook | BatchFormerHook = IdentityHook()
    if block:
        hook = BatchFormerHook(
            config["d"],
            num_heads=config["bf_heads"],
            dim_feedforward=config["bf_ffn"],
            dropout=0.0,
        )
    num_levels = len(config["channels"]) - 1
    encoder_layers = [
        DeformableEncoderLayer(
            embed_dim=config["d"],
            num_heads=config["heads"],
            num_levels=num_levels,
            num_points=4,
            dim_feedforward=config["ffn_enc"],
            dropout=0.0,
        )
        for _ in range(config["enc"])
    ]
    decoder_layers = [
        MaskedDecoderLayer(
            embed_dim=config["d"],
            num_heads=config["heads"],
            dim_feedforward=config["ffn_dec"],
            dropout=0.0,
        )
        for _ in range(config["dec"])
    ]
    sizes = {"embed_dim": config["d"], "mask_dim": config["mask_dim"]}
    transformer = Mask2Former(
        encoder=DeformableEncoder(encoder_layers, hook=hook),
        pixel_decoder=PixelDecoder(in_channels=config["channels"], **sizes),
        decoder=MaskedDecoder(
            decoder_layers, num_levels=num_levels, num_queries=config["queries"], **sizes
        ),
    )
    scoring = SoftmaxScoring(config["classes"], no_object_weight=config["no_object_weight"])
    weights = config["weights"]
    points = {
        "mask_weight": weights["loss_mask"],
        "dice_weight": weights["loss_dice"],
        "num_points": config["points"],
    }
    model = PanopticDETR(
        backbone=nn.Identity(),
        transformer=transformer,
        box_head=ClassHead(embed_dim=config["d"], num_class_outputs=scoring.num_outputs),
        mask_head=QueryMaskHead(),
        scoring=scoring,
        matcher=HungarianMatcher(
            [ClassCost(scoring, weight=weights["loss_ce"]), point_losses.PointMaskCost(**points)]
        ),
        criterion=SetCriterion(
            [
                ClassLoss(scoring, weight=weights["loss_ce"]),
                point_losses.PointMaskLoss(
                    **points,
                    oversample_ratio=config["oversample"],
                    importance_ratio=config["importance"],
                ),
            ]
        ),
        inference_options=InferenceOptions(tuple(config["thing_classes"])),
        pixel_mean=[0.0] * 3,
        pixel_std=[1.0] * 3,
    ).train()
    state = {our_name(name): value for name, value in golden["state_dict"].items()}
    if block:
        blocks = golden["two_stream"]["block_state_dict"]
        state |= {our_name(f"block.{name}"): value for name, value in blocks.items()}
    model.load_state_dict(state)
    return model


@contextmanager
def recorded_draws(layers: list[dict[str, Any]]) -> Iterator[None]:
    """Replace the random points by recorded ones; the last prediction is recorded first."""
    ordered = [*layers[1:], layers[0]]

    def matcher_points(shape: tuple[int, ...], device: torch.device) -> Tensor:
        points = torch.stack([torch.stack(layer["matcher_points"]) for layer in ordered])
        assert points.shape[:-1] == shape
        return points.to(device)

    draws = iter(
        torch.cat([layer["draws"][kind] for layer in ordered]) for kind in ("oversampled", "random")
    )

    def rand(*shape: Any, **options: Any) -> Tensor:
        values = next(draws)
        assert values.shape == shape
        return values.to(options.get("device"))

    with (
        mock.patch.object(point_losses, "random_points", matcher_points),
        mock.patch.object(torch, "rand", rand),
    ):
        yield
