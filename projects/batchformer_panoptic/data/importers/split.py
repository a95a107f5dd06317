"""Division of images into training and validation, with duplicates on the same side."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components
from tqdm import tqdm

from ...errors import UserError
from ..io import read_image

Vectors = npt.NDArray[np.float32]

# Correlation of grey thumbnails from which images count as duplicates. Half the size, JPEG quality
# 50 and 1.2 times the brightness keep it above 0.98 for photographs of streets and facades;
# different photographs of facades reach 0.90.
SAME = 0.95
_THUMBNAIL = 16  # pixels a side
_BLOCK = 1024  # images compared with all others at once


def choose_splits(
    images: Sequence[Path], share: float, seed: int, *, exact: bool = False
) -> list[str]:
    """Return "train" or "val" for each image.

    Groups of duplicates are drawn in a random order, and go to validation while they fit.

    Args:
        images: the image files.
        share: of the images that become validation, from 0 to below 1; at least one of them.
        seed: of the random order.
        exact: only files with the same bytes are duplicates; False: images that look alike, too.

    Raises:
        UserError: an image cannot be read, or no group fits into the validation set.
    """
    if share == 0:
        return ["train"] * len(images)
    groups = _groups(images, exact)
    sizes = np.bincount(groups)
    target = max(1, round(share * len(images)))
    chosen: list[int] = []
    for group in np.random.default_rng(seed).permutation(len(sizes)).tolist():
        if sizes[[*chosen, group]].sum() <= min(target, len(images) - 1):
            chosen.append(group)
    if not chosen:
        raise UserError(
            f"no validation set of {target} of {len(images)} images without images that look like "
            f"those of training (the smallest group of them has {sizes.min()}): choose another "
            "--val-share, or --exact-duplicates for frames of one camera"
        )
    return ["val" if group in chosen else "train" for group in groups.tolist()]


def _groups(images: Sequence[Path], exact: bool) -> npt.NDArray[np.int32]:
    """Return the number of the group of duplicates of each image."""
    first: dict[bytes, int] = {}
    pairs = [
        (number, first.setdefault(hashlib.sha256(path.read_bytes()).digest(), number))
        for number, path in enumerate(images)
    ]
    if not exact:
        found = tqdm(images, desc="looking for duplicates", disable=None)
        pairs += _alike(np.stack([_thumbnail(path) for path in found]))
    rows, columns = np.array(pairs).T
    graph = coo_matrix((np.ones(len(pairs)), (rows, columns)), shape=(len(images),) * 2)
    groups: npt.NDArray[np.int32] = connected_components(graph, directed=False)[1]
    return groups


def _thumbnail(path: Path) -> Vectors:
    """Return an image as a unit vector without its brightness and contrast; zero for one color."""
    grey = cv2.cvtColor(read_image(path), cv2.COLOR_BGR2GRAY)
    side = (_THUMBNAIL, _THUMBNAIL)
    small = cv2.resize(grey, side, interpolation=cv2.INTER_AREA).astype(np.float32).ravel()
    small -= small.mean()
    vector: Vectors = small / max(float(np.linalg.norm(small)), 1.0)
    return vector


def _alike(vectors: Vectors) -> list[tuple[int, int]]:
    """Return the pairs of rows whose correlation is above `SAME`."""
    pairs: list[tuple[int, int]] = []
    for start in range(0, len(vectors), _BLOCK):
        rows, columns = np.nonzero(vectors[start : start + _BLOCK] @ vectors.T > SAME)
        pairs += zip((rows + start).tolist(), columns.tolist(), strict=True)
    return pairs
