"""The benchmarks run, and the document shows what their results say."""

import json
import sys

import pytest
from conftest import REPO_ROOT, load_script

DOCUMENT = REPO_ROOT / "docs" / "benchmarks.md"


@pytest.fixture
def run(monkeypatch):
    monkeypatch.syspath_prepend(str(REPO_ROOT / "benchmarks"))
    yield load_script("benchmarks/run.py")
    for name in ("measure", "quickstart_cost", "sampling_cost", "transformers_cost"):
        sys.modules.pop(name, None)


def test_the_document_shows_the_results(run):
    text = DOCUMENT.read_text()
    results = run.read_results(run.RESULTS)
    assert set(results) == set(run.BENCHMARKS)
    assert run.rendered(text, results) == text


def test_another_result_changes_the_document(run):
    results = run.read_results(run.RESULTS)
    results["transformers"]["rows"][0]["parameters"] = 123_450_000
    assert "123.45" in run.rendered(DOCUMENT.read_text(), results)


def test_ratios_are_medians_of_rounds(run):
    median_ratio = sys.modules["measure"].median_ratio
    assert median_ratio([2.0, 9.0, 4.0], [1.0, 3.0, 1.0]) == 3.0


def test_every_function_takes_its_turn(run):
    calls = []
    functions = {name: lambda name=name: calls.append(name) for name in "abc"}
    times = sys.modules["measure"].in_turns(functions, 2)
    assert "".join(calls) == "abc" + "abc" + "cba"
    assert {name: len(values) for name, values in times.items()} == {"a": 2, "b": 2, "c": 2}


def test_a_run_leaves_json_and_a_table(run, tmp_path, capsys):
    document = tmp_path / "document.md"
    document.write_text("before\n<!-- transformers -->\n<!-- end transformers -->\nafter\n")
    small = "MODEL.DETR.ENC_LAYERS 1 MODEL.DETR.DEC_LAYERS 1 MODEL.RESNETS.DEPTH 50"
    where = ["--results", str(tmp_path), "--document", str(document)]
    what = ["transformers", "--rounds", "1", "--size", "64", "64", "--systems", "DETR"]
    assert run.main([*where, *what, "--opts", *small.split()]) == 0
    result = json.loads((tmp_path / "transformers.json").read_text())
    plain, with_block = result["rows"]
    assert plain["multiply_adds"] == with_block["multiply_adds"]
    assert plain["parameters_of_block"] == 0
    grown = with_block["parameters"] - plain["parameters"]
    assert grown == with_block["parameters_of_block"] > 0
    assert plain["step_against_plain"] == 1.0
    assert "| DETR" in document.read_text()
    assert document.read_text().startswith("before\n")
    assert document.read_text().endswith("after\n")


def test_sampling_is_compared_with_equal_results(run, tmp_path):
    document = tmp_path / "document.md"
    document.write_text("<!-- sampling -->\n<!-- end sampling -->\n")
    where = ["--results", str(tmp_path), "--document", str(document)]
    case = "encoder, 4 images of 128 x 128"
    assert run.main([*where, "sampling", "--rounds", "1", "--cases", case]) == 0
    (row,) = json.loads((tmp_path / "sampling.json").read_text())["rows"]
    assert 0 < row["largest_difference"] < 1e-4
    assert row["forward"] > 0
    assert case in document.read_text()


def test_the_quickstart_is_compared_over_transformers(run, tmp_path):
    document = tmp_path / "document.md"
    document.write_text("<!-- quickstart -->\n<!-- end quickstart -->\n")
    where = ["--results", str(tmp_path), "--document", str(document)]
    assert run.main([*where, "quickstart", "--rounds", "1", "--images", "2"]) == 0
    rows = json.loads((tmp_path / "quickstart.json").read_text())["rows"]
    assert [row["transformer"] for row in rows] == ["detr", "conditional", "smca", "deformable"]
    assert rows[0]["step_against_first"] == 1.0
    assert "| smca" in document.read_text()
