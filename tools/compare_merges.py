"""Panoptic quality of every merge, from the same predictions of a model.

    python tools/compare_merges.py --config-file F --opts MODEL.WEIGHTS W

The model processes each image once. Every value of MODEL.PANOPTIC.MERGE_TEST is applied to the same
prediction, with the thresholds of the config.
"""

import argparse
import sys
from collections.abc import Sequence
from typing import Any

import batchformer_panoptic  # noqa: F401  before PyTorch, which reads its way of waiting

# isort: split
import torch
from detectron2.config import CfgNode
from tabulate import tabulate
from torch import Tensor

from batchformer_panoptic.data import build_test_loader
from batchformer_panoptic.engine.predictor import Predictor
from batchformer_panoptic.engine.setup import choose_dataset, command_parser, load_config
from batchformer_panoptic.engine.threads import limit_threads
from batchformer_panoptic.errors import UserError, command
from batchformer_panoptic.evaluation import PanopticEvaluator
from batchformer_panoptic.modeling.postprocessing.masks import ImageMasks
from batchformer_panoptic.modeling.postprocessing.panoptic import (
    MERGES,
    PanopticOptions,
    PanopticSeg,
)

METRICS = [metric + group for group in ("", "_th", "_st") for metric in ("PQ", "SQ", "RQ")]


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = command_parser(__doc__)
    parser.add_argument("--dataset", metavar="NAME", help="default: first of DATASETS.TEST")
    parser.add_argument(
        "--merges", nargs="+", choices=list(MERGES), default=list(MERGES), help="default: all"
    )
    return parser.parse_args(argv)


@command
def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    cfg = load_config(args.config_file, args.opts)
    if not cfg.MODEL.MASK_ON:
        raise UserError("MODEL.MASK_ON is False: a model without masks has nothing to merge")
    dataset = choose_dataset(cfg, "TEST", args.dataset)
    cfg.MODEL.PANOPTIC.INSTANCES_TEST = False
    metrics = compare(cfg, dataset, args.merges)
    print(f"{dataset}, {thresholds(cfg)}")
    print(table(metrics))
    return 0


class EveryMerge:
    """Replaces the merge of a model: returns the panoptic result of each merge by name."""

    def __init__(self, names: Sequence[str]) -> None:
        self._merges = {name: MERGES[name] for name in names}

    def __call__(
        self,
        masks: ImageMasks,
        scores: Tensor,
        labels: Tensor,
        *,
        thing_class_ids: Sequence[int],
        options: PanopticOptions,
    ) -> dict[str, PanopticSeg]:
        return {
            name: merge(masks, scores, labels, thing_class_ids=thing_class_ids, options=options)
            for name, merge in self._merges.items()
        }


def compare(cfg: CfgNode, dataset: str, names: Sequence[str]) -> dict[str, dict[str, float]]:
    """Metrics of each merge on a data set, in percent; groups without classes are left out."""
    predictor = Predictor(cfg)
    workers = cfg.DATALOADER.NUM_WORKERS
    limit_threads(cfg, predictor.model, cfg.TEST.IMS_PER_BATCH, workers=workers)
    predictor.check_classes_of(dataset)
    model: Any = predictor.model
    model.inference_options = model.inference_options._replace(merge=EveryMerge(names))
    evaluators = {name: PanopticEvaluator(dataset) for name in names}
    with torch.inference_mode():
        for inputs in build_test_loader(cfg, dataset):
            results = [output["panoptic_seg"] for output in model(inputs)]
            for name, evaluator in evaluators.items():
                evaluator.process(inputs, [{"panoptic_seg": result[name]} for result in results])
    return {name: evaluator.evaluate()["panoptic_seg"] for name, evaluator in evaluators.items()}


def thresholds(cfg: CfgNode) -> str:
    node = cfg.MODEL.PANOPTIC
    keys = ("SCORE_THRESHOLD", "DUPLICATE_IOU", "MIN_AREA", "MASK_THRESHOLD", "OVERLAP_THRESHOLD")
    return ", ".join(f"{key}_TEST {node[key + '_TEST']}" for key in keys)


def table(metrics: dict[str, dict[str, float]]) -> str:
    rows = [
        [name, *(f"{values[key]:.2f}" if key in values else "n/a" for key in METRICS)]
        for name, values in metrics.items()
    ]
    return tabulate(rows, ["merge", *METRICS], tablefmt="pipe", disable_numparse=True)


if __name__ == "__main__":
    sys.exit(main())
