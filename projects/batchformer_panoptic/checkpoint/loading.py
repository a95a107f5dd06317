"""Checkpointer: strict loading of weights, resuming, and saving."""

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.utils import comm
from fvcore.common.checkpoint import _IncompatibleKeys, _strip_prefix_if_present
from torch import Tensor, nn

from ..data.class_table import ClassTable
from ..data.io import write_text
from ..errors import NonFiniteError, UserError, one_line
from .files import (
    check_is_file,
    non_finite,
    read_weights,
    refuse_non_finite,
    write_weights,
)
from .mismatch import (
    Mismatch,
    describe,
    first,
    is_block,
    is_class_head,
    is_mask_head,
    is_pilot,
    without,
)
from .records import CLASS_TABLE_KEY as CLASS_TABLE
from .records import SETTINGS_KEY as SETTINGS
from .records import ClassTableRecord, SettingsRecord, implied_settings
from .search import LAST_CHECKPOINT, FoundCheckpoint, find_checkpoint

LIVE_MODEL = "live_model"
# Checkpoints that are saved next to the regular ones and are not resumed from.
_SIDE_CHECKPOINTS = ("model_best", "model_nonfinite")
# The classifier of an ImageNet network, and an unused bias in Detectron2's MSRA files.
_CLASSIFIER_PARTS = {"fc", "fc1000", "pred", "classifier"}
_UNUSED_BIAS = "stem.conv1.bias"


