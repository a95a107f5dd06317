"""The benchmarks run, and docs/benchmarks.md matches their results."""

import importlib
import json
import subprocess
import sys

import numpy as np
import pytest
import torch

from helpers.commands import REPO_ROOT, add_benchmarks_to_path

DOCUMENT = REPO_ROOT / "docs" / "benchmarks.md"


@pytest.fixture
def run(monkeypatch):
    """The module that ``benchmarks/run.py`` starts, with the path that it sets."""
    add_benchmarks_to_path(monkeypatch)
    return importlib.import_module("benchmarks.__main__")


def test_the_document_shows_the_results(run):
    text = DOCUMENT.read_text()
    results = run.read_results(run.RESULTS)
    assert set(results) | {"gpu"} == set(run.BENCHMARKS)  # measured where there is one
    assert run.rendered(text, results) == text


def test_results_are_whole(run):
    """Not those of a trial: several rounds, no changed options, every arm, and a table of each."""
    results = run.read_results(run.RESULTS)
    text = DOCUMENT.read_text()
    for name, result in results.items():
        assert result["rounds"] >= 3, name
        assert not result.get("opts"), name
        assert not result.get("options"), name
        assert not result.get("tiny"), name
        assert f"<!-- {name} -->\n<!-- end" not in text
    arms = sys.modules["benchmarks.training_step"].ARMS
    assert [row["arm"] for row in results["training"]["rows"]] == list(arms)
    ways = sys.modules["benchmarks.inference"].NAMES
    assert [row["way"] for row in results["inference"]["rows"]] == list(ways)
    streams = sys.modules["benchmarks.two_streams"]
    measured = {(row["system"], row["task"]) for row in results["streams"]["rows"]}
    possible = {(s, task) for s in streams.SYSTEMS for task in streams.TASKS}
    assert measured == possible - {(s, "boxes") for s in streams.WITHOUT_BOXES}


def test_the_command_runs_from_any_folder(run, tmp_path):
    document = tmp_path / "document.md"
    document.write_text("<!-- transformers -->\n<!-- end transformers -->\n")
    command = [sys.executable, str(REPO_ROOT / "benchmarks" / "run.py"), "--render"]
    done = subprocess.run([*command, "--document", str(document)], cwd=tmp_path, check=False)
    assert done.returncode == 0
    assert document.read_text() == run.rendered(
        "<!-- transformers -->\n<!-- end transformers -->\n", run.read_results(run.RESULTS)
    )


def test_another_result_changes_the_document(run):
    results = run.read_results(run.RESULTS)
    results["transformers"]["rows"][0]["parameters"] = 123_450_000
    assert "123.45" in run.rendered(DOCUMENT.read_text(), results)


def test_ratios_are_medians_of_rounds(run):
    median_ratio = sys.modules["benchmarks.measure"].median_ratio
    assert median_ratio([2.0, 9.0, 4.0], [1.0, 3.0, 1.0]) == 3.0


def test_every_function_takes_its_turn(run):
    calls = []
    functions = {name: lambda name=name: calls.append(name) for name in "abc"}
    times = sys.modules["benchmarks.measure"].in_turns(functions, 2)
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


@pytest.mark.parametrize(
    ("name", "case"),
    [
        ("sampling", "encoder, 4 images of 128 x 128"),
        ("layers", "enlarged to 95 x 127, 8 queries, 32 to 16"),
    ],
)
def test_layers_are_compared_with_equal_results(name, case, run, tmp_path):
    document = tmp_path / "document.md"
    document.write_text(f"<!-- {name} -->\n<!-- end {name} -->\n")
    where = ["--results", str(tmp_path), "--document", str(document)]
    assert run.main([*where, name, "--rounds", "1", "--cases", case]) == 0
    (row,) = json.loads((tmp_path / f"{name}.json").read_text())["rows"]
    assert row["largest_difference"] < 1e-4
    # The sums of a convolution may have the same bits either way; those of sampling do not.
    assert name == "layers" or row["largest_difference"] > 0
    assert row["forward"] > 0
    assert case in document.read_text()


