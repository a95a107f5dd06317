"""Check data sets and list their problems, or write a corrected copy.

    python tools/check_dataset.py --config-file FILE [--opts KEY VALUE ...]
    python tools/check_dataset.py --json J --image-root I --panoptic-root P [--fix FOLDER]

With a config, all sets of DATASETS.TRAIN and DATASETS.TEST are checked, whether they share images,
and whether images have more objects than the model has queries. Exit status: 0 if the data sets can
be used (warnings and notes are allowed), 1 if there are errors, for which training exits in the
same words, 2 if the check itself cannot run, for example for a missing file.
"""

import argparse
import sys
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode

from batchformer_panoptic.data import setup_datasets
from batchformer_panoptic.data.check import CheckedSet, check_files, check_use, paths_of
from batchformer_panoptic.data.importers import refuse_foreign
from batchformer_panoptic.data.importers.coco import is_panoptic
from batchformer_panoptic.data.io import read_coco_json, write_json
from batchformer_panoptic.data.validation import (
    PNG_FOLDER,
    Depth,
    Problem,
    records,
    repair_panoptic_set,
    segments_of,
)
from batchformer_panoptic.engine.setup import at_least, load_config
from batchformer_panoptic.engine.threads import available_cores
from batchformer_panoptic.errors import UserError, command

SEVERITY_ORDER = ("error", "warning", "note")


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config-file", metavar="FILE", help="YAML config that names data sets")
    parser.add_argument("--json", type=Path, help="panoptic annotation file")
    parser.add_argument("--image-root", type=Path, help="folder of the images")
    parser.add_argument("--panoptic-root", type=Path, help="folder of the PNGs")
    parser.add_argument(
        "--fix",
        type=Path,
        metavar="FOLDER",
        help="write panoptic.json and panoptic/ with corrected areas, boxes, crowd flags, ids and "
        "PNG formats to a new folder, and check those; images stay where they are",
    )
    parser.add_argument(
        "--json-out", type=Path, metavar="FILE", help="also write all problems as JSON"
    )
    parser.add_argument(
        "--max-problems",
        type=at_least(1),
        default=5,
        metavar="N",
        help="examples shown of each kind of problem; all are counted (default: %(default)s)",
    )
    parser.add_argument(
        "--max-images",
        type=at_least(1),
        metavar="N",
        help="open the files of N images only (default: all)",
    )
    parser.add_argument(
        "--no-decode",
        action="store_true",
        help="read only the headers of the images: faster, but misses truncated files",
    )
    parser.add_argument(
        "--processes",
        type=at_least(1),
        default=available_cores(),
        metavar="N",
        help="that share the work (default: %(default)s)",
    )
    parser.add_argument(
        "--opts", nargs=argparse.REMAINDER, default=[], help="config changes; must come last"
    )
    args = parser.parse_args(argv)
    paths = (args.json, args.image_root, args.panoptic_root)
    if args.config_file and any((*paths, args.fix)):
        parser.error("--config-file goes with none of --json, --image-root, --panoptic-root, --fix")
    if not args.config_file and not all(paths):
        parser.error("give --config-file, or --json, --image-root and --panoptic-root")
    return args


def format_problems(problems: list[Problem], max_problems: int) -> list[str]:
    """Group by severity and kind, largest groups first; at most ``max_problems`` lines each."""
    sizes = Counter((problem.severity, problem.kind) for problem in problems)

    def rank(problem: Problem) -> tuple[int, int, str]:
        group = (problem.severity, problem.kind)
        return SEVERITY_ORDER.index(problem.severity), -sizes[group], problem.kind

    lines = []
    for _, group in groupby(sorted(problems, key=rank), key=rank):
        found = list(group)
        lines.append(f"{found[0].severity}: {found[0].kind} ({len(found)})")
        lines += [f"  {problem}" for problem in found[:max_problems]]
        if len(found) > max_problems:
            lines.append(f"  ... and {len(found) - max_problems} more")
    return lines


