"""Settings that contradict the data set or each other."""

from helpers.run_faults import Place, RunFault


def _batch_of_none(place: Place) -> None:
    run = place.trained()
    output = place.folder / "out"
    arguments = ["--config-file", run.config_file, "OUTPUT_DIR", output, "SOLVER.IMS_PER_BATCH", 0]
    place.command("train_net.py", *arguments)
    assert not list(output.glob("*.pth"))


FAULTS = [
    RunFault("a batch of no images", "`train_net.py`", "no weights are written", _batch_of_none),
]
