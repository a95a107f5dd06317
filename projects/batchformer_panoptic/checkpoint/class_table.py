"""The class table that travels inside a checkpoint."""

from typing import Any

from ..data.categories import ClassTable
from ..errors import UserError
from .files import read_pth

KEY = "class_table"


class ClassTableRecord:
    """The classes a model is trained on, stored in every checkpoint under "class_table".

    Loading compares instead of replacing: the data set in use decides what the classes are.
    """

    def __init__(self, table: ClassTable) -> None:
        self._table = table

    def state_dict(self) -> list[dict[str, Any]]:
        """Return COCO category dicts in contiguous order."""
        return self._table.to_json()

    def load_state_dict(self, categories: list[dict[str, Any]]) -> None:
        """Compare with the classes of a checkpoint; colours and dataset ids may differ.

        Raises:
            UserError: names the first difference.
        """
        difference = self._table.difference(ClassTable.from_json(categories))
        if difference:
            raise UserError(
                "the checkpoint was trained on other classes, data set against checkpoint: "
                f"{difference}; use the data set it was trained on, or other weights"
            )


def read_class_table(path: str) -> ClassTable | None:
    """Return the classes stored in a checkpoint of this project, None when there are none.

    Raises:
        UserError: the file cannot be read.
    """
    categories = read_pth(path).get(KEY) if path.endswith(".pth") else None
    return None if categories is None else ClassTable.from_json(categories)
