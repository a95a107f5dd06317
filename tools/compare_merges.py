"""Panoptic quality of every merge, from the same predictions of a model.

    python tools/compare_merges.py --config-file F --opts MODEL.WEIGHTS W

The model sees each image once; what it predicts goes through all merges of
MODEL.PANOPTIC.MERGE_TEST with the thresholds of the config.
"""

import argparse
import sys
from collections.abc import Sequence
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from tabulate import tabulate
from torch import Tensor

from batchformer_panoptic.data import ClassTable, build_test_loader, setup_datasets
from batchformer_panoptic.engine import load_config
from batchformer_panoptic.engine.predictor import Predictor
from batchformer_panoptic.errors import UserError
from batchformer_panoptic.evaluation import PanopticEvaluator
from batchformer_panoptic.modeling.postprocessing.masks import ImageMasks
from batchformer_panoptic.modeling.postprocessing.panoptic import (
    MERGES,
    PanopticOptions,
    PanopticSeg,
)

METRICS = [metric + group for group in ("", "_th", "_st") for metric in ("PQ", "SQ", "RQ")]


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config-file", required=True, metavar="FILE", help="YAML of the model")
    parser.add_argument("--dataset", metavar="NAME", help="default: the first of DATASETS.TEST")
    parser.add_argument(
        "--merges", nargs="+", choices=list(MERGES), default=list(MERGES), help="default: all"
    )
    parser.add_argument(
        "--opts", nargs=argparse.REMAINDER, default=[], help="config changes, KEY VALUE ..."
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    try:
        cfg = prepare(args)
        metrics = compare(cfg, args.merges)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{cfg.DATASETS.TEST[0]}, {thresholds(cfg)}")
    print(table(metrics))
    return 0


def prepare(args: argparse.Namespace) -> CfgNode:
    """The config of a run that returns panoptic maps alone, with its data sets registered."""
    cfg = load_config(args.config_file, args.opts)
    if not cfg.MODEL.MASK_ON:
        raise UserError("MODEL.MASK_ON is False: a model without masks has nothing to merge")
    if args.dataset:
        cfg.DATASETS.TEST = (args.dataset,)
    if not cfg.DATASETS.TEST:
        raise UserError("DATASETS.TEST is empty: name a data set with --dataset")
    cfg.MODEL.PANOPTIC.INSTANCES_TEST = False
    setup_datasets(cfg)
    return cfg


class EveryMerge:
    """In the place of a merge: a panoptic result of each, by name."""

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


def compare(cfg: CfgNode, names: Sequence[str]) -> dict[str, dict[str, float]]:
    """Metrics in percent of each merge on the first of DATASETS.TEST; missing groups left out."""
    dataset = cfg.DATASETS.TEST[0]
    predictor = Predictor(cfg)
    classes = ClassTable.from_metadata(MetadataCatalog.get(dataset))
    if difference := classes.difference(predictor.class_table):
        raise UserError(f"data set {dataset} and checkpoint have other classes: {difference}")
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
