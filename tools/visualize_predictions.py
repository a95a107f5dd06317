"""Draw input, ground truth and prediction side by side for some images of a data set.

    python tools/visualize_predictions.py --config-file F --num 12 --output DIR \
        --opts MODEL.WEIGHTS W
"""

import argparse
import random
import sys
from pathlib import Path
from typing import Any

from detectron2.data import MetadataCatalog

from batchformer_panoptic.data import ClassTable, load_dataset_dicts, setup_datasets
from batchformer_panoptic.engine import load_config
from batchformer_panoptic.engine.predictor import Predictor, configure_for_drawing
from batchformer_panoptic.errors import UserError
from batchformer_panoptic.visualization import (
    contact_sheet,
    draw_ground_truth,
    draw_result,
    read_image,
    side_by_side,
    write_image,
)

TITLES = ("input", "ground truth", "prediction")
ON_SHEET = 12


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config-file", required=True, metavar="FILE", help="YAML of the model")
    parser.add_argument("--num", type=int, default=12, metavar="N", help="images (default: 12)")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR")
    parser.add_argument("--dataset", metavar="NAME", help="default: the first of DATASETS.TEST")
    parser.add_argument(
        "--seed", type=int, default=0, metavar="S", help="which images are drawn (default: 0)"
    )
    parser.add_argument(
        "--confidence-threshold",
        type=float,
        metavar="T",
        help="draw what scores more than T, 0 to 1 (default: as in evaluation; boxes: 0.5)",
    )
    parser.add_argument(
        "--opts", nargs=argparse.REMAINDER, default=[], help="config changes, KEY VALUE ..."
    )
    args = parser.parse_args(argv)
    if args.num < 1:
        parser.error(f"--num must be at least 1, not {args.num}")
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
        cfg.DATASETS.TEST = (args.dataset,)
    if not cfg.DATASETS.TEST:
        raise UserError("DATASETS.TEST is empty: name a data set with --dataset")
    setup_datasets(cfg)
    name = cfg.DATASETS.TEST[0]
    configure_for_drawing(cfg, args.confidence_threshold)
    predictor = Predictor(cfg)
    table = ClassTable.from_metadata(MetadataCatalog.get(name))
    if difference := table.difference(predictor.class_table):
        raise UserError(f"data set {name} and checkpoint have other classes: {difference}")
    pictures = []
    for number, dataset_dict in enumerate(choose(name, args.num, args.seed)):
        picture = triptych(predictor, dataset_dict, table)
        file_name = f"{number:03d}_{Path(dataset_dict['file_name']).stem}.png"
        write_image(args.output / file_name, picture)
        if number < ON_SHEET:
            pictures.append(picture)
        print(f"{dataset_dict['file_name']} -> {file_name}", flush=True)
    write_image(args.output / "overview.png", contact_sheet(pictures))
    print(f"{number + 1} pictures and overview.png are in {args.output}")


def choose(name: str, num: int, seed: int) -> list[dict[str, Any]]:
    """Some images of a data set in its order, the same ones for the same seed."""
    dataset_dicts = load_dataset_dicts([name], filter_empty=False)
    chosen = random.Random(seed).sample(range(len(dataset_dicts)), min(num, len(dataset_dicts)))
    return [dataset_dicts[index] for index in sorted(chosen)]


def triptych(predictor: Predictor, dataset_dict: dict[str, Any], table: ClassTable) -> Any:
    image_bgr = read_image(dataset_dict["file_name"])
    image = image_bgr[:, :, ::-1]
    truth = draw_ground_truth(image, dataset_dict, table)
    prediction = draw_result(image, predictor(image_bgr), table)
    return side_by_side([image, truth, prediction], TITLES)


if __name__ == "__main__":
    sys.exit(main())
