"""``tools/study.py``: its runs, its tables, and the numbers in docs/study.md."""

import copy
import json
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

from batchformer_panoptic.errors import UserError
from helpers.commands import REPO_ROOT, load_script
from helpers.tiny_dataset import TinyPanopticDataset

QUICKSTART = REPO_ROOT / "configs" / "quickstart" / "batchformer_conditional_detr_shapes.yaml"
STUDIES = sorted((REPO_ROOT / "benchmarks" / "studies").glob("*.yaml"))
DOCUMENT = REPO_ROOT / "docs" / "study.md"
TINY: dict[str, Any] = {
    "cases": {
        "shapes": {
            "config": str(QUICKSTART),
            "shapes": 2,
            "options": {"DATALOADER.NUM_WORKERS": 0, "MODEL.DEVICE": "cpu"},
        }
    },
    "arms": {
        "without": {"options": {"MODEL.BATCHFORMER.ENABLED": False}},
        "with": {"more_steps": 1.5},
    },
    "compare": [["with", "without"]],
    "pictures": [4],
    "batch": [2],
    "steps": [2],
    "seeds": 3,
}
PQ = {"without": (30.0, 32.0, 34.0), "with": (33.0, 34.0, 38.0)}
SECONDS = {"without": (100.0, 200.0, 100.0), "with": (120.0, 260.0, 140.0)}


