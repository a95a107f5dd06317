import math

import pytest
import torch

from batchformer_panoptic.batchformer import BatchFormerV2
from batchformer_panoptic.batchformer.batchformer import ATTENDS


def slow_block(block: BatchFormerV2, tokens: torch.Tensor, ignored: torch.Tensor) -> torch.Tensor:
    """The paper's block with loops: attention over images at one position, head by head."""
    num_images, num_tokens, channels = tokens.shape
    heads = block.self_attn.num_heads
    width = channels // heads
    weight, bias = block.self_attn.in_proj_weight, block.self_attn.in_proj_bias
    result = torch.empty_like(tokens)
    for n in range(num_tokens):
        x = tokens[:, n]
        q, k, v = (x @ weight.T + bias).split(channels, dim=1)
        attended = torch.zeros_like(x)
        for h in range(heads):
            part = slice(h * width, (h + 1) * width)
            for i in range(num_images):
                scores = torch.stack(
                    [q[i, part] @ k[j, part] / math.sqrt(width) for j in range(num_images)]
                )
                scores[ignored[:, n]] = -math.inf
                attended[i, part] = scores.softmax(0) @ v[:, part]
        x = block.norm1(x + block.self_attn.out_proj(attended))
        result[:, n] = block.norm2(x + block.linear2(block.linear1(x).relu()))
    return result


def make_block(**kwargs) -> BatchFormerV2:
    block = BatchFormerV2(16, num_heads=4, dropout=0.0, **kwargs)
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return block


def test_attends_over_images_at_each_position():
    block, tokens = make_block(dim_feedforward=24), torch.randn(3, 5, 16)
    nothing = torch.zeros(3, 5, dtype=torch.bool)
    torch.testing.assert_close(block(tokens), slow_block(block, tokens, nothing))


def test_padding_is_not_attended_to():
    block, tokens = make_block(), torch.randn(3, 4, 16)
    mask = torch.zeros(3, 4, dtype=torch.bool)
    mask[1, 2:] = True
    torch.testing.assert_close(block(tokens, mask), slow_block(block, tokens, mask))


