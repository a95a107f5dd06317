"""Settings that contradict the data set or each other."""

from pathlib import Path

from helpers.run_faults import Place, RunFault

OVERWRITE = "`train_net.py --overwrite`"
KEPT = "the earlier run is as it was"


def _batch_of_none(place: Place) -> None:
    run = place.trained()
    output = place.folder / "out"
    arguments = ["--config-file", run.config_file, "OUTPUT_DIR", output, "SOLVER.IMS_PER_BATCH", 0]
    place.command("train_net.py", *arguments)
    assert not list(output.glob("*.pth"))


def _overwritten(place: Place, *options: object) -> None:
    """Start anew in the folder of a run, with settings that are refused at different moments."""
    run, output = place.trained(), place.folder / "out"
    arguments = ["--config-file", run.config_file, "OUTPUT_DIR", output, "SOLVER.MAX_ITER", 1]
    assert place.command("train_net.py", *arguments) == 0
    before = _content(output)
    place.command("train_net.py", *arguments, "--overwrite", "--opts", *options)
    assert _content(output) == before


def _content(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


FAULTS = [
    RunFault(
        "`--overwrite` and weights that do not exist",
        OVERWRITE,
        KEPT,
        lambda place: _overwritten(place, "MODEL.WEIGHTS", place.folder / "absent.pth"),
    ),
    RunFault(
        "`--overwrite` and a model that cannot be built",
        OVERWRITE,
        KEPT,
        lambda place: _overwritten(place, "MODEL.DETR.NHEADS", 5),
    ),
    RunFault(
        "`--overwrite` and a batch of no images",
        OVERWRITE,
        KEPT,
        lambda place: _overwritten(place, "SOLVER.IMS_PER_BATCH", 0),
    ),
    RunFault("a batch of no images", "`train_net.py`", "no weights are written", _batch_of_none),
]
