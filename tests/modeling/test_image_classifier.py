"""The meta-architecture of image classification: losses of both streams, and plain evaluation."""

import copy

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from batchformer_panoptic.batchformer.batchformer import SINGLE
from batchformer_panoptic.engine.train_loop import seed_iteration
from batchformer_panoptic.errors import UserError
from helpers.tiny_classifier import NUM_CLASSES, labelled_images, tiny_classifier
from helpers.tiny_model import total

BLOCK = {"MODEL__BATCHFORMER__ENABLED": True}
MIXING = {"MODEL__CLASSIFIER__MIXUP_ALPHA": 0.8, "MODEL__CLASSIFIER__CUTMIX_ALPHA": 1.0}


def logits_of(model, inputs):
    return torch.stack([result["class_logits"] for result in model.eval()(inputs)])


@pytest.mark.parametrize("mixing", [{}, MIXING], ids=["labels", "mixed"])
def test_two_streams_train_block_and_trunk(mixing):
    model = tiny_classifier(**BLOCK, **mixing)
    losses = model(labelled_images(4))
    assert list(losses) == ["loss_class/original", "loss_class/batchformer"]
    total(losses).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
    moved = [n for n, p in model.named_parameters() if p.grad.abs().max() > 0]
    assert any("batchformer" in name for name in moved)
    assert "vit.model.patch_embed.proj.weight" in moved


def test_one_stream_without_block():
    losses = tiny_classifier()(labelled_images(4))
    assert list(losses) == ["loss_class"]
    assert losses["loss_class"].shape == ()


def test_losses_are_the_mean_over_both_streams():
    model, inputs = tiny_classifier(**BLOCK), labelled_images(4)
    logits, streams = model.vit(model.preprocess(inputs))
    labels = torch.tensor([x["label"] for x in inputs]).repeat(2)
    smoothed = F.one_hot(labels, NUM_CLASSES) * 0.9 + 0.1 / NUM_CLASSES
    each = -(smoothed * logits.log_softmax(-1)).sum(-1)
    losses = model(inputs)
    torch.testing.assert_close(total(losses), each.mean())
    torch.testing.assert_close(losses["loss_class/original"], each[:4].sum() / 8)
    plain = tiny_classifier()
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if "batchformer" not in k})
    torch.testing.assert_close(2 * losses["loss_class/original"], plain(inputs)["loss_class"])
    assert streams.num_streams == 2


def test_loss_equals_timms():
    loss = pytest.importorskip("timm.loss")
    model = tiny_classifier(MODEL__CLASSIFIER__LABEL_SMOOTHING=0.2)
    logits, streams = model.vit(model.preprocess(labelled_images(4)))
    labels = torch.tensor([0, 4, 2, 2])
    ours = total(model.losses(logits, streams, labels))
    torch.testing.assert_close(ours, loss.LabelSmoothingCrossEntropy(0.2)(logits, labels))
    # timm smooths the labels it mixes.
    mixup = pytest.importorskip("timm.data").Mixup
    arguments = {"mixup_alpha": 0.8, "num_classes": NUM_CLASSES}
    np.random.seed(5)
    _, smoothed = mixup(label_smoothing=0.2, **arguments)(torch.zeros(4, 3, 2, 2), labels)
    np.random.seed(5)
    _, mixed = mixup(label_smoothing=0.0, **arguments)(torch.zeros(4, 3, 2, 2), labels)
    ours = total(model.losses(logits, streams, mixed))
    torch.testing.assert_close(ours, loss.SoftTargetCrossEntropy()(logits, smoothed))


def test_evaluation_is_the_plain_timm_model():
    model, inputs = tiny_classifier(**BLOCK), labelled_images(3)
    images = torch.stack([x["image"] for x in inputs]).sub(128.0).div(64.0)
    with torch.no_grad():
        plain = model.vit.model.eval()(images)
    logits = logits_of(model, inputs)
    assert torch.equal(logits, plain)
    assert logits.dtype == torch.float32
    assert not logits.requires_grad


def test_results_do_not_depend_on_batch_mates():
    model, inputs = tiny_classifier(**BLOCK).eval(), labelled_images(3)
    single = torch.cat([logits_of(model, [one]) for one in inputs])
    torch.testing.assert_close(logits_of(model, inputs), single, atol=1e-5, rtol=0)


def test_the_original_stream_ignores_its_neighbours():
    model, inputs = tiny_classifier(**BLOCK), labelled_images(4)
    others = [inputs[0], *labelled_images(4, seed=1)[1:]]
    images, changed = model.preprocess(inputs), model.preprocess(others)
    (first, second), (first_now, second_now) = (
        model.vit(batch)[0].tensor_split(2) for batch in (images, changed)
    )
    torch.testing.assert_close(first[0], first_now[0], atol=1e-5, rtol=0)
    assert (second[0] - second_now[0]).abs().max() > 1e-3


def test_names_in_the_state_dict():
    timm = pytest.importorskip("timm")
    model = tiny_classifier(**BLOCK)
    names = {n.removeprefix("vit.model.") for n in model.state_dict() if n.startswith("vit.model")}
    assert names == timm.create_model("vit_tiny_patch16_224", depth=4).state_dict().keys()
    rest = [n for n in model.state_dict() if not n.startswith("vit.model.")]
    assert rest
    assert all(name.startswith("vit.batchformer.blocks.2.") for name in rest)


