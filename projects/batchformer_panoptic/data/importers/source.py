"""The form between annotations as tools write them and COCO panoptic, and helpers of its readers.

H, W: height and width of an image in pixels. Masks are pycocotools' run lengths ("RLE"), which are
small and have unions and areas without being decoded.
"""

import math
import re
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple
from xml.etree.ElementTree import ParseError

import cv2
import numpy as np
import numpy.typing as npt
from pycocotools import mask as mask_utils

from ...errors import UserError, one_line
from ..images import IMAGE_SUFFIXES

# Errors of the readers at a record, a number, an XML file or embedded data that is not as expected.
_MALFORMED = (AttributeError, IndexError, TypeError, ValueError, OSError, ParseError, zlib.error)

Rle = dict[str, Any]
Size = tuple[int, int]  # height, width
Category = dict[str, Any]

SPLITS = ("train", "val", "test")


class Segment(NamedTuple):
    """An annotated region of one image.

    Attributes:
        category: name of the class; None for pixels marked as void.
        rle: mask of the region.
        is_crowd: the region holds several objects that are not told apart.
        z: height in the order of overlaps, where a format has one.
        group: regions with the same class and group are one object; None: an object of its own.
    """

    category: str | None
    rle: Rle
    is_crowd: bool = False
    z: int = 0
    group: Hashable = None


@dataclass(frozen=True)
class Sample:
    """An image with its annotation.

    Attributes:
        image: the image file.
        read_segments: returns the segments in the order of the file, for a size in pixels.
        split: "train", "val" or "test", where the source has such a division.
        size: size for which the annotation was made; None if it fits any.
        content: the encoded image, for a format that embeds it and an image that does not exist.
    """

    image: Path
    read_segments: Callable[[Size], list[Segment]]
    split: str | None = None
    size: Size | None = None
    content: bytes | None = None


@dataclass(frozen=True)
class Source:
    """A data set in a foreign format.

    Attributes:
        categories: id, name and isthing of every class, as in COCO; color is optional.
        samples: one for each image.
        notes: what is left out or approximated, with its number. Reading segments adds to it.
        has_objects: False for classes of pixels, in which objects are not told apart.
    """

    categories: list[Category]
    samples: list[Sample]
    notes: Counter[str] = field(default_factory=Counter)
    has_objects: bool = True


def things(names: Sequence[str]) -> list[Category]:
    """Return categories in this order, all of them things, with ids from 1 on."""
    return [{"id": number, "name": name, "isthing": 1} for number, name in enumerate(names, 1)]


def only_file(files: Sequence[Path]) -> Path:
    """Return the file of a format that has one for a data set.

    Raises:
        UserError: there are several data sets.
    """
    if len(files) > 1:
        raise UserError(
            f"{files[0].parent} and {files[1].parent} are data sets of their own: convert them one "
            "by one"
        )
    return files[0]


def split_of(text: str) -> str | None:
    """Return the split that the name of a file or folder contains: "train", "val" or "test"."""
    pattern = r"(?<![a-z])(?:(train)(?:ing|val)?|(val)(?:id|idation)?|(test)(?:ing)?)(?![a-z])"
    found = re.search(pattern, text.lower())
    return next(filter(None, found.groups())) if found else None


@contextmanager
def malformed(what: str) -> Iterator[None]:
    """Convert the errors of malformed records to `UserError`; ``what`` begins the sentence."""
    try:
        yield
    except UserError:
        raise
    except KeyError as error:
        raise UserError(f"{what} cannot be read: a record has no {error}") from error
    except _MALFORMED as error:
        raise UserError(f"{what} cannot be read: {one_line(error)}") from error


# ---------------------------------------------------------------------------
# Image files
# ---------------------------------------------------------------------------


def is_image(path: Path) -> bool:
    """Return whether a path has the suffix of an image file."""
    return path.suffix.lower() in IMAGE_SUFFIXES


class ImageIndex:
    """Finds the images that annotations name, wherever they are below some folders.

    Args:
        roots: folders that are searched with all their subfolders.
    """

    def __init__(self, roots: Sequence[Path]) -> None:
        self._roots = roots
        self._left_out: list[Path] = []
        self._files: dict[str, list[Path]] | None = None
        self._missing: list[str] = []
        self._found: set[Path] = set()

    def leave_out(self, *folders: Path) -> None:
        """Leave out folders of masks, whose files are named like the images."""
        self._left_out += folders

    def find(self, *names: str, near: Path | None = None, split: str | None = None) -> Path | None:
        """Return the file with one of these names; a miss is kept for `check`.

        Args:
            *names: relative paths with either slash, in the order of preference. Of the folders in
                a path, as many leading ones as necessary are ignored. A name without suffix stands
                for an image with any.
            near: the folder searched first.
            split: decides between files of one name in folders of several splits.

        Raises:
            UserError: several files have the name.
        """
        for name in names:
            relative = PurePosixPath(name.replace("\\", "/"))
            if near is not None and is_image(near / relative) and (near / relative).is_file():
                return self._hit(near / relative)
            if (found := self._search(relative, split)) is not None:
                return self._hit(found)
        self._missing.append(names[0])
        return None

    def check(self) -> None:
        """Raise UserError if an image was not found."""
        if self._missing:
            where = " and ".join(str(root) for root in self._roots)
            raise UserError(
                f"{len(self._missing)} of {len(self._missing) + len(self._found)} annotated images "
                f"are not below {where}, the first is {self._missing[0]!r}: name their folder with "
                "--images"
            )

    def count_unused(self) -> int:
        """Return the number of image files that were not asked for."""
        known = {path.resolve() for path in self._found}
        files = {path.resolve() for paths in self._listing().values() for path in paths}
        return len(files - known)

    def _hit(self, path: Path) -> Path:
        self._found.add(path)
        return path

    def _search(self, name: PurePosixPath, split: str | None) -> Path | None:
        def key(path: PurePosixPath) -> tuple[str, ...]:
            return (*path.parent.parts, path.name if is_image(Path(name)) else path.stem)

        wanted = (*name.parent.parts, name.name)
        candidates = self._listing().get(wanted[-1], [])
        # From the whole path to the file's own name: the longest agreement wins.
        for start in range(len(wanted)):
            tail = wanted[start:]
            found = [path for path in candidates if key(PurePosixPath(path))[-len(tail) :] == tail]
            if len(found) > 1 and split is not None:
                found = [path for path in found if split in map(split_of, path.parts)] or found
            if len(found) > 1:
                raise UserError(
                    f"the annotated image {str(name)!r} can be {found[0]} or {found[1]}: name the "
                    "folder of the right ones with --images"
                )
            if found:
                return found[0]
        return None

    def _listing(self) -> dict[str, list[Path]]:
        if self._files is None:
            self._files = defaultdict(list)
            for root in self._roots:
                for path in images_below(root):
                    if not any(path.is_relative_to(folder) for folder in self._left_out):
                        self._files[path.name].append(path)
                        self._files[path.stem].append(path)
        return self._files


