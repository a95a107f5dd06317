"""Image files in and out."""

from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt
from detectron2.data import detection_utils
from PIL import Image

from ..errors import UserError

ImageArray = npt.NDArray[np.uint8]


def read_image(path: str | Path) -> ImageArray:
    """Read an image as evaluation does: decoded by Pillow, turned as its EXIF data says.

    Returns:
        (H, W, 3) uint8, BGR.

    Raises:
        UserError: naming the file, if it is missing or no image.
    """
    try:
        image: ImageArray = detection_utils.read_image(str(path), format="BGR")
    except FileNotFoundError:
        raise UserError(f"image {path} does not exist") from None
    # Pillow reports damaged files with all of these.
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"image {path} cannot be read: {reason}") from error
    return np.ascontiguousarray(image)


def write_image(path: str | Path, image_rgb: ImageArray) -> None:
    """Write (H, W, 3) uint8 RGB; missing folders are created.

    Raises:
        UserError: the file cannot be written.
    """
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        written = cv2.imwrite(str(path), image_rgb[:, :, ::-1])
    except (OSError, cv2.error) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path} cannot be written: {reason}") from error
    if not written:
        raise UserError(f"{path} cannot be written: is its folder writable?")
