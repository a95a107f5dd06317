"""What annotation tools write besides plain polygons, read into segments."""

import base64
import json
import math
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from batchformer_panoptic.data.images import read_image
from batchformer_panoptic.data.importers import read_source, recognise
from batchformer_panoptic.data.importers.source import (
    ImageIndex,
    Segment,
    Source,
    decode,
    ellipse,
    encode,
    paste,
    polygon,
    polygon_of_pixels,
    split_of,
)
from batchformer_panoptic.data.importers.writing import choose_classes, convert, paint
from batchformer_panoptic.data.segment_maps import read_segment_map
from batchformer_panoptic.errors import UserError
from helpers.foreign_formats import dump, png_bytes

SIZE = (40, 60)  # height, width


def save_image(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", SIZE[::-1]).save(path)


def read(path: Path, name: str | None = None) -> Source:
    return read_source(path, *recognise(path, name))


def segments(source: Source) -> list[Segment]:
    (sample,) = source.samples
    return sample.read_segments(sample.size or SIZE)


def areas(source: Source) -> list[tuple[str | None, int]]:
    return [(x.category, int(decode(x.rle).sum())) for x in segments(source)]


def box(x: float, y: float, width: float, height: float) -> list[list[float]]:
    return [[x, y], [x + width, y], [x + width, y + height], [x, y + height]]


def paint_all(source: Source, overlap: str = "smaller") -> list[tuple[str, int, bool]]:
    """Name, area and crowd flag of the painted segments, in the order of their ids."""
    categories = {category["name"]: category for category in source.categories}
    found = segments(source)
    segment_map, owners = paint(found, SIZE, categories, overlap, None, source.notes)
    return [
        (str(x.category), int((segment_map == key).sum()), x.is_crowd) for key, x in owners.items()
    ]


# ---------------------------------------------------------------------------
# Masks
# ---------------------------------------------------------------------------


def test_a_polygon_covers_the_pixels_between_its_coordinates() -> None:
    mask = decode(polygon(box(3, 5, 10, 4), SIZE))
    expected = np.zeros(SIZE, bool)
    expected[5:9, 3:13] = True
    np.testing.assert_array_equal(mask, expected)
    assert decode(polygon([[1, 1], [9, 9]], SIZE)).sum() == 0
    with pytest.raises(ValueError, match="not finite"):
        polygon([[1, 1], [9, 9], [math.nan, 2]], SIZE)


def test_points_outside_the_image_are_cut_off() -> None:
    mask = decode(polygon(box(-5, -5, 15, 15), SIZE))
    assert (mask.sum(), mask[:10, :10].sum()) == (100, 100)


def test_a_polygon_of_pixels_has_its_outermost_pixels_and_no_hole() -> None:
    mask = decode(polygon_of_pixels([box(2, 2, 9, 9), box(4, 4, 1, 1)], SIZE))
    expected = np.zeros(SIZE, bool)
    expected[2:12, 2:12] = True
    expected[4:6, 4:6] = False
    np.testing.assert_array_equal(mask, expected)


def test_an_ellipse_has_its_area() -> None:
    assert decode(polygon(ellipse(30, 20, 25, 15), SIZE)).sum() == pytest.approx(
        math.pi * 25 * 15, rel=0.01
    )


@pytest.mark.parametrize(("left", "top", "area"), [(5, 6, 12), (-1, 0, 9), (58, 38, 4), (99, 0, 0)])
def test_a_part_is_pasted_and_cut_at_the_border(left: int, top: int, area: int) -> None:
    mask = decode(paste(np.ones((3, 4)), left, top, SIZE))
    assert mask.sum() == area
    assert mask[max(top, 0) : top + 3, max(left, 0) : left + 4].sum() == area


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("instances_train2017", "train"),
        ("valid", "val"),
        ("panoptic_val", "val"),
        ("Test", "test"),
        ("training", "train"),
        ("interval", None),
        ("default", None),
        ("trainval", "train"),
    ],
)
def test_names_of_splits(text: str, expected: str | None) -> None:
    assert split_of(text) == expected