class PanopticCheckpointer(DetectionCheckpointer):
    """Detectron2's checkpointer with strict loading: a mismatch is an error instead of a log line.

    Loading only weights (``MODEL.WEIGHTS``) allows the following mismatches and logs each of them:

    * missing or unexpected BatchFormer blocks, so that models with and without the block load each
      other's checkpoints;
    * the same for the label embedding of mask-piloted training;
    * for training, a file with only a backbone (ImageNet weights), with or without its classifier;
    * for training, a missing mask head (boxes are trained first, masks second).

    `load_for_other_classes` also allows other classes. Resuming allows no mismatch. Files are read
    by `read_weights`, which runs no code in them, and written atomically.

    With an ``ema``, a checkpoint has the averaged weights under "model", which evaluation and the
    demo load, and the trained weights under "live_model".

    Args:
        model: the model, wrapped for distributed training or not.
        save_dir: folder of the checkpoints and of the file ``last_checkpoint``.
        training: whether the weights are a starting point of training or are evaluated.
        class_table: classes of the data set; stored, and compared when loading.
        settings: settings that the weights depend on; stored, and compared when loading.
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
        settings: SettingsRecord | None = None,
        ema: Any = None,
        save_to_disk: bool | None = None,
        **checkpointables: Any,
    ) -> None:
        if ema is not None:
            checkpointables[LIVE_MODEL] = ema
        super().__init__(model, save_dir, save_to_disk=save_to_disk, **checkpointables)
        self._training = training
        self._ema = ema
        self._class_table = class_table
        self._classes = None if class_table is None else ClassTableRecord(class_table)
        self._settings = settings
        self._resuming = False
        self._other_classes = False
        self._path = ""
        self._found: FoundCheckpoint | None = None

    def save(self, name: str, **kwargs: Any) -> None:
        """Save model, class table, settings and all checkpointables to ``save_dir/name.pth``.

        An existing file is replaced only after the new one is complete.

        Raises:
            NonFiniteError: something to save is NaN or infinite.
            UserError: the file cannot be written.
        """
        if not self.save_dir or not self.save_to_disk:
            return
        averaged = None if self._ema is None else self._ema.averaged_state_dict()
        data: dict[str, Any] = {"model": averaged or self.model.state_dict()}
        data |= {key: obj.state_dict() for key, obj in self.checkpointables.items()}
        if self._classes is not None:
            data[CLASS_TABLE] = self._classes.state_dict()
        if self._settings is not None:
            data[SETTINGS] = self._settings.state_dict()
        data |= kwargs
        if found := non_finite(data):
            raise NonFiniteError(
                f"checkpoint {name} is not saved: NaN or infinite values in {first(found)} "
                f"({len(found)} in all); lower SOLVER.BASE_LR, and continue from an earlier one"
            )
        path = os.path.join(self.save_dir, f"{name}.pth")
        self.logger.info(f"Saving checkpoint to {path}")
        write_weights(path, data)
        self.tag_last_checkpoint(os.path.basename(path))

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        """Record the file to resume from, except for the best and the non-finite checkpoint."""
        if not last_filename_basename.startswith(_SIDE_CHECKPOINTS):
            write_text(os.path.join(self.save_dir, LAST_CHECKPOINT), last_filename_basename)

    def find_checkpoint(self) -> str:
        """Return the checkpoint of ``save_dir`` to continue from, by the rule of `search`.

        The main process decides for all.

        Returns:
            The path; "" if there are no checkpoints.

        Raises:
            UserError: no checkpoint is whole, or some process cannot see it.
        """
        path = reason = ""
        if comm.is_main_process():
            try:
                self._found = find_checkpoint(
                    Path(self.save_dir), with_trainer="trainer" in self.checkpointables
                )
                path = "" if self._found is None else str(self._found.path)
            except UserError as error:
                reason = str(error)
        path, reason = comm.all_gather((path, reason))[0]
        if reason:
            raise UserError(reason)
        if path and not all(comm.all_gather(os.path.isfile(path))):
            raise UserError(f"checkpoint {path} is not there for all processes")
        return path

    def resume_or_load(self, path: str, *, resume: bool = True) -> dict[str, Any]:
        """Load what `find_checkpoint` finds, to resume from it, or else the weights of a path."""
        found = self.find_checkpoint() if resume else ""
        return self.load(found) if found else self.load(path, checkpointables=[])

    def load(self, path: str, checkpointables: list[str] | None = None) -> dict[str, Any]:
        """Load the model and, by default, everything that is needed to resume.

        Args:
            path: file or URL; empty: nothing is loaded.
            checkpointables: names to load besides the model. None: all of them, to resume.

        Returns:
            The remaining entries of the file.

        Raises:
            UserError: the file does not exist, cannot be read, has other classes or settings, or
                does not fit the model.
        """
        if path and "://" not in path:
            source = "--init-from" if self._other_classes else "MODEL.WEIGHTS or --resume"
            check_is_file(path, hint=f"; see {source}")
        self._resuming = checkpointables is None and bool(self.checkpointables)
        self._path = path
        try:
            rest: dict[str, Any] = super().load(path, checkpointables)
        except OSError as error:
            raise UserError(f"checkpoint {path} cannot be read: {one_line(error)}") from error
        except UserError:
            raise
        except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
            # From the optimizer, if its parameter groups differ under another config, and from
            # entries of a file that are incomplete.
            if not self._resuming:
                raise
            reason = one_line(error, first_line_only=True)
            raise UserError(
                f"cannot resume from {path}: its state of the training cannot be restored "
                f"({type(error).__name__}: {reason}); resume with the config of the run, or start "
                "another OUTPUT_DIR with MODEL.WEIGHTS"
            ) from error
        finally:
            self._parsed_url_during_load = None
        return rest

    def load_for_other_classes(self, path: str) -> None:
        """Load a model trained on other classes, of the class head only the rows that fit.

        Class layers (of the box head, of the auxiliary pixel classifiers, of an image classifier)
        have one row per class. Rows of classes with the same name (`ClassTable.same_names`) and
        that of "no object" are loaded, all others keep their initial values; one log line names
        them. Without a class table in the file, the class head keeps its initial values. The rest
        must fit as usual; files with only a backbone are refused.

        Raises:
            UserError: as in `load`.
        """
        self._other_classes = True
        try:
            self.load(path, checkpointables=[])
        finally:
            self._other_classes = False

    def _load_file(self, filename: str) -> dict[str, Any]:
        found, self._found = self._found, None
        if found is None or str(found.path) != filename:
            content = read_weights(filename)
        else:
            content = found.content
        if self._resuming:  # optimizer and moving average, too
            refuse_non_finite(filename, content)
        return content

    def _load_model(self, checkpoint: dict[str, Any]) -> _IncompatibleKeys:
        if self._resuming and (LIVE_MODEL in checkpoint) != (self._ema is not None):
            had = "> 0" if self._ema is None else "0"
            raise UserError(
                f"checkpoint {self._path} was trained with SOLVER.EMA_DECAY {had}: resume with the "
                "same, or start another OUTPUT_DIR with MODEL.WEIGHTS"
            )
        weights = checkpoint["model"]
        _strip_prefix_if_present(weights, "module.")
        self._compare(checkpoint)
        if self._other_classes:
            self._keep_shared_rows(checkpoint)
        incompatible = super()._load_model(checkpoint)
        wrong_shape = list(incompatible.incorrect_shapes)
        # fvcore removes tensors with a wrong shape, and then reports them as missing.
        missing = without(incompatible.missing_keys, [name for name, _, _ in wrong_shape])
        self._refuse_mismatch(Mismatch(missing, list(incompatible.unexpected_keys), wrong_shape))
        return _IncompatibleKeys(missing_keys=[], unexpected_keys=[], incorrect_shapes=[])

    def _compare(self, checkpoint: dict[str, Any]) -> None:
        """Refuse other settings and, unless the class head is skipped, other classes."""
        if self._settings is not None:
            stored = checkpoint.get(SETTINGS, {})
            if not isinstance(stored, dict):
                raise UserError(f"checkpoint {self._path}: its {SETTINGS!r} are not a mapping")
            implied = implied_settings(checkpoint, self.model.state_dict())
            self._settings.check(
                {**implied, **stored},
                self._path,
                class_head=not self._other_classes,
                reason=" (its stem.conv1.bias marks ImageNet weights of MSRA)" if implied else "",
            )
        if self._classes is not None and CLASS_TABLE in checkpoint and not self._other_classes:
            self._classes.check(checkpoint[CLASS_TABLE], self._path)

    def _keep_shared_rows(self, checkpoint: dict[str, Any]) -> None:
        """Replace the class head of a file by the initial one with the rows of shared classes."""
        weights = checkpoint["model"]
        theirs = {key: weights.pop(key) for key in list(weights) if is_class_head(key)}
        ours = {key: value for key, value in self.model.state_dict().items() if is_class_head(key)}
        weights.update(ours)
        if self._class_table is None or CLASS_TABLE not in checkpoint:
            self.logger.warning(
                f"--init-from does not load {', '.join(ours)}, since the classes of {self._path} "
                "are unknown (of a converted file: see --classes of tools/convert_checkpoint.py)"
            )
            return
        others = ClassTable.from_json(checkpoint[CLASS_TABLE])
        head, line = _merge_class_heads(ours, theirs, self._class_table, others)
        weights.update(head)
        self.logger.info(f"--init-from: {line}")

    def _refuse_mismatch(self, mismatch: Mismatch) -> None:
        if not self._resuming:
            for part, belongs in (
                ("BatchFormer block", is_block),
                ("label embedding of mask-piloted training", is_pilot),
            ):
                mismatch = self._without_part(mismatch, part, belongs)
            if self._training:
                mismatch = self._without_absent_heads(mismatch)
        if any(mismatch):
            training = self._training and not self._resuming
            raise UserError(describe(mismatch, self._path, training=training))

    def _without_part(
        self, mismatch: Mismatch, part: str, belongs: Callable[[str], bool]
    ) -> Mismatch:
        """Remove mismatches of a part that only training uses."""
        missing = list(filter(belongs, mismatch.missing))
        unexpected = list(filter(belongs, mismatch.unexpected))
        if missing:
            self.logger.info(
                f"{self._path} has no {part}: it keeps its initial values ({first(missing)})"
            )
        if unexpected:
            self.logger.info(f"the {part} of {self._path} is not used by this model")
        return mismatch._replace(
            missing=without(mismatch.missing, missing),
            unexpected=without(mismatch.unexpected, unexpected),
        )

    def _without_absent_heads(self, mismatch: Mismatch) -> Mismatch:
        """Remove mismatches that are allowed if the weights are a starting point of training."""
        ours = list(self.model.state_dict())
        outside_backbone = [k for k in ours if not k.startswith("backbone.")]
        mask_head = list(filter(is_mask_head, ours))
        missing = set(mismatch.missing)
        has_backbone = len(outside_backbone) < len(ours)
        # Files with only a backbone may lack the counters of batch norms, which are not used.
        if has_backbone and not self._other_classes and _all_missing(outside_backbone, missing):
            self.logger.info(f"{self._path} only initialises the backbone")
            return mismatch._replace(
                missing=[
                    k
                    for k in mismatch.missing
                    if k.startswith("backbone.") and not k.endswith("num_batches_tracked")
                ],
                unexpected=[k for k in mismatch.unexpected if not _is_classifier(k)],
            )
        if mask_head and missing.issuperset(mask_head):
            self.logger.info(
                f"{self._path} has no mask head: it keeps its initial values ({first(mask_head)})"
            )
            return mismatch._replace(missing=without(mismatch.missing, mask_head))
        return mismatch


def _merge_class_heads(
    ours: Mapping[str, Tensor],
    theirs: Mapping[str, Any],
    mine: ClassTable,
    others: ClassTable,
) -> tuple[dict[str, Tensor], str]:
    """Fill a class head with the rows of another one that belong to the same classes.

    A layer has one row per class, and may have another for "no object" at the end.

    Args:
        ours: layers of the class head, (K, ...) or (K + 1, ...); not changed.
        theirs: tensors or arrays of the other one, with its number of classes.
        mine: K classes.
        others: the classes of the other one.

    Returns:
        The filled layers, and a line that names the kept and the new classes. A layer without
        counterpart keeps its values: only one of the two has "no object", or the sizes differ.
    """
    pairs = mine.same_names(others)
    filled, no_object = {}, []
    for key, value in ours.items():
        source = torch.as_tensor(theirs.get(key, ()))
        further = len(value) - mine.num_classes
        if len(source) - others.num_classes == further and source.shape[1:] == value.shape[1:]:
            filled[key] = value.detach().clone()
            filled[key][list(pairs)] = source[list(pairs.values())].to(value)
            if further:
                filled[key][-1] = source[-1]
                no_object = ['"no object"']
    kept = [
        mine.names[i]
        if mine.names[i] == others.names[j]
        else f"{mine.names[i]} ({others.names[j]})"
        for i, j in pairs.items()
    ]
    new = [name for i, name in enumerate(mine.names) if i not in pairs]
    line = f"class rows kept by name: {', '.join([*kept, *no_object]) or 'none'}"
    line += f"; new: {', '.join(new) or 'none'}"
    unfilled = without(list(ours), list(filled))
    return filled, f"{line}; not loaded: {', '.join(unfilled)}" if unfilled else line


def _is_classifier(key: str) -> bool:
    return key.endswith(_UNUSED_BIAS) or not _CLASSIFIER_PARTS.isdisjoint(key.split(".")[:-1])


def _all_missing(keys: Sequence[str], missing: set[str]) -> bool:
    """Whether the file has no weights besides the backbone, the block and pixel statistics."""
    ignored = ("pixel_mean", "pixel_std")
    return all(k in missing or is_block(k) or is_pilot(k) or k in ignored for k in keys)
