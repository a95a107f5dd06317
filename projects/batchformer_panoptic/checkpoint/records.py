"""The records stored in a checkpoint: classes, settings that weights depend on, and the run.

Settings are those that affect predictions but neither names nor shapes of weights.
"""

import logging
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from detectron2.config import CfgNode

from ..config import classifies
from ..data.class_table import ClassTable
from ..errors import UserError
from .files import read_weights
from .mismatch import start_from

logger = logging.getLogger(__name__)

# --- classes ---

CLASS_TABLE_KEY = "class_table"


class ClassTableRecord:
    """The classes of a model, stored in every checkpoint under "class_table".

    Loading compares the stored classes with those of the data set, which stay in effect.
    """

    def __init__(self, table: ClassTable) -> None:
        self._table = table

    def state_dict(self) -> list[dict[str, Any]]:
        """Return COCO category dicts in contiguous order."""
        return self._table.to_json()

    def check(self, categories: list[dict[str, Any]], path: str) -> None:
        """Refuse a checkpoint with other classes; colours and dataset ids may differ.

        Raises:
            UserError: names the first difference.
        """
        difference = self._table.difference(ClassTable.from_json(categories))
        if difference:
            raise UserError(
                "the checkpoint was trained on other classes (data set against checkpoint): "
                f"{difference}; use the data set of its training, or other weights; to train on "
                f"other classes: {start_from(path)}"
            )


def read_class_table(path: str) -> ClassTable | None:
    """Return the classes stored in a checkpoint, or None.

    Raises:
        UserError: the file cannot be read.
    """
    categories = read_weights(path).get(CLASS_TABLE_KEY)
    return None if categories is None else ClassTable.from_json(categories)


# --- settings ---

SETTINGS_KEY = "settings"
# Settings of the class head, which do not matter to weights that are loaded without it.
_OF_CLASS_HEAD = {
    "MODEL.DETR.SCORING",
    "MODEL.DETR.NUM_CLASSES",
    "MODEL.CLASSIFIER.NUM_CLASSES",
}
# Pixel statistics are in 0-255, and files have them with different precisions.
_TOLERANCE = 0.01
# "resnet50.a1_in1k": the part after the dot only selects the weights to download.
_TIMM_NAMES = ("MODEL.TIMM.NAME", "MODEL.CLASSIFIER.NAME")
_MSRA_BIAS = "stem.conv1.bias"
_CAFFE2_MSRA_BIAS = "conv1_b"


class _Kept(NamedTuple):
    key: str
    applies: Callable[[CfgNode], bool]


def _always(cfg: CfgNode) -> bool:
    return True


def _backbone(cfg: CfgNode) -> str:
    """Name of the backbone; "" for a model without one."""
    return "" if classifies(cfg) else str(cfg.MODEL.BACKBONE.NAME)


def _has_resnet(cfg: CfgNode) -> bool:
    return _backbone(cfg).startswith("build_resnet")


def _has_small_resnet(cfg: CfgNode) -> bool:
    return _backbone(cfg) == "build_small_resnet_backbone"


def _has_timm_model(cfg: CfgNode) -> bool:
    return _backbone(cfg) == "build_timm_backbone"


def _has_queries(cfg: CfgNode) -> bool:
    return bool(cfg.MODEL.META_ARCHITECTURE == "PanopticDETR")


def _has_smca(cfg: CfgNode) -> bool:
    return str(cfg.MODEL.DETR.TRANSFORMER_NAME).startswith("smca")


def _has_mask2former(cfg: CfgNode) -> bool:
    return _has_queries(cfg) and bool(cfg.MODEL.DETR.TRANSFORMER_NAME == "mask2former")


def _has_block(cfg: CfgNode) -> bool:
    return bool(cfg.MODEL.BATCHFORMER.ENABLED)


_KEPT = (
    _Kept("INPUT.FORMAT", _always),
    _Kept("MODEL.PIXEL_MEAN", _always),
    _Kept("MODEL.PIXEL_STD", _always),
    _Kept("MODEL.RESNETS.STRIDE_IN_1X1", _has_resnet),
    _Kept("MODEL.RESNETS.RES5_DILATION", _has_resnet),
    _Kept("MODEL.SMALL_RESNET.STAGE_STRIDES", _has_small_resnet),
    _Kept("MODEL.TIMM.NAME", _has_timm_model),
    _Kept("MODEL.TIMM.NORMALIZE_MAPS", _has_timm_model),
    _Kept("MODEL.DETR.NHEADS", _has_queries),
    _Kept("MODEL.DETR.PRE_NORM", _has_queries),
    _Kept("MODEL.DETR.SCORING", _has_queries),
    _Kept("MODEL.SMCA.SMOOTH", _has_smca),
    _Kept("MODEL.MASK2FORMER.IN_FEATURES", _has_mask2former),
    _Kept("MODEL.BATCHFORMER.NUM_HEADS", _has_block),
    _Kept("MODEL.CLASSIFIER.NAME", classifies),
    _Kept("MODEL.CLASSIFIER.TIMM_KWARGS", classifies),
)


