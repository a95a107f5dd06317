"""Try an exported model in the browser: a page on this machine, and an HTTP endpoint.

python tools/serve.py output/run/deployed/model.onnx
"""

import argparse
import sys
from pathlib import Path

from batchformer_panoptic.deployment.runtime import ModelError, Predictor
from batchformer_panoptic.deployment.server import Limits, PredictionServer
from batchformer_panoptic.engine.setup import at_least
from batchformer_panoptic.errors import UserError, command, one_line


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path, help="an ONNX file of tools/export_checkpoint.py")
    parser.add_argument(
        "--host",
        default="127.0.0.1",
        help="address to listen at; 0.0.0.0 lets other machines in (default: %(default)s)",
    )
    parser.add_argument(
        "--port", type=int, default=8000, help="default: %(default)s; 0: a free one"
    )
    parser.add_argument(
        "--max-megabytes", type=at_least(1), default=20, help="of an upload; default: %(default)s"
    )
    parser.add_argument(
        "--max-megapixels", type=at_least(1), default=40, help="default: %(default)s"
    )
    parser.add_argument(
        "--seconds",
        type=at_least(1),
        default=60,
        help="to send an upload, and to wait for the model; default: %(default)s",
    )
    return parser.parse_args(argv)


@command
def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    limits = Limits(
        max_bytes=args.max_megabytes * 2**20,
        max_pixels=args.max_megapixels * 10**6,
        seconds=args.seconds,
    )
    try:
        predictor = Predictor.load(args.model)
    except ModelError as error:
        raise UserError(str(error)) from error
    try:
        server = PredictionServer(predictor, args.host, args.port, limits)
    except (OSError, OverflowError) as error:
        raise UserError(f"cannot listen at {args.host}:{args.port}: {one_line(error)}") from error
    with server:
        host, port = server.server_address[:2]
        print(f"open http://{host}:{port}; Ctrl-C stops the server", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print()
    return 0


if __name__ == "__main__":
    sys.exit(main())
