"""Exported models in ONNX Runtime against the models themselves, on one CPU thread.

Both predict the segments of the same image, each in a process of its own, in turns. The model is
the fast copy of `TEST.FAST`. Weights are random; the score threshold keeps --kept queries.
"""

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from tabulate import tabulate

from batchformer_panoptic.engine.setup import at_least

MODELS = {
    "detr": "DETR R50 panoptic",
    "mask2former": "Mask2Former R50 panoptic",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(rounds=5)
    parser.add_argument(
        "--size", type=at_least(1), nargs=2, default=[800, 1066], metavar=("HEIGHT", "WIDTH")
    )
    parser.add_argument("--kept", type=at_least(1), default=12, help="queries that become segments")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))


def run(args: argparse.Namespace) -> dict[str, Any]:
    rows = [compare(name, args) for name in args.models]
    return {"size": list(args.size), "kept": args.kept, "rounds": args.rounds, "rows": rows}


def compare(name: str, args: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        settings = {"model": name, "size": list(args.size), "kept": args.kept, "folder": folder}
        export(settings)
        with contextlib.ExitStack() as stack:
            workers = {way: stack.enter_context(worker(way, settings)) for way in ("torch", "onnx")}
            for process in workers.values():
                predict(process)  # one without effect
            answers: dict[str, list[dict[str, float]]] = {way: [] for way in workers}
            for _ in range(args.rounds):
                for way, process in workers.items():
                    answers[way].append(predict(process))
        maps = [np.load(Path(folder, f"{way}.npy")) for way in workers]
        differ = int((maps[0] != maps[1]).sum())
        # Masks of random weights nearly tie in more pixels than those of trained ones.
        assert differ <= maps[0].size / 1000, differ
        assert maps[0].max() > 0
        return {
            "model": name,
            "segments": int(maps[0].max()),
            "pixels": maps[0].size,
            "pixels_that_differ": differ,
            "seconds": {w: statistics.median(a["seconds"] for a in answers[w]) for w in answers},
            "ratio": statistics.median(
                ours["seconds"] / theirs["seconds"]
                for ours, theirs in zip(answers["onnx"], answers["torch"], strict=True)
            ),
            "peak_gigabytes": {w: answers[w][-1]["peak_bytes"] / 1e9 for w in answers},
        }


def make_model(settings: dict[str, Any]) -> tuple[Any, Any, list[dict[str, Any]]]:
    """Config, model with random weights, and its input."""
    import torch
    from detectron2.modeling import build_model

    from batchformer_panoptic.engine import load_config

    from .inference import CONFIGS, PLAIN, keep_best, make_case, random_input
    from .inference_ways import Case

    if settings["model"] == "detr":
        case = make_case(PLAIN, settings["size"])
    else:
        opts = ["MODEL.DEVICE", "cpu", "MODEL.PANOPTIC.INSTANCES_TEST", "False"]
        cfg = load_config(str(CONFIGS / "mask2former_R50_50ep.yaml"), opts)
        cfg.MODEL.DETR.NUM_CLASSES, cfg.MODEL.PANOPTIC.THING_CLASS_IDS = 133, list(range(80))
        torch.manual_seed(0)
        case = Case(cfg, build_model(cfg).eval(), [random_input(*settings["size"])])
    with torch.no_grad():
        keep_best(case, settings["kept"])
    return case.cfg, case.model, case.inputs


def export(settings: dict[str, Any]) -> None:
    from batchformer_panoptic.data import ClassTable
    from batchformer_panoptic.deployment.onnx import describe, export_onnx

    cfg, model, inputs = make_model(settings)
    count, things = cfg.MODEL.DETR.NUM_CLASSES, set(cfg.MODEL.PANOPTIC.THING_CLASS_IDS)
    table = ClassTable(
        tuple(map(str, range(count))),
        tuple(i in things for i in range(count)),
        ((0, 0, 0),) * count,
        tuple(range(count)),
    )
    description = describe(model, cfg, table, outputs="results", size=None)
    folder = Path(settings["folder"])
    export_onnx(model, description, folder / "model.onnx")
    np.save(folder / "image.npy", inputs[0]["image"].numpy())
    threshold = model.inference_options.panoptic.score_threshold
    np.save(folder / "threshold.npy", np.array(threshold, np.float32))


@contextlib.contextmanager
def worker(way: str, settings: dict[str, Any]) -> Iterator["subprocess.Popen[str]"]:
    """Start a process that predicts once for each line that it reads."""
    process = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.deployed", way, json.dumps(settings)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with process:
        yield process
        process.stdin.close()


def predict(process: "subprocess.Popen[str]") -> dict[str, float]:
    print(file=process.stdin, flush=True)
    answer: dict[str, float] = json.loads(process.stdout.readline())
    return answer


def with_torch(settings: dict[str, Any]) -> Callable[[], Any]:
    import torch

    from batchformer_panoptic import prepare_for_inference

    _, model, inputs = make_model(settings)
    fast = prepare_for_inference(model)
    del model

    def predict_once() -> Any:
        with torch.inference_mode():
            return fast(inputs)[0]["panoptic_seg"][0].numpy()

    return predict_once


def with_onnx(settings: dict[str, Any]) -> Callable[[], Any]:
    import onnxruntime

    folder = Path(settings["folder"])
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(folder / "model.onnx", options)
    image = np.load(folder / "image.npy").astype(np.float32)
    sizes = np.array([image.shape[1:]], np.int64)
    feeds = {
        "images": image[None],
        "image_sizes": sizes,
        "output_sizes": sizes,
        "score_threshold": np.load(folder / "threshold.npy"),
    }
    return lambda: session.run(["segment_map"], feeds)[0][0]


def serve(way: str, settings: dict[str, Any]) -> None:
    predict_once = {"torch": with_torch, "onnx": with_onnx}[way](settings)
    for _ in sys.stdin:
        start = time.perf_counter()
        segment_map = predict_once()
        seconds = time.perf_counter() - start
        np.save(Path(settings["folder"], f"{way}.npy"), segment_map)
        print(json.dumps({"seconds": seconds, "peak_bytes": peak_of_process()}), flush=True)


def peak_of_process() -> int:
    """Peak bytes of this process; `getrusage` would count those of the process that started it."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    (line,) = [line for line in status.splitlines() if line.startswith("VmHWM:")]
    return 1024 * int(line.split()[1])


def table(result: dict[str, Any]) -> str:
    height, width = result["size"]
    rows = [
        [
            MODELS[row["model"]],
            f"{row['ratio']:.2f}",
            f"{row['peak_gigabytes']['onnx']:.1f} / {row['peak_gigabytes']['torch']:.1f}",
            f"{row['pixels_that_differ']} of {row['pixels']}",
        ]
        for row in result["rows"]
    ]
    header = [
        f"one image of {height} x {width}, {result['kept']} queries kept",
        "time of ONNX Runtime ÷ time of the model",
        "peak memory of the process, ONNX Runtime / model (GB)",
        "pixels of another segment",
    ]
    return tabulate(rows, header, tablefmt="github", disable_numparse=True)


def how_taken(result: dict[str, Any]) -> str:
    return f"medians of {result['rounds']} rounds, one thread each."


if __name__ == "__main__":
    serve(sys.argv[1], json.loads(sys.argv[2]))
