"""The classes of a data set: names, things and stuff, colors, and ids in the data set's files."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from detectron2.data.catalog import Metadata
from detectron2.utils.colormap import colormap

from ..errors import UserError
from .validation import (
    check_categories,
    check_color,
    check_entries,
    check_lists,
    raise_first_error,
)

Color = tuple[int, int, int]

# "sky-other-merged", "water-other", "door-stuff": COCO's names of stuff classes.
_COCO_ENDING = re.compile(r"(?: (?:other|merged|stuff))+$")


@dataclass(frozen=True)
class ClassTable:
    """Things and stuff in one contiguous id space; every field is indexed by the class id.

    Attributes:
        names: one name per class.
        is_thing: whether a class has countable instances.
        colors: RGB, 0 to 255.
        dataset_ids: the ids of the classes in the data set's JSON.
    """

    names: tuple[str, ...]
    is_thing: tuple[bool, ...]
    colors: tuple[Color, ...]
    dataset_ids: tuple[int, ...]

    def __post_init__(self) -> None:
        """Raise ValueError for fields of different lengths."""
        fields = (self.names, self.is_thing, self.colors, self.dataset_ids)
        if len({len(field) for field in fields}) != 1:
            raise ValueError(f"fields of different lengths: {[len(field) for field in fields]}")

    @property
    def num_classes(self) -> int:
        """Number of classes, things and stuff together."""
        return len(self.names)

    @property
    def thing_class_ids(self) -> list[int]:
        """Contiguous ids of the thing classes, ascending."""
        return [class_id for class_id, is_thing in enumerate(self.is_thing) if is_thing]

    @property
    def contiguous_ids(self) -> dict[int, int]:
        """Contiguous id of every id in the data set's files."""
        return {dataset_id: class_id for class_id, dataset_id in enumerate(self.dataset_ids)}

    @classmethod
    def from_categories(cls, categories: Sequence[Mapping[str, Any]]) -> "ClassTable":
        """Read the "categories" of COCO-panoptic JSON; contiguous ids follow the dataset ids.

        A category without a color gets one from Detectron2's color map.

        Raises:
            UserError: no categories, a category without id, name or isthing, an invalid
                color, or one id or name given twice.
        """
        table = cls.from_json(categories)
        order = sorted(range(table.num_classes), key=table.dataset_ids.__getitem__)
        return cls(
            names=tuple(table.names[i] for i in order),
            is_thing=tuple(table.is_thing[i] for i in order),
            colors=tuple(table.colors[i] for i in order),
            dataset_ids=tuple(table.dataset_ids[i] for i in order),
        )

    @classmethod
    def from_json(cls, categories: Sequence[Mapping[str, Any]]) -> "ClassTable":
        """Read the result of `to_json`; contiguous ids follow the order of the list.

        Raises:
            UserError: as in `from_categories`.
        """
        content = {"categories": categories}
        raise_first_error(check_lists(content, ["categories"]))
        raise_first_error(check_entries(content, "categories"))
        raise_first_error(check_categories(content))
        return cls(
            names=tuple(category["name"] for category in categories),
            is_thing=tuple(bool(category["isthing"]) for category in categories),
            colors=tuple(
                _color(category.get("color"), class_id)
                for class_id, category in enumerate(categories)
            ),
            dataset_ids=tuple(category["id"] for category in categories),
        )

    @classmethod
    def from_metadata(cls, metadata: Metadata) -> "ClassTable":
        """Read Detectron2's metadata of a panoptic set or of a set of boxes (every class a thing).

        Raises:
            UserError: the metadata names no classes, or numbers things and stuff separately.
        """
        names = metadata.get("thing_classes")
        stuff_names = metadata.get("stuff_classes")
        if not names:
            raise UserError(
                f"data set {metadata.name!r} has no metadata 'thing_classes': "
                "only panoptic data sets and data sets of boxes can be used"
            )
        if stuff_names is not None and list(stuff_names) != list(names):
            raise UserError(
                f"data set {metadata.name!r} numbers things and stuff separately: use one whose "
                "thing_classes and stuff_classes both list all classes "
                "(coco_2017_val_panoptic, not coco_2017_val_panoptic_separated)"
            )
        all_things = stuff_names is None
        things = set((metadata.get("thing_dataset_id_to_contiguous_id") or {}).values())
        dataset_ids = dataset_ids_of(metadata)
        colors = metadata.get("thing_colors") or metadata.get("stuff_colors") or [None] * len(names)
        # Metadata set by other code may hold arrays.
        colors = [None if color is None else [int(value) for value in color] for color in colors]
        for class_id, color in enumerate(colors):
            raise_first_error(check_color(color, f"class {class_id} of {metadata.name!r}"))
        return cls(
            names=tuple(names),
            is_thing=tuple(all_things or class_id in things for class_id in range(len(names))),
            colors=tuple(_color(color, class_id) for class_id, color in enumerate(colors)),
            dataset_ids=tuple(dataset_ids.get(i, i) for i in range(len(names))),
        )

    def to_json(self) -> list[dict[str, Any]]:
        """Return COCO categories (id, name, isthing, color) in contiguous order."""
        rows = zip(self.dataset_ids, self.names, self.is_thing, self.colors, strict=True)
        return [
            {"id": dataset_id, "name": name, "isthing": int(is_thing), "color": list(color)}
            for dataset_id, name, is_thing, color in rows
        ]

    def same_names(self, other: "ClassTable") -> dict[int, int]:
        """Return the class of another table that has the same name, by class id.

        Case, the endings "-other", "-merged" and "-stuff" of COCO's names, and the difference
        between "_", "-" and a space do not matter; of several such classes, the one with exactly
        the same name is preferred. A thing can have the name of a stuff class.
        """
        by_name: dict[str, int] = {}
        for class_id, name in enumerate(other.names):
            by_name.setdefault(_plain_name(name), class_id)
        exact = {name: class_id for class_id, name in enumerate(other.names)}
        found = (exact.get(name, by_name.get(_plain_name(name))) for name in self.names)
        return {mine: theirs for mine, theirs in enumerate(found) if theirs is not None}

    def difference(self, other: "ClassTable") -> str:
        """Describe the first difference that matters to a model; "" if there is none.

        Colors and dataset ids may differ: they do not reach the model.
        """
        if self.num_classes != other.num_classes:
            return f"{self.num_classes} classes against {other.num_classes}"
        for class_id, (mine, theirs) in enumerate(zip(self.names, other.names, strict=True)):
            if mine != theirs:
                return f"class {class_id} is {mine!r} against {theirs!r}"
            if self.is_thing[class_id] != other.is_thing[class_id]:
                kinds = {True: "a thing", False: "stuff"}
                return (
                    f"class {class_id} ({mine!r}) is {kinds[self.is_thing[class_id]]} against "
                    f"{kinds[other.is_thing[class_id]]}"
                )
        return ""


