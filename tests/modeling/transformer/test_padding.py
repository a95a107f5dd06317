import torch
from torch.nn import functional as F

from batchformer_panoptic.modeling.transformer.layers import BatchPadding, padding_mask


def test_equals_nearest_resizing_of_the_full_mask():
    sizes, padded = [(137, 200), (150, 93), (1, 1)], (150, 200)
    full = torch.ones(3, *padded, dtype=torch.bool)
    for mask, (height, width) in zip(full, sizes, strict=True):
        mask[:height, :width] = False
    for map_size in [(38, 50), (19, 25), (5, 7), (150, 200)]:
        expected = F.interpolate(full[None].float(), size=map_size)[0].bool()
        assert torch.equal(padding_mask(sizes, padded, map_size, torch.device("cpu")), expected)


def test_whether_a_batch_is_padded():
    assert not BatchPadding([(4, 5), (4, 5)], (4, 5)).is_padded
    assert BatchPadding([(4, 5), (4, 4)], (4, 5)).is_padded


def test_mask_like_a_map():
    mask = BatchPadding([(8, 8), (4, 8)], (8, 8)).mask_like(torch.zeros(2, 3, 4, 4))
    assert mask.shape == (2, 4, 4)
    assert not mask[0].any()
    assert torch.equal(mask[1].any(1), torch.tensor([False, False, True, True]))
