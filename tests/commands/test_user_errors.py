"""Every command ends with status 2 and one line after a user's mistake."""

import importlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from batchformer_panoptic.errors import UserError, command
from helpers.commands import REPO_ROOT, add_benchmarks_to_path, load_script

ABSENT = "nowhere/absent"
CONFIG = ["--config-file", f"{ABSENT}.yaml"]
COMMANDS = {
    "train_net.py": CONFIG,
    "demo/demo.py": [*CONFIG, "--input", "a.png", "--output", "{tmp}"],
    "tools/analyze_model.py": [*CONFIG, "--tasks", "structure"],
    "tools/check_dataset.py": [
        *("--json", f"{ABSENT}.json"),
        *("--image-root", ABSENT, "--panoptic-root", ABSENT),
    ],
    "tools/compare_merges.py": CONFIG,
    "tools/convert_checkpoint.py": [f"{ABSENT}.pth", "{tmp}/converted.pth", "--source", "detr"],
    "tools/convert_dataset.py": [ABSENT, "{tmp}/converted"],
    "tools/export_checkpoint.py": [
        *("src.pth", "{tmp}/exported.pth", "--format", "official"),
        *CONFIG,
    ],
    "tools/plot_metrics.py": [ABSENT, "--output", "{tmp}/curves.png"],
    "tools/predict.py": [*CONFIG, "--input", "a.png", "--output", "{tmp}/predictions"],
    "tools/serve.py": [f"{ABSENT}.onnx"],
    "tools/setup_env.py": ["--venv", "{tmp}", "--stamp", "{tmp}/stamp"],
    "tools/study.py": [f"{ABSENT}.yaml"],
    "tools/visualize_data.py": [*CONFIG, "--output", "{tmp}"],
    "tools/visualize_predictions.py": [*CONFIG, "--output", "{tmp}"],
}
# These only start another command, or are covered by tests of their own.
NOT_HERE = {
    "tools/count_structure.py",  # reads the package, and no file of the user
    "tools/make_model_zoo.py",  # likewise: the results kept in the repository
    "benchmarks/run.py",
    "datasets/prepare_digits.py",
    "datasets/prepare_pennfudan.py",
    "datasets/prepare_shapes_panoptic.py",
}


@pytest.mark.parametrize("script", COMMANDS)
def test_a_mistake_is_one_line_and_status_2(
    script: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "occupied").touch()  # no folder for a virtual environment
    argv = [argument.format(tmp=tmp_path) for argument in COMMANDS[script]]
    assert load_script(script).main(argv) == 2
    captured = capfd.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    assert ("absent" if script != "tools/setup_env.py" else str(tmp_path)) in captured.err


def test_a_benchmark_without_a_document_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    add_benchmarks_to_path(monkeypatch)
    run = importlib.import_module("benchmarks.__main__")
    assert run.main(["--render", "--document", f"{ABSENT}.md"]) == 2
    assert capfd.readouterr().err.startswith("error: [Errno 2] No such file")


def test_every_command_is_checked() -> None:
    scripts = [REPO_ROOT / "train_net.py", REPO_ROOT / "benchmarks" / "run.py"]
    scripts += [
        p for name in ("demo", "datasets", "tools") for p in (REPO_ROOT / name).glob("*.py")
    ]
    assert {str(path.relative_to(REPO_ROOT)) for path in scripts} == {*COMMANDS, *NOT_HERE}


def commands_with_help(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, ModuleType]]:
    add_benchmarks_to_path(monkeypatch)
    for script in (*COMMANDS, *NOT_HERE):
        is_package = script == "benchmarks/run.py"
        yield (
            script,
            importlib.import_module("benchmarks.__main__") if is_package else load_script(script),
        )


