"""The report: the numbers of the evaluator, escaped text, one file that needs no other."""

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog

from batchformer_panoptic.config import add_batchformer_panoptic_config
from batchformer_panoptic.data import register_panoptic_dataset
from batchformer_panoptic.data.segment_maps import read_segment_map
from batchformer_panoptic.evaluation import PanopticEvaluator
from batchformer_panoptic.visualization import report as module
from batchformer_panoptic.visualization.report import write_report
from helpers.tiny_dataset import TinyPanopticDataset

STRANGE = "<b>box</b> & 'co'"


@pytest.fixture
def dataset(tmp_path: Path, tiny_panoptic_dataset: TinyPanopticDataset) -> str:
    """The tiny set with a class name that looks like HTML."""
    content = json.loads(tiny_panoptic_dataset.panoptic_json.read_text())
    next(row for row in content["categories"] if row["name"] == "box")["name"] = STRANGE
    renamed = tmp_path / "renamed.json"
    renamed.write_text(json.dumps(content))
    _, image_root, panoptic_root, _ = tiny_panoptic_dataset.row
    name = f"report_{tmp_path.name}"
    register_panoptic_dataset(name, image_root, panoptic_root, str(renamed))
    return name


def config(folder: Path, name: str) -> CfgNode:
    cfg = get_cfg()
    add_batchformer_panoptic_config(cfg)
    cfg.merge_from_list(["OUTPUT_DIR", str(folder), "SEED", 77, "MODEL.DEVICE", "cpu"])
    cfg.DATASETS.TRAIN = cfg.DATASETS.TEST = (name,)
    return cfg


def evaluate(folder: Path, name: str) -> dict[str, Any]:
    """Predict the truth with errors: boxes are called discs, and the first sky is lost."""
    dicts = DatasetCatalog.get(name)
    names = MetadataCatalog.get(name).thing_classes
    box, disc, sky = map(names.index, (STRANGE, "disc", "sky"))
    evaluator = PanopticEvaluator(name, str(folder / "inference" / name))
    for number, record in enumerate(dicts):
        segment_map = torch.from_numpy(read_segment_map(record["pan_seg_file_name"]))
        segments = [
            {**info, "category_id": disc if info["category_id"] == box else info["category_id"]}
            for info in record["segments_info"]
            if not (number == 0 and info["category_id"] == sky) and not info["iscrowd"]
        ]
        kept = torch.tensor([info["id"] for info in segments])
        segment_map[~torch.isin(segment_map, kept)] = 0
        evaluator.process([record], [{"panoptic_seg": (segment_map, segments)}])
    return dict(evaluator.evaluate())


def write_metrics(folder: Path) -> None:
    rows = [{"iteration": i, "total_loss": 9.0 - i, "lr": 1e-4} for i in range(8)]
    rows.append({"iteration": 7, "panoptic_seg/PQ": 12.5})
    (folder / "metrics.json").write_text("\n".join(map(json.dumps, rows)))


def table_after(page: str, title: str) -> list[list[str]]:
    """The cells of the table below a heading, without tags."""
    below = page[page.index(f">{title}<") :]
    rows = re.findall(r"<tr>(.*?)</tr>", below[: below.index("</table>")], re.DOTALL)
    cells = [re.findall(r"<t[dh][^>]*>(.*?)</t[dh]>", row, re.DOTALL) for row in rows]
    return [[re.sub(r"<[^>]*>", "", cell) for cell in row] for row in cells]


@pytest.fixture
def page(tmp_path: Path, dataset: str) -> str:
    folder = tmp_path / "run"
    results = {dataset: evaluate(folder, dataset)}
    write_metrics(folder)
    path = write_report(config(folder, dataset), results, weights="model_final.pth")
    return path.read_text(encoding="utf-8")


