"""Panoptic inference at full size: this project, all queries decoded, and transformers' DETR.

The model is that of configs/coco/panoptic (ResNet-50, 100 queries), with the same random weights in
all implementations, one image, and float32. The score threshold is set to keep --kept queries. All
results are compared in the same run.
"""

import argparse
import copy
import statistics
from functools import partial
from typing import Any

import torch
from detectron2.modeling import build_model
from tabulate import tabulate
from torch import Tensor
from torch.nn import functional as F

from batchformer_panoptic import PanopticDETR, prepare_for_inference
from batchformer_panoptic.checkpoint.conversion import Request, source_named
from batchformer_panoptic.engine import load_config
from batchformer_panoptic.engine.setup import at_least
from helpers.official_detr import official_weights

from . import ROOT
from .inference_ways import AllQueries, Case, Naive, Peer, predict, with_head
from .measure import in_turns, median_ratio, peak_bytes

CONFIGS = ROOT / "configs" / "coco" / "panoptic"
PLAIN, WITH_BLOCK = "detr_R50_joint_300ep.yaml", "batchformer_detr_R50_joint_300ep.yaml"
NUM_CLASSES, NUM_THINGS, HIDDEN_DIM = 250, 200, 256
SMALL = (256, 320)  # of the comparison in double precision
FAST, DEFAULT, ALL, NAIVE, PEER = "fast", "default", "all queries", "naive", "transformers"
NAMES = {
    FAST: "this project, `TEST.FAST.ENABLED True`",
    DEFAULT: "this project, default settings",
    ALL: "this project, masks of all 100 queries",
    NAIVE: "masks of all 100 queries, nothing shared among them, as published",
    PEER: "transformers' `DetrForSegmentation` and its post-processing",
}
OTHERS = [name for name in NAMES if name != FAST]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(rounds=3)
    parser.add_argument(
        "--size", type=at_least(1), nargs=2, default=[800, 1066], metavar=("HEIGHT", "WIDTH")
    )
    parser.add_argument("--kept", type=at_least(1), default=12, help="queries that become segments")
    parser.add_argument(
        "--against",
        nargs="+",
        choices=OTHERS,
        default=list(OTHERS),
        help="what the fast way is timed against; default: all",
    )


@torch.no_grad()
def run(args: argparse.Namespace) -> dict[str, Any]:
    case = make_case(PLAIN, args.size)
    threshold = keep_best(case, args.kept)
    ways = {
        FAST: partial(prepare_for_inference(case.model), case.inputs),
        DEFAULT: partial(case.model, case.inputs),
        ALL: partial(with_head(case.model, AllQueries), case.inputs),
        NAIVE: partial(with_head(case.model, Naive), case.inputs),
    }
    result = {"size": list(args.size), "kept": args.kept, "rounds": args.rounds}
    result |= compare_segments({name: way()[0]["panoptic_seg"] for name, way in ways.items()})
    check_in_double_precision(case.model)
    if PEER in args.against:
        ways[PEER] = peer = Peer(case, threshold, set(range(NUM_THINGS, NUM_CLASSES)))
        result["peer_difference"] = peer.largest_difference(case)
    times = in_turns({name: ways[name] for name in (FAST, *args.against)}, args.rounds)
    result["rows"] = [
        {
            "way": name,
            "seconds": statistics.median(seconds),
            "against_fast": median_ratio(seconds, times[FAST]),
            "peak_gigabytes": peak_bytes(ways[name]) / 1e9,
        }
        for name, seconds in times.items()
    ]
    ways.clear()
    return {**result, "with_block": cost_of_block(case, threshold, args)}


def make_case(config: str, size: list[int], state: dict[str, Tensor] | None = None) -> Case:
    """Build the model of a config with the weights ``state``, by default random ones."""
    opts = ["MODEL.DEVICE", "cpu", "MODEL.PANOPTIC.INSTANCES_TEST", "False"]
    cfg = load_config(str(CONFIGS / config), opts)
    cfg.MODEL.DETR.NUM_CLASSES = NUM_CLASSES
    cfg.MODEL.PANOPTIC.THING_CLASS_IDS = list(range(NUM_THINGS))
    torch.manual_seed(0)
    model = build_model(cfg).eval()
    if state is None:
        state = random_weights()
    missing = model.load_state_dict(state, strict=False).missing_keys
    assert all("batchformer" in name for name in missing), missing
    return Case(cfg, model, [random_input(*size)])