def help_of(module: ModuleType, capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as error:
        module.main([*arguments, "--help"])
    assert error.value.code == 0
    return capsys.readouterr().out


def test_help_explains_the_command_with_an_example(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for script, module in commands_with_help(monkeypatch):
        text = help_of(module, capsys)
        assert module.__doc__.strip() in text, script
        assert f"python {script}" in text, script


def test_a_command_with_a_config_has_options(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with_config = []
    for script, module in commands_with_help(monkeypatch):
        text = help_of(module, capsys)
        assert ("--opts" in text) == ("--config-file" in text), script
        with_config += [script] * ("--config-file" in text)
    assert {"train_net.py", "demo/demo.py", "tools/analyze_model.py"} <= set(with_config)


def test_the_help_of_a_benchmark(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    add_benchmarks_to_path(monkeypatch)
    run = importlib.import_module("benchmarks.__main__")
    for name, module in run.BENCHMARKS.items():
        assert module.__doc__.strip() in help_of(run, capsys, name)
    with pytest.raises(SystemExit) as error:
        run.main(["quickstart", "--rounds", "0"])
    assert error.value.code == 2


def test_the_status_reaches_the_shell() -> None:
    command_line = [sys.executable, str(REPO_ROOT / "train_net.py"), *CONFIG]
    env = {**os.environ, "PYTHONPATH": str(REPO_ROOT / "projects")}
    done = subprocess.run(command_line, capture_output=True, text=True, check=False, env=env)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == f"error: config file {ABSENT}.yaml does not exist"


def test_the_decorator_only_catches_user_errors(capsys: pytest.CaptureFixture[str]) -> None:
    @command
    def main(error: Exception | None) -> int:
        """Raise."""
        if error is not None:
            raise error
        return 1

    assert main(None) == 1
    assert main(UserError("a line")) == 2
    assert capsys.readouterr().err == "error: a line\n"
    with pytest.raises(ValueError, match="not the user's"):
        main(ValueError("not the user's"))
    assert (main.__name__, main.__doc__) == ("main", "Raise.")


@pytest.mark.parametrize(
    ("script", "option", "value"),
    [
        ("tools/visualize_data.py", "--num", "0"),
        ("tools/visualize_predictions.py", "--seed", "-1"),
        ("tools/analyze_model.py", "--num-inputs", "1.5"),
        ("tools/check_dataset.py", "--max-problems", "none"),
    ],
)
def test_a_number_out_of_range_is_refused(
    script: str, option: str, value: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = [argument.format(tmp=tmp_path) for argument in COMMANDS[script]]
    with pytest.raises(SystemExit) as error:
        load_script(script).main([*argv, f"{option}={value}"])
    assert error.value.code == 2
    assert f"argument {option}: {value!r} is not a whole number from" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (OSError(28, "No space left on device", "/a/b"), "/a/b: No space left on device"),
        (PermissionError(13, "Permission denied", "/a"), "/a: Permission denied"),
        (OSError(30, "Read-only file system", b"/a"), "/a: Read-only file system"),
        (OSError(17, "File exists", "/a", None, "/b"), "/b: File exists"),
        (
            OSError(24, "Too many open files"),
            "too many open files: raise the limit",
        ),
        (OSError(28, "No space left on device"), "output: No space left on device"),
        (ValueError("I/O error: full (os error 28)"), "output: No space left on device"),
        (MemoryError("5 GiB"), "not enough memory (5 GiB): use fewer images"),
        (
            RuntimeError("DefaultCPUAllocator: can't allocate memory: 9"),
            "not enough memory (",
        ),
        (
            RuntimeError("DataLoader worker (pid 12) is killed by signal: Killed. "),
            "a worker process that reads images was killed",
        ),
        (
            RuntimeError("DataLoader worker (pid(s) 12, 13) exited unexpectedly"),
            "a worker process that reads images was killed",
        ),
    ],
)
def test_refusals_of_the_system_are_one_line(
    error: Exception, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    @command
    def main() -> int:
        try:
            raise error
        except ValueError as cause:
            raise RuntimeError("while it was handled") from cause

    assert main() == 2
    assert capsys.readouterr().err.startswith(f"error: {line}")


@pytest.mark.parametrize("error", [ConnectionError("gone"), RuntimeError("a fault"), OSError("?")])
def test_other_errors_keep_their_traceback(error: Exception) -> None:
    @command
    def main() -> int:
        raise error

    with pytest.raises(type(error)):
        main()


def test_a_reader_that_has_gone_ends_a_command_quietly(tmp_path: Path) -> None:
    script = tmp_path / "long.py"
    script.write_text(
        "import sys\nfrom batchformer_panoptic.errors import command\n"
        "@command\ndef main():\n    print('x\\n' * 10**6)\n    return 0\nsys.exit(main())\n"
    )
    env = {**os.environ, "PYTHONPATH": str(REPO_ROOT / "projects")}
    words = [sys.executable, str(script)]
    with subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env
    ) as run:
        assert run.stdout is not None
        assert run.stderr is not None
        run.stdout.readline()
        run.stdout.close()
        assert run.stderr.read() == ""
        assert run.wait() == 141


def test_what_is_printed_has_no_control_characters(capsys: pytest.CaptureFixture[str]) -> None:
    @command
    def main() -> int:
        sys.stdout.write("\x1b[2J a\tb\n\x9b1m\u202e \udc80 é\n")
        raise UserError("two\nlines \x07")

    assert main() == 2
    captured = capsys.readouterr()
    assert captured.out == "\\x1b[2J a\tb\n\\x9b1m\\u202e \\udc80 é\n"
    assert captured.err == "error: two\\nlines \\x07\n"
