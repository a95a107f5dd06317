"""Shared fixtures: seeding, script loading, a tiny synthetic data set."""

import logging
import random
import signal
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from detectron2.utils.logger import setup_logger

from helpers.tiny_dataset import TinyPanopticDataset, write_tiny_dataset


@pytest.fixture(autouse=True)
def _log_handlers_end_with_the_test() -> Iterator[None]:
    """Detectron2 leaves handlers on a test's captured streams, which are closed afterwards."""
    loggers = [logging.getLogger(name) for name in ("detectron2", "fvcore", "batchformer_panoptic")]
    before = [list(logger.handlers) for logger in loggers]
    for logger in loggers:
        logger.propagate = True  # fixtures of a module have run before this one
    yield
    for logger, handlers in zip(loggers, before, strict=True):
        logger.handlers[:] = handlers
        logger.propagate = True
    setup_logger.cache_clear()


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    """The CPU, which shows that a test is right, and a GPU, without TF32, where there is one."""
    if request.param == "cuda":
        if not torch.cuda.is_available():
            pytest.skip("needs a CUDA device")
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    return torch.device(request.param)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="session")
def _signals_are_those_of_a_terminal() -> None:
    """In the background and under nohup, tests would inherit that signals are ignored."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture(autouse=True, scope="session")
def _results_of_checks_stay_in_a_temporary_folder(
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FVCORE_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def tiny_panoptic_dataset(tmp_path_factory: pytest.TempPathFactory) -> TinyPanopticDataset:
    """Five images of 48x64 and 40x32 pixels (height x width); the last one has no segments.

    Contiguous classes: 0 "box" and 2 "disc" are things, 1 "ground" and 3 "sky" are stuff. Images
    0 to 3 each have two boxes (one of them cut by a disc), a disc, ground, sky, a crowd of boxes
    and a void column at the right edge. Tests that change files work on a copy.
    """
    return write_tiny_dataset(tmp_path_factory.mktemp("tiny_panoptic"))
