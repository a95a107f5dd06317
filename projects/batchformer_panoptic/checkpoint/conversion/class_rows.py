"""From the rows of another project's class layer to the contiguous classes of a data set."""

from collections.abc import Sequence
from itertools import groupby

import torch
from torch import Tensor

from ...data.categories import ClassTable
from ...errors import UserError

CLASS_KEYS = ("box_head.class_embed.weight", "box_head.class_embed.bias")


def select_class_rows(
    model: dict[str, Tensor], classes: ClassTable | None, *, no_object: bool = True
) -> tuple[dict[str, Tensor], list[str]]:
    """Keep the rows of the wanted classes, in contiguous order, and "no object" as the last one.

    DETR numbers its rows as the data set's files number the classes, with gaps where an id is not
    used (91 rows for the 80 classes of COCO's boxes, 250 for the 133 of COCO panoptic). A layer
    with exactly as many rows as there are classes, and too few for their ids, is contiguous.

    Args:
        model: complete, in this project's names; not changed.
        classes: the wanted classes; None keeps every row.
        no_object: whether the last row is "no object" (softmax), or all are classes (sigmoid).

    Returns:
        The model with its class layer replaced, and lines that say what was done.

    Raises:
        UserError: the layer has too few rows for the classes.
    """
    num_rows = model[CLASS_KEYS[0]].shape[0] - int(no_object)
    if classes is None:
        return model, [f"all {num_rows} class rows are kept: MODEL.DETR.NUM_CLASSES {num_rows}"]
    if min(classes.dataset_ids) >= 0 and max(classes.dataset_ids) < num_rows:
        rows = list(classes.dataset_ids)
    elif num_rows == classes.num_classes:
        rows = list(range(num_rows))
    else:
        raise UserError(
            f"the weights have {num_rows} class rows, which are neither the {classes.num_classes} "
            f"classes nor rows for the ids {min(classes.dataset_ids)} to "
            f"{max(classes.dataset_ids)}; name the classes they were trained on, or --classes all"
        )
    index = torch.tensor([*rows, num_rows] if no_object else rows)
    selected = {key: model[key][index] for key in CLASS_KEYS}
    return {**model, **selected}, [_describe(num_rows, rows, no_object)]


def _describe(num_rows: int, kept: Sequence[int], no_object: bool) -> str:
    dropped = sorted(set(range(num_rows)) - set(kept))
    if not dropped:
        return f"all {num_rows} class rows are kept" + (
            "" if list(kept) == sorted(kept) else ", in the order of the classes"
        )
    what = f"{len(kept)} of {num_rows} class rows are kept, dropped are {_ranges(dropped)}"
    if not no_object:
        return f"{what}: each row has a sigmoid of its own, the scores of the others stay"
    return (
        f"{what}: the softmax shares the probability of the dropped rows among the classes that "
        "stay and 'no object', in proportion; each query's scores rise by one common factor (a "
        "little, where the rows were never used in training) and the order of its classes stays"
    )


def _ranges(numbers: Sequence[int]) -> str:
    """Ascending numbers as text: 0, 12, 29-30."""
    runs = []
    for _, group in groupby(enumerate(numbers), key=lambda pair: pair[1] - pair[0]):
        run = [number for _, number in group]
        runs.append(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}")
    return ", ".join(runs)
