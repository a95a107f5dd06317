"""The tests of the library, run where there is torch and nothing else."""

import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from helpers.commands import REPO_ROOT


def requirements_of(names: list[str]) -> set[str]:
    """Names of distributions and of all that they require here."""
    found: set[str] = set()
    todo = list(names)
    while todo:
        name = todo.pop().lower().replace("_", "-")
        if name in found:
            continue
        found.add(name)
        for line in metadata.requires(name) or []:
            requirement = Requirement(line)
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                todo.append(requirement.name)
    return found


def link_distributions(names: set[str], folder: Path) -> None:
    """Make a folder of packages with only these distributions."""
    for name in names:
        distribution = metadata.distribution(name)
        for file in distribution.files or []:
            top = file.parts[0]
            if top not in ("..", "__pycache__") and not (folder / top).exists():
                (folder / top).symlink_to(Path(str(distribution.locate_file(top))).resolve())


def run_python(folder: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    """Run Python without its own packages (-S), with those of ``folder``."""
    path = os.pathsep.join([str(folder), str(REPO_ROOT / "projects")])
    return subprocess.run(
        [sys.executable, "-S", *arguments],
        env={**os.environ, "PYTHONPATH": path},
        cwd=folder,
        capture_output=True,
        text=True,
    )


@pytest.mark.slow
def test_library_where_there_is_torch_alone(tmp_path: Path) -> None:
    link_distributions(requirements_of(["torch", "pytest"]), tmp_path)
    modules = [
        "detectron2",
        "fvcore",
        "numpy",
        "scipy",
        "timm",
        "torchvision",
        "transformers",
        "yaml",
        "cv2",
        "PIL",
    ]
    missing = f"import importlib.util as u; print([m for m in {modules} if u.find_spec(m)])"
    assert run_python(tmp_path, "-c", missing).stdout.strip() == "[]"
    tests = REPO_ROOT / "tests" / "batchformer"
    options = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "--noconftest", "-c", os.devnull]
    result = run_python(tmp_path, *options, f"--rootdir={tests}", str(tests))
    assert result.returncode == 0, result.stdout + result.stderr
    summary = result.stdout.strip().splitlines()[-1]
    assert "passed" in summary
    assert "skipped" in summary  # models of packages that are not there
    assert int(summary.split(" passed")[0].split()[-1]) > 80, summary
