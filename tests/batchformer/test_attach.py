"""attach() and its handle, on a small model in every layout."""

import copy
import warnings
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from batchformer_panoptic.batchformer import BatchFormerV2, attach
from batchformer_panoptic.batchformer.attach import from_tokens, to_tokens

CHANNELS = 8
SHAPES = {
    "BNC": (3, 5, CHANNELS),
    "NBC": (5, 3, CHANNELS),
    "BHWC": (3, 2, 4, CHANNELS),
    "BCHW": (3, CHANNELS, 2, 4),
    "BC": (3, CHANNELS),
}


class Layer(nn.Module):
    """A residual MLP over the channel dimension, with a bias for each image."""

    def __init__(self, channel_dim: int) -> None:
        super().__init__()
        self.linear = nn.Linear(CHANNELS, CHANNELS)
        self.channel_dim = channel_dim

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        x = x if bias is None else x + bias
        return x + self.linear(x.movedim(self.channel_dim, -1)).relu().movedim(-1, self.channel_dim)


class Model(nn.Module):
    def __init__(self, layout: str = "BNC", depth: int = 4) -> None:
        super().__init__()
        self.layout = layout
        self.layers = nn.ModuleList(Layer(layout.index("C")) for _ in range(depth))
        self.head = nn.Linear(CHANNELS, 3)

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        for layer in self.layers:
            x = layer(x, bias)
        return self.head(to_tokens(x, self.layout).mean(1))


def make(layout: str = "BNC", after: Any = ("layers.1",), **options: Any) -> Any:
    torch.manual_seed(0)
    model = Model(layout)
    return model, attach(model, after=list(after), layout=layout, embed_dim=CHANNELS, **options)


@pytest.mark.parametrize("layout", SHAPES)
def test_conversion_to_tokens_is_invertible(layout):
    batch = torch.randn(SHAPES[layout])
    tokens = to_tokens(batch, layout)
    assert tokens.shape[0] == 3
    assert tokens.shape[2] == CHANNELS
    assert torch.equal(from_tokens(tokens, layout, batch), batch)


@pytest.mark.parametrize("layout", SHAPES)
def test_streams_are_the_plain_model_and_the_block_written_out(layout):
    model, handle = make(layout, dropout=0.0)
    x = torch.randn(SHAPES[layout])
    plain = copy.deepcopy(model)
    plain.batchformer.detach()
    out = handle.split(model(x))
    torch.testing.assert_close(out["original"], plain(x))
    tokens = plain.layers[1](plain.layers[0](x))
    mixed = handle.hook.blocks["0"](to_tokens(tokens, layout))
    tail = from_tokens(mixed, layout, tokens)
    for layer in plain.layers[2:]:
        tail = layer(tail)
    expected = plain.head(to_tokens(tail, layout).mean(1))
    torch.testing.assert_close(out["batchformer"], expected)
    assert not torch.allclose(out["original"], out["batchformer"])


@pytest.mark.parametrize("layout", SHAPES)
def test_the_memory_format_is_kept(layout):
    model = nn.Sequential(nn.Identity(), nn.Flatten(0))
    attach(model, after=["0"], layout=layout, embed_dim=CHANNELS)
    batch = torch.randn(SHAPES[layout])
    seen = []
    model[1].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model(batch)
    assert seen[0].is_contiguous()
    if layout == "BCHW":
        model(batch.contiguous(memory_format=torch.channels_last))
        assert seen[1].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("shared", [False, True])
def test_a_second_insertion_leaves_the_original_stream(shared):
    model, handle = make(after=("layers.0", "layers.2"), shared=shared, dropout=0.0)
    x = torch.randn(SHAPES["BNC"])
    out = handle.split(model(x))
    plain = copy.deepcopy(model)
    plain.batchformer.detach()
    assert torch.equal(handle.original(model(x)), out["original"])
    torch.testing.assert_close(out["original"], plain(x))
    blocks = handle.hook.blocks
    assert set(blocks) == ({"shared"} if shared else {"0", "1"})
    first, second = (blocks["shared"],) * 2 if shared else (blocks["0"], blocks["1"])
    layers = plain.layers
    tail = layers[3](second(layers[2](layers[1](first(layers[0](x))))))
    torch.testing.assert_close(out["batchformer"], plain.head(tail.mean(1)))


@pytest.mark.parametrize("layout", SHAPES)
def test_evaluation_is_the_untouched_model(layout):
    torch.manual_seed(0)
    untouched = Model(layout).eval()
    model, _ = make(layout)
    model.eval()
    x = torch.randn(SHAPES[layout])
    assert torch.equal(model(x), untouched(x))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    model.train()
    assert len(model(x)) == 6
    assert len(model.eval()(x)) == 3


