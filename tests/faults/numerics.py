"""Values that are not finite, changed bits, and objects that a model cannot learn or find."""

import io
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file

from batchformer_panoptic.data import register_panoptic_dataset
from batchformer_panoptic.engine import PanopticTrainer
from helpers.instance_files import content as boxes
from helpers.instance_files import write_instances
from helpers.run_faults import Place, RunFault
from helpers.tiny_dataset import TinyPanopticDataset, forget_dataset

NAN = float("nan")
PERSON = "box_head.class_embed.bias"


# Gradients and weights of a training.


def _train(place: Place, *options: object, **overrides: Any) -> Path:
    """Train for up to three iterations with a checkpoint after each; return OUTPUT_DIR."""
    defaults = {"SOLVER__IMS_PER_BATCH": 2, "SOLVER__MAX_ITER": 3, "SOLVER__CHECKPOINT_PERIOD": 1}
    defaults |= {"DATALOADER__NUM_WORKERS": 0, "SOLVER__WARMUP_ITERS": 0, "SEED": 1}
    defaults |= {"MODEL__DETR__NUM_OBJECT_QUERIES": 8}
    run = place.trained(**{**defaults, **overrides})
    output = place.folder / "out"
    place.command("train_net.py", "--config-file", run.config_file, "OUTPUT_DIR", output, *options)
    return output


def _with_gradient(
    place: Place, iteration: int, spoil: Callable[[Any], Any], parts: int = 1
) -> None:
    """Change the gradient of one weight in one iteration, and the statistics of a batch norm."""
    build_model = PanopticTrainer.build_model.__func__  # type: ignore[attr-defined]
    calls = []

    def build(cls: Any, cfg: Any) -> Any:
        model = build_model(cls, cfg)

        def change(gradient: Any) -> Any:
            calls.append(0)
            return spoil(gradient) if len(calls) == parts * (iteration + 1) else gradient

        model.box_head.class_embed.weight.register_hook(change)
        return model

    place.monkeypatch.setattr(PanopticTrainer, "build_model", classmethod(build))


