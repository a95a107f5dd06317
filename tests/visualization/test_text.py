"""Text in pictures: class names in any script, fonts that are missing, legends."""

import logging
from pathlib import Path

import numpy as np
import pytest

from batchformer_panoptic.data import ClassTable
from batchformer_panoptic.visualization import legend, legend_entries, text
from batchformer_panoptic.visualization.text import Label, class_names, draw_labels, label_size

# Lycian and Deseret letters, which fonts rarely have; not in DejaVu Sans.
RARE = "\N{LYCIAN LETTER A}\N{LYCIAN LETTER E}"
COVERED = ("Fußgänger", "пешеход", "πεζός", "مشاة", "רכב", "người đi bộ")
INK = np.array((40, 40, 40))


def table(*names: str) -> ClassTable:
    count = len(names)
    colors = tuple((20 * k, 255 - 20 * k, 90) for k in range(count))
    return ClassTable(names, (True,) * count, colors, tuple(range(10, 10 + count)))


@pytest.fixture
def no_system_fonts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text, "_system_fonts", list)
    text._font_path.cache_clear()


@pytest.fixture(autouse=True)
def _forget_fonts() -> None:
    yield
    text._font_path.cache_clear()


@pytest.mark.usefixtures("no_system_fonts")
@pytest.mark.parametrize("name", COVERED)
def test_names_in_several_scripts_need_no_system_font(name: str) -> None:
    assert class_names(table(name)) == [name]
    bar = text.title_bar(name, 300, 20)
    missing = text.title_bar("\N{LYCIAN LETTER A}" * len(name), 300, 20)
    assert (bar != missing).any(), "not the boxes of missing letters"


@pytest.mark.usefixtures("no_system_fonts")
def test_a_name_without_a_font_becomes_its_id_with_a_warning(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.WARNING):
        assert class_names(table("box", f"old {RARE}")) == ["box", "#11"]
        class_names(table("box", f"old {RARE}"))
    (record,) = caplog.records
    assert RARE in record.message
    assert "install a font for this script" in record.message


def test_a_system_font_is_used_where_it_has_the_letters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text, "_system_fonts", lambda: ["poor.ttf", "rich.ttf"])
    letters = {"poor.ttf": "abc", "rich.ttf": RARE}
    known = text._characters
    monkeypatch.setattr(
        text,
        "_characters",
        lambda path: {*map(ord, letters[path])} if path in letters else known(path),
    )
    text._font_path.cache_clear()
    assert text._font_path(RARE) == "rich.ttf"
    assert text._font_path("abc") == text._default_font()
    assert class_names(table(f"{RARE} abc")) == [f"{RARE} abc"], "each word has its own font"


def test_files_that_are_no_fonts_are_passed_over(tmp_path: Path) -> None:
    (tmp_path / "broken.ttf").write_text("no font")
    assert text._characters(str(tmp_path / "broken.ttf")) == frozenset()


def test_labels_are_as_large_as_stated() -> None:
    canvas = np.full((100, 400, 3), 200, dtype=np.uint8)
    width, height = label_size("person 87%", 20)
    label = Label("person 87%", (255, 0, 0), 10, 20, 10 + width, 20 + height, 20)
    changed = (draw_labels(canvas, [label]) != canvas).any(axis=-1)
    rows, columns = np.nonzero(changed)
    assert (rows.min(), columns.min()) == (20, 10)
    assert rows.max() <= 20 + height + 1
    assert columns.max() <= 10 + width + 1
    assert (canvas == 200).all()
    assert label_size("person 87%", 40)[0] == pytest.approx(2 * width, rel=0.05)


@pytest.mark.parametrize(("width", "lines"), [(2000, 1), (260, 3), (50, 5)])
def test_a_legend_takes_the_lines_it_needs(width: int, lines: int) -> None:
    classes = table("window", "door", "balcony", "shop", "пешеход")
    strip = legend(legend_entries(classes), width, 20)
    assert strip.shape == (lines * 32, width, 3)
    for color in classes.colors:
        assert (strip == color).all(axis=-1).sum() >= 19 * 19, color


def test_a_legend_of_some_classes_is_in_their_order() -> None:
    classes = table("window", "door", "balcony")
    assert legend_entries(classes, [2, 0, 2]) == [
        ("window", classes.colors[0]),
        ("balcony", classes.colors[2]),
    ]
