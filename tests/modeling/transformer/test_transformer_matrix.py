"""Every transformer, for boxes and panoptic, with and without the block, through one contract."""

import itertools

import pytest
import torch

from batchformer_panoptic.modeling.transformer import TRANSFORMER_REGISTRY
from helpers.commands import load_script
from helpers.tiny_model import MASK2FORMER, random_inputs, tiny_model, total

SIZES = [(48, 64), (64, 56), (40, 40)]
SCORING = {"detr": "softmax", "mask2former": "softmax"}  # the others publish a focal loss
TRANSFORMERS = sorted(name for name, _ in TRANSFORMER_REGISTRY)
TASKS = {"boxes": False, "panoptic": True}
PAIRS = [
    (name, task)
    for name, task in itertools.product(TRANSFORMERS, TASKS)
    if (name, task) != ("mask2former", "boxes")  # it predicts none
]
each_case = pytest.mark.parametrize(
    ("name", "task", "block"),
    [(*pair, block) for pair, block in itertools.product(PAIRS, [False, True])],
    ids=lambda value: {False: "plain", True: "batchformer"}.get(value, value),
)
each_pair = pytest.mark.parametrize(("name", "task"), PAIRS)


def make_model(name: str, task: str, block: bool):
    overrides = {
        "MODEL__DETR__TRANSFORMER_NAME": name,
        "MODEL__DETR__SCORING": SCORING.get(name, "focal"),
        "MODEL__MASK_ON": TASKS[task],
        # One transformer needs strides that double; another, at width 32, no level of one cell.
        "MODEL__SMALL_RESNET__STAGE_STRIDES": [1, 2, 2, 2 if name == "smca_multiscale" else 1],
        "MODEL__BATCHFORMER__ENABLED": block,
    }
    return tiny_model(**overrides | (MASK2FORMER if name == "mask2former" else {}))


def flatten(results):
    """All fields of the results, as (name, tensor)."""
    for result in results:
        fields = result["instances"].get_fields()
        yield "boxes", fields["pred_boxes"].tensor
        yield from ((key, fields[key]) for key in ("scores", "pred_classes"))
        if "panoptic_seg" in result:
            yield "map", result["panoptic_seg"][0]


def test_the_four_systems_are_there():
    assert {"detr", "deformable", "conditional", "smca"} <= set(TRANSFORMERS)


@each_case
def test_training_step(name, task, block):
    model = make_model(name, task, block).train()
    losses = model(random_inputs(SIZES))
    streams = {key.partition("/")[2] for key in losses}
    assert streams == ({"original", "batchformer"} if block else {""})
    assert any(key.startswith("loss_mask") for key in losses) == TASKS[task]
    total(losses).backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None, key
        assert torch.isfinite(parameter.grad).all(), key
    assert any(p.grad.abs().sum() > 0 for k, p in model.named_parameters() if "backbone" in k)


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_training_step_in_mixed_precision(name):
    model = make_model(name, "panoptic", block=True).train()
    inputs = random_inputs(SIZES)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        images = model.preprocess(inputs)
        output = model.predict(model.backbone(images.tensor), images.image_sizes, (64, 64))
        torch.manual_seed(1)  # of sampled points
        losses = model(inputs)
    references = output.transformer.reference_points
    assert (output.boxes is None) == (name == "mask2former")
    assert output.boxes is None or output.boxes.dtype == torch.float32
    assert references is None or references.dtype == torch.float32
    torch.manual_seed(1)
    expected = total(model(inputs))
    torch.testing.assert_close(total(losses), expected, rtol=0.01, atol=0)
    total(losses).backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None, key
        assert torch.isfinite(parameter.grad).all(), key


@each_case
def test_results_do_not_depend_on_the_batch(name, task, block):
    model = make_model(name, task, block).eval()
    inputs = random_inputs(SIZES)
    single = [model([entry])[0] for entry in inputs]
    for (key, one), (_, batched) in zip(flatten(single), flatten(model(inputs)), strict=True):
        torch.testing.assert_close(batched, one, atol=1e-4, rtol=1e-4, msg=key)


@each_pair
def test_padded_predictions_do_not_depend_on_batch_mates(name, task):
    """From backbone features on, the predictions of an image do not depend on its padding."""
    if name == "mask2former":
        pytest.skip("it has no padding mask, as published")
    model = make_model(name, task, block=False).eval()
    features = {
        name: torch.randn(2, shape.channels, 64 // shape.stride, 64 // shape.stride)
        for name, shape in model.backbone.output_shape().items()
    }
    with torch.no_grad():
        first = model.predict(features, [(32, 64), (64, 64)], (64, 64))
        for maps in features.values():
            maps[1] = torch.randn_like(maps[1])
            maps[0, :, maps.shape[2] // 2 :] += 100  # below row 32: padding
        second = model.predict(features, [(32, 64), (64, 64)], (64, 64))
    torch.testing.assert_close(second.logits[:, 0], first.logits[:, 0], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(second.boxes[:, 0], first.boxes[:, 0], atol=1e-4, rtol=1e-4)


@each_pair
def test_without_the_block_the_same_weights_evaluate_identically(name, task):
    with_block, plain = (make_model(name, task, block) for block in (True, False))
    state = with_block.state_dict()
    plain.load_state_dict({k: v for k, v in state.items() if "batchformer" not in k})
    inputs = random_inputs(SIZES)
    results = [flatten(model.eval()(inputs)) for model in (with_block, plain)]
    for (key, one), (_, other) in zip(*results, strict=True):
        assert torch.equal(one, other), key


@pytest.mark.parametrize(
    ("name", "bias"),
    [("conditional", [0.0] * 4), ("deformable", [0.0, 0.0, -2.0, -2.0])],
)
def test_boxes_start_at_their_reference_points(name, bias):
    model = tiny_model(MODEL__DETR__TRANSFORMER_NAME=name, MODEL__DETR__SCORING="focal")
    last = model.box_head.bbox_embed.layers[-1]
    assert not last.weight.any()
    assert torch.equal(last.bias, torch.tensor(bias))


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_operations_are_counted_and_the_block_costs_none_of_them(name):
    """Counting traces the model, which turns sizes into tensors."""
    flop_analysis = load_script("tools/analyze_model.py").flop_analysis
    plain, with_block = (
        flop_analysis(make_model(name, "panoptic", block).eval(), random_inputs([(64, 64)])).total()
        for block in (False, True)
    )
    assert plain == with_block > 0
