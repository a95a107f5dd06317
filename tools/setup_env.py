"""Build, complete or repair the Python environment that the targets of the Makefile use.

Run by ``make env`` and written for the standard library of any Python 3.7 or later, so that an
unsuitable one gets a sentence and not a syntax error.

Two kinds of environment are told apart. One that this command created is *ours*: it gets exactly
the pins of constraints.txt, and is built afresh if a set-up was interrupted. Any other keeps
everything it has, a Detectron2 or a CUDA build of torch above all, and only gets what is missing.
"""

from __future__ import annotations

import argparse
import configparser
import contextlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CONSTRAINTS = ROOT / "constraints.txt"
OLDEST, NEWEST = (3, 10), (3, 12)  # numpy 1 has no build for a later Python
DISK_GB = 8  # 5.5 GB in the end, and room to unpack

# Lies in a virtual environment that this command created and tells how far it came.
STATE_FILE = ".setup-state"
BUILDING, COMPLETE = "building", "complete"

PROJECT = "batchformer-panoptic"
BUILD_TOOLS = ["pip", "setuptools", "wheel"]
DETECTRON2 = "sal-detectron2"  # upstream of April 2024; the code is plain Python


class SetupError(Exception):
    """Something the user can mend; the message is one line."""


def say(message: str) -> None:
    print(f"env: {message}", flush=True)


def run(command: list[str], purpose: str) -> None:
    """Run a command whose errors the user sees; SetupError names the purpose if it fails."""
    started = time.monotonic()
    say(f"{purpose} ...")
    # Elsewhere than in the checkout, whose folders would pass for packages.
    code = subprocess.call(command, cwd=tempfile.gettempdir(), stdin=subprocess.DEVNULL)
    if code != 0:
        raise SetupError(f"{purpose}: failed (see above); mend the cause and run `make env` again")
    say(f"{purpose}: {time.monotonic() - started:.0f} s")


def pip(python: Path, arguments: list[str], purpose: str) -> None:
    """Run pip of an environment: errors are shown, warnings and progress are not."""
    quiet = ["-qq", "--no-warn-conflicts", "--disable-pip-version-check", "--no-input"]
    run([str(python), "-m", "pip", "install", *quiet, *arguments], purpose)


def ask(python: Path, code: str, *arguments: str) -> str:
    """Return what a piece of Python prints in an environment."""
    answer = subprocess.run(
        [str(python), "-c", code, *arguments],
        cwd=tempfile.gettempdir(),
        stdout=subprocess.PIPE,
        check=False,
    )
    if answer.returncode != 0:
        raise SetupError(f"{python} does not run: choose another environment or delete this one")
    return answer.stdout.decode().strip()


def has_module(python: Path, name: str) -> bool:
    """Tell whether an environment has a module; an empty folder of that name is none."""
    code = "import sys, importlib.util as u; s = u.find_spec(sys.argv[1]); print(s and s.origin)"
    return ask(python, code, name) not in ("", "None")


def installed_versions(python: Path) -> dict[str, str]:
    """Return {normalised name: version} of what an environment holds, this project left out."""
    code = (
        "import importlib.metadata as m\n"
        "for d in m.distributions(): print(d.metadata['Name'], d.version)"
    )
    pairs = [line.split() for line in ask(python, code).splitlines()]
    versions = {normalise(pair[0]): pair[1] for pair in pairs if len(pair) == 2}
    versions.pop(PROJECT, None)
    return versions


def normalise(requirement: str) -> str:
    """Return the name in a requirement, spelt as package indexes compare names."""
    found = re.match(r"[A-Za-z0-9._-]+", requirement)
    return re.sub(r"[-_.]+", "-", found.group()).lower() if found else ""


