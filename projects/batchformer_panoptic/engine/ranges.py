"""Ranges of the numbers in a config, rules between keys, and Detectron2's keys without effect."""

import logging
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from detectron2.config import CfgNode, get_cfg

from ..config import classifies
from ..errors import UserError

logger = logging.getLogger(__name__)

_LARGEST_INT = 2**31 - 1


class Range(NamedTuple):
    """The numbers that a key may have, or each entry of a key that is a list.

    Attributes:
        low: the smallest.
        high: the largest; by default the largest integer of 32 bits.
        open_low: the smallest is itself excluded.
        open_high: the same for the largest.
        length: of the list; None: a number, or a list of any length except 0.
        may_be_empty: the list may also have no entry.
    """

    low: float
    high: float = _LARGEST_INT
    open_low: bool = False
    open_high: bool = False
    length: int | None = None
    may_be_empty: bool = False

    def __str__(self) -> str:
        if self.high in (_LARGEST_INT, math.inf):
            text = f"{'more than' if self.open_low else 'at least'} {self.low:g}"
        else:
            text = f"{'more than' if self.open_low else 'from'} {self.low:g} to "
            text += f"{'less than ' if self.open_high else ''}{self.high:.10g}"
        if self.low == -_LARGEST_INT:
            return f"{self.length} numbers"
        return text if self.length is None else f"{self.length} numbers, each {text}"

    def allows(self, value: Any) -> bool:
        """Whether a value of a config is of this range; also False for what is not a number."""
        if isinstance(value, list | tuple):
            fits = self.length in (None, len(value)) and (len(value) > 0 or self.may_be_empty)
            return fits and all(self._has(entry) for entry in value)
        return self.length is None and self._has(value)

    def _has(self, value: Any) -> bool:
        if isinstance(value, bool) or not isinstance(value, int | float):
            return False
        if (self.open_low and value == self.low) or (self.open_high and value == self.high):
            return False
        return self.low <= value <= self.high


_POSITIVE = Range(0, open_low=True)
_NOT_NEGATIVE = Range(0)
_COUNT = Range(1)
_SHARE = Range(0, 1)

