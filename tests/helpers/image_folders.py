"""Tiny image folders on disk: a folder for each class."""

import itertools
from pathlib import Path

import numpy as np
from PIL import Image

CLASSES = ("ant", "bee", "cat")
_numbers = itertools.count()


def write_image_folder(
    root: Path, counts: tuple[int, ...] = (2, 3, 1), size: tuple[int, int] = (12, 16)
) -> Path:
    """Noise around one grey level per class, alternately PNG and JPEG; ``size``: height, width."""
    for label, (name, count) in enumerate(zip(CLASSES, counts, strict=False)):
        (root / name).mkdir(parents=True)
        for number in range(count):
            rng = np.random.default_rng([label, number])
            pixels = 60 * label + rng.integers(0, 60, (*size, 3))
            path = root / name / f"{number}.{('png', 'jpg')[number % 2]}"
            Image.fromarray(pixels.astype(np.uint8)).save(path)
    return root


def unique_name() -> str:
    """A name that no test has registered yet."""
    return f"image_folder_{next(_numbers)}"
