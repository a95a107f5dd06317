import copy
import warnings
from typing import NamedTuple

import pytest
import torch

from batchformer_panoptic.batchformer import BatchFormerHook, IdentityHook, encode
from batchformer_panoptic.batchformer.batchformer import SINGLE, TWO_STREAMS


def make_hook(**kwargs) -> BatchFormerHook:
    return BatchFormerHook(16, dropout=0.0, **kwargs)


def run(hook, tokens, num_layers=3, mask=None):
    """The encoder loop over layers that change nothing."""
    layers = [lambda tokens: tokens] * num_layers
    encoded, streams, _ = encode(layers, hook, tokens, key_padding_mask=mask)
    return encoded, streams


def test_first_insertion_keeps_the_batch_and_adds_the_block_output():
    hook, tokens = make_hook(insert_layers=[1]), torch.randn(3, 4, 16)
    out, streams = run(hook, tokens)
    assert streams == TWO_STREAMS
    original, batchformer = streams.split(out)
    assert torch.equal(original, tokens)
    assert torch.equal(batchformer, hook.blocks["1"](tokens))


def test_later_insertions_change_the_second_stream_only():
    hook, tokens = make_hook(insert_layers=[0, 2]), torch.randn(3, 4, 16)
    original, batchformer = TWO_STREAMS.split(run(hook, tokens)[0])
    assert torch.equal(original, tokens)
    torch.testing.assert_close(batchformer, hook.blocks["2"](hook.blocks["0"](tokens)))


def test_shared_block_is_one_module():
    hook, tokens = make_hook(insert_layers=[0, 2], shared=True), torch.randn(3, 4, 16)
    assert list(hook.blocks) == ["shared"]
    block = hook.blocks["shared"]
    _, batchformer = TWO_STREAMS.split(run(hook, tokens)[0])
    torch.testing.assert_close(batchformer, block(block(tokens)))


def test_nothing_happens_in_evaluation():
    hook, tokens = make_hook().eval(), torch.randn(3, 4, 16)
    out, streams = run(hook, tokens)
    assert out is tokens
    assert streams == SINGLE


def test_identity_hook_has_no_state():
    tokens = torch.randn(2, 3, 16)
    out, streams = run(IdentityHook(), tokens)
    assert out is tokens
    assert streams == SINGLE
    assert not IdentityHook().state_dict()


@pytest.mark.parametrize("mask_padding", [False, True])
def test_padding_takes_part_unless_masked(mask_padding):
    hook = make_hook(insert_layers=[0, 1], mask_padding=mask_padding)
    tokens, mask = torch.randn(2, 4, 16), torch.zeros(2, 4, dtype=torch.bool)
    mask[0, 2:] = True
    changed = tokens.clone()
    changed[0, 2:] += 1.0
    before, after = (TWO_STREAMS.split(run(hook, t, mask=mask)[0])[1] for t in (tokens, changed))
    unaffected = torch.allclose(before[1], after[1])
    assert unaffected == mask_padding


def test_a_single_image_is_warned_about():
    with pytest.warns(UserWarning, match="batch of one image"):
        run(make_hook(), torch.randn(1, 4, 16))


def test_attending_to_itself_needs_no_batch_and_ignores_neighbours():
    hook, tokens = make_hook(attend="self"), torch.randn(3, 4, 16)
    _, together = TWO_STREAMS.split(run(hook, tokens)[0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        one_by_one = [TWO_STREAMS.split(run(hook, tokens[i : i + 1])[0])[1] for i in range(3)]
    torch.testing.assert_close(torch.cat(one_by_one), together)


def test_the_second_stream_opens_every_so_many_steps():
    hook, tokens = make_hook(insert_layers=[0, 2], every=3), torch.randn(2, 4, 16)
    numbers = []
    for hook.step in range(7):
        out, streams = run(hook, tokens)
        numbers.append(streams.num_streams)
        assert streams == TWO_STREAMS or out is tokens
    assert numbers == [2, 1, 1, 2, 1, 1, 2]


def test_published_hook_opens_the_second_stream_in_every_step():
    hook = make_hook()
    assert (hook.attend, hook.every) == ("batch", 1)
    hook.step = 5
    assert run(hook, torch.randn(2, 4, 16))[1] == TWO_STREAMS


def test_refuses_no_steps():
    with pytest.raises(ValueError, match="every must be at least 1 step, not 0"):
        make_hook(every=0)


@pytest.mark.parametrize("attend", ["self", "none"])
def test_refuses_other_processes_without_attention_to_other_images(attend):
    with pytest.raises(ValueError, match=f"sync has no effect with attend='{attend}'"):
        make_hook(attend=attend, sync=True)


def test_sync_in_one_process_is_the_plain_hook():
    plain, synced, tokens = make_hook(), make_hook(sync=True), torch.randn(3, 4, 16)
    synced.load_state_dict(plain.state_dict())
    assert torch.equal(run(synced, tokens)[0], run(plain, tokens)[0])
    with pytest.warns(UserWarning, match="batch of one image"):
        run(synced, tokens[:1])


@pytest.mark.parametrize("layers", [[], [-1], [0, 0]])
def test_refuses_meaningless_layers(layers):
    with pytest.raises(ValueError, match="insert_layers"):
        make_hook(insert_layers=layers)


@pytest.mark.parametrize("attend", ["batch", "self"])
def test_every_parameter_gets_a_gradient_and_copies_are_independent(attend):
    hook = make_hook(insert_layers=[0, 1], attend=attend)
    twin = copy.deepcopy(hook)
    run(hook, torch.randn(3, 4, 16))[0].square().sum().backward()
    for name, parameter in hook.named_parameters():
        assert parameter.grad is not None, name
    assert all(parameter.grad is None for parameter in twin.parameters())


class Place(NamedTuple):
    """A nested argument of a layer, as the levels of Deformable-DETR."""

    sizes: tuple[int, ...]
    pos: torch.Tensor
    mask: torch.Tensor | None


@pytest.mark.parametrize("layers", [[0], [1], [0, 1]])
def test_the_loop_expands_per_image_arguments_when_the_streams_part(layers):
    hook = make_hook(insert_layers=layers)
    tokens, pos = torch.randn(3, 4, 16), torch.randn(3, 4, 16)
    calls = []

    def layer(tokens, pos, place):
        calls.append((len(tokens), pos, place))
        return tokens + pos

    out, streams, (out_pos, place) = encode([layer] * 3, hook, tokens, pos, Place((7,), pos, None))
    assert streams == TWO_STREAMS
    assert [len_tokens for len_tokens, *_ in calls] == [3, 6 if layers[0] == 0 else 3, 6]
    for num_tokens, seen, nested in calls:
        assert isinstance(nested, Place)
        assert nested.sizes == (7,)
        assert nested.mask is None
        assert torch.equal(seen, torch.cat([pos] * (num_tokens // 3)))
        assert torch.equal(nested.pos, seen)
    assert torch.equal(out_pos, torch.cat([pos, pos]))
    assert torch.equal(place.pos, out_pos)
    assert torch.equal(streams.split(out)[0], tokens + pos + pos + pos)


def test_the_loop_of_one_stream_passes_its_arguments_on():
    pos = torch.randn(2, 3, 16)
    _, streams, (passed,) = encode(
        [lambda tokens, pos: tokens + pos], IdentityHook(), torch.zeros(2, 3, 16), pos
    )
    assert streams == SINGLE
    assert passed is pos
