"""The whole model: streams, batch invariants, gradients, learning."""

import copy
import re
from dataclasses import replace

import pytest
import torch
from detectron2.utils.analysis import FlopCountAnalysis

from batchformer_panoptic.batchformer import BATCHFORMER, ORIGINAL, BatchFormerHook
from batchformer_panoptic.errors import NonFiniteError, UserError
from batchformer_panoptic.modeling import panoptic_detr
from batchformer_panoptic.modeling.postprocessing import masks
from batchformer_panoptic.modeling.postprocessing.results import ChosenQueries
from batchformer_panoptic.modeling.set_prediction.matcher import HungarianMatcher
from batchformer_panoptic.modeling.transformer import build_transformer
from helpers.tiny_model import (
    MASK2FORMER,
    NUM_CLASSES,
    NUM_THINGS,
    random_inputs,
    tiny_cfg,
    tiny_model,
    total,
)

SIZES = [(48, 64), (64, 56), (40, 40)]
PLAIN = {"MODEL__BATCHFORMER__ENABLED": False}
BLOCK = {"MODEL__BATCHFORMER__ENABLED": True}
TRANSFORMERS = [
    {"MODEL__DETR__TRANSFORMER_NAME": "detr"},
    {"MODEL__DETR__TRANSFORMER_NAME": "detr", "MODEL__DETR__PRE_NORM": True},
    {"MODEL__DETR__TRANSFORMER_NAME": "conditional", "MODEL__DETR__SCORING": "focal"},
    MASK2FORMER,
]
NAMES = ["detr", "pre_norm", "conditional", "mask2former"]
each_transformer = pytest.mark.parametrize("kind", TRANSFORMERS, ids=NAMES)
each_transformer_with_boxes = pytest.mark.parametrize("kind", TRANSFORMERS[:-1], ids=NAMES[:-1])
each_transformer_and_task = pytest.mark.parametrize(
    ("kind", "mask_on"),
    [
        pytest.param(kind, mask_on, id=f"{name}-{'masks' if mask_on else 'boxes'}")
        for kind, name in zip(TRANSFORMERS, NAMES, strict=True)
        for mask_on in (True, False)
        if mask_on or kind is not MASK2FORMER  # it predicts no boxes
    ],
)


def without_block(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {k: v for k, v in state.items() if "batchformer" not in k}


def pair_of_models(**overrides):
    """A model with the block, and the plain model with the same weights otherwise."""
    with_block = tiny_model(**BLOCK, **overrides)
    plain = tiny_model(**PLAIN, **overrides)
    plain.load_state_dict(without_block(with_block.state_dict()))
    return with_block, plain


def predictions(model, sizes=SIZES):
    images = model.preprocess(random_inputs(sizes))
    features = model.backbone(images.tensor)
    return model.predict(features, images.image_sizes, tuple(images.tensor.shape[-2:]))


def assert_same_results(results, others, *, pixels=0.0, **tolerance):
    """``pixels``: share of pixels that may differ where two random masks are as good as equal."""
    for a, b in zip(results, others, strict=True):
        torch.testing.assert_close(
            a["instances"].pred_boxes.tensor, b["instances"].pred_boxes.tensor, **tolerance
        )
        torch.testing.assert_close(a["instances"].scores, b["instances"].scores, **tolerance)
        assert torch.equal(a["instances"].pred_classes, b["instances"].pred_classes)
        if "panoptic_seg" in a:
            differ = (a["panoptic_seg"][0] != b["panoptic_seg"][0]).float().mean()
            assert differ <= pixels
            assert [(s["id"], s["category_id"]) for s in a["panoptic_seg"][1]] == [
                (s["id"], s["category_id"]) for s in b["panoptic_seg"][1]
            ]


@each_transformer_and_task
def test_evaluation_is_that_of_the_plain_model_bit_for_bit(mask_on, kind):
    with_block, plain = pair_of_models(**kind, MODEL__MASK_ON=mask_on)
    with_block.eval(), plain.eval()
    inputs = random_inputs(SIZES)
    assert_same_results(with_block(inputs), plain(inputs), rtol=0, atol=0)
    a, b = predictions(with_block), predictions(plain)
    assert torch.equal(a.logits, b.logits)
    assert (a.boxes is None) == (kind is MASK2FORMER)
    assert a.boxes is None or torch.equal(a.boxes, b.boxes)


@each_transformer
def test_evaluation_costs_what_the_plain_model_costs(kind):
    with_block, plain = pair_of_models(**kind)
    counts = []
    for model in (with_block, plain):
        analysis = FlopCountAnalysis(model.eval(), random_inputs([(48, 64)]))
        analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
        counts.append((analysis.total(), dict(analysis.unsupported_ops())))
    assert counts[0] == counts[1]
    assert counts[0][0] > 1e6


@each_transformer
@pytest.mark.parametrize("insert_layers", [[0], [1], [0, 1]])
def test_original_stream_is_the_plain_model_in_training(insert_layers, kind):
    with_block, plain = pair_of_models(**kind, MODEL__BATCHFORMER__INSERT_LAYERS=insert_layers)
    with_block.train(), plain.train()
    a, b = predictions(with_block), predictions(plain)
    original, other = a.streams.split(a.logits.transpose(0, 1))
    torch.testing.assert_close(original.transpose(0, 1), b.logits)
    assert not torch.allclose(other.transpose(0, 1), b.logits, atol=1e-3)


@each_transformer_with_boxes  # Mask2Former draws other points for two streams than for one
def test_streams_without_a_layer_between_them_train_as_the_plain_model(kind):
    with_block, plain = pair_of_models(**kind, MODEL__BATCHFORMER__ATTEND="none")
    objectives = [total(model.train()(random_inputs(SIZES))) for model in (with_block, plain)]
    torch.testing.assert_close(*objectives)
    for objective in objectives:
        objective.backward()
    expected = {name: parameter.grad for name, parameter in plain.named_parameters()}
    for name, parameter in with_block.named_parameters():
        if "batchformer" in name:
            assert parameter.grad is None
        else:
            torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-3, atol=1e-5)


