"""A checkpointer that refuses what does not fit, and says why."""

import os
from collections.abc import Sequence
from typing import Any, NamedTuple

from detectron2.checkpoint import DetectionCheckpointer
from fvcore.common.checkpoint import _IncompatibleKeys
from torch import nn

from ..data.categories import ClassTable
from ..errors import UserError
from .class_table import KEY as CLASS_TABLE
from .class_table import ClassTableRecord
from .files import read_model_zoo_pkl, read_pth

LIVE_MODEL = "live_model"
# Checkpoints that are no point to resume from: they are saved beside the regular ones.
_SIDE_CHECKPOINTS = ("model_best", "model_nonfinite")
_BLOCK = "batchformer"
_MASK_HEAD = "mask_head."
# The classifier of an ImageNet network, and a bias that Detectron2's MSRA files carry unused.
_CLASSIFIER_PARTS = {"fc", "fc1000", "pred", "classifier"}
_UNUSED_BIAS = "stem.conv1.bias"
_SHOWN = 5


class _Misfit(NamedTuple):
    """What of a checkpoint does not fit a model."""

    missing: list[str]
    unexpected: list[str]
    wrong_shape: list[tuple[str, tuple[int, ...], tuple[int, ...]]]  # name, theirs, ours


class PanopticCheckpointer(DetectionCheckpointer):
    """Detectron2's checkpointer, strict: weights that do not fit are an error and not a log line.

    Loading weights alone (``MODEL.WEIGHTS``) tolerates, each with one logged line:

    * keys of the BatchFormer block, absent or superfluous, so that models with and without the
      block read each other's checkpoints;
    * for training only, a backbone-only file (ImageNet weights), its classifier apart;
    * for training only, a whole mask head that is absent (boxes first, masks second).

    Resuming tolerates nothing. ``.pth`` files are read with ``weights_only=True``; ``.pkl`` files
    only when they are dictionaries of arrays in the layout of Detectron2's model zoo.

    With an ``ema``, a checkpoint holds the averaged weights under "model", which is what
    evaluation and the demo load, and the weights being trained under "live_model".

    Args:
        model: the model, wrapped for distributed training or not.
        save_dir: where checkpoints are saved and ``last_checkpoint`` is kept.
        training: whether the weights are a starting point (see above) or about to be evaluated.
        class_table: classes of the data set, to be stored and compared.
        ema: an object with ``averaged_state_dict()``, ``state_dict()``, ``load_state_dict()``.
        checkpointables: further objects to save and resume, as in Detectron2.
    """

    def __init__(
        self,
        model: nn.Module,
        save_dir: str = "",
        *,
        training: bool = False,
        class_table: ClassTable | None = None,
        ema: Any = None,
        save_to_disk: bool | None = None,
        **checkpointables: Any,
    ) -> None:
        if ema is not None:
            checkpointables[LIVE_MODEL] = ema
        super().__init__(model, save_dir, save_to_disk=save_to_disk, **checkpointables)
        self._training = training
        self._ema = ema
        self._record = None if class_table is None else ClassTableRecord(class_table)
        self._resuming = False
        self._path = ""

    def save(self, name: str, **kwargs: Any) -> None:
        """Save the model, the class table and all checkpointables to ``save_dir/name.pth``."""
        if self._record is not None:
            kwargs[CLASS_TABLE] = self._record.state_dict()
        if self._ema is not None:
            kwargs["model"] = self._ema.averaged_state_dict()
        super().save(name, **kwargs)

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        """Remember the file to resume from, unless it is a side checkpoint."""
        if not last_filename_basename.startswith(_SIDE_CHECKPOINTS):
            super().tag_last_checkpoint(last_filename_basename)

    def load(self, path: str, checkpointables: list[str] | None = None) -> dict[str, Any]:
        """Load weights and, unless ``checkpointables`` says otherwise, everything to resume.

        Args:
            path: file or URL; empty: nothing is loaded.
            checkpointables: names to load beside the model. None: all, that is resume.

        Returns:
            What else the file holds.

        Raises:
            UserError: no such file, unreadable, other classes, or it does not fit.
        """
        if path and "://" not in path and not os.path.isfile(path):
            raise UserError(f"checkpoint {path} not found; see MODEL.WEIGHTS or --resume")
        self._resuming = checkpointables is None and bool(self.checkpointables)
        self._path = path
        try:
            rest: dict[str, Any] = super().load(path, checkpointables)
        except OSError as error:
            raise UserError(f"checkpoint {path} cannot be read: {error}") from error
        except UserError:
            raise
        except ValueError as error:
            # The optimizer, whose groups follow from the config, does not find its own state.
            raise UserError(
                f"cannot resume from {path}: {error}; resume with the config of the run, or start "
                "another OUTPUT_DIR with MODEL.WEIGHTS"
            ) from error
        finally:
            self._parsed_url_during_load = None
        if self._resuming and self._ema is None and LIVE_MODEL in rest:
            raise UserError(
                f"checkpoint {path} was trained with SOLVER.EMA_DECAY > 0; resume with the same"
            )
        return rest

    def _load_file(self, filename: str) -> dict[str, Any]:
        if filename.endswith(".pkl"):
            return read_model_zoo_pkl(filename)
        return read_pth(filename)

    def _load_model(self, checkpoint: dict[str, Any]) -> _IncompatibleKeys:
        if self._record is not None and CLASS_TABLE in checkpoint:
            self._record.load_state_dict(checkpoint[CLASS_TABLE])
        incompatible = super()._load_model(checkpoint)
        wrong_shape = list(incompatible.incorrect_shapes)
        # fvcore sets aside what has the wrong shape, and then misses it.
        missing = _without(incompatible.missing_keys, [name for name, _, _ in wrong_shape])
        self._refuse_misfit(_Misfit(missing, list(incompatible.unexpected_keys), wrong_shape))
        return _IncompatibleKeys(missing_keys=[], unexpected_keys=[], incorrect_shapes=[])

    def _refuse_misfit(self, misfit: _Misfit) -> None:
        if not self._resuming:
            misfit = self._without_block(misfit)
            if self._training:
                misfit = self._without_absent_heads(misfit)
        if any(misfit):
            raise UserError(self._describe(misfit))

    def _without_block(self, misfit: _Misfit) -> _Misfit:
        missing = [k for k in misfit.missing if _BLOCK in k]
        unexpected = [k for k in misfit.unexpected if _BLOCK in k]
        if missing:
            self.logger.info(f"{self._path} has no BatchFormer block: the model's keeps its values")
        if unexpected:
            self.logger.info(f"the BatchFormer block of {self._path} is not used by this model")
        return misfit._replace(
            missing=_without(misfit.missing, missing),
            unexpected=_without(misfit.unexpected, unexpected),
        )

    def _without_absent_heads(self, misfit: _Misfit) -> _Misfit:
        """Drop what may be absent when weights are a starting point of training."""
        ours = list(self.model.state_dict())
        outside_backbone = [k for k in ours if not k.startswith("backbone.")]
        mask_head = [k for k in ours if _is_mask_head(k)]
        missing = set(misfit.missing)
        if _all_missing(outside_backbone, missing):
            self.logger.info(f"{self._path} initialises the backbone; the rest starts afresh")
            return misfit._replace(
                missing=[
                    k
                    for k in misfit.missing
                    if k.startswith("backbone.") and not k.endswith("num_batches_tracked")
                ],
                unexpected=[k for k in misfit.unexpected if not _is_classifier(k)],
            )
        if mask_head and missing.issuperset(mask_head):
            self.logger.info(f"{self._path} has no mask head: it starts afresh")
            return misfit._replace(missing=_without(misfit.missing, mask_head))
        return misfit

    def _describe(self, misfit: _Misfit) -> str:
        found = []
        if misfit.missing:
            found.append(f"{len(misfit.missing)} keys missing ({_first(misfit.missing)})")
        if misfit.unexpected:
            found.append(f"{len(misfit.unexpected)} keys unknown ({_first(misfit.unexpected)})")
        if misfit.wrong_shape:
            shapes = [f"{k} {theirs} instead of {ours}" for k, theirs, ours in misfit.wrong_shape]
            found.append(f"{len(shapes)} shapes differ ({_first(shapes)})")
        return (
            f"checkpoint {self._path} does not fit the model: {'; '.join(found)}. "
            f"{self._remedy(misfit)}"
        )

    def _remedy(self, misfit: _Misfit) -> str:
        if misfit.unexpected and all(map(_is_mask_head, misfit.unexpected)):
            return "It has a mask head and the model has none: set MODEL.MASK_ON True"
        if misfit.missing and all(map(_is_mask_head, misfit.missing)):
            return "It has no mask head: set MODEL.MASK_ON False, or train the head first"
        if misfit.wrong_shape and not misfit.missing and not misfit.unexpected:
            return (
                "Sizes of the model (MODEL.DETR.NUM_CLASSES, which the data set decides, "
                "NUM_OBJECT_QUERIES, HIDDEN_DIM, ...) must be those of its training"
            )
        return "Use the config it was trained with, usually config.yaml beside it"


def _without(keys: Sequence[str], dropped: Sequence[str]) -> list[str]:
    gone = set(dropped)
    return [k for k in keys if k not in gone]


def _first(items: Sequence[str]) -> str:
    return ", ".join(items[:_SHOWN]) + (", ..." if len(items) > _SHOWN else "")


def _is_mask_head(key: str) -> bool:
    return key.startswith(_MASK_HEAD)


def _is_classifier(key: str) -> bool:
    return key.endswith(_UNUSED_BIAS) or not _CLASSIFIER_PARTS.isdisjoint(key.split(".")[:-1])


def _all_missing(keys: Sequence[str], missing: set[str]) -> bool:
    """Whether nothing outside the backbone (the block and image statistics apart) was found."""
    ignored = ("pixel_mean", "pixel_std")
    return all(k in missing or _BLOCK in k or k in ignored for k in keys)
