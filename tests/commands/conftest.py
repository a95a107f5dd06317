"""Fixtures that the tests of the commands share."""

import pytest

from helpers.tiny_dataset import TinyPanopticDataset
from helpers.trained_files import Run, write_run


@pytest.fixture(scope="module")
def run(
    tmp_path_factory: pytest.TempPathFactory, tiny_panoptic_dataset: TinyPanopticDataset
) -> Run:
    """A tiny panoptic model on disk, with its config and options."""
    return write_run(tmp_path_factory.mktemp("run"), tiny_panoptic_dataset)