def test_detach_restores_everything():
    torch.manual_seed(0)
    untouched = Model()
    model, handle = make()
    names = [name for name, _ in model.named_modules()]
    assert "batchformer" in names
    handle.detach()
    assert type(model) is Model
    assert list(model.state_dict()) == list(untouched.state_dict())
    assert [n for n, _ in model.named_modules()] == [n for n, _ in untouched.named_modules()]
    assert model.__dict__.keys() == untouched.__dict__.keys()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    x = torch.randn(SHAPES["BNC"])
    assert torch.equal(model.train()(x), untouched.train()(x))
    with pytest.raises(RuntimeError, match="not attached"):
        handle.detach()
    attach(model, after=["layers.0"], layout="BNC", embed_dim=CHANNELS)
    assert len(model(x)) == 6


def test_every_parameter_learns():
    model, handle = make(after=("layers.0", "layers.2"))
    labels = torch.tensor([0, 1, 2])
    logits = model(torch.randn(SHAPES["BNC"]))
    nn.functional.cross_entropy(logits, handle.expand(labels)).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    # Key biases have no gradient by construction; everything else moves.
    still = [n for n, p in model.named_parameters() if not p.grad.any()]
    assert still == []


@pytest.mark.parametrize("layout", ["BNC", "NBC"])
def test_context_reaches_later_layers_only(layout):
    batch_dim = layout.index("B")
    options = {"context": {"layers.*": {"bias": batch_dim}}}
    model, handle = make(layout, **options)
    assert sorted(handle._context) == ["layers.2", "layers.3"]
    x = torch.randn(SHAPES[layout])
    bias = torch.randn(SHAPES[layout])
    plain = copy.deepcopy(model)
    plain.batchformer.detach()
    torch.testing.assert_close(handle.original(model(x, bias)), plain(x, bias))
    torch.testing.assert_close(handle.original(model(x, bias=bias)), plain(x, bias))
    assert len(model(x)) == 6  # no bias at all
    assert torch.equal(model.eval()(x, bias), plain.eval()(x, bias))


def test_context_of_a_module_named_twice_is_joined():
    context = {"layers.*": {"bias": 1}, "layers.3": {"x": 0}}
    _, handle = make(context=context)
    assert handle._context["layers.2"].arguments == [("bias", 1, 1)]
    assert handle._context["layers.3"].arguments == [("bias", 1, 1), ("x", 0, 0)]


@pytest.mark.parametrize(
    ("after", "later"),
    [
        ("layers.1.linear", ["layers.2", "layers.3"]),
        ("layers.1", ["layers.2", "layers.3"]),
        ("layers.3", []),
    ],
)
def test_patterns_skip_modules_before_the_insertion(after, later):
    context = {"layers.*": {"x": 0}}
    if not later:
        with pytest.raises(ValueError, match=r"no module after layers\.3"):
            make(after=[after], context=context)
        return
    _, handle = make(after=[after], context=context)
    assert list(handle._context) == later
    with pytest.raises(ValueError, match=r"layers\.1 runs before"):
        make(after=[after], context={"layers.1": {"x": 0}})


def test_context_in_nested_arguments_and_by_position():
    class Sum(nn.Module):
        def forward(self, x: Tensor, *maps: Any, **named: Any) -> Tensor:
            return x + maps[0][0] + maps[0][1]["map"]

    class Nested(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Identity(), Sum()

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.first(x), [x, {"map": x, "none": None}])

    model = Nested()
    handle = attach(
        model, after=["first"], layout="BNC", embed_dim=CHANNELS, context={"second": {1: 0}}
    )
    x = torch.randn(SHAPES["BNC"])
    torch.testing.assert_close(handle.original(model(x)), 3 * x)


def test_named_tuples_among_the_context_stay_named_tuples():
    class Images(NamedTuple):
        tensors: Tensor
        mask: Tensor | None

    class Reader(nn.Module):
        def forward(self, x: Tensor, images: Images) -> Tensor:
            return x + images.tensors

    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Identity(), Reader()

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.first(x), Images(x, None))

    model = Pair()
    handle = attach(
        model, after=["first"], layout="BNC", embed_dim=CHANNELS, context={"second": {"images": 0}}
    )
    x = torch.randn(SHAPES["BNC"])
    torch.testing.assert_close(handle.original(model(x)), 2 * x)


