"""SMCA, of one scale and of several: the recorded numbers of the public code."""

import pytest
import torch

from batchformer_panoptic.batchformer import IdentityHook
from batchformer_panoptic.checkpoint.conversion.conditional_smca import official_smca_to_ours
from batchformer_panoptic.modeling.set_prediction.scoring import FocalScoring
from batchformer_panoptic.modeling.transformer import MultiScaleSMCA, SingleScaleTransformer
from batchformer_panoptic.modeling.transformer.layers import DETREncoder, EncoderLayer
from batchformer_panoptic.modeling.transformer.smca import (
    SMCADecoder,
    SMCADecoderLayer,
    SpatialPrior,
)
from batchformer_panoptic.modeling.transformer.smca_multiscale import (
    ScaleMixingEncoder,
    ScaleMixingLayer,
    decoder_strides,
)
from helpers.conversion_models import DYNAMIC_SCALE_OF_FLAG
from helpers.golden_compare import OUTPUTS
from helpers.golden_models import (
    assemble,
    assert_near,
    assert_training_step,
    coarsest_map,
    features_of,
    layer_arguments,
    load_golden,
    sizes_of,
)

SINGLE = load_golden("smca_detr.pt")
MULTI = load_golden("smca_multiscale_detr.pt")
FILES = {"single": SINGLE, "multi": MULTI}
CASES = [
    pytest.param(golden, name, targets, id=f"{scales}-{name}-{targets}")
    for scales, golden in FILES.items()
    for name, variant in golden["variants"].items()
    for targets in golden["targets"]
    if targets in variant
]
MULTI_VARIANTS = pytest.mark.parametrize("name", MULTI["variants"])


def name_in_model(official):
    name = official_smca_to_ours(official)
    assert name is not None, f"no name of ours for {official}"
    return name


def stride_of(map_name):
    """Detectron2 numbers maps by the logarithm of their stride."""
    return 2 ** int(map_name.removeprefix("res"))


def smca_decoder(config, args, strides):
    layers = [
        SMCADecoderLayer(
            **layer_arguments(config),
            strides=strides,
            dynamic_scale=DYNAMIC_SCALE_OF_FLAG[args["dynamic_scale"]],
            smooth=config["smooth"],
        )
        for _ in range(config["dec_layers"])
    ]
    return SMCADecoder(layers, embed_dim=config["d_model"])


def single_scale(config, args):
    name = coarsest_map(config)
    encoder_layers = [EncoderLayer(**layer_arguments(config)) for _ in range(config["enc_layers"])]
    return SingleScaleTransformer(
        in_feature=name,
        in_channels=config["channels"][name],
        embed_dim=config["d_model"],
        num_queries=config["num_queries"],
        encoder=DETREncoder(encoder_layers, hook=IdentityHook(), norm=None),
        decoder=smca_decoder(config, args, [stride_of(name)]),
    )


def multi_scale(config, args, names):
    arguments = {k: v for k, v in layer_arguments(config).items() if k != "num_heads"}
    encoder_layers = [
        ScaleMixingLayer(**arguments, num_levels=len(names) + 1)
        for _ in range(config["enc_layers"])
    ]
    return MultiScaleSMCA(
        in_features=names,
        in_channels=[config["channels"][name] for name in names],
        embed_dim=config["d_model"],
        num_queries=config["num_queries"],
        encoder=ScaleMixingEncoder(encoder_layers, hook=IdentityHook(), see_padding=True),
        decoder=smca_decoder(config, args, decoder_strides([stride_of(name) for name in names])),
    )


def make_model(golden, name):
    """In training mode. The unused class column of the public code is one more class here."""
    config, variant = golden["config"], golden["variants"][name]
    if golden is SINGLE:
        transformer = single_scale(config, variant["args"])
    else:
        transformer = multi_scale(config, variant["args"], list(golden["inputs"]["masks"]))
    scoring = FocalScoring(config["num_class_outputs"], alpha=config["focal_alpha"])
    model = assemble(config, transformer, scoring)
    state = variant["state_dict"]
    model.load_state_dict({name_in_model(key): value.float() for key, value in state.items()})
    return model


@pytest.fixture
def weights_of_image_0(monkeypatch):
    """The defect of multi-scale SMCA: level weights of the first image for the whole batch."""
    own = SpatialPrior.level_weights

    def level_weights(self, where):
        weights = own(self, where)
        return None if weights is None else weights[:1].expand_as(weights)

    monkeypatch.setattr(SpatialPrior, "level_weights", level_weights)


@pytest.mark.parametrize(("golden", "name", "targets"), CASES)
@pytest.mark.usefixtures("weights_of_image_0")
def test_training_step(golden, name, targets, device):
    """One scale has no level weights; of several, all but the defect is as published."""
    recorded = golden["variants"][name][targets]
    objects = golden["targets"][targets]
    model = make_model(golden, name).to(device)
    predictions = assert_training_step(model, golden, objects, recorded, name_in_model)
    if "outputs" in recorded:
        intermediates = recorded["intermediates"]
        centers = next(value for key, value in intermediates.items() if key.startswith("points"))
        for layer in predictions.transformer.reference_points:
            assert_near(layer, centers, OUTPUTS, "centres")
        if "memory_levels_2_3" in intermediates:
            ours = predictions.transformer.memory_map
            assert_near(ours, intermediates["memory_levels_2_3"][0], OUTPUTS, "memory")


def recorded_layers(recorded, key):
    outputs = recorded["outputs"]
    return torch.stack([layer[key] for layer in (*outputs["aux_outputs"], outputs)])


@MULTI_VARIANTS
def test_every_image_has_its_own_level_weights(name):
    """The first image is as recorded; the others are, up to the first layer that differs."""
    model, recorded = make_model(MULTI, name), MULTI["variants"][name]["full"]
    predictions = model.predict(features_of(MULTI), *sizes_of(MULTI))
    for key, ours in (("pred_logits", predictions.logits), ("pred_boxes", predictions.boxes)):
        theirs = recorded_layers(recorded, key)
        assert_near(ours[:, 0], theirs[:, 0], OUTPUTS, key)
        # The queries of the first layer have no content yet: its weights are those of all images.
        assert_near(ours[0], theirs[0], OUTPUTS, key)
    theirs = recorded_layers(recorded, "pred_logits")
    assert (predictions.logits[-1, 1] - theirs[-1, 1]).abs().max() > 0.1


@MULTI_VARIANTS
def test_an_image_is_the_same_in_the_batch_and_alone(name):
    """The other images too, which in the public code are not; padding stays as it was."""
    model = make_model(MULTI, name).eval()
    features, (sizes, padded) = features_of(MULTI), sizes_of(MULTI)
    together = model.predict(features, sizes, padded)
    for image, size in enumerate(sizes):
        one = {key: value[image : image + 1] for key, value in features.items()}
        single = model.predict(one, [size], padded)
        assert_near(together.logits[:, image], single.logits[:, 0], OUTPUTS, "logits")
        assert_near(together.boxes[:, image], single.boxes[:, 0], OUTPUTS, "boxes")
