"""What can only be seen while a model runs, checked in its first training step."""

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor


class FirstPass:
    """Watches one forward pass for modules in the wrong order and a misread batch dimension.

    Args:
        after: names of the modules that the block acts after.
        layout: how their tokens lie.
    """

    def __init__(self, after: Sequence[str], layout: str) -> None:
        self.after = tuple(after)
        self.layout = layout
        self.num_images: int | None = None
        self.seen: list[int] | None = None

    def begin(self, inputs: Iterable[Any]) -> None:
        """Note how many images the model is given, if it can be told.

        It can where an argument is a tensor (B, C, H, W), a list with one item for each image, or
        an object with such ``tensors`` (DETR's NestedTensor).
        """
        self.seen = []
        counts = (_count_images(value) for value in inputs)
        self.num_images = next((count for count in counts if count is not None), None)

    def at_insertion(self, index: int, tokens: Tensor) -> None:
        """Check one insertion.

        Raises:
            ValueError: the batch is not where the layout says, or another module should have run.
        """
        if self.seen is None:  # called in another way than model(...)
            return
        if index != len(self.seen):
            raise ValueError(self._order([*self.seen, index]))
        self.seen.append(index)
        if self.num_images is None:
            return
        expected = self.num_images * (2 if index else 1)
        if tokens.dim() != len(self.layout) or tokens.shape[self.layout.index("B")] != expected:
            raise ValueError(
                f"{self.after[index]} returned tokens of shape {tuple(tokens.shape)} for "
                f"{self.num_images} images, which is not {self.layout!r} with {expected} entries: "
                "state the layout that it is, and name a module that keeps images apart"
            )

    def end(self) -> None:
        """Check that every module has run.

        Raises:
            ValueError: one has not.
        """
        if self.seen is not None and len(self.seen) != len(self.after):
            raise ValueError(self._order(self.seen))

    def _order(self, seen: Sequence[int]) -> str:
        ran = [self.after[index] for index in seen]
        return (
            f"after names {list(self.after)}, but what ran was {ran}: name modules that run once "
            "in each forward pass, in the order they run in"
        )


def _count_images(value: Any) -> int | None:
    value = getattr(value, "tensors", value)
    if isinstance(value, Tensor):
        return value.shape[0] if value.dim() == 4 else None
    return len(value) if isinstance(value, list) and value else None
