"""Runs that are to be resumed: missing and damaged files, changed settings, other runs."""

import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml

from batchformer_panoptic.engine.output_folder import LOCK
from helpers.run_faults import Place, RunFault

_LAST = "model_0000001.pth"
_EARLIER = "model_0000000.pth"


def _arguments(place: Place, output: Path, *options: object) -> list[object]:
    """Of a training of 3 iterations with a checkpoint after each."""
    run = place.trained(
        DATALOADER__NUM_WORKERS=0,
        SEED=3,
        SOLVER__IMS_PER_BATCH=2,
        SOLVER__MAX_ITER=3,
        SOLVER__CHECKPOINT_PERIOD=1,
        SOLVER__WARMUP_ITERS=0,
        SOLVER__STEPS=(),
        MODEL__BATCHFORMER__ENABLED=True,
    )
    base = ["--config-file", run.config_file, *options]
    return [*base, "OUTPUT_DIR", output, "DATASETS.TEST", "()", "DATASETS.CHECK", "False"]


def _killed(place: Place) -> Path:
    """The folder of a run that was killed in its last iteration; trained once for all tests."""
    complete = _complete(place)
    output = place.folder / "out"
    shutil.copytree(complete, output)
    (output / "model_final.pth").unlink()
    (output / "model_0000002.pth").unlink()
    (output / "last_checkpoint").write_text(_LAST)
    return output


def _complete(place: Place) -> Path:
    complete = place.dataset.panoptic_json.parent / "complete_run"
    if not complete.exists():
        assert place.command("train_net.py", *_arguments(place, complete)) == 0
    return complete


def _resume(place: Place, *options: object) -> int:
    output = place.folder / "out"
    return place.command("train_net.py", *_arguments(place, output, "--resume", *options))


def _content(folder: Path) -> dict[str, bytes]:
    # A command that fails before it trains leaves the lock to the end of its process.
    paths = [p for p in folder.rglob("*") if p.is_file() and p.name not in ("log.txt", LOCK)]
    return {str(p.relative_to(folder)): p.read_bytes() for p in paths}


def _continued(place: Place, fault: Callable[[Path], Any]) -> None:
    """The resumed run ends with the weights and the metrics of the undisturbed one."""
    output = _killed(place)
    fault(output)
    _resume(place)
    _assert_complete(place, output)


def _assert_complete(place: Place, output: Path) -> None:
    ours, theirs = (
        torch.load(folder / "model_final.pth", weights_only=True)["model"]
        for folder in (output, _complete(place))
    )
    assert all(torch.equal(ours[name], value) for name, value in theirs.items())
    lines = (output / "metrics.json").read_text().splitlines()
    assert [json.loads(line)["iteration"] for line in lines] == [0, 1, 2]
    assert not [path for path in output.iterdir() if path.name.startswith(".")]


def _refused(place: Place, fault: Callable[[Path], Any], *options: object) -> None:
    """The run ends without a change of any file."""
    output = _killed(place)
    fault(output)
    before = _content(output)
    _resume(place, *options)
    assert _content(output) == before


def _nothing(_output: Path) -> None:
    pass


