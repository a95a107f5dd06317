"""Run a benchmark, save its result as JSON, and update the tables of docs/benchmarks.md.

python benchmarks/run.py transformers
python benchmarks/run.py --render
"""

import argparse
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from batchformer_panoptic.data.io import read_json, write_atomically, write_json
from batchformer_panoptic.engine.setup import at_least
from batchformer_panoptic.errors import UserError, command, one_line

from . import (
    cost_curves,
    deployed,
    digits_accuracy,
    gpu_cost,
    inference,
    layer_cost,
    loading,
    mask2former_cost,
    neighbours,
    operators,
    pq_evaluation,
    processes_cost,
    quickstart_cost,
    sampling_cost,
    training_step,
    transformers_cost,
    two_streams,
)
from .measure import machine

BENCHMARKS: dict[str, ModuleType] = {
    "transformers": transformers_cost,
    "quickstart": quickstart_cost,
    "sampling": sampling_cost,
    "layers": layer_cost,
    "inference": inference,
    "training": training_step,
    "streams": two_streams,
    "operators": operators,
    "deployed": deployed,
    "mask2former": mask2former_cost,
    "pq": pq_evaluation,
    "loading": loading,
    "neighbours": neighbours,
    "curves": cost_curves,
    "digits": digits_accuracy,
    "processes": processes_cost,
    "gpu": gpu_cost,
}
HERE = Path(__file__).resolve().parent
RESULTS, DOCUMENT = HERE / "results", HERE.parent / "docs" / "benchmarks.md"


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="benchmarks/run.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the JSON files")
    parser.add_argument("--document", type=Path, default=DOCUMENT, help="file with the tables")
    parser.add_argument("--render", action="store_true", help="only update the tables")
    chosen = parser.add_subparsers(dest="name", metavar="NAME")
    for name, module in BENCHMARKS.items():
        one = chosen.add_parser(
            name,
            help=(module.__doc__ or "").splitlines()[0],
            description=module.__doc__,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        one.add_argument("--rounds", type=at_least(1), default=7, help="default: %(default)s")
        module.add_arguments(one)
    args = parser.parse_args(argv)
    if not args.render and args.name is None:
        parser.error(f"name a benchmark ({', '.join(BENCHMARKS)}) or give --render")
    return args


@command
def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    try:
        if not args.render:
            result = {"machine": machine(), **BENCHMARKS[args.name].run(args)}
            print(BENCHMARKS[args.name].table(result))
            if result.get("tiny") and args.results == RESULTS:
                print("\na rehearsal, which is saved only where --results and --document say")
                return 0
            path = args.results / f"{args.name}.json"
            write_json(path, result, indent=1)
            print(f"\n{path}")
        text = args.document.read_text(encoding="utf-8")
        text = rendered(text, read_results(args.results))
        write_atomically(str(args.document), lambda name: Path(name).write_text(text, "utf-8"))
    except OSError as error:
        raise UserError(one_line(error)) from error
    return 0


def read_results(folder: Path) -> dict[str, dict[str, Any]]:
    return {p.stem: read_json(p) for p in folder.glob("*.json")}


def rendered(text: str, results: dict[str, dict[str, Any]]) -> str:
    """Return the document with every generated part rendered from its result.

    A part is enclosed in ``<!-- NAME -->`` and ``<!-- end NAME -->``; one without a result is kept.
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
    """Return machine, versions and how the numbers were taken, which a benchmark may describe."""
    where = result["machine"]
    rounds = f"medians of {result['rounds']} rounds."
    how_taken = module.how_taken(result) if hasattr(module, "how_taken") else rounds
    return (
        f"{where['processor']}, {where['threads']} of {where['cores']} cores, device "
        f"{where['device']}, torch {where['torch']}; {how_taken}"
    )


if __name__ == "__main__":
    sys.exit(main())