# ---------------------------------------------------------------------------
# Overlaps
# ---------------------------------------------------------------------------


def square(category: str | None, x: int, width: int, **extra: Any) -> Segment:
    return Segment(category, polygon(box(x, 0, width, 10), SIZE), **extra)


def painted(found: Sequence[Segment], overlap: str, background: str | None = None) -> list[Any]:
    """Classes of the ids, and the ids of columns 0, 5, 10, ... of the first row."""
    categories = {name: {"isthing": name.islower()} for name in ("a", "b", "STUFF", "REST")}
    segment_map, owners = paint(found, SIZE, categories, overlap, background, Counter())
    return [[x.category for x in owners.values()], segment_map[0, ::5].tolist()]


def test_the_smaller_segment_or_the_later_one_or_the_higher_one_is_on_top() -> None:
    found = [square("a", 0, 10, z=1), square("b", 5, 25, z=2), square("a", 20, 30, z=0)]
    assert painted(found, "smaller")[1] == [3, 3, 2, 2, 2, 2, 1, 1, 1, 1, 0, 0]
    assert painted(found, "file")[1] == [1, 2, 2, 2, 3, 3, 3, 3, 3, 3, 0, 0]
    assert painted(found, "z-order")[1] == [2, 3, 3, 3, 3, 3, 1, 1, 1, 1, 0, 0]


def test_a_crowd_is_below_and_void_is_kept_from_the_background() -> None:
    found = [square("a", 0, 10, is_crowd=True), square("b", 5, 20), square(None, 40, 5)]
    assert painted(found, "smaller", "REST") == [
        ["a", "b", "REST"],
        [1, 2, 2, 2, 2, 3, 3, 3, 0, 3, 3, 3],
    ]


def test_stuff_is_one_segment_and_groups_are_one_thing() -> None:
    found = [
        *(square("STUFF", 0, 10), square("STUFF", 50, 10)),
        *(square("a", 10, 5, group=1), square("a", 20, 5, group=1), square("b", 30, 5, group=1)),
    ]
    assert painted(found, "file") == [
        ["STUFF", "a", "b"],
        [1, 1, 2, 0, 2, 0, 3, 0, 0, 0, 1, 1],
    ]


def test_the_background_may_be_a_class_of_the_source() -> None:
    found = [square("STUFF", 0, 10), square("a", 10, 10)]
    assert painted(found, "file", "STUFF")[1] == [1, 1, 2, 2, *[1] * 8]


# ---------------------------------------------------------------------------
# Images
# ---------------------------------------------------------------------------


def test_images_are_found_by_the_end_of_their_path(tmp_path: Path) -> None:
    for name in ("train/a.png", "val/a.png", "x/b.jpg", "x/.hidden/c.png", "masks/d.png"):
        save_image(tmp_path / name)
    index = ImageIndex([tmp_path])
    index.leave_out(tmp_path / "masks")
    assert index.find("val/a.png") == tmp_path / "val/a.png"
    assert index.find("a.png", split="train") == tmp_path / "train/a.png"
    assert index.find("C:\\old\\x\\b.jpg") == tmp_path / "x/b.jpg"
    assert index.find("b") == tmp_path / "x/b.jpg"
    with pytest.raises(UserError, match=r"'a\.png' can be .*train/a\.png or .*val/a\.png"):
        index.find("a.png")
    assert [index.find(name) for name in ("c.png", "d.png", "b.png")] == [None] * 3
    with pytest.raises(UserError, match=r"3 of 6 annotated images .* the first is 'c\.png'"):
        index.check()


