"""tools/compare_merges.py, through its main."""

import json
from pathlib import Path

import pytest
import torch
from detectron2.evaluation import inference_on_dataset

from batchformer_panoptic.data import build_test_loader, setup_datasets
from batchformer_panoptic.engine.predictor import Predictor
from batchformer_panoptic.evaluation import PanopticEvaluator
from batchformer_panoptic.modeling.postprocessing.panoptic import MERGES
from helpers.commands import load_script
from helpers.panoptic_sets import SavingEvaluator
from helpers.tiny_dataset import TinyPanopticDataset
from helpers.trained_files import Run, write_run

compare_merges = load_script("tools/compare_merges.py")


@pytest.fixture(scope="module")
def run(
    tmp_path_factory: pytest.TempPathFactory, tiny_panoptic_dataset: TinyPanopticDataset
) -> Run:
    """A random model, and a data set whose truth is what it predicts with the default merge."""
    folder = tmp_path_factory.mktemp("merges")
    run = write_run(folder, tiny_panoptic_dataset)
    state = torch.load(run.weights, weights_only=True)
    state["model"]["box_head.class_embed.bias"][0] += 9  # every query a thing of its own
    torch.save(state, run.weights)
    evaluate(run, "strongest", folder / "panoptic_predictions")
    content = json.loads(tiny_panoptic_dataset.panoptic_json.read_text())
    predictions = json.loads((folder / "panoptic_predictions.json").read_text())
    content["annotations"] = predictions["annotations"]
    truth = folder / "truth.json"
    truth.write_text(json.dumps(content))
    cfg = run.cfg.clone()
    name = f"{tiny_panoptic_dataset.name}_predicted"
    images = str(tiny_panoptic_dataset.image_root)
    cfg.DATASETS.CUSTOM_PANOPTIC = [
        tiny_panoptic_dataset.row,
        [name, images, str(folder / "panoptic_predictions"), str(truth)],
    ]
    cfg.DATASETS.TEST = (name,)
    run.config_file.write_text(cfg.dump())
    return run._replace(cfg=cfg)


def evaluate(
    run: Run, merge: str, folder: Path | None = None, batch_size: int = 1
) -> dict[str, float]:
    """Results of evaluation with MODEL.PANOPTIC.MERGE_TEST set to the merge."""
    cfg = run.cfg.clone()
    cfg.TEST.IMS_PER_BATCH = batch_size
    cfg.MODEL.PANOPTIC.MERGE_TEST, cfg.MODEL.WEIGHTS = merge, str(run.weights)
    setup_datasets(cfg)
    name = cfg.DATASETS.TEST[0]
    evaluator = PanopticEvaluator(name) if folder is None else SavingEvaluator(name, folder)
    loader = build_test_loader(cfg, name)
    return inference_on_dataset(Predictor(cfg).model, loader, evaluator)["panoptic_seg"]


def rows(out: str) -> dict[str, list[str]]:
    cells = [line.strip("|").split("|") for line in out.splitlines() if line.startswith("|")]
    return {row[0].strip(): [cell.strip() for cell in row[1:]] for row in cells}


@pytest.mark.parametrize("batch_size", [1, 4])
def test_the_table_holds_what_evaluation_with_each_merge_gives(
    run: Run, capsys: pytest.CaptureFixture[str], batch_size: int
) -> None:
    arguments = ["--config-file", str(run.config_file), *run.opts]
    arguments += ["TEST.IMS_PER_BATCH", str(batch_size)]
    assert compare_merges.main(arguments) == 0
    found = rows(capsys.readouterr().out)
    assert list(found)[2:] == list(MERGES)
    for merge in MERGES:
        metrics = evaluate(run, merge, batch_size=batch_size)
        keys = found["merge"]
        assert found[merge] == [f"{metrics[key]:.2f}" if key in metrics else "n/a" for key in keys]
    assert float(found["strongest"][0]) > 99
    assert len({tuple(found[merge]) for merge in MERGES}) == len(MERGES)


def test_merges_and_data_set_are_chosen(
    run: Run, capsys: pytest.CaptureFixture[str], tiny_panoptic_dataset: TinyPanopticDataset
) -> None:
    arguments = ["--config-file", str(run.config_file), "--merges", "published"]
    arguments += ["--dataset", tiny_panoptic_dataset.name, *run.opts]
    assert compare_merges.main([*arguments, "MODEL.PANOPTIC.OVERLAP_THRESHOLD_TEST", "0.4"]) == 0
    out = capsys.readouterr().out
    assert list(rows(out))[2:] == ["published"]
    assert f"{tiny_panoptic_dataset.name}, SCORE_THRESHOLD_TEST 0.0" in out
    assert "OVERLAP_THRESHOLD_TEST 0.4" in out


def test_mistakes_get_one_line(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = ["--config-file", str(run.config_file)]
    cases = {
        "absent.yaml does not exist": ["--config-file", "absent.yaml"],
        "MODEL.WEIGHTS is empty": config,
        "unknown data set 'absent'": [*config, "--dataset", "absent"],
        "DATASETS.TEST is empty": [*config, "--opts", "DATASETS.TEST", "()"],
        "MODEL.MASK_ON is False": [*config, "--opts", "MODEL.MASK_ON", "False"],
        "MERGE_TEST is 'best'": [*config, *run.opts, "MODEL.PANOPTIC.MERGE_TEST", "best"],
    }
    for message, argv in cases.items():
        assert compare_merges.main(argv) == 2, message
        errors = capsys.readouterr().err.splitlines()
        assert message in errors[-1]
        assert len([line for line in errors if "error:" in line]) == 1
