"""Deformable-DETR models with the settings and the weights of a golden file."""

import torch

from batchformer_panoptic.batchformer import IdentityHook
from batchformer_panoptic.checkpoint.conversion.deformable import official_deformable_to_ours
from batchformer_panoptic.modeling.heads import BoxHead, LayerwiseBoxHead
from batchformer_panoptic.modeling.set_prediction.scoring import FocalScoring
from batchformer_panoptic.modeling.transformer import DeformableTransformer
from batchformer_panoptic.modeling.transformer.deformable import (
    DeformableDecoder,
    DeformableDecoderLayer,
    DeformableEncoder,
    DeformableEncoderLayer,
    ProposalStage,
)
from batchformer_panoptic.modeling.transformer.multi_scale import LevelProjection
from helpers.golden_models import assemble, layer_arguments


def deformable_model(config, args, hook=None):
    """A Deformable-DETR for boxes; ``args`` are the public code's flags of a variant."""
    width, refine, two_stage = config["d_model"], args["with_box_refine"], args["two_stage"]
    levels = config["num_feature_levels"]
    layer = layer_arguments(config) | {"num_levels": levels}
    scoring = FocalScoring(config["num_classes"], alpha=config["focal_alpha"])
    num_decoder_layers = config["dec_layers"]

    def box_head():
        return BoxHead(embed_dim=width, num_class_outputs=scoring.num_outputs, class_bias=None)

    encoder_layers = [
        DeformableEncoderLayer(**layer, num_points=config["enc_n_points"])
        for _ in range(config["enc_layers"])
    ]
    decoder_layers = [
        DeformableDecoderLayer(**layer, num_points=config["dec_n_points"])
        for _ in range(num_decoder_layers)
    ]
    stage = ProposalStage(
        embed_dim=width, num_queries=config["num_queries"], head_layer=num_decoder_layers
    )
    transformer = DeformableTransformer(
        in_features=tuple(config["channels"]),
        mask_level=len(config["channels"]) - 1,
        embed_dim=width,
        num_queries=config["num_queries"],
        projection=LevelProjection(
            in_channels=list(config["channels"].values()),
            embed_dim=width,
            num_levels=levels,
            see_padding=True,
        ),
        encoder=DeformableEncoder(encoder_layers, hook=hook or IdentityHook()),
        decoder=DeformableDecoder(decoder_layers, box_refine=refine),
        proposal_stage=stage if two_stage else None,
    )
    head = box_head()
    if refine:
        heads = [box_head() for _ in range(num_decoder_layers + two_stage)]
        head = LayerwiseBoxHead(heads, num_layers=num_decoder_layers)
    return assemble(config, transformer, scoring, box_head=head)


def namer(args):
    """Official name of a parameter -> ours; ``args`` are the public code's flags of a variant."""
    refine = args["with_box_refine"]

    def name_in_model(official):
        name = official_deformable_to_ours(official, box_refine=refine)
        assert name is not None, f"no name of ours for {official}"
        return name

    return name_in_model


def load(model, variant, further=()):
    """The stored weights, and the very same tensors under their further official names."""
    stored = {name: value.float() for name, value in variant["state_dict"].items()}
    state = stored | {alias: stored[name] for alias, name in variant["state_dict_aliases"].items()}
    renamed = {}
    for name, value in state.items():
        ours = namer(variant["args"])(name)
        assert torch.equal(renamed.setdefault(ours, value), value), name
    model.load_state_dict(renamed | dict(further))
    return model
