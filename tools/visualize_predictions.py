"""Draw input, ground truth, prediction and errors side by side for some images of a data set.

    python tools/visualize_predictions.py --config-file F --num 12 --output DIR \\
        --opts MODEL.WEIGHTS W
"""

import argparse
import sys
from typing import Any

from batchformer_panoptic.data import ClassTable
from batchformer_panoptic.engine.predictor import Predictor, configure_for_drawing
from batchformer_panoptic.engine.setup import (
    add_sample_arguments,
    add_threshold_argument,
    choose_dataset,
    command_parser,
    load_config,
    sample_images,
)
from batchformer_panoptic.engine.threads import limit_threads
from batchformer_panoptic.errors import command
from batchformer_panoptic.visualization import (
    ERROR_ENTRIES,
    draw_errors,
    draw_ground_truth,
    draw_result,
    legend_entries,
    side_by_side,
    write_pictures,
)
from batchformer_panoptic.visualization.scene import scene_of_annotation, scene_of_result

TITLES = ("input", "ground truth", "prediction", "errors")


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = command_parser(__doc__)
    add_sample_arguments(parser, "TEST")
    add_threshold_argument(parser)
    return parser.parse_args(argv)


@command
def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    cfg = load_config(args.config_file, args.opts)
    name = choose_dataset(cfg, "TEST", args.dataset)
    configure_for_drawing(cfg, args.confidence_threshold)
    predictor = Predictor(cfg)
    limit_threads(cfg, predictor.model)
    table = predictor.check_classes_of(name)
    pictures = (
        (dataset_dict["file_name"], panels(predictor, dataset_dict, table))
        for dataset_dict in sample_images(name, args.num, args.seed)
    )
    for line in write_pictures(args.output, pictures):
        print(line, flush=True)
    return 0


def panels(predictor: Predictor, dataset_dict: dict[str, Any], table: ClassTable) -> Any:
    image_bgr = predictor.read_image(dataset_dict["file_name"])
    image, result = image_bgr[:, :, ::-1], predictor(image_bgr)
    truth = draw_ground_truth(image, dataset_dict, table)
    pictures = [image, truth, draw_result(image, result, table)]
    scenes = scene_of_annotation(dataset_dict), scene_of_result(result)
    entries = legend_entries(table, (r.class_id for scene in scenes for r in scene.regions))
    if all(scene.is_panoptic for scene in scenes):
        pictures.append(draw_errors(image, dataset_dict, result, table))
        entries += ERROR_ENTRIES
    return side_by_side(pictures, TITLES[: len(pictures)], entries)


if __name__ == "__main__":
    sys.exit(main())
