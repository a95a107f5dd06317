"""Train a model, or evaluate one, as a config file describes.

    python train_net.py --config-file FILE                              train
    python train_net.py --config-file FILE SOLVER.BASE_LR 0.0001        ... with another setting
    python train_net.py --config-file FILE --resume                     continue after a stop
    python train_net.py --config-file FILE --eval-only MODEL.WEIGHTS W  evaluate

Settings after the options replace those of the file. Weights, logs and results are written to
OUTPUT_DIR. torchrun and srun may start it several times, for one training. Exit status: 0; 2 after
a mistake in the arguments, the config or the data; 128 and its number after a signal.
"""

import sys

from batchformer_panoptic.engine import argument_parser, run
from batchformer_panoptic.errors import command


@command
def main(argv: list[str] | None = None) -> int:
    run(argument_parser(__doc__).parse_args(argv))
    return 0


if __name__ == "__main__":
    sys.exit(main())
