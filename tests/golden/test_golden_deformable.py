"""Deformable-DETR, without and with BatchFormerV2: the recorded numbers of the public code."""

from dataclasses import replace

import pytest
import torch

from batchformer_panoptic.batchformer import BATCHFORMER, BatchFormerHook
from batchformer_panoptic.modeling.set_prediction.predictions import Predictions
from batchformer_panoptic.modeling.set_prediction.targets import TargetBatch
from batchformer_panoptic.modeling.transformer.layers import BatchPadding
from helpers.golden_compare import OUTPUTS, assert_losses_and_gradients, assert_matching
from helpers.golden_deformable import deformable_model, load, namer
from helpers.golden_models import (
    Insertion,
    assert_evaluates_as_plain,
    assert_near,
    assert_outputs,
    assert_training_step,
    features_of,
    image_targets,
    load_golden,
    sizes_of,
)

GOLDEN = load_golden("deformable_detr.pt")
VARIANTS = GOLDEN["variants"]
CASES = [
    (name, targets) for name, v in VARIANTS.items() for targets in GOLDEN["targets"] if targets in v
]

BLOCKS = load_golden("deformable_detr_batchformer.pt")
BASE = load_golden(BLOCKS["base_file"])  # weights, inputs and targets are those of this file
WITH_BLOCK = BASE | {"config": BASE["config"] | BLOCKS["config"]}
BLOCK_VARIANTS = BLOCKS["variants"]
# The fork's mode 7 replaces the batch by the block's output: the batchformer stream only.
TWO_STREAMS = [name for name, v in BLOCK_VARIANTS.items() if v["args"]["bf"] != 7]
REPLACED = [name for name, v in BLOCK_VARIANTS.items() if v["args"]["bf"] == 7]
each_block_variant = pytest.mark.parametrize("name", TWO_STREAMS)


def make_model(name):
    variant = VARIANTS[name]
    return load(deformable_model(GOLDEN["config"], variant["args"]), variant)


def make_block_model(name, *, with_block=True):
    config, variant = WITH_BLOCK["config"], BLOCK_VARIANTS[name]
    base = BASE["variants"][variant["base_variant"]]
    if not with_block:
        return load(deformable_model(config, base["args"]), base)
    insertion = Insertion(tuple(variant["args"]["insert_idx"]), bool(variant["args"]["share_bf"]))
    hook = BatchFormerHook(
        config["d_model"],
        insert_layers=insertion.layers,
        num_heads=config["bf_nhead"],
        dim_feedforward=config["bf_dim_feedforward"],
        dropout=0.0,
        shared=insertion.shared,
    )
    if insertion.shared:
        published = {"transformer.bf.": BLOCKS["bf_layers"][0]}
    else:
        published = {f"transformer.bf.{k}.": BLOCKS["bf_layers"][k] for k in insertion.layers}
    blocks = {
        namer(base["args"])(prefix + key): value.float()
        for prefix, block in published.items()
        for key, value in block.items()
    }
    return load(deformable_model(config, base["args"], hook), base, blocks)


def predict_with_memory(model, golden):
    memories = []
    handle = model.transformer.encoder.register_forward_hook(
        lambda _, inputs, output: memories.append(output[0])
    )
    predictions = model.predict(features_of(golden), *sizes_of(golden))
    handle.remove()
    (memory,) = memories
    return predictions, memory


def assert_references(predictions, recorded):
    """Reference points that each layer starts from; a width that is not recorded starts from 0."""
    if "init_reference" not in recorded:
        return
    later = recorded["inter_references"][:-1] if "inter_references" in recorded else []
    ours = predictions.transformer.reference_points
    for layer, points in zip(ours, [recorded["init_reference"], *later], strict=True):
        known = points.shape[-1]
        assert_near(layer[..., :known].sigmoid(), points, OUTPUTS, "reference points")
        assert not layer[..., known:].any()


@pytest.mark.parametrize(("name", "targets"), CASES)
def test_training_step(name, targets, device):
    variant = VARIANTS[name]
    model, recorded = make_model(name).to(device), variant[targets]
    objects = GOLDEN["targets"][targets]
    predictions = assert_training_step(model, GOLDEN, objects, recorded, namer(variant["args"]))
    assert_references(predictions, recorded.get("intermediates", {}))
    assert (predictions.transformer.proposals is not None) == variant["args"]["two_stage"]


@pytest.mark.parametrize("name", VARIANTS)
def test_memory_and_evaluation(name):
    recorded = VARIANTS[name]["full"]
    predictions, memory = predict_with_memory(make_model(name).eval(), GOLDEN)
    assert_outputs(predictions, recorded["outputs"], last_only=True)
    if "memory" in recorded["intermediates"]:
        assert_near(memory, recorded["intermediates"]["memory"], OUTPUTS, "memory")


@pytest.mark.parametrize("name", [n for n, v in VARIANTS.items() if v["args"]["two_stage"]])
def test_proposals(name):
    recorded = VARIANTS[name]["full"]
    model = make_model(name)
    predictions = model.predict(features_of(GOLDEN), *sizes_of(GOLDEN))
    proposals = predictions.transformer.proposals
    wanted = recorded["outputs"]["enc_outputs"]
    assert_near(proposals.logits, wanted["pred_logits"], OUTPUTS, "logits of the proposals")
    assert_near(proposals.boxes, wanted["pred_boxes"], OUTPUTS, "boxes of the proposals")
    objects = TargetBatch(image_targets(GOLDEN["targets"]["full"])).of_one_class()
    matching = model.matcher(Predictions(proposals.logits[None], proposals.boxes[None]), objects)
    assert_matching(matching, {"aux": [], "final": recorded["indices"]["enc"]})