@pytest.mark.slow
def test_inference_is_compared_with_the_same_segments(run, tmp_path):
    document = tmp_path / "document.md"
    document.write_text("<!-- inference -->\n<!-- end inference -->\n")
    where = ["--results", str(tmp_path), "--document", str(document)]
    ways = ["default", "all queries", "naive"]
    what = ["inference", "--rounds", "1", "--size", "256", "320", "--against", *ways]
    assert run.main([*where, *what]) == 0
    result = json.loads((tmp_path / "inference.json").read_text())
    assert result["segments"] == 12
    assert [row["way"] for row in result["rows"]] == ["fast", *ways]
    assert "as published" in document.read_text()


def test_the_quickstart_is_compared_over_transformers(run, tmp_path):
    document = tmp_path / "document.md"
    document.write_text("<!-- quickstart -->\n<!-- end quickstart -->\n")
    where = ["--results", str(tmp_path), "--document", str(document)]
    assert run.main([*where, "quickstart", "--rounds", "1", "--images", "2"]) == 0
    rows = json.loads((tmp_path / "quickstart.json").read_text())["rows"]
    assert [row["transformer"] for row in rows] == ["detr", "conditional", "smca", "deformable"]
    assert rows[0]["step_against_first"] == 1.0
    assert "| smca" in document.read_text()


def test_evaluators_of_panoptic_quality_are_compared_with_equal_results(run, tmp_path):
    document = tmp_path / "document.md"
    document.write_text("<!-- pq -->\n<!-- end pq -->\n")
    where = ["--results", str(tmp_path), "--document", str(document)]
    what = ["pq", "--rounds", "1", "--size", "48", "64", "--images", "3"]
    assert run.main([*where, *what, "--memory-images", "20", "220"]) == 0
    result = json.loads((tmp_path / "pq.json").read_text())
    assert result["largest_difference"] <= 1e-12
    assert 0 < result["metrics"]["PQ"] < 100
    ours, theirs, _ = result["rows"]
    assert ours["against_streaming"] == 1.0
    assert ours["bytes_held"][1] - ours["bytes_held"][0] < 200 * 500
    assert theirs["bytes_held"][1] > 2 * theirs["bytes_held"][0]
    assert "| Detectron2's" in document.read_text()


def test_cost_curves_are_measured_in_doublings(run, tmp_path):
    document = tmp_path / "document.md"
    document.write_text("<!-- curves -->\n<!-- end curves -->\n")
    where = ["--results", str(tmp_path), "--document", str(document)]
    curves = ["inference, kept queries", "training mapper, segments of an image"]
    assert run.main([*where, "curves", "--rounds", "1", "--points", "3", "--curves", *curves]) == 0
    queries, segments = json.loads((tmp_path / "curves.json").read_text())["rows"]
    assert [row["curve"] for row in (queries, segments)] == curves
    assert queries["steps"] == [2, 4, 8]
    assert 0 < queries["peak_exponent"] < 1.1
    assert abs(segments["peak_exponent"]) < 0.1
    assert len(queries["time_ratios"]) == len(segments["peak_ratios"]) == 2
    assert "2, 8" in document.read_text()


def test_exponents_are_those_of_powers(run):
    exponent = sys.modules["benchmarks.measure"].exponent
    assert exponent([1, 2, 4, 8], [5, 20, 80, 320]) == pytest.approx(2)
    assert exponent([16, 32], [7.0, 7.0]) == pytest.approx(0)


def test_peaks_count_what_is_alive_at_once(run):
    measure = sys.modules["benchmarks.measure"]

    def function():
        for _ in range(3):
            (torch.zeros(1000, 10) + 1).sum()

    # Two tensors of 40 kB at a time, three times over.
    assert 80_000 <= measure.peak_bytes(function) < 85_000
    assert 800_000 <= measure.python_peak_bytes(lambda: np.zeros((10_000, 10)).sum()) < 1_000_000