def format_summary(content: Mapping[str, Any]) -> list[str]:
    """Totals, and one line per class with the numbers of its segments (or boxes) and images."""
    annotations = records(content, "annotations")
    segments, images = Counter[str](), Counter[str]()
    is_panoptic = any("segments_info" in annotation for annotation in annotations)
    seen = set()
    for annotation in annotations:
        of_annotation = segments_of(annotation) if is_panoptic else [annotation]
        for segment in of_annotation:
            key = str(segment.get("category_id"))
            segments[key] += 1
            seen.add((key, repr(annotation.get("image_id"))))
    images.update(key for key, _ in seen)
    categories = records(content, "categories")
    kinds = {str(item.get("id")): _kind(item, is_panoptic) for item in categories}
    counts = Counter(kinds.values())
    noun = "segments" if is_panoptic else "boxes"
    lines = [
        f"{len(records(content, 'images'))} images, {len(annotations)} annotations, "
        f"{segments.total()} {noun}, {counts['thing']} thing and {counts['stuff']} stuff classes",
        f"{'id':>6}  {'class':<28} {'kind':<6} {noun:>9} {'images':>8}",
    ]
    for category in categories:
        key, name = str(category.get("id")), str(category.get("name"))
        lines.append(f"{key:>6}  {name:<28} {kinds[key]:<6} {segments[key]:>9} {images[key]:>8}")
    return lines


def refuse_other_formats(path: Path) -> None:
    """Refuse the annotations of another tool, with the command that converts them."""
    try:
        is_ours = is_panoptic(read_coco_json(path))
    except UserError:
        is_ours = False  # the check itself reports the fault of a file of no known format
    if not is_ours:
        refuse_foreign(path)


def _kind(category: Mapping[str, Any], is_panoptic: bool) -> str:
    return "thing" if not is_panoptic or category.get("isthing") == 1 else "stuff"


def check_config(cfg: CfgNode, depth: Depth) -> dict[str, CheckedSet]:
    """Check all data sets of an open config; the last entry is about all of them together."""
    names = dict.fromkeys([*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST])
    if not names:
        raise UserError("the config names no data set: set DATASETS.TRAIN or DATASETS.TEST")
    checked = {}
    for name in names:
        paths = paths_of(cfg, name)
        if paths is None:
            raise UserError(f"data set {name!r} is not a local data set of a known format")
        checked[name] = check_files(paths, depth)
    together = check_use(cfg, checked)
    if not any(found.errors for found in checked.values()):
        try:
            setup_datasets(cfg)
        except UserError as error:
            together.append(Problem("config does not fit", str(error)))
    return {**checked, "all data sets": CheckedSet("", together)}


def check_or_fix(args: argparse.Namespace, depth: Depth) -> dict[str, CheckedSet]:
    """Check the data set of the command line, or the corrected copy that is written first."""
    paths = {"panoptic_json": args.json, "image_root": args.image_root}
    paths["panoptic_root"] = args.panoptic_root
    refuse_other_formats(args.json)
    if args.fix:
        content = read_coco_json(args.json)
        paths["panoptic_json"] = repair_panoptic_set(content, args.panoptic_root, args.fix)
        paths["panoptic_root"] = args.fix / PNG_FOLDER
        print(f"corrected copy: {paths['panoptic_json']} and {paths['panoptic_root']}")
    return {str(paths["panoptic_json"]): check_files(paths, depth)}


@command
def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    depth = Depth(
        max_images=args.max_images, decode_images=not args.no_decode, processes=args.processes
    )
    if args.config_file:
        checked = check_config(
            load_config(args.config_file, ["MODEL.DEVICE", "cpu", *args.opts]), depth
        )
    else:
        checked = check_or_fix(args, depth)
    for name, found in checked.items():
        if len(checked) > 1:
            print(f"== {name} ==")
        if found.content:
            print("\n".join([*format_summary(found.content), ""]))
        for line in format_problems(found.problems, args.max_problems):
            print(line)
    problems = [(name, problem) for name, found in checked.items() for problem in found.problems]
    counts = Counter(problem.severity for _, problem in problems)
    totals = ", ".join(f"{counts[severity]} {severity}s" for severity in SEVERITY_ORDER)
    print(f"{'FAILED' if counts['error'] else 'ok'}: {totals}")
    if args.json_out:
        rows = [{"data_set": name, **asdict(problem)} for name, problem in problems]
        content = {"ok": not counts["error"], "counts": counts, "problems": rows}
        write_json(args.json_out, content, indent=1)
    return 1 if counts["error"] else 0


if __name__ == "__main__":
    sys.exit(main())
