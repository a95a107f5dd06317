"""Mask2Former: the recorded numbers of the public code, and of its parts in two streams."""

import pytest
import torch

from batchformer_panoptic.modeling.postprocessing.panoptic import MERGES, PanopticOptions
from batchformer_panoptic.modeling.postprocessing.results import (
    InferenceOptions,
    needed_masks,
    select_queries,
    to_result,
)
from batchformer_panoptic.modeling.set_prediction.scoring import SoftmaxScoring
from batchformer_panoptic.modeling.set_prediction.targets import TargetBatch
from helpers.golden_compare import (
    OUTPUTS,
    SLACK_OF,
    assert_gradients,
    assert_matching,
    assert_near,
)
from helpers.golden_files import features_of, image_targets, load_golden, sizes_of
from helpers.golden_mask2former import mask2former_model, our_name, recorded_draws

GOLDEN = load_golden("mask2former.pt")
CONFIG, WEIGHTS = GOLDEN["config"], GOLDEN["config"]["weights"]
STREAMS = ["one_stream", "two_stream"]


def predict(model):
    device = next(model.parameters()).device
    return model.predict(features_of(GOLDEN, device), *sizes_of(GOLDEN))


def test_pixel_decoder():
    recorded = GOLDEN["one_stream"]["pixel_decoder"]
    transformer = mask2former_model(GOLDEN).transformer
    pixels = transformer.pixel_decoder(features_of(GOLDEN), transformer.encoder)
    assert_near(pixels.mask_features, recorded["mask_features"], OUTPUTS, "mask_features")
    for level, wanted in zip(pixels.levels, recorded["multi_scale"], strict=True):
        assert_near(level, wanted, OUTPUTS, "level")


@pytest.mark.parametrize("name", STREAMS)
def test_predictions(name):
    recorded = GOLDEN[name]["outputs"]
    predictions = predict(mask2former_model(GOLDEN, block=name == "two_stream"))
    layers = [*recorded["aux_outputs"], recorded]
    assert len(predictions.logits) == len(layers) == CONFIG["dec"] + 1
    everything = torch.ones(recorded["pred_logits"].shape[:2]).nonzero(as_tuple=True)
    for index, layer in enumerate(layers):
        assert_near(predictions.logits[index], layer["pred_logits"], OUTPUTS, "pred_logits")
        masks = predictions.masks(index, *everything)
        assert_near(masks, layer["pred_masks"].flatten(0, 1), 5 * OUTPUTS, "pred_masks")


@pytest.mark.parametrize("name", STREAMS)
def test_matching_losses_and_gradients(name, device):
    recorded, slack = GOLDEN[name], SLACK_OF[device.type]
    model = mask2former_model(GOLDEN, block=name == "two_stream").to(device)
    predictions, targets = predict(model), image_targets(GOLDEN["targets"], device)
    with recorded_draws(recorded["layers"]):
        batch = TargetBatch(predictions.streams.expand_list(targets))
        matching = model.matcher(predictions, batch)
        last, *before = [layer["indices"] for layer in recorded["layers"]]
        assert_matching(matching, {"aux": before, "final": last})
    with recorded_draws(recorded["layers"]):
        losses = model.losses(predictions, features_of(GOLDEN, device), targets)
    sums = {}
    for key, value in losses.items():
        loss = key.partition("/")[0]
        sums[loss] = sums.get(loss, 0.0) + value
    assert set(sums) == set(recorded["losses"])
    for key, wanted in recorded["losses"].items():
        weight = WEIGHTS["_".join(key.split("_")[:2])]
        tolerance = slack * 1e-4 * max(abs(wanted.item()), 0.1)
        assert_near(sums[key] / weight, wanted, tolerance, key)
    total = torch.stack(list(losses.values())).sum()
    wanted = recorded["weighted_total"]
    assert_near(total, wanted, slack * 1e-5 * wanted, "total")
    total.backward()
    norms = recorded["grad_norms"]
    total_norm = sum(norm**2 for norm in norms.values()) ** 0.5
    gradients = {"grad_total_norm": total_norm, "params_without_grad": []}
    assert_gradients(model, recorded | gradients, our_name, slack=slack)


