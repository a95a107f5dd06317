"""Duplicates stay on one side of the division into training and validation."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageEnhance

from batchformer_panoptic.data.importers.source import Sample
from batchformer_panoptic.data.importers.split import choose_splits
from batchformer_panoptic.errors import UserError


def photo(seed: int) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 256, (7, 9, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((180, 140), Image.Resampling.BICUBIC)


def samples(folder: Path, images: list[Image.Image]) -> list[Sample]:
    """Save images in turn as PNG, as JPEG, smaller and brighter: never with the same bytes."""
    found = []
    for number, image in enumerate(images):
        if number % 2:
            image = ImageEnhance.Brightness(image.resize((90, 70))).enhance(
                0.8 + 0.1 * (number % 5)
            )
        path = folder / f"{number}.{('png', 'jpg')[number % 2]}"
        image.save(path, quality=60)
        found.append(Sample(path, lambda size: []))
    return found


@pytest.mark.parametrize("seed", range(5))
def test_images_that_look_alike_stay_together(tmp_path: Path, seed: int) -> None:
    # Three versions of each of six photographs.
    found = samples(tmp_path, [photo(number // 3) for number in range(18)])
    splits = choose_splits(found, 0.34, seed)
    assert splits.count("val") == 6
    assert all(len(set(splits[start : start + 3])) == 1 for start in range(0, 18, 3))


def test_photographs_are_drawn_one_by_one(tmp_path: Path) -> None:
    found = samples(tmp_path, [photo(number) for number in range(10)])
    assert choose_splits(found, 0.3, 0).count("val") == 3
    assert choose_splits(found, 0.01, 0).count("val") == 1
    assert choose_splits(found, 0.0, 0).count("val") == 0


def test_frames_of_one_camera_are_divided_only_on_request(tmp_path: Path) -> None:
    found = samples(tmp_path, [photo(0)] * 4)
    found.append(
        Sample(tmp_path / "copy.png", lambda size: [], content=found[0].image.read_bytes())
    )
    with pytest.raises(UserError, match=r"1 of 5 images cannot be set apart .* at least 5"):
        choose_splits(found, 0.2, 0)
    for seed in range(8):
        splits = choose_splits(found, 0.4, seed, exact=True)
        assert splits.count("val") == 2
        assert splits[0] == splits[4]  # the same bytes


def test_images_of_one_color_are_no_duplicates(tmp_path: Path) -> None:
    found = samples(tmp_path, [Image.new("RGB", (40, 30), color) for color in ("red", "blue")])
    assert sorted(choose_splits(found, 0.5, 0)) == ["train", "val"]


def test_an_unreadable_image_is_named(tmp_path: Path) -> None:
    found = samples(tmp_path, [photo(number) for number in range(2)])
    found[1].image.write_text("no image")
    with pytest.raises(UserError, match=r"image .*1\.jpg cannot be read"):
        choose_splits(found, 0.5, 0)
