"""Images as files: reading, what a file holds, writing, and finding them in folders.

Shapes: H height, W width.
"""

import contextlib
import functools
import glob
import os
import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, NamedTuple

import cv2
import numpy as np
import numpy.typing as npt
from detectron2.utils.file_io import PathManager
from PIL import Image, UnidentifiedImageError

from ..errors import UserError, one_line
from .io import write_atomically

ImageArray = npt.NDArray[np.uint8]

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
EXIF_TRANSPOSITIONS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_EXIF_SIDEWAYS = (5, 6, 7, 8)
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


@functools.cache
def _known_formats() -> tuple[str, ...]:
    Image.init()
    with contextlib.suppress(ImportError):
        from pillow_heif import register_heif_opener

        register_heif_opener()
    return tuple(name for name in _FORMATS if name in Image.OPEN)


@contextlib.contextmanager
def reading(path: str | Path, role: str) -> Iterator[None]:
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
def opened(
    path: str | Path, role: str, max_pixels: int | None = MAX_PIXELS, *, check: bool = True
) -> Iterator[Image.Image]:
    """Open an image or a PNG, whose errors become `UserError`.

    Args:
        path: the file.
        role: see `reading`.
        max_pixels: see `read_image`.
        check: compare the checksums of a PNG, which Pillow does not compare while it decodes; False
            for readers of the header.
    """
    with reading(path, role), PathManager.open(str(path), "rb") as file:
        is_png = check and file.read(len(PNG_SIGNATURE)) == PNG_SIGNATURE
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
    with opened(path, "image", max_pixels) as image:
        image.load()
        orientation = orientation_of(image)
        color = _to_rgb(image)
        if orientation in EXIF_TRANSPOSITIONS:
            color = color.transpose(EXIF_TRANSPOSITIONS[orientation])
        pixels = np.asarray(color)
    return np.ascontiguousarray(pixels[:, :, ::-1] if image_format == "BGR" else pixels)


def _to_rgb(image: Image.Image) -> Image.Image:
    """Convert a loaded image to 8-bit RGB; ValueError for values without a rule."""
    if is_deep(image.mode):
        return Image.fromarray(_eight_bits(image)).convert("RGB")
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # Pillow warns about the direct conversion
    return image if image.mode == "RGB" else image.convert("RGB")


def is_deep(mode: str) -> bool:
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


def orientation_of(image: Image.Image) -> int:
    """Return the EXIF orientation, 1 (upright) to 8."""
    # The base class's getexif: the override for PNG files decodes all pixels.
    found = Image.Image.getexif(image).get(_EXIF_ORIENTATION)
    return found if found in EXIF_TRANSPOSITIONS else 1


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
        return is_deep(self.mode)


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
    with opened(path, "image", max_pixels, check=decode) as image:
        # The photographs of some telephones hold a preview as their second page.
        pages = 1 if image.format in ("JPEG", "MPO") else getattr(image, "n_frames", 1)
        orientation, mode, (width, height) = orientation_of(image), image.mode, image.size
        sideways = orientation in _EXIF_SIDEWAYS
        if image.format == "TIFF":  # Pillow rotates this format while it decodes
            image.load()
            (width, height), sideways = image.size, False
        elif decode:
            # A JPEG file is read to its end, but its pixels are computed at an eighth of the size.
            image.draft(None, (max(1, width // 8), max(1, height // 8)))
            image.load()
        brightest = int(_eight_bits(image).max()) if decode and is_deep(mode) else None
    size = (width, height) if sideways else (height, width)
    return ImageFacts(size, mode, orientation, pages, brightest)


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
