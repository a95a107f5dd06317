"""The command ``batchformer-panoptic``: its subcommands are the scripts, with their exit status."""

import shutil
import sys
from pathlib import Path

import pytest

from batchformer_panoptic import command_line
from helpers.commands import REPO_ROOT

SCRIPT = '''"""Does {name}.

More about it."""
import argparse

def main(argv):
    argparse.ArgumentParser().parse_known_args(argv)
    print({name!r}, argv)
    return len(argv)
'''


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout with small scripts."""
    for name in ("train_net", "tools/check_something", "demo/show", "datasets/prepare_it"):
        path = tmp_path / f"{name}.py"
        path.parent.mkdir(exist_ok=True)
        path.write_text(SCRIPT.format(name=path.stem))
    monkeypatch.setattr(command_line, "ROOT", tmp_path)
    monkeypatch.setattr(sys, "argv", [*sys.argv])  # changed by the command
    for name in ("train_net", "check_something"):
        monkeypatch.setitem(sys.modules, name, None)
    return tmp_path


@pytest.mark.parametrize(
    ("argv", "script", "passed"),
    [
        (["train", "--resume", "KEY", "1"], "train_net", ["--resume", "KEY", "1"]),
        (["evaluate", "KEY", "1"], "train_net", ["--eval-only", "KEY", "1"]),
        (["check-something", "--", "-x"], "check_something", ["--", "-x"]),
    ],
)
def test_arguments_and_status_are_those_of_the_script(
    root: Path,
    capsys: pytest.CaptureFixture[str],
    argv: list[str],
    script: str,
    passed: list[str],
) -> None:
    assert command_line.main(argv) == len(passed)
    assert capsys.readouterr().out == f"{script} {passed}\n"


def test_help_lists_every_script_and_each_script_has_its_own(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as error:
        command_line.main(["--help"])
    assert error.value.code == 0
    listed = [line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines()]
    for name, summary in (
        ("train", "Does train_net."),
        ("evaluate", "Does train_net. --eval-only"),
        ("show", "Does show."),
        ("check-something", "Does check_something."),
        ("prepare-it", "Does prepare_it."),
    ):
        assert [name, summary] in listed
    with pytest.raises(SystemExit) as error:
        command_line.main(["check-something", "--help"])
    assert error.value.code == 0
    assert "usage: batchformer-panoptic check-something" in capsys.readouterr().out


@pytest.mark.parametrize("argv", [[], ["absent"]])
def test_an_unknown_command_is_a_mistake(
    root: Path, capsys: pytest.CaptureFixture[str], argv: list[str]
) -> None:
    with pytest.raises(SystemExit) as error:
        command_line.main(argv)
    assert error.value.code == 2
    assert "COMMAND" in capsys.readouterr().err


def test_the_scripts_of_the_checkout_are_known() -> None:
    assert command_line.ROOT == REPO_ROOT
    paths = {script.path for script in command_line.scripts().values()}
    assert {REPO_ROOT / "train_net.py", REPO_ROOT / "tools" / "check_dataset.py"} <= paths
    assert all(script.summary for script in command_line.scripts().values())


def test_an_installed_package_contains_its_scripts(tmp_path: Path) -> None:
    package = tmp_path / "batchformer_panoptic"
    (package / "configs").mkdir(parents=True)
    shutil.copy(command_line.__file__, package)
    copy = {"__file__": str(package / "command_line.py"), "__name__": "copy"}
    exec(compile((package / "command_line.py").read_text(), copy["__file__"], "exec"), copy)
    assert copy["ROOT"] == package