# All numbers that a run reads, by key; keys that may be None are checked where they are not.
RANGES: dict[str, Range] = {
    "SOLVER.BASE_LR": Range(0, math.inf, open_high=True),
    **dict.fromkeys(
        (
            "MODEL.SMALL_RESNET.STEM_CHANNELS",
            "MODEL.SMALL_RESNET.BLOCKS_PER_STAGE",
            "MODEL.SWIN.EMBED_DIM",
            "MODEL.SWIN.WINDOW_SIZE",
            "MODEL.RESNETS.NUM_GROUPS",
            "MODEL.RESNETS.WIDTH_PER_GROUP",
            "MODEL.RESNETS.STEM_OUT_CHANNELS",
            "MODEL.RESNETS.RES2_OUT_CHANNELS",
            "MODEL.DETR.NUM_OBJECT_QUERIES",
            "MODEL.DETR.HIDDEN_DIM",
            "MODEL.DETR.NHEADS",
            "MODEL.DETR.DIM_FEEDFORWARD",
            "MODEL.DETR.ENC_LAYERS",
            "MODEL.DETR.DEC_LAYERS",
            "MODEL.DEFORMABLE.NUM_FEATURE_LEVELS",
            "MODEL.DEFORMABLE.ENC_POINTS",
            "MODEL.DEFORMABLE.DEC_POINTS",
            "MODEL.MASK2FORMER.MASK_DIM",
            "MODEL.MASK2FORMER.ENC_POINTS",
            "MODEL.MASK2FORMER.ENC_DIM_FEEDFORWARD",
            "MODEL.MASK2FORMER.NUM_POINTS",
            "MODEL.MASK2FORMER.OVERSAMPLE_RATIO",
            "MODEL.MASK2FORMER.PILOT.NUM_QUERIES",
            "MODEL.MASK_HEAD.STEP_MEMORY",
            "MODEL.BATCHFORMER.NUM_HEADS",
            "MODEL.BATCHFORMER.EVERY",
            "MODEL.CLASSIFIER.IMAGE_SIZE",
            "INPUT.MAX_SIZE_TRAIN",
            "INPUT.MAX_SIZE_TEST",
            "INPUT.LARGE_SCALE_JITTER.SIZE",
            "INPUT.CLASSIFICATION.REPEATED_AUGMENTATION",
            "SOLVER.MAX_ITER",
            "SOLVER.NUM_DECAYS",
            "SOLVER.CHECKPOINT_PERIOD",
            "SOLVER.IMS_PER_BATCH",
            "SOLVER.GRADIENT_ACCUMULATION",
            "TEST.DETECTIONS_PER_IMAGE",
            "TEST.IMS_PER_BATCH",
        ),
        _COUNT,
    ),
    **dict.fromkeys(
        (
            "MODEL.DETR.NUM_CLASSES",
            "MODEL.DETR.NO_OBJECT_WEIGHT",
            "MODEL.DETR.COST_CLASS",
            "MODEL.DETR.COST_BBOX",
            "MODEL.DETR.COST_GIOU",
            "MODEL.DETR.CLASS_WEIGHT",
            "MODEL.DETR.BBOX_WEIGHT",
            "MODEL.DETR.GIOU_WEIGHT",
            "MODEL.DEFORMABLE.LR_FACTOR",
            "MODEL.MASK2FORMER.MASK_WEIGHT",
            "MODEL.MASK2FORMER.DICE_WEIGHT",
            "MODEL.MASK_HEAD.MASK_WEIGHT",
            "MODEL.MASK_HEAD.DICE_WEIGHT",
            "MODEL.SEMANTIC_AUX.WEIGHT",
            "MODEL.PANOPTIC.MIN_AREA_TEST",
            "MODEL.BATCHFORMER.DIM_FEEDFORWARD",
            "MODEL.BATCHFORMER.LR_FACTOR",
            "MODEL.CLASSIFIER.NUM_CLASSES",
            "MODEL.CLASSIFIER.MIXUP_ALPHA",
            "MODEL.CLASSIFIER.CUTMIX_ALPHA",
            "INPUT.MIN_SIZE_TEST",
            "INPUT.CLASSIFICATION.PADDING",
            "INPUT.CLASSIFICATION.COLOR_JITTER",
            "DATALOADER.REPEAT_THRESHOLD",
            "SOLVER.BASE_LR_END",
            "SOLVER.WEIGHT_DECAY",
            "SOLVER.WEIGHT_DECAY_NORM",
            "SOLVER.WEIGHT_DECAY_BIAS",
            "SOLVER.WEIGHT_DECAY_EMBED",
            "SOLVER.BACKBONE_MULTIPLIER",
            "SOLVER.WARMUP_ITERS",
            "SOLVER.EPOCHS",
            "SOLVER.CHECKPOINTS_KEPT",
            "SOLVER.REFERENCE_WORLD_SIZE",
            "TEST.EVAL_PERIOD",
        ),
        _NOT_NEGATIVE,
    ),
    **dict.fromkeys(
        (
            "MODEL.SWIN.DROP_PATH_RATE",
            "MODEL.DETR.DROPOUT",
            "MODEL.DETR.FOCAL_ALPHA",
            "MODEL.MASK2FORMER.IMPORTANCE_SAMPLE_RATIO",
            "MODEL.MASK2FORMER.PILOT.LABEL_NOISE",
            "MODEL.MASK2FORMER.PILOT.MASK_NOISE",
            "MODEL.PANOPTIC.SCORE_THRESHOLD_TEST",
            "MODEL.PANOPTIC.MASK_THRESHOLD_TEST",
            "MODEL.PANOPTIC.OVERLAP_THRESHOLD_TEST",
            "MODEL.PANOPTIC.DUPLICATE_IOU_TEST",
            "MODEL.PANOPTIC.INSTANCE_SCORE_THRESHOLD_TEST",
            "MODEL.BATCHFORMER.DROPOUT",
            "MODEL.CLASSIFIER.MIXUP_PROB",
            "MODEL.CLASSIFIER.SWITCH_PROB",
            "INPUT.COPY_PASTE",
            "INPUT.CLASSIFICATION.HFLIP",
            "INPUT.CLASSIFICATION.RANDOM_ERASING",
            "SOLVER.WARMUP_FACTOR",
        ),
        _SHARE,
    ),
    "MODEL.PIXEL_MEAN": Range(-_LARGEST_INT, length=3),
    "MODEL.PIXEL_STD": Range(0, open_low=True, length=3),
    "MODEL.BACKBONE.FREEZE_AT": Range(0, 5),
    "MODEL.RESNETS.RES5_DILATION": Range(1, 2),
    "MODEL.SMALL_RESNET.STAGE_CHANNELS": _COUNT,
    "MODEL.SMALL_RESNET.STAGE_STRIDES": _COUNT,
    "MODEL.SWIN.DEPTHS": Range(1, length=4),
    "MODEL.SWIN.NUM_HEADS": Range(1, length=4),
    "MODEL.SMCA.SMOOTH": _POSITIVE,
    "MODEL.MASK_HEAD.CHANNELS": Range(1, may_be_empty=True),
    "MODEL.PANOPTIC.THING_CLASS_IDS": Range(0, may_be_empty=True),
    "MODEL.BATCHFORMER.INSERT_LAYERS": Range(0, may_be_empty=True),
    "MODEL.BATCHFORMER.STREAM_WEIGHTS": Range(0, length=2),
    "MODEL.CLASSIFIER.DROP_PATH": Range(0, 1, open_high=True),
    "MODEL.CLASSIFIER.LABEL_SMOOTHING": Range(0, 1, open_high=True),
    "INPUT.MIN_SIZE_TRAIN": _COUNT,
    # Pillow refuses larger files.
    "INPUT.MAX_PIXELS": Range(1, 178_956_970),
    "INPUT.CROP.SIZE": Range(0, open_low=True, length=2),
    "INPUT.RESIZE_OR_CROP.MIN_SIZES": _COUNT,
    "INPUT.RESIZE_OR_CROP.CROP_RANGE": Range(1, length=2),
    "INPUT.LARGE_SCALE_JITTER.SCALE_RANGE": Range(0, open_low=True, length=2),
    "INPUT.CLASSIFICATION.SCALE": Range(0, 1, open_low=True, length=2),
    "INPUT.CLASSIFICATION.RATIO": Range(0, open_low=True, length=2),
    "INPUT.CLASSIFICATION.CROP_PCT": Range(0, 1, open_low=True),
    "DATALOADER.NUM_WORKERS": Range(0, 1024),
    "SOLVER.MOMENTUM": Range(0, 1, open_high=True),
    "SOLVER.GAMMA": _POSITIVE,
    "SOLVER.STEPS": Range(1, may_be_empty=True),
    "SOLVER.CLIP_GRADIENTS.CLIP_VALUE": _POSITIVE,
    "SOLVER.CLIP_GRADIENTS.NORM_TYPE": Range(0, math.inf, open_low=True),
    "SOLVER.EMA_DECAY": Range(0, 1, open_high=True),
    # numpy's seeds have 32 bits, and those of processes and iterations are counted from this one.
    "SEED": Range(-1, 2**32 - 2**16),
}