def test_targets_and_outputs():
    _, handle = make()
    labels = torch.tensor([4, 5, 6])
    images = [{"id": 1}, {"id": 2}, {"id": 3}]
    doubled = handle.expand({"labels": labels, "images": images})
    assert doubled["labels"].tolist() == [4, 5, 6, 4, 5, 6]
    assert [image["id"] for image in doubled["images"]] == [1, 2, 3, 1, 2, 3]
    outputs = (torch.arange(6), [torch.arange(6) * 2], {"loss": torch.tensor(1.0), "size": 7})
    first, second = handle.split(outputs).values()
    assert first[0].tolist() == [0, 1, 2]
    assert second[0].tolist() == [3, 4, 5]
    assert second[1][0].tolist() == [6, 8, 10]
    assert second[2]["loss"] == 1
    assert second[2]["size"] == 7
    with pytest.raises(TypeError, match="tuple cannot be doubled"):
        handle.expand((labels, labels))
    handle.eval()
    assert handle.expand(labels) is labels
    assert handle.original(outputs)[0].tolist() == [0, 1, 2, 3, 4, 5]
    assert list(handle.split(outputs)) == ["original"]


def test_tokens_may_come_first_in_a_tuple():
    class Pair(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, str]:
            return x, "weights"

    model = nn.Sequential(Pair())
    attach(model, after=["0"], layout="BNC", embed_dim=CHANNELS)
    tokens, rest = model(torch.randn(SHAPES["BNC"]))
    assert tokens.shape == (6, 5, CHANNELS)
    assert rest == "weights"


class Named(NamedTuple):
    tokens: Tensor
    weights: Tensor


def test_named_tuples_stay_what_they_are():
    class Layer(nn.Module):
        def forward(self, x: Tensor) -> Named:
            return Named(x, x)

    model = nn.Sequential(Layer())
    handle = attach(model, after=["0"], layout="BNC", embed_dim=CHANNELS)
    output = model(torch.randn(SHAPES["BNC"]))
    assert isinstance(output, Named)
    assert (len(output.tokens), len(output.weights)) == (6, 3)
    first = handle.original(Named(output.tokens, output.tokens))
    assert isinstance(first, Named)
    assert torch.equal(first.weights, output.tokens[:3])


def test_one_token_an_image_is_batchformer_v1():
    """Concatenated features before and after attention over the batch, one classifier for both."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, CHANNELS), nn.Linear(CHANNELS, 3))
    handle = attach(model, after=["0"], layout="BC", embed_dim=CHANNELS, dropout=0.0)
    x = torch.randn(5, 4)
    encoder = nn.TransformerEncoderLayer(CHANNELS, 4, CHANNELS, 0.0)  # sequence first: the batch
    encoder.load_state_dict(handle.hook.blocks["0"].state_dict())
    features = model[0].forward(x)
    before_and_after = torch.cat([features, encoder(features[:, None])[:, 0]])
    torch.testing.assert_close(model(x), model[1](before_and_after))


def test_block_is_made_where_the_model_is():
    model = Model().to(torch.float64)
    handle = attach(
        model,
        after=["layers.0"],
        layout="BNC",
        embed_dim=CHANNELS,
        num_heads=2,
        dim_feedforward=24,
        dropout=0.25,
    )
    block = handle.hook.blocks["0"]
    assert block.linear1.out_features == 24
    assert block.dropout1.p == 0.25
    assert isinstance(block, BatchFormerV2)
    assert block.norm1.weight.dtype == torch.float64
    assert block.self_attn.num_heads == 2
    assert model(torch.randn(SHAPES["BNC"], dtype=torch.float64)).dtype == torch.float64


def test_attached_in_evaluation_mode():
    model = Model().eval()
    handle = attach(model, after=["layers.0"], layout="BNC", embed_dim=CHANNELS)
    x = torch.randn(SHAPES["BNC"])
    assert not handle.training
    assert len(model(x)) == 3
    assert len(model.train()(x)) == 6


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"after": ["layer.1"]}, "no module 'layer.1'; did you mean layers.1"),
        ({"after": [""]}, "no module ''"),
        ({"after": "layers.1"}, "must be a list of module names"),
        ({"after": []}, "at least one"),
        ({"after": ["layers.1", "layers.1"]}, "none twice"),
        ({"layout": "bnc"}, "unknown layout 'bnc': give the order of dimensions, one of BNC, NBC"),
        ({"attend": "all"}, "unknown attend 'all'"),
        ({"num_heads": 3}, "must divide embed_dim"),
        ({"context": {"layers.9": {"bias": 0}}}, "no module 'layers.9'"),
        ({"context": {"layers.1": {"bias": 0}}}, "layers.1 runs before the streams part"),
        ({"context": {"layers.0": {"bias": 0}}}, "layers.0 runs before the streams part"),
        ({"context": {"head.*": {"input": 0}}}, "no module after layers.1 is called like 'head.*'"),
        ({"context": {"layers.2": {"mask": 0}}}, "no argument 'mask'; it has: x, bias"),
        ({"name": "head"}, "has an attribute 'head' already"),
    ],
)
def test_mistakes_when_attaching(arguments, message):
    model = Model()
    defaults = {"after": ["layers.1"], "layout": "BNC", "embed_dim": CHANNELS}
    with pytest.raises(ValueError, match=message.replace("*", r"\*")):
        attach(model, **{**defaults, **arguments})
    assert list(model.state_dict()) == list(Model().state_dict())
    assert not any(m._forward_hooks for m in model.modules())


def test_attached_twice_is_refused():
    model, _ = make()
    with pytest.raises(ValueError, match="attached to this model already, as 'batchformer'"):
        attach(model, after=["layers.0"], layout="BNC", embed_dim=CHANNELS, name="other")


@pytest.mark.parametrize("batch_first", [True, False])
def test_layout_that_contradicts_a_torch_layer(batch_first):
    layer = nn.TransformerEncoderLayer(CHANNELS, 2, CHANNELS, batch_first=batch_first)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    wrong, right = ("NBC", "BNC") if batch_first else ("BNC", "NBC")
    with pytest.raises(ValueError, match=f"batch_first={batch_first}: its layout is '{right}'"):
        attach(model, after=["layers.0"], layout=wrong, embed_dim=CHANNELS)
    attach(model, after=["layers.0"], layout=right, embed_dim=CHANNELS)


class Patches(nn.Module):
    """Images to tokens, sequence first."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, CHANNELS, 4, 4)
        self.first, self.second = nn.Identity(), nn.Identity()

    def forward(self, images: Tensor) -> Tensor:
        return self.second(self.first(self.patches(images).flatten(2).permute(2, 0, 1)))


