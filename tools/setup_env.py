"""Build or complete the Python environment of the Makefile targets; run by ``make env``.

    python tools/setup_env.py --venv .venv --stamp .venv/ready

venv creates the environment and pip fills it. This script adds what they do not do:

* Detectron2 comes from a wheel that is tagged for Python 3.10 but is plain Python.
* An environment that this script created gets the pins of constraints.txt, and is built again if
  the set-up was interrupted. Every other environment keeps all that is installed in it, such as a
  Detectron2 or a CUDA build of torch, and only missing packages are added.
* An unsuitable Python or a full disk is reported in one line, before the download. For this, the
  script uses only the standard library and the syntax of Python 3.7.
"""

from __future__ import annotations

import argparse
import configparser
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
CONSTRAINTS = ROOT / "constraints.txt"
OLDEST, NEWEST = (3, 10), (3, 12)  # numpy 1 has no build for a later Python
DISK_GB = 8  # 5.5 GB when finished, and room to unpack

# Marks a virtual environment that this script created.
STATE_FILE = ".setup-state"
BUILDING, COMPLETE = "building", "complete"

# An empty folder called detectron2 passes for a module, but has no origin.
PROBE = """
import importlib.metadata, importlib.util, json, sys, sysconfig
specs = [importlib.util.find_spec(name) for name in ("detectron2", "panopticapi")]
print(json.dumps({
    "python": sys.version_info[:2],
    "site": sysconfig.get_path("purelib"),
    "modules": [spec.name for spec in specs if spec and spec.origin],
    "versions": {d.metadata["Name"]: d.version for d in importlib.metadata.distributions()},
}))
"""
PROJECT = "batchformer-panoptic"
BUILD_TOOLS = ["pip", "setuptools", "wheel"]
DETECTRON2 = "sal-detectron2"  # upstream's code of April 2024


class SetupError(Exception):
    """A problem that the user can solve; the message is one line."""


def run(command: list[str], purpose: str) -> None:
    print(f"env: {purpose} ...", flush=True)
    # Not in the checkout, whose folders would be importable as packages.
    if subprocess.call(command, cwd=tempfile.gettempdir(), stdin=subprocess.DEVNULL):
        raise SetupError(f"{purpose}: failed (see above); fix the cause and run `make env` again")


def pip(python: Path, arguments: list[str], purpose: str) -> None:
    quiet = ["-qq", "--no-warn-conflicts", "--disable-pip-version-check", "--no-input"]
    run([str(python), "-m", "pip", "install", *quiet, *arguments], purpose)


def probe(python: Path) -> dict[str, Any]:
    """Return version, site-packages folder, modules and package versions of an environment."""
    command = [str(python), "-c", PROBE]
    done = subprocess.run(command, cwd=tempfile.gettempdir(), stdout=subprocess.PIPE, check=False)
    if done.returncode:
        raise SetupError(f"{python} does not run: choose another environment or delete this one")
    found = json.loads(done.stdout)
    found["versions"] = {normalise(k): v for k, v in found["versions"].items() if k != PROJECT}
    return found


def normalise(requirement: str) -> str:
    """Return the name in a requirement in the spelling that package indexes compare."""
    found = re.match(r"[A-Za-z0-9._-]+", requirement)
    return re.sub(r"[-_.]+", "-", found.group()).lower() if found else ""


def requirements(*extras: str) -> list[str]:
    """Return the requirements of setup.cfg and of some of its extras."""
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg", encoding="utf-8")
    texts = [config["options"]["install_requires"]]
    texts += [config["options.extras_require"][extra] for extra in extras]
    lines = [line.strip() for text in texts for line in text.splitlines()]
    return [line for line in lines if line and not line.startswith("#")]


def pinned(name: str) -> str:
    """Return the line ``name==version`` of constraints.txt."""
    lines = CONSTRAINTS.read_text(encoding="utf-8").splitlines()
    return next(line.strip() for line in lines if normalise(line) == name)


def check_python(version: tuple[int, ...], newest: tuple[int, int] | None = NEWEST) -> None:
    if version[:2] < OLDEST or (newest is not None and version[:2] > newest):
        raise SetupError(
            f"Python {version[0]}.{version[1]} does not fit: 3.10, 3.11 or 3.12 is needed; "
            "name one with `make PYTHON=python3.11`"
        )


def check_disk(folder: Path) -> None:
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(existing).free / 1e9
    if free < DISK_GB:
        raise SetupError(
            f"{existing} has {free:.1f} GB free and {DISK_GB} GB are needed: make room, "
            "or put the environment elsewhere with `make VENV=/elsewhere/venv`"
        )