def requirements(*sections: str) -> list[str]:
    """Return the requirement lines of setup.cfg: "" for install_requires, else an extra's name."""
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg", encoding="utf-8")
    lines = []
    for section in sections:
        if section:
            text = config["options.extras_require"][section]
        else:
            text = config["options"]["install_requires"]
        lines += [line.strip() for line in text.splitlines()]
    return [line for line in lines if line and not line.startswith("#")]


def pinned(name: str) -> str:
    """Return the line ``name==version`` of constraints.txt for a package without variants."""
    for line in CONSTRAINTS.read_text(encoding="utf-8").splitlines():
        if normalise(line) == name:
            return line.strip()
    raise SetupError(f"constraints.txt does not pin {name}: add it")


def check_python(version: tuple[int, ...], newest: tuple[int, int] | None = NEWEST) -> None:
    if version[:2] >= OLDEST and (newest is None or version[:2] <= newest):
        return
    found = ".".join(map(str, version[:2]))
    raise SetupError(
        f"Python {found} does not fit: 3.10, 3.11 or 3.12 is needed; "
        "name one with `make PYTHON=python3.11`"
    )


def check_venv_module() -> None:
    try:
        import ensurepip  # noqa: F401  Debian ships venv without it
        import venv  # noqa: F401
    except ImportError:
        found = f"python{sys.version_info[0]}.{sys.version_info[1]}"
        raise SetupError(
            f"{found} cannot make virtual environments: install its venv module "
            f"(Debian and Ubuntu: apt-get install {found}-venv)"
        ) from None


def check_disk(folder: Path) -> None:
    """Refuse to begin where torch and its libraries would not fit."""
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(existing).free / 1e9
    if free < DISK_GB:
        raise SetupError(
            f"{existing} has {free:.1f} GB free and {DISK_GB} GB are needed: make room, "
            "or put the environment elsewhere with `make VENV=/elsewhere/venv`"
        )


def prepare_venv(venv: Path) -> tuple[Path, bool]:
    """Create the virtual environment, or find it; (its Python, whether it is ours)."""
    state, python = venv / STATE_FILE, venv / "bin" / "python"
    if state.exists() and (state.read_text() != COMPLETE or not python.exists()):
        say(f"the last set-up of {venv} did not finish: building it afresh")
        shutil.rmtree(venv)
    if not python.exists():
        if venv.exists() and any(venv.iterdir()):
            raise SetupError(f"{venv} exists and is no virtual environment: delete or rename it")
        check_python(sys.version_info[:2])
        check_venv_module()
        check_disk(venv)
        venv.mkdir(parents=True, exist_ok=True)
        state.write_text(BUILDING)
        run([sys.executable, "-m", "venv", str(venv)], f"creating {venv}")
    return python, state.exists()


def fill_ours(python: Path) -> None:
    """Install the pins: nothing is taken from outside constraints.txt."""
    constraint = ["--constraint", str(CONSTRAINTS), "--no-build-isolation"]
    pip(python, ["--upgrade", "--constraint", str(CONSTRAINTS), *BUILD_TOOLS], "installing pip")
    wanted = requirements("", "detectron2-needs", "test", "dev")
    pip(python, [*constraint, *wanted], "installing torch and the rest (up to 3 GB to download)")
    wanted_version = pinned(DETECTRON2).partition("==")[2]
    if installed_versions(python).get(DETECTRON2, wanted_version) != wanted_version:
        install_detectron2(python, ["--upgrade"])
    elif not has_module(python, "detectron2"):
        install_detectron2(python, [])
    editable = ["--no-deps", "--no-build-isolation", "--editable", str(ROOT)]
    pip(python, editable, "installing this project")


