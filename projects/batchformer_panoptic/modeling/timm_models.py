"""Creating models of timm by name: what can go wrong, as one line each."""

import difflib
from collections.abc import Sequence
from typing import Any

from ..errors import UserError

_TOLERANCE = 0.01  # of pixel statistics that should be equal, in grey levels


def import_timm() -> Any:
    """Return the module timm.

    Raises:
        UserError: it is not installed.
    """
    try:
        import timm  # an extra: only those who name a timm model need it
    except ImportError as error:
        raise UserError(
            "models of timm need timm: pip install timm, or this project's extra [timm]"
        ) from error
    return timm


def create_timm_model(name: str, *, node: str, pretrained: bool, **arguments: Any) -> Any:
    """Create a model of timm.

    Args:
        name: as ``timm.list_models()`` has it, with or without the tag of its weights.
        node: the part of the config that asks for the model, for messages ("MODEL.TIMM").
        pretrained: load weights, which timm downloads where it does not have them.
        **arguments: of ``timm.create_model``.

    Raises:
        UserError: timm is not installed or does not know the model, or its weights cannot be had.
        Exception: what timm raises at arguments that do not suit the model.
    """
    timm = import_timm()
    if not timm.is_model(name):
        close = difflib.get_close_matches(name, timm.list_models(), n=3)
        hint = f"did you mean {' or '.join(close)}?" if close else "see timm.list_models()"
        raise UserError(f"timm has no model {name!r}; {hint}")
    try:
        return timm.create_model(name, pretrained=pretrained, **arguments)
    except (TypeError, AttributeError):
        raise
    # Hubs fail in many ways (offline, no such weights, damaged file), with as many types.
    except Exception as error:
        if not pretrained:
            raise
        reason = str(error).strip().partition("\n")[0]
        raise UserError(
            f"{node}.PRETRAINED: timm has no weights of {name} here and cannot download "
            f"them ({type(error).__name__}: {reason}); set it to False and MODEL.WEIGHTS to a "
            "converted file"
        ) from error


def timm_pixel_statistics(net: Any) -> tuple[list[float], list[float]]:
    """Mean and standard deviation, 0 to 255 and RGB, that timm's weights of a model expect."""
    mean, std = ([255.0 * x for x in net.pretrained_cfg[key]] for key in ("mean", "std"))
    return [round(x, 4) for x in mean], [round(x, 4) for x in std]


def check_pixel_statistics(
    net: Any, name: str, pixel_mean: Sequence[float], pixel_std: Sequence[float]
) -> None:
    """Refuse to feed timm's weights images that are normalised in another way.

    Args:
        net: a model of timm.
        name: of it.
        pixel_mean: MODEL.PIXEL_MEAN.
        pixel_std: MODEL.PIXEL_STD.

    Raises:
        UserError: the first of the two that differs, and what to set it to.
    """
    mean, std = timm_pixel_statistics(net)
    for key, used, wanted in (("PIXEL_MEAN", pixel_mean, mean), ("PIXEL_STD", pixel_std, std)):
        if any(abs(a - b) > _TOLERANCE for a, b in zip(used, wanted, strict=True)):
            raise UserError(
                f"MODEL.{key} is {list(used)}, but timm's weights of {name} were trained "
                f"with {wanted}: set MODEL.{key} {wanted}"
            )
