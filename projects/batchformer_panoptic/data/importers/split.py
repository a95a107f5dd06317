"""Division of images into training and validation, with duplicates on the same side."""

import hashlib
import io
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components
from tqdm import tqdm

from ...errors import UserError
from ..images import open_image
from .source import Sample, malformed

Vectors = npt.NDArray[np.float32]

# Correlation of grey thumbnails from which images count as duplicates. Half the size, JPEG quality
# 50 and 1.2 times the brightness keep it above 0.98 for photographs of streets and facades;
# different photographs of facades reach 0.90.
SAME = 0.95
_THUMBNAIL = 16  # pixels a side
_BLOCK = 1024  # images compared with all others at once


def choose_splits(
    samples: Sequence[Sample], share: float, seed: int, *, exact: bool = False
) -> list[str]:
    """Return "train" or "val" for each image.

    Groups of duplicates are drawn in a random order, and go to validation while they fit.

    Args:
        samples: the images.
        share: of the images that become validation, from 0 to below 1; at least one of them.
        seed: of the random order.
        exact: only files with the same bytes are duplicates; False: images that look alike, too.

    Raises:
        UserError: an image cannot be read, or no group fits into the validation set.
    """
    if share == 0:
        return ["train"] * len(samples)
    groups = _groups(samples, exact)
    sizes = np.bincount(groups)
    target = min(max(1, round(share * len(samples))), len(samples) - 1)
    chosen: list[int] = []
    for group in np.random.default_rng(seed).permutation(len(sizes)).tolist():
        if sizes[[*chosen, group]].sum() <= target:
            chosen.append(group)
    if not chosen:
        raise UserError(
            f"{target} of {len(samples)} images cannot be set apart for validation, because no "
            f"{target} differ from all others (images that look alike stay together, here at least "
            f"{sizes.min()}): choose another --val-share, or --exact-duplicates for frames of one "
            "camera"
        )
    return ["val" if group in chosen else "train" for group in groups.tolist()]


def _groups(samples: Sequence[Sample], exact: bool) -> npt.NDArray[np.int32]:
    """Return the number of the group of duplicates of each image."""
    first: dict[bytes, int] = {}
    pairs: list[tuple[int, int]] = []
    thumbnails = []
    for number, sample in enumerate(tqdm(samples, desc="looking for duplicates", disable=None)):
        with malformed(f"image {sample.image}"):
            data = sample.image.read_bytes() if sample.content is None else sample.content
            pairs.append((number, first.setdefault(hashlib.sha256(data).digest(), number)))
            if not exact:
                thumbnails.append(_thumbnail(data))
    if not exact:
        pairs += _alike(np.stack(thumbnails))
    rows, columns = np.array(pairs).T
    graph = coo_matrix((np.ones(len(pairs)), (rows, columns)), shape=(len(samples),) * 2)
    groups: npt.NDArray[np.int32] = connected_components(graph, directed=False)[1]
    return groups


def _thumbnail(data: bytes) -> Vectors:
    """Return an encoded image as a unit vector without its brightness and contrast.

    Returns:
        (`_THUMBNAIL` squared,) float32; zero for an image of one color.
    """
    with open_image(io.BytesIO(data)) as image:
        image.draft("L", (8 * _THUMBNAIL, 8 * _THUMBNAIL))  # several times faster for JPEG
        grey = ImageOps.exif_transpose(image).convert("L")
    small = grey.resize((_THUMBNAIL, _THUMBNAIL), Image.Resampling.BOX)
    values = np.asarray(small, np.float32).ravel()
    values = values - values.mean()
    vector: Vectors = values / max(float(np.linalg.norm(values)), 1.0)
    return vector


def _alike(vectors: Vectors) -> list[tuple[int, int]]:
    """Return the pairs of rows whose correlation is above `SAME`."""
    pairs: list[tuple[int, int]] = []
    for start in range(0, len(vectors), _BLOCK):
        rows, columns = np.nonzero(vectors[start : start + _BLOCK] @ vectors.T > SAME)
        pairs += zip((rows + start).tolist(), columns.tolist(), strict=True)
    return pairs
