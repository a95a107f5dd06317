"""Averages of panoptic quality over classes, as objects, tables and JSON."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from panopticapi.evaluation import PQStat
from tabulate import tabulate


@dataclass(frozen=True)
class GroupQuality:
    """Averages over the classes of a group that occur in the images; values from 0 to 1."""

    pq: float
    sq: float
    rq: float
    num_classes: int


@dataclass(frozen=True)
class ClassQuality:
    """Quality of one class; the three ratios (0 to 1) are None when the class never occurs."""

    name: str
    category_id: int  # of the data set
    is_thing: bool
    pq: float | None
    sq: float | None
    rq: float | None
    tp: int
    fp: int
    fn: int


@dataclass(frozen=True)
class PanopticQuality:
    """Result of one evaluation. A group is None when none of its classes occurs."""

    all: GroupQuality | None
    things: GroupQuality | None
    stuff: GroupQuality | None
    per_class: tuple[ClassQuality, ...]

    @classmethod
    def from_counts(
        cls, counts: PQStat, categories: Mapping[int, Mapping[str, Any]]
    ) -> "PanopticQuality":
        """Average counts with panopticapi's formulas.

        Args:
            counts: contributions of all images, per data set category id.
            categories: COCO panoptic category (``name``, ``isthing``) per data set category id.
        """
        return cls(
            all=_group_quality(counts, categories, None),
            things=_group_quality(counts, categories, True),
            stuff=_group_quality(counts, categories, False),
            per_class=_class_qualities(counts, categories),
        )

    def to_json(self) -> dict[str, Any]:
        """Convert to plain values for JSON; ratios stay from 0 to 1, missing ones are None."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "PanopticQuality":
        """Invert ``to_json``; keys of other meaning are ignored."""
        groups = {
            name: None if values[name] is None else GroupQuality(**values[name])
            for name in ("all", "things", "stuff")
        }
        return cls(**groups, per_class=tuple(ClassQuality(**row) for row in values["per_class"]))

    def to_metrics(self) -> dict[str, float]:
        """Convert to Detectron2's metric names in percent; a missing group is left out.

        Detectron2 formats and stores every metric as a number, so None has no place among them.
        """
        metrics: dict[str, float] = {}
        for suffix, group in (("", self.all), ("_th", self.things), ("_st", self.stuff)):
            if group is not None:
                metrics["PQ" + suffix] = 100 * group.pq
                metrics["SQ" + suffix] = 100 * group.sq
                metrics["RQ" + suffix] = 100 * group.rq
        return metrics

    def group_table(self) -> str:
        """Format the groups as a table in percent, "n/a" for a missing one."""
        rows: list[list[str]] = []
        for label, group in (("All", self.all), ("Things", self.things), ("Stuff", self.stuff)):
            values = (None, None, None) if group is None else (group.pq, group.sq, group.rq)
            size = 0 if group is None else group.num_classes
            rows.append([label, *map(_percent, values), str(size)])
        return _table(rows, ["", "PQ", "SQ", "RQ", "#classes"])

    def class_table(self) -> str:
        """Format the classes as a table in percent, "n/a" for classes that never occur."""
        rows = [
            [row.name, "thing" if row.is_thing else "stuff"]
            + [_percent(value) for value in (row.pq, row.sq, row.rq)]
            + [str(number) for number in (row.tp, row.fp, row.fn)]
            for row in self.per_class
        ]
        return _table(rows, ["class", "kind", "PQ", "SQ", "RQ", "TP", "FP", "FN"])


def _group_quality(
    counts: PQStat, categories: Mapping[int, Mapping[str, Any]], things: bool | None
) -> GroupQuality | None:
    members = {
        category_id: category
        for category_id, category in categories.items()
        if things is None or (category["isthing"] == 1) == things
    }
    # panopticapi divides by the number of classes that occur
    if not any(_occurs(counts, category_id) for category_id in members):
        return None
    average, _ = counts.pq_average(members, isthing=things)
    return GroupQuality(
        float(average["pq"]), float(average["sq"]), float(average["rq"]), int(average["n"])
    )


def _class_qualities(
    counts: PQStat, categories: Mapping[int, Mapping[str, Any]]
) -> tuple[ClassQuality, ...]:
    rows: list[ClassQuality] = []
    for category_id, category in categories.items():
        pq = sq = rq = None
        if _occurs(counts, category_id):
            _, per_class = counts.pq_average({category_id: category}, isthing=None)
            pq, sq, rq = (float(per_class[category_id][key]) for key in ("pq", "sq", "rq"))
        of_class = counts[category_id]
        rows.append(
            ClassQuality(
                name=str(category["name"]),
                category_id=category_id,
                is_thing=category["isthing"] == 1,
                pq=pq,
                sq=sq,
                rq=rq,
                tp=int(of_class.tp),
                fp=int(of_class.fp),
                fn=int(of_class.fn),
            )
        )
    return tuple(rows)


def _occurs(counts: PQStat, category_id: int) -> bool:
    of_class = counts[category_id]
    return of_class.tp + of_class.fp + of_class.fn > 0


def _percent(value: float | None) -> str:
    return "n/a" if value is None else f"{100 * value:.3f}"


def _table(rows: list[list[str]], headers: list[str]) -> str:
    # numbers are already text; left alone, tabulate would parse class names such as "1e3"
    alignment = ["left" if header in ("", "class", "kind") else "right" for header in headers]
    return tabulate(
        rows, headers=headers, tablefmt="pipe", disable_numparse=True, colalign=alignment
    )