@pytest.fixture(name="study")
def _study(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.chdir(REPO_ROOT)
    return load_script("tools/study.py")


def write_study(folder: Path, **changes: Any) -> Path:
    content = {**copy.deepcopy(TINY), **changes}
    path = folder / "tiny.yaml"
    path.write_text(
        yaml.safe_dump({k: v for k, v in content.items() if v is not None}, sort_keys=False)
    )
    return path


def arguments(path: Path) -> list[str]:
    folder = path.parent
    places = ["--results", str(folder / "results"), "--document", str(folder / "study.md")]
    return [str(path), *places, "--work", str(folder / "work")]


def write_results(study: ModuleType, path: Path, *, seeds: Sequence[int] = (0, 1, 2)) -> Any:
    """Results of both arms at the given seeds of "with"; things are missing at seed 0."""
    content = study.read_study(path)
    for run in content.runs():
        if run.arm == "with" and run.seed not in seeds:
            continue
        quality = PQ[run.arm][run.seed]
        result = {
            **content.settings(run),
            "PQ": {"all": quality, "things": quality / 2 if run.seed else None, "stuff": 50.0},
            "seconds": SECONDS[run.arm][run.seed],
            "versions": {"torch": "1.2.3"},
            "device": "cpu",
        }
        file = path.parent / "results" / f"{run.name}.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(result))
    return content


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


# --- the report ----------------------------------------------------------------------------------


def test_tables_hold_what_is_computed_by_hand(study: ModuleType, tmp_path: Path) -> None:
    path = write_study(tmp_path)
    write_results(study, path)
    (tmp_path / "study.md").write_text("Before.\n<!-- tiny -->\nold\n<!-- end tiny -->\nAfter.\n")
    assert study.main([*arguments(path), "--table"]) == 0
    text = (tmp_path / "study.md").read_text()
    assert text.startswith("Before.\n<!-- tiny -->\n")
    assert text.endswith("<!-- end tiny -->\nAfter.\n")
    assert "old" not in text
    rows = [cells(line) for line in text.splitlines() if line.startswith("| shapes")]
    place = ["shapes", "4", "2"]
    assert rows == [
        [*place, "without", "2", "3", "32.00 ± 2.00", "16.50 ± 0.71", "50.00 ± 0.00", "1.00"],
        # 1.2, 1.3 and 1.4 times the seconds of the same seed
        [*place, "with", "3", "3", "35.00 ± 2.65", "18.00 ± 1.41", "50.00 ± 0.00", "1.30"],
        # differences 3, 2, 4: t = 3 / (1 / sqrt(3)); of things 1 and 2
        [
            *(*place, "2", "with - without", "3"),
            *("+3.00 ± 1.00", "+1.50 ± 0.71", "+0.00 ± 0.00", "5.2", "3 of 3"),
        ],
    ]
    assert "torch 1.2.3" in text


def test_only_seeds_of_both_arms_are_compared(study: ModuleType, tmp_path: Path) -> None:
    path = write_study(tmp_path)
    content = write_results(study, path, seeds=[2])
    results = {run: study.read_result(content, run, tmp_path / "results") for run in content.runs()}
    text = study.tables(content, {run: one for run, one in results.items() if one})
    rows = [cells(line) for line in text.splitlines() if line.startswith("| shapes")]
    assert rows[1][5:7] == ["1", "38.00"]
    assert rows[2][5:] == ["1", "+4.00", "+2.00", "+0.00", "-", "1 of 1"]


@pytest.mark.parametrize("axes", [{}, {"batch": [2, 4]}, {"steps": None, "images": [4, 8, 16]}])
def test_the_figure_changes_with_its_content_only(
    study: ModuleType, tmp_path: Path, axes: dict[str, Any]
) -> None:
    path = write_study(tmp_path, **axes)
    write_results(study, path)
    (tmp_path / "study.md").write_text("<!-- tiny -->\n<!-- end tiny -->\n")
    figure = tmp_path / "images" / "study_tiny.svg"
    drawn = []
    for _ in range(2):
        assert study.main([*arguments(path), "--table"]) == 0
        drawn.append(figure.read_bytes())
    assert drawn[0] == drawn[1]
    assert len(drawn[0]) < 100_000
    assert f"![PQ of each arm](images/{figure.name})" in (tmp_path / "study.md").read_text()


def test_a_study_without_results_says_so(study: ModuleType, tmp_path: Path) -> None:
    path = write_study(tmp_path)
    (tmp_path / "study.md").write_text("<!-- tiny -->\nold\n<!-- end tiny -->\n")
    assert study.main([*arguments(path), "--table"]) == 0
    expected = "<!-- tiny -->\nToo few runs have finished yet.\n<!-- end tiny -->\n"
    assert (tmp_path / "study.md").read_text() == expected


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_the_document_is_what_the_results_give(
    study: ModuleType, tmp_path: Path, path: Path
) -> None:
    document = tmp_path / "study.md"
    shutil.copy(DOCUMENT, document)
    assert study.main([str(path), "--table", "--document", str(document)]) == 0
    assert document.read_text() == DOCUMENT.read_text()


def test_every_result_belongs_to_a_run_of_a_study(study: ModuleType) -> None:
    expected = {
        study.RESULTS / f"{run.name}.json"
        for path in STUDIES
        for run in study.read_study(path).runs()
    }
    assert set(study.RESULTS.glob("*.json")) <= expected


# --- the file of a study -------------------------------------------------------------------------


def test_points_see_an_equal_number_of_images(study: ModuleType, tmp_path: Path) -> None:
    content = study.read_study(write_study(tmp_path, steps=None, images=[64], batch=[2, 16]))
    assert [(point.batch, point.steps) for point in content.points] == [(2, 32), (16, 4)]


def test_seeds_are_completed_one_after_the_other(study: ModuleType, tmp_path: Path) -> None:
    runs = study.read_study(write_study(tmp_path, pictures=[4, 8])).runs()
    assert len(runs) == len({run.name for run in runs}) == 12
    assert [run.seed for run in runs] == [0] * 4 + [1] * 4 + [2] * 4


CASE = TINY["cases"]["shapes"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cases": None}, "is no study: 'cases'"),
        ({"seed": 3}, "unexpected keyword argument 'seed'"),
        ({"cases": {"shapes": {**CASE, "sharpes": 2}}}, "unexpected keyword argument 'sharpes'"),
        ({"arms": {"two words": {}}}, "'two words' may have a-z"),
        ({"images": [4]}, "either steps or images"),
        ({"steps": None}, "either steps or images"),
        ({"steps": None, "images": [3]}, "images must be multiples of every batch"),
        ({"pictures": [0]}, "0 is not a number from 1 on"),
        ({"pictures": ["all"]}, "'all' is not a number from 1 on"),
        ({"seeds": "many"}, "'many' is not a number from 1 on"),
        ({"compare": [["with", "absent"]]}, "['with', 'absent'] does not name two of the arms"),
        ({"arms": {"with": {"options": {"SOLVER.BASE_LT": 1}}}, "compare": []}, "SOLVER.BASE_LR"),
        ({"cases": {"shapes": {"config": "absent.yaml"}}}, "absent.yaml does not exist"),
    ],
)
def test_mistakes_in_the_file_are_one_line(
    study: ModuleType,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    changes: dict[str, Any],
    message: str,
) -> None:
    assert study.main(arguments(write_study(tmp_path, **changes))) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "work").exists()


