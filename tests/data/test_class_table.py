"""The class table: JSON categories, Detectron2's metadata, differences."""

import pytest
from detectron2.data import MetadataCatalog

from batchformer_panoptic.data import ClassTable
from batchformer_panoptic.errors import UserError

CATEGORIES = [
    {"id": 20, "name": "grass", "isthing": 0, "color": [1, 2, 3]},
    {"id": 4, "name": "cat", "isthing": 1, "color": [4, 5, 6]},
    {"id": 9, "name": "sky", "isthing": 0, "color": [7, 8, 9]},
    {"id": 11, "name": "dog", "isthing": 1},
]


def test_contiguous_ids_follow_the_dataset_ids() -> None:
    table = ClassTable.from_categories(CATEGORIES)
    assert table.names == ("cat", "sky", "dog", "grass")
    assert table.dataset_ids == (4, 9, 11, 20)
    assert table.is_thing == (True, False, True, False)
    assert table.thing_class_ids == [0, 2]
    assert table.num_classes == 4
    assert table.contiguous_ids == {4: 0, 9: 1, 11: 2, 20: 3}
    assert (table.colors[0], table.colors[1], table.colors[3]) == ((4, 5, 6), (7, 8, 9), (1, 2, 3))
    assert all(0 <= value <= 255 for value in table.colors[2])


def test_json_round_trip_keeps_the_order() -> None:
    table = ClassTable.from_categories(CATEGORIES)
    assert ClassTable.from_json(table.to_json()) == table
    swapped = ClassTable(("a", "b"), (True, False), ((0, 0, 0), (1, 1, 1)), (7, 2))
    assert ClassTable.from_json(swapped.to_json()) == swapped


def test_classes_of_the_same_name() -> None:
    def table(*names: str) -> ClassTable:
        black = ((0, 0, 0),) * len(names)
        return ClassTable(names, (True,) * len(names), black, tuple(range(len(names))))

    coco = table("sky-other-merged", "water", "water-other", "dining table", "other", "door-stuff")
    mine = table("Door", "cone", "Sky", "dining_table", "water-other", "WATER", "other", "wall")
    assert mine.same_names(coco) == {0: 5, 2: 0, 3: 3, 4: 2, 5: 1, 6: 4}
    assert coco.same_names(coco) == {class_id: class_id for class_id in range(6)}


def test_coco_panoptic_metadata() -> None:
    table = ClassTable.from_metadata(MetadataCatalog.get("coco_2017_val_panoptic"))
    assert table.num_classes == 133
    assert table.thing_class_ids == list(range(80))
    assert table.contiguous_ids[1] == 0
    assert table.contiguous_ids[200] == 132
    assert table.names[0] == "person"
    assert table.names[132] == "rug-merged"
    assert ClassTable.from_categories(table.to_json()) == table


def test_metadata_of_boxes_has_only_things() -> None:
    table = ClassTable.from_metadata(MetadataCatalog.get("coco_2017_train"))
    assert table.num_classes == 80
    assert table.thing_class_ids == list(range(80))
    assert table.dataset_ids[79] == 90


def test_metadata_of_boxes_without_ids() -> None:
    metadata = MetadataCatalog.get("test_categories_boxes_without_ids")
    metadata.set(thing_classes=["a", "b"])
    table = ClassTable.from_metadata(metadata)
    assert table.thing_class_ids == [0, 1]
    assert table.dataset_ids == (0, 1)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("coco_2017_val_panoptic_separated", "separately"),
        ("a_data_set_without_metadata", "thing_classes"),
    ],
)
def test_metadata_that_cannot_be_used(name: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        ClassTable.from_metadata(MetadataCatalog.get(name))


@pytest.mark.parametrize(
    ("category", "words"),
    [
        ({"name": "x", "isthing": 1}, "'id'"),
        ({"id": 1, "isthing": 1}, "'name'"),
        ({"id": 1, "name": "x"}, "'isthing'"),
        ({"id": "1", "name": "x", "isthing": 1}, "no integer 'id'"),
        ({"id": 1, "name": "x", "isthing": 2}, "'isthing' is 2; write 1"),
        ({"id": 4, "name": "x", "isthing": 1}, "2 categories have the id 4"),
        ({"id": 1, "name": "cat", "isthing": 1}, "2 categories have the name 'cat'"),
        ({"id": 1, "name": "x", "isthing": 1, "color": [1, 2]}, r"color \[1, 2\] is not"),
        ({"id": 1, "name": "x", "isthing": 1, "color": [1, 2, 256]}, r"color \[1, 2, 256\] is not"),
        ("x", "not JSON objects"),
    ],
)
def test_wrong_category(category: object, words: str) -> None:
    with pytest.raises(UserError, match=words):
        ClassTable.from_categories([*CATEGORIES, category])  # type: ignore[list-item]


def test_no_categories() -> None:
    with pytest.raises(UserError, match="empty"):
        ClassTable.from_categories([])


def test_difference() -> None:
    table = ClassTable.from_categories(CATEGORIES)
    recolored = [{**category, "color": [9, 9, 9]} for category in CATEGORIES]
    assert table.difference(ClassTable.from_categories(recolored)) == ""
    shorter = ClassTable.from_categories(CATEGORIES[1:])
    assert table.difference(shorter) == "4 classes against 3"
    renamed = [{**CATEGORIES[0], "name": "lawn"}, *CATEGORIES[1:]]
    assert "'grass' against 'lawn'" in table.difference(ClassTable.from_categories(renamed))
    turned = [{**CATEGORIES[0], "isthing": 1}, *CATEGORIES[1:]]
    assert "stuff against a thing" in table.difference(ClassTable.from_categories(turned))