def prepare_venv(venv: Path) -> tuple[Path, bool]:
    """Create or find a virtual environment; return its Python, and whether this script made it."""
    state, python = venv / STATE_FILE, venv / "bin" / "python"
    if state.exists() and (state.read_text() != COMPLETE or not python.exists()):
        shutil.rmtree(venv)  # an interrupted pip may have left half a package
    if not python.exists():
        if venv.exists() and any(venv.iterdir()):
            raise SetupError(f"{venv} exists and is not a virtual environment: delete or rename it")
        check_python(sys.version_info[:2])
        check_disk(venv)
        venv.mkdir(parents=True, exist_ok=True)
        state.write_text(BUILDING)
        run([sys.executable, "-m", "venv", str(venv)], f"creating {venv}")
    return python, state.exists()


def fill_ours(python: Path) -> None:
    """Install exactly the pins of constraints.txt."""
    constraint = ["--constraint", str(CONSTRAINTS)]
    pip(python, ["--upgrade", *constraint, *BUILD_TOOLS], "installing pip")
    project = ["--no-build-isolation", "--editable", f"{ROOT}[detectron2-needs,test,dev]"]
    pip(python, [*constraint, *project], "installing torch and the rest (up to 3 GB to download)")
    install_detectron2(python, probe(python)["site"])


def fill_foreign(python: Path) -> None:
    """Install what an existing environment lacks; everything installed keeps its version.

    The peers of the extra ``test`` are left out: tests that need an absent one are skipped.
    """
    found = probe(python)
    own_detectron2, have = "detectron2" in found["modules"], found["versions"]
    check_python(tuple(found["python"]), None if own_detectron2 else NEWEST)
    wanted = requirements("dev") if own_detectron2 else requirements("dev", "detectron2-needs")
    if "torch" not in have:
        check_disk(python)
        wanted += [pinned("torch"), pinned("torchvision")]
    # A second build of OpenCV would overwrite parts of the first. The metadata of panopticapi-lite
    # requires numpy 1, which its code does not need: it is installed without dependencies.
    left_out = ["panopticapi-lite"]
    left_out += ["opencv-python"] if any(name.startswith("opencv-") for name in have) else []
    with tempfile.TemporaryDirectory() as folder:
        frozen = Path(folder) / "constraints.txt"
        frozen.write_text("".join(f"{name}=={version}\n" for name, version in have.items()))
        missing = [line for line in wanted if normalise(line) not in left_out]
        pip(python, ["--constraint", str(frozen), *missing], "installing what is missing")
    if "panopticapi" not in found["modules"]:
        pip(python, ["--no-deps", pinned("panopticapi-lite")], "installing panopticapi")
    if not own_detectron2:
        install_detectron2(python, found["site"])
    pip(python, ["--no-deps", "--editable", str(ROOT)], "installing this project")


def install_detectron2(python: Path, site_packages: str) -> None:
    tags = ["--python-version=3.10", "--implementation=cp", "--abi=none", "--only-binary=:all:"]
    where = ["--no-deps", "--upgrade", "--target", site_packages]
    pip(python, [*where, *tags, pinned(DETECTRON2)], "installing Detectron2")


def set_up(venv: Path | None) -> None:
    """Bring a virtual environment (None: that of this interpreter) up to date."""
    python, ours = (Path(sys.executable), False) if venv is None else prepare_venv(venv)
    if ours:
        (venv / STATE_FILE).write_text(BUILDING)
        fill_ours(python)
        (venv / STATE_FILE).write_text(COMPLETE)
    else:
        fill_foreign(python)
    # A missing system library shows only when the modules are imported.
    code = "import torch, torchvision, cv2, panopticapi, detectron2.engine, batchformer_panoptic"
    purpose = "checking imports (no libGL: apt-get install libgl1)"
    run([str(python), "-W", "ignore", "-c", code], purpose)
    print(f"env: ready: {python}")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--venv", type=Path, help="virtual environment to create or to complete")
    where.add_argument("--system", action="store_true", help="complete this Python's environment")
    parser.add_argument("--stamp", type=Path, required=True, help="file to touch at the end")
    arguments = parser.parse_args(argv)
    try:
        # Not resolve(): bin/python of a virtual environment is a link that leaves it.
        set_up(None if arguments.system else Path(os.path.abspath(arguments.venv)))
    except SetupError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    arguments.stamp.touch()
    return 0


if __name__ == "__main__":
    sys.exit(main())
