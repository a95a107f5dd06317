"""Predict images and write what programs read: COCO's panoptic and instances format, and CSV.

    python tools/predict.py --config-file F --input IMAGES, FOLDERS, "GLOBS" --output DIR \\
        --opts MODEL.WEIGHTS W

Folders are searched recursively. The same command continues after an interruption: images that are
finished and have not changed are not predicted again. Exit status: 0, 1 if some of the images could
not be read, 2 after another mistake.
"""

import argparse
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from tqdm import tqdm

from batchformer_panoptic.data.images import ImageArray, find_images
from batchformer_panoptic.engine.prediction import Prediction, PredictionFolder, image_ids_of
from batchformer_panoptic.engine.predictor import Predictor, configure_for_drawing
from batchformer_panoptic.engine.setup import (
    add_threshold_argument,
    at_least,
    command_parser,
    load_config,
)
from batchformer_panoptic.engine.threads import limit_threads
from batchformer_panoptic.errors import UserError, command

INTERRUPTED = 130  # exit status, as of a shell


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = command_parser(__doc__)
    parser.add_argument(
        "--input", nargs="+", required=True, metavar="PATH", help="images, folders, globs"
    )
    parser.add_argument("--output", type=Path, required=True, metavar="DIR")
    parser.add_argument(
        "--batch-size", type=at_least(1), default=1, metavar="N", help="default: %(default)s"
    )
    parser.add_argument(
        "--ids-from",
        metavar="JSON",
        help="COCO JSON with the ids of the images, to compare with annotations (default: 1, 2, "
        "...)",
    )
    parser.add_argument("--no-overlays", action="store_true", help="draw no pictures")
    parser.add_argument(
        "--overwrite", action="store_true", help="remove the predictions in DIR first"
    )
    add_threshold_argument(parser)
    return parser.parse_args(argv)


@command
def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    images = find_images(args.input, outside=args.output)
    root = common_folder([*filter(os.path.isdir, args.input), *map(os.path.dirname, images)])
    cfg = load_config(args.config_file, args.opts)
    configure_for_drawing(cfg, args.confidence_threshold)
    predictor = Predictor(cfg)
    limit_threads(cfg, predictor.model, args.batch_size)
    folder = PredictionFolder(
        args.output,
        root,
        predictor.class_table,
        predictor.identity,
        overlays=not args.no_overlays,
        overwrite=args.overwrite,
    )
    with folder:
        image_ids = ids_of(images, folder, args.ids_from)
        try:
            failed = predict_images(predictor, folder, images, args.batch_size)
        except KeyboardInterrupt:
            print("interrupted: the same command continues", file=sys.stderr)
            return INTERRUPTED
        folder.finish([image for image in images if image not in failed], image_ids)
    print(f"{len(images) - len(failed)} images below {root} are predicted in {args.output}")
    for error in failed.values():
        print(f"error: {error}", file=sys.stderr)
    if failed:
        print(f"error: {len(failed)} of {len(images)} images could not be read", file=sys.stderr)
    return 1 if failed else 0


def common_folder(folders: Sequence[str]) -> Path:
    return Path(os.path.commonpath([os.path.abspath(folder) for folder in folders]))


def ids_of(
    images: Sequence[str], folder: PredictionFolder, path: str | None
) -> Mapping[str, int | str] | None:
    if path is None:
        return None
    image_ids = image_ids_of(path)
    for image in images:
        if folder.name_of(image) not in image_ids:
            raise UserError(f"{path} does not list the image {folder.name_of(image)}")
    return image_ids


def predict_images(
    predictor: Predictor, folder: PredictionFolder, images: Sequence[str], batch_size: int
) -> dict[str, UserError]:
    """Predict all images that are not finished; return the errors of those that cannot be read."""
    failed: dict[str, UserError] = {}
    waiting = [image for image in images if not folder.is_finished(image)]
    if len(waiting) < len(images):
        print(f"{len(images) - len(waiting)} of {len(images)} images are finished already")
    for batch in batches(predictor, waiting, batch_size, failed):
        results = predictor.predict_batch(list(batch.values()))
        for (image, image_bgr), result in zip(batch.items(), results, strict=True):
            folder.add(image, Prediction(image_bgr, result, predictor.class_table))
    return failed


def batches(
    predictor: Predictor, images: Sequence[str], size: int, failed: dict[str, UserError]
) -> Iterator[dict[str, ImageArray]]:
    batch: dict[str, ImageArray] = {}
    for image in tqdm(images, unit="image", disable=None):
        try:
            batch[image] = predictor.read_image(image)
        except UserError as error:
            failed[image] = error
        if len(batch) == size:
            yield batch
            batch = {}
    if batch:
        yield batch


if __name__ == "__main__":
    sys.exit(main())
