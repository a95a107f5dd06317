"""Large photographs: results in bands of rows equal those at once, in bounded memory."""

import subprocess
import sys

import pytest
import torch

from batchformer_panoptic.errors import UserError
from batchformer_panoptic.modeling.postprocessing import masks as masks_module
from batchformer_panoptic.modeling.postprocessing.masks import (
    ImageMasks,
    mask_scores,
    semantic_map,
)
from batchformer_panoptic.modeling.postprocessing.panoptic import (
    MERGES,
    PanopticOptions,
    merge_panoptic,
)
from helpers.commands import REPO_ROOT
from helpers.tiny_model import tiny_model

# (map, padded, image, output): enlarged, shrunk, only one side, unchanged.
SIZES = [
    ((12, 16), (96, 128), (90, 120), (211, 307)),
    ((24, 32), (96, 128), (96, 128), (40, 50)),
    ((24, 32), (96, 128), (80, 128), (80, 300)),
    ((24, 32), (96, 128), (96, 128), (96, 128)),
    ((24, 32), (24, 32), (24, 32), (1, 7)),
]


def masks_of(sizes, count=9, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(count, *sizes[0], generator=generator) * 5
    return ImageMasks(logits, padded_size=sizes[1], image_size=sizes[2], output_size=sizes[3])


@pytest.fixture
def in_bands(monkeypatch):
    def switch(rows, width, count):
        monkeypatch.setattr(masks_module, "_KEPT_BYTES", 0)
        monkeypatch.setattr(masks_module, "_BAND_BYTES", 4 * rows * width * count)

    return switch


@pytest.mark.parametrize("rows", [1, 7])
@pytest.mark.parametrize("sizes", SIZES)
def test_bands_are_rows_of_the_enlarged_masks(sizes, rows, in_bands):
    expected = masks_of(sizes).at_output_size()
    at_image_size = masks_of(sizes).at_image_size()
    in_bands(rows, sizes[3][1], 9)
    bands = list(masks_of(sizes).bands())
    assert len(bands) == -(-sizes[3][0] // rows)
    assert [r.start for r, _ in bands] == list(range(0, sizes[3][0], rows))
    found = torch.cat([logits for _, logits in bands], dim=1)
    # Logits up to 20, whose last place is 2e-6.
    torch.testing.assert_close(found, expected, rtol=0, atol=4e-6)
    of_image = torch.cat([logits for _, logits in masks_of(sizes).image_bands()], dim=1)
    torch.testing.assert_close(of_image, at_image_size, rtol=0, atol=4e-6)


@pytest.mark.parametrize("merge", MERGES)
@pytest.mark.parametrize("duplicate_iou", [1.0, 0.3])
@pytest.mark.parametrize("sizes", SIZES[:3])
def test_merges_in_bands_equal_those_at_once(sizes, duplicate_iou, merge, in_bands):
    def merged():
        return merge_panoptic(
            masks_of(sizes),
            torch.linspace(0.3, 0.9, 9),
            torch.arange(9) % 4,
            merge=MERGES[merge],
            thing_class_ids=(0, 1),
            options=PanopticOptions(
                min_area=60, duplicate_iou=duplicate_iou, overlap_threshold=0.05
            ),
        )

    expected_map, expected = merged()
    in_bands(3, sizes[3][1], 9)
    found_map, found = merged()
    assert len(expected) > 2
    assert found == expected
    assert torch.equal(found_map, expected_map)


def test_scores_and_semantic_maps_in_bands_equal_those_at_once(in_bands):
    probabilities = torch.rand(40, 5, generator=torch.Generator().manual_seed(0))
    scores = mask_scores(masks_of(SIZES[0], 40))
    semantic = semantic_map(masks_of(SIZES[0], 40), probabilities)
    in_bands(5, SIZES[0][3][1], 16)
    torch.testing.assert_close(mask_scores(masks_of(SIZES[0], 40)), scores)
    torch.testing.assert_close(semantic_map(masks_of(SIZES[0], 40), probabilities), semantic)


@pytest.mark.parametrize(
    ("kind", "size", "message"),
    [
        ({"MODEL__PANOPTIC__SEMANTIC_TEST": True}, (20000, 20000), "6.0 GiB.*SEMANTIC_TEST False"),
        ({}, (50000, 50000), r"image of 50000 x 50000 pixels take .* lower TEST.DETECTIONS_PER_IM"),
    ],
)
def test_results_that_exhaust_the_memory_are_refused(kind, size, message):
    model = tiny_model(**kind).eval()
    image = torch.zeros(3, 48, 64, dtype=torch.uint8)
    with pytest.raises(UserError, match=message):
        model([{"image": image, "height": size[0], "width": size[1]}])


@pytest.mark.slow
@pytest.mark.parametrize("size", [(3000, 4000), (5774, 8660)])
@pytest.mark.parametrize("merge", MERGES)
def test_a_large_photograph_takes_less_than_a_gigabyte_and_a_half(merge, size):
    """12 and 50 megapixels with 100 queries, merged and drawn."""
    script = REPO_ROOT / "tests" / "helpers" / "large_photograph.py"
    words = [sys.executable, str(script), merge, *map(str, size)]
    out = subprocess.run(words, capture_output=True, text=True, check=True).stdout
    merged, drawn = map(int, out.split())
    assert merged < 1024
    assert drawn < 1536