def dataset_ids_of(metadata: Metadata) -> dict[int, int]:
    """Return the id in the data set's files of every contiguous class id in the metadata.

    Raises:
        UserError: a contiguous id stands for two classes, one a thing and one stuff.
    """
    dataset_ids: dict[int, int] = {}
    for key in ("thing_dataset_id_to_contiguous_id", "stuff_dataset_id_to_contiguous_id"):
        for dataset_id, class_id in (metadata.get(key) or {}).items():
            if dataset_ids.setdefault(class_id, dataset_id) != dataset_id:
                raise UserError(
                    f"data set {metadata.name!r} numbers things and stuff separately: class "
                    f"{class_id} is both {dataset_ids[class_id]} and {dataset_id}; use the form "
                    "with one id space (Detectron2's names without '_separated')"
                )
    return dataset_ids


def _plain_name(name: str) -> str:
    return _COCO_ENDING.sub("", " ".join(re.split(r"[\s_-]+", name.strip().casefold())))


def _color(color: Sequence[int] | None, class_id: int) -> Color:
    """Return a checked color as a tuple; None: one of Detectron2's color map."""
    if color is None:
        palette = colormap(rgb=True)
        color = palette[class_id % len(palette)]
    red, green, blue = (int(value) for value in color)
    return red, green, blue