@pytest.mark.slow
def test_training_step_is_compared_with_equal_losses_and_gradients(run, tmp_path):
    document = tmp_path / "document.md"
    document.write_text("<!-- training -->\n<!-- end training -->\n")
    where = ["--results", str(tmp_path), "--document", str(document)]
    what = ["training", "--rounds", "1", "--size", "256", "320", "--objects", "3"]
    small = ["MODEL.DETR.ENC_LAYERS", "1", "MODEL.DETR.DEC_LAYERS", "1"]
    arms = ["this project", "all queries", "all queries, nothing shared among them"]
    assert run.main([*where, *what, "--arms", *arms, "--opts", *small]) == 0
    ours, *others = json.loads((tmp_path / "training.json").read_text())["rows"]
    assert ours["times_as_long"] == 1.0
    assert len(others) == 2
    for other in others:
        assert 0 < other["gradient_difference"] < 1e-5
        assert other["loss_difference"] < 1e-4
        assert other["tensor_bytes"] > ours["tensor_bytes"] > 0
    assert "| all queries" in document.read_text()


def test_two_streams_are_compared_with_one(run, tmp_path):
    document = tmp_path / "document.md"
    document.write_text("<!-- streams -->\n<!-- end streams -->\n")
    where = ["--results", str(tmp_path), "--document", str(document)]
    what = ["streams", "--rounds", "1", "--size", "64", "64", "--systems", "DETR"]
    small = ["MODEL.DETR.ENC_LAYERS", "1", "MODEL.DETR.DEC_LAYERS", "1"]
    assert run.main([*where, *what, "--opts", *small]) == 0
    rows = json.loads((tmp_path / "streams.json").read_text())["rows"]
    assert [row["task"] for row in rows] == ["boxes", "panoptic"]
    assert all(row["times_as_long"] > 0 for row in rows)
    assert "| DETR" in document.read_text()


def test_a_rehearsal_measures_every_arm_that_a_cpu_has(run, tmp_path, monkeypatch):
    gpu = sys.modules["benchmarks.gpu_cost"]
    monkeypatch.setattr(gpu, "WARM_UP", 0)
    document = tmp_path / "document.md"
    document.write_text("<!-- gpu -->\n<!-- end gpu -->\n")
    where = ["--results", str(tmp_path), "--document", str(document)]
    rehearsal = ["gpu", "--rounds", "1", "--device", "cpu", "--tiny"]
    assert run.main([*where, *rehearsal]) == 0
    result = json.loads((tmp_path / "gpu.json").read_text())
    assert result["tiny"]
    arms: dict[str, set[str]] = {}
    for row in result["rows"]:
        assert row["seconds"] > 0
        arms.setdefault(row["what"], set()).add(row["arm"])
    trained = {
        f"{kind}, {numbers}"
        for kind, numbers in gpu.TRAINING
        if numbers in ("float32", "TF32", "bfloat16")
    }
    predicted = {"as published", "default", "fast", "fast, TF32", "fast, bfloat16"}
    assert arms == {
        "training step, 2 images": trained,
        "training step, 8 images": trained,
        "training step of the quickstart": {"float32", "bfloat16"},
        "inference, batch of 1": predicted,
        "inference, batch of 8": predicted,
    }
    assert result["ratios"]["training step, 8 images"].keys() == gpu.RATIOS.keys()
    text = document.read_text()
    assert "| as published, one stream, float32 " in text
    assert "- training step, 8 images: two streams against one, float32 " in text


def test_what_does_not_fit_or_begins_too_late_has_a_reason_instead_of_numbers(run, monkeypatch):
    gpu = sys.modules["benchmarks.gpu_cost"]
    now = [0.0]
    monkeypatch.setattr(gpu.time, "monotonic", lambda: now[0])
    calls = {"first": 0, "large": 0, "broken": 0}
    errors = {"large": torch.cuda.OutOfMemoryError(), "broken": RuntimeError("no compiler")}

    def build(name):
        def way():
            calls[name] += 1
            if name in errors:
                raise errors[name]
            now[0] = 5.0

        return way

    builders = {name: lambda name=name: build(name) for name in (*errors, "first", "late")}
    rows, times = gpu.measure(builders, rounds=50, end=2.0)
    reasons = ["out of memory", "failed: no compiler", None, "no time"]
    assert [row.get("missing") for row in rows] == reasons
    assert rows[2]["as_fast"] == 1.0
    assert {name: len(values) for name, values in times.items()} == {"first": gpu.FEWEST_ROUNDS}
    assert calls["large"] == 1
    text = gpu.table({"rows": [{"what": "x", "images": 2, **row} for row in rows], "ratios": {}})
    assert "out of memory" in text


