"""Readers and writers of files: images, panoptic PNGs and JSON.

H, W: height and width of an image in pixels.
"""

import contextlib
import json
import os
import struct
import uuid
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
from detectron2.data import detection_utils
from detectron2.utils.file_io import PathManager
from PIL import Image, UnidentifiedImageError

from ..errors import UserError, one_line

ImageArray = npt.NDArray[np.uint8]
IntArray = npt.NDArray[np.integer[Any]]

# ---------------------------------------------------------------------------
# Images and panoptic PNGs
# ---------------------------------------------------------------------------

_EXIF_ORIENTATION, _EXIF_SIDEWAYS = 0x0112, (5, 6, 7, 8)
_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_PNG_RGB = 2  # the color type, byte 25 of the header
_PNG_COLOR_TYPES = {0: "grey", _PNG_RGB: "RGB", 3: "palette", 4: "grey with alpha", 6: "RGBA"}


@contextlib.contextmanager
def _reading(path: str | Path, role: str) -> Iterator[None]:
    """Convert Pillow's errors for a missing or damaged file to `UserError`.

    Args:
        path: the file.
        role: precedes the path in the message, such as "image".
    """
    try:
        yield
    except FileNotFoundError:
        raise UserError(missing_file(path, role)) from None
    except UnidentifiedImageError:  # its message may show a file object
        raise UserError(f"{role} {path} cannot be read: unknown image format") from None
    # Pillow reports damaged files with any of these; struct.error comes from damaged EXIF data.
    except (OSError, SyntaxError, ValueError, struct.error, Image.DecompressionBombError) as error:
        raise UserError(f"{role} {path} cannot be read: {one_line(error)}") from error


def missing_file(path: str | Path, role: str) -> str:
    """Return the sentence about a file that does not exist.

    It names a file that differs in the extension only, if there is one.
    """
    others = (Path(path).with_suffix(suffix) for suffix in (".jpg", ".jpeg", ".png"))
    hint = next((f" ({other.name} exists)" for other in others if other.is_file()), "")
    return f"{role} {path} does not exist{hint}"


def read_image(path: str | Path, image_format: str = "BGR") -> ImageArray:
    """Read an image and rotate it according to its EXIF data.

    Args:
        path: a file that Pillow can decode, in any color mode.
        image_format: order of the channels, "BGR" or "RGB".

    Returns:
        (H, W, 3) uint8.

    Raises:
        UserError: the file is missing or is not a readable image.
    """
    with _reading(path, "image"):
        image: ImageArray = detection_utils.read_image(str(path), format=image_format)
    return np.ascontiguousarray(image)


def read_image_size(path: str | Path, *, decode: bool = True) -> tuple[int, int]:
    """Return (H, W) of an image as `read_image` would read it.

    Args:
        path: the image.
        decode: also decode every pixel, which finds truncated files; False reads the header only.

    Raises:
        UserError: the file is missing or is not a readable image.
    """
    with _reading(path, "image"), Image.open(path) as image:
        if decode:
            image.load()
        # The base class's getexif: the override for PNG files decodes all pixels.
        exif = Image.Image.getexif(image)
        width, height = image.size
        sideways = exif.get(_EXIF_ORIENTATION) in _EXIF_SIDEWAYS
    return (width, height) if sideways else (height, width)


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
    with _reading(path, "panoptic PNG"), Image.open(path) as image:
        width, height = image.size
        if image.format == "PNG" and image.mode in ("RGB", "RGBA"):
            # With four bytes per pixel the buffer already holds little-endian integers.
            pixels = image.tobytes("raw", "RGBX" if image.mode == "RGB" else "RGBA")
    if pixels is None:
        raise UserError(str(png_format_fault(path)))
    return np.frombuffer(pixels, dtype="<i4").reshape(height, width) & 0xFFFFFF


def png_format_fault(path: str | Path) -> str | None:
    """Compare the header of a file with that of an 8-bit RGB PNG.

    Pillow's ``mode`` is not enough: it also reads 16-bit channels as 8 bits.

    Returns:
        A sentence, or None for an 8-bit RGB PNG.
    """
    with open(path, "rb") as file:
        header = file.read(26)
    if not header.startswith(_PNG_SIGNATURE):
        found = "not a PNG"
    else:
        depth, color_type = header[24], header[25]
        if (depth, color_type) == (8, _PNG_RGB):
            return None
        found = f"a PNG of {depth}-bit {_PNG_COLOR_TYPES.get(color_type, color_type)}"
    return f"panoptic PNG {path} is {found}; segment ids need a PNG of 8-bit RGB"


def write_image(path: str | Path, image_rgb: ImageArray) -> None:
    """Write (H, W, 3) uint8 RGB; missing folders are created.

    Raises:
        UserError: the file cannot be written.
    """
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        written = cv2.imwrite(str(path), image_rgb[:, :, ::-1])
    except (OSError, cv2.error) as error:
        raise UserError(f"{path} cannot be written: {one_line(error)}") from error
    if not written:
        raise UserError(f"{path} cannot be written: is its folder writable?")


# ---------------------------------------------------------------------------
# COCO's JSON
# ---------------------------------------------------------------------------

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
        with open(local_path, encoding="utf-8") as file:
            content = json.load(file)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or one_line(error)}") from error
    except ValueError as error:
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


def write_atomically(path: str, save: Callable[[str], None]) -> None:
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
        os.makedirs(folder, exist_ok=True)
        save(temporary)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())  # without it, a power failure could leave an empty file
        os.replace(temporary, target)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            os.remove(temporary)


def write_json(path: str | Path, content: Any, *, indent: int | None = None) -> None:
    """Write a JSON file as a whole or not at all; missing folders are created.

    Raises:
        ValueError: the content has a NaN or an infinity, which JSON cannot hold.
        UserError: the file cannot be written.
    """
    text = json.dumps(content, indent=indent, allow_nan=False) + "\n"
    write_atomically(str(path), lambda name: _write_text(name, text))


def _write_text(path: str, text: str) -> None:
    Path(path).write_text(text, encoding="utf-8")
