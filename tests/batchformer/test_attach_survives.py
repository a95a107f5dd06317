"""Copies, checkpoints, compilation, autocast and DDP of a model with attached BatchFormerV2."""

import copy
import io
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.spawn import spawn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from batchformer_panoptic.batchformer import AttachedBatchFormer, attach

CHANNELS = 8


class TinyModel(nn.Module):
    """An encoder of torch's layers, optionally with activation checkpointing."""

    def __init__(self, checkpointing: bool = False) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(CHANNELS, 2, 16, dropout=0.1, batch_first=True)
            for _ in range(3)
        )
        self.head = nn.Linear(CHANNELS, 3)
        self.checkpointing = checkpointing

    def forward(self, tokens: Tensor) -> Tensor:
        for layer in self.layers:
            if self.checkpointing and self.training:
                tokens = checkpoint(layer, tokens, use_reentrant=False)
            else:
                tokens = layer(tokens)
        return self.head(tokens.mean(1))


def make(checkpointing: bool = False) -> tuple[TinyModel, AttachedBatchFormer]:
    torch.manual_seed(0)
    model = TinyModel(checkpointing)
    after = ["layers.0", "layers.1"]
    return model, attach(model, after=after, layout="BNC", embed_dim=CHANNELS)


def step(model: nn.Module, handle: AttachedBatchFormer, seed: int = 1) -> Tensor:
    torch.manual_seed(seed)
    logits = model(torch.randn(4, 5, CHANNELS))
    loss = nn.functional.cross_entropy(logits, handle.expand(torch.tensor([0, 1, 2, 0])))
    loss.backward()
    return loss.detach()


def test_state_dict_round_trip():
    model, _ = make()
    other, _ = make()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(1)
    other.load_state_dict(model.state_dict())
    for name, value in other.state_dict().items():
        assert torch.equal(value, model.state_dict()[name])
    block_keys = [key for key in model.state_dict() if key.startswith("batchformer.")]
    assert len(block_keys) == 2 * 12


def test_plain_state_dict_is_that_of_the_untouched_model():
    model, handle = make()
    plain = handle.plain_state_dict()
    assert list(plain) == list(TinyModel().state_dict())
    TinyModel().load_state_dict(plain)
    assert "batchformer.hook.blocks.0.norm1.weight" in model.state_dict()


def test_a_copy_has_a_block_of_its_own():
    model, handle = make()
    twin = copy.deepcopy(model)
    assert twin.batchformer is not handle
    loss = step(twin, twin.batchformer)
    assert all(p.grad is None for p in model.parameters())
    assert all(p.grad is not None for p in twin.parameters())
    assert torch.equal(step(model, handle), loss)
    twin.batchformer.detach()
    assert not hasattr(twin, "batchformer")
    x = torch.randn(4, 5, CHANNELS)
    assert len(twin(x)) == 4
    assert len(model(x)) == 8


def test_a_saved_model_can_be_read_again():
    model, handle = make()
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    read = torch.load(file, weights_only=False)
    assert torch.equal(step(read, read.batchformer), step(model, handle))


def test_activation_checkpointing_changes_nothing():
    plain, handle = make()
    saving, saving_handle = make(checkpointing=True)
    assert torch.equal(step(plain, handle), step(saving, saving_handle))
    for (name, one), two in zip(plain.named_parameters(), saving.parameters(), strict=True):
        torch.testing.assert_close(two.grad, one.grad, msg=name)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_mixed_precision(dtype):
    model, handle = make()
    with torch.autocast("cpu", dtype=dtype):
        loss = step(model, handle)
    assert loss.isfinite()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    assert all(p.grad.dtype == torch.float32 for p in model.parameters())