def test_images_without_an_annotation_are_counted(tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        save_image(tmp_path / name)
    dump(tmp_path / "a.json", labelme([]))
    assert read(tmp_path).notes == {"image file without an annotation, left out": 1}


def test_a_damaged_file_is_not_passed_over_but_a_hidden_one_is(tmp_path: Path) -> None:
    save_image(tmp_path / "a.png")
    dump(tmp_path / "a.json", labelme([]))
    (tmp_path / "._a.json").write_bytes(b"\0\xff")
    assert len(read(tmp_path).samples) == 1
    for name, message in (("b.json", r"b\.json is not valid JSON"), ("c.xml", r"c\.xml cannot be")):
        (tmp_path / name).write_text("{")
        with pytest.raises(UserError, match=message):
            read(tmp_path)
        (tmp_path / name).unlink()


def test_an_image_may_not_be_annotated_twice(tmp_path: Path) -> None:
    save_image(tmp_path / "a.png")
    for name in ("a.json", "copy.json"):
        dump(tmp_path / name, labelme([]))
    with pytest.raises(UserError, match=r"image .*a\.png is annotated twice"):
        read(tmp_path)


# ---------------------------------------------------------------------------
# labelme
# ---------------------------------------------------------------------------


def labelme(shapes: list[dict[str, Any]]) -> dict[str, Any]:
    height, width = SIZE
    frame = {"imageHeight": height, "imageWidth": width, "imageData": None}
    return {"shapes": shapes, "imagePath": "a.png", **frame}


def test_labelme_shapes(tmp_path: Path) -> None:
    save_image(tmp_path / "a.png")
    shapes = [
        {"label": "cat", "points": box(0, 0, 10, 10), "group_id": 4},
        {"label": "cat", "points": box(20, 0, 5, 10), "group_id": 4, "shape_type": "polygon"},
        {"label": "dog", "points": [[30, 20], [30, 10]], "shape_type": "circle"},
        {"label": "dog", "points": [[50, 30], [40, 25]], "shape_type": "rectangle"},
        {"label": "cat", "points": [[0, 0], [9, 9]], "shape_type": "line"},
    ]
    dump(tmp_path / "a.json", labelme(shapes))
    source = read(tmp_path)
    assert [category["name"] for category in source.categories] == ["cat", "dog"]
    found = paint_all(source, "file")
    assert [(name, is_crowd) for name, _, is_crowd in found] == [
        *(("cat", False), ("dog", False), ("dog", False))
    ]
    expected = [150, math.pi * 100, 50]
    np.testing.assert_allclose([area for _, area, _ in found], expected, rtol=0.01)
    assert source.notes == {
        "rectangle taken as a filled rectangle": 1,
        "line without an area, left out": 1,
    }


# ---------------------------------------------------------------------------
# CVAT
# ---------------------------------------------------------------------------


def cvat(shapes: str, extra: str = "") -> str:
    height, width = SIZE
    return (
        "<annotations><version>1.1</version><meta><job><labels><label><name>dog</name></label>"
        f"<label><name>cat</name></label></labels></job></meta>{extra}"
        f'<image id="0" name="a.png" subset="Train" width="{width}" height="{height}">{shapes}'
        "</image></annotations>"
    )


def test_cvat_shapes(tmp_path: Path) -> None:
    save_image(tmp_path / "images/a.png")
    shapes = (
        '<box label="cat" xtl="10" ytl="10" xbr="30" ybr="20" rotation="90.0" z_order="0"/>'
        '<ellipse label="dog" cx="45" cy="20" rx="5" ry="15" rotation="90" z_order="0"/>'
        '<polygon label="cat" points="0,30;5,30;5,40;0,40" z_order="0" group_id="2"/>'
        '<polygon label="cat" points="50,30;55,30;55,40;50,40" z_order="0" group_id="2"/>'
        '<mask label="dog" rle="1, 2, 3, 6" left="0" top="0" width="4" height="3" z_order="0"/>'
        '<polyline label="cat" points="1,1;2,2"/><tag label="dog"/>'
    )
    (tmp_path / "annotations.xml").write_text(cvat(shapes))
    source = read(tmp_path)
    assert [category["name"] for category in source.categories] == ["dog", "cat"]
    assert source.samples[0].split == "train"
    turned_box, turned_ellipse, *_, mask = segments(source)
    assert decode(turned_box.rle)[5:25, 15:25].all()
    assert decode(turned_box.rle).sum() == 200
    columns = np.nonzero(decode(turned_ellipse.rle).any(axis=0))[0]
    assert (columns[0], columns[-1]) == (30, 59)
    assert decode(mask.rle)[:3, :4].astype(int).tolist() == [
        *([0, 1, 1, 0], [0, 0, 1, 1], [1, 1, 1, 1])
    ]
    assert ("cat", 100, False) in paint_all(source, "z-order")
    assert source.notes["CVAT polyline without an area, left out"] == 2
    assert source.notes["box taken as a filled rectangle"] == 2


def test_tracks_of_cvat_are_refused(tmp_path: Path) -> None:
    save_image(tmp_path / "a.png")
    (tmp_path / "annotations.xml").write_text(cvat("", '<track id="0" label="dog"></track>'))
    with pytest.raises(UserError, match=r"has tracks: export 'CVAT for images 1\.1'"):
        read(tmp_path)


# ---------------------------------------------------------------------------
# Label Studio
# ---------------------------------------------------------------------------


def region(kind: str, value: dict[str, Any], label: str | None = "cat") -> dict[str, Any]:
    height, width = SIZE
    value = {**value, kind: [label]} if label else value
    return {"id": f"{kind}{value}", "type": kind, "value": value} | {
        "original_width": width,
        "original_height": height,
        "image_rotation": 0,
    }


def task(results: list[dict[str, Any]], **extra: Any) -> dict[str, Any]:
    annotations = [{"result": results, "was_cancelled": False, "updated_at": "2025-01-01"}]
    data = {"text": "no image", "image": "/data/local-files/?d=shop/a%20b.png"}
    return {"id": 1, "data": data, "annotations": annotations, **extra}


def test_label_studio_regions(tmp_path: Path) -> None:
    save_image(tmp_path / "shop/a b.png")
    mask = np.zeros(SIZE, bool)
    mask[3:7, 2:9] = True
    url = "data:image/png;base64," + base64.b64encode(png_bytes(mask, alpha=True)).decode()
    half = {"x": 50, "y": 50, "width": 20, "height": 25, "rotation": 90}
    polygon_only = region("polygon", {"points": box(50, 0, 25, 50)}, None)
    results = [
        region("rectanglelabels", half),
        region("ellipselabels", {"x": 50, "y": 50, "radiusX": 50, "radiusY": 25, "rotation": 0}),
        region("bitmasklabels", {"imageDataURL": url}, "dog"),
        polygon_only,
        {"id": polygon_only["id"], "type": "labels", "value": {"labels": ["bird"]}},
        region("keypointlabels", {"x": 1, "y": 1}),
        region("polygon", {"points": box(0, 0, 9, 9)}, None),
        {"type": "relation", "from_id": "a", "to_id": "b"},
    ]
    dump(tmp_path / "project.json", [task(results)])
    source = read(tmp_path)
    assert [category["name"] for category in source.categories] == ["bird", "cat", "dog"]
    # A box of 12 x 10 pixels, turned around its corner at (30, 20).
    assert decode(segments(source)[0].rle)[20:32, 20:30].all()
    assert [name for name, _ in areas(source)] == ["cat", "cat", "dog", "bird"]
    expected = [120, math.pi * 30 * 10, 28, 15 * 20]
    np.testing.assert_allclose([area for _, area in areas(source)], expected, rtol=0.01)
    assert source.notes["Label Studio keypoint without an area, left out"] > 0
    assert source.notes["Label Studio polygon without a label, left out"] > 0


def test_label_studio_tasks_without_an_annotation_are_left_out(tmp_path: Path) -> None:
    save_image(tmp_path / "shop/a b.png")
    cancelled = {"result": [], "was_cancelled": True}
    tasks = [task([]), task([], annotations=[]), task([], annotations=[cancelled])]
    dump(tmp_path / "project.json", tasks)
    source = read(tmp_path)
    assert len(source.samples) == 1
    assert source.notes == {"task without a submitted annotation, left out": 2}
    assert areas(source) == []


def test_the_ground_truth_of_label_studio_comes_first(tmp_path: Path) -> None:
    save_image(tmp_path / "shop/a b.png")
    versions = [
        {"result": [region("polygonlabels", {"points": box(0, 0, 50, 50)}, name)], **extra}
        for name, extra in (
            ("old", {"updated_at": "2024-01-01", "ground_truth": True}),
            ("new", {"updated_at": "2025-01-01"}),
        )
    ]
    dump(tmp_path / "project.json", [task([], annotations=versions)])
    assert areas(read(tmp_path)) == [("old", 600)]


def test_an_image_turned_in_label_studio_is_refused(tmp_path: Path) -> None:
    save_image(tmp_path / "shop/a b.png")
    turned = region("polygonlabels", {"points": box(0, 0, 9, 9)}) | {"image_rotation": 90}
    dump(tmp_path / "project.json", [task([turned])])
    with pytest.raises(UserError, match="was rotated in Label Studio"):
        segments(read(tmp_path))


# ---------------------------------------------------------------------------
# Supervisely
# ---------------------------------------------------------------------------


def test_supervisely_objects(tmp_path: Path) -> None:
    save_image(tmp_path / "train/img/a.png")
    dump(tmp_path / "meta.json", {"classes": [{"title": "cat"}, {"title": "dog"}]})
    data = base64.b64encode(png_bytes(np.ones((3, 4)))).decode()  # not compressed
    polygons = [
        {"classTitle": "dog", "points": {"exterior": box(x, 20, 9, 9), "interior": []}}
        for x in (0, 20)
    ]
    objects = [
        {
            "classTitle": "cat",
            "geometryType": "polygon",
            "points": {"exterior": box(0, 0, 9, 9), "interior": [box(2, 2, 3, 3)]},
        },
        {
            "classTitle": "cat",
            "geometryType": "rectangle",
            "points": {"exterior": [[30, 0], [39, 4]], "interior": []},
        },
        {
            "classTitle": "dog",
            "geometryType": "bitmap",
            "bitmap": {"data": data, "origin": [50, 30]},
        },
        *({**entry, "geometryType": "polygon", "instance": "ab"} for entry in polygons),
        {"classTitle": "dog", "geometryType": "point", "points": {"exterior": [[1, 1]]}},
    ]
    height, width = SIZE
    content = {"size": {"height": height, "width": width}, "objects": objects}
    dump(tmp_path / "train/ann/a.png.json", content)
    source = read(tmp_path)
    assert source.samples[0].split == "train"
    assert paint_all(source, "file") == [
        *(("cat", 84, False), ("cat", 50, False), ("dog", 12, False), ("dog", 200, False))
    ]
    assert source.notes["Supervisely point without an area, left out"] == 1


# ---------------------------------------------------------------------------
# YOLO
# ---------------------------------------------------------------------------


def yolo(root: Path, line: str, names: str = "[cat, dog]") -> Source:
    save_image(root / "images/train/a.png")
    (root / "labels/train").mkdir(parents=True)
    (root / "labels/train/a.txt").write_text(line)
    (root / "data.yaml").write_text(f"path: /home/x/sets\ntrain: images/train\nnames: {names}\n")
    return read(root)


@pytest.mark.parametrize("names", ["[cat, dog]", "{1: dog, 0: cat}"])
def test_yolo_polygons(tmp_path: Path, names: str) -> None:
    source = yolo(tmp_path, "1 0 0 0.5 0 0.5 0.5 0 0.5\n\n0 0.5 0.5 1.01 0.5 1 1 0.5 1\n", names)
    assert areas(source) == [("dog", 600), ("cat", 600)]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("0 0.5 0.5 0.2 0.2", r"a\.txt, line 1 is a box \(class x y width height\): export"),
        ("2 0 0 1 0 1 1", "class 2 is not among the 2 names"),
        ("0 0 0 30 0 30 30", "are not shares of the image"),
        ("0 0 0 x 0 1 1", "could not convert string"),
    ],
)
def test_lines_that_yolo_segmentation_does_not_write_are_refused(
    tmp_path: Path, line: str, message: str
) -> None:
    source = yolo(tmp_path, line)
    with pytest.raises((UserError, ValueError), match=message):
        segments(source)


