import torch
from torch.nn import functional as F

from batchformer_panoptic.modeling.padding import has_padding, padding_mask


def test_equals_nearest_resizing_of_the_full_mask():
    sizes, padded = [(137, 200), (150, 93), (1, 1)], (150, 200)
    full = torch.ones(3, *padded, dtype=torch.bool)
    for mask, (height, width) in zip(full, sizes, strict=True):
        mask[:height, :width] = False
    for map_size in [(38, 50), (19, 25), (5, 7), (150, 200)]:
        expected = F.interpolate(full[None].float(), size=map_size)[0].bool()
        assert torch.equal(padding_mask(sizes, padded, map_size, torch.device("cpu")), expected)


def test_has_padding():
    assert not has_padding([(4, 5), (4, 5)], (4, 5))
    assert has_padding([(4, 5), (4, 4)], (4, 5))
