"""Check a data set in COCO's panoptic layout and list its problems.

    python tools/check_dataset.py --json J --image-root I --panoptic-root P

Exit status: 0 if the data set can be used (warnings and notes are allowed), 1 if it has errors, 2
if the check itself cannot run, for example for a missing file.
"""

import argparse
import sys
from collections import Counter
from itertools import groupby
from pathlib import Path
from typing import Any

from batchformer_panoptic.data.importers import refuse_foreign
from batchformer_panoptic.data.importers.coco import is_panoptic
from batchformer_panoptic.data.io import read_coco_json
from batchformer_panoptic.data.validation import (
    Problem,
    check_panoptic_content,
    records,
    segments_of,
)
from batchformer_panoptic.engine.setup import at_least
from batchformer_panoptic.errors import UserError, command

SEVERITY_ORDER = ("error", "warning", "note")


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, required=True, help="panoptic annotation file")
    parser.add_argument("--image-root", type=Path, required=True, help="folder of the images")
    parser.add_argument("--panoptic-root", type=Path, required=True, help="folder of the PNGs")
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
    return parser.parse_args(argv)


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


def format_summary(content: dict[str, Any]) -> list[str]:
    """Totals, and one line per class with the numbers of its segments and images."""
    annotations = records(content, "annotations")
    segments, images = Counter[str](), Counter[str]()
    for annotation in annotations:
        classes = [str(segment.get("category_id")) for segment in segments_of(annotation)]
        segments.update(classes)
        images.update(set(classes))
    categories = records(content, "categories")
    kinds = Counter("thing" if item.get("isthing") == 1 else "stuff" for item in categories)
    lines = [
        f"{len(records(content, 'images'))} images, {len(annotations)} annotations, "
        f"{segments.total()} segments, {kinds['thing']} thing and {kinds['stuff']} stuff classes",
        f"{'id':>6}  {'class':<28} {'kind':<6} {'segments':>9} {'images':>8}",
    ]
    for category in categories:
        key, kind = str(category.get("id")), "thing" if category.get("isthing") == 1 else "stuff"
        name = str(category.get("name"))
        lines.append(f"{key:>6}  {name:<28} {kind:<6} {segments[key]:>9} {images[key]:>8}")
    return lines


def read_panoptic_json(path: Path) -> dict[str, Any]:
    """Read the annotations; another tool's format is refused with the command that converts it."""
    try:
        content = read_coco_json(path)
    except UserError:
        refuse_foreign(path)
        raise
    if not is_panoptic(content):
        refuse_foreign(path)
    return content


@command
def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    content = read_panoptic_json(args.json)
    problems = check_panoptic_content(
        content,
        args.image_root,
        args.panoptic_root,
        max_images=args.max_images,
        decode_images=not args.no_decode,
    )
    counts = Counter(problem.severity for problem in problems)
    totals = ", ".join(f"{counts[severity]} {severity}s" for severity in SEVERITY_ORDER)
    print("\n".join([*format_summary(content), "", *format_problems(problems, args.max_problems)]))
    print(f"{'FAILED' if counts['error'] else 'ok'}: {totals}")
    return 1 if counts["error"] else 0


if __name__ == "__main__":
    sys.exit(main())