class SettingsRecord:
    """Settings that change predictions without any error when the same weights are loaded.

    Stored in every checkpoint under "settings" are those that affect neither names nor shapes:

    * the channel order and the normalisation of the image;
    * the strides and dilations of a ResNet (two ways to dilate differ in the first block of res5),
      the name of a timm model (``tf_efficientnet_lite0`` and ``efficientnet_lite0`` pad
      differently), and whether its maps are normalised;
    * the number of attention heads (only the mask head has a shape that depends on it) and the
      position of the layer norms;
    * the scoring (K classes with "no object" have as many logits as K + 1 without);
    * the divisor of SMCA's distances, to which the learned Gaussians are relative;
    * the maps that Mask2Former reads (those of some backbones have equal channels);
    * the number of heads of the BatchFormer block;
    * the name of a classifier and the arguments of its timm model.

    Settings that change shapes are not stored, since loading refuses a mismatch anyway. Thresholds,
    losses, image sizes and schedules can be chosen freely for the same weights.

    Converted checkpoints may contain further config keys, which are also compared.

    Args:
        cfg: the config in use; read, never changed.
    """

    def __init__(self, cfg: CfgNode) -> None:
        self._cfg = cfg

    def state_dict(self) -> dict[str, Any]:
        """Return the stored config keys and their values as numbers, texts and lists."""
        keys = [kept.key for kept in _KEPT if kept.applies(self._cfg)]
        if _has_resnet(self._cfg) and self._cfg.MODEL.RESNETS.RES5_DILATION > 1:
            keys.append("MODEL.BACKBONE.NAME")
        return {key: _plain(_lookup(self._cfg, key)) for key in keys}

    def check(
        self, stored: Mapping[str, Any], path: str, *, class_head: bool = True, reason: str = ""
    ) -> None:
        """Refuse a checkpoint with other settings.

        Args:
            stored: config keys and values; keys that do not apply to this model are ignored.
            path: the path of the checkpoint, for the message.
            class_head: whether the class head is loaded.
            reason: origin of the settings if the file does not contain them.

        Raises:
            UserError: names each different key, both values and the remedy.
        """
        ignored = {kept.key for kept in _KEPT if not kept.applies(self._cfg)}
        if not class_head:
            ignored |= _OF_CLASS_HEAD
        different = {
            key: value
            for key, value in stored.items()
            if key not in ignored and not _same_setting(key, value, _lookup(self._cfg, key))
        }
        if not different:
            return
        facts = "; ".join(
            f"{key} is {_text(value)} for the file and {_text(_lookup(self._cfg, key))} in the "
            "config"
            for key, value in different.items()
        )
        options = " ".join(f"{key} {_option(value)}" for key, value in different.items())
        raise UserError(
            f"the weights of {path} need other settings than this config{reason}: {facts}. Add "
            f"{options} to the command line, or use weights made for this config"
        )


def implied_settings(
    checkpoint: Mapping[str, Any], model_keys: Mapping[str, Any]
) -> dict[str, Any]:
    """Recognise MSRA's ImageNet weights, which have no "settings" entry, by parameter names.

    Detectron2 has two files called ``R-50.pkl``. That of MSRA has an unused bias of the first
    convolution, and needs BGR images, a standard deviation of 1 and the stride in the 1x1
    convolution. With the settings of torchvision's file it loads, but loses accuracy.
    """
    weights = checkpoint["model"]
    found = [name for name in weights if name == _CAFFE2_MSRA_BIAS or name.endswith(_MSRA_BIAS)]
    if not found or any(name in model_keys for name in found):
        return {}
    return {
        "INPUT.FORMAT": "BGR",
        "MODEL.PIXEL_STD": [1.0, 1.0, 1.0],
        "MODEL.RESNETS.STRIDE_IN_1X1": True,
    }


# --- the run ---