def visible_below(folder: Path) -> Iterator[Path]:
    """Yield everything below a folder in order, without what is hidden by a leading dot."""
    for path in sorted(folder.rglob("*")):
        if not any(part.startswith(".") for part in path.relative_to(folder).parts):
            yield path


def images_below(folder: Path) -> Iterator[Path]:
    """Yield the image files in a folder and its subfolders in order, without hidden ones."""
    return (path for path in visible_below(folder) if is_image(path) and path.is_file())


# ---------------------------------------------------------------------------
# Masks
# ---------------------------------------------------------------------------


def encode(mask: npt.NDArray[Any]) -> Rle:
    """Return the run lengths of a (H, W) mask; every value but 0 belongs to it."""
    rle: Rle = mask_utils.encode(np.asfortranarray(mask != 0).view(np.uint8))
    return rle


def decode(rle: Rle) -> npt.NDArray[np.bool_]:
    """Return the (H, W) mask of run lengths."""
    mask: npt.NDArray[np.bool_] = mask_utils.decode(rle).view(np.bool_)
    return mask


def union(masks: Sequence[Rle]) -> Rle:
    """Return the pixels that belong to any of the masks."""
    rle: Rle = mask_utils.merge(list(masks))
    return rle


def polygon(points: npt.ArrayLike, size: Size) -> Rle:
    """Return the mask of a polygon; fewer than three points have none.

    Args:
        points: (x, y) in pixels from the top left corner of the image; pixel 0 ends at 1.
        size: of the image.

    Raises:
        ValueError: the points are not finite numbers.
    """
    corners = np.asarray(points, dtype=float).reshape(-1, 2)
    if not np.isfinite(corners).all():
        raise ValueError("a polygon has coordinates that are not finite")
    if len(corners) < 3:
        return encode(np.zeros(size, bool))
    rle: Rle = mask_utils.frPyObjects([corners.ravel().tolist()], *size)[0]
    return rle


def polygon_of_pixels(rings: Sequence[npt.ArrayLike], size: Size) -> Rle:
    """Return the mask of a polygon whose points are pixels that belong to it.

    Args:
        rings: (x, y) pixels of the outline, then of each hole.
        size: of the image.
    """
    mask = np.zeros(size, np.uint8)
    for number, ring in enumerate(rings):
        corners = np.asarray(ring, dtype=float).reshape(-1, 1, 2).round().astype(np.int32)
        if len(corners):
            cv2.fillPoly(mask, [corners], (int(number == 0),))
    return encode(mask)


def check_mask_size(path: Path, found: tuple[int, ...], size: Size) -> None:
    """Raise UserError if a file of masks has another size than its image."""
    if found != size:
        raise UserError(
            f"{path} is {found[1]}x{found[0]} (width x height), but its image is "
            f"{size[1]}x{size[0]}"
        )


def rectangle(x: float, y: float, width: float, height: float) -> npt.NDArray[np.float64]:
    """Return the corners of a box from its top left corner, in pixels."""
    return np.array([(x, y), (x + width, y), (x + width, y + height), (x, y + height)], float)


def ellipse(x: float, y: float, radius_x: float, radius_y: float) -> npt.NDArray[np.float64]:
    """Return points of an ellipse; the polygon's area is within 0.1 % of the ellipse's."""
    angles = np.linspace(0, 2 * np.pi, 90, endpoint=False)
    return np.stack([x + radius_x * np.cos(angles), y + radius_y * np.sin(angles)], axis=1)


def rotate(
    points: npt.NDArray[np.float64], degrees: float, pivot: npt.ArrayLike
) -> npt.NDArray[np.float64]:
    """Turn points around a pivot, clockwise on the screen."""
    cosine, sine = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    center = np.asarray(pivot, float)
    turn = np.array([[cosine, sine], [-sine, cosine]])
    turned: npt.NDArray[np.float64] = (points - center) @ turn + center
    return turned


def paste(crop: npt.NDArray[Any], left: int, top: int, size: Size) -> Rle:
    """Return the mask of an image from a (h, w) part of it; what is outside the image is cut."""
    mask = np.zeros(size, bool)
    rows, columns = slice(max(top, 0), top + crop.shape[0]), slice(max(left, 0), None)
    target = mask[rows, columns][:, : left + crop.shape[1] - columns.start]
    target[:] = crop[rows.start - top :, columns.start - left :][
        : target.shape[0], : target.shape[1]
    ]
    return encode(mask)