def test_yolo_lists_of_images(tmp_path: Path) -> None:
    yolo(tmp_path, "0 0 0 0.5 0 0.5 0.5 0 0.5")
    (tmp_path / "list.txt").write_text("./images/train/a.png\n")
    (tmp_path / "data.yaml").write_text("train: list.txt\nnames: [cat]\n")
    assert areas(read(tmp_path)) == [("cat", 600)]
    (tmp_path / "data.yaml").write_text("train: absent\nnames: [cat]\n")
    with pytest.raises(UserError, match="'absent' does not exist below"):
        read(tmp_path)


# ---------------------------------------------------------------------------
# COCO
# ---------------------------------------------------------------------------


def coco(*annotations: dict[str, Any], categories: Any = None) -> dict[str, Any]:
    height, width = SIZE
    return {
        "images": [{"id": 1, "file_name": "a.png", "height": height, "width": width}],
        "annotations": [
            {"id": k, "image_id": 1, "category_id": 1, "bbox": [0, 0, 9, 9], **annotation}
            for k, annotation in enumerate(annotations)
        ],
        "categories": categories or [{"id": 1, "name": "cat"}],
    }


def flat(*points: list[list[float]]) -> list[list[float]]:
    return [[value for point in part for value in point] for part in points]


def test_coco_crowds_and_objects_in_several_parts(tmp_path: Path) -> None:
    save_image(tmp_path / "a.png")
    mask = encode(np.pad(np.ones((10, 30), bool), ((0, 30), (0, 30))))
    crowd = {"size": list(SIZE), "counts": mask["counts"].decode()}
    parts = flat(box(20, 0, 5, 10), box(40, 0, 5, 10))
    content = coco({"segmentation": parts}, {"segmentation": crowd, "iscrowd": 1})
    dump(tmp_path / "labels.json", content)
    assert paint_all(read(tmp_path)) == [("cat", 250, True), ("cat", 100, False)]


