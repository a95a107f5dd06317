"""MODEL_ZOO.md is generated from the result files, which point at things that exist."""

import json
from pathlib import Path
from types import ModuleType

import pytest

from batchformer_panoptic.checkpoint.conversion import source_named
from helpers.commands import REPO_ROOT, load_script

RESULTS = REPO_ROOT / "docs" / "results"
TRAINED = ("block", "partner", "data", "steps", "schedule", "batch", "seed", "hardware")
TRAINED += ("seconds_per_iteration", "memory_gb", "PQ", "SQ", "RQ", "AP", "note")


@pytest.fixture(scope="module")
def zoo() -> ModuleType:
    return load_script("tools/make_model_zoo.py")


def test_the_document_is_what_the_results_give(zoo: ModuleType, tmp_path: Path) -> None:
    written = tmp_path / "MODEL_ZOO.md"
    assert zoo.main(["--document", str(written)]) == 0
    assert written.read_text() == (REPO_ROOT / "MODEL_ZOO.md").read_text()


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*.json")), ids=lambda path: path.stem)
def test_results_are_complete(path: Path) -> None:
    result = json.loads(path.read_text())
    if result["kind"] == "panoptic":
        assert set(result) >= {*TRAINED, "name", "config", "command", "date"}
        assert (REPO_ROOT / result["config"]).exists()
        assert result["config"] in result["command"]
        if result["partner"] is not None:
            assert (RESULTS / f"{result['partner']}.json").exists()
    elif result["kind"] == "classification":
        for key in ("config", "config_with_block", "source"):
            assert (REPO_ROOT / result[key]).exists()
    elif result["kind"] == "converted":
        for _, sources, test, _ in result["rows"]:
            assert (REPO_ROOT / test).exists()
            for source in sources.split(", "):
                assert source_named(source.replace("NAME", "deit_tiny_patch16_224"))
    else:
        for table in result["tables"]:
            assert table["source"]
            assert {len(row) for row in table["rows"]} == {len(table["columns"])}


def test_what_was_not_measured_is_a_dash(zoo: ModuleType) -> None:
    results = zoo.read_results(RESULTS)
    (result, *_) = results["panoptic"]
    result.update(AP=None, SQ={}, RQ={}, PQ={"all": 1.25})
    result.update(memory_gb=None, seconds_per_iteration=None)
    metrics, training = zoo.trained_panoptic([result])[1::2]
    assert [cell.strip() for cell in metrics.splitlines()[2].split("|")][4:7] == ["1.2", "-", "-"]
    assert [cell.strip() for cell in training.splitlines()[2].split("|")][6:8] == ["-", "-"]


def test_numbers_of_papers_and_of_this_project_are_apart(zoo: ModuleType) -> None:
    text = (REPO_ROOT / "MODEL_ZOO.md").read_text()
    trained, rest = text.split("## Converted from other code bases")
    _, quoted = rest.split("## Quoted from papers")
    assert "45.1" in quoted
    assert "45.1" not in trained
    assert "70.4" in trained
    assert "70.4" not in quoted


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[]", 'needs a "kind", one of panoptic'),
        ('{"kind": "rumour"}', "found: rumour"),
        ("no JSON", "one.json cannot be read"),
        (None, "has no result files"),
        (
            '{"kind": "classification", "source": "absent.json"}',
            "absent.json cannot be read",
        ),
    ],
)
def test_unusable_results_are_refused(
    zoo: ModuleType,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    content: str | None,
    message: str,
) -> None:
    if content is not None:
        (tmp_path / "one.json").write_text(content)
    document = tmp_path / "out.md"
    assert zoo.main(["--results", str(tmp_path), "--document", str(document)]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not document.exists()