def test_numbers_are_those_of_the_evaluator(page: str, tmp_path: Path, dataset: str) -> None:
    path = tmp_path / "run" / "inference" / dataset / "panoptic_results.json"
    content = json.loads(path.read_text())
    escaped = html.escape(STRANGE)
    _, *rows = table_after(page, "Quality per class, %")
    by_name = {row[0]: row for row in rows}
    for row in content["per_class"]:
        cells = by_name[row["name"] if row["name"] != STRANGE else escaped]
        assert cells[2:5] == [f"{100 * row[key]:.1f}" for key in ("pq", "sq", "rq")]
        assert [int(cell) for cell in cells[5:8]] == [row[key] for key in ("tp", "fp", "fn")]
        missed, invented, poor, taken, other = map(int, cells[8:])
        assert (missed + poor + taken, invented + poor + other) == (row["fn"], row["fp"])
    # 8 boxes are taken for discs, one sky is lost.
    assert by_name[escaped][5:] == ["0", "0", "8", "0", "0", "0", "8", "0"]
    assert by_name["sky"][7:10] == ["1", "1", "0"]
    kinds = {row[0]: row[1:4] for row in table_after(page, "Which errors")[1:]}
    assert kinds["confused class"] == ["8", "16", "94.1 %"]
    assert kinds["missed"] == ["1", "1", "5.9 %"]
    matrix = {row[0]: row[1:] for row in table_after(page, "Confusion of classes")}
    names = matrix["true \\ predicted"]
    assert matrix[escaped][names.index("disc")] == "8"
    assert matrix["sky"][names.index("no match")] == "1"
    assert f"<b>{100 * content['all']['pq']:.1f}</b>" in page
    assert ["seed", "77"] in table_after(page, "Setting")


def test_the_data_are_counted(page: str, dataset: str) -> None:
    _, row = table_after(page, "Data")
    assert row == [dataset, "5", "24", "32 x 40", "64 x 48"]


def test_the_page_needs_no_other_file(page: str) -> None:
    assert "://" not in re.sub(r"<pre>.*?</pre>", "", page, flags=re.DOTALL)  # the configuration
    assert not re.search(r"<(script|link|iframe)|@import|url\((?!#)", page)
    assert re.findall(r'src="(?!data:image/jpeg;base64,)', page) == []
    assert "<b>box" not in page
    assert page.count("<svg") == 3
    # Five images, of which the last has no segment: four are the worst, and none is left.
    assert page.count("data:image/jpeg") == 8
    assert len(page) < 3_000_000


def test_pictures_stop_at_the_limit(
    tmp_path: Path, dataset: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_MAX_PICTURE_BYTES", 100)
    folder = tmp_path / "run"
    results = {dataset: evaluate(folder, dataset)}
    path = write_report(config(folder, dataset), results, weights="")
    assert "data:image/jpeg" not in path.read_text(encoding="utf-8")


def test_boxes_and_labels_have_their_own_tables(tmp_path: Path, dataset: str) -> None:
    cfg = config(tmp_path, dataset)
    folder = tmp_path / "inference" / dataset
    folder.mkdir(parents=True)
    per_class = [{"name": STRANGE, "num_images": 4, "num_top1": 3}]
    (folder / "classification_results.json").write_text(json.dumps({"per_class": per_class}))
    boxes = {"bbox": {"AP": 31.25, "AP50": float("nan"), f"AP-{STRANGE}": 31.25}}
    for results, cell in ((boxes, "31.2"), ({"classification": {"top1": 75.0}}, "75.0")):
        page = write_report(cfg, {dataset: results}, weights="").read_text(encoding="utf-8")
        assert f'%">{cell}</div>' in page
        assert f"<b>{cell}</b>" in page
        assert "nan" not in page.partition("<h2>Setting")[0]
        assert "<b>box" not in page


def test_a_browser_shows_it_without_a_network(page: str, tmp_path: Path) -> None:
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no Chromium")
    picture = tmp_path / "page.png"
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--window-size=1200,3000"]
    command += ["--host-resolver-rules=MAP * ~NOTFOUND", f"--screenshot={picture}"]
    command += [f"--user-data-dir={tmp_path / 'profile'}", f"file://{tmp_path}/run/report.html"]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    shown = cv2.imread(str(picture))
    assert shown.shape[1] == 1200
    # Charts, bars and photographs: a page without styles or pictures has hardly any colour.
    saturation = cv2.cvtColor(shown, cv2.COLOR_BGR2HSV)[..., 1]
    assert np.mean(saturation > 40) > 0.03
