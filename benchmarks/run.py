"""Run benchmarks, keep each result as one JSON file, and write the tables of the document anew.

python benchmarks/run.py transformers
python benchmarks/run.py --render
"""

import argparse
import json
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import cost_curves
import digits_accuracy
import inference
import layer_cost
import pq_evaluation
import quickstart_cost
import sampling_cost
import training_step
import transformers_cost
import two_streams
from measure import machine

from batchformer_panoptic.errors import UserError

BENCHMARKS: dict[str, ModuleType] = {
    "transformers": transformers_cost,
    "quickstart": quickstart_cost,
    "sampling": sampling_cost,
    "layers": layer_cost,
    "inference": inference,
    "training": training_step,
    "streams": two_streams,
    "pq": pq_evaluation,
    "curves": cost_curves,
    "digits": digits_accuracy,
}
HERE = Path(__file__).resolve().parent
RESULTS, DOCUMENT = HERE / "results", HERE.parent / "docs" / "benchmarks.md"


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the JSON files")
    parser.add_argument("--document", type=Path, default=DOCUMENT, help="where the tables stand")
    parser.add_argument("--render", action="store_true", help="run nothing, write the tables only")
    chosen = parser.add_subparsers(dest="name", metavar="NAME")
    for name, module in BENCHMARKS.items():
        one = chosen.add_parser(name, help=(module.__doc__ or "").splitlines()[0])
        one.add_argument("--rounds", type=int, default=7, help="default: %(default)s")
        module.add_arguments(one)
    args = parser.parse_args(argv)
    if not args.render and args.name is None:
        parser.error(f"name a benchmark ({', '.join(BENCHMARKS)}) or give --render")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    try:
        if not args.render:
            result = {"machine": machine(), **BENCHMARKS[args.name].run(args)}
            args.results.mkdir(parents=True, exist_ok=True)
            path = args.results / f"{args.name}.json"
            path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
            print(BENCHMARKS[args.name].table(result))
            print(f"\n{path}")
        text = args.document.read_text(encoding="utf-8")
        args.document.write_text(rendered(text, read_results(args.results)), encoding="utf-8")
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def read_results(folder: Path) -> dict[str, dict[str, Any]]:
    return {p.stem: json.loads(p.read_text(encoding="utf-8")) for p in folder.glob("*.json")}


def rendered(text: str, results: dict[str, dict[str, Any]]) -> str:
    """The document with each generated part written anew from its result.

    A part stands between ``<!-- NAME -->`` and ``<!-- end NAME -->``; one without a result stays.
    """

    def part(found: re.Match[str]) -> str:
        name = found[1]
        if name not in results:
            return found[0]
        result, module = results[name], BENCHMARKS[name]
        content = f"{module.table(result)}\n\n{caption(result, module)}"
        return f"<!-- {name} -->\n{content}\n<!-- end {name} -->"

    return re.sub(r"<!-- (\w+) -->\n.*?<!-- end \1 -->", part, text, flags=re.S)


def caption(result: dict[str, Any], module: ModuleType) -> str:
    """Machine, versions and, unless the benchmark has other words for it, what a number is of."""
    where = result["machine"]
    rounds = f"medians of {result['rounds']} rounds."
    how_taken = module.how_taken(result) if hasattr(module, "how_taken") else rounds
    return (
        f"{where['processor']}, {where['threads']} of {where['cores']} cores, device "
        f"{where['device']}, torch {where['torch']}; {how_taken}"
    )


if __name__ == "__main__":
    sys.exit(main())