def fill_foreign(python: Path) -> None:
    """Install what somebody's own environment lacks; whatever it has stays as it is.

    The peers of the extra ``test`` are left out: tests that need an absent one are skipped.
    """
    have = installed_versions(python)
    own_detectron2 = has_module(python, "detectron2")
    version = ask(python, "import sys; print(*sys.version_info[:2])")
    check_python(tuple(map(int, version.split())), None if own_detectron2 else NEWEST)
    wanted = requirements("", "dev")
    if not own_detectron2:
        wanted += requirements("detectron2-needs")
    if "torch" not in have:
        check_disk(python)
        wanted += [pinned("torch"), pinned("torchvision")]
    # One build of OpenCV is enough: a second one would overwrite parts of the first.
    if any(name.startswith("opencv-") for name in have):
        wanted = [line for line in wanted if normalise(line) != "opencv-python"]
    # Its metadata asks for numpy 1, which its code does not.
    wanted = [line for line in wanted if normalise(line) != "panopticapi-lite"]
    with tempfile.TemporaryDirectory() as folder:
        frozen = Path(folder) / "constraints.txt"
        frozen.write_text("".join(f"{name}=={version}\n" for name, version in have.items()))
        pip(python, ["--constraint", str(frozen), *wanted], "installing what is missing")
    if not has_module(python, "panopticapi"):
        pip(python, ["--no-deps", pinned("panopticapi-lite")], "installing panopticapi")
    if own_detectron2:
        say("using the detectron2 that is there")
    else:
        install_detectron2(python, [])
    pip(python, ["--no-deps", "--editable", str(ROOT)], "installing this project")


def install_detectron2(python: Path, options: list[str]) -> None:
    """Install the Detectron2 wheel, which is marked for Python 3.10 but is plain Python."""
    target = ask(python, "import sysconfig; print(sysconfig.get_path('purelib'))")
    tags = ["--python-version", "3.10", "--implementation", "cp", "--abi", "none"]
    arguments = ["--no-deps", "--target", target, *tags, "--only-binary=:all:", *options]
    pip(python, [*arguments, pinned(DETECTRON2)], "installing Detectron2")


def check_imports(python: Path) -> None:
    """Import the large parts once, so that a missing system library shows here."""
    code = "import torch, torchvision, cv2, panopticapi, detectron2.engine, batchformer_panoptic"
    run(
        [str(python), "-W", "ignore", "-c", code],
        "checking imports (no libGL: apt-get install libgl1)",
    )


@contextlib.contextmanager
def one_at_a_time() -> Iterator[None]:
    """Hold the lock of this checkout; a second set-up waits for the first."""
    import fcntl  # not on Windows, where Detectron2 is not supported either

    with CONSTRAINTS.open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            say("waiting for another set-up in this checkout")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def is_fresh(stamp: Path) -> bool:
    """Tell whether a set-up finished after the last change of what it depends on."""
    sources = [CONSTRAINTS, ROOT / "setup.cfg", ROOT / "pyproject.toml", Path(__file__)]
    return stamp.exists() and stamp.stat().st_mtime > max(s.stat().st_mtime for s in sources)


def set_up(venv: Path | None, stamp: Path) -> None:
    """Bring an environment (None: that of this interpreter) up to date and touch the stamp."""
    if venv is None:
        python, ours = Path(sys.executable), False
    else:
        python, ours = prepare_venv(venv)
    if ours:
        state = python.parents[1] / STATE_FILE
        state.write_text(BUILDING)
        fill_ours(python)
        state.write_text(COMPLETE)
    else:
        fill_foreign(python)
    check_imports(python)
    stamp.parent.mkdir(parents=True, exist_ok=True)
    stamp.touch()
    say(f"ready: {python}")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--venv", type=Path, help="virtual environment to create or to complete")
    where.add_argument("--system", action="store_true", help="complete this Python's environment")
    parser.add_argument("--stamp", type=Path, required=True, help="file to touch when done")
    arguments = parser.parse_args(argv)
    # Not resolve(): bin/python of a virtual environment is a link out of it.
    venv = None if arguments.system else Path(os.path.abspath(arguments.venv))
    try:
        with one_at_a_time():
            if not is_fresh(arguments.stamp):
                set_up(venv, Path(os.path.abspath(arguments.stamp)))
    except SetupError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
