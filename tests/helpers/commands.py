"""Loads the scripts of this repository as modules, and finds their documented commands."""

import importlib.util
import os
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

REPO_ROOT = Path(__file__).resolve().parents[2]


def load_script(relative_path: str) -> ModuleType:
    """Import a command of this repository (``tools/x.py``, ``train_net.py``) as a module."""
    path = REPO_ROOT / relative_path
    name = "script_" + relative_path.removesuffix(".py").replace("/", "_")
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None, path
    assert spec.loader is not None, path
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def documented_commands(document: Path) -> list[str]:
    """Lines that start with ``python`` in the document's shell blocks; continued lines joined."""
    blocks = re.findall(r"```bash\n(.*?)```", document.read_text(), re.S)
    text = "\n".join(blocks).replace("\\\n", " ")
    return [line.strip() for line in text.splitlines() if line.startswith("python ")]


def add_benchmarks_to_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the package ``benchmarks`` importable, in processes that are started, too."""
    folders = [str(REPO_ROOT / name) for name in load_script("benchmarks/run.py").FOLDERS]
    for folder in folders:
        monkeypatch.syspath_prepend(folder)
    path = os.pathsep.join([*folders, os.environ.get("PYTHONPATH", "")])
    monkeypatch.setenv("PYTHONPATH", path)