def test_a_misread_batch_dimension_is_found_in_the_first_step():
    images = torch.randn(3, 3, 8, 8)
    model = Patches()
    handle = attach(model, after=["first"], layout="BNC", embed_dim=CHANNELS)
    with pytest.raises(ValueError, match=r"\(4, 3, 8\) for 3 images, which is not 'BNC'"):
        model(images)
    handle.detach()
    attach(model, after=["first", "second"], layout="NBC", embed_dim=CHANNELS)
    assert model(images).shape == (4, 6, CHANNELS)
    assert not model._forward_pre_hooks  # looked at once
    assert model(torch.randn(2, 3, 8, 8)).shape == (4, 4, CHANNELS)


@pytest.mark.parametrize("kind", ["list", "nested"])
def test_other_inputs_that_show_the_number_of_images(kind):
    class Stack(Patches):
        def forward(self, images: Any) -> Tensor:
            pixels = torch.stack(images) if kind == "list" else images.tensors
            return super().forward(pixels)

    class Nested(NamedTuple):
        tensors: Tensor

    images = torch.randn(3, 3, 8, 8)
    model = Stack()
    attach(model, after=["first"], layout="BNC", embed_dim=CHANNELS)
    with pytest.raises(ValueError, match="for 3 images"):
        model(list(images) if kind == "list" else Nested(images))


def test_wrong_order_and_modules_that_do_not_run():
    images = torch.randn(2, 3, 8, 8)
    model = Patches()
    handle = attach(model, after=["second", "first"], layout="NBC", embed_dim=CHANNELS)
    with pytest.raises(ValueError, match="what ran was \\['first'\\]"):
        model(images)
    handle.detach()
    model.unused = nn.Identity()
    attach(model, after=["first", "unused"], layout="NBC", embed_dim=CHANNELS)
    with pytest.raises(ValueError, match="in the order they run in"):
        model(images)


def test_wrong_channels_and_wrong_output():
    model, _ = make()
    model.layers[1] = nn.Identity()
    other = Model()
    attach(other, after=["layers.0"], layout="BNC", embed_dim=4)
    with pytest.raises(ValueError, match=r"8 channels, but embed_dim is 4"):
        other(torch.randn(SHAPES["BNC"]))
    mapping = nn.Sequential(nn.Identity())
    attach(mapping, after=["0"], layout="BNC", embed_dim=CHANNELS)
    with pytest.raises(TypeError, match="0 returns dict"):
        mapping({"tokens": torch.randn(SHAPES["BNC"])})


def test_a_batch_of_one_image_is_enough_to_attend_to_itself():
    model, handle = make(attend="self", dropout=0.0)
    x = torch.randn(SHAPES["BNC"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        one_by_one = torch.cat([handle.split(model(x[i : i + 1]))["batchformer"] for i in range(3)])
    torch.testing.assert_close(handle.split(model(x))["batchformer"], one_by_one)


def test_one_image_warns():
    model, _ = make()
    with pytest.warns(UserWarning, match="at least two images"):
        model(torch.randn(1, 5, CHANNELS))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(torch.randn(2, 5, CHANNELS))
