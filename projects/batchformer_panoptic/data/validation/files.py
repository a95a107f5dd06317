"""Checks of the files that a JSON names: whole data sets, single images, single PNGs."""

import hashlib
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from ...errors import UserError
from ..images import MAX_PIXELS, ImageFacts, missing_file, read_image_facts
from ..segment_maps import PngFault, png_fault, read_png_size, read_segment_map
from .annotations import check_panoptic_json
from .instances import check_instances_json
from .pixels import check_pixels
from .problems import Problem, Record, image_name, is_integer, records, stated_size

Size = tuple[int, int]  # height, width

_DARK = 32  # of 255: the brightest pixel of a 16-bit image that was never scaled to 16 bits
_MUCH_VOID = 0.25  # share of all pixels
_FEW_FILES = 32  # are checked in this process: starting others takes longer
_TAIL_BYTES = 4096


@dataclass(frozen=True)
class Depth:
    """How thoroughly and by how many processes files are checked.

    Attributes:
        max_images: open the files of that many images; None opens all.
        decode_images: decode the images, which finds damaged ones. False reads only their headers,
            which is several times faster.
        max_pixels: decode files that have this many pixels in all, evenly distributed over the
            data set, and read only the headers of the others. None decodes all.
        processes: that share the work.
        largest_image: INPUT.MAX_PIXELS; larger images are errors.
    """

    max_images: int | None = None
    decode_images: bool = True
    max_pixels: int | None = None
    processes: int = 1
    largest_image: int = MAX_PIXELS


def check_panoptic_content(
    content: Record, image_root: str | Path, panoptic_root: str | Path, depth: Depth | None = None
) -> list[Problem]:
    """Check a whole panoptic data set: the JSON, the images and the panoptic PNGs.

    Args:
        content: the content of the panoptic JSON, as `read_coco_json` returns it.
        image_root: folder of the images named by ``images[].file_name``.
        panoptic_root: folder of the PNGs named by ``annotations[].file_name``.
        depth: by default all files are decoded, in this process.

    Raises:
        UserError: a folder does not exist.
    """
    depth = depth or Depth()
    image_root, panoptic_root = Path(image_root), Path(panoptic_root)
    check_folders(image=image_root, panoptic=panoptic_root)
    images = {repr(image.get("id")): image for image in records(content, "images")}
    pairs = [
        (images.get(repr(annotation.get("image_id")), {}), annotation)
        for annotation in records(content, "annotations")[: depth.max_images]
    ]
    problems = [
        *check_panoptic_json(content),
        *_check_swapped_folders(pairs, image_root, panoptic_root),
    ]
    things = {
        category["id"]
        for category in records(content, "categories")
        if category.get("isthing") == 1 and is_integer(category.get("id"))
    }
    check = partial(_check_pair, image_root, panoptic_root, frozenset(things), depth)
    decoded = _choose_decoded([image for image, _ in pairs], depth.max_pixels)
    reports = _map(check, list(zip(pairs, decoded, strict=True)), depth.processes)
    problems += chain.from_iterable(report.problems for report in reports)
    problems += _check_void(reports)
    problems += check_copies(_paths_of([image for image, _ in pairs], image_root))
    return problems


def check_instances_content(
    content: Record, image_root: str | Path, depth: Depth | None = None
) -> list[Problem]:
    """Check a whole data set of boxes: the JSON and the images; see `check_panoptic_content`."""
    depth = depth or Depth()
    image_root = Path(image_root)
    check_folders(image=image_root)
    images = records(content, "images")[: depth.max_images]
    check = partial(_check_image, image_root, depth)
    decoded = _choose_decoded(images, depth.max_pixels)
    reports = _map(check, list(zip(images, decoded, strict=True)), depth.processes)
    problems = list(check_instances_json(content))
    problems += chain.from_iterable(report.problems for report in reports)
    problems += check_copies(_paths_of(images, image_root))
    return problems


def check_images(images: Sequence[Record], depth: Depth) -> list[Problem]:
    """Check images of which no JSON states the size.

    Args:
        images: records with ``file_name``, an existing path.
        depth: images that are not chosen for decoding are not opened.
    """
    images = images[: depth.max_images]
    jobs = zip(images, _choose_decoded(images, depth.max_pixels), strict=True)
    check = partial(_check_image, Path(), depth)
    reports = _map(check, [job for job in jobs if job[1]], depth.processes)
    return list(chain.from_iterable(report.problems for report in reports))


def check_folders(**folders: Path) -> None:
    """Raise UserError for the first folder, given by its role, that does not exist."""
    for role, folder in folders.items():
        if not folder.is_dir():
            raise UserError(f"{role} folder not found: {folder}")


def _paths_of(images: Iterable[Record], image_root: Path) -> list[Path]:
    names = (image.get("file_name") for image in images)
    return list(dict.fromkeys(image_root / name for name in names if isinstance(name, str)))


