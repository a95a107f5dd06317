"""Mixup and CutMix over the images of a batch."""

from torch import Tensor

from ...errors import UserError
from ..timm_models import import_timm


class BatchMixing:
    """timm's ``Mixup``: one of mixup and CutMix, with one share, for the whole batch.

    Image ``i`` is mixed with image ``B - 1 - i`` (mixup: arXiv 1710.09412, CutMix: 1905.04899). The
    decisions come from numpy's global generator on the host, which the training loop seeds from
    (seed, iteration, rank), so nothing waits for the device and a resumed run mixes alike.

    Args:
        mixup_alpha: of the Beta distribution of mixup's share. 0: no mixup.
        cutmix_alpha: of CutMix. 0: no CutMix. One of both is above 0.
        prob: that a batch is mixed.
        switch_prob: that it is CutMix, where both are on.
        num_classes: classes K.

    Raises:
        UserError: timm is not installed.
    """

    def __init__(
        self,
        *,
        mixup_alpha: float,
        cutmix_alpha: float,
        prob: float,
        switch_prob: float,
        num_classes: int,
    ) -> None:
        import_timm()
        from timm.data import Mixup

        self._mixup = Mixup(
            mixup_alpha=mixup_alpha,
            cutmix_alpha=cutmix_alpha,
            prob=prob,
            switch_prob=switch_prob,
            label_smoothing=0.0,  # the loss smooths targets, mixed or not
            num_classes=num_classes,
        )

    def __call__(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Mix a batch.

        Args:
            images: (B, C, H, W) floating point; overwritten.
            labels: (B,) int64 in [0, K).

        Returns:
            The mixed images, and targets (B, K) float32 whose rows sum to 1.

        Raises:
            UserError: an odd number of images, which do not form pairs.
        """
        if len(images) % 2:
            raise UserError(
                f"mixup and CutMix mix pairs, and a process has {len(images)} images: make "
                "SOLVER.IMS_PER_BATCH an even number for each process, or set "
                "MODEL.CLASSIFIER.MIXUP_ALPHA and CUTMIX_ALPHA to 0"
            )
        mixed, targets = self._mixup(images, labels)
        return mixed, targets
