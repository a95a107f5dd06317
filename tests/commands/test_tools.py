"""The commands of tools/ that draw and analyse, through their main."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from batchformer_panoptic.visualization import ERROR_ENTRIES
from helpers.commands import load_script
from helpers.tiny_dataset import TinyPanopticDataset
from helpers.tiny_model import MASK2FORMER
from helpers.trained_files import Run, file_names, write_run

visualize_predictions = load_script("tools/visualize_predictions.py")
visualize_data = load_script("tools/visualize_data.py")
analyze_model = load_script("tools/analyze_model.py")

PANEL = (384, 512)  # of an image of 48x64 pixels


def panels(path: Path, count: int) -> list[np.ndarray]:
    """The panels of a row of 48x64 images: 8 pixels on both sides of each, titles of 34 pixels.

    Below them is a legend of one line.
    """
    row = np.asarray(Image.open(path)).astype(int)
    assert row.shape == (PANEL[0] + 34 + 8 + 32, count * (PANEL[1] + 16), 3)
    starts = [8 + index * (PANEL[1] + 16) for index in range(count)]
    return [row[34 : 34 + PANEL[0], start : start + PANEL[1]] for start in starts]


def test_predictions_stand_beside_input_and_ground_truth(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--config-file", str(run.config_file), "--num", "9", "--output", str(tmp_path)]
    assert visualize_predictions.main([*arguments, *run.opts]) == 0
    assert file_names(tmp_path) == [f"{k:03d}_{k:03d}.png" for k in range(5)] + ["overview.png"]
    image, truth, prediction, errors = panels(tmp_path / "000_000.png", 4)
    # Row 3 of the image is sky, far from its label and from the things.
    sky = truth[24:30, 400:440].reshape(-1, 3).mean(0)
    gray = image[24:30, 400:440].reshape(-1, 3).mean()
    expected = 0.5 * np.array(run.table.colors[3]) + 0.5 * gray
    np.testing.assert_allclose(sky, expected, atol=25)
    assert abs(prediction - image).mean() > 5
    assert abs(prediction - truth).mean() > 5
    colors = np.array([color for _, color in ERROR_ENTRIES])
    # A random model finds ground only: the sky is a wrong class, and the things are missed.
    for color in colors[[0, 2]]:
        assert (abs(errors - image - 0.7 * (color - image)).max(axis=-1) < 40).mean() > 0.01
    assert capsys.readouterr().out.splitlines()[-1].endswith(f"are in {tmp_path}")


def test_a_model_without_boxes_is_drawn_and_analysed(
    tiny_panoptic_dataset: TinyPanopticDataset,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    overrides = MASK2FORMER | {"MODEL__PANOPTIC__SEMANTIC_TEST": True}
    run = write_run(tmp_path / "run", tiny_panoptic_dataset, **overrides)
    config = ["--config-file", str(run.config_file)]
    arguments = [*config, "--num", "2", "--output", str(tmp_path / "drawn")]
    assert visualize_predictions.main([*arguments, *run.opts]) == 0
    assert len(file_names(tmp_path / "drawn")) == 3
    tasks = ["flop", "parameter", "activation", "structure", "speed"]
    assert analyze_model.main([*config, "--num-inputs", "1", "--tasks", *tasks, *run.opts]) == 0
    out = capsys.readouterr().out
    assert "scaled_dot_product_attention" in section(out, "flop")
    assert "transformer.pixel_decoder" in section(out, "parameter")
    assert float(re.search(r"total (\S+) .*activations", section(out, "activation"))[1]) > 0


def test_the_seed_decides_which_images_are_drawn(run: Run, tmp_path: Path) -> None:
    chosen = set()
    for seed in range(4):
        for repetition in range(2):
            out = tmp_path / f"{seed}_{repetition}"
            arguments = ["--config-file", str(run.config_file), "--num", "1", "--output", str(out)]
            assert visualize_predictions.main([*arguments, "--seed", str(seed), *run.opts]) == 0
        assert file_names(tmp_path / f"{seed}_0") == file_names(tmp_path / f"{seed}_1")
        chosen.add(file_names(tmp_path / f"{seed}_0")[0])
    assert len(chosen) > 1


@pytest.mark.parametrize("source", ["annotation", "dataloader"])
def test_data_are_drawn_as_annotated_and_as_augmented(
    run: Run, tmp_path: Path, source: str
) -> None:
    arguments = ["--config-file", str(run.config_file), "--source", source, "--num", "5"]
    opts = ["--opts", "INPUT.RANDOM_FLIP", "none"]
    assert visualize_data.main([*arguments, "--output", str(tmp_path), *opts]) == 0
    assert file_names(tmp_path) == [f"{k:03d}_{k:03d}.png" for k in range(5)] + ["overview.png"]
    image, drawn = panels(tmp_path / "000_000.png", 2)
    sky = drawn[24:30, 400:440].reshape(-1, 3).mean(0)
    gray = image[24:30, 400:440].reshape(-1, 3).mean()
    np.testing.assert_allclose(sky, 0.5 * np.array(run.table.colors[3]) + 0.5 * gray, atol=25)


def test_augmentation_is_drawn(run: Run, tmp_path: Path) -> None:
    arguments = ["--config-file", str(run.config_file), "--source", "dataloader", "--num", "5"]
    opts = ["--opts", "INPUT.MIN_SIZE_TRAIN", "[24]"]
    assert visualize_data.main([*arguments, "--output", str(tmp_path / "a"), *opts]) == 0
    assert visualize_data.main([*arguments, "--output", str(tmp_path / "b")]) == 0
    coarse, fine = (np.asarray(Image.open(tmp_path / k / "000_000.png")) for k in "ab")
    assert coarse.shape == fine.shape
    assert (coarse != fine).mean() > 0.1


def section(out: str, task: str) -> str:
    return out.split(f"== {task} ==")[1].split("\n== ")[0]


def test_all_analyses_run(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    tasks = ["flop", "parameter", "activation", "structure", "speed"]
    arguments = ["--config-file", str(run.config_file), "--tasks", *tasks, "--num-inputs", "2"]
    assert analyze_model.main([*arguments, *run.opts]) == 0
    out = capsys.readouterr().out
    assert f"note: weights are those of {run.weights}" in out
    assert "note: 2 images of " in out
    assert float(re.search(r"total (\S+) .*G multiply-adds", section(out, "flop"))[1]) > 0
    assert "scaled_dot_product_attention" in section(out, "flop")
    assert "scaled_dot_product_attention" not in out.split("not counted:")[1].splitlines()[0]
    model = analyze_model.build_model(filled(run))
    expected = sum(parameter.numel() for parameter in model.parameters())
    assert f"total {expected / 1e6:.3f} million parameters" in section(out, "parameter")
    assert float(re.search(r"total (\S+) .*activations", section(out, "activation"))[1]) > 0
    assert section(out, "structure").strip().startswith("PanopticDETR(")
    assert re.search(r"median \d+\.\d+ s an image over 2 images", section(out, "speed"))


def filled(run: Run):
    cfg = run.cfg.clone()
    assert analyze_model.fill_classes(cfg) == []
    return cfg


def test_fused_attention_is_counted_by_its_two_products() -> None:
    class Attention(nn.Module):
        def forward(self, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
            return nn.functional.scaled_dot_product_attention(query, key, key)

    query, key = torch.rand(2, 3, 5, 4), torch.rand(2, 3, 7, 4)
    analysis = analyze_model.flop_analysis(Attention().eval(), (query, key))
    assert analysis.total() == 2 * (2 * 3 * 5 * 7 * 4)


def test_a_model_is_analysed_without_data_and_weights(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    row = "[['nowhere_val','/nowhere','/nowhere','/nowhere.json']]"
    opts = ["--opts", "DATASETS.CUSTOM_PANOPTIC", row, "DATASETS.TEST", "('nowhere_val',)"]
    opts += ["DATASETS.TRAIN", "()", "INPUT.MIN_SIZE_TEST", "48"]
    arguments = ["--config-file", str(run.config_file), "--num-inputs", "1", "--tasks", "speed"]
    assert analyze_model.main([*arguments, *opts, "MODEL.DETR.NUM_CLASSES", "4"]) == 0
    out = capsys.readouterr().out
    assert "weights are random" in out
    assert "1 random images, 48x64 pixels" in out
    assert analyze_model.main([*arguments, *opts]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert len([line for line in errors if line.startswith("error:")]) == 1
    assert "MODEL.DETR.NUM_CLASSES N" in errors[-1]


@pytest.mark.parametrize(
    ("script", "arguments"),
    [
        (visualize_predictions, ["--num", "1", "--output", "{tmp}"]),
        (visualize_data, ["--num", "1", "--output", "{tmp}"]),
        (analyze_model, ["--tasks", "structure"]),
    ],
)
def test_mistakes_get_one_line(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str], script, arguments: list[str]
) -> None:
    filled_in = [argument.format(tmp=tmp_path) for argument in arguments]
    config = ["--config-file", str(run.config_file)]
    cases = {
        "absent.yaml does not exist": ["--config-file", "absent.yaml", *filled_in],
        "unknown config key MODEL.NONE": [*config, *filled_in, "--opts", "MODEL.NONE", "1"],
    }
    if script is not analyze_model:
        cases["unknown data set 'absent'"] = [*config, *filled_in, "--dataset", "absent"]
    if script is visualize_predictions:
        cases["MODEL.WEIGHTS is empty"] = [*config, *filled_in]
    for message, argv in cases.items():
        assert script.main(argv) == 2
        errors = capsys.readouterr().err.splitlines()
        assert errors, message
        assert message in errors[-1]
        assert len([line for line in errors if "error:" in line]) == 1