# Sections and keys of Detectron2 that nothing here reads.
_WITHOUT_EFFECT = (
    *("MODEL.PROPOSAL_GENERATOR.", "MODEL.ANCHOR_GENERATOR.", "MODEL.RPN.", "MODEL.ROI_"),
    *("MODEL.SEM_SEG_HEAD.", "MODEL.PANOPTIC_FPN.", "MODEL.RETINANET.", "MODEL.KEYPOINT_ON"),
    *("MODEL.LOAD_PROPOSALS", "INPUT.MASK_FORMAT", "DATASETS.PROPOSAL_FILES_"),
    *("DATASETS.PRECOMPUTED_PROPOSAL_", "TEST.AUG.", "TEST.KEYPOINT_OKS_SIGMAS"),
    *("TEST.PRECISE_BN.NUM_ITER", "VIS_PERIOD", "GLOBAL."),
)


def check_values(cfg: CfgNode) -> None:
    """Check the numbers of a config, and rules between them.

    Raises:
        UserError: the first key whose value is not in its range, or contradicts another key.
    """
    values = dict(_leaves(cfg))
    for key, allowed in RANGES.items():
        value = values[key]
        if value is not None and not allowed.allows(value):
            raise UserError(f"{key} must be {_rule(allowed, value)}, not {_short(value)}")
    for fits, message in (*_pairs(cfg), *_heads(cfg)):
        if not fits:
            raise UserError(message)


def warn_of_keys_without_effect(cfg: CfgNode) -> None:
    """Log a warning that names the changed keys of Detectron2 that nothing here reads."""
    usual = {key: _as_lists(value) for key, value in _leaves(get_cfg())}
    changed = [
        key
        for key, value in _leaves(cfg)
        if key.startswith(_WITHOUT_EFFECT) and key in usual and _as_lists(value) != usual[key]
    ]
    if changed:
        logger.warning(f"without effect in this project: {', '.join(changed)}")


