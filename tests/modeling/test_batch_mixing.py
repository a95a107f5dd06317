"""Mixup and CutMix: numpy's generator, and the same ratio for images and targets."""

import numpy as np
import pytest
import torch

from batchformer_panoptic.errors import UserError
from batchformer_panoptic.modeling.image_classifier import BatchMixing, build_batch_mixing
from helpers.tiny_classifier import classifier_cfg

LABELS = torch.tensor([0, 1, 2, 3])


def make(**arguments):
    pytest.importorskip("timm")
    defaults = {"mixup_alpha": 0.8, "cutmix_alpha": 1.0, "prob": 1.0, "switch_prob": 0.5}
    return BatchMixing(**(defaults | arguments), num_classes=4)


def flat_images():
    """Each image has one colour, the number of its label."""
    return LABELS.float().view(4, 1, 1, 1).expand(4, 3, 16, 16).clone()


@pytest.mark.parametrize("alphas", [(0.8, 0.0), (0.0, 1.0), (0.8, 1.0)])
def test_targets_are_the_shares_of_the_images(alphas):
    mixing = make(mixup_alpha=alphas[0], cutmix_alpha=alphas[1])
    shares = set()
    for _ in range(8):
        images, targets = mixing(flat_images(), LABELS)
        torch.testing.assert_close(targets.sum(-1), torch.ones(4))
        # The mean colour is that of the target.
        torch.testing.assert_close(images.mean((1, 2, 3)), targets @ LABELS.float())
        own_and_partner = targets[LABELS, LABELS] + targets[LABELS, LABELS.flip(0)]
        torch.testing.assert_close(own_and_partner, torch.ones(4))
        shares.add(round(targets[0, 0].item(), 4))
    assert len(shares) > 4


def test_cutmix_moves_patches_and_mixup_blends():
    np.random.seed(1)
    cut, _ = make(mixup_alpha=0.0)(flat_images(), LABELS)
    assert set(cut.unique().tolist()) == {0.0, 1.0, 2.0, 3.0}
    blended, _ = make(cutmix_alpha=0.0)(flat_images(), LABELS)
    assert (blended[0] == blended[0, 0, 0, 0]).all()
    assert blended[0, 0, 0, 0] not in LABELS


@pytest.mark.parametrize("switch_prob", [0.0, 1.0])
def test_switching(switch_prob):
    images, _ = make(switch_prob=switch_prob)(flat_images(), LABELS)
    is_cutmix = set(images.unique().tolist()) <= {0.0, 1.0, 2.0, 3.0}
    assert is_cutmix == (switch_prob == 1.0)


def test_only_numpys_generator_is_used():
    mixing = make()
    torch.manual_seed(0)
    results = []
    for seed in (3, 3, 4):
        np.random.seed(seed)
        results.append(mixing(torch.arange(4 * 48.0).view(4, 3, 4, 4).clone(), LABELS))
        torch.rand(1)
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])
    assert not torch.equal(results[0][0], results[2][0])


def test_a_batch_that_is_not_mixed_has_hard_targets():
    images, targets = make(prob=0.0)(flat_images(), LABELS)
    assert torch.equal(images, flat_images())
    assert torch.equal(targets, torch.eye(4))


def test_an_odd_batch_is_refused():
    with pytest.raises(UserError, match="a process has 3 images"):
        make()(flat_images()[:3], LABELS[:3])


def test_config():
    node = "MODEL__CLASSIFIER__"
    assert build_batch_mixing(classifier_cfg()) is None
    assert build_batch_mixing(classifier_cfg(**{node + "CUTMIX_ALPHA": 1.0})) is not None
    assert build_batch_mixing(classifier_cfg(**{node + "MIXUP_ALPHA": 0.2})) is not None
    for key, value in (("MIXUP_ALPHA", -1.0), ("CUTMIX_ALPHA", -0.1), ("MIXUP_PROB", 1.5)):
        with pytest.raises(UserError, match=rf"MODEL\.CLASSIFIER\.{key} must be"):
            build_batch_mixing(classifier_cfg(**{node + key: value}))
    with pytest.raises(UserError, match=r"SWITCH_PROB must be from 0 to 1, not -0.5"):
        build_batch_mixing(classifier_cfg(**{node + "SWITCH_PROB": -0.5}))