# With another value the saved state would mean something else.
_FIXED = ("SOLVER.OPTIMIZER", "SOLVER.IMS_PER_BATCH", "SOLVER.GRADIENT_ACCUMULATION")
# A resumed run does not read these, or keeps its own (SEED).
_UNUSED = {"MODEL.INIT_FROM", "MODEL.WEIGHTS", "OUTPUT_DIR", "SEED", "VERSION"}
_PROCESSES = "number of processes"


class RunRecord:
    """The settings and the images of a training, stored in its checkpoints to be resumed.

    The rule for a resumed run with other settings: the optimizer, the size of a batch, the
    accumulation of gradients and the training images are part of what the saved state means, and a
    change is refused. (So is one of the model, the classes, and averaging of weights on or off, by
    `PanopticCheckpointer`.) Every other setting is that of the config, from the next iteration on,
    and a line of the log names each change.

    Args:
        cfg: the config in use; read, never changed.
        processes: number of processes that train.
    """

    def __init__(self, cfg: CfgNode, processes: int) -> None:
        self._settings = {**_flat(cfg), _PROCESSES: processes}
        self._images: Mapping[str, Any] | None = None
        # Whether a checkpoint had such a record; those of older versions do not.
        self.is_loaded = False

    def state_dict(self) -> dict[str, Any]:
        """Return numbers, texts, and containers of them."""
        return {"settings": self._settings, "images": self._images}

    def load_state_dict(self, stored: Mapping[str, Any]) -> None:
        """Compare with the record of the checkpoint that the run is resumed from.

        Raises:
            UserError: a setting has changed that must not.
        """
        theirs, self._images = stored["settings"], stored["images"]
        changed = {
            key: f"{key} {theirs[key]} -> {value}"
            for key, value in self._settings.items()
            if key not in _UNUSED and key in theirs and theirs[key] != value
        }
        fixed = [key for key in _FIXED if key in changed]
        if fixed:
            raise UserError(
                f"cannot resume with {fixed[0]} {self._settings[fixed[0]]}: give that of the run, "
                f"{theirs[fixed[0]]}, or start another OUTPUT_DIR with MODEL.WEIGHTS"
            )
        if changed:
            logger.info(f"resuming with changed settings: {', '.join(changed.values())}")
        self.is_loaded = True

    def set_images(self, images: Mapping[str, Any]) -> None:
        """Store what identifies the training images, and compare it with the checkpoint.

        Args:
            images: "count" and "digest" of the data set.

        Raises:
            UserError: the run was trained on other images or annotations until now.
        """
        stored = self._images
        if stored is not None and stored != images:
            raise UserError(
                f"cannot resume: the {images['count']} training images are not the "
                f"{stored['count']} of the checkpoint, or their annotations have changed; restore "
                "the data set, or start another OUTPUT_DIR with MODEL.WEIGHTS"
            )
        self._images = images


def _flat(cfg: CfgNode, prefix: str = "") -> dict[str, Any]:
    """Return all values of a config by their dotted keys."""
    found: dict[str, Any] = {}
    for key, value in cfg.items():
        name = prefix + key
        found |= _flat(value, f"{name}.") if isinstance(value, CfgNode) else {name: _plain(value)}
    return found


_MISSING = object()


def _lookup(cfg: CfgNode, key: str) -> Any:
    node: Any = cfg
    for part in key.split("."):
        if not isinstance(node, CfgNode) or part not in node:
            return _MISSING
        node = node[part]
    return node


def _plain(value: Any) -> Any:
    return [_plain(x) for x in value] if isinstance(value, list | tuple) else value


def _same_setting(key: str, theirs: Any, ours: Any) -> bool:
    if key in _TIMM_NAMES and isinstance(theirs, str) and isinstance(ours, str):
        return theirs.partition(".")[0] == ours.partition(".")[0]
    return _same(theirs, ours)


def _same(theirs: Any, ours: Any) -> bool:
    if isinstance(theirs, list | tuple) and isinstance(ours, list | tuple):
        return len(theirs) == len(ours) and all(map(_same, theirs, ours))
    if isinstance(theirs, float) or isinstance(ours, float):
        numbers = isinstance(theirs, int | float) and isinstance(ours, int | float)
        return numbers and math.isclose(theirs, ours, abs_tol=_TOLERANCE)
    return bool(theirs == ours)


def _text(value: Any) -> str:
    return "unknown" if value is _MISSING else str(_plain(value))


def _option(value: Any) -> str:
    text = _text(value)
    return f'"{text}"' if " " in text else text
