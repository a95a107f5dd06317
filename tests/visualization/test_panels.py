"""Panels: pictures in rows and sheets, and image files."""

from pathlib import Path

import numpy as np
import pytest

from batchformer_panoptic.errors import UserError
from batchformer_panoptic.visualization import contact_sheet, read_image, side_by_side, write_image

RED, BLUE = (200, 0, 0), (0, 0, 200)


def panel(color: tuple[int, int, int], height: int = 40, width: int = 60) -> np.ndarray:
    return np.full((height, width, 3), color, dtype=np.uint8)


def test_panels_stand_in_order_under_their_titles() -> None:
    row = side_by_side([panel(RED), panel(BLUE)], ["red", "blue"])
    reds, blues = ((row == color).all(-1) for color in (RED, BLUE))
    assert reds.sum() == blues.sum() == 40 * 60
    assert np.nonzero(reds)[1].max() < np.nonzero(blues)[1].min()
    title = row[: np.nonzero(reds)[0].min()]
    half = row.shape[1] // 2
    assert (title[:, :half] < 128).any(), "the first title is written"
    assert (title[:, half:] < 128).any(), "the second title is written"


def test_smaller_panels_are_enlarged_to_the_same_height() -> None:
    row = side_by_side([panel(RED, 40, 60), panel(BLUE, 20, 30)], ["", ""])
    assert (row == BLUE).all(-1).sum() == 40 * 60


def test_every_panel_needs_a_title() -> None:
    with pytest.raises(ValueError, match="shorter"):
        side_by_side([panel(RED), panel(BLUE)], ["red"])


@pytest.mark.parametrize(("count", "rows", "columns"), [(1, 1, 1), (2, 1, 2), (3, 2, 2), (4, 2, 2)])
def test_a_contact_sheet_holds_all_pictures(count: int, rows: int, columns: int) -> None:
    sheet = contact_sheet([panel((10 * k, 0, 0)) for k in range(1, count + 1)])
    assert sheet.shape == (rows * 40, columns * 60, 3)
    for k in range(count):
        assert (sheet[40 * (k // 2) + 20, 60 * (k % 2) + 30] == (10 * (k + 1), 0, 0)).all()


def test_wide_pictures_are_shrunk_on_a_contact_sheet() -> None:
    assert contact_sheet([panel(RED)] * 2, max_width=30).shape == (20, 60, 3)


def test_images_are_written_and_read(tmp_path: Path) -> None:
    write_image(tmp_path / "new" / "red.png", panel(RED))
    assert (read_image(tmp_path / "new" / "red.png") == RED[::-1]).all(), "BGR"


def test_image_files_that_cannot_be_used_are_named(tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("no image")
    with pytest.raises(UserError, match=r"text\.png cannot be read"):
        read_image(tmp_path / "text.png")
    with pytest.raises(UserError, match=r"absent\.png does not exist"):
        read_image(tmp_path / "absent.png")
    with pytest.raises(UserError, match=r"cannot write .*x\.png: "):
        write_image(tmp_path / "text.png" / "x.png", panel(RED))
    with pytest.raises(UserError, match=r"x\.strange cannot be written"):
        write_image(tmp_path / "x.strange", panel(RED))
