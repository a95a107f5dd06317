"""Write scikit-learn's handwritten digits as an image folder with few labels per class.

1797 pictures of 8 x 8 pixels and 17 grey levels (UCI, "Optical Recognition of Handwritten Digits",
its test part), which come with scikit-learn: nothing is downloaded.

    DIR/train/0 ... DIR/train/9      N pictures of each digit out of the first 898, by the seed
    DIR/val/0 ... DIR/val/9          all of the other 899, whatever N and the seed are
    DIR/manifest.json                the arguments, marked complete at the very end

The pictures are in the order in which they were collected, so that the two halves are mostly by
different writers. A file is named for its place in that order: the same digit, the same name.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from batchformer_panoptic.data.io import PreparedFolder, integer_between
from batchformer_panoptic.errors import UserError

NUM_CLASSES = 10
NUM_POOL = 898  # pictures that training may draw from; the others are for evaluation
MAX_LABELS = 86  # what the rarest digit has among these
DARKEST = 16  # grey levels are 0 to 16
FORMAT_VERSION = 1  # raise it whenever the same arguments give other files


def load() -> tuple[np.ndarray, np.ndarray]:
    """Pictures (1797, 8, 8) uint8, ink white on black 0 to 255, and digits (1797,) int64.

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
    """Places of the training pictures, ascending; with one seed the more include the fewer."""
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
        Image.fromarray(pictures[place]).save(path)


def is_intact(output: Path, expected: dict[str, int]) -> bool:
    """Whether no picture of a finished set has been lost since."""
    return all(
        sum(1 for _ in (output / split).glob("*/*.png")) == count
        for split, count in expected.items()
    )


def prepare(output: Path, per_class: int, seed: int, overwrite: bool) -> str:
    """Make the set unless it is there already; returns one line about what was done.

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


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--output", type=Path, required=True, help="folder to write, made if needed"
    )
    parser.add_argument(
        "--labels-per-class",
        type=integer_between(1, MAX_LABELS),
        default=10,
        metavar="N",
        help="training pictures of each digit (%(default)s)",
    )
    parser.add_argument(
        "--seed",
        type=integer_between(0, 2**32 - 1),
        default=0,
        help="which pictures these are (%(default)s)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace the set in --output")
    args = parser.parse_args(argv)
    try:
        print(prepare(args.output, args.labels_per_class, args.seed, args.overwrite))
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