@pytest.mark.slow
@pytest.mark.distributed
def test_several_processes_are_compared_with_one(run, tmp_path):
    document = tmp_path / "document.md"
    document.write_text("<!-- processes -->\n<!-- end processes -->\n")
    where = ["--results", str(tmp_path), "--document", str(document)]
    assert run.main([*where, "processes", "--rounds", "1", "--images", "1"]) == 0
    one, *others = json.loads((tmp_path / "processes.json").read_text())["rows"]
    assert one["times_as_long"] == 1.0
    assert len(others) == 3
    assert "| all, gradients in bfloat16 " in document.read_text()


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
@pytest.mark.parametrize("options", [[], ["--device", "cpu"]])
def test_a_machine_without_a_gpu_is_told_how_to_rehearse(options, run, capsys):
    assert run.main(["gpu", *options]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "--tiny" in line


@pytest.mark.slow
def test_mask2former_is_compared_with_equal_losses_and_predictions(run, tmp_path):
    pytest.importorskip("transformers")
    document = tmp_path / "document.md"
    document.write_text("<!-- mask2former -->\n<!-- end mask2former -->\n")
    where = ["--results", str(tmp_path), "--document", str(document)]
    what = ["mask2former", "--rounds", "1", "--size", "64", "96", "--objects", "2"]
    small = ["MODEL.DETR.ENC_LAYERS", "1", "MODEL.DETR.DEC_LAYERS", "2"]
    points = ["MODEL.MASK2FORMER.NUM_POINTS", "50"]
    assert run.main([*where, *what, "--opts", *small, *points]) == 0
    result = json.loads((tmp_path / "mask2former.json").read_text())
    # Other orders of additions: some difference, but a small one.
    assert 0 < result["loss_difference"] < 1e-4
    assert 0 < result["prediction_difference"] < 1e-6
    arms = list(sys.modules["benchmarks.mask2former_cost"].ARMS)
    rows = result["rows"]
    assert [row["arm"] for row in rows if row["what"] == "training"] == arms
    assert [row["arm"] for row in rows if row["what"] == "inference"] == [arms[0], "transformers"]
    assert all(row["tensor_bytes"] > 0 for row in rows)
    assert "| transformers" in document.read_text()


@pytest.mark.slow
def test_steps_beside_a_busy_process_are_timed(run, tmp_path):
    document = tmp_path / "document.md"
    document.write_text("<!-- neighbours -->\n<!-- end neighbours -->\n")
    where = ["--results", str(tmp_path), "--document", str(document)]
    assert run.main([*where, "neighbours", "--rounds", "1", "--images", "1"]) == 0
    rows = json.loads((tmp_path / "neighbours.json").read_text())["rows"]
    ways = list(sys.modules["benchmarks.neighbours"].WAYS)
    assert [(row["busy"], row["way"]) for row in rows] == [(b, w) for b in (0, 1) for w in ways]
    assert all(wall > 0 and cpu > 0 for row in rows for wall, cpu in row["times"])
    assert "load average" in document.read_text()


def test_the_parts_of_loading_are_timed(run, tmp_path):
    document = tmp_path / "document.md"
    document.write_text("<!-- loading -->\n<!-- end loading -->\n")
    where = ["--results", str(tmp_path), "--document", str(document)]
    what = ["loading", "--rounds", "1", "--size", "48", "64", "--images", "2"]
    assert run.main([*where, *what]) == 0
    rows = json.loads((tmp_path / "loading.json").read_text())["rows"]
    seconds = {row["part"]: row["seconds"] for row in rows}
    assert 0 < seconds["decoding the JPEG"] < seconds[sys.modules["benchmarks.loading"].TRAINING]
    assert "| all of a test image" in document.read_text()