@pytest.mark.parametrize(
    ("annotation", "message"),
    [
        ({}, "annotation 0 has a box and no mask"),
        ({"segmentation": []}, "annotation 0 has a box and no mask"),
        ({"segmentation": {"size": [9, 9], "counts": [81]}}, r"of the size \[9, 9\], image"),
    ],
)
def test_coco_annotations_without_a_usable_mask_are_refused(
    tmp_path: Path, annotation: dict[str, Any], message: str
) -> None:
    save_image(tmp_path / "a.png")
    dump(tmp_path / "labels.json", coco(annotation))
    with pytest.raises(UserError, match=message):
        segments(read(tmp_path))


def test_wrong_references_in_coco_are_named(tmp_path: Path) -> None:
    save_image(tmp_path / "a.png")
    for change, message in (
        ({"category_id": 7}, "annotation 0: category_id 7 is not among the categories"),
        ({"image_id": 7}, "image_id 7 is not among the images"),
    ):
        dump(tmp_path / "labels.json", coco({"segmentation": flat(box(0, 0, 9, 9)), **change}))
        with pytest.raises(UserError, match=message):
            read(tmp_path)


def test_a_malformed_record_is_one_line(tmp_path: Path) -> None:
    content = coco({"segmentation": []})
    del content["images"][0]["height"]
    dump(tmp_path / "labels.json", content)
    with pytest.raises(UserError, match="as coco cannot be read: a record has no 'height'"):
        read(tmp_path)


