"""BatchFormerV2 in a vision Transformer: the recorded numbers of the public fork of DeiT.

``paper_two_stream_*`` are two streams, as the paper and this project have them. ``main_add_bt_*``
are what the published command line reaches: there the block is the same, but ONE stream goes on.
Their rules are written out in :func:`published_tokens`, with this project's block in them.
"""

import pytest
import torch
from torch.nn import functional as F

from batchformer_panoptic.batchformer import BatchFormerHook, BatchFormerV2, StreamState
from batchformer_panoptic.batchformer.batchformer import TWO_STREAMS
from helpers.defects import attend_over_tokens, swap_streams
from helpers.golden_compare import GRADIENTS, LOSSES, OUTPUTS, assert_near
from helpers.golden_deit import (
    MODEL,
    batch_of,
    blocks_left_out,
    classifier,
    name_in_model,
    timm_model,
    total,
)
from helpers.golden_files import load_golden

pytest.importorskip("timm")

SLACK = 20.0  # a defect is seen through tolerances this much wider

GOLDEN = load_golden("batchformer_deit.pt")
VARIANTS = GOLDEN["variants"]
TWO_STREAM = [name for name in VARIANTS if name.startswith("paper_two_stream")]
PUBLISHED = [name for name in VARIANTS if name.startswith("main_add_bt")]
LABELS = GOLDEN["inputs"]["labels"]


def insertions(variant):
    return variant["args"].get("insert_idx", [])


def make_model(name):
    return classifier(GOLDEN, insertions(VARIANTS[name]))


def trace_insertions(model):
    """Tokens before and after each insertion, once the model has run."""
    calls, hook = [], model.vit.batchformer
    after_layer = hook.after_layer

    def traced(index, tokens, streams, mask):
        joined, now = after_layer(index, tokens, streams, mask)
        if index in hook.insert_layers:
            calls.append({"in": tokens, "out": joined})
        return joined, now

    hook.after_layer = traced
    return calls


def assert_layer_io(calls, recorded):
    assert len(calls) == len(recorded)
    for number, (call, wanted) in enumerate(zip(calls, recorded, strict=True)):
        for side in ("in", "out"):
            assert_near(call[side], wanted[side], OUTPUTS, f"{side} of insertion {number}")


def assert_loss_and_gradients(model, loss, variant, *, slack=1.0):
    assert_near(loss, variant["loss"], slack * LOSSES * variant["loss"], "loss")
    loss.backward()
    parameters = dict(model.named_parameters())
    left_out = [blocks_left_out(n, insertions(variant)) for n in variant["params_without_grad"]]
    without = {name for name, p in parameters.items() if p.grad is None}
    assert without == {name_in_model(name) for name in left_out}
    assert variant["grads"]
    for name, gradient in variant["grads"].items():
        ours = parameters[name_in_model(blocks_left_out(name, insertions(variant)))].grad
        tolerance = slack * GRADIENTS * gradient.abs().max().item()
        assert_near(ours, gradient, tolerance, f"gradient of {name}")


def assert_training_step(name, *, slack=1.0):
    model, variant = make_model(name), VARIANTS[name]
    logits, streams = model.vit(model.preprocess(batch_of(GOLDEN)))
    assert streams.num_streams * GOLDEN["config"]["batch"] == variant["train_batch"]
    assert_near(logits, variant["train_logits"], slack * OUTPUTS, "train_logits")
    assert_loss_and_gradients(model, total(model(batch_of(GOLDEN))), variant, slack=slack)


def eval_logits(model):
    return torch.stack([result["class_logits"] for result in model.eval()(batch_of(GOLDEN))])


@pytest.mark.parametrize("name", ["plain", *TWO_STREAM])
def test_training_step(name):
    assert_training_step(name)


@pytest.mark.parametrize("name", TWO_STREAM)
def test_tokens_before_and_after_each_insertion(name):
    model = make_model(name)
    calls = trace_insertions(model)
    model(batch_of(GOLDEN))
    assert_layer_io(calls, VARIANTS[name]["layer_io"])


@pytest.mark.parametrize("name", TWO_STREAM)
def test_the_original_stream_is_the_plain_model(name):
    model = make_model(name)
    logits, streams = model.vit(model.preprocess(batch_of(GOLDEN)))
    original, other = streams.split(logits)
    assert_near(original, VARIANTS["plain"]["train_logits"], OUTPUTS, "the original stream")
    assert (original - other).abs().max() > 100 * OUTPUTS
    assert VARIANTS[name]["first_half_equals_plain_max_abs"] <= OUTPUTS


