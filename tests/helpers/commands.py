"""Loads the scripts of this repository as modules."""

import importlib.util
import os
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


def add_benchmarks_to_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the package ``benchmarks`` importable, in processes that are started, too."""
    folders = [str(REPO_ROOT / name) for name in load_script("benchmarks/run.py").FOLDERS]
    for folder in folders:
        monkeypatch.syspath_prepend(folder)
    path = os.pathsep.join([*folders, os.environ.get("PYTHONPATH", "")])
    monkeypatch.setenv("PYTHONPATH", path)
