"""Draw a data set as it is annotated, or as the training mapper delivers it.

python tools/visualize_data.py --config-file F --source annotation --num 12 --output DIR
python tools/visualize_data.py --config-file F --source dataloader --num 12 --output DIR
"""

import argparse
import random
import sys
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog

from batchformer_panoptic.data import (
    ClassTable,
    PanopticDatasetMapper,
    load_dataset_dicts,
    setup_datasets,
)
from batchformer_panoptic.data.loader import seeded
from batchformer_panoptic.engine import load_config
from batchformer_panoptic.errors import UserError
from batchformer_panoptic.visualization import (
    contact_sheet,
    draw_ground_truth,
    draw_targets,
    read_image,
    side_by_side,
    write_image,
)

ON_SHEET = 12


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config-file", required=True, metavar="FILE", help="YAML of the data")
    parser.add_argument(
        "--source",
        choices=("annotation", "dataloader"),
        default="annotation",
        help="what is on disk, or what training sees: augmented, boxes and masks as targets",
    )
    parser.add_argument("--num", type=int, default=12, metavar="N", help="images (default: 12)")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR")
    parser.add_argument("--dataset", metavar="NAME", help="default: the first of DATASETS.TRAIN")
    parser.add_argument(
        "--seed", type=int, default=0, metavar="S", help="of images and augmentation (default: 0)"
    )
    parser.add_argument(
        "--opts", nargs=argparse.REMAINDER, default=[], help="config changes, KEY VALUE ..."
    )
    args = parser.parse_args(argv)
    for option, value, least in (("--num", args.num, 1), ("--seed", args.seed, 0)):
        if value < least:
            parser.error(f"{option} must be at least {least}, not {value}")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    try:
        draw(args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def draw(args: argparse.Namespace) -> None:
    cfg = load_config(args.config_file, args.opts)
    if args.dataset:
        cfg.DATASETS.TRAIN = (args.dataset,)
    if not cfg.DATASETS.TRAIN:
        raise UserError("DATASETS.TRAIN is empty: name a data set with --dataset")
    setup_datasets(cfg)
    name = cfg.DATASETS.TRAIN[0]
    dataset_dicts = load_dataset_dicts([name], filter_empty=False)
    table = ClassTable.from_metadata(MetadataCatalog.get(name))
    count = min(args.num, len(dataset_dicts))
    chosen = sorted(random.Random(args.seed).sample(range(len(dataset_dicts)), count))
    pictures = []
    for number, index in enumerate(chosen):
        dataset_dict = dataset_dicts[index]
        if args.source == "annotation":
            picture = annotated(dataset_dict, table)
        else:
            with seeded(args.seed, number):
                picture = mapped(cfg, dataset_dict, table)
        file_name = f"{number:03d}_{Path(dataset_dict['file_name']).stem}.png"
        write_image(args.output / file_name, picture)
        if number < ON_SHEET:
            pictures.append(picture)
        print(f"{dataset_dict['file_name']} -> {file_name}", flush=True)
    write_image(args.output / "overview.png", contact_sheet(pictures))
    print(f"{count} pictures and overview.png are in {args.output}")


def annotated(dataset_dict: dict[str, Any], table: ClassTable) -> Any:
    image = read_image(dataset_dict["file_name"])[:, :, ::-1]
    truth = draw_ground_truth(image, dataset_dict, table)
    return side_by_side([image, truth], ["image", "annotation"])


def mapped(cfg: CfgNode, dataset_dict: dict[str, Any], table: ClassTable) -> Any:
    sample = PanopticDatasetMapper(cfg, is_train=True)(dataset_dict)
    image = sample["image"].permute(1, 2, 0).numpy()
    image = image[:, :, ::-1] if cfg.INPUT.FORMAT == "BGR" else image
    targets = draw_targets(image, sample, table)
    return side_by_side([image, targets], ["augmented image", "targets"])


if __name__ == "__main__":
    sys.exit(main())
