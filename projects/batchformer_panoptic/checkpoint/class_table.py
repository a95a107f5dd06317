"""The class table stored in a checkpoint."""

from typing import Any

from ..data.class_table import ClassTable
from ..errors import UserError
from .files import read_weights
from .mismatch import start_from

KEY = "class_table"


class ClassTableRecord:
    """The classes of a model, stored in every checkpoint under "class_table".

    Loading compares the stored classes with those of the data set, which stay in effect.
    """

    def __init__(self, table: ClassTable) -> None:
        self._table = table

    def state_dict(self) -> list[dict[str, Any]]:
        """Return COCO category dicts in contiguous order."""
        return self._table.to_json()

    def check(self, categories: list[dict[str, Any]], path: str) -> None:
        """Refuse a checkpoint with other classes; colours and dataset ids may differ.

        Raises:
            UserError: names the first difference.
        """
        difference = self._table.difference(ClassTable.from_json(categories))
        if difference:
            raise UserError(
                "the checkpoint was trained on other classes (data set against checkpoint): "
                f"{difference}; use the data set of its training, or other weights; to train on "
                f"other classes: {start_from(path)}"
            )

    def compare(self, categories: list[dict[str, Any]]) -> str:
        """Describe for the log how the classes differ: their numbers and the first difference."""
        theirs = ClassTable.from_json(categories)
        if not self._table.difference(theirs):
            return "the classes are the same; MODEL.WEIGHTS would load the class head, too"
        counts = f"{self._table.num_classes} classes against {theirs.num_classes}"
        shared = min(self._table.num_classes, theirs.num_classes)
        for class_id in range(shared):
            mine, other = self._table.names[class_id], theirs.names[class_id]
            if mine != other:
                return (
                    f"{counts}; the first to differ is class {class_id}, {mine!r} against {other!r}"
                )
        if self._table.num_classes == theirs.num_classes:
            return f"{counts}; {self._table.difference(theirs)}"
        longer = max(self._table, theirs, key=lambda table: table.num_classes)
        return (
            f"{counts}; the first to differ is class {shared}, {longer.names[shared]!r} in one only"
        )


def read_class_table(path: str) -> ClassTable | None:
    """Return the classes stored in a checkpoint, or None.

    Raises:
        UserError: the file cannot be read.
    """
    categories = read_weights(path).get(KEY)
    return None if categories is None else ClassTable.from_json(categories)