def test_key_points_beside_instances_are_not_read(tmp_path: Path) -> None:
    save_image(tmp_path / "a.png")
    content = coco({"segmentation": flat(box(0, 0, 9, 9))})
    for name in ("instances_train", "person_keypoints_train"):
        dump(tmp_path / f"annotations/{name}.json", content)
    assert areas(read(tmp_path)) == [("cat", 81)]


def test_a_class_of_roboflow_that_only_groups_is_none(tmp_path: Path) -> None:
    save_image(tmp_path / "train/a.png")
    categories = [
        {"id": 0, "name": "pets", "supercategory": "none"},
        {"id": 1, "name": "cat", "supercategory": "pets"},
        {"id": 2, "name": "dog", "supercategory": "dog"},
    ]
    for used, expected in ((1, ["cat", "dog"]), (0, ["pets", "cat", "dog"])):
        annotation = {"segmentation": flat(box(0, 0, 9, 9)), "category_id": used}
        path = tmp_path / "train/_annotations.coco.json"
        dump(path, coco(annotation, categories=categories))
        assert [category["name"] for category in read(tmp_path).categories] == expected


# ---------------------------------------------------------------------------
# Label images
# ---------------------------------------------------------------------------


def voc(root: Path, classes: np.ndarray, objects: np.ndarray | None, mode: str = "P") -> Source:
    save_image(root / "JPEGImages/a.png")
    for folder, values in (("Class", classes), ("Object", objects)):
        if values is not None:
            image = Image.fromarray(values.astype(np.uint8))
            if mode == "P":
                image.putpalette(np.repeat(range(256), 3).tolist())
            path = root / f"Segmentation{folder}/a.png"
            path.parent.mkdir(exist_ok=True)
            image.convert(mode).save(path)
    return read(root)


