"""Draw the curves of a run, or compare several runs.

    python tools/plot_metrics.py output/quickstart --output curves.png
    python tools/plot_metrics.py output/a output/b --output loss.svg --metrics '*total_loss' '*/PQ'

A run is the OUTPUT_DIR of a training, or its metrics.json. There is a panel for each metric and a
line for each run that has it. Runs may have different lengths and metrics. Of a long run,
consecutive values are averaged to 300 points.
"""

import argparse
import sys
from pathlib import Path

from batchformer_panoptic.data.io import write_atomically
from batchformer_panoptic.errors import UserError, command
from batchformer_panoptic.visualization.curves import (
    MAIN_METRICS,
    choose_metrics,
    draw_curves,
    find_metrics,
    read_curves,
    run_names,
)

FORMATS = (".png", ".svg", ".pdf")


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", metavar="RUN")
    parser.add_argument(
        "--output", type=Path, required=True, metavar="FILE", help="PNG, SVG or PDF"
    )
    parser.add_argument(
        "--metrics",
        nargs="+",
        default=MAIN_METRICS,
        metavar="PATTERN",
        help="names of metrics, in which * stands for any characters (default: the main ones)",
    )
    return parser.parse_args(argv)


@command
def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    if args.output.suffix.lower() not in FORMATS:
        raise UserError(f"--output {args.output} must end with one of {', '.join(FORMATS)}")
    paths = list(dict.fromkeys(find_metrics(run) for run in args.runs))
    runs = dict(zip(run_names(paths), map(read_curves, paths), strict=True))
    metrics = choose_metrics(list(runs.values()), args.metrics)
    figure = draw_curves(runs, metrics)
    write_atomically(str(args.output), lambda name: figure.savefig(name, dpi=150))
    print(f"{args.output}: {len(metrics)} metrics of {len(runs)} runs")
    return 0


if __name__ == "__main__":
    sys.exit(main())