def random_weights() -> dict[str, Tensor]:
    """Random weights with which the attention and the masks of queries differ."""
    state = dict(source_named("detr").convert(official_weights(), Request()).model)
    for name, value in state.items():
        if "decoder" in name and "multihead_attn.in_proj_weight" in name:
            query_key, of_values = value.split([2 * value.shape[1], value.shape[1]])
            state[name] = torch.cat([2 * query_key, of_values])
        elif "decoder" in name and "multihead_attn.out_proj.weight" in name:
            state[name] = 10 * value
        elif name == "mask_head.attention.q_linear.weight":
            state[name] = 3 * value
        elif name == "mask_head.convs.0.weight":
            of_image, of_attention = value.split([HIDDEN_DIM, value.shape[1] - HIDDEN_DIM], dim=1)
            state[name] = torch.cat([of_image, 100 * of_attention], dim=1)
    return state


def random_input(height: int, width: int) -> dict[str, Any]:
    """An image of noise and blobs of the size of a token."""
    generator = torch.Generator().manual_seed(1)
    blobs = torch.randn(1, 3, height // 16, width // 16, generator=generator)
    blobs = F.interpolate(blobs, size=(height, width), mode="bilinear")[0]
    noise = 0.3 * torch.randn(blobs.shape, generator=generator)
    image = (128 + 60 * (blobs + noise)).clamp(0, 255).to(torch.uint8)
    return {"image": image, "height": height, "width": width}


def keep_best(case: Case, kept: int) -> float:
    """Set the score threshold between the last kept query and the next one."""
    predictions = predict(case)
    scores = case.model.scoring.decode(predictions.logits[-1]).scores[0].sort().values
    threshold = scores[-kept - 1 : -kept + 1 or None].mean().item()
    set_threshold(case.model, threshold)
    return threshold


def set_threshold(model: PanopticDETR, threshold: float) -> None:
    options = model.inference_options
    panoptic = options.panoptic._replace(score_threshold=threshold)
    model.inference_options = options._replace(panoptic=panoptic)


def compare_segments(results: dict[str, Any]) -> dict[str, Any]:
    """Assert equal segments; return the number of differing pixels, where masks nearly tie."""
    reference_map, reference = results[NAIVE]
    counts = {}
    for name, (segment_map, segments) in results.items():
        for key in ("id", "category_id", "isthing"):
            assert [s[key] for s in segments] == [s[key] for s in reference], (name, key)
        counts[name] = int((segment_map != reference_map).sum())
        assert counts[name] < 1e-3 * reference_map.numel(), counts
    return {
        "segments": len(reference),
        "pixels": reference_map.numel(),
        "pixels_that_differ": counts,
    }


def check_in_double_precision(model: PanopticDETR) -> None:
    """Assert that every pixel is equal in double precision, in which no masks tie."""
    model = copy.deepcopy(model).double()
    set_threshold(model, 0.0)
    inputs = [random_input(*SMALL)]
    segment_map, segments = with_head(model, Naive)(inputs)[0]["panoptic_seg"]
    fast_map, fast_segments = prepare_for_inference(model)(inputs)[0]["panoptic_seg"]
    assert torch.equal(segment_map, fast_map)
    assert [s["area"] for s in segments] == [s["area"] for s in fast_segments]
    assert len(segments) > 1


def cost_of_block(case: Case, threshold: float, args: argparse.Namespace) -> dict[str, float]:
    """Compare a model trained with the block with the same one without it: bit-equal results."""
    other = make_case(WITH_BLOCK, args.size, case.model.state_dict())
    set_threshold(other.model, threshold)
    ways = {
        name: partial(prepare_for_inference(model), case.inputs)
        for name, model in {"plain": case.model, "with_block": other.model}.items()
    }
    plain, with_block = (way()[0]["panoptic_seg"] for way in ways.values())
    assert torch.equal(plain[0], with_block[0])
    assert plain[1] == with_block[1]
    predictions = [predict(one) for one in (case, other)]
    assert torch.equal(predictions[0].logits, predictions[1].logits)
    assert torch.equal(predictions[0].boxes, predictions[1].boxes)
    times = in_turns(ways, max(args.rounds, 5))
    return {"time_ratio": median_ratio(times["with_block"], times["plain"])}


def table(result: dict[str, Any]) -> str:
    height, width = result["size"]
    header = [
        f"one image of {height} x {width}, {result['kept']} queries kept",
        "fast is … times as fast",
        "peak memory of tensors (GB)",
    ]
    rows = [
        [NAMES[row["way"]], f"{row['against_fast']:.2f}", f"{row['peak_gigabytes']:.1f}"]
        for row in result["rows"]
    ]
    ratio = f"{result['with_block']['time_ratio']:.2f} (time)"
    rows.append(["fast, trained with BatchFormerV2 ÷ without, results equal to the bit", ratio, ""])
    differ = result["pixels_that_differ"]
    words = (
        f"The same {result['segments']} segments everywhere. Of {result['pixels']} pixels, "
        f"{differ[FAST]} (fast) and {differ[DEFAULT]} (default) are assigned to another segment "
        "than with the naive head, where random masks nearly tie; none in double precision."
    )
    return f"{tabulate(rows, header, tablefmt='github', disable_numparse=True)}\n\n{words}"