def _leaves(node: CfgNode, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in node.items():
        if isinstance(value, CfgNode):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _as_lists(value: Any) -> Any:
    """A value as YAML returns it, which has no tuples."""
    return [_as_lists(entry) for entry in value] if isinstance(value, list | tuple) else value


def _rule(allowed: Range, value: Any) -> str:
    """The range in the words that fit a value outside it."""
    if isinstance(value, list | tuple) and allowed.length is None:
        return f"one or more numbers, each {allowed}"
    is_large = isinstance(value, int | float) and value > _LARGEST_INT == allowed.high
    return f"at most {_LARGEST_INT}" if is_large else str(allowed)


def _short(value: Any) -> str:
    text = str(list(value) if isinstance(value, tuple) else value)
    return text if len(text) <= 60 else f"{text[:40]}... ({len(text)} characters)"


def _pairs(cfg: CfgNode) -> Iterator[tuple[bool, str]]:
    """Rules between keys of the data and of the schedule, each with the message of its failure."""
    data, solver = cfg.INPUT, cfg.SOLVER
    sizes = list(data.MIN_SIZE_TRAIN)
    yield (
        data.MIN_SIZE_TRAIN_SAMPLING != "range" or len(sizes) == 2,
        f"INPUT.MIN_SIZE_TRAIN_SAMPLING range needs two INPUT.MIN_SIZE_TRAIN, not {sizes}",
    )
    for key, pair in (
        ("INPUT.CLASSIFICATION.SCALE", data.CLASSIFICATION.SCALE),
        ("INPUT.CLASSIFICATION.RATIO", data.CLASSIFICATION.RATIO),
    ):
        yield pair[0] <= pair[1], f"{key} must be the smallest and the largest, not {list(pair)}"
    steps = list(solver.STEPS)
    yield steps == sorted(steps), f"SOLVER.STEPS must be in ascending order, not {steps}"
    yield (
        solver.LR_SCHEDULER_NAME != "WarmupCosineLR"
        or (solver.BASE_LR > 0 and solver.BASE_LR >= solver.BASE_LR_END),
        "SOLVER.LR_SCHEDULER_NAME WarmupCosineLR needs a SOLVER.BASE_LR above 0 and not below "
        f"SOLVER.BASE_LR_END: they are {solver.BASE_LR} and {solver.BASE_LR_END}",
    )


def _heads(cfg: CfgNode) -> Iterator[tuple[bool, str]]:
    """Rules between widths and attention heads of the model."""
    if classifies(cfg):
        return
    detr, block = cfg.MODEL.DETR, cfg.MODEL.BATCHFORMER
    widths: list[tuple[str, int, str, int]] = [
        ("MODEL.DETR.HIDDEN_DIM", detr.HIDDEN_DIM, "MODEL.DETR.NHEADS", detr.NHEADS)
    ]
    if block.ENABLED:
        heads = ("MODEL.BATCHFORMER.NUM_HEADS", block.NUM_HEADS)
        widths.append(("MODEL.DETR.HIDDEN_DIM", detr.HIDDEN_DIM, *heads))
    for name, width, divisor_name, divisor in widths:
        yield (
            width % divisor == 0,
            f"{name} {width} must be a multiple of {divisor_name} {divisor}",
        )
    swin: Sequence[int] = cfg.MODEL.SWIN.NUM_HEADS
    for stage, heads_of_stage in enumerate(swin):
        channels = cfg.MODEL.SWIN.EMBED_DIM * 2**stage
        yield (
            cfg.MODEL.BACKBONE.NAME != "build_swin_backbone" or channels % heads_of_stage == 0,
            f"MODEL.SWIN.NUM_HEADS {heads_of_stage} must divide the {channels} channels of stage "
            f"{stage + 1}",
        )
    small = cfg.MODEL.SMALL_RESNET
    yield (
        len(small.STAGE_CHANNELS) == len(small.STAGE_STRIDES),
        "MODEL.SMALL_RESNET.STAGE_CHANNELS and STAGE_STRIDES must have one entry for each stage: "
        f"they have {len(small.STAGE_CHANNELS)} and {len(small.STAGE_STRIDES)}",
    )
