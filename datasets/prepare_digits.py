"""Write scikit-learn's handwritten digits as an image folder with few labels per class.

    python datasets/prepare_digits.py --output datasets/digits --labels-per-class 10

The 1797 images of 8 x 8 pixels with 17 grey levels (UCI, "Optical Recognition of Handwritten
Digits", test part) come with scikit-learn: nothing is downloaded.

    DIR/train/0 ... DIR/train/9      N images of each digit out of the first 898, by the seed
    DIR/val/0 ... DIR/val/9          all of the other 899, for any N and seed
    DIR/manifest.json                the arguments, marked complete last

The images are in the order in which they were collected, so that most writers occur in one of the
two halves only. Files are named by their position in that order: the same digit, the same name.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from batchformer_panoptic.data.io import PreparedFolder, writing
from batchformer_panoptic.engine.setup import integer_between
from batchformer_panoptic.errors import UserError, command, one_line

NUM_CLASSES = 10
NUM_POOL = 898  # images to draw training images from; the others are for evaluation
MAX_LABELS = 86  # images of the rarest digit among these
DARKEST = 16  # grey levels are 0 to 16
FORMAT_VERSION = 1  # increase it when the same arguments give other files


def load() -> tuple[np.ndarray, np.ndarray]:
    """Return images (1797, 8, 8) uint8, white on black in 0 to 255, and digits (1797,) int64.

    Raises:
        UserError: scikit-learn, which is an extra, is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise UserError(
            "the digits come with scikit-learn: pip install scikit-learn, or this project's extra "
            "[digits]"
        ) from None
    digits = load_digits()
    return (digits.images * (255 / DARKEST)).round().astype(np.uint8), digits.target


def choose(labels: np.ndarray, per_class: int, seed: int) -> np.ndarray:
    """Return positions of the training images, ascending; for one seed, more include fewer."""
    rng = np.random.default_rng(seed)
    chosen = [
        rng.permutation(np.flatnonzero(labels[:NUM_POOL] == digit))[:per_class]
        for digit in range(NUM_CLASSES)
    ]
    return np.sort(np.concatenate(chosen))


def write_split(folder: Path, places: np.ndarray, pictures: np.ndarray, labels: np.ndarray) -> None:
    for place in places:
        path = folder / str(labels[place]) / f"{place:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        with writing(path):
            Image.fromarray(pictures[place]).save(path)


def is_intact(output: Path, expected: dict[str, int]) -> bool:
    """Return whether all images of a finished set still exist."""
    return all(
        sum(1 for _ in (output / split).glob("*/*.png")) == count
        for split, count in expected.items()
    )


def prepare(output: Path, per_class: int, seed: int, overwrite: bool) -> str:
    """Make the set if it does not exist; return one line about the result.

    Raises:
        UserError: ``output`` holds something else, or an unfinished or different set and
            ``overwrite`` is False.
    """
    folder = PreparedFolder(
        output,
        {
            "generator": "digits",
            "version": FORMAT_VERSION,
            "labels_per_class": per_class,
            "seed": seed,
        },
    )
    pictures, labels = load()
    places = {"train": choose(labels, per_class, seed), "val": np.arange(NUM_POOL, len(labels))}
    counts = {split: len(chosen) for split, chosen in places.items()}
    if folder.is_done(lambda: is_intact(output, counts), overwrite=overwrite):
        return f"{output}: already complete, nothing to do"
    with folder.filling(list(places)):
        for split, chosen in places.items():
            write_split(output / split, chosen, pictures, labels)
    return f"{output}: {counts['train']} train, {counts['val']} val images of {NUM_CLASSES} digits"


@command
def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--output", type=Path, required=True, help="folder to write, created if needed"
    )
    parser.add_argument(
        "--labels-per-class",
        type=integer_between(1, MAX_LABELS),
        default=10,
        metavar="N",
        help="training images of each digit (%(default)s)",
    )
    parser.add_argument(
        "--seed",
        type=integer_between(0, 2**32 - 1),
        default=0,
        help="selects these images (%(default)s)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace the set in --output")
    args = parser.parse_args(argv)
    try:
        print(prepare(args.output, args.labels_per_class, args.seed, args.overwrite))
    except OSError as error:
        raise UserError(f"--output {args.output} cannot be written: {one_line(error)}") from error
    return 0


if __name__ == "__main__":
    sys.exit(main())