def test_tokens_keep_their_type():
    """The block ends in a layer norm, whose output autocast leaves in float32 on a GPU."""
    model = nn.Sequential(nn.Identity())
    handle = attach(model, after=["0"], layout="BNC", embed_dim=CHANNELS)
    handle.hook.blocks["0"].forward = lambda tokens, mask=None: tokens.float()
    assert model(torch.randn(4, 5, CHANNELS, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_compiled():
    torch._dynamo.reset()
    model, _handle = make()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    for module in model.modules():  # the dropout of attention weights is a number
        if isinstance(module, nn.MultiheadAttention):
            module.dropout = 0.0
    compiled = torch.compile(copy.deepcopy(model), backend="aot_eager")
    x = torch.randn(4, 5, CHANNELS)
    torch.testing.assert_close(compiled(x), model(x))
    assert len(compiled(x)) == 8
    compiled(x).sum().backward()
    assert all(p.grad is not None for p in compiled._orig_mod.batchformer.parameters())
    compiled.eval(), model.eval()
    torch.testing.assert_close(compiled(x), model(x))
    assert len(compiled(x)) == 4
    compiled.train()
    assert len(compiled(x)) == 8
    with pytest.raises(TypeError, match="OptimizedModule: attach BatchFormerV2 first"):
        attach(compiled, after=["layers.0"], layout="BNC", embed_dim=CHANNELS)


def test_detached_after_it_was_compiled():
    torch._dynamo.reset()
    model, handle = make()
    compiled = torch.compile(model, backend="eager")
    x = torch.randn(4, 5, CHANNELS)
    assert len(compiled(x)) == 8
    handle.detach()
    assert len(compiled(x)) == 4


def test_a_model_that_was_compiled_in_place_is_refused():
    model = TinyModel()
    model.layers[1].compile(backend="eager")
    with pytest.raises(TypeError, match=r"layers\.1 is compiled"):
        attach(model, after=["layers.0"], layout="BNC", embed_dim=CHANNELS)


def _train_in_a_process(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2
    )
    model, handle = make()
    ddp = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(ddp.parameters(), lr=0.1)
    for iteration in range(2):
        optimizer.zero_grad()
        step(ddp, handle, seed=10 * rank + iteration)
        optimizer.step()
    ddp.eval()
    assert len(ddp(torch.randn(4, 5, CHANNELS))) == 4
    torch.save(model.state_dict(), folder / f"{rank}.pth")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


@pytest.mark.distributed
def test_two_processes_keep_equal_weights(tmp_path: Path) -> None:
    spawn(_train_in_a_process, (tmp_path,), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pth") for rank in (0, 1))
    start = make()[0].state_dict()
    for name in start:
        assert torch.equal(first[name], second[name]), name
    block = "batchformer.hook.blocks.1.linear1.weight"
    assert not torch.equal(first[block], start[block])


def test_a_distributed_model_is_refused():
    with pytest.raises(TypeError, match="DataParallel: attach BatchFormerV2 first, then wrap"):
        attach(nn.DataParallel(TinyModel()), after=["x"], layout="BNC", embed_dim=CHANNELS)


_EVALUATE_WITHOUT_THE_LIBRARY = """
import sys, torch
sys.path.insert(0, sys.argv[1])
sys.modules["batchformer_panoptic"] = None  # an import of it fails
from plain_model import build
model = build().eval()
model.load_state_dict(torch.load("trained.pth", weights_only=True))
torch.save(model(torch.load("x.pth")), "out.pth")
"""

_PLAIN_MODEL = """
from torch import nn

def build():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    return nn.Sequential(nn.TransformerEncoder(layer, 2), nn.Linear(8, 3))
"""


def test_attach_train_save_and_evaluate_without_the_library(tmp_path: Path) -> None:
    (tmp_path / "plain_model.py").write_text(_PLAIN_MODEL)
    namespace: dict[str, object] = {}
    exec(_PLAIN_MODEL, namespace)
    model = namespace["build"]()  # type: ignore[operator]
    handle = attach(model, after=["0.layers.0"], layout="BNC", embed_dim=8)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x = torch.randn(4, 5, 8)
    for _ in range(2):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    model.eval()
    torch.save(handle.plain_state_dict(), tmp_path / "trained.pth")
    torch.save(x, tmp_path / "x.pth")
    command = [sys.executable, "-c", _EVALUATE_WITHOUT_THE_LIBRARY, str(tmp_path)]
    subprocess.run(command, cwd=tmp_path, check=True)
    assert torch.equal(torch.load(tmp_path / "out.pth"), model(x))
