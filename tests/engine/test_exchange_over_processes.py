"""The block over three processes, against the same block over all images in one."""

import warnings
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
from detectron2.utils import comm
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from batchformer_panoptic.batchformer import BatchFormerHook, attach
from batchformer_panoptic.batchformer.batchformer import SINGLE, TWO_STREAMS
from batchformer_panoptic.batchformer.exchange import MapSizes, gather_objects
from batchformer_panoptic.engine.processes import launch_processes
from batchformer_panoptic.errors import UserError

IMAGES = (1, 3, 2)
CHANNELS = 8
# A class token and two levels; no process has the largest height and width of a level.
LEVELS: list[MapSizes] = [
    ((1, 1), (4, 2), (2, 1)),
    ((1, 1), (2, 5), (1, 3)),
    ((1, 1), (3, 3), (2, 2)),
]
COMMON: MapSizes = ((1, 1), (4, 5), (2, 3))


class Case(NamedTuple):
    """The maps of each process, and whether it has a padding mask."""

    map_sizes: list[MapSizes]
    has_rows: bool = True
    masked: tuple[bool, bool, bool] = (False, False, False)


CASES = {
    "equal maps": Case([((3, 5),)] * 3),
    "tokens without rows": Case([((1, 7),)] * 3, has_rows=False),
    "fewer positions than processes": Case([((1, 1),)] * 3, has_rows=False),
    "maps of different sizes": Case(LEVELS),
    "padding of one process": Case([((3, 5),)] * 3, masked=(False, True, False)),
    "padding, and maps of different sizes": Case(LEVELS, masked=(True, False, True)),
}


def _hook(**settings: Any) -> BatchFormerHook:
    torch.manual_seed(0)
    settings = {"dropout": 0.0, "mask_padding": True, "sync": True, **settings}
    return BatchFormerHook(CHANNELS, **settings)


def _tokens(map_sizes: MapSizes, rank: int) -> Tensor:
    generator = torch.Generator().manual_seed(rank)
    cells = sum(height * width for height, width in map_sizes)
    return torch.randn(IMAGES[rank], cells, CHANNELS, generator=generator)


def _mask(tokens: Tensor, is_masked: bool) -> Tensor | None:
    return tokens[..., 0] > 0.8 if is_masked else None


def _loss(attended: Tensor, rank: int) -> Tensor:
    """Another one in each process, so that a gradient of the wrong image would show."""
    return (attended.square() * torch.arange(1, CHANNELS + 1)).sum() * (rank + 1)


def _run(folder: Path) -> None:
    torch.set_num_threads(1)
    rank = comm.get_rank()
    for name, (map_sizes, has_rows, masked) in CASES.items():
        hook = _hook()
        tokens = _tokens(map_sizes[rank], rank).requires_grad_()
        sizes = map_sizes[rank] if has_rows else None
        out, _ = hook.after_layer(0, tokens, SINGLE, _mask(tokens, masked[rank]), sizes)
        original, attended = TWO_STREAMS.split(out)
        assert torch.equal(original, tokens)
        _loss(attended, rank).backward()
        gradients = [p.grad for p in hook.parameters()]
        torch.save((attended.detach(), tokens.grad, gradients), folder / f"{name}_{rank}.pth")
    _run_attached(folder, rank)
    _refuse_tokens_that_cannot_be_paired(rank)
    _gather_beside_a_backend_of_devices(rank)


def _refuse_tokens_that_cannot_be_paired(rank: int) -> None:
    tokens = _tokens(LEVELS[rank], rank)
    with pytest.raises(UserError, match="pad the images of all processes to one size"):
        _hook().after_layer(0, tokens, SINGLE, None)
    with pytest.raises(ValueError, match="do not have"):
        _hook().after_layer(0, tokens, SINGLE, None, ((1, 1),))
    assert gather_objects(rank) == [0, 1, 2], "the processes are still in step"


def _gather_beside_a_backend_of_devices(rank: int) -> None:
    with mock.patch.object(torch.distributed, "get_backend", return_value="nccl"):
        assert gather_objects(rank) == [0, 1, 2]
        with mock.patch.object(torch.distributed, "new_group", side_effect=AssertionError):
            assert gather_objects(rank) == [0, 1, 2], "there is one more group only"


class Maps(nn.Module):
    """Two layers without a view of other cells; the first returns maps or their cells."""

    def __init__(self, layout: str, *, checkpointing: bool = False) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.stem = nn.Sequential(nn.Conv2d(3, CHANNELS, 1))
        if layout == "BNC":
            self.stem.append(nn.Flatten(2)).append(SwapLast())
        self.head = nn.Linear(CHANNELS, CHANNELS)
        self.checkpointing = checkpointing

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B', H * W, C)."""
        if self.checkpointing:
            maps = checkpoint(self.stem, images, use_reentrant=False)
        else:
            maps = self.stem(images)
        return self.head(maps.flatten(2).mT if maps.dim() == 4 else maps)


class SwapLast(nn.Module):
    """Exchanges the last two dimensions."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., A, B) -> (..., B, A)."""
        return x.mT


