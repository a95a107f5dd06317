"""Reads checkpoint files of all formats without running code hidden in them; writes torch's."""

import argparse
import json
import os
import pickle
import re
import tarfile
import zipfile
import zlib
from collections.abc import Mapping
from typing import Any, NoReturn

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from ..data.io import write_atomically
from ..errors import UserError, one_line
from .mismatch import first

# The names that unpickling dictionaries of arrays needs; all others are refused.
_PICKLED_NAMES = {
    ("_codecs", "encode"),
    ("collections", "OrderedDict"),
    ("numpy", "dtype"),
    ("numpy", "ndarray"),
    ("numpy.core.multiarray", "_reconstruct"),
    ("numpy.core.multiarray", "scalar"),
    ("numpy._core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "scalar"),
}
# Official training checkpoints keep their command line under "args"; a namespace runs no code.
_HARMLESS_CLASSES: list[Any] = [argparse.Namespace]
# Metadata of a .safetensors file are texts; these entries are JSON.
_JSON_METADATA = ("settings", "class_table")
_HEAD_BYTES = 4096
_ZIP, _PICKLE = b"PK\x03\x04", b"\x80"
_DOS_FOLDER = 0x10
_WRAPPED = "module."


class _ForeignObject(pickle.UnpicklingError):
    """A pickle contains an object that is not a weight; the only argument is its name."""


class _ArrayUnpickler(pickle.Unpickler):
    """Unpickles dictionaries of numpy arrays and refuses all other objects."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _PICKLED_NAMES:
            raise _ForeignObject(f"{module}.{name}")
        return super().find_class(module, name)


def read_weights(path: str, *, allow_pickle: bool = False) -> dict[str, Any]:
    """Read a checkpoint of any format to CPU memory without running code hidden in it.

    * ``.safetensors``: the metadata "settings" and "class_table" are JSON, all others are texts.
    * ``.pth``, ``.pt``, ``.bin``: written by ``torch.save``, with tensors, numbers, texts,
      containers and ``argparse.Namespace``.
    * ``.pkl`` of Detectron2's model zoo: dictionaries of arrays. A file in Caffe2's layout (those
      of MSRA) gets the same entries as in Detectron2, which later translates its names.

    Weights at the top level or under "state_dict" are returned under "model". The prefix "module."
    of models wrapped for distributed training is removed.

    Only files that ``torch.save`` has written as zip (since torch 1.6) have checksums, which are
    compared. In the other formats, a changed bit is noticed if it affects the structure or a value
    that becomes NaN or infinite.

    Args:
        path: a local file.
        allow_pickle: read any pickle and run the code in it. Only for trusted files.

    Returns:
        ``{"model": {name: Tensor or ndarray}}``, and the other entries of the file.

    Raises:
        UserError: the file does not exist, is damaged, is not a checkpoint, or contains no weights,
            weights that are not finite, or Python objects other than weights.
    """
    head = _head_of(path)
    if path.endswith(".safetensors"):
        return _with_weights(_read_safetensors(path), path)
    _refuse_text(head, path)
    if path.endswith(".pkl") and not head.startswith(_ZIP):
        return _with_weights(_zoo_layout(_read_pickled_arrays(path, allow_pickle), path), path)
    return _with_weights(_read_torch(path, head, allow_pickle), path)


def write_weights(path: str, content: dict[str, Any]) -> None:
    """Write a checkpoint with ``torch.save``, as a whole or not at all.

    Raises:
        UserError: the file cannot be written.
    """

    def save(name: str) -> None:
        # Given a name instead of a file, torch does not tell why the system refuses.
        with open(name, "wb") as file:
            torch.save(content, file)

    write_atomically(path, save)


def non_finite(values: Mapping[Any, Any]) -> list[str]:
    """Return the names of the floating-point tensors and arrays that hold NaN or an infinity.

    Args:
        values: a state dict; the names in nested dicts and lists are joined by dots.
    """
    found = []
    for name, value in values.items():
        if isinstance(value, Mapping):
            found += [f"{name}.{inner}" for inner in non_finite(value)]
        elif isinstance(value, list | tuple):
            found += [f"{name}.{inner}" for inner in non_finite(dict(enumerate(value)))]
        elif isinstance(value, torch.Tensor) and value.is_floating_point():
            found += [] if _is_finite(value) else [str(name)]
        elif isinstance(value, np.ndarray) and np.issubdtype(value.dtype, np.floating):
            found += [] if np.isfinite(value).all() else [str(name)]
    return found


def refuse_non_finite(path: str, values: Mapping[Any, Any]) -> None:
    """Raise UserError if values of a checkpoint, as for `non_finite`, are NaN or infinite."""
    if found := non_finite(values):
        raise UserError(
            f"checkpoint {path} is unusable: NaN or infinite values in {first(found)} "
            f"({len(found)} in all); take an earlier one"
        )


def _is_finite(value: torch.Tensor) -> bool:
    value = value.float() if value.itemsize == 1 else value
    # NaN and infinities survive in the sum, which is ten times faster.
    return bool(torch.isfinite(value.sum())) or bool(torch.isfinite(value).all())


def check_is_file(path: str, *, hint: str = "") -> None:
    """Refuse a path that does not exist or is a folder.

    Args:
        path: the path of a checkpoint.
        hint: end of the message about a missing file, such as "; see MODEL.WEIGHTS".

    Raises:
        UserError: see above.
    """
    if os.path.isdir(path):
        raise UserError(f"checkpoint {path} is a folder; name a file in it")
    if not os.path.isfile(path):
        raise UserError(f"checkpoint {path} not found{hint}")


def _head_of(path: str) -> bytes:
    check_is_file(path)
    try:
        with open(path, "rb") as file:
            head = file.read(_HEAD_BYTES)
    except OSError as error:
        raise UserError(f"checkpoint {path} cannot be read: {error.strerror}") from None
    if not head:
        _refuse(path, "the file is empty; copy or download it again")
    return head


def _refuse(path: str, reason: str) -> NoReturn:
    raise UserError(f"checkpoint {path} cannot be read: {reason}")


def _refuse_text(head: bytes, path: str) -> None:
    """Refuse the remains of a failed download or copy."""
    if not head.strip(b"\0"):
        _refuse(path, "it starts with zeros only: copy or download it again")
    start = head.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if start.startswith((b"<!doctype", b"<html", b"<head", b"<?xml")):
        _refuse(path, "it is an HTML or XML page: the download failed")
    if start.startswith(b"version https://git-lfs"):
        _refuse(path, "it is a Git LFS pointer instead of the file itself: run git lfs pull")
    if start.startswith((b"{", b"[")) and b"\0" not in head:
        _refuse(path, "it is JSON text: a failed download, or an index of files")


def _refuse_object(path: str, name: str | None) -> NoReturn:
    what = f"the Python object {name}" if name else "Python objects"
    _refuse(
        path,
        f"it contains {what} besides weights, and a pickle can run any code; "
        "if you trust its origin, use --allow-pickle of tools/convert_checkpoint.py",
    )


def _read_safetensors(path: str) -> dict[str, Any]:
    try:
        with safe_open(path, framework="pt") as file:
            rest: dict[str, Any] = dict(file.metadata() or {})
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, RuntimeError, ValueError) as error:
        with open(path, "rb") as plain:
            _refuse_text(plain.read(_HEAD_BYTES), path)
        _refuse(path, f"it is truncated, damaged or not a safetensors file ({one_line(error)})")
    for key in _JSON_METADATA:
        if key in rest:
            try:
                rest[key] = json.loads(rest[key])
            except json.JSONDecodeError as error:
                _refuse(path, f"its metadata {key!r} is not JSON ({one_line(error)})")
    return {**rest, "model": weights}


def _read_pickled_arrays(path: str, allow_pickle: bool) -> Any:
    unpickler = pickle.Unpickler if allow_pickle else _ArrayUnpickler
    try:
        with open(path, "rb") as file:
            return unpickler(file, encoding="latin1").load()
    except _ForeignObject as error:
        _refuse_object(path, str(error))
    except Exception as error:  # garbage read as a pickle can raise anything
        raise UserError(
            f"checkpoint {path} cannot be read: it is truncated, damaged or not from Detectron2's "
            f"model zoo ({type(error).__name__})"
        ) from error


def _zoo_layout(loaded: Any, path: str) -> Any:
    """Add the entries that Detectron2's loading reads to a file in Caffe2's layout."""
    if not isinstance(loaded, dict) or "model" in loaded:
        return loaded
    weights = loaded.get("blobs", loaded)
    if not isinstance(weights, dict):
        _refuse(path, "it is not from Detectron2's model zoo")
    weights = {k: v for k, v in weights.items() if not str(k).endswith("_momentum")}
    return {"model": weights, "__author__": "Caffe2", "matching_heuristics": True}


def _read_torch(path: str, head: bytes, allow_pickle: bool) -> Any:
    if head.startswith(_ZIP):
        _check_zip(path)
    elif tarfile.is_tarfile(path):
        # Older versions of torch unpickle these even with weights_only.
        if not allow_pickle:
            _refuse(
                path, "it is a tar file of torch before 0.4; save it again with a newer version"
            )
    elif not head.startswith(_PICKLE):
        _refuse(path, "it is truncated, damaged or not written by torch.save; download it again")
    try:
        with torch.serialization.safe_globals(_HARMLESS_CLASSES):
            return torch.load(path, map_location="cpu", weights_only=not allow_pickle)
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL ([\w.]+)", str(error))
        if found is None and head.startswith(_ZIP):
            _refuse(path, "its list of weights is damaged; copy or download it again")
        _refuse_object(path, found.group(1) if found else None)
    except Exception as error:  # a damaged pickle can raise anything
        raise UserError(
            f"checkpoint {path} cannot be read: it is truncated or damaged "
            f"({type(error).__name__}); copy or download it again"
        ) from error


def _check_zip(path: str) -> None:
    """Refuse a zip file that is damaged, contains a program, or is compressed.

    ``torch.save`` stores without compression, so a file that grows when unpacked is not its own.
    """
    size = os.path.getsize(path)
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            unpacked = sum(entry.file_size for entry in entries)
            # torch.load does not compare the checksums.
            damaged = archive.testzip() if unpacked <= size else None
    except (zipfile.BadZipFile, OSError, ValueError, RuntimeError, EOFError, zlib.error) as error:
        raise UserError(
            f"checkpoint {path} cannot be read: it is truncated or damaged; copy or download it "
            "again"
        ) from error
    if any(entry.filename.endswith("/constants.pkl") for entry in entries):
        _refuse(path, "it is a TorchScript program; use the checkpoint that it was made from")
    if unpacked > size:
        _refuse(path, f"its {size} bytes would unpack to {unpacked}, which torch.save never writes")
    # torch.load skips an entry with the attribute of a folder, and leaves its tensor uninitialised.
    folders = (e.filename for e in entries if e.external_attr & _DOS_FOLDER and not e.is_dir())
    damaged = damaged or next(folders, None)
    if damaged is not None:
        part = damaged.partition("/")[2]  # behind the name of the archive
        _refuse(path, f"its part {part} is damaged; copy or download it again")


def _with_weights(loaded: Any, path: str) -> dict[str, Any]:
    """Return the content with its weights, arrays or tensors only, under "model"."""
    if isinstance(loaded, dict) and "model" not in loaded:
        if isinstance(loaded.get("state_dict"), dict):
            loaded["model"] = loaded.pop("state_dict")
        else:
            loaded = {"model": loaded}
    weights = loaded.get("model") if isinstance(loaded, dict) else None
    if not isinstance(weights, dict) or not weights:
        raise UserError(f"checkpoint {path} contains no weights")
    for name, value in weights.items():
        if not isinstance(name, str) or not isinstance(value, torch.Tensor | np.ndarray):
            raise UserError(
                f"checkpoint {path} is not a dictionary of weights: {name!r} is a "
                f"{type(value).__name__}"
            )
    refuse_non_finite(path, weights)
    if all(name.startswith(_WRAPPED) for name in weights):
        loaded["model"] = {name.removeprefix(_WRAPPED): v for name, v in weights.items()}
    return loaded