def voc_maps() -> tuple[np.ndarray, np.ndarray]:
    classes, objects = np.zeros(SIZE, int), np.zeros(SIZE, int)
    classes[:10, :20], objects[:10, :10], objects[:10, 10:20] = 3, 1, 2
    classes[10, :20] = objects[10, :20] = 255
    return classes, objects


@pytest.mark.parametrize("mode", ["P", "L"])
def test_voc_has_a_void_border(tmp_path: Path, mode: str) -> None:
    source = voc(tmp_path, *voc_maps(), mode)
    assert len(source.categories) == 20
    assert areas(source) == [("bird", 100), ("bird", 100), (None, 20)]


def test_voc_without_objects_is_stuff(tmp_path: Path) -> None:
    source = voc(tmp_path, voc_maps()[0], None)
    assert {category["isthing"] for category in source.categories} == {0}
    assert not source.has_objects
    assert areas(source) == [("bird", 200), (None, 20)]


def test_unusable_label_images_are_named(tmp_path: Path) -> None:
    classes, objects = voc_maps()
    with pytest.raises(UserError, match=r"index 77, and there are 20 classes: list"):
        segments(voc(tmp_path / "a", np.where(classes == 3, 77, 0), objects))
    with pytest.raises(UserError, match=r"a\.png is RGB, and its values are not indices"):
        segments(voc(tmp_path / "b", classes, objects, "RGB"))
    (tmp_path / "c").mkdir()
    (tmp_path / "c/labelmap.txt").write_text("background:0,0,0::\ncat:9,9,9::\n")
    with pytest.raises(UserError, match=r"color \(3, 3, 3\), which labelmap\.txt does not list"):
        segments(voc(tmp_path / "c", classes, objects))


def test_several_years_of_voc_are_converted_one_by_one(tmp_path: Path) -> None:
    for year in ("VOC2007", "VOC2012"):
        (tmp_path / year / "SegmentationClass").mkdir(parents=True)
    with pytest.raises(UserError, match=r"VOC2007 and .*VOC2012 are data sets of their own"):
        read(tmp_path)


def test_images_that_voc_does_not_list_are_left_out(tmp_path: Path) -> None:
    save_image(tmp_path / "JPEGImages/b.png")
    source = voc(tmp_path, *voc_maps())
    assert len(source.samples) == 1
    assert source.notes == {"image file without an annotation, left out": 1}


