"""Paths of data sets, and the check that a name is registered for the same paths only."""

import os
from collections.abc import Mapping

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.utils.file_io import PathManager

from ...errors import UserError
from ..images import missing_file


def resolve_path(path: str) -> str:
    """Expand ``~`` and environment variables; return an absolute path unless it is a URI."""
    expanded = os.path.expanduser(os.path.expandvars(path))
    return expanded if "://" in expanded else os.path.abspath(expanded)


def check_paths(name: str, paths: Mapping[str, str | None]) -> None:
    """Check that the paths of a data set exist; those that are None are skipped.

    Args:
        name: the name of the data set.
        paths: by their role, such as "image_root".

    Raises:
        UserError: names the first path that does not exist.
    """
    for role, path in paths.items():
        if path is not None and not PathManager.exists(path):
            raise UserError(
                f"data set {name!r}: {role} {path!r} does not exist; correct the path or prepare "
                "the data (Detectron2 looks for its own data sets in $DETECTRON2_DATASETS)"
            )


def is_registered(name: str, paths: Mapping[str, str], evaluator_type: str) -> bool:
    """Return whether a name is registered; if it is not, its paths exist.

    Args:
        name: the name of the data set.
        paths: resolved, by their keys in the metadata.
        evaluator_type: in the metadata; it distinguishes the formats.

    Raises:
        UserError: the name is registered with other paths, or a path does not exist.
    """
    if name not in DatasetCatalog:
        check_paths(name, paths)
        return False
    metadata = MetadataCatalog.get(name)
    expected = {**paths, "evaluator_type": evaluator_type}
    if any(metadata.get(key) != value for key, value in expected.items()):
        raise UserError(
            f"data set {name!r} is already registered with other paths: choose another name"
        )
    return True


def check_first_file(path: str, role: str, root: str, source: str) -> None:
    """Check the first file of a data set, so that a wrong folder is noticed before training.

    Args:
        path: the file.
        role: "image" or "panoptic PNG".
        root: the folder.
        source: the JSON that names the file.

    Raises:
        UserError: the file does not exist.
    """
    if not PathManager.isfile(path):
        raise UserError(f"{source}: {missing_file(path, role)}; is {root} the right folder?")
