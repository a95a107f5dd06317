"""The published augmentations, put together from Detectron2's."""

from detectron2.config import CfgNode
from detectron2.data import detection_utils
from detectron2.data import transforms as T

from ..errors import UserError


def build_augmentations(cfg: CfgNode, is_train: bool) -> list[T.Augmentation]:
    """Augmentations of the INPUT section.

    Training: with INPUT.RESIZE_OR_CROP half of the images are first resized to one of its
    MIN_SIZES and cropped, both sides drawn from CROP_RANGE and no longer than the image. Then all
    images are resized as MIN_SIZE_TRAIN, MAX_SIZE_TRAIN and MIN_SIZE_TRAIN_SAMPLING say and
    flipped as RANDOM_FLIP says. These are the two branches of DETR's recipe, which both end in
    that resize; the flip, which DETR does first, commutes with the rest in distribution.
    Detectron2's INPUT.CROP is honoured too, before everything else.

    Evaluation: the resize of MIN_SIZE_TEST and MAX_SIZE_TEST; a MIN_SIZE_TEST of 0 keeps the size.

    Raises:
        UserError: a crop range or a flip that does not exist.
    """
    _check_flip(cfg.INPUT.RANDOM_FLIP)
    augmentations: list[T.Augmentation] = detection_utils.build_augmentation(cfg, is_train)
    if is_train and cfg.INPUT.RESIZE_OR_CROP.ENABLED:
        augmentations.insert(0, _resized_crop(cfg))
    if is_train and cfg.INPUT.CROP.ENABLED:
        augmentations.insert(0, T.RandomCrop(cfg.INPUT.CROP.TYPE, cfg.INPUT.CROP.SIZE))
    return augmentations


def _resized_crop(cfg: CfgNode) -> T.Augmentation:
    node = cfg.INPUT.RESIZE_OR_CROP
    if len(node.CROP_RANGE) != 2 or not 0 < node.CROP_RANGE[0] <= node.CROP_RANGE[1]:
        raise UserError(
            f"INPUT.RESIZE_OR_CROP.CROP_RANGE is {list(node.CROP_RANGE)}: "
            "give the smallest and the largest side of a crop in pixels, such as [384, 600]"
        )
    if not node.MIN_SIZES or min(node.MIN_SIZES) < 1:
        raise UserError(
            f"INPUT.RESIZE_OR_CROP.MIN_SIZES is {list(node.MIN_SIZES)}: "
            "give lengths of the short side in pixels, such as [400, 500, 600]"
        )
    resize = T.ResizeShortestEdge(list(node.MIN_SIZES), sample_style="choice")
    crop = T.RandomCrop("absolute_range", tuple(node.CROP_RANGE))
    return T.RandomApply(T.AugmentationList([resize, crop]), prob=0.5)


def _check_flip(flip: str) -> None:
    choices = ("horizontal", "vertical", "none")
    if flip not in choices:
        raise UserError(f"INPUT.RANDOM_FLIP is {flip!r}: choose one of {', '.join(choices)}")
