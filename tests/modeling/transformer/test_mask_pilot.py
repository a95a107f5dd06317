"""Mask-piloted training: layout, noise and visibility by hand, no leakage, unchanged evaluation."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from batchformer_panoptic.batchformer.batchformer import SINGLE, TWO_STREAMS
from batchformer_panoptic.errors import UserError
from batchformer_panoptic.modeling.set_prediction.predictions import Predictions, QueryMasks
from batchformer_panoptic.modeling.set_prediction.targets import (
    ImageTarget,
    SegmentMap,
    TargetBatch,
    to_targets,
)
from batchformer_panoptic.modeling.transformer.mask_pilot import MaskPilot, PilotLayout
from helpers.commands import load_script
from helpers.tiny_model import MASK2FORMER, NUM_CLASSES, random_inputs, tiny_model, total

SIZES = [(48, 64), (64, 56), (40, 40)]
PILOT: dict[str, Any] = {**MASK2FORMER, "MODEL__MASK2FORMER__PILOT__ENABLED": True}
FEW = "MODEL__MASK2FORMER__PILOT__NUM_QUERIES"
BLOCK = "MODEL__BATCHFORMER__ENABLED"


def make_pilot(**settings: Any) -> MaskPilot:
    torch.manual_seed(0)
    defaults = {"num_queries": 6, "label_noise": 0.0, "mask_noise": 0.0}
    return MaskPilot(num_classes=5, embed_dim=8, **defaults | settings)


def two_images() -> list[ImageTarget]:
    """An image of 8 x 8 with two objects, and one of 8 x 6 with one object."""
    first = torch.full((8, 8), -1)
    first[:3, :4] = 0
    first[5, 7] = 1
    second = torch.full((8, 6), -1)
    second[4:, 2:] = 0
    return [
        ImageTarget(torch.tensor([3, 1]), masks=SegmentMap(first)),
        ImageTarget(torch.tensor([4]), masks=SegmentMap(second)),
    ]


def many_objects(count: int) -> ImageTarget:
    side = 8
    segment_map = torch.arange(side * side).view(side, side)
    labels = torch.arange(count) % 5
    return ImageTarget(labels, masks=SegmentMap(segment_map.masked_fill(segment_map >= count, -1)))


# --- by hand -------------------------------------------------------------------------------------


def test_masks_without_noise_are_the_resized_objects() -> None:
    # Padded to 8 x 16: the right half of both levels is empty.
    queries = make_pilot()(two_images(), SINGLE, [(2, 4), (4, 8)], (8, 16))
    assert (queries.layout.num_groups, queries.layout.group_size) == (3, 2)
    coarse = [
        [[1, 0, 0, 0], [0, 0, 0, 0]],
        [[0, 0, 0, 0], [0, 1, 0, 0]],
        [[0, 0, 0, 0], [1, 1, 0, 0]],
    ]
    expected = torch.tensor(coarse, dtype=torch.bool).flatten(1)
    visible = queries.visible_tokens(0)
    for group in range(3):
        assert torch.equal(visible[0, 2 * group : 2 * group + 2], expected[:2])
        assert torch.equal(visible[1, 2 * group], expected[2])
        assert visible[1, 2 * group + 1].all()  # padding: a row without a token would be NaN
    fine = queries.visible_tokens(1)[0, 0].view(4, 8)
    assert fine.nonzero().tolist() == [[0, 0], [0, 1], [1, 0], [1, 1]]


def test_contents_are_the_embeddings_of_the_classes() -> None:
    pilot = make_pilot()
    queries = pilot(two_images(), SINGLE, [(2, 2)], (8, 8))
    assert torch.equal(queries.content[0], pilot.label_embed.weight[[3, 1] * 3])
    assert torch.equal(queries.content[1, ::2], pilot.label_embed.weight[[4] * 3])
    assert queries.is_object.tolist() == [[True, True], [True, False]]


def test_visible_queries_by_hand() -> None:
    queries = make_pilot(num_queries=4)(two_images(), SINGLE, [(2, 2)], (8, 8))
    visible = queries.visible_queries(1).int().tolist()
    assert visible[0] == [
        [1, 0, 0, 0, 0],  # matching
        [1, 1, 1, 0, 0],  # first group
        [1, 1, 1, 0, 0],
        [1, 0, 0, 1, 1],  # second group
        [1, 0, 0, 1, 1],
    ]
    assert visible[1] == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 1, 0, 0, 0],  # padding sees, and is not seen
        [1, 0, 0, 1, 0],
        [1, 0, 0, 1, 0],
    ]


def test_streams_share_the_queries() -> None:
    pilot = make_pilot(mask_noise=1.0, label_noise=1.0)
    queries = pilot(two_images(), TWO_STREAMS, [(4, 4)], (8, 8))
    for tensor in (queries.content, queries.visible_tokens(0), queries.visible_queries(3)):
        original, batchformer = tensor.chunk(2)
        assert torch.equal(original, batchformer)
        assert len(original) == 2


def test_noise_flips_the_expected_number_of_cells() -> None:
    segment_map = torch.full((64, 64), -1)
    segment_map[:32, :32] = 0
    target = ImageTarget(torch.tensor([2]), masks=SegmentMap(segment_map))
    pilot = make_pilot(num_queries=200, mask_noise=0.2, label_noise=0.5)
    queries = pilot([target], SINGLE, [(64, 64)], (64, 64))
    noised = queries.visible_tokens(0)
    flipped = noised ^ (segment_map.flatten() == 0)
    assert flipped.sum(-1).float().mean().item() == pytest.approx(0.2 * 32 * 32, rel=0.05)
    assert (flipped & (segment_map.flatten() == 0)).any()  # lost
    assert (flipped & (segment_map.flatten() < 0)).any()  # gained
    assert not torch.equal(noised, queries.visible_tokens(0))  # drawn for every layer
    same = (queries.content[0] == pilot.label_embed.weight[2]).all(-1)
    # A random class is the true one in one of five cases.
    assert same.float().mean().item() == pytest.approx(0.6, abs=0.1)


def test_an_object_without_pixels_attends_everywhere() -> None:
    target = ImageTarget(torch.tensor([0]), masks=SegmentMap(torch.full((8, 8), -1)))
    queries = make_pilot(mask_noise=0.2)([target], SINGLE, [(4, 4)], (8, 8))
    assert queries.visible_tokens(0).all()


def test_of_too_many_objects_a_random_subset_is_used() -> None:
    pilot = make_pilot(num_queries=4)
    targets = [many_objects(9), many_objects(3)]
    layouts = [pilot(targets, SINGLE, [(8, 8)], (8, 8)).layout for _ in range(4)]
    assert {(layout.num_groups, layout.group_size) for layout in layouts} == {(1, 4)}
    chosen = [layout.objects[0].tolist() for layout in layouts]
    assert all(len(set(x)) == 4 and x == sorted(x) and x[-1] < 9 for x in chosen)
    assert len({tuple(x) for x in chosen}) > 1
    assert all(layout.objects[1].tolist() == [0, 1, 2] for layout in layouts)
    queries = pilot(targets, SINGLE, [(8, 8)], (8, 8))
    numbers = queries.layout.objects[0]
    assert torch.equal(queries.content[0], pilot.label_embed.weight[targets[0].labels[numbers]])
    assert torch.equal(queries.visible_tokens(0)[0], F.one_hot(numbers, 64).bool())


def test_pairs_are_those_of_the_layout() -> None:
    layout = PilotLayout(2, 2, (torch.tensor([1, 4]), torch.tensor([], dtype=torch.int64)))
    batch = TargetBatch([many_objects(5), many_objects(0)] * 2)
    embeddings = torch.randn(3, 4, 4, 7)
    masks = QueryMasks(embeddings, torch.randn(4, 7, 5, 5), (20, 20))
    logits = torch.randn(3, 4, 4, 6)
    grouped = layout.by_group(Predictions(logits, masks=masks))
    assert grouped.logits.shape == (6, 4, 2, 6)
    assert torch.equal(grouped.logits[3], logits[1, :, 2:])  # layer 1, group 1
    assert isinstance(grouped.masks, QueryMasks)
    assert torch.equal(grouped.masks.embeddings[4], embeddings[2, :, :2])
    matching = layout.matching(grouped, batch)
    assert matching.layer_starts == (0, 4, 8, 12, 16, 20, 24)
    last = matching.of_layer(-1)
    assert not last.supervise_unmatched
    assert last.image.tolist() == [0, 0, 2, 2]
    assert last.query.tolist() == [0, 1, 0, 1]
    assert last.local_target.tolist() == [1, 4, 1, 4]
    assert last.global_target.tolist() == [1, 4, 6, 9]


def test_other_masks_are_refused() -> None:
    layout = PilotLayout(1, 1, (torch.tensor([0]),))
    with pytest.raises(ValueError, match="QueryMasks"):
        layout.by_group(Predictions(torch.zeros(1, 1, 1, 3)))


# --- the model -----------------------------------------------------------------------------------


def predictions_of(model: Any, inputs: list[dict[str, Any]], *, piloted: bool) -> Any:
    images = model.preprocess(inputs)
    features = model.backbone(images.tensor)
    targets = to_targets(inputs, model.device, with_boxes=False, with_masks=True)
    size = tuple(images.tensor.shape[-2:])
    return model.predict(features, images.image_sizes, size, targets if piloted else None)


def without_label_embedding(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: value for key, value in state.items() if "pilot" not in key}


@pytest.mark.parametrize("block", [False, True], ids=["plain", "batchformer"])
def test_matching_queries_do_not_depend_on_pilot_queries(block: bool) -> None:
    model = tiny_model(**PILOT, MODEL__BATCHFORMER__ENABLED=block).train()
    inputs = random_inputs(SIZES)
    plain = predictions_of(model, inputs, piloted=False)
    assert plain.pilot is None
    with torch.no_grad():
        for scale in (1.0, 100.0):
            model.transformer.pilot.label_embed.weight *= scale
            piloted = predictions_of(model, inputs, piloted=True)
            torch.testing.assert_close(piloted.logits, plain.logits, atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(
                piloted.masks.embeddings, plain.masks.embeddings, atol=1e-5, rtol=1e-5
            )
            # 25 groups of 4 queries, each like a layer.
            assert piloted.pilot.logits.shape[:3] == (4 * 25, len(SIZES) * (1 + block), 4)


@pytest.mark.parametrize("block", [False, True], ids=["plain", "batchformer"])
def test_losses_and_gradients(block: bool) -> None:
    model = tiny_model(**PILOT, MODEL__BATCHFORMER__ENABLED=block).train()
    losses = model(random_inputs(SIZES))
    names = {
        f"loss_{kind}_mp{layer}"
        for kind in ("ce", "mask", "dice")
        for layer in ("", "_0", "_1", "_2")
    }
    assert {key.partition("/")[0] for key in losses if "mp" in key} == names
    assert all(value.isfinite() and value > 0 for value in losses.values())
    total(losses).backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.isfinite().all(), key
    assert model.transformer.pilot.label_embed.weight.grad.any()


@pytest.mark.parametrize("counts", [[0, 0, 0], [3, 0, 1], [14, 2, 0]])
def test_no_objects_and_many(counts: list[int]) -> None:
    model = tiny_model(**PILOT, **{FEW: 7}).train()
    losses = model(random_inputs(SIZES, counts))
    assert all(value.isfinite() for value in losses.values())
    piloted = [value for key, value in losses.items() if "mp" in key]
    assert all((value > 0) == any(counts) for value in piloted)
    total(losses).backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.isfinite().all(), key


def test_losses_are_means_over_the_groups() -> None:
    """Without noise all groups are equal, so that their number does not matter."""
    off = {f"MODEL__MASK2FORMER__PILOT__{key}_NOISE": 0.0 for key in ("LABEL", "MASK")}
    classes = []
    for number in (4, 40):
        model = tiny_model(**PILOT, **off, **{FEW: number}).train()
        losses = model(random_inputs(SIZES))
        classes.append(torch.stack([losses[f"loss_ce_mp{x}"] for x in ("", "_0", "_1", "_2")]))
    torch.testing.assert_close(*classes)


@pytest.mark.parametrize("scoring", ["softmax", "focal"])
def test_padding_queries_are_not_supervised(scoring: str) -> None:
    off = {f"MODEL__MASK2FORMER__PILOT__{key}_NOISE": 0.0 for key in ("LABEL", "MASK")}
    model = tiny_model(**PILOT, **off, **{FEW: 4}, MODEL__DETR__SCORING=scoring).train()
    inputs = random_inputs([(64, 64), (64, 64)], [4, 1])
    predictions = predictions_of(model, inputs, piloted=True)
    labels = [x["instances"].gt_classes for x in inputs]
    logits = predictions.pilot.logits
    real = torch.cat([logits[-1, 0], logits[-1, 1, :1]])
    # The scoring of one image with these five queries.
    expected = model.scoring.loss(
        real[None, None], torch.cat(labels)[None, None], torch.tensor(5.0)
    )
    images = model.preprocess(inputs)
    targets = to_targets(inputs, model.device, with_boxes=False, with_masks=True)
    losses = model.losses(predictions, model.backbone(images.tensor), targets)
    torch.testing.assert_close(losses["loss_ce_mp"], expected.sum())


def test_the_last_layer_only() -> None:
    model = tiny_model(**PILOT, MODEL__DETR__DEEP_SUPERVISION=False).train()
    losses = model(random_inputs(SIZES))
    expected = {f"loss_{kind}{end}" for kind in ("ce", "mask", "dice") for end in ("", "_mp")}
    assert set(losses) == expected


def test_mixed_precision() -> None:
    model = tiny_model(**PILOT, MODEL__BATCHFORMER__ENABLED=True).train()
    values = []
    for enabled in (True, False):
        torch.manual_seed(1)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            losses = model(random_inputs(SIZES))
        values.append(total(losses))
    torch.testing.assert_close(values[0], values[1], rtol=0.01, atol=0)


def test_activation_checkpointing_changes_nothing() -> None:
    losses, gradients = [], []
    for parts in ([], ["encoder", "decoder"]):
        dropout = {"MODEL__DETR__DROPOUT": 0.2, "MODEL__ACTIVATION_CHECKPOINTING": parts}
        model = tiny_model(**PILOT, **dropout).train()
        torch.manual_seed(1)
        losses.append(model(random_inputs(SIZES)))
        total(losses[-1]).backward()
        gradients.append({key: p.grad for key, p in model.named_parameters()})
    for key, value in losses[0].items():
        assert torch.equal(value, losses[1][key]), key
    for key, value in gradients[0].items():
        torch.testing.assert_close(gradients[1][key], value, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("block", [False, True], ids=["plain", "batchformer"])
def test_evaluation_is_untouched(block: bool) -> None:
    piloted = tiny_model(**PILOT, MODEL__BATCHFORMER__ENABLED=block).eval()
    plain = tiny_model(**MASK2FORMER).eval()
    state = without_label_embedding(piloted.state_dict())
    assert set(piloted.state_dict()) - set(state) == {"transformer.pilot.label_embed.weight"}
    plain.load_state_dict({k: v for k, v in state.items() if "batchformer" not in k})
    inputs = random_inputs(SIZES)
    for one, other in zip(piloted(inputs), plain(inputs), strict=True):
        assert torch.equal(one["panoptic_seg"][0], other["panoptic_seg"][0])
        assert torch.equal(one["instances"].scores, other["instances"].scores)
    flop_analysis = load_script("tools/analyze_model.py").flop_analysis
    counts = [flop_analysis(m, random_inputs([(64, 64)])).total() for m in (piloted, plain)]
    assert counts[0] == counts[1] > 0


def test_training_without_it_draws_no_random_numbers_for_it() -> None:
    """Ground truth for a transformer that ignores it changes nothing, states of RNGs included."""
    model = tiny_model(**MASK2FORMER, MODEL__BATCHFORMER__ENABLED=True).train()
    assert "pilot" not in " ".join(model.state_dict())
    outputs, states = [], []
    for piloted in (False, True):
        torch.manual_seed(1)
        outputs.append(predictions_of(model, random_inputs(SIZES), piloted=piloted))
        states.append(torch.get_rng_state())
    assert torch.equal(outputs[0].logits, outputs[1].logits)
    assert torch.equal(*states)
    assert outputs[1].pilot is None


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("NUM_QUERIES", 0, r"NUM_QUERIES is 0; it must be at least 1"),
        ("LABEL_NOISE", 1.5, r"LABEL_NOISE is 1.5; it must be from 0 to 1"),
        ("MASK_NOISE", -0.1, r"MASK_NOISE is -0.1; it must be from 0 to 1"),
    ],
)
def test_settings_out_of_range(key: str, value: float, words: str) -> None:
    with pytest.raises(UserError, match=words):
        tiny_model(**PILOT, **{f"MODEL__MASK2FORMER__PILOT__{key}": value})


def test_training_lowers_the_losses() -> None:
    model = tiny_model(**PILOT).train()
    inputs = random_inputs([(64, 64)])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    values = []
    for _ in range(12):
        losses = model(inputs)
        values.append(sum(v.item() for k, v in losses.items() if "mp" in k))
        optimizer.zero_grad()
        total(losses).backward()
        optimizer.step()
    assert min(values[-3:]) < 0.9 * values[0]
    assert model.transformer.pilot.label_embed.weight.shape == (NUM_CLASSES, 32)
