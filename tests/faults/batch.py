"""Attention over the batch, and its normalisers, in one process and in several."""

from pathlib import Path

import torch
from torch import nn

from batchformer_panoptic.batchformer import attach
from batchformer_panoptic.engine.run import launch_processes
from batchformer_panoptic.errors import command
from helpers.run_faults import Place, RunFault

BLOCK = ["MODEL.BATCHFORMER.ENABLED", True, "MODEL.BATCHFORMER.SYNC", True]


def _train(place: Place, *opts: object, images: int = 2) -> Path:
    """One iteration in ``folder/out``."""
    run = place.trained()
    output = place.folder / "out"
    arguments = ["--config-file", run.config_file, "OUTPUT_DIR", output, "SOLVER.MAX_ITER", 1]
    arguments += ["SOLVER.IMS_PER_BATCH", images, "DATASETS.TEST", ()]
    place.command("train_net.py", *arguments, *opts)
    return output


def _sync_of_a_token_with_itself(place: Place) -> None:
    output = _train(place, *BLOCK, "MODEL.BATCHFORMER.ATTEND", "self")
    assert not list(output.glob("*.pth"))


def _sync_without_a_layer(place: Place) -> None:
    output = _train(place, *BLOCK, "MODEL.BATCHFORMER.ATTEND", "none")
    assert not list(output.glob("*.pth"))


def _class_loss_that_is_synced_anyway(place: Place) -> None:
    output = _train(place, "MODEL.DETR.SCORING", "focal", "MODEL.DETR.SYNC_CLASS_LOSS", True)
    assert not list(output.glob("*.pth"))


def _a_single_image(place: Place) -> None:
    output = _train(place, *BLOCK, images=1)
    log = (output / "log.txt").read_text()
    assert "each process has ONE image" in log
    assert (output / "model_final.pth").is_file()


def _sync_in_one_process(place: Place) -> None:
    opts = ["MODEL.DETR.SYNC_CLASS_LOSS", True, "SEED", 1, *BLOCK]
    synced = _train(place, *opts)
    synced = synced.rename(place.folder / "synced")
    plain = _train(place, "SEED", 1, *BLOCK[:2])
    weights = [
        torch.load(folder / "model_final.pth", weights_only=True)["model"]
        for folder in (synced, plain)
    ]
    for name, value in weights[1].items():
        torch.testing.assert_close(weights[0][name], value)


def _tokens_of_processes(place: Place) -> None:
    @command
    def main() -> int:
        launch_processes(_step_on_sequences, 2)
        return 0

    place.capfd.readouterr()
    place.ended(main(), place.capfd.readouterr().err)


def _step_on_sequences() -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    attach(model, after=["0"], layout="BNC", embed_dim=8, sync=True)
    model(torch.zeros(2, 5 + torch.distributed.get_rank(), 8))


FAULTS = [
    RunFault(
        "MODEL.BATCHFORMER.SYNC where a token attends to itself",
        "`train_net.py`",
        "no weights are written",
        _sync_of_a_token_with_itself,
    ),
    RunFault(
        "MODEL.BATCHFORMER.SYNC without a layer between the streams",
        "`train_net.py`",
        "no weights are written",
        _sync_without_a_layer,
    ),
    RunFault(
        "MODEL.DETR.SYNC_CLASS_LOSS of a loss that has no normaliser of one process",
        "`train_net.py`",
        "no weights are written",
        _class_loss_that_is_synced_anyway,
    ),
    RunFault(
        "a batch of one image, with attention over the batch",
        "`train_net.py`",
        "the log warns; the run is complete",
        _a_single_image,
        status=0,
    ),
    RunFault(
        "MODEL.BATCHFORMER.SYNC and MODEL.DETR.SYNC_CLASS_LOSS in one process",
        "`train_net.py`",
        "the weights are those of a run without both",
        _sync_in_one_process,
        status=0,
    ),
    RunFault(
        "a process with another number of tokens, without rows and columns",
        "`attach(model, sync=True)` in two processes",
        "all processes end",
        _tokens_of_processes,
    ),
]