@each_transformer
def test_steps_between_those_with_two_streams_are_the_plain_models(kind):
    model, plain = pair_of_models(**kind, MODEL__BATCHFORMER__EVERY=2)
    (hook,) = (part for part in model.train().modules() if isinstance(part, BatchFormerHook))
    found = []
    for hook.step, one in ((1, model), (1, plain.train()), (2, model)):
        torch.manual_seed(0)
        found.append(dict(one(random_inputs(SIZES))))
    rest, expected, both = found
    assert rest == expected
    assert {name.partition("/")[2] for name in both} >= {ORIGINAL, BATCHFORMER}


@each_transformer
def test_original_stream_ignores_its_neighbours_and_the_other_does_not(kind):
    model = tiny_model(**BLOCK, **kind, MODEL__SMALL_RESNET__NORM="").train()
    inputs = random_inputs([(48, 64), (48, 64)])
    changed = copy.deepcopy(inputs)
    changed[1]["image"] = 255 - changed[1]["image"]
    streams = []
    for batch in (inputs, changed):
        images = model.preprocess(batch)
        features = model.backbone(images.tensor)
        out = model.predict(features, images.image_sizes, (48, 64))
        streams.append(out.streams.split(out.logits[-1]))
    (original, mixed), (original_changed, mixed_changed) = streams
    torch.testing.assert_close(original[0], original_changed[0])
    assert not torch.allclose(mixed[0], mixed_changed[0], atol=1e-3)


@each_transformer
@pytest.mark.parametrize(("sizes", "is_padded"), [([(64, 64)] * 2, False), (SIZES[:2], True)])
def test_the_batch_attention_excludes_padding_if_asked_for(kind, sizes, is_padded):
    losses = []
    for mask_padding in (False, True):
        block = BLOCK | {"MODEL__BATCHFORMER__MASK_PADDING": mask_padding}
        model = tiny_model(**block, **kind).train()
        torch.manual_seed(1)
        losses.append(model(random_inputs(sizes)))
    for name, value in losses[0].items():
        if name.endswith("/original") or not is_padded:
            torch.testing.assert_close(value, losses[1][name])
    assert torch.equal(total(losses[0]), total(losses[1])) != is_padded


@each_transformer
@pytest.mark.parametrize("overrides", [PLAIN, BLOCK])
def test_results_do_not_depend_on_batch_mates(overrides, kind):
    model = tiny_model(**kind, **overrides).eval()
    inputs = random_inputs([(48, 64), (64, 56), (48, 64), (40, 40)])
    single = [model([x])[0] for x in inputs]
    assert_same_results(model(inputs), single, rtol=1e-4, atol=1e-5, pixels=0.02)
    order = [2, 3, 0, 1]
    permuted = model([inputs[i] for i in order])
    assert_same_results(permuted, [single[i] for i in order], rtol=1e-4, atol=1e-5, pixels=0.02)