def _read(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = torch.load(path, weights_only=True)
    return content


def _assert_state_kept(output: Path, iteration: int, batches: int = 1) -> None:
    """The saved state is the one of the checkpoint after the iteration before, to the last bit."""
    kept, before = (
        _read(output / "model_nonfinite.pth"),
        _read(output / f"model_{iteration:07d}.pth"),
    )
    assert kept["iteration"] == before["iteration"] == iteration
    # The forward pass of the failed iteration has counted one more.
    counter = "backbone.stem.conv1.norm.num_batches_tracked"
    assert before["model"][counter] == (iteration + 1) * batches
    for name, value in before["model"].items():
        assert torch.equal(kept["model"][name], value), name
    kept_states, states = kept["trainer"]["_trainer"]["optimizer"], before["trainer"]["_trainer"]
    for key, moments in states["optimizer"]["state"].items():
        assert torch.equal(kept_states["state"][key]["exp_avg"], moments["exp_avg"])
    assert (output / "last_checkpoint").read_text() == f"model_{iteration:07d}.pth"


def _nan_gradient(place: Place) -> None:
    _with_gradient(place, 1, lambda gradient: gradient * NAN)
    output = _train(place)
    assert "at iteration 1: its norm is nan; images of the batch: 10" in place.words
    _assert_state_kept(output, 0)
    place.monkeypatch.undo()
    # What the message advises: the run goes on from before the failure.
    status, words = place.status, place.words
    arguments = ["--config-file", place.folder / "run/config.yaml", "--resume"]
    assert place.command("train_net.py", *arguments, "OUTPUT_DIR", output) == 0
    assert (output / "model_final.pth").is_file()
    place.status, place.words = status, words


def _nan_gradient_in_the_last_step(place: Place) -> None:
    _with_gradient(place, 2, lambda gradient: gradient * NAN)
    output = _train(place)
    _assert_state_kept(output, 1)
    assert not (output / "model_final.pth").exists()
    assert not (output / "inference").exists()


def _nan_gradient_in_the_first_step(place: Place) -> None:
    _with_gradient(place, 0, lambda gradient: gradient * NAN)
    output = _train(place)
    assert _read(output / "model_nonfinite.pth")["iteration"] == -1
    assert not (output / "last_checkpoint").exists()


def _infinite_norm(place: Place) -> None:
    _with_gradient(place, 1, lambda gradient: torch.full_like(gradient, 1e30))
    output = _train(place)
    assert "its norm is inf" in place.words
    _assert_state_kept(output, 0)


def _infinite_gradient_in_bfloat16(place: Place) -> None:
    _with_gradient(place, 1, lambda gradient: gradient / 0)
    output = _train(place, SOLVER__AMP__ENABLED=True)
    _assert_state_kept(output, 0)


def _infinite_gradient_without_clipping(place: Place) -> None:
    _with_gradient(place, 1, lambda gradient: gradient / 0)
    output = _train(place, SOLVER__CLIP_GRADIENTS__ENABLED=False)
    _assert_state_kept(output, 0)


def _nan_gradient_of_several_batches(place: Place) -> None:
    _with_gradient(place, 1, lambda gradient: gradient * NAN, parts=2)
    output = _train(place, SOLVER__GRADIENT_ACCUMULATION=2)
    assert place.words.count(".jpg)") + place.words.count(".png)") == 4
    _assert_state_kept(output, 0, batches=2)


def _learning_rate_of_infinity(place: Place) -> None:
    output = _train(place, SOLVER__BASE_LR=1e38, SOLVER__MAX_ITER=1)
    assert not list(output.glob("*.pth"))
    assert not (output / "last_checkpoint").exists()
    assert not (output / "inference").exists()


def _weights_spoiled_between_checkpoints(place: Place) -> None:
    output = _train(place, SOLVER__BASE_LR=1e38, SOLVER__CHECKPOINT_PERIOD=10)
    assert "images of the batch" not in place.words
    assert "an earlier iteration has spoiled" in place.words
    assert not list(output.glob("*.pth"))


# Weights in files.


def _spoiled_weights(place: Place, value: float = NAN) -> list[object]:
    run = place.trained()
    content = _read(run.weights)
    content["model"][PERSON][0] = value
    torch.save(content, run.weights)
    return ["--config-file", run.config_file, "--opts", "OUTPUT_DIR", place.folder / "out"]


def _evaluated(place: Place) -> None:
    arguments = _spoiled_weights(place)
    weights = place.folder / "run/model_final.pth"
    place.command("train_net.py", "--eval-only", *arguments, "MODEL.WEIGHTS", weights)
    assert PERSON in place.words, place.words
    assert not (place.folder / "out/inference").exists()


def _scores_of_large_weights(place: Place) -> None:
    arguments = _spoiled_weights(place, 0.0)
    weights = place.folder / "run/model_final.pth"
    content = _read(weights)
    for value in content["model"].values():
        if value.dim() > 1:
            value.fill_(1e38)
    torch.save(content, weights)
    place.command("train_net.py", "--eval-only", *arguments, "MODEL.WEIGHTS", weights)
    assert not list((place.folder / "out").glob("inference/*/*results*"))
    assert not (place.folder / "out/report.html").exists()


def _infinite_weights_trained_on(place: Place) -> None:
    arguments = _spoiled_weights(place, float("inf"))
    place.command("train_net.py", *arguments, "MODEL.WEIGHTS", place.folder / "run/model_final.pth")
    assert not list((place.folder / "out").glob("*.pth"))


def _start_of_other_classes(place: Place) -> None:
    arguments = _spoiled_weights(place)
    weights = place.folder / "run/model_final.pth"
    place.command("train_net.py", "--init-from", weights, *arguments)
    assert not list((place.folder / "out").glob("*.pth"))


def _of_safetensors(place: Place) -> None:
    arguments = _spoiled_weights(place)
    weights = place.folder / "run/weights.safetensors"
    save_file(_read(place.folder / "run/model_final.pth")["model"], weights)
    place.command("train_net.py", "--eval-only", *arguments, "MODEL.WEIGHTS", weights)
    assert PERSON in place.words, place.words


def _predicted(place: Place, script: str, *first: object) -> None:
    _spoiled_weights(place)
    config, weights = place.folder / "run/config.yaml", place.folder / "run/model_final.pth"
    options = ["--output", place.folder / "out", "--opts", "MODEL.WEIGHTS", weights]
    place.command(script, "--config-file", config, *first, place.dataset.image_root, *options)
    assert PERSON in place.words, place.words
    assert not list((place.folder / "out").glob("**/*.png"))


def _drawn(place: Place) -> None:
    _predicted(place, "demo/demo.py", "--input")


def _predicted_to_files(place: Place) -> None:
    _predicted(place, "tools/predict.py", "--input")


def _resumed(place: Place, spoil: Callable[[Path], None]) -> None:
    """Resume from a checkpoint that was changed; the checkpoint stays as it is."""
    output = _train(place, SOLVER__MAX_ITER=1)
    assert place.status == 0, place.words
    last = output / (output / "last_checkpoint").read_text()
    for path in set(output.glob("*.pth")) - {last}:  # or else the run would continue from it
        path.unlink()
    spoil(last)
    before = {path: path.read_bytes() for path in output.glob("*.pth")}
    arguments = ["--config-file", place.folder / "run/config.yaml", "--resume"]
    place.command("train_net.py", *arguments, "OUTPUT_DIR", output, "SOLVER.MAX_ITER", 2)
    assert {path: path.read_bytes() for path in output.glob("*.pth")} == before


def _nan_in_the_optimizer(path: Path) -> None:
    content = _read(path)
    content["trainer"]["_trainer"]["optimizer"]["state"][0]["exp_avg_sq"].fill_(NAN)
    torch.save(content, path)


def _flip(path: Path, share: float) -> None:
    """Flip one bit at a share of the file's length."""
    data = bytearray(path.read_bytes())
    data[int(share * len(data))] ^= 16
    path.write_bytes(data)


def _flipped(place: Place, script: str, *arguments: object) -> None:
    run = place.trained()
    weights = run.weights.read_bytes()
    stored = _read(run.weights)["model"][PERSON].numpy().tobytes()
    position = weights.index(stored)
    run.weights.write_bytes(weights[:position] + b"\1" + weights[position + 1 :])
    place.command(script, *arguments)
    assert "is damaged" in place.words


def _flipped_evaluated(place: Place) -> None:
    config, weights = place.folder / "run/config.yaml", place.folder / "run/model_final.pth"
    options = ["--eval-only", "OUTPUT_DIR", place.folder / "out", "MODEL.WEIGHTS", weights]
    _flipped(place, "train_net.py", "--config-file", config, *options)
    assert not (place.folder / "out/inference").exists()


def _flipped_exported(place: Place) -> None:
    source, target = place.folder / "run/model_final.pth", place.folder / "official.pth"
    config = place.folder / "run/config.yaml"
    options = [source, target, "--format", "official", "--config-file", config]
    _flipped(place, "tools/export_checkpoint.py", *options)
    assert not target.exists()


# Images.


def _damaged(place: Place, name: str, damage: Callable[[bytes], bytes]) -> None:
    """Train on a set with a damaged file; DATASETS.CHECK would find it before the training."""
    root = place.folder / "set"
    shutil.copytree(place.dataset.panoptic_json.parent, root)
    forget_dataset("damaged")
    folders = root / "images", root / "png", root / "panoptic.json"
    place.dataset = TinyPanopticDataset("damaged", *folders)
    register_panoptic_dataset(*place.dataset.row)
    path = root / name
    path.write_bytes(damage(path.read_bytes()))
    output = _train(place, "DATASETS.CHECK", False, SOLVER__MAX_ITER=10)
    assert path.name in place.words, place.words
    assert not (output / "model_final.pth").exists()
    # Most reasons depend on the version of Pillow.
    place.words = re.sub("cannot be read: (?!it is).*", "cannot be read: (reason)", place.words)


def _zeros_at_the_end(data: bytes) -> bytes:
    return data[: len(data) // 2] + bytes(len(data) - len(data) // 2)


def _photograph_with_zeros(place: Place) -> None:
    _damaged(place, "images/000.png", _zeros_at_the_end)


def _panoptic_png_with_zeros(place: Place) -> None:
    _damaged(place, "png/000.png", _zeros_at_the_end)


def _cut_jpeg(place: Place) -> None:
    _damaged(place, "images/001.jpg", lambda data: data[: len(data) // 2])


def _cut_gif(place: Place) -> None:
    def cut(data: bytes) -> bytes:
        gif = io.BytesIO()
        Image.open(io.BytesIO(data)).quantize().save(gif, format="GIF")
        return gif.getvalue()[:-900]

    _damaged(place, "images/000.png", cut)


# Objects.


def _box_command(place: Place, annotations: list[dict[str, Any]], *options: object) -> Path:
    """Train on boxes; return OUTPUT_DIR."""
    files = write_instances(place.folder / "set", annotations=annotations)
    forget_dataset("boxes")
    row = files.row("boxes")
    rows = json.dumps([row])
    names = ["DATASETS.CUSTOM_INSTANCES", rows, "DATASETS.TRAIN", row[0], "DATASETS.TEST", row[0]]
    return _train(place, *names, *options, SOLVER__MAX_ITER=1, MODEL__MASK_ON=False)


def _polygons(place: Place) -> None:
    annotations = [{**box, "segmentation": [[1, 2, 3, 4]]} for box in boxes()["annotations"]]
    output = _box_command(place, annotations)
    _keep_warning(place, output, "boxes: bad segmentation (6)")
    assert (output / "model_final.pth").is_file()


def _no_target(place: Place) -> None:
    crowds = [{**box, "iscrowd": 1} for box in boxes()["annotations"]]
    output = _box_command(place, crowds)
    assert not list(output.glob("*.pth"))


def _no_target_unchecked(place: Place) -> None:
    output = _box_command(place, [], "DATASETS.CHECK", False)
    assert not list(output.glob("*.pth"))


def _filtered_to_nothing(place: Place) -> None:
    output = _box_command(
        place, [], "DATASETS.CHECK", False, "DATALOADER.FILTER_EMPTY_ANNOTATIONS", True
    )
    assert not list(output.glob("*.pth"))


def _many(count: int) -> list[dict[str, Any]]:
    first = boxes()["annotations"][0]
    generator = np.random.default_rng(0)
    corners = generator.integers(0, 30, (count, 2)).tolist()
    return [{**first, "id": k + 1, "bbox": [*corner, 8, 8]} for k, corner in enumerate(corners)]


def _more_than_queries(place: Place) -> None:
    output = _box_command(place, _many(12))
    said = "1 of 3 images have more objects (up to 12, in 0.png) than the model has queries"
    _keep_warning(place, output, said)


def _more_than_detections(place: Place) -> None:
    output = _box_command(place, _many(12), "TEST.DETECTIONS_PER_IMAGE", 9)
    said = "than TEST.DETECTIONS_PER_IMAGE 9; AP then counts at most 75.0 % of the objects"
    _keep_warning(place, output, said)


def _keep_warning(place: Place, output: Path, part: str) -> None:
    """Take a line of the log for the words of the command."""
    (line,) = {line for line in (output / "log.txt").read_text().splitlines() if part in line}
    place.words = f"warning: {line.partition('WARNING: ')[2]}"


def _ignored_annotation(place: Place) -> None:
    annotations = boxes()["annotations"]
    annotations[0]["ignore"] = 1
    assert not list(_box_command(place, annotations).glob("*.pth"))


def _text_for_a_number(place: Place) -> None:
    annotations = boxes()["annotations"]
    annotations[1]["bbox"][2] = "14"
    output = _box_command(place, annotations, "DATASETS.CHECK", False)
    assert not list(output.glob("*.pth"))


TRAIN, RESUME, EVALUATE = (f"`train_net.py{words}`" for words in ("", " --resume", " --eval-only"))
KEPT = (
    "`model_nonfinite.pth` has the state before the iteration, statistics of batch norms included"
)
KEPT += "; `last_checkpoint` is untouched"
NOTHING = "nothing is written"
REFUSED = "the checkpoint is unchanged, and nothing is trained"

FAULTS = [
    RunFault("a gradient is NaN", TRAIN, f"{KEPT}; `--resume` trains on", _nan_gradient),
    RunFault(
        "a gradient is NaN in the last iteration",
        TRAIN,
        f"{KEPT}; no `model_final.pth`, no evaluation",
        _nan_gradient_in_the_last_step,
    ),
    RunFault(
        "a gradient is NaN in the first iteration",
        TRAIN,
        "`model_nonfinite.pth` has the initial state; no `last_checkpoint`",
        _nan_gradient_in_the_first_step,
    ),
    RunFault("the gradient's norm overflows", TRAIN, KEPT, _infinite_norm),
    RunFault("a gradient is infinite, in bfloat16", TRAIN, KEPT, _infinite_gradient_in_bfloat16),
    RunFault(
        "a gradient is infinite, without clipping",
        TRAIN,
        KEPT,
        _infinite_gradient_without_clipping,
    ),
    RunFault(
        "a gradient is NaN in one of two accumulated batches",
        TRAIN,
        f"{KEPT}; the images of both batches are named",
        _nan_gradient_of_several_batches,
    ),
    RunFault(
        "a learning rate of 1e38 in the last iteration",
        TRAIN,
        "no weights are written, nothing is evaluated",
        _learning_rate_of_infinity,
    ),
    RunFault(
        "a learning rate of 1e38, noticed one iteration later",
        TRAIN,
        "no weights are written, no images are blamed",
        _weights_spoiled_between_checkpoints,
    ),
    RunFault("NaN in `MODEL.WEIGHTS`", EVALUATE, NOTHING, _evaluated),
    RunFault(
        "weights of 1e38, whose scores are not finite",
        EVALUATE,
        "there are no results",
        _scores_of_large_weights,
    ),
    RunFault("an infinity in `MODEL.WEIGHTS`", TRAIN, NOTHING, _infinite_weights_trained_on),
    RunFault("NaN in `.safetensors`", EVALUATE, NOTHING, _of_safetensors),
    RunFault(
        "NaN in the file of `--init-from`",
        "`train_net.py --init-from`",
        NOTHING,
        _start_of_other_classes,
    ),
    RunFault("NaN in the weights that draw", "`demo/demo.py`", NOTHING, _drawn),
    RunFault("NaN in the weights that predict", "`tools/predict.py`", NOTHING, _predicted_to_files),
    RunFault(
        "NaN in the last checkpoint's optimizer",
        RESUME,
        REFUSED,
        lambda place: _resumed(place, _nan_in_the_optimizer),
    ),
    RunFault(
        "a bit of the last checkpoint flipped",
        RESUME,
        REFUSED,
        lambda place: _resumed(place, lambda path: _flip(path, 0.5)),
    ),
    RunFault("a byte of the weights changed", EVALUATE, NOTHING, _flipped_evaluated),
    RunFault(
        "a byte changed in the weights to export",
        "`tools/export_checkpoint.py`",
        NOTHING,
        _flipped_exported,
    ),
    RunFault("the second half of a PNG is zeros", TRAIN, NOTHING, _photograph_with_zeros),
    RunFault(
        "the second half of a panoptic PNG is zeros", TRAIN, NOTHING, _panoptic_png_with_zeros
    ),
    RunFault("a JPEG is cut off", TRAIN, NOTHING, _cut_jpeg),
    RunFault("a GIF is cut off", TRAIN, NOTHING, _cut_gif),
    RunFault(
        "polygons of two points",
        TRAIN,
        "a warning with their number; the boxes are trained on as they are evaluated",
        _polygons,
        status=0,
    ),
    RunFault("only crowds in a set of boxes", TRAIN, NOTHING, _no_target),
    RunFault("no boxes, and `DATASETS.CHECK` is False", TRAIN, NOTHING, _no_target_unchecked),
    RunFault("`FILTER_EMPTY_ANNOTATIONS` leaves no image", TRAIN, NOTHING, _filtered_to_nothing),
    RunFault(
        "12 objects for 8 queries",
        TRAIN,
        "a warning with the numbers and the image",
        _more_than_queries,
        status=0,
    ),
    RunFault(
        "12 objects for 9 detections",
        TRAIN,
        "a warning with the numbers and the highest AP",
        _more_than_detections,
        status=0,
    ),
    RunFault("`ignore` in an annotation", TRAIN, NOTHING, _ignored_annotation),
    RunFault("a text in a box", TRAIN, NOTHING, _text_for_a_number),
]
