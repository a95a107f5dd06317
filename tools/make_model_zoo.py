"""Write MODEL_ZOO.md from the result files in docs/results.

    python tools/make_model_zoo.py

One JSON file for each trained model; its "kind" is "panoptic" or "classification". A file of kind
"converted" lists weights of other code bases, one of kind "published" holds numbers of papers.
"""

import argparse
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tabulate import tabulate

from batchformer_panoptic.data.io import read_json, write_atomically
from batchformer_panoptic.errors import UserError, command

ROOT = Path(__file__).resolve().parents[1]
RESULTS, DOCUMENT = ROOT / "docs" / "results", ROOT / "MODEL_ZOO.md"
KINDS = ("panoptic", "classification", "converted", "published")
NOT_MEASURED = "-"

INTRODUCTION = """\
# Model zoo

Written by `python tools/make_model_zoo.py` from the files in [docs/results](docs/results); edit
those, not this page.

Three kinds of numbers are kept apart: models trained here, weights of other code bases that the
converter reads, and numbers quoted from papers. The project ships no weights.

## How to read the columns

- **PQ, SQ, RQ**: panoptic, segmentation and recognition quality in percent.
- **BatchFormerV2**: whether training used the block. Evaluation is the same either way.
- **partner**: the same run without (or with) the block, on equal data, steps and seed. A row
  without a partner does not measure the effect of the block.
- **steps**: optimiser steps taken, of those of the schedule if training was stopped earlier.
- **s/it, memory**: seconds per training step and peak memory.
- **-**: not measured. One seed unless a spread is given.
"""

CONVERTED = """\
`tools/convert_checkpoint.py SRC DST --source NAME` reads these weights. The named test gives the
weights of the original to this project's model, through the converter's tables, and compares the
two. The models are tiny and random unless stated otherwise.
"""


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the JSON files")
    parser.add_argument("--document", type=Path, default=DOCUMENT, help="file to write")
    return parser.parse_args(argv)


@command
def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    text = rendered(read_results(args.results))
    write_atomically(str(args.document), lambda path: Path(path).write_text(text, "utf-8"))
    print(args.document)
    return 0


def read_results(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """Results by kind, each kind in the order of the file names.

    Raises:
        UserError: a file is unreadable or of an unknown kind, or the folder has none.
    """
    results: dict[str, list[dict[str, Any]]] = {kind: [] for kind in KINDS}
    for path in sorted(folder.glob("*.json")):
        result = read_json(path)
        kind = result.get("kind") if isinstance(result, dict) else None
        if kind not in results:
            raise UserError(f'{path} needs a "kind", one of {", ".join(KINDS)}; found: {kind}')
        results[kind].append(result)
    if not any(results.values()):
        raise UserError(f"{folder} has no result files (*.json)")
    return results


def rendered(results: dict[str, list[dict[str, Any]]]) -> str:
    """The whole document."""
    parts = [
        INTRODUCTION,
        "## Trained here\n",
        *trained_panoptic(results["panoptic"]),
        *(part for result in results["classification"] for part in trained_classifier(result)),
        "## Converted from other code bases\n",
        CONVERTED,
        *(part for result in results["converted"] for part in converted(result)),
        "## Quoted from papers\n",
        "Published by the authors of each system, not measured here.\n",
        *(part for result in results["published"] for part in published(result)),
    ]
    return "\n".join(parts)


def trained_panoptic(results: Sequence[dict[str, Any]]) -> list[str]:
    header = ["model", "BatchFormerV2", "data", "PQ", "SQ", "RQ", "PQ things", "PQ stuff"]
    header += ["SQ things / stuff", "RQ things / stuff", "AP", "partner"]
    rows = [
        [
            f"[{result['name']}]({result['config']})",
            "yes" if result["block"] else "no",
            result["data"],
            *(value_of(result, metric, "all") for metric in ("PQ", "SQ", "RQ")),
            value_of(result, "PQ", "things"),
            value_of(result, "PQ", "stuff"),
            *(both_groups(result, metric) for metric in ("SQ", "RQ")),
            number(result["AP"]),
            result["partner"] or NOT_MEASURED,
        ]
        for result in results
    ]
    training = [
        [
            result["name"],
            steps(result),
            result["batch"],
            result["seed"],
            result["hardware"],
            number(result["seconds_per_iteration"]),
            f"{result['memory_gb']} GB" if result["memory_gb"] else NOT_MEASURED,
            result["date"],
            f"`{result['command']}`",
            result["note"],
        ]
        for result in results
    ]
    columns = ["model", "steps", "batch", "seed", "hardware", "s/it", "memory", "recorded"]
    return [
        "### Panoptic segmentation\n",
        table(rows, header),
        "How each was trained:\n",
        table(training, [*columns, "command", "note"]),
    ]


def trained_classifier(result: dict[str, Any]) -> list[str]:
    """Top-1 with and without the block, from the runs that a benchmark recorded.

    Raises:
        UserError: the file of the benchmark is missing.
    """
    runs = read_json(ROOT / result["source"])
    rows = [
        [row["labels"], spread(row["plain_top1"]), spread(row["block_top1"])]
        for row in runs["rows"]
    ]
    machine, config = runs["machine"], runs["config"]
    plain, block = f"[without]({result['config']})", f"[with]({result['config_with_block']})"
    return [
        "### Image classification\n",
        f"{result['name']}, {result['data']}. Top-1 in percent: mean ± standard deviation over "
        f"{runs['rounds']} seeds.\n",
        table(rows, ["labels per class", f"{plain} BatchFormerV2", f"{block} BatchFormerV2"]),
        f"{config['steps']} steps of batch {config['images']}; {machine['processor']}, "
        f"{machine['threads']} of {machine['cores']} cores, torch {machine['torch']}; recorded "
        f"{result['date']}; `{result['command']}`.\n",
    ]


def converted(result: dict[str, Any]) -> list[str]:
    rows = [
        [weights, f"`{source}`", compared, f"[{Path(test).name}]({test})"]
        for weights, source, test, compared in result["rows"]
    ]
    return [table(rows, ["weights", "`--source`", "compared with the original", "test"])]


def published(result: dict[str, Any]) -> list[str]:
    return [
        text
        for one in result["tables"]
        for text in (
            f"### {one['title']}\n",
            table(one["rows"], one["columns"]),
            f"Source: {one['source']}\n",
        )
    ]


def table(rows: Sequence[Sequence[Any]], header: Sequence[str]) -> str:
    return tabulate(rows, header, tablefmt="github", disable_numparse=True) + "\n"


def value_of(result: dict[str, Any], metric: str, group: str) -> str:
    return number(result[metric].get(group))


def both_groups(result: dict[str, Any], metric: str) -> str:
    values = [value_of(result, metric, group) for group in ("things", "stuff")]
    return NOT_MEASURED if set(values) == {NOT_MEASURED} else " / ".join(values)


def number(value: float | None) -> str:
    return NOT_MEASURED if value is None else f"{value:.1f}"


def steps(result: dict[str, Any]) -> str:
    taken, planned = result["steps"], result["schedule"]
    return f"{taken}" if planned in (None, taken) else f"{taken} of {planned}"


def spread(values: Sequence[float]) -> str:
    return f"{statistics.mean(values):.1f} ± {statistics.stdev(values):.1f}"


if __name__ == "__main__":
    sys.exit(main())
