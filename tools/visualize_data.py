"""Draw a data set as it is annotated, or as the training mapper delivers it.

python tools/visualize_data.py --config-file F --source annotation --num 12 --output DIR
python tools/visualize_data.py --config-file F --source dataloader --num 12 --output DIR
"""

import argparse
import sys
from collections.abc import Iterator
from typing import Any

import batchformer_panoptic  # noqa: F401  before Detectron2, whose import would warn

# isort: split
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog

from batchformer_panoptic.data import ClassTable, PanopticDatasetMapper
from batchformer_panoptic.data.loader import seeded
from batchformer_panoptic.engine.setup import (
    add_sample_arguments,
    choose_dataset,
    command_parser,
    load_config,
    sample_images,
)
from batchformer_panoptic.errors import command
from batchformer_panoptic.visualization import (
    draw_ground_truth,
    draw_targets,
    legend_entries,
    read_image,
    side_by_side,
    write_pictures,
)
from batchformer_panoptic.visualization.scene import scene_of_annotation


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = command_parser(__doc__, config_of="the data")
    parser.add_argument(
        "--source",
        choices=("annotation", "dataloader"),
        default="annotation",
        help="the files on disk, or the training samples: augmented, with their targets",
    )
    add_sample_arguments(parser, "TRAIN")
    return parser.parse_args(argv)


@command
def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    cfg = load_config(args.config_file, args.opts)
    name = choose_dataset(cfg, "TRAIN", args.dataset)
    for line in write_pictures(args.output, pictures(cfg, name, args)):
        print(line, flush=True)
    return 0


def pictures(cfg: CfgNode, name: str, args: argparse.Namespace) -> Iterator[tuple[str, Any]]:
    table = ClassTable.from_metadata(MetadataCatalog.get(name))
    for number, dataset_dict in enumerate(sample_images(name, args.num, args.seed)):
        if args.source == "annotation":
            picture = annotated(cfg, dataset_dict, table)
        else:
            with seeded(args.seed, number):
                picture = mapped(cfg, dataset_dict, table)
        yield dataset_dict["file_name"], picture


def annotated(cfg: CfgNode, dataset_dict: dict[str, Any], table: ClassTable) -> Any:
    path, limit = dataset_dict["file_name"], cfg.INPUT.MAX_PIXELS
    image = read_image(path, "RGB", max_pixels=limit)
    truth = draw_ground_truth(image, dataset_dict, table)
    classes = (region.class_id for region in scene_of_annotation(dataset_dict).regions)
    return side_by_side([image, truth], ["image", "annotation"], legend_entries(table, classes))


def mapped(cfg: CfgNode, dataset_dict: dict[str, Any], table: ClassTable) -> Any:
    sample = PanopticDatasetMapper(cfg, is_train=True)(dataset_dict)
    image = sample["image"].permute(1, 2, 0).numpy()
    image = image[:, :, ::-1] if cfg.INPUT.FORMAT == "BGR" else image
    targets = draw_targets(image, sample, table)
    titles = ["augmented image", "targets"]
    classes = sample["instances"].gt_classes.tolist()
    return side_by_side([image, targets], titles, legend_entries(table, classes))


if __name__ == "__main__":
    sys.exit(main())