@pytest.mark.parametrize("mixing", [{}, MIXING], ids=["labels", "mixed"])
def test_an_iteration_is_determined_by_its_seed(mixing):
    drop = {"MODEL__CLASSIFIER__DROP_PATH": 0.3, "MODEL__BATCHFORMER__DROPOUT": 0.5}
    model, inputs = tiny_classifier(**BLOCK, **mixing, **drop), labelled_images(4)

    def losses(iteration):
        seed_iteration(7, iteration, 0)
        return total(model(inputs))

    first, second = losses(0), losses(1)
    assert torch.equal(losses(0), first)
    assert torch.equal(losses(1), second)
    assert not torch.equal(first, second)


def test_activation_checkpointing_changes_nothing():
    drop = {"MODEL__CLASSIFIER__DROP_PATH": 0.3, "MODEL__BATCHFORMER__DROPOUT": 0.5}
    gradients, calls = [], []
    for parts in ([], ["encoder"]):
        model = tiny_classifier(**BLOCK, **drop, MODEL__ACTIVATION_CHECKPOINTING=parts)
        count = []
        model.vit.model.blocks[1].norm1.register_forward_hook(
            lambda module, inputs, output, count=count: count.append(1)
        )
        seed_iteration(7, 0, 0)
        total(model(labelled_images(4))).backward()
        gradients.append([p.grad for p in model.parameters()])
        calls.append(len(count))
    assert calls == [1, 2]
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    assert len(logits_of(model, labelled_images(2))) == 2


def test_inputs_are_unchanged():
    model, inputs = tiny_classifier(**BLOCK, **MIXING), labelled_images(4)
    before = copy.deepcopy(inputs)
    model(inputs)
    assert all(torch.equal(a["image"], b["image"]) for a, b in zip(inputs, before, strict=True))
    assert [x["label"] for x in inputs] == [x["label"] for x in before]


def test_floating_point_images_are_taken_as_they_are():
    model, inputs = tiny_classifier(), labelled_images(2)
    as_float = [{**x, "image": x["image"].float()} for x in inputs]
    assert torch.equal(logits_of(model, inputs), logits_of(model, as_float))


def test_accuracy_of_the_training_batch_is_that_of_the_original_stream():
    model, inputs = tiny_classifier(**BLOCK), labelled_images(4)
    logits, _ = model.vit(model.preprocess(inputs))
    places = logits[:4].argmax(-1).tolist()
    for i in range(3):
        inputs[i]["label"] = places[i]
    inputs[3]["label"] = (places[3] + 1) % NUM_CLASSES
    metrics = model(inputs).metrics
    assert metrics["top1"].item() == 75.0
    assert not metrics["top1"].requires_grad


def test_mixed_images_have_no_accuracy():
    model = tiny_classifier(**MIXING)
    assert model(labelled_images(4)).metrics == {}


def test_one_image_is_warned_about():
    model = tiny_classifier(**BLOCK)
    with pytest.warns(UserWarning, match="batch of one image"):
        losses = model(labelled_images(1))
    assert total(losses).isfinite()


def test_mixing_refuses_an_odd_batch():
    with pytest.raises(UserError, match="a process has 3 images: use an even number"):
        tiny_classifier(**MIXING)(labelled_images(3))
    tiny_classifier()(labelled_images(3))


def test_a_copy_is_independent():
    model = tiny_classifier(**BLOCK, **MIXING)
    twin, inputs = copy.deepcopy(model), labelled_images(4)
    with torch.no_grad():
        twin.vit.model.head.weight.add_(1.0)
    assert not torch.equal(logits_of(model, inputs), logits_of(twin, inputs))
    twin.load_state_dict(model.state_dict())
    assert torch.equal(logits_of(model, inputs), logits_of(twin, inputs))
    total(twin.train()(inputs)).backward()
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("mixing", [{}, MIXING], ids=["labels", "mixed"])
def test_autocast(mixing):
    model, inputs = tiny_classifier(**BLOCK, **mixing), labelled_images(4)
    np.random.seed(0)
    plain = total(model(inputs))
    np.random.seed(0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = model(inputs)
        results = model.eval()(inputs)
    assert all(loss.dtype == torch.float32 for loss in losses.values())
    assert all(result["class_logits"].dtype == torch.float32 for result in results)
    torch.testing.assert_close(total(losses), plain, atol=0.05, rtol=0)
    total(losses).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_losses_are_computed_in_float32():
    logits, labels = torch.randn(4, NUM_CLASSES), torch.tensor([0, 4, 2, 2])
    low = tiny_classifier().losses(logits.bfloat16(), SINGLE, labels)
    wanted = tiny_classifier().losses(logits.bfloat16().float(), SINGLE, labels)
    assert torch.equal(total(low), total(wanted))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image": torch.zeros(3, 16, 20)}, r"image_1\.png is of shape \(3, 16, 20\)"),
        ({"image": torch.zeros(1, 16, 16)}, r"the model takes \(3, 16, 16\).*image_size"),
        ({"label": NUM_CLASSES}, "image_1.png has the label 5, and the model has 5 classes"),
        ({"label": -1}, "has the label -1"),
    ],
)
def test_images_that_do_not_fit_are_named(change, message):
    inputs = labelled_images(2)
    inputs[1].update(change)
    with pytest.raises(UserError, match=message):
        tiny_classifier()(inputs)


@pytest.mark.parametrize("smoothing", [-0.1, 1.0])
def test_label_smoothing_out_of_range(smoothing):
    with pytest.raises(ValueError, match="label_smoothing"):
        tiny_classifier(MODEL__CLASSIFIER__LABEL_SMOOTHING=smoothing)