def _images(rank: int) -> Tensor:
    size = LEVELS[rank][1]
    return torch.randn(IMAGES[rank], 3, *size, generator=torch.Generator().manual_seed(rank))


# "again": with activation checkpointing.
ATTACHED = ["BCHW", "BNC", "BCHW again", "BCHW compiled"]


def _run_attached(folder: Path, rank: int) -> None:
    for name in ATTACHED:
        layout, _, way = name.partition(" ")
        model = Maps(layout, checkpointing=way == "again")
        handle = attach(
            model, after=["stem"], layout=layout, embed_dim=CHANNELS, dropout=0.0, sync=True
        )
        if layout == "BNC":
            handle.map_sizes = (LEVELS[rank][1],)
        parallel: nn.Module = DistributedDataParallel(model)
        if way == "compiled":
            parallel = torch.compile(parallel, backend="eager")
        with warnings.catch_warnings():
            # One image in each of three processes is no single image.
            warnings.filterwarnings("error", message="BatchFormerV2")
            outputs = handle.split(parallel(_images(rank)))
        sum(_loss(x, rank) for x in outputs.values()).backward()
        gradients = {name: p.grad for name, p in model.named_parameters()}
        torch.save((outputs, gradients), folder / f"{name}_{rank}.pth")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Results of three processes."""
    folder = tmp_path_factory.mktemp("block")
    launch_processes(_run, 3, args=(folder,))
    return folder


def _places(own: MapSizes, common: MapSizes) -> Tensor:
    """Positions of the cells of a process in the tokens of the common maps."""
    places, start = [], 0
    for (height, width), (of_height, of_width) in zip(own, common, strict=True):
        for row in range(height):
            places += [start + row * of_width + column for column in range(width)]
        start += of_height * of_width
    return torch.tensor(places)


@pytest.mark.distributed
@pytest.mark.parametrize("name", CASES)
def test_tokens_and_gradients_are_those_of_one_process(folder: Path, name: str) -> None:
    map_sizes, _, masked = CASES[name]
    common = COMMON if map_sizes is LEVELS else map_sizes[0]
    own = [_tokens(sizes, rank).requires_grad_() for rank, sizes in enumerate(map_sizes)]
    places = [_places(sizes, common) for sizes in map_sizes]
    num_cells = sum(height * width for height, width in common)
    tokens, masks = [], []
    for x, place, is_masked in zip(own, places, masked, strict=True):
        tokens.append(x.new_zeros(len(x), num_cells, CHANNELS).index_copy(1, place, x))
        masks.append(torch.ones(len(x), num_cells, dtype=torch.bool))
        mask = _mask(x, is_masked)
        masks[-1][:, place] = False if mask is None else mask
    hook = _hook()
    together = hook.blocks["0"](torch.cat(tokens), torch.cat(masks)).split(IMAGES)
    attended = [x[:, place] for x, place in zip(together, places, strict=True)]
    sum(_loss(x, rank) for rank, x in enumerate(attended)).backward()

    parts = [torch.load(folder / f"{name}_{rank}.pth", weights_only=True) for rank in range(3)]
    for rank, (found, gradient, _) in enumerate(parts):
        torch.testing.assert_close(found, attended[rank].detach(), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(gradient, own[rank].grad, rtol=1e-5, atol=1e-4)
    for parameter, *of_process in zip(hook.parameters(), *(p[2] for p in parts), strict=True):
        torch.testing.assert_close(sum(of_process), parameter.grad, rtol=1e-4, atol=1e-3)


@pytest.mark.distributed
@pytest.mark.parametrize("name", ATTACHED)
def test_an_attached_block_sees_the_images_of_all_processes(folder: Path, name: str) -> None:
    model = Maps("BNC")
    handle = attach(model, after=["stem"], layout="BNC", embed_dim=CHANNELS, dropout=0.0)
    handle.detach()
    block = handle.hook.blocks["0"]
    tokens, masks, places = [], [], []
    for rank in range(3):
        x = model.stem(_images(rank))
        places.append(_places((LEVELS[rank][1],), ((4, 5),)))
        tokens.append(x.new_zeros(len(x), 20, CHANNELS).index_copy(1, places[rank], x))
        masks.append(torch.ones(len(x), 20, dtype=torch.bool))
        masks[rank][:, places[rank]] = False
    together = block(torch.cat(tokens), torch.cat(masks)).split(IMAGES)
    total = torch.zeros(())
    for rank, place in enumerate(places):
        found, gradients = torch.load(folder / f"{name}_{rank}.pth", weights_only=True)
        expected = {"original": tokens[rank], "batchformer": together[rank]}
        for stream, x in expected.items():
            out = model.head(x[:, place])
            torch.testing.assert_close(found[stream], out.detach(), rtol=1e-5, atol=1e-5)
            total = total + _loss(out, rank) / 3
    total.backward()
    for key, parameter in [*model.named_parameters(), *handle.named_parameters("batchformer")]:
        torch.testing.assert_close(gradients[key], parameter.grad, rtol=1e-4, atol=1e-3)
