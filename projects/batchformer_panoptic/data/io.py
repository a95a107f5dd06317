"""Files: reading and writing of images, panoptic PNGs and JSON; segment maps; prepared folders.

H, W: height and width of an image in pixels.
"""

import contextlib
import functools
import glob
import json
import os
import re
import shutil
import unicodedata
import uuid
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

import cv2
import numpy as np
import numpy.typing as npt
from detectron2.utils.file_io import PathManager
from panopticapi.utils import id2rgb
from PIL import Image, UnidentifiedImageError

from ..errors import UserError, one_line, refusal_of

ImageArray = npt.NDArray[np.uint8]
IntArray = npt.NDArray[np.integer[Any]]

# ---------------------------------------------------------------------------
# Images and panoptic PNGs
# ---------------------------------------------------------------------------

# Of the files that count as images when a folder is searched.
IMAGE_SUFFIXES = frozenset(
    {".avif", ".bmp", ".gif", ".heic", ".heif", ".jp2", ".jpeg", ".jpg", ".png", ".ppm"}
    | {".tif", ".tiff", ".webp"}
)
# Pillow also opens formats that start other programs (EPS) or that no camera writes. HEIF needs
# pillow-heif (the extra "heic"), AVIF a recent Pillow.
_FORMATS = ("AVIF", "BMP", "GIF", "HEIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
_HEIC_SUFFIXES = (".heic", ".heif")
# The default of INPUT.MAX_PIXELS, above which Pillow warns of files made to exhaust the memory.
MAX_PIXELS = 89_478_485
_EXIF_ORIENTATION = 0x0112
_EXIF_TRANSPOSITIONS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_EXIF_SIDEWAYS = (5, 6, 7, 8)
_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_JPEG_SIGNATURE = b"\xff\xd8\xff"
_PNG_RGB, _PNG_RGBA = 2, 6  # color types, byte 25 of the header
_PNG_COLOR_TYPES = {
    0: "grey",
    _PNG_RGB: "RGB",
    3: "palette",
    4: "grey with alpha",
    _PNG_RGBA: "RGBA",
}


@functools.cache
def _known_formats() -> tuple[str, ...]:
    Image.init()
    with contextlib.suppress(ImportError):
        from pillow_heif import register_heif_opener

        register_heif_opener()
    return tuple(name for name in _FORMATS if name in Image.OPEN)


@contextlib.contextmanager
def _reading(path: str | Path, role: str) -> Iterator[None]:
    """Convert Pillow's errors for a missing or damaged file to `UserError`.

    Args:
        path: the file.
        role: precedes the path in the message, such as "image".
    """
    try:
        yield
    except UserError:
        raise
    except FileNotFoundError:
        raise UserError(missing_file(path, role)) from None
    except UnidentifiedImageError:  # its message may show a file object
        reason = "unknown image format (datasets/README.md lists those that are read)"
        if Path(path).suffix.lower() in _HEIC_SUFFIXES and "HEIF" not in _known_formats():
            reason = "HEIC needs the package pillow-heif (pip install pillow-heif)"
        raise UserError(f"{role} {path} cannot be read: {reason}") from None
    except Exception as error:  # damaged files raise anything in Pillow's many readers
        reason = one_line(error) or type(error).__name__
        raise UserError(f"{role} {path} cannot be read: {reason}") from error


def missing_file(path: str | Path, role: str) -> str:
    """Return the sentence about a file that does not exist.

    It names the likely cause: a file whose name differs in the extension, in upper and lower case
    or in the form of its accents, or back slashes.
    """
    path = Path(path)
    hint = ""
    if "\\" in path.name:
        hint = " (write / instead of \\ in file names)"
    elif path.parent.is_dir():
        files = _files_by_stem(path.parent, path.parent.stat().st_mtime_ns)
        other = files.get(_comparable(path.stem))
        hint = f" ({other} exists)" if other else ""
    return f"{role} {path} does not exist{hint}"


def _comparable(name: str) -> str:
    return unicodedata.normalize("NFC", name).casefold()


@functools.lru_cache(maxsize=4)
def _files_by_stem(folder: Path, _modified_ns: int) -> dict[str, str]:
    """Return the names of the files of a folder by their comparable stems.

    A set may lack thousands of files, and the folder should be listed once for all of them. The
    time of its modification keeps an old listing from being used.
    """
    return {_comparable(Path(entry).stem): entry for entry in sorted(os.listdir(folder))}


def open_image(file: IO[bytes]) -> Image.Image:
    """Open an image of one of the formats that are read here; all readers open images here.

    Raises:
        UnidentifiedImageError: another format, and other errors of Pillow.
    """
    return Image.open(file, formats=_known_formats())


@contextlib.contextmanager
def _opened(
    path: str | Path, role: str, max_pixels: int | None = MAX_PIXELS, *, check: bool = True
) -> Iterator[Image.Image]:
    """Open an image or a PNG, whose errors become `UserError`.

    Args:
        path: the file.
        role: see `_reading`.
        max_pixels: see `read_image`.
        check: compare the checksums of a PNG, which Pillow does not compare while it decodes; False
            for readers of the header.
    """
    with _reading(path, role), PathManager.open(str(path), "rb") as file:
        is_png = check and file.read(len(_PNG_SIGNATURE)) == _PNG_SIGNATURE
        file.seek(0)
        with _whole_png() if is_png else contextlib.nullcontext():
            image = open_image(file)
        width, height = image.size
        if max_pixels is not None and width * height > max_pixels:
            raise UserError(
                f"{role} {path} has {width} x {height} = {width * height} pixels, more than "
                f"INPUT.MAX_PIXELS {max_pixels}: shrink it, or raise that key"
            )
        if is_png:
            with _whole_png():
                image.verify()
            file.seek(0)
            image = open_image(file)  # Pillow asks for it
        with image:
            yield image


@contextlib.contextmanager
def _whole_png() -> Iterator[None]:
    try:
        yield
    except (OSError, SyntaxError):
        raise ValueError("it is cut off, or one of its checksums is wrong") from None


def read_image(
    path: str | Path, image_format: str = "BGR", *, max_pixels: int | None = MAX_PIXELS
) -> ImageArray:
    """Read an image as 8-bit color and rotate it according to its EXIF data.

    Training, evaluation, demo and tools all read images here, and by one rule: grey becomes three
    equal channels; transparency is ignored; of 16 bits the upper 8 are kept; floating-point grey
    from 0 to 1 becomes 0 to 255; of several pages the first is read. 32-bit integers and
    floating-point values outside 0 to 1 have no such rule and are refused.

    Args:
        path: a local path, or a URI that Detectron2's PathManager supports, of an AVIF, BMP, GIF,
            JPEG, JPEG 2000, PNG, PPM, TIFF or WebP file; HEIC with the package pillow-heif.
        image_format: order of the channels, "BGR" or "RGB".
        max_pixels: INPUT.MAX_PIXELS, of which larger images are refused before they are decoded;
            None: what Pillow reads.

    Returns:
        (H, W, 3) uint8.

    Raises:
        UserError: the file is missing or damaged, too large, or has values without a rule.
    """
    with _opened(path, "image", max_pixels) as image:
        image.load()
        orientation = _orientation(image)
        color = _to_rgb(image)
        if orientation in _EXIF_TRANSPOSITIONS:
            color = color.transpose(_EXIF_TRANSPOSITIONS[orientation])
        pixels = np.asarray(color)
    return np.ascontiguousarray(pixels[:, :, ::-1] if image_format == "BGR" else pixels)


def _to_rgb(image: Image.Image) -> Image.Image:
    """Convert a loaded image to 8-bit RGB; ValueError for values without a rule."""
    if _is_deep(image.mode):
        return Image.fromarray(_eight_bits(image)).convert("RGB")
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # Pillow warns about the direct conversion
    return image if image.mode == "RGB" else image.convert("RGB")


def _is_deep(mode: str) -> bool:
    """Return whether a mode of Pillow has more than 8 bits per channel; it would clip them."""
    return mode == "F" or mode.startswith("I")


def _eight_bits(image: Image.Image) -> ImageArray:
    """Scale one channel of 16 bits or of floating point to (H, W) uint8."""
    values = np.asarray(image)
    if image.mode == "F":
        low, high = float(values.min()), float(values.max())
        if not (low >= 0 and high <= 1):  # also False for NaN
            raise ValueError(
                f"floating-point values from {low:g} to {high:g}; scale them to 0 to 1, or save "
                "the image with 8 bits"
            )
        return (values * 255).round().astype(np.uint8)
    # Pillow returns 16-bit PNG and PGM files as 32 bits in some versions.
    if image.mode == "I" and image.format not in ("PNG", "PPM"):
        raise ValueError("32-bit integers; save the image with 8 or 16 bits")
    return (values >> 8).astype(np.uint8)


def _orientation(image: Image.Image) -> int:
    """Return the EXIF orientation, 1 (upright) to 8."""
    # The base class's getexif: the override for PNG files decodes all pixels.
    found = Image.Image.getexif(image).get(_EXIF_ORIENTATION)
    return found if found in _EXIF_TRANSPOSITIONS else 1


class ImageFacts(NamedTuple):
    """Properties of an image file that `read_image` acts on.

    Attributes:
        size: (H, W) of the image as `read_image` returns it.
        mode: the color mode in Pillow's notation, such as "RGB" or "I;16".
        orientation: EXIF orientation, 1 (upright) to 8.
        pages: of which `read_image` reads the first.
        brightest: the largest of its 8-bit values, only of decoded images with `is_deep`.
    """

    size: tuple[int, int]
    mode: str
    orientation: int
    pages: int
    brightest: int | None = None

    @property
    def is_deep(self) -> bool:
        """Whether it has one channel of more than 8 bits."""
        return _is_deep(self.mode)


def read_image_facts(
    path: str | Path, *, decode: bool = True, max_pixels: int | None = MAX_PIXELS
) -> ImageFacts:
    """Return size and kind of an image as `read_image` would read it.

    Args:
        path: see `read_image`.
        decode: also decode the whole file, which finds damaged ones and values without a rule;
            False reads the header only.
        max_pixels: see `read_image`.

    Raises:
        UserError: as for `read_image`.
    """
    with _opened(path, "image", max_pixels, check=decode) as image:
        # The photographs of some telephones hold a preview as their second page.
        pages = 1 if image.format in ("JPEG", "MPO") else getattr(image, "n_frames", 1)
        orientation, mode, (width, height) = _orientation(image), image.mode, image.size
        sideways = orientation in _EXIF_SIDEWAYS
        if image.format == "TIFF":  # Pillow rotates this format while it decodes
            image.load()
            (width, height), sideways = image.size, False
        elif decode:
            # A JPEG file is read to its end, but its pixels are computed at an eighth of the size.
            image.draft(None, (max(1, width // 8), max(1, height // 8)))
            image.load()
        brightest = int(_eight_bits(image).max()) if decode and _is_deep(mode) else None
    size = (width, height) if sideways else (height, width)
    return ImageFacts(size, mode, orientation, pages, brightest)


def read_segment_map(path: str | Path) -> npt.NDArray[np.int32]:
    """Decode a panoptic PNG to its segment map.

    EXIF data is ignored, as in panopticapi.

    Args:
        path: a PNG in RGB or RGBA; a fourth channel is ignored.

    Returns:
        (H, W) int32, the segment id R + 256 G + 65536 B of every pixel; 0 is void.

    Raises:
        UserError: the file is missing or damaged, is not a PNG, or has another color mode.
    """
    pixels = None
    with _opened(path, "panoptic PNG") as image:
        width, height = image.size
        if image.format == "PNG" and image.mode in ("RGB", "RGBA"):
            # With four bytes per pixel the buffer already holds little-endian integers.
            pixels = image.tobytes("raw", "RGBX" if image.mode == "RGB" else "RGBA")
    if pixels is None:
        fault = png_fault(path)
        assert fault is not None, path
        raise UserError(fault.message)
    return np.frombuffer(pixels, dtype="<i4").reshape(height, width) & 0xFFFFFF


def read_index_map(path: str | Path) -> npt.NDArray[np.int32]:
    """Read a label image: the value of a grey image, or the index of a palette.

    Args:
        path: an image with one channel of up to 16 bits, or of 32 signed bits.

    Returns:
        (H, W) int32.

    Raises:
        UserError: the file is missing or damaged, or has several channels.
    """
    with _opened(path, "label image") as image:
        mode, pixels = image.mode, np.asarray(image)
    if pixels.ndim != 2:
        raise UserError(
            f"label image {path} is {mode}, and its values are not indices: save it with a palette "
            "or in grey"
        )
    return pixels.astype(np.int32)


def possible_segment_maps(path: str | Path) -> list[npt.NDArray[np.int32]]:
    """Decode a panoptic PNG of any color mode to the segment maps that it may stand for.

    Returns:
        (H, W) int32 each: colors as ids, with red first and with blue first, and the values of a
        grey image or the indices of a palette; of 16-bit grey only the values.

    Raises:
        UserError: the file is missing or damaged.
    """
    with _opened(path, "panoptic PNG") as image:
        image.load()
        maps = []
        if not _is_deep(image.mode):
            red, green, blue = np.moveaxis(np.asarray(image.convert("RGB"), dtype=np.int32), -1, 0)
            maps = [red | green << 8 | blue << 16, blue | green << 8 | red << 16]
            if (red == green).all() and (red == blue).all():
                maps.append(red)
        if _is_deep(image.mode) or image.mode == "P":
            maps.append(np.asarray(image, dtype=np.int32))
    return maps


def read_png_size(path: str | Path) -> tuple[int, int]:
    """Return (H, W) of a panoptic PNG from its header.

    Raises:
        UserError: the file is missing or is not an image.
    """
    with _opened(path, "panoptic PNG", check=False) as image:
        width, height = image.size
    return height, width


class PngFault(NamedTuple):
    """The difference between a panoptic PNG and one of 8-bit RGB."""

    message: str
    is_readable: bool  # `read_segment_map` reads it all the same


def png_fault(path: str | Path) -> PngFault | None:
    """Compare the header of a file with that of an 8-bit RGB PNG.

    Pillow's ``mode`` is not enough: it also reads 16-bit channels as 8 bits.
    """
    with open(path, "rb") as file:
        header = file.read(26)
    remedy = "tools/check_dataset.py --fix writes such PNGs again"
    if header.startswith(_JPEG_SIGNATURE):
        found, remedy = "not a PNG but a JPEG, which changes ids", "export the masks again as PNG"
    elif not header.startswith(_PNG_SIGNATURE):
        found, remedy = "not a PNG", "export the masks again as PNG"
    elif len(header) < 26:
        found, remedy = "cut off within its header", "copy it again"
    else:
        depth, color_type = header[24], header[25]
        if (depth, color_type) == (8, _PNG_RGB):
            return None
        found = f"a PNG of {depth}-bit {_PNG_COLOR_TYPES.get(color_type, color_type)}"
        if color_type in (_PNG_RGB, _PNG_RGBA):
            read = "the fourth channel is ignored" if depth == 8 else "the upper 8 bits are read"
            return PngFault(f"panoptic PNG {path} is {found}; {read}", True)
    return PngFault(
        f"panoptic PNG {path} is {found}; segment ids need a PNG of 8-bit RGB ({remedy})", False
    )


def write_image(path: str | Path, image_rgb: ImageArray) -> None:
    """Write (H, W, 3) uint8 RGB as a whole or not at all; missing folders are created.

    Raises:
        UserError: the file cannot be written, or its ending is not that of an image format.
    """
    try:
        done, content = cv2.imencode(Path(path).suffix, image_rgb[:, :, ::-1])
    except cv2.error as error:
        raise UserError(f"{path} cannot be written: {one_line(error)}") from error
    if not done:
        raise UserError(f"{path} cannot be written: the picture cannot be encoded")
    write_atomically(str(path), lambda name: Path(name).write_bytes(content.tobytes()))


def write_segment_map(path: str | Path, segment_map: IntArray) -> None:
    """Write an (H, W) segment map as a panoptic PNG, which `read_segment_map` reads.

    Raises:
        UserError: the file cannot be written.
    """
    write_image(path, id2rgb(segment_map))


def find_images(inputs: Sequence[str], *, outside: str | Path | None = None) -> list[str]:
    """List the images of files, folders and globs, each once.

    Args:
        inputs: a file is kept even if it does not exist, so that reading it names it. Folders are
            searched recursively, in the order of the names and without hidden files.
        outside: a folder below an input folder that is left out, such as that of the output.

    Raises:
        UserError: no image is found.
    """
    found: list[str] = []
    for name in inputs:
        if os.path.isdir(name):
            found += _images_below(name, outside)
        elif glob.has_magic(name) and not os.path.exists(name):
            found += sorted(f for f in glob.glob(name, recursive=True) if os.path.isfile(f))
        else:
            found.append(name)
    if not found:
        suffixes = ", ".join(sorted(IMAGE_SUFFIXES))
        raise UserError(f"no images in {' '.join(inputs)}: looked for {suffixes}")
    return list({os.path.abspath(name): name for name in reversed(found)}.values())[::-1]


def _images_below(folder: str, outside: str | Path | None) -> list[str]:
    left_out = None if outside is None else os.path.realpath(outside)
    found = []
    for parent, folders, files in os.walk(folder):
        paths = {name: os.path.realpath(os.path.join(parent, name)) for name in folders}
        folders[:] = [n for n in folders if not n.startswith(".") and paths[n] != left_out]
        found += [
            os.path.join(parent, name)
            for name in files
            if not name.startswith(".") and Path(name).suffix.lower() in IMAGE_SUFFIXES
        ]
    return sorted(found)


# ---------------------------------------------------------------------------
# JSON
# ---------------------------------------------------------------------------


def read_json(path: str | Path) -> Any:
    """Return the content of a JSON file.

    Raises:
        UserError: the file is missing, unreadable or not JSON.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {one_line(error)}") from error


def read_json_lines(path: str | Path) -> list[dict[str, Any]]:
    """Return the objects of a file with one of them on each line, such as ``metrics.json``.

    A line that is not an object is left out: a process that is killed may leave half of one.

    Raises:
        UserError: the file is missing or unreadable.
    """
    try:
        lines = Path(path).read_bytes().splitlines()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {one_line(error)}") from error
    return [found for found in map(parse_object, lines) if found is not None]


def parse_object(line: bytes) -> dict[str, Any] | None:
    """Return the JSON object of a line, or None if it has none."""
    try:
        found = json.loads(line)
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


# Parsed annotations take several times the size of their file and stay for the whole run, so that
# only files up to this many bytes together are kept. COCO's panoptic_val2017.json has 12 MB.
_CACHED_BYTES = 64 * 2**20

# Absolute path -> modification time in ns, size in bytes, content; least recently used first.
_cached: OrderedDict[str, tuple[int, int, dict[str, Any]]] = OrderedDict()


def read_coco_json(path: str | Path) -> dict[str, Any]:
    """Return the object in a COCO JSON file.

    Registration, dataset dicts and evaluators read the same file. It is parsed again only when
    its modification time or size has changed, or when it is too large to keep.

    Args:
        path: a local path or a URI that Detectron2's PathManager supports.

    Returns:
        The parsed object. It is shared between callers and must not be changed.

    Raises:
        UserError: the file is missing or unreadable, or does not hold a JSON object.
    """
    try:
        local_path = os.path.abspath(PathManager.get_local_path(str(path)))
        status = os.stat(local_path)
        state = (status.st_mtime_ns, status.st_size)
        if local_path in _cached and _cached[local_path][:2] == state:
            _cached.move_to_end(local_path)
            return _cached[local_path][2]
        # "utf-8-sig" accepts a byte-order mark, which editors and PowerShell write.
        with open(local_path, encoding="utf-8-sig") as file:
            content = json.load(file)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or one_line(error)}") from error
    except UnicodeDecodeError:
        raise UserError(f"{path} is not in UTF-8: save it in that encoding") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON: {one_line(error)}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}, not COCO's JSON object")
    _cached.pop(local_path, None)
    if status.st_size <= _CACHED_BYTES:
        _cached[local_path] = (*state, content)
        while sum(size for _, size, _ in _cached.values()) > _CACHED_BYTES:
            _cached.popitem(last=False)
    return content


# ---------------------------------------------------------------------------
# Writing
# ---------------------------------------------------------------------------


@contextlib.contextmanager
def writing(path: str | Path) -> Iterator[None]:
    """Convert a refusal of the system inside the block (disk full, no rights) to `UserError`.

    Args:
        path: the file or folder that the block writes; named in the message.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        refusal = refusal_of(error)
        if refusal is None:
            raise
        raise UserError(f"cannot write {path}: {refusal.strerror}") from error


def write_atomically(path: str, save: Callable[[str], object]) -> None:
    """Write a file as a whole or not at all.

    Args:
        path: the target. Its folder is created; of a symbolic link, the file it points to is
            replaced.
        save: writes the temporary file whose name it is given: in the target's folder, with the
            target's ending. When it raises, the target is unchanged and nothing is left behind.

    Raises:
        UserError: the target is a folder, or the system refuses.
    """
    target = os.path.realpath(path)
    folder, name = os.path.split(target)
    if os.path.isdir(target):
        raise UserError(f"cannot write {path}: it is a folder")
    # tempfile would make the file unreadable for other users. `save` may need the ending.
    stem, ending = os.path.splitext(name)
    temporary = os.path.join(folder, f".{stem}.{uuid.uuid4().hex}{ending}")
    try:
        with writing(path):
            os.makedirs(folder, exist_ok=True)
            save(temporary)
            with open(temporary, "rb") as file:
                os.fsync(file.fileno())  # without it, a power failure could leave an empty file
            os.replace(temporary, target)
    finally:
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            os.remove(temporary)


# A temporary file of `write_atomically`: a dot, the stem, 32 hexadecimal digits and the ending.
_TEMPORARY = re.compile(r"\.(.+)\.[0-9a-f]{32}(\.[^.]+)?")


def name_of_temporary(name: str) -> str | None:
    """Return the name of the file that `write_atomically` was writing, or None.

    Args:
        name: of a file that may be one of its temporary files, which only a killed process leaves.
    """
    found = _TEMPORARY.fullmatch(name)
    return None if found is None else found[1] + (found[2] or "")


def write_json(path: str | Path, content: Any, *, indent: int | None = None) -> None:
    """Write a JSON file as a whole or not at all; missing folders are created.

    Raises:
        ValueError: the content has a NaN or an infinity, which JSON cannot hold.
        UserError: the file cannot be written.
    """
    write_text(path, json.dumps(content, indent=indent, allow_nan=False) + "\n")


def write_text(path: str | Path, text: str) -> None:
    """Write a text file in UTF-8 as a whole or not at all; missing folders are created.

    Raises:
        UserError: the file cannot be written.
    """
    write_atomically(str(path), lambda name: _write_utf8(name, text))


def _write_utf8(path: str, text: str) -> None:
    Path(path).write_text(text, encoding="utf-8")


# ---------------------------------------------------------------------------
# Segment maps
# ---------------------------------------------------------------------------


class Extent(NamedTuple):
    """Pixels of a segment; ``bbox_xywh`` is tight, in pixels."""

    area: int
    bbox_xywh: tuple[int, int, int, int]


def runs(
    *segment_maps: IntArray, within_rows: bool = False
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Find the runs of pixels, read row by row, over which none of the maps changes.

    There are far fewer runs than pixels, so that work per run is much cheaper than per pixel.

    Args:
        *segment_maps: (H, W) integers, all of one shape.
        within_rows: also end a run at the end of its row.

    Returns:
        First pixel of every run, as a position in the flattened map, and its length in pixels.
    """
    first = segment_maps[0].ravel()
    is_start = np.ones(first.size, dtype=bool)
    np.not_equal(first[1:], first[:-1], out=is_start[1:])
    for segment_map in segment_maps[1:]:
        flat = segment_map.ravel()
        is_start[1:] |= flat[1:] != flat[:-1]
    if within_rows:
        is_start.reshape(segment_maps[0].shape)[:, :1] = True
    starts = np.flatnonzero(is_start)
    return starts, np.diff(starts, append=first.size)


def segment_extents(segment_map: IntArray) -> dict[int, Extent]:
    """Return area and box of every id in a segment map, except void (0)."""
    height, width = segment_map.shape
    starts, lengths = runs(segment_map, within_rows=True)
    ids, index = np.unique(segment_map.ravel()[starts], return_inverse=True)
    top, left = np.full(len(ids), height), np.full(len(ids), width)
    bottom, right = np.zeros(len(ids), int), np.zeros(len(ids), int)
    rows, columns = np.divmod(starts, width)
    np.minimum.at(top, index, rows)
    np.maximum.at(bottom, index, rows + 1)
    np.minimum.at(left, index, columns)
    np.maximum.at(right, index, columns + lengths)
    areas = np.bincount(index, weights=lengths).astype(int)
    boxes = np.stack([left, top, right - left, bottom - top], axis=1)
    found = zip(ids.tolist(), areas.tolist(), boxes.tolist(), strict=True)
    return {key: Extent(area, tuple(box)) for key, area, box in found if key != 0}


def turn_by_exif(segment_map: npt.NDArray[np.int32], image: str | Path) -> npt.NDArray[np.int32]:
    """Turn a segment map made for an image as it is stored like `read_image` turns the image.

    Raises:
        UserError: the image is missing or is not readable.
    """
    with _opened(image, "image", check=False) as stored:
        orientation = _orientation(stored)
    if orientation not in _EXIF_TRANSPOSITIONS:
        return segment_map
    return np.asarray(Image.fromarray(segment_map).transpose(_EXIF_TRANSPOSITIONS[orientation]))


# ---------------------------------------------------------------------------
# Folders that a command fills
# ---------------------------------------------------------------------------

MANIFEST = "manifest.json"


class PreparedFolder:
    """A folder that one command fills.

    A manifest in the folder records the settings of the command. It is marked complete last, so
    that an unfinished set, or one made with other settings, is not mistaken for the requested one.
    Folders without a manifest of the command are never changed.

    Args:
        path: the folder; it need not exist.
        settings: everything that determines the content; ``generator`` names the command.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        self._path = path
        self._settings = dict(settings)

    def is_done(self, is_intact: Callable[[], bool], *, overwrite: bool) -> bool:
        """Return whether the folder already holds the requested set.

        Args:
            is_intact: called for a complete set; returns whether all its files still exist.
            overwrite: replace a set of this command, even a complete one.

        Raises:
            UserError: the folder holds other files, or an unfinished or different set and
                ``overwrite`` is False.
        """
        found = self._read_manifest()
        if overwrite or found is None:
            return False
        if found == {**self._settings, "complete": True} and is_intact():
            return True
        raise UserError(
            f"{self._path} holds {self._describe(found)}; add --overwrite to replace it"
        )

    @contextlib.contextmanager
    def filling(self, folders: Sequence[str]) -> Iterator[None]:
        """Remove the old content before the block and mark the folder complete after it.

        Args:
            folders: names of all subfolders that the command writes.
        """
        self._path.mkdir(parents=True, exist_ok=True)
        write_json(self._path / MANIFEST, {**self._settings, "complete": False})
        for folder in folders:
            if (self._path / folder).exists():
                shutil.rmtree(self._path / folder)
        yield
        write_json(self._path / MANIFEST, {**self._settings, "complete": True})

    def _read_manifest(self) -> dict[str, Any] | None:
        """Return the manifest of this command, or None for a new or empty folder."""
        if not self._path.exists():
            return None
        if not self._path.is_dir():
            raise UserError(f"{self._path} is a file; name a new folder")
        if not any(self._path.iterdir()):
            return None
        try:
            manifest = read_json(self._path / MANIFEST)
        except UserError:
            manifest = None
        if (
            not isinstance(manifest, dict)
            or manifest.get("generator") != self._settings["generator"]
        ):
            raise UserError(f"{self._path} holds other files; name a new or empty folder")
        return manifest

    def _describe(self, found: Mapping[str, Any]) -> str:
        changed = [
            f"{key} {found.get(key)} (requested: {value})"
            for key, value in self._settings.items()
            if found.get(key) != value
        ]
        return "a set with " + ", ".join(changed) if changed else "an incomplete set"