@pytest.mark.parametrize("kind", ["ids", "polygons"])
def test_groups_and_other_labels_of_cityscapes(tmp_path: Path, kind: str) -> None:
    save_image(tmp_path / "leftImg8bit/train/x/x_0_leftImg8bit.png")
    path = tmp_path / f"gtFine/train/x/x_0_gtFine_{'instanceIds.png' if kind == 'ids' else ''}"
    path.parent.mkdir(parents=True)
    if kind == "ids":
        ids = np.full(SIZE, 7, np.uint16)  # road
        ids[:10, :10], ids[:10, 10:20], ids[:10, 20:30] = 26000, 26, 3  # car, cars, out of roi
        Image.fromarray(ids).save(path)
    else:
        frame = [[0, 0], [60, 0], [60, 40], [0, 40]]
        labels = {"road": frame, "car": box(0, 0, 10, 10), "cargroup": box(10, 0, 10, 10)}
        labels["license plate"] = box(20, 0, 10, 10)
        height, width = SIZE
        objects = [{"label": label, "polygon": points} for label, points in labels.items()]
        content = {"imgHeight": height, "imgWidth": width, "objects": objects}
        dump(path.with_name(f"{path.name}polygons.json"), content)
    source = read(tmp_path)
    assert len(source.categories) == 19
    found = sorted(paint_all(source, "file"))
    assert found == [("car", 100, False), ("car", 100, True), ("road", 2100, False)]


def test_what_cityscapes_does_not_publish_is_left_out(tmp_path: Path) -> None:
    for split in ("train", "test"):
        save_image(tmp_path / f"leftImg8bit/{split}/x/x_{split}_leftImg8bit.png")
        path = tmp_path / f"gtFine/{split}/x/x_{split}_gtFine_instanceIds.png"
        path.parent.mkdir(parents=True)
        Image.fromarray(np.full(SIZE, 7, np.uint16)).save(path)
    source = read(tmp_path / "gtFine")
    assert len(source.samples) == 1
    assert any("whose annotation is not public" in note for note in source.notes)


# ---------------------------------------------------------------------------
# Rotation by EXIF
# ---------------------------------------------------------------------------


def test_sizes_that_disagree_are_refused_by_both_names(tmp_path: Path) -> None:
    save_image(tmp_path / "a.png")
    content = labelme([{"label": "cat", "points": box(0, 0, 9, 9)}])
    dump(tmp_path / "a.json", content | {"imageHeight": 20, "imageWidth": 30})
    source = choose_classes(read(tmp_path), [], [], None)
    message = re.escape("a.png is 60x40, but was annotated as 30x20 (width x height)")
    with pytest.raises(UserError, match=message):
        convert(
            source, ["train"], tmp_path / "out", target="panoptic", overlap="file", background=None
        )


@pytest.mark.parametrize("orientation", [5, 6, 7, 8])
def test_annotations_of_the_stored_pixels_are_turned_like_the_image(
    tmp_path: Path, orientation: int
) -> None:
    pixels = np.zeros((*SIZE, 3), np.uint8)
    pixels[:10, :20] = 255  # the object, white
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(pixels).save(tmp_path / "a.png", exif=exif)
    dump(tmp_path / "labels.json", coco({"segmentation": flat(box(0, 0, 20, 10))}))
    source = choose_classes(read(tmp_path), [], [], None)
    out = tmp_path / "out"
    convert(source, ["train"], out, target="panoptic", overlap="file", background=None)
    image = read_image(out / "train/a.png")
    assert image.shape[:2] == SIZE[::-1]
    np.testing.assert_array_equal(
        read_segment_map(out / "panoptic_train/a.png") > 0, image[..., 0] > 0
    )
    record = json.loads((out / "annotations/panoptic_train.json").read_text())["images"][0]
    assert (record["height"], record["width"]) == SIZE[::-1]
