"""Train or evaluate a model: ``python train_net.py --config-file FILE [KEY VALUE ...]``."""

import sys

from batchformer_panoptic.engine import argument_parser, run
from batchformer_panoptic.errors import command


@command
def main(argv: list[str] | None = None) -> int:
    """Run with Detectron2's usual arguments; return 0, or 2 after a user's mistake."""
    run(argument_parser().parse_args(argv))
    return 0


if __name__ == "__main__":
    sys.exit(main())