def test_sampler_chooses_the_recorded_points():
    recorded, model = GOLDEN["one_stream"], mask2former_model(GOLDEN)
    predictions = predict(model)
    (loss,) = [term for term in model.criterion.terms if hasattr(term, "num_points")]
    layers = [*recorded["layers"][1:], recorded["layers"][0]]
    for index, layer in enumerate(layers):
        image = torch.cat([torch.full_like(q, i) for i, (q, _) in enumerate(layer["indices"])])
        query = torch.cat([queries for queries, _ in layer["indices"]])
        maps = predictions.masks(index, image, query)[:, None]
        with recorded_draws([layer]):
            points = loss._points(maps)
        assert_near(points, layer["loss_points"], 1e-6, "loss_points")


def test_evaluation_is_the_plain_model():
    plain, block = mask2former_model(GOLDEN).eval(), mask2former_model(GOLDEN, block=True).eval()
    ours, theirs = predict(block), predict(plain)
    assert torch.equal(ours.logits, theirs.logits)
    assert torch.equal(ours.transformer.mask_features, theirs.transformer.mask_features)


def results_of(case):
    """All three results for recorded logits and masks, which have the size of the output."""
    options = InferenceOptions(
        tuple(CONFIG["thing_classes"]),
        panoptic=PanopticOptions(
            score_threshold=CONFIG["object_mask_threshold"],
            overlap_threshold=CONFIG["overlap_threshold"],
        ),
        merge=MERGES["mask2former"],
        max_instances=CONFIG["test_topk_per_image"],
        instance_scoring="mask2former",
        semantic=True,
    )
    decoded = SoftmaxScoring(CONFIG["classes"]).decode(case["logits"][None])
    chosen = select_queries(decoded, options, has_masks=True)
    size = tuple(case["masks"].shape[-2:])
    return to_result(
        chosen.of_image(0),
        decoded.scores[0],
        decoded.labels[0],
        None,
        case["masks"][needed_masks(chosen, options)[0]],
        decoded.probabilities[0],
        padded_size=size,
        image_size=size,
        output_size=size,
        options=options,
    )


each_picture = pytest.mark.parametrize("case", GOLDEN["postprocess"])


@each_picture
def test_panoptic_inference(case):
    segment_map, segments = results_of(case)["panoptic_seg"]
    assert torch.equal(segment_map, case["panoptic_seg"])
    keys = ("id", "isthing", "category_id")
    ours = [tuple(s[key] for key in keys) for s in segments]
    assert ours == [tuple(s[key] for key in keys) for s in case["segments_info"]]


@each_picture
def test_instance_inference(case):
    found, recorded = results_of(case)["instances"], case["instances"]
    # Published results are unsorted, and contain empty masks, which score 0.
    order = recorded["scores"].argsort(descending=True)
    order = order[recorded["mask_areas"][order] > 0]
    assert_near(found.scores, recorded["scores"][order], 1e-5, "scores")
    assert torch.equal(found.pred_classes, recorded["classes"][order])
    assert torch.equal(found.pred_masks.flatten(1).sum(1), recorded["mask_areas"][order].long())
    for mask, box in zip(found.pred_masks, found.pred_boxes.tensor, strict=True):
        rows, columns = mask.any(1).nonzero(), mask.any(0).nonzero()
        edges = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
        assert box.tolist() == [float(edge) for edge in edges]


@each_picture
def test_semantic_inference(case):
    semantic = results_of(case)["sem_seg"]
    rounding = 1e-3 * max(1.0, semantic.max().item())  # recorded in float16
    assert_near(semantic, case["semantic"].float(), rounding, "semantic")
