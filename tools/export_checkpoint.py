"""Write a trained model for its public repository, Hugging Face, ONNX Runtime or torch.export.

python tools/export_checkpoint.py SRC DST --format onnx --config-file F
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode
from torch import Tensor

from batchformer_panoptic.checkpoint.conversion.detection_huggingface import (
    CLASSES as DETECTION_CLASSES,
)
from batchformer_panoptic.checkpoint.conversion.export import (
    HUGGINGFACE_FILES,
    check_config,
    check_official_input,
    not_exported,
    to_huggingface,
    to_official,
)
from batchformer_panoptic.checkpoint.files import read_weights, write_weights
from batchformer_panoptic.checkpoint.records import SETTINGS_KEY as SETTINGS
from batchformer_panoptic.checkpoint.records import SettingsRecord
from batchformer_panoptic.data.class_table import ClassTable
from batchformer_panoptic.data.io import read_json
from batchformer_panoptic.engine.setup import command_parser, load_config
from batchformer_panoptic.errors import UserError, command

GRAPHS = ("onnx", "pt2")


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = command_parser(__doc__, config_of="the training")
    parser.add_argument("src", type=Path, metavar="SRC", help="a checkpoint of this project")
    parser.add_argument(
        "dst",
        type=Path,
        metavar="DST",
        help="a file that ends in .pth (official), .onnx or .pt2; huggingface: a folder",
    )
    parser.add_argument("--format", required=True, choices=("official", "huggingface", *GRAPHS))
    parser.add_argument(
        "--outputs",
        choices=("results", "raw"),
        default="results",
        help="onnx, pt2: segments or boxes (default), or the predictions of all queries",
    )
    parser.add_argument(
        "--size",
        nargs=2,
        type=int,
        metavar=("HEIGHT", "WIDTH"),
        help="onnx, pt2: the only size of images; default: any size",
    )
    parser.add_argument(
        "--float16", action="store_true", help="onnx: weights and products in float16"
    )
    parser.add_argument(
        "--without-block",
        action="store_true",
        help="official: leave out the BatchFormer blocks, for facebookresearch/detr itself (always "
        "for Mask2Former)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an existing DST")
    return parser.parse_args(argv)


def check_paths(args: argparse.Namespace) -> None:
    ending = {"official": ".pth", "onnx": ".onnx", "pt2": ".pt2"}.get(args.format)
    if ending and args.dst.suffix != ending:
        raise UserError(f"{args.dst} must end in {ending}")
    if args.float16 and args.format != "onnx":
        raise UserError(f"--float16 has no effect with --format {args.format}")
    if (args.size or args.outputs == "raw") and args.format not in GRAPHS:
        raise UserError(f"--size and --outputs have no effect with --format {args.format}")
    if args.size and min(args.size) < 1:
        raise UserError(f"--size is {args.size[0]} {args.size[1]}; both must be at least 1")
    if args.dst.exists() and not args.overwrite:
        raise UserError(f"{args.dst} exists; --overwrite replaces it")
    if args.format == "huggingface" and args.dst.exists() and not is_exported_folder(args.dst):
        raise UserError(f"{args.dst} is not the folder of an earlier export; name another one")


def is_exported_folder(path: Path) -> bool:
    """Whether a folder holds only the files of an export, so that no other file would be lost."""
    return path.is_dir() and {file.name for file in path.iterdir()} <= set(HUGGINGFACE_FILES)


def evaluation_of(weights: Path) -> dict[str, Any] | None:
    """The recorded evaluation of the best weights of a training, or None for other weights."""
    record = weights.with_suffix(".json")
    return read_json(record) if weights.stem == "model_best" and record.exists() else None


def export_graph(args: argparse.Namespace, cfg: CfgNode) -> list[str]:
    """Export the model as a graph and return a line for the user."""
    # Not at the top: they are slow to import, and the other formats need none of them.
    from batchformer_panoptic.deployment.onnx import (
        RUNTIME_NAME,
        describe,
        export_onnx,
        export_pt2,
    )
    from batchformer_panoptic.engine.predictor import Predictor, configure_for_drawing

    cfg.MODEL.WEIGHTS, cfg.MODEL.DEVICE = str(args.src), "cpu"
    cfg.TEST.FAST.ENABLED = cfg.TEST.FAST.COMPILE = cfg.TEST.FAST.BFLOAT16 = False
    configure_for_drawing(cfg)
    predictor = Predictor(cfg)
    size = args.size or None
    model = predictor.model
    description = describe(model, cfg, predictor.class_table, outputs=args.outputs, size=size)
    args.dst.parent.mkdir(parents=True, exist_ok=True)
    if args.format == "pt2":
        export_pt2(model, description, args.dst)
        return []
    export_onnx(model, description, args.dst, float16=args.float16)
    beside = args.dst.parent / RUNTIME_NAME
    return [f"run it: python {beside} {args.dst} IMAGES --output FOLDER"]


def export(args: argparse.Namespace, cfg: CfgNode) -> list[str]:
    """Export the checkpoint and return lines for the user about the keys that are left out."""
    if args.format in GRAPHS:
        return export_graph(args, cfg)
    content = read_weights(str(args.src))
    state: dict[str, Tensor] = content["model"]
    if isinstance(content.get(SETTINGS), dict):
        SettingsRecord(cfg).check(content[SETTINGS], str(args.src))
    with_block = args.format == "official" and not args.without_block
    if args.format == "official":
        check_config(state, cfg)
        check_official_input(cfg)
        weight = cfg.MODEL.DETR.NO_OBJECT_WEIGHT
        model = to_official(state, with_block=with_block, no_object_weight=weight)
        write_weights(str(args.dst), {"model": model})
    else:
        table = content.get("class_table")
        classes = None if table is None else ClassTable.from_json(table)
        evaluation = evaluation_of(args.src)
        to_huggingface(state, args.dst, cfg=cfg, classes=classes, evaluation=evaluation)
    has_masks = (
        args.format == "official" or cfg.MODEL.DETR.TRANSFORMER_NAME not in DETECTION_CLASSES
    )
    dropped = not_exported(state, with_block=with_block, masks=has_masks)
    return [f"left out, {reason}: {name}" for name, reason in dropped]


@command
def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    check_paths(args)
    lines = export(args, load_config(args.config_file, args.opts))
    print("\n".join([f"{args.dst}: written for {args.format}", *lines]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
