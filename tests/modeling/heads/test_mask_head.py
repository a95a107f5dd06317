import pytest
import torch
from torch.nn import functional as F

from batchformer_panoptic.batchformer.batchformer import SINGLE, TWO_STREAMS
from batchformer_panoptic.errors import UserError
from batchformer_panoptic.modeling.heads import MaskHead
from batchformer_panoptic.modeling.transformer import TransformerOutput
from helpers.tiny_model import tiny_model

CHANNELS, HEADS, QUERIES = 32, 4, 5
MAPS = {"res4": 6, "res3": 5, "res2": 4}


def make_head(channels=None) -> MaskHead:
    head = MaskHead(embed_dim=CHANNELS, num_heads=HEADS, in_channels=MAPS, channels=channels)
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return head


def make_inputs(streams=SINGLE, num_images=2):
    batch = num_images * streams.num_streams
    padding = torch.zeros(num_images, 3, 4, dtype=torch.bool)
    padding[-1, :, 3:] = True
    output = TransformerOutput(
        torch.randn(2, batch, QUERIES, CHANNELS),
        None,
        torch.randn(num_images, CHANNELS, 3, 4),
        torch.randn(batch, CHANNELS, 3, 4),
        padding,
        streams,
    )
    sizes = ((3, 4), (6, 7), (12, 14))
    maps = {
        name: torch.randn(num_images, channels, *size)
        for (name, channels), size in zip(MAPS.items(), sizes, strict=True)
    }
    return output, maps


def masks_of(head, output, maps, entries, queries, layer=-1):
    return head(output, maps)(layer, entries, queries)


def slow_mask(head: MaskHead, output: TransformerOutput, maps, entry: int, query: int, layer=-1):
    """The published head for one query: everything concatenated, nothing shared."""
    image = entry % output.projected_map.shape[0]
    q = head.attention.q_linear(output.hidden_states[layer, entry, query]).view(HEADS, -1)
    k = head.attention.k_linear(output.memory_map[entry].permute(1, 2, 0)).unflatten(
        -1, (HEADS, -1)
    )
    scores = torch.einsum("hc,yxhc->hyx", q * (CHANNELS / HEADS) ** -0.5, k)
    scores = scores.masked_fill(output.padding_mask[image], float("-inf"))
    attention = scores.flatten().softmax(0).view_as(scores)
    x = torch.cat([output.projected_map[image], attention])[None]
    for i, (conv, norm) in enumerate(zip(head.convs, head.norms, strict=True)):
        if i >= 2:
            backbone_map = list(maps.values())[i - 2]
            adapted = head.adapters[i - 2](backbone_map[image : image + 1])
            x = adapted + F.interpolate(x, size=adapted.shape[-2:], mode="nearest")
        x = torch.nn.GroupNorm.forward(norm, conv(x)).relu()
    return head.predictor(x)[0, 0]