@pytest.mark.parametrize("name", ["plain", *TWO_STREAM])
def test_evaluation_is_timms_own_model(name):
    logits = eval_logits(make_model(name))
    with torch.no_grad():
        plain = timm_model(GOLDEN).eval()(GOLDEN["inputs"]["images"].float())
    assert torch.equal(logits, plain)
    assert_near(logits, VARIANTS[name]["eval_logits"], OUTPUTS, "eval_logits")


@pytest.mark.parametrize("name", ["plain", *TWO_STREAM])
def test_names_of_parameters(name):
    ours = {n for n, _ in make_model(name).named_parameters()}
    block = {name_in_model(n) for n in VARIANTS[name]["bt_parameter_names"]}
    assert ours == {MODEL + n for n in GOLDEN["state_dict_vit"]} | block


# --- what the published command line does --------------------------------------------------------


def published_tokens(mode, block, tokens, *, is_first):
    """The rules of the public code's ``add_bt`` (B images in, no second stream).

    2: the first insertion REPLACES the batch by the block's output; later ones send the second
       half of the batch through the block, as if it were the second stream.
    3: the second half of the batch goes through the block, the first half does not.
    1: behind the final norm, and only the second half comes back.
    """
    if mode == 2 and is_first:
        return block(tokens)
    kept, changed = tokens[: len(tokens) // 2], block(tokens[-len(tokens) // 2 :])
    return changed if mode == 1 else torch.cat([kept, changed])


def run_published(model, variant, *, evaluate=False):
    """Logits, and tokens before and after each insertion, by those rules with our block."""
    vit, args = model.vit.model, variant["args"]
    block, calls = next(iter(model.vit.batchformer.blocks.values())), []

    def insert(tokens):
        if evaluate:  # eval_global 1: over the images of the test batch
            return block(tokens) if args.get("eval_global") else tokens
        out = published_tokens(args["add_bt"], block, tokens, is_first=not calls)
        calls.append({"in": tokens, "out": out})
        return out

    tokens = vit._pos_embed(vit.patch_embed(GOLDEN["inputs"]["images"].float()))
    for index, layer in enumerate(vit.blocks):
        tokens = layer(tokens)
        if index in args.get("insert_idx", []):
            tokens = insert(tokens)
    tokens = vit.norm(tokens)
    return vit.forward_head(insert(tokens) if args["add_bt"] == 1 else tokens), calls


def published_model(variant):
    return classifier(GOLDEN, insertions(variant) or [0])


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_published_command_line_has_our_block_in_one_stream(name):
    variant = VARIANTS[name]
    model = published_model(variant)
    logits, calls = run_published(model, variant)
    assert_near(logits, variant["train_logits"], OUTPUTS, "train_logits")
    assert_layer_io(calls, variant["layer_io"])
    assert len(logits) == variant["train_batch"] <= GOLDEN["config"]["batch"]
    if variant["loss"] is None:  # more targets than predictions
        assert len(logits) < len(LABELS)
        return
    loss = F.cross_entropy(logits, LABELS, label_smoothing=GOLDEN["config"]["label_smoothing"])
    assert_loss_and_gradients(model, loss, variant)


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_published_command_line_evaluates_plainly_unless_told(name):
    variant = VARIANTS[name]
    logits, _ = run_published(published_model(variant).eval(), variant, evaluate=True)
    assert_near(logits, variant["eval_logits"], OUTPUTS, "eval_logits")
    is_plain = variant["eval_equals_plain_max_abs"] == 0.0
    assert is_plain == (not variant["args"].get("eval_global"))


# --- deliberate defects --------------------------------------------------------------------------


def labels_of_another_order(expand):
    return lambda self, x: expand(self, x).flip(0) if self.num_streams > 1 else x


def one_layer_later(after_layer):
    return lambda self, index, *rest: after_layer(self, index - 1, *rest)


def replace_the_batch(after_layer):
    def replace(self, index, tokens, streams, mask):
        joined, now = after_layer(self, index, tokens, streams, mask)
        if now == streams:
            return joined, now
        other = now.split(joined)[1]
        return TWO_STREAMS.join([other, other]), now

    return replace


@pytest.mark.parametrize(
    ("owner", "name", "defect", "complaint"),
    [
        (BatchFormerV2, "forward", attend_over_tokens, "train_logits"),
        (StreamState, "join", swap_streams, "train_logits"),
        (StreamState, "expand", labels_of_another_order, "loss"),
        (BatchFormerHook, "after_layer", one_layer_later, "train_logits"),
        (BatchFormerHook, "after_layer", replace_the_batch, "train_logits"),
    ],
)
def test_defects_are_seen(owner, name, defect, complaint, monkeypatch):
    assert_training_step(TWO_STREAM[0])
    monkeypatch.setattr(owner, name, defect(getattr(owner, name)))
    with pytest.raises(AssertionError, match=f"{complaint} is not as recorded"):
        assert_training_step(TWO_STREAM[0], slack=SLACK)
