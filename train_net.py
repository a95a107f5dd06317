"""Train or evaluate a model: ``python train_net.py --config-file FILE [KEY VALUE ...]``."""

import sys

from batchformer_panoptic.engine import argument_parser, run
from batchformer_panoptic.errors import UserError


def main(argv: list[str] | None = None) -> int:
    """Run with Detectron2's usual arguments; 0 on success, 2 after a user's mistake."""
    try:
        run(argument_parser().parse_args(argv))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
