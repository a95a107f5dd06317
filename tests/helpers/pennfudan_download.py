"""A stand-in for PennFudanPed.zip: its names and layout with small random pictures."""

import io
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image

NUMBERS = {"FudanPed": 74, "PennPed": 96}


def write_download(path: Path, *, height: int = 24, width: int = 32) -> Path:
    """Write the zip file: photograph N shows 1 + N % 3 persons, as rectangles."""
    with zipfile.ZipFile(path, "w") as archive:
        for series, count in NUMBERS.items():
            for number in range(1, count + 1):
                name = f"{series}{number:05d}"
                mask = np.zeros((height, width), np.uint8)
                for person in range(1, 2 + number % 3):
                    mask[4:20, 8 * person : 8 * person + 6] = person
                photograph = np.random.default_rng(number).integers(0, 255, (height, width, 3))
                photograph[mask > 0] //= 2
                for file, pixels in (
                    (f"PNGImages/{name}.png", photograph.astype(np.uint8)),
                    (f"PedMasks/{name}_mask.png", mask),
                ):
                    content = io.BytesIO()
                    Image.fromarray(pixels).save(content, "PNG")
                    archive.writestr(f"PennFudanPed/{file}", content.getvalue())
    return path
