"""Two CPU processes over gloo."""

import json
import os
from pathlib import Path

import pytest
import torch
from detectron2.engine import launch
from detectron2.utils import comm
from torch import nn
from torch.multiprocessing import ProcessRaisedException
from torch.nn.parallel import DistributedDataParallel

from batchformer_panoptic.engine.processes import _run_and_close_groups, launch_processes
from batchformer_panoptic.engine.train_loop import FiniteCheck
from batchformer_panoptic.errors import NonFiniteError, UserError
from helpers.stand_in import StandInTrainer, stand_in_cfg


class SplitTrainer(StandInTrainer):
    """Each process reads batches of its own."""

    @classmethod
    def build_train_loader(cls, cfg: object, *, start_iter: int = 0) -> object:
        """Batches 100 * rank, 100 * rank + 1, ..."""
        return super().build_train_loader(cfg, start_iter=100 * comm.get_rank())


def _refuse(module: nn.Module, inputs: object, outputs: object) -> None:
    raise NonFiniteError("matching cost is not finite")


def _train(output_dir: Path) -> None:
    torch.set_num_threads(1)
    trainer = SplitTrainer(stand_in_cfg(output_dir, "SOLVER.MAX_ITER", 2))
    assert isinstance(trainer.model, DistributedDataParallel)
    trainer.resume_or_load(resume=False)
    trainer.train()
    torch.save(trainer.model.module.head.weight, output_dir / f"head_{comm.get_rank()}.pth")

    for number, opts in enumerate((["EVERY", 2], ["ATTEND", "none"])):
        opts[0] = f"MODEL.BATCHFORMER.{opts[0]}"  # the block has steps without a gradient
        trainer = SplitTrainer(stand_in_cfg(output_dir / str(number), *opts))
        trainer.train()
        assert trainer.iter == trainer.max_iter

    FiniteCheck.is_ready = False  # type: ignore[assignment]  # as on CUDA; the process ends here
    trainer = SplitTrainer(stand_in_cfg(output_dir / "poisoned"))
    if comm.get_rank() == 1:  # the first process, which saves, has a finite loss
        trainer.model.module.register_forward_hook(_refuse)
    with pytest.raises(NonFiniteError) as error:
        trainer.train()
    (output_dir / f"error_{comm.get_rank()}.txt").write_text(str(error.value))

    trainer = SplitTrainer(stand_in_cfg(output_dir / "gradient"))
    if comm.get_rank() == 1:
        trainer.model.module.head.weight.register_hook(lambda gradient: gradient * float("nan"))
    with pytest.raises(NonFiniteError) as error:
        trainer.train()
    # The others wait until the state is saved: their end would be the end of the one that saves.
    assert (output_dir / "gradient" / "model_nonfinite.pth").is_file()
    (output_dir / f"gradient_{comm.get_rank()}.txt").write_text(str(error.value))


@pytest.mark.distributed
def test_processes_agree_on_weights_metrics_and_errors(tmp_path: Path) -> None:
    launch_processes(_train, 2, args=(tmp_path,))
    heads = [torch.load(tmp_path / f"head_{rank}.pth", weights_only=True) for rank in (0, 1)]
    assert torch.equal(heads[0], heads[1])
    records = [json.loads(line) for line in (tmp_path / "metrics.json").read_text().splitlines()]
    assert [r["iteration"] for r in records if "total_loss" in r] == [0, 1]
    errors = [(tmp_path / f"error_{rank}.txt").read_text() for rank in (0, 1)]
    assert errors[0] == errors[1]
    assert "1000 (100_0.jpg)" in errors[0]
    assert "(0_0.jpg)" not in errors[0]
    assert (tmp_path / "poisoned" / "model_nonfinite.pth").is_file()
    errors = [(tmp_path / f"gradient_{rank}.txt").read_text() for rank in (0, 1)]
    assert errors[0] == errors[1]
    assert "gradient is not finite at iteration 0" in errors[0]
    assert "0 (0_0.jpg)" in errors[0]
    assert "1000 (100_0.jpg)" in errors[0]


def _thread_names() -> set[str]:
    tasks = Path("/proc/self/task")
    return {(task / "comm").read_text().strip() for task in tasks.iterdir()}


def _reduce_a_gradient() -> None:
    model = DistributedDataParallel(nn.Linear(2, 1))
    model(torch.ones(1, 2)).sum().backward()
    assert comm.all_gather(comm.get_rank()) == [0, 1]
    assert "pt_gloo_runloop" in _thread_names()


def _leave(folder: Path) -> None:
    _run_and_close_groups(_reduce_a_gradient, (), None)
    (folder / f"threads_{os.getpid()}.txt").write_text(" ".join(_thread_names()))


@pytest.mark.distributed
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="names of threads: only on Linux")
def test_no_thread_of_a_process_group_outlives_the_work(tmp_path: Path) -> None:
    launch(_leave, 2, dist_url="auto", args=(tmp_path,))
    left = [file.read_text() for file in tmp_path.iterdir()]
    assert len(left) == 2
    assert "gloo" not in "".join(left)


def _fail(error: Exception) -> None:
    if comm.get_rank() == 1:
        raise error
    comm.synchronize()  # the other process waits for the one that failed


@pytest.mark.distributed
@pytest.mark.parametrize(
    "error",
    [
        UserError("a line\nand a second one, as a conversion lists keys"),
        NonFiniteError("the class of the error is kept"),
    ],
    ids=["UserError", "subclass"],
)
def test_a_user_error_of_a_launched_process_arrives_as_the_same_object(error: UserError) -> None:
    with pytest.raises(UserError) as raised:
        launch_processes(_fail, 2, args=(error,))
    assert type(raised.value) is type(error)
    assert raised.value.args == error.args
    assert raised.value.__cause__ is None, "no traceback text of another process"


@pytest.mark.distributed
def test_another_error_of_a_launched_process_keeps_its_traceback() -> None:
    # The words that an earlier version looked for in the text.
    text = "batchformer_panoptic.errors.UserError: not one"
    with pytest.raises(ProcessRaisedException, match="RuntimeError"):
        launch_processes(_fail, 2, args=(RuntimeError(text),))


def test_a_single_process_raises_the_error_itself() -> None:
    error = UserError("a line")

    def fail() -> None:
        raise error

    with pytest.raises(UserError) as raised:
        launch_processes(fail, 1)
    assert raised.value is error