@each_transformer_with_boxes
def test_padding_changes_nothing_from_features_on(kind):
    model = tiny_model(**kind).eval()
    features = {name: torch.randn(1, c, *s) for name, c, s in _feature_shapes((64, 64))}
    single = model.predict(features, [(64, 64)], (64, 64))
    padded = {
        name: torch.randn(1, c, *s) * 50 for name, c, s in _feature_shapes((96, 128))
    }  # what lies in the padding must not matter
    for name, value in features.items():
        padded[name][..., : value.shape[-2], : value.shape[-1]] = value
    batched = model.predict(padded, [(64, 64)], (96, 128))
    torch.testing.assert_close(single.logits, batched.logits, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(single.boxes, batched.boxes, rtol=1e-4, atol=1e-5)


def _feature_shapes(size):
    height, width = size
    for name, channels, stride in (("res2", 8, 4), ("res3", 12, 8), ("res4", 16, 16)):
        yield name, channels, (height // stride, width // stride)
    yield "res5", 20, (height // 16, width // 16)


def test_padded_batches_stay_close_when_asked_for():
    """A convolutional backbone leaks at the border: boxes and scores move a little, no more."""
    model = tiny_model(MODEL__DETR__PAD_IN_TEST=True).eval()
    inputs = random_inputs(SIZES)
    for together, one in zip(model(inputs), inputs, strict=True):
        (single,) = model([one])
        torch.testing.assert_close(
            together["instances"].scores, single["instances"].scores, atol=0.05, rtol=0.1
        )
        assert together["panoptic_seg"][0].shape == (one["height"], one["width"])


@each_transformer_and_task
@pytest.mark.parametrize("overrides", [PLAIN, BLOCK])
def test_every_parameter_gets_a_finite_gradient(overrides, mask_on, kind):
    model = tiny_model(**kind, **overrides, MODEL__MASK_ON=mask_on).train()
    losses = model(random_inputs(SIZES))
    total(losses).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
    used = {name for name, p in model.named_parameters() if p.grad.abs().amax() > 0}
    assert any("batchformer" in name for name in used) == overrides["MODEL__BATCHFORMER__ENABLED"]


@each_transformer
@pytest.mark.parametrize("counts", [[0, 0], [3, 0]])
def test_images_without_objects_train(counts, kind):
    model = tiny_model(**BLOCK, **kind).train()
    losses = model(random_inputs([(48, 64), (40, 40)], counts))
    assert total(losses).isfinite()
    total(losses).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name  # nothing unused: DDP needs that
        assert parameter.grad.isfinite().all(), name


@each_transformer
@pytest.mark.parametrize("counts", [[9, 1], [40, 25], [0, 12]])
def test_more_objects_than_queries_train(counts, kind):
    model = tiny_model(**BLOCK, **kind).train()
    losses = model(random_inputs([(48, 64), (40, 60)], counts))
    assert all(value.isfinite() for value in losses.values())
    total(losses).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad.isfinite().all(), name


def test_loss_names_say_their_stream():
    terms = ["ce", "bbox", "giou", "mask", "dice", "ce_0", "bbox_0", "giou_0"]
    plain = tiny_model(**PLAIN).train()(random_inputs(SIZES))
    assert set(plain) == {f"loss_{t}" for t in terms}
    both = tiny_model(**BLOCK).train()(random_inputs(SIZES))
    assert set(both) == {f"loss_{t}/{s}" for t in terms for s in ("original", "batchformer")}


def test_original_stream_carries_half_of_the_plain_loss():
    with_block, plain = pair_of_models()
    both = with_block.train()(random_inputs(SIZES))
    single = plain.train()(random_inputs(SIZES))
    for name, value in single.items():
        torch.testing.assert_close(2 * both[f"{name}/original"], value)


def test_the_prediction_before_the_first_layer_is_supervised_as_well():
    losses = tiny_model(**MASK2FORMER).train()(random_inputs(SIZES))
    expected = {f"loss_{t}{s}" for t in ("ce", "mask", "dice") for s in ("", "_0", "_1", "_2")}
    assert set(losses) == expected
    alone = {**MASK2FORMER, "MODEL__DETR__DEEP_SUPERVISION": False}
    losses = tiny_model(**alone).train()(random_inputs(SIZES))
    assert set(losses) == {"loss_ce", "loss_mask", "loss_dice"}
    total(losses).backward()


def test_metrics_come_with_the_losses_and_are_detached():
    losses = tiny_model(**BLOCK).train()(random_inputs(SIZES))
    expected = {"class_error", "cardinality_error", "kept_queries", "matched_objects"}
    assert set(losses.metrics) == expected
    assert losses.metrics["matched_objects"].item() == sum(
        len(x["instances"]) for x in random_inputs(SIZES)
    ) / len(SIZES)
    assert not any(value.requires_grad for value in losses.metrics.values())


def test_without_deep_supervision_only_the_last_layer_is_trained():
    model = tiny_model(MODEL__DETR__DEEP_SUPERVISION=False).train()
    losses = model(random_inputs(SIZES))
    assert set(losses) == {"loss_ce", "loss_bbox", "loss_giou", "loss_mask", "loss_dice"}


def test_frozen_stage_trains_the_mask_head_alone():
    model = tiny_model(**BLOCK, MODEL__MASK_HEAD__FREEZE_DETR=True).train()
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    total(model(random_inputs(SIZES))).backward()
    optimizer.step()
    changed = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    assert changed
    assert all(name.startswith("mask_head.") for name in changed)
    with pytest.raises(ValueError, match=r"or MODEL\.MASK_ON True"):
        tiny_model(MODEL__MASK_HEAD__FREEZE_DETR=True, MODEL__MASK_ON=False)


def test_results_cover_things_and_the_output_size():
    model = tiny_model(MODEL__DETR__SCORING="focal").eval()  # every query counts as an object
    inputs = random_inputs([(48, 64)])
    inputs[0]["height"], inputs[0]["width"] = 96, 120
    (result,) = model(inputs)
    segment_map, segments = result["panoptic_seg"]
    assert segment_map.shape == (96, 120)
    assert segment_map.dtype == torch.int32
    assert segments
    instances = result["instances"]
    assert instances.image_size == (96, 120)
    assert len(instances) > 0
    assert instances.pred_masks.shape == (len(instances), 96, 120)
    assert (instances.pred_classes < NUM_THINGS).all()
    assert (instances.pred_boxes.tensor[:, 2] <= 120).all()


@pytest.mark.parametrize("kind", [{}, MASK2FORMER], ids=["detr", "mask2former"])
def test_semantic_maps_add_nothing_to_the_other_results(kind):
    inputs = random_inputs([(48, 64), (40, 40)])
    inputs[0]["height"], inputs[0]["width"] = 96, 120
    plain = tiny_model(**kind).eval()(inputs)
    results = tiny_model(**kind, MODEL__PANOPTIC__SEMANTIC_TEST=True).eval()(inputs)
    assert_same_results(results, plain, rtol=0, atol=0)
    for one, size in zip(results, [(96, 120), (40, 40)], strict=True):
        assert one["sem_seg"].shape == (NUM_CLASSES, *size)
        assert one["sem_seg"].dtype == torch.float32
        assert (one["sem_seg"] >= 0).all()
    assert not any("sem_seg" in one for one in plain)


def test_semantic_maps_are_all_that_is_returned_where_nothing_scores_enough():
    strict = {"SCORE_THRESHOLD_TEST": 1.0, "INSTANCE_SCORE_THRESHOLD_TEST": 1.0}
    overrides = {f"MODEL__PANOPTIC__{key}": value for key, value in strict.items()}
    model = tiny_model(**MASK2FORMER, **overrides, MODEL__PANOPTIC__SEMANTIC_TEST=True).eval()
    for result in model(random_inputs(SIZES)):
        assert len(result["instances"]) == len(result["instances"].pred_masks) == 0
        assert not result["panoptic_seg"][0].any()
        assert result["panoptic_seg"][1] == []
        assert result["sem_seg"].sum() > 0


@pytest.mark.parametrize("kind", [{}, MASK2FORMER], ids=["detr", "mask2former"])
def test_only_masks_of_kept_queries_are_enlarged(kind, monkeypatch):
    model, enlarged = tiny_model(**kind).eval(), []
    resize, select = masks._resize, panoptic_detr.select_queries

    def watched_resize(maps, size):
        enlarged.append(len(maps))
        return resize(maps, size)

    def select_two(*args):
        """Of 6 queries, one is a segment and another one an instance."""
        _, detections = select(*args)
        segments = torch.arange(6)[None] == 1
        return ChosenQueries(segments, detections._replace(valid=detections.query == 4))

    monkeypatch.setattr(masks, "_resize", watched_resize)
    monkeypatch.setattr(panoptic_detr, "select_queries", select_two)
    (result,) = model(random_inputs([(48, 64)]))
    assert set(enlarged) == {2}
    assert len(result["instances"]) > 0


def test_inputs_are_not_touched():
    inputs = random_inputs(SIZES)
    before = copy.deepcopy(inputs)
    model = tiny_model(**BLOCK)
    model.train()(inputs), model.eval()(inputs)
    for a, b in zip(inputs, before, strict=True):
        assert torch.equal(a["image"], b["image"])
        assert torch.equal(a["segment_map"], b["segment_map"])
        assert torch.equal(a["instances"].gt_boxes.tensor, b["instances"].gt_boxes.tensor)


def test_nan_in_the_network_names_the_images():
    model = tiny_model(**BLOCK).train()
    with torch.no_grad():
        model.box_head.class_embed.weight.fill_(float("nan"))
    with pytest.raises(NonFiniteError, match=r"\(terms: class\) for images image_0.png, image_1"):
        model(random_inputs([(48, 64), (40, 40)]))


def test_nan_in_evaluation_names_the_images():
    model = tiny_model().eval()
    inputs = random_inputs([(48, 64), (48, 64)])
    inputs[1]["image"] = inputs[1]["image"].float() * float("nan")
    with pytest.raises(NonFiniteError, match=r"the class scores of image_1\.png are not finite"):
        model(inputs)


@pytest.mark.parametrize("entry", [0, 2])  # in the second stream, entry 2 is image 0 again
def test_a_matching_cost_names_its_images_and_terms(entry):
    model = tiny_model(**BLOCK).train()
    images = random_inputs([(48, 64), (40, 40)], [2, 3])
    predict = model.predict

    def poisoned(*args):
        out = predict(*args)
        logits = out.logits.clone()
        logits[:, entry] = float("nan")
        return replace(out, logits=logits)

    model.predict = poisoned
    with pytest.raises(NonFiniteError, match=r"\(terms: class\) for images image_0.png$"):
        model(images)


def test_finite_terms_with_an_infinite_sum_are_called_a_sum():
    class Huge:
        name, weight, needs = "huge", 1.0, frozenset()

        def __call__(self, predictions, targets):
            shape = (*predictions.logits.shape[:3], max(targets.counts))
            return torch.full(shape, 3e38)

    model = tiny_model().train()
    model.matcher = HungarianMatcher([Huge(), Huge()])
    with pytest.raises(NonFiniteError, match=r"\(terms: their sum\)"):
        model(random_inputs([(48, 64)]))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"MODEL__DETR__TRANSFORMER_NAME": "detrr"}, "'detrr'; known: .*detr"),
        ({"MODEL__DETR__IN_FEATURE": "res6"}, "'res6', but the backbone returns res2"),
        (
            {**MASK2FORMER, "MODEL__MASK2FORMER__IN_FEATURES": ["res2", "res7"]},
            r"MASK2FORMER\.IN_FEATURES is .*'res7'.*returns res2",
        ),
        (
            {**MASK2FORMER, "MODEL__MASK2FORMER__IN_FEATURES": ["res2"]},
            r"name at least two maps",
        ),
        ({"MODEL__BATCHFORMER__INSERT_LAYERS": [2], **BLOCK}, r"\[2\].*from 0 to 1"),
        (
            {"MODEL__BATCHFORMER__ATTEND": "all", **BLOCK},
            "ATTEND is 'all'; known: batch, self, none",
        ),
    ],
)
def test_wrong_names_in_the_config_are_explained(overrides, message):
    from detectron2.layers import ShapeSpec

    shapes = {f"res{i}": ShapeSpec(channels=8, stride=2**i) for i in range(2, 6)}
    with pytest.raises(UserError, match=message):
        build_transformer(tiny_cfg(**overrides), shapes)