def _shorten(*names: str) -> Callable[[Path], None]:
    def act(output: Path) -> None:
        for name in names:
            os.truncate(output / name, (output / name).stat().st_size // 2)

    return act


def _without(*keys: str) -> Callable[[Path], None]:
    """Remove an entry of the newest checkpoint."""

    def act(output: Path) -> None:
        content = node = torch.load(output / _LAST, weights_only=True)
        for key in keys[:-1]:
            node = node[key]
        del node[keys[-1]]
        torch.save(content, output / _LAST)

    return act


def _unreadable(place: Place) -> None:
    output = _killed(place)
    read_text = Path.read_text

    def fail(path: Path, *args: Any, **kwargs: Any) -> str:
        if path.name == "last_checkpoint":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return read_text(path, *args, **kwargs)

    with place.monkeypatch.context() as patch:
        patch.setattr(Path, "read_text", fail)
        _resume(place)
    _assert_complete(place, output)


def _weights_only(output: Path) -> None:
    """As exported: all checkpoints have lost the state of the training."""
    for path in output.glob("*.pth"):
        weights = torch.load(path, weights_only=True)["model"]
        torch.save({"model": weights}, path)


def _final_is_weights_only(output: Path) -> None:
    weights = torch.load(output / _LAST, weights_only=True)["model"]
    torch.save({"model": weights}, output / "model_final.pth")
    (output / "last_checkpoint").write_text("model_final.pth")


def _deleted(output: Path) -> None:
    for path in [*output.glob("*.pth"), output / "last_checkpoint"]:
        path.unlink()


def _leavings(output: Path) -> None:
    digits = "0" * 32
    for name in (f".model_0000002.{digits}.pth", f".last_checkpoint.{digits}"):
        (output / name).write_bytes(b"half")
    (output / LOCK).write_text("process 1 on elsewhere")


def _other_rate(place: Place) -> None:
    output = _killed(place)
    _resume(place, "SOLVER.BASE_LR", "0.02")
    assert yaml.safe_load((output / "config.yaml").read_text())["SOLVER"]["BASE_LR"] == 0.02
    group = torch.load(output / "model_final.pth", weights_only=True)["trainer"]["_trainer"]
    rates = {g["initial_lr"] for g in group["optimizer"]["param_groups"]}
    assert max(rates) == 0.02
    assert "SOLVER.BASE_LR 0.0001 -> 0.02" in (output / "log.txt").read_text()


def _other_annotations(place: Place) -> None:
    _killed(place)
    name, images, masks, annotations = place.dataset.row
    content = json.loads(Path(annotations).read_text())
    content["annotations"][0]["segments_info"].pop()
    changed = place.folder / "annotations.json"
    changed.write_text(json.dumps(content))
    row = f"[['{name}_changed', '{images}', '{masks}', '{changed}']]"
    output = place.folder / "out"
    before = _content(output)
    _resume(place, "DATASETS.CUSTOM_PANOPTIC", row, "DATASETS.TRAIN", f"{name}_changed")
    assert _content(output) == before


def _second_writer(place: Place, *options: object) -> None:
    output = _killed(place)
    arguments = _arguments(place, output, *options)
    arguments += ["DATASETS.TEST", place.dataset.name]
    code = (
        "import fcntl, sys; file = open(sys.argv[1], 'w'); fcntl.lockf(file, fcntl.LOCK_EX); "
        "file.write('process 12 on node7'); file.flush(); print(flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(output / LOCK)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as holder:
        assert holder.stdout is not None
        holder.stdout.readline()
        before = _content(output)
        place.command("train_net.py", *arguments)
        assert _content(output) == before
        holder.communicate()


_ARE_SAME = "the run ends with the weights and metrics of an undisturbed one"
_UNCHANGED = "no file has changed"
_COMMAND = "`train_net.py --resume`"


def _goes_on(fault: str, act: Callable[[Path], Any], state: str = _ARE_SAME) -> RunFault:
    return RunFault(fault, _COMMAND, state, lambda place: _continued(place, act), status=0)


def _stops(fault: str, act: Callable[[Path], Any], *options: object) -> RunFault:
    command = f"`train_net.py --resume {' '.join(map(str, options))}`" if options else _COMMAND
    return RunFault(fault, command, _UNCHANGED, lambda place: _refused(place, act, *options))


FAULTS = [
    _goes_on("`last_checkpoint` is missing", lambda output: (output / "last_checkpoint").unlink()),
    _goes_on(
        "`last_checkpoint` is empty", lambda output: (output / "last_checkpoint").write_text("")
    ),
    _goes_on(
        "`last_checkpoint` is full of zeros",
        lambda output: (output / "last_checkpoint").write_bytes(bytes(17)),
    ),
    _goes_on(
        "a picture as `last_checkpoint`",
        lambda output: (output / "last_checkpoint").write_bytes(b"\xff\xd8\xff\xe0" * 9),
    ),
    RunFault("`last_checkpoint` cannot be read (EIO)", _COMMAND, _ARE_SAME, _unreadable, status=0),
    _goes_on("`last_checkpoint` names a file without trainer state", _final_is_weights_only),
    _goes_on("the newest checkpoint is half a file", _shorten(_LAST)),
    _goes_on("`metrics.json` ends in half a line", _shorten("metrics.json")),
    _goes_on(
        "temporary files and the lock of a killed run",
        _leavings,
        f"they are gone, and {_ARE_SAME}",
    ),
    _stops("all checkpoints are half files", _shorten(_EARLIER, _LAST)),
    _stops("all checkpoints have only weights", _weights_only),
    _stops("the checkpoints of a run are gone", _deleted),
    _stops(
        "`model_best.json` is half a file",
        lambda output: (output / "model_best.json").write_text('{"metric": "pan'),
    ),
    _stops(
        "a checkpoint without the optimizer's state", _without("trainer", "_trainer", "optimizer")
    ),
    _stops(
        "a checkpoint without the state of its first parameter's moments",
        _without("trainer", "_trainer", "optimizer", "state", 0, "exp_avg"),
    ),
    _stops("another optimizer", _nothing, "SOLVER.OPTIMIZER", "SGD"),
    _stops("another batch", _nothing, "SOLVER.IMS_PER_BATCH", 4),
    _stops("another accumulation of gradients", _nothing, "SOLVER.GRADIENT_ACCUMULATION", 2),
    _stops("averaging of weights is switched on", _nothing, "SOLVER.EMA_DECAY", 0.9),
    _stops("other trained parameters", _nothing, "MODEL.MASK_HEAD.FREEZE_DETR", "True"),
    _stops("fewer iterations than the checkpoint has", _nothing, "SOLVER.MAX_ITER", 1),
    _stops("a negative number of kept checkpoints", _nothing, "SOLVER.CHECKPOINTS_KEPT", -1),
    RunFault("other annotations", _COMMAND, _UNCHANGED, _other_annotations),
    RunFault(
        "another learning rate",
        "`train_net.py --resume SOLVER.BASE_LR 0.02`",
        "it is applied and named in the log, and `config.yaml` has it",
        _other_rate,
        status=0,
    ),
    RunFault(
        "another process trains into the folder",
        _COMMAND,
        _UNCHANGED,
        lambda place: _second_writer(place, "--resume"),
    ),
    RunFault(
        "evaluation into the folder of a running training",
        "`train_net.py --eval-only --resume`",
        _UNCHANGED,
        lambda place: _second_writer(place, "--eval-only", "--resume"),
    ),
    RunFault(
        "`--overwrite` of the folder of a running training",
        "`train_net.py --overwrite`",
        _UNCHANGED,
        lambda place: _second_writer(place, "--overwrite"),
    ),
]
