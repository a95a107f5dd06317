"""Convert weights of another project into a checkpoint of this one.

    python tools/convert_checkpoint.py SRC DST --source detr --classes coco_panoptic

The result is for MODEL.WEIGHTS or --init-from. Code that may be hidden in the source file is not
run, unless --allow-pickle is given.
"""

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import batchformer_panoptic  # noqa: F401  before Detectron2, whose import would warn

# isort: split
import torch
from detectron2.data.datasets.builtin_meta import (
    ADE20K_SEM_SEG_CATEGORIES,
    CITYSCAPES_CATEGORIES,
    COCO_CATEGORIES,
)
from safetensors.torch import save_file
from torch import Tensor

from batchformer_panoptic.checkpoint.conversion import (
    SOURCES,
    Converted,
    Request,
    Source,
    source_named,
)
from batchformer_panoptic.checkpoint.conversion.backbones import locate_weights
from batchformer_panoptic.checkpoint.conversion.detr import open_questions, settings_of_args
from batchformer_panoptic.checkpoint.conversion.sources import open_folder
from batchformer_panoptic.checkpoint.files import read_weights, write_weights
from batchformer_panoptic.checkpoint.mismatch import is_class_head
from batchformer_panoptic.checkpoint.records import SETTINGS_KEY as SETTINGS
from batchformer_panoptic.data.class_table import ClassTable
from batchformer_panoptic.data.io import read_json, write_atomically
from batchformer_panoptic.errors import UserError, command

SHOWN = 10
# The 50 stuff classes among the 150 of ADE20K's panoptic annotations, by class id.
_ADE20K_STUFF = {
    *(0, 1, 2, 3, 4, 5, 6, 9, 11, 13, 16, 17, 21, 25, 26, 28, 29, 34, 40, 46, 48, 51, 52, 54, 59),
    *(60, 61, 63, 68, 77, 79, 84, 91, 94, 96, 99, 100, 101, 105, 106, 109, 113, 114, 117, 122, 128),
    *(131, 140, 141, 145),
}
CLASS_LISTS: dict[str, list[dict[str, Any]]] = {
    "coco_panoptic": COCO_CATEGORIES,
    "coco_detection": [category for category in COCO_CATEGORIES if category["isthing"]],
    "ade20k_panoptic": [
        {"id": i, "name": name.strip(), "isthing": int(i not in _ADE20K_STUFF)}
        for i, name in enumerate(ADE20K_SEM_SEG_CATEGORIES)
    ],
    "cityscapes_panoptic": CITYSCAPES_CATEGORIES,
}


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    sources = "\n".join(f"  {name:<30} {source.description}" for name, source in SOURCES.items())
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog=f"sources:\n{sources}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "src", type=Path, metavar="SRC", help="file, folder of Hugging Face, or package of weights"
    )
    parser.add_argument("dst", type=Path, metavar="DST", help="a .pth or .safetensors file")
    parser.add_argument("--source", required=True, metavar="NAME", help="see the list below")
    parser.add_argument(
        "--classes",
        default="all",
        metavar="NAME",
        help=f"classes whose rows of the class layer are kept: {', '.join(CLASS_LISTS)}, a JSON "
        'file with "categories", or all (default)',
    )
    parser.add_argument(
        "--allow",
        action="append",
        default=[],
        metavar="PATTERN",
        help="glob of source keys that may be left out; may be repeated",
    )
    parser.add_argument(
        "--allow-pickle",
        action="store_true",
        help="read any pickle, running the code in it: only for files that you trust",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an existing DST")
    return parser.parse_args(argv)


def load_classes(name: str) -> ClassTable | None:
    """Return the class table named by --classes; None keeps every row."""
    if name == "all":
        return None
    if name in CLASS_LISTS:
        return ClassTable.from_categories(CLASS_LISTS[name])
    path = Path(name)
    if path.suffix != ".json":
        raise UserError(f"--classes {name}: not {', '.join(CLASS_LISTS)}, all or a .json file")
    try:
        content = read_json(path)
        categories = content.get("categories") if isinstance(content, dict) else content
        return ClassTable.from_categories(categories)
    except UserError as error:
        raise UserError(f"--classes {name}: {error}") from error


def tensors_of(weights: Mapping[str, Any]) -> dict[str, Tensor]:
    return {name: torch.as_tensor(value) for name, value in weights.items()}


def check_paths(args: argparse.Namespace) -> None:
    if args.dst.suffix not in (".pth", ".safetensors"):
        raise UserError(f"{args.dst} must end in .pth or .safetensors")
    if args.dst.exists() and not args.overwrite:
        raise UserError(f"{args.dst} exists; --overwrite replaces it")
    if args.dst.exists() and args.src.exists() and args.dst.samefile(args.src):
        raise UserError(f"{args.dst} is the source itself; name another file")


def convert(args: argparse.Namespace, source: Source, classes: ClassTable | None) -> Converted:
    """Convert the weights; add the settings stated by other files and entries of the source."""
    path, extra = Path(locate_weights(str(args.src))), {}
    if path.is_dir():
        if source.name != "huggingface":
            raise UserError(f"{path} is a folder; only --source huggingface reads folders")
        path, extra = open_folder(path)
    content = read_weights(str(path), allow_pickle=args.allow_pickle)
    if SETTINGS in content:
        raise UserError(
            f"{path} is already a checkpoint of this project: use it unchanged as MODEL.WEIGHTS or "
            "--init-from"
        )
    if "args" in content:
        extra = {**extra, **settings_of_args(content["args"])}
    request = Request(classes, tuple(args.allow))
    converted = source.convert(tensors_of(content["model"]), request)
    if classes is not None and not any(map(is_class_head, converted.model)):
        raise UserError(
            f"--classes {args.classes}: {source.name} is a backbone and has no class rows; leave "
            "out --classes"
        )
    return converted._replace(settings={**converted.settings, **extra})


def save(converted: Converted, dst: Path, source: str, classes: ClassTable | None) -> None:
    """Write the checkpoint atomically."""
    model = {name: value.detach().contiguous().clone() for name, value in converted.model.items()}
    rest: dict[str, Any] = {SETTINGS: converted.settings, "converted_from": source}
    if classes is not None:
        rest["class_table"] = classes.to_json()
    if dst.suffix == ".safetensors":
        texts = {k: v if isinstance(v, str) else json.dumps(v) for k, v in rest.items()}
        write_atomically(str(dst), lambda path: save_file(model, path, metadata=texts))
    else:
        write_weights(str(dst), {"model": model, **rest})


def report(converted: Converted, dst: Path) -> list[str]:
    """Return lines about the kept and dropped keys, the notes and the settings."""
    numbers = sum(value.numel() for value in converted.model.values())
    lines = [f"{dst}: {len(converted.model)} tensors, {numbers} numbers"]
    by_reason: dict[str, list[str]] = {}
    for key, reason in converted.dropped:
        by_reason.setdefault(reason, []).append(key)
    for reason, keys in by_reason.items():
        more = "" if len(keys) <= SHOWN else f", and {len(keys) - SHOWN} more"
        lines.append(f"left out, {reason}: {', '.join(keys[:SHOWN])}{more}")
    notes = [*converted.notes, *open_questions(converted.settings)]
    lines += [f"note: {note}" for note in notes]
    lines.append("these weights need:")
    lines += [f"  {key} {json.dumps(value)}" for key, value in converted.settings.items()]
    return lines


@command
def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    source = source_named(args.source)
    check_paths(args)
    classes = load_classes(args.classes)
    converted = convert(args, source, classes)
    save(converted, args.dst, args.source, classes)
    print("\n".join(report(converted, args.dst)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
