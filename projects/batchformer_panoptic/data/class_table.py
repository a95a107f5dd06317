"""The classes of a data set: names, things and stuff, colours, ids in the data set's own files."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from detectron2.data.catalog import Metadata
from detectron2.utils.colormap import colormap

from ..errors import UserError

Color = tuple[int, int, int]


@dataclass(frozen=True)
class ClassTable:
    """Things and stuff in one contiguous id space; the position in every field is the class id.

    Attributes:
        names: one name per class.
        is_thing: whether a class has countable instances.
        colors: RGB, 0 to 255.
        dataset_ids: the ids that the data set's JSON uses for the classes.
    """

    names: tuple[str, ...]
    is_thing: tuple[bool, ...]
    colors: tuple[Color, ...]
    dataset_ids: tuple[int, ...]

    def __post_init__(self) -> None:
        """Refuse fields of different lengths."""
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
        """Read the "categories" of a COCO-panoptic JSON; contiguous ids follow the dataset ids.

        A category without a colour gets one from Detectron2's colour map.

        Raises:
            UserError: no categories, a category without id, name or isthing, or one id or name
                given twice.
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
        """Read what `to_json` wrote; contiguous ids follow the order of the list.

        Raises:
            UserError: as in `from_categories`.
        """
        if not isinstance(categories, Sequence) or not categories:
            raise UserError('"categories" is empty: list every class with id, name and isthing')
        for category in categories:
            _check_category(category)
        names = tuple(category["name"] for category in categories)
        dataset_ids = tuple(int(category["id"]) for category in categories)
        for values, field in ((names, "name"), (dataset_ids, "id")):
            if repeated := _first_repeated(values):
                raise UserError(f"categories: {field} {repeated[0]!r} is given twice")
        return cls(
            names=names,
            is_thing=tuple(bool(category["isthing"]) for category in categories),
            colors=tuple(
                _color(category.get("color"), class_id)
                for class_id, category in enumerate(categories)
            ),
            dataset_ids=dataset_ids,
        )

    @classmethod
    def from_metadata(cls, metadata: Metadata) -> "ClassTable":
        """Read Detectron2's metadata of a panoptic set or of a set of boxes (every class a thing).

        Raises:
            UserError: the metadata names no classes, or counts things and stuff separately.
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
        thing_ids = metadata.get("thing_dataset_id_to_contiguous_id") or {}
        stuff_ids = metadata.get("stuff_dataset_id_to_contiguous_id") or {}
        all_things = stuff_names is None
        dataset_ids = {class_id: dataset_id for dataset_id, class_id in stuff_ids.items()}
        dataset_ids |= {class_id: dataset_id for dataset_id, class_id in thing_ids.items()}
        things = set(thing_ids.values())
        colors = metadata.get("thing_colors") or metadata.get("stuff_colors") or [None] * len(names)
        return cls(
            names=tuple(names),
            is_thing=tuple(all_things or class_id in things for class_id in range(len(names))),
            colors=tuple(_color(color, class_id) for class_id, color in enumerate(colors)),
            dataset_ids=tuple(dataset_ids.get(i, i) for i in range(len(names))),
        )

    def to_json(self) -> list[dict[str, Any]]:
        """COCO category dicts in contiguous order: id (of the data set), name, isthing, color."""
        rows = zip(self.dataset_ids, self.names, self.is_thing, self.colors, strict=True)
        return [
            {"id": dataset_id, "name": name, "isthing": int(is_thing), "color": list(color)}
            for dataset_id, name, is_thing, color in rows
        ]

    def difference(self, other: "ClassTable") -> str:
        """What a model would notice between two tables; "" if nothing.

        Colours and dataset ids may differ: they do not reach the model.
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


def _check_category(category: Any) -> None:
    if not isinstance(category, Mapping):
        raise UserError(f"category {category!r} is not an object with id, name and isthing")
    if missing := [key for key in ("id", "name", "isthing") if key not in category]:
        raise UserError(f"category {dict(category)!r} has no {missing[0]!r}")
    if not isinstance(category["id"], int) or not isinstance(category["name"], str):
        raise UserError(f"category {dict(category)!r}: id must be an integer and name a text")
    if category["isthing"] not in (0, 1):
        raise UserError(f"category {category['name']!r}: isthing must be 0 or 1")


def _first_repeated(values: Sequence[Any]) -> list[Any]:
    """The first value that stands in the sequence a second time, as a list of at most one."""
    seen: set[Any] = set()
    for value in values:
        if value in seen:
            return [value]
        seen.add(value)
    return []


def _color(color: Any, class_id: int) -> Color:
    """The colour as three integers; one of Detectron2's map where there is none."""
    if color is None:
        palette = colormap(rgb=True)
        color = palette[class_id % len(palette)]
    red, green, blue = _three_bytes(color, class_id)
    return red, green, blue


def _three_bytes(color: Any, class_id: int) -> list[int]:
    try:
        values = [int(value) for value in color]
    except (TypeError, ValueError):
        values = []
    if len(values) != 3 or not all(0 <= value <= 255 for value in values):
        raise UserError(f"colour {color!r} of class {class_id} is not three numbers from 0 to 255")
    return values