@pytest.mark.parametrize("streams", [SINGLE, TWO_STREAMS])
@pytest.mark.parametrize("layer", [0, -1])
@pytest.mark.parametrize("channels", [None, [20, 12, 10, 7]])
def test_chosen_queries_equal_the_published_head_one_by_one(streams, channels, layer):
    head = make_head(channels)
    output, maps = make_inputs(streams)
    batch = 2 * streams.num_streams
    entries = torch.tensor([batch - 1, 0, 1, batch // 2, 0])
    queries = torch.tensor([2, 4, 0, 3, 0])
    masks = masks_of(head, output, maps, entries, queries, layer)
    assert masks.shape == (5, 12, 14)
    for mask, entry, query in zip(masks, entries.tolist(), queries.tolist(), strict=True):
        torch.testing.assert_close(mask, slow_mask(head, output, maps, entry, query, layer))


def test_no_queries_give_no_masks_and_zero_gradients_everywhere():
    head = make_head()
    output, maps = make_inputs()
    none = torch.zeros(0, dtype=torch.int64)
    masks = masks_of(head, output, maps, none, none)
    assert masks.shape == (0, 12, 14)
    masks.sum().backward()
    for name, parameter in head.named_parameters():
        assert parameter.grad is not None, name
        assert torch.equal(parameter.grad, torch.zeros_like(parameter)), name


@pytest.mark.parametrize("streams", [SINGLE, TWO_STREAMS])
@pytest.mark.parametrize("num_images", [1, 2])
def test_steps_of_a_few_queries_change_nothing(streams, num_images):
    head = make_head()
    output, maps = make_inputs(streams, num_images)
    batch = num_images * streams.num_streams
    entries = torch.arange(7) % batch
    queries = torch.tensor([2, 4, 0, 3, 0, 1, 1])
    expected = masks_of(head, output, maps, entries, queries)
    weights = torch.randn_like(expected)
    wanted = torch.autograd.grad((expected * weights).sum(), list(head.parameters()))
    calls = []
    head.convs[1].register_forward_pre_hook(lambda _, inputs: calls.append(len(inputs[0])))
    head.max_step_bytes = 3 * bytes_of_a_query(head, maps)
    masks = masks_of(head, output, maps, entries, queries)
    assert calls == [3, 3, 1]
    torch.testing.assert_close(masks, expected)
    found = torch.autograd.grad((masks * weights).sum(), list(head.parameters()))
    assert calls == [3, 3, 1, 1, 3, 3]  # computed once more, the last step first
    for mine, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)
    calls.clear()
    with torch.no_grad():
        torch.testing.assert_close(masks_of(head, output, maps, entries, queries), expected)
    assert calls == [3, 3, 1]
    head.max_step_bytes = 1
    with torch.no_grad():
        torch.testing.assert_close(masks_of(head, output, maps, entries, queries), expected)
    assert calls[3:] == [1] * 7, "one query at a time is the least"


def bytes_of_a_query(head: MaskHead, maps) -> int:
    """Of each enlarged level: the result of the convolution, that of the norm, and one more."""
    convs = head.convs[2:]
    return sum(
        4 * m.shape[-2] * m.shape[-1] * 3 * c.out_channels
        for m, c in zip(maps.values(), convs, strict=True)
    )


@pytest.mark.parametrize("channels", [None, [20, 12, 10, 7]])
def test_one_image_is_not_copied_for_its_queries_and_gives_the_same(channels):
    head = make_head(channels)
    output, maps = make_inputs(num_images=2)
    queries = torch.tensor([2, 4, 0])
    together = masks_of(head, output, maps, torch.tensor([0, 0, 0]), queries)
    first = output._replace(
        hidden_states=output.hidden_states[:, :1],
        projected_map=output.projected_map[:1],
        memory_map=output.memory_map[:1],
        padding_mask=output.padding_mask[:1],
    )
    single = masks_of(
        head, first, {k: m[:1] for k, m in maps.items()}, torch.tensor([0, 0, 0]), queries
    )
    torch.testing.assert_close(single, together)


def test_channels_last_changes_nothing_but_rounding():
    head = make_head()
    output, maps = make_inputs()
    entries, queries = torch.tensor([0, 1, 1]), torch.tensor([2, 4, 0])
    expected = masks_of(head, output, maps, entries, queries)
    last = torch.channels_last
    layouts = []
    head.to(memory_format=last)
    head.norms[-1].register_forward_hook(
        lambda *call: layouts.append(call[-1].is_contiguous(memory_format=last))
    )
    maps = {k: m.contiguous(memory_format=last) for k, m in maps.items()}
    torch.testing.assert_close(masks_of(head, output, maps, entries, queries), expected)
    assert layouts == [True]


def test_published_width_has_the_published_group_norms():
    head = MaskHead(
        embed_dim=256, num_heads=8, in_channels={"res4": 1024, "res3": 512, "res2": 256}
    )
    assert [norm.num_groups for norm in head.norms] == [8] * 5
    assert [conv.out_channels for conv in head.convs] == [264, 128, 64, 32, 16]


@pytest.mark.parametrize("limit", [0, -5])
def test_a_bound_on_memory_that_allows_none_is_refused(limit):
    with pytest.raises(UserError, match=rf"STEP_MEMORY is {limit}; it counts MiB, from 1"):
        tiny_model(MODEL__MASK_HEAD__STEP_MEMORY=limit)


def test_refuses_what_it_cannot_build():
    with pytest.raises(ValueError, match="multiple of 16, not 24"):
        MaskHead(embed_dim=24, num_heads=4, in_channels=dict.fromkeys("abc", 4))
    with pytest.raises(ValueError, match=r"four widths, not \[8\]"):
        make_head([8])
    with pytest.raises(ValueError, match="three backbone maps, not 2"):
        MaskHead(embed_dim=32, num_heads=4, in_channels=dict.fromkeys("ab", 4))