# ---------------------------------------------------------------------------
# The files of one image, and their distribution over processes
# ---------------------------------------------------------------------------


class _Report(NamedTuple):
    problems: list[Problem]
    pixels: int = 0  # of a decoded PNG
    void: int = 0


def _map(
    check: Callable[[tuple[Any, bool]], _Report], jobs: Sequence[tuple[Any, bool]], processes: int
) -> list[_Report]:
    """Check all jobs, each a record (or a pair) and whether to decode its files."""
    progress = partial(tqdm, desc="checking files", total=len(jobs), disable=None)
    if processes == 1 or len(jobs) <= _FEW_FILES:
        return list(progress(map(check, jobs)))
    with ProcessPoolExecutor(processes) as pool:
        return list(progress(pool.map(check, jobs, chunksize=8)))


def _choose_decoded(images: Sequence[Record], max_pixels: int | None) -> list[bool]:
    """Choose every n-th image such that those chosen have about ``max_pixels`` in all."""
    sizes = [stated_size(image) or (1000, 1000) for image in images]
    total = sum(height * width for height, width in sizes)
    step = 1 if max_pixels is None else max(1, -(-total // max_pixels))
    return [number % step == 0 for number in range(len(images))]


def _check_pair(
    image_root: Path,
    panoptic_root: Path,
    things: frozenset[int],
    depth: Depth,
    job: tuple[tuple[Record, Record], bool],
) -> _Report:
    (image, annotation), decode = job
    problems = _check_image(image_root, depth, (image, decode)).problems
    if not isinstance(annotation.get("file_name"), str):
        return _Report(problems)
    path = panoptic_root / annotation["file_name"]
    report = check_panoptic_file(annotation, stated_size(image), path, things, decode=decode)
    return report._replace(problems=problems + report.problems)


def _check_image(image_root: Path, depth: Depth, job: tuple[Record, bool]) -> _Report:
    image, decode = job
    if not isinstance(image.get("file_name"), str):
        return _Report([])
    path = image_root / image["file_name"]
    found = check_image_file(
        path,
        stated_size(image),
        image_name(image),
        decode=decode and depth.decode_images,
        max_pixels=depth.largest_image,
    )
    return _Report(list(found))


def check_image_file(
    path: Path,
    size: Size | None,
    image: str,
    *,
    decode: bool = True,
    max_pixels: int | None = MAX_PIXELS,
) -> Iterator[Problem]:
    """Check that an image exists, can be read and has the size in the JSON (None: not stated)."""
    if not path.is_file():
        yield Problem("missing image file", missing_file(path, "image"), image)
        return
    try:
        facts = read_image_facts(path, decode=decode, max_pixels=max_pixels)
    except UserError as error:
        yield Problem("unreadable image file", str(error), image)
        return
    yield from check_image_size(path, facts.size, size, image)
    for kind, message, severity in _peculiarities(facts):
        yield Problem(kind, message, image, severity=severity)


def _peculiarities(facts: ImageFacts) -> Iterator[tuple[str, str, str]]:
    """Yield kind, sentence and severity of what `read_image` does with an unusual image."""
    if facts.orientation != 1:
        message = f"EXIF orientation {facts.orientation}: the image is turned before use, and its "
        yield "EXIF orientation", message + "annotation has to fit the turned image", "note"
    if facts.is_deep:
        message = f"one channel of more than 8 bits (mode {facts.mode}): scaled to 8 bits"
        yield "16-bit image", message, "note"
    if facts.brightest is not None and facts.brightest < _DARK:
        message = f"the brightest pixel is {facts.brightest} of 255 after the scaling to 8 bits: "
        yield "dark 16-bit image", message + "stretch the values, or save 8 bits", "warning"
    if facts.pages > 1:
        yield "several pages", f"{facts.pages} pages: only the first is read", "warning"


def check_panoptic_file(
    annotation: Record,
    size: Size | None,
    path: Path,
    things: frozenset[int] = frozenset(),
    *,
    decode: bool = True,
) -> _Report:
    """Check that a PNG exists, can be read, has size and format, and agrees with the JSON.

    Args:
        annotation: the annotation record.
        size: of the image in the JSON; None: not stated.
        path: the PNG.
        things: ids of the thing categories.
        decode: False checks the header only.
    """
    image = image_name(annotation)
    if not path.is_file():
        return _Report([Problem("missing panoptic PNG", missing_file(path, "panoptic PNG"), image)])
    fault = png_fault(path)
    try:
        if not decode:
            problems = list(check_png_size(path, read_png_size(path), size, image))
            return _Report(problems + _format_problems(fault, image))
        segment_map = read_segment_map(path)
    except UserError as error:
        if fault is not None and str(error) == fault.message:
            return _Report(_format_problems(fault, image))
        return _Report([Problem("unreadable panoptic PNG", str(error), image)])
    height, width = segment_map.shape
    problems = list(check_png_size(path, (height, width), size, image))
    problems += _format_problems(fault, image)
    if isinstance(annotation.get("segments_info"), list):
        problems += check_pixels(annotation, segment_map, things)
    return _Report(problems, segment_map.size, int((segment_map == 0).sum()))


def _format_problems(fault: PngFault | None, image: str) -> list[Problem]:
    if fault is None:
        return []
    severity = "warning" if fault.is_readable else "error"
    return [Problem("wrong PNG format", fault.message, image, severity=severity)]


def check_image_size(
    path: str | Path, found: Size, stated: Size | None, image: str | None = None
) -> Iterator[Problem]:
    """Compare the size of an image, rotated according to its EXIF data, with the JSON."""
    if stated is not None and found != stated:
        message = f"image {path} is {_format(found)}, but in the JSON {_format(stated)}"
        if found == stated[::-1]:
            message += "; height and width are swapped, or the rotation in its EXIF data was missed"
        yield Problem("wrong image size", message, image)


def check_png_size(
    path: str | Path, found: Size, size: Size | None, image: str | None = None
) -> Iterator[Problem]:
    """Compare the size of a panoptic PNG with that of its image (None: unknown)."""
    if size is not None and found != size:
        message = f"panoptic PNG {path} is {_format(found)}, but its image is {_format(size)}"
        yield Problem("wrong panoptic PNG size", message, image)


def _format(size: Size) -> str:
    height, width = size
    return f"{width}x{height}"


# ---------------------------------------------------------------------------
# The files of a data set together
# ---------------------------------------------------------------------------


def _check_swapped_folders(
    pairs: Sequence[tuple[Record, Record]], image_root: Path, panoptic_root: Path
) -> Iterator[Problem]:
    """Check by the first pair of files whether each is in the folder of the other."""
    for image, annotation in pairs[:1]:
        image_file, png = str(image.get("file_name")), str(annotation.get("file_name"))
        is_right = (image_root / image_file).is_file() or (panoptic_root / png).is_file()
        if not is_right and (panoptic_root / image_file).is_file():
            message = f"the images are in the panoptic folder {panoptic_root}, not in {image_root}"
            yield Problem("swapped folders", f"{message}: swap the two")


def _check_void(reports: Sequence[_Report]) -> Iterator[Problem]:
    pixels = sum(report.pixels for report in reports)
    void = sum(report.void for report in reports)
    if pixels and void > _MUCH_VOID * pixels:
        message = f"{100 * void / pixels:.0f} % of the pixels are void: segments that a model "
        message += "invents there cost nothing in panoptic quality"
        yield Problem("much void", message, severity="warning")


def check_copies(paths: Iterable[Path]) -> Iterator[Problem]:
    """Check that no two image files of a data set have the same content."""
    for group in find_copies([("", path) for path in paths]):
        names = " and ".join(path.name for _, path in group)
        message = f"{names} are the same image"
        yield Problem("one image under two ids", message, severity="warning")


def check_shared_images(
    train: Mapping[str, Sequence[Path]], test: Mapping[str, Sequence[Path]]
) -> Iterator[Problem]:
    """Check that no image is in data sets for training and for evaluation.

    Args:
        train: the image files of the training sets by the name of the set.
        test: the same of the evaluation sets.
    """
    shared: dict[tuple[str, str], list[Path]] = defaultdict(list)
    named = [(name, path) for name, paths in chain(train.items(), test.items()) for path in paths]
    for group in find_copies(named):
        for name, path in group:
            others = {other for other, _ in group} & test.keys()
            if name in train:
                for other in others:
                    shared[name, other].append(path)
    for (name, other), paths in shared.items():
        message = f"{len(paths)} images of {name} are in {other}, too, the first is {paths[0]}: "
        message += "evaluation rewards what was learned by heart"
        yield Problem("train and test share images", message, severity="warning")


def find_copies(files: Sequence[tuple[str, Path]]) -> list[list[tuple[str, Path]]]:
    """Return groups of files with the same content; missing ones are left out.

    Args:
        files: paths, each with the name of its data set.
    """
    groups = [[item for item in files if item[1].is_file()]]
    # Most files differ in their size, and most others in their last bytes.
    for key in (_size_of, _tail_of, _digest_of):
        finer = []
        for group in groups:
            found: dict[Any, list[tuple[str, Path]]] = defaultdict(list)
            for item in group:
                found[key(item[1])].append(item)
            finer += [members for members in found.values() if len(members) > 1]
        groups = finer
    return groups


def _size_of(path: Path) -> int:
    return path.stat().st_size


def _tail_of(path: Path) -> bytes:
    with path.open("rb") as file:
        file.seek(-min(_TAIL_BYTES, _size_of(path)), os.SEEK_END)
        return file.read()


def _digest_of(path: Path) -> bytes:
    return hashlib.sha256(path.read_bytes()).digest()