def test_masks_and_positions():
    inputs = GOLDEN["inputs"]
    transformer = make_model(next(iter(VARIANTS))).transformer
    features = features_of(GOLDEN)
    maps = [features[name] for name in transformer.in_features]
    _, masks = transformer.projection(maps, BatchPadding(*sizes_of(GOLDEN)))
    for level, (mask, pos) in enumerate(zip(inputs["masks"], inputs["pos"], strict=True)):
        assert torch.equal(masks[level], mask)
        ours = transformer.position_encoding(mask).permute(0, 3, 1, 2)
        assert_near(ours, pos, 1e-5, f"pos of level {level}")


PROJECTED = "srcs_after_input_proj_levels_"


@pytest.mark.parametrize(
    ("name", "key"), [(n, key) for n, v in VARIANTS.items() for key in v if PROJECTED in key]
)
def test_projected_maps(name, key):
    transformer = make_model(name).transformer
    features = features_of(GOLDEN)
    maps = [features[name] for name in transformer.in_features]
    projected, _ = transformer.projection(maps, BatchPadding(*sizes_of(GOLDEN)))
    levels = [int(level) for level in key.removeprefix(PROJECTED).split("_")]
    for level, recorded in zip(levels, VARIANTS[name][key], strict=True):
        assert_near(projected[level], recorded, OUTPUTS, f"projected map of level {level}")


@each_block_variant
def test_training_step_in_two_streams(name, device):
    variant, model = BLOCK_VARIANTS[name], make_block_model(name).to(device)
    base = BASE["variants"][variant["base_variant"]]
    objects = BASE["targets"]["full"]
    predictions = assert_training_step(model, WITH_BLOCK, objects, variant, namer(base["args"]))
    assert predictions.logits.shape[1] == variant["train_batch"]
    assert_references(predictions, variant.get("intermediates", {}))
    ours = {n for n, _ in model.named_parameters() if "batchformer" in n}
    assert ours == {namer(base["args"])(n) for n in variant["bf_parameter_names"]}


@each_block_variant
def test_the_streams(name):
    variant, model = BLOCK_VARIANTS[name], make_block_model(name)
    predictions, memory = predict_with_memory(model, WITH_BLOCK)
    recorded = variant.get("intermediates", {})
    if "memory_every_9th_token" in recorded:
        assert_near(memory[:, ::9], recorded["memory_every_9th_token"], OUTPUTS, "memory")
    original, mixed = predictions.streams.split(predictions.logits[-1])
    plain = make_block_model(name, with_block=False)
    expected = plain.predict(features_of(WITH_BLOCK), *sizes_of(WITH_BLOCK)).logits[-1]
    assert_near(original, expected, OUTPUTS, "original stream")
    far = (mixed - expected).abs().max()
    assert_near(far, variant["second_half_differs_max_abs"], 2 * OUTPUTS, "distance of the streams")


@each_block_variant
def test_evaluation_is_plain(name):
    variant = BLOCK_VARIANTS[name]
    plain = make_block_model(name, with_block=False)
    predictions = assert_evaluates_as_plain(make_block_model(name), plain, WITH_BLOCK)
    assert predictions.logits.shape[1] == variant["eval_batch"]


@pytest.mark.parametrize(
    "name", [name for name in TWO_STREAMS if BLOCK_VARIANTS[name]["eval_bf_outputs"] is not None]
)
def test_evaluation_with_the_block_would_be_the_second_stream(name):
    """``--eval_bf`` of the fork is not a feature here; its numbers are those of that stream."""
    variant, model = BLOCK_VARIANTS[name], make_block_model(name)
    predictions = model.predict(features_of(WITH_BLOCK), *sizes_of(WITH_BLOCK))
    for ours, key in ((predictions.logits, "pred_logits"), (predictions.boxes, "pred_boxes")):
        second = predictions.streams.split(ours[-1])[1]
        assert_near(second, variant["eval_bf_outputs"][key], OUTPUTS, key)


@pytest.mark.parametrize("name", REPLACED)
def test_training_one_stream_would_be_training_the_second_one(name):
    """The fork's mode without the original stream: outputs, losses and gradients of the other."""
    variant, model = BLOCK_VARIANTS[name], make_block_model(name)
    base = BASE["variants"][variant["base_variant"]]
    features = features_of(WITH_BLOCK)
    predictions = model.predict(features, *sizes_of(WITH_BLOCK))
    logits, boxes = (
        x.tensor_split(predictions.streams.num_streams, dim=1)[-1]
        for x in (predictions.logits, predictions.boxes)
    )
    assert_outputs(replace(predictions, logits=logits, boxes=boxes), variant["outputs"])
    losses = model.losses(predictions, features, image_targets(BASE["targets"]["full"]))
    # Both streams share one normaliser, twice the objects.
    second = {k: 2 * v for k, v in losses.items() if k.endswith(f"/{BATCHFORMER}")}
    weights = WITH_BLOCK["config"]["weight_dict"]
    assert_losses_and_gradients(model, second, variant, weights, namer(base["args"]))