def test_results_of_other_settings_and_documents_without_a_place_are_refused(
    study: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_results(study, write_study(tmp_path))
    (tmp_path / "study.md").write_text("Nothing.\n")
    assert study.main([*arguments(write_study(tmp_path)), "--table"]) == 2
    assert "study.md needs the lines <!-- tiny --> and" in capsys.readouterr().err
    arms = {**TINY["arms"], "with": {"more_steps": 2.5}}
    assert study.main(arguments(write_study(tmp_path, arms=arms))) == 2
    assert "_with_seed0.json was made with steps 3, and the study has 5" in capsys.readouterr().err


# --- data ----------------------------------------------------------------------------------------


def test_pictures_are_drawn_by_the_seed(
    study: ModuleType, tiny_panoptic_dataset: TinyPanopticDataset
) -> None:
    source = str(tiny_panoptic_dataset.panoptic_json)
    content = json.loads(tiny_panoptic_dataset.panoptic_json.read_text())
    drawn = [study.drawn(content, 2, seed, source) for seed in range(5)]
    assert drawn[1] == study.drawn(content, 2, 1, source)
    ids = {tuple(image["id"] for image in one["images"]) for one in drawn}
    assert len(ids) > 1
    for one in drawn:
        assert one["categories"] == content["categories"]
        assert {a["image_id"] for a in one["annotations"]} == {i["id"] for i in one["images"]}
    with pytest.raises(UserError, match="has 5 pictures, not 6"):
        study.drawn(content, 6, 0, source)


def test_a_data_set_is_replaced_by_the_drawn_pictures(
    study: ModuleType, tmp_path: Path, tiny_panoptic_dataset: TinyPanopticDataset
) -> None:
    row = tiny_panoptic_dataset.row
    config = tmp_path / "config.yaml"
    datasets = {"CUSTOM_PANOPTIC": [row], "TRAIN": [row[0]], "TEST": [row[0]]}
    config.write_text(yaml.safe_dump({"DATASETS": datasets, "VERSION": 2}))
    cases = {"case": {"config": str(config)}}
    content = study.read_study(write_study(tmp_path, cases=cases, pictures=["all", 3]))
    everything, some = (study.data_options(content, p, 1, tmp_path) for p in content.points)
    assert everything["DATASETS.CUSTOM_PANOPTIC"] == [row]
    ((*unchanged, chosen),) = some["DATASETS.CUSTOM_PANOPTIC"]
    assert unchanged == row[:3]
    assert len(json.loads(Path(chosen).read_text())["images"]) == 3


# --- runs ----------------------------------------------------------------------------------------


class FakeTraining:
    """Takes the place of the commands that a study calls; fails for one of the arms."""

    def __init__(self, fails: str = "") -> None:
        self.fails = fails
        self.folders: list[str] = []

    def __call__(self, script: Path, arguments: Sequence[Any], log: Path, *inherited: int) -> None:
        words = list(map(str, arguments))
        if script.name == "prepare_shapes_panoptic.py":
            Path(words[words.index("--output") + 1]).mkdir(parents=True)
            return
        assert "--resume" in words
        folder = Path(words[words.index("OUTPUT_DIR") + 1])
        self.folders.append(folder.name)
        if self.fails and self.fails in folder.name:
            raise UserError("it failed")
        group = {"pq": 0.5, "sq": 0.75, "rq": 0.625}
        quality = {"all": group, "things": group, "stuff": None}
        quality["per_class"] = [{"name": "disc", "pq": 0.5}, {"name": "star", "pq": None}]
        (folder / "inference").mkdir(parents=True)
        (folder / "inference" / "panoptic_results.json").write_text(json.dumps(quality))
        records = [{"iteration": 0}, *({"time": seconds} for seconds in (1.0, 9.0, 2.0))]
        (folder / "metrics.json").write_text("\n".join(map(json.dumps, records)))
        (folder / "model_final.pth").touch()


def test_what_is_finished_is_not_run_again_and_a_failure_stops_nothing(
    study: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = write_study(tmp_path, seeds=2)
    fake = FakeTraining(fails="_with_seed0")
    monkeypatch.setattr(study, "call", fake)
    assert study.main([*arguments(path), "--jobs", "2"]) == 1
    captured = capsys.readouterr()
    assert "0 of 4" not in captured.out
    assert captured.err == "failed: shapes_4_batch2_steps2_with_seed0: it failed\n"
    starts = ["shapes_seed0", "shapes_seed1"]
    runs = [f"shapes_4_batch2_steps2_{arm}_seed{s}" for s in (0, 1) for arm in ("with", "without")]
    assert sorted(fake.folders) == sorted([*starts, *runs])
    assert not list((tmp_path / "work").glob("shapes_4*/*.pth"))

    monkeypatch.setattr(study, "call", again := FakeTraining())
    assert study.main(arguments(path)) == 0
    assert again.folders == ["shapes_4_batch2_steps2_with_seed0"]
    assert "1 of 4 runs to do" in capsys.readouterr().out
    result = json.loads((tmp_path / "results" / f"{runs[0]}.json").read_text())
    assert result["PQ"] == {"all": 50.0, "things": 50.0, "stuff": None}
    assert result["per_class"] == {"disc": 50.0, "star": None}
    assert (result["steps"], result["seconds"]) == (3, 6.0)  # the median of 1, 9 and 2, 3 steps
    assert set(result["versions"]) == {"python", "torch", "torchvision", "numpy"}


def test_a_run_waits_for_a_process_that_has_its_folder(study: ModuleType, tmp_path: Path) -> None:
    with study.locked(tmp_path) as lock:
        # As the training of a study that was killed: it has inherited the lock.
        child = subprocess.Popen(["sleep", "0.5"], pass_fds=[lock])
    with study.locked(tmp_path):
        assert child.wait(timeout=5) == 0  # it closes its files before it can be waited for


def test_a_failing_command_is_named_with_its_last_line(study: ModuleType, tmp_path: Path) -> None:
    log = tmp_path / "log.txt"
    with pytest.raises(UserError, match=r"absent\.yaml does not exist \(exit status 2; see .*log"):
        study.call(REPO_ROOT / "train_net.py", ["--config-file", "absent.yaml"], log)


@pytest.mark.slow
def test_arms_start_from_the_same_weights_and_pictures(study: ModuleType, tmp_path: Path) -> None:
    arms = {**TINY["arms"], "self": {"options": {"MODEL.BATCHFORMER.ATTEND": "self"}}}
    path = write_study(tmp_path, arms=arms, seeds=2)
    assert study.main([*arguments(path), "--jobs", "2"]) == 0
    assert len(list((tmp_path / "results").glob("*.json"))) == 6
    losses: dict[int, list[float]] = {0: [], 1: []}
    for folder in (tmp_path / "work").glob("shapes_4*"):
        first = json.loads((folder / "metrics.json").read_text().splitlines()[0])
        losses[int(folder.name[-1])].append(first.get("original/loss_ce", first["loss_ce"]))
    for values in losses.values():
        assert values == pytest.approx([values[0]] * 3, rel=1e-5)
    assert losses[0][0] != pytest.approx(losses[1][0], rel=1e-3)