@pytest.mark.parametrize("overrides", [PLAIN, BLOCK])
def test_overfits_two_images(overrides):
    model = tiny_model(**overrides, MODEL__PANOPTIC__SCORE_THRESHOLD_TEST=0.5)
    inputs = random_inputs([(48, 48), (48, 48)], [2, 3])
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.0)
    model.train()
    first = None
    for _ in range(200):
        loss = total(model(inputs))
        first = first or loss.item()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    assert loss.item() < 0.35 * first
    hits = 0
    for x, result in zip(inputs, model.eval()(inputs), strict=True):
        segment_map, segments = result["panoptic_seg"]
        for k, label in enumerate(x["instances"].gt_classes.tolist()):
            truth = x["segment_map"] == k
            for s in segments:
                mask = segment_map == s["id"]
                iou = (mask & truth).sum() / (mask | truth).sum()
                hits += int(s["category_id"] == label and iou > 0.5)
    assert hits >= 3  # of 5, the least of four seeds; stuff of one class may be one segment


def test_semantic_head_helps_training_and_is_absent_from_evaluation():
    with_head = tiny_model(**BLOCK, MODEL__SEMANTIC_AUX__ENABLED=True)
    without = tiny_model(**BLOCK)
    state = with_head.state_dict()
    without.load_state_dict({k: v for k, v in state.items() if "semantic_head" not in k})
    inputs = random_inputs(SIZES)
    assert_same_results(with_head.eval()(inputs), without.eval()(inputs), rtol=0, atol=0)

    losses = with_head.train()(inputs)
    assert "loss_semantic" in losses
    total(losses).backward()
    for name, parameter in with_head.semantic_head.named_parameters():
        assert parameter.grad.abs().amax() > 0, name


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({**MASK2FORMER, "MODEL__MASK_ON": False}, r"mask2former predicts no boxes: set .*MASK_ON"),
        ({"MODEL__MASK_HEAD__NAME": "query_mask_head"}, r"TRANSFORMER_NAME detr does not return"),
        (
            {**MASK2FORMER, "MODEL__MASK_HEAD__NAME": "detr_mask_head"},
            r"'point_mask_cost', but this model predicts no mask embeddings.*MASK_HEAD\.NAME",
        ),
        (
            {**MASK2FORMER, "MODEL__DETR__COSTS": ["class_cost", "box_l1_cost"]},
            r"'box_l1_cost', but this model predicts no boxes",
        ),
        ({"MODEL__DETR__LOSSES": []}, r"LOSSES is \[\] with MODEL\.MASK_ON True: no loss is left"),
        (
            {"MODEL__DETR__LOSSES": ["mask_loss"], "MODEL__MASK_ON": False},
            r"LOSSES is \['mask_loss'\] with MODEL\.MASK_ON False: no loss is left",
        ),
        (
            {**MASK2FORMER, "MODEL__DETR__LOSSES": ["mask_loss", "point_mask_loss"]},
            r"LOSSES is .*two loss terms are called 'loss_mask'; remove one",
        ),
        ({**MASK2FORMER, "MODEL__MASK_HEAD__FREEZE_DETR": True}, r"no weights: set it to False"),
        ({**MASK2FORMER, "MODEL__MASK2FORMER__NUM_POINTS": 0}, "NUM_POINTS is 0; .*at least 1"),
        ({**MASK2FORMER, "MODEL__MASK2FORMER__OVERSAMPLE_RATIO": 0.5}, "RATIO is 0.5; .*least 1"),
        (
            {**MASK2FORMER, "MODEL__MASK2FORMER__IMPORTANCE_SAMPLE_RATIO": 1.5},
            "IMPORTANCE_SAMPLE_RATIO is 1.5; it must be from 0 to 1",
        ),
        ({"MODEL__PANOPTIC__INSTANCE_SCORING_TEST": "coco"}, r"'coco'; known: detr, mask2former"),
        (
            {"MODEL__PANOPTIC__INSTANCE_SCORING_TEST": "mask2former", "MODEL__MASK_ON": False},
            r"is False, .*set MODEL\.PANOPTIC\.INSTANCE_SCORING_TEST detr, or MODEL\.MASK_ON True",
        ),
    ],
)
def test_settings_that_contradict_each_other_are_explained(overrides, message):
    with pytest.raises(UserError, match=message):
        tiny_model(**overrides)


def test_all_settings_that_need_masks_are_named_at_once():
    settings = {
        "MODEL__SEMANTIC_AUX__ENABLED": True,
        "MODEL__PANOPTIC__SEMANTIC_TEST": True,
        "MODEL__MASK_HEAD__FREEZE_DETR": True,
    }
    with pytest.raises(UserError, match="MASK_ON is False") as error:
        tiny_model(**settings, MODEL__MASK_ON=False)
    words = re.search("set (.*), or MODEL.MASK_ON True", str(error.value))[1].split()
    assert words[1::2] == ["False"] * 3
    changes = {key.replace(".", "__"): False for key in words[::2]}
    assert changes.keys() == settings.keys()
    assert tiny_model(**changes, MODEL__MASK_ON=False).mask_head is None