@pytest.mark.parametrize("num_tokens", [1, 5, 400])
@pytest.mark.parametrize("has_padding", [False, True])
def test_entropy_is_that_of_the_attention(num_tokens: int, has_padding: bool) -> None:
    block, tokens = make_block(), torch.randn(3, num_tokens, 16)
    mask = torch.zeros(3, num_tokens, dtype=torch.bool)
    mask[1, num_tokens // 2 :] = has_padding
    _, weights = block.self_attn(*[tokens] * 3, key_padding_mask=mask.T, average_attn_weights=False)
    expected = torch.special.entr(weights).sum(-1).mean()
    found = block.attention_entropy(tokens, mask)
    # Of 400 positions, only some are looked at.
    torch.testing.assert_close(found, expected, rtol=0.05 if num_tokens == 400 else 1e-5, atol=1e-6)


def test_entropy_is_between_that_of_one_image_and_of_all() -> None:
    block, tokens = make_block(), torch.randn(1, 4, 16).expand(3, 4, 16)
    torch.testing.assert_close(block.attention_entropy(tokens), torch.tensor(math.log(3)))
    assert block.attention_entropy(tokens[:1]).item() == 0.0


def test_positions_that_are_padding_everywhere_stay_finite():
    tokens = torch.randn(2, 3, 16, requires_grad=True)
    out = make_block()(tokens, torch.ones(2, 3, dtype=torch.bool))
    out.sum().backward()
    assert out.isfinite().all()
    assert tokens.grad.isfinite().all()


def test_permuting_images_permutes_the_output():
    block, tokens, order = make_block(), torch.randn(4, 3, 16), torch.tensor([2, 0, 3, 1])
    torch.testing.assert_close(block(tokens[order]), block(tokens)[order])


def test_positions_do_not_mix():
    block, tokens = make_block(), torch.randn(3, 4, 16)
    changed = tokens.clone()
    changed[:, 1] += 1.0
    before, after = block(tokens), block(changed)
    torch.testing.assert_close(after[:, [0, 2, 3]], before[:, [0, 2, 3]])
    assert not torch.allclose(after[:, 1], before[:, 1])


def test_one_token_per_image_is_the_image_level_batchformer():
    block, features = make_block(), torch.randn(5, 16)
    plain_layer = torch.nn.TransformerEncoderLayer(16, 4, 16, dropout=0.0)
    plain_layer.load_state_dict(block.state_dict())
    torch.testing.assert_close(block(features[:, None])[:, 0], plain_layer(features))


@pytest.mark.parametrize(
    ("shape", "mask_shape", "message"),
    [((3, 16), None, r"\(B, N, C\)"), ((2, 5, 16), (5, 2), r"\(2, 5\), not \(5, 2\)")],
)
def test_refuses_other_shapes(shape, mask_shape, message):
    mask = None if mask_shape is None else torch.zeros(mask_shape, dtype=torch.bool)
    with pytest.raises(ValueError, match=message):
        make_block()(torch.zeros(shape), mask)


def test_refuses_heads_that_do_not_divide():
    with pytest.raises(ValueError, match=r"num_heads \(3\) must divide"):
        BatchFormerV2(16, num_heads=3)


def test_published_defaults():
    block = BatchFormerV2(32)
    assert block.self_attn.num_heads == 4
    assert block.linear1.out_features == 32
    assert block.dropout.p == block.dropout1.p == block.self_attn.dropout == 0.5
    assert block.norm1.eps == 1e-5
    assert not block.norm_first
    assert block.attend == "batch"


def test_attending_to_itself_is_the_block_image_by_image():
    block, itself = make_block(), make_block(attend="self")
    itself.load_state_dict(block.state_dict())
    tokens = torch.randn(3, 5, 16)
    one_by_one = torch.cat([block(tokens[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(itself(tokens), one_by_one)
    assert not torch.allclose(itself(tokens), block(tokens), atol=1e-3)
    mask = torch.zeros(3, 5, dtype=torch.bool)
    mask[1, 2:] = True
    assert torch.equal(itself(tokens, mask), itself(tokens))


def test_attending_to_itself_drops_whole_heads():
    """As dropout of the one attention weight that a head has."""
    block = make_block(attend="self")
    block.norm1 = block.norm2 = torch.nn.Identity()
    torch.nn.init.zeros_(block.linear2.weight)
    torch.nn.init.zeros_(block.linear2.bias)
    torch.nn.init.eye_(block.self_attn.out_proj.weight)
    torch.nn.init.zeros_(block.self_attn.out_proj.bias)
    tokens = torch.randn(20, 30, 16)
    values = (block(tokens) - tokens).unflatten(-1, (4, 4))
    block.self_attn.dropout = 0.5
    dropped = (block(tokens) - tokens).unflatten(-1, (4, 4))
    kept = (dropped != 0).any(-1, keepdim=True)
    torch.testing.assert_close(dropped, torch.where(kept, 2 * values, 0.0))
    assert 0.4 < kept.float().mean() < 0.6
    assert kept.float().mean(2).unique().numel() == 5  # heads of a token are independent
    torch.testing.assert_close(block.eval()(tokens), tokens + values.flatten(-2))


def test_no_layer_between_the_streams():
    tokens = torch.randn(2, 3, 16)
    assert make_block(attend="none")(tokens) is tokens


def test_weights_fit_every_way_to_attend():
    shapes = [
        {name: value.shape for name, value in make_block(attend=attend).state_dict().items()}
        for attend in ATTENDS
    ]
    assert shapes[0] == shapes[1] == shapes[2]


def test_refuses_an_unknown_way_to_attend():
    with pytest.raises(ValueError, match="unknown attend 'other'; known: batch, self, none"):
        make_block(attend="other")
