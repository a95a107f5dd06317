"""Reading checkpoint files without running code that is hidden in them."""

import pickle
from typing import Any

import numpy as np
import torch

from ..errors import UserError

# What an array, and a dictionary of arrays, needs to be unpickled; anything else is refused.
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


class _ArrayUnpickler(pickle.Unpickler):
    """Unpickles dictionaries of numpy arrays and refuses everything else."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _PICKLED_NAMES:
            raise pickle.UnpicklingError(f"it holds a {module}.{name}")
        return super().find_class(module, name)


def read_pth(path: str) -> dict[str, Any]:
    """Read a ``.pth`` file into CPU memory (tensors, numbers, strings and containers only).

    A bare dictionary of weights comes back as ``{"model": weights}``.

    Raises:
        UserError: the file is damaged, holds other objects, or holds no weights.
    """
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        reason = "it is damaged, or holds Python objects besides weights, which are not read"
        raise UserError(f"checkpoint {path} cannot be read: {reason}") from error
    except (RuntimeError, EOFError, OSError, ValueError) as error:
        reason = "it is damaged or no PyTorch file; copy or download it again"
        raise UserError(f"checkpoint {path} cannot be read: {reason}") from error
    if isinstance(loaded, dict) and "model" not in loaded:
        loaded = {"model": loaded}
    return _checked(loaded, path)


def read_model_zoo_pkl(path: str) -> dict[str, Any]:
    """Read a ``.pkl`` file of Detectron2's model zoo: ``{"model": arrays, "__author__": name}``.

    Raises:
        UserError: the file is damaged, holds anything but arrays, or has another layout.
    """
    try:
        with open(path, "rb") as file:
            loaded = _ArrayUnpickler(file, encoding="latin1").load()
    except (pickle.UnpicklingError, EOFError, ValueError, AttributeError, IndexError) as error:
        raise UserError(
            f"checkpoint {path} cannot be read: it is damaged, or no file of Detectron2's model zoo"
        ) from error
    if not isinstance(loaded, dict) or not {"model", "__author__"} <= loaded.keys():
        raise UserError(
            f'checkpoint {path} is no file of Detectron2\'s model zoo (keys "model", "__author__")'
        )
    return _checked(loaded, path)


def _checked(loaded: Any, path: str) -> dict[str, Any]:
    weights = loaded.get("model") if isinstance(loaded, dict) else None
    if not isinstance(weights, dict) or not weights:
        raise UserError(f"checkpoint {path} holds no weights")
    for name, value in weights.items():
        if not isinstance(value, torch.Tensor | np.ndarray):
            raise UserError(
                f"checkpoint {path} holds no plain weights: {name!r} is a {type(value).__name__}"
            )
    return loaded
