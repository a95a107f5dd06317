"""The installed package: imports, dependencies and pins, set-up, contents of the wheel."""

import ast
import configparser
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from helpers.commands import REPO_ROOT, load_script

PROJECTS = REPO_ROOT / "projects"
PACKAGE = PROJECTS / "batchformer_panoptic"
DOCUMENTS = [path for path in sorted(REPO_ROOT.glob("*.md")) if path.name != "CHANGELOG.md"]

# Modules whose distribution has another name.
DISTRIBUTION_OF = {
    "cv2": "opencv-python",
    "panopticapi": "panopticapi-lite",
    "PIL": "pillow",
    "yaml": "pyyaml",
}
# Detectron2 brings these along wherever it comes from (setup.cfg, extra detectron2-needs).
WITH_DETECTRON2 = {"detectron2", "yacs", "termcolor", "tqdm", "cloudpickle", "matplotlib"}

WITHOUT_DETECTRON2 = """
import importlib.abc
import sys

class Refuse(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {refused}:
            raise ImportError("refused: " + name)

sys.meta_path.insert(0, Refuse())
{code}
"""


def normalise(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def setup_cfg() -> configparser.ConfigParser:
    config = configparser.ConfigParser()
    config.read(REPO_ROOT / "setup.cfg", encoding="utf-8")
    return config


def required(section: str, key: str) -> list[str]:
    lines = [line.strip() for line in setup_cfg()[section][key].splitlines()]
    return [line for line in lines if line and not line.startswith("#")]


def required_names(section: str, key: str) -> set[str]:
    names = (re.match(r"[A-Za-z0-9._-]+", line) for line in required(section, key))
    return {normalise(name.group()) for name in names if name}


def constraints() -> list[str]:
    lines = (REPO_ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def pins() -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for line in constraints():
        name, version = line.partition(";")[0].split("==")
        found.setdefault(normalise(name), set()).add(version.strip())
    return found


@pytest.fixture(name="setup_env")
def _setup_env() -> ModuleType:
    return load_script("tools/setup_env.py")


def run_refusing(refused: set[str], code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", WITHOUT_DETECTRON2.format(refused=refused, code=code)],
        env={**os.environ, "PYTHONPATH": str(PROJECTS)},
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_block_needs_torch_alone() -> None:
    refused = {"detectron2", "fvcore", "torchvision", "cv2", "scipy", "panopticapi"}
    code = "from batchformer_panoptic.batchformer import BatchFormerV2\nprint(BatchFormerV2)"
    result = run_refusing(refused, code)
    assert result.returncode == 0, result.stderr
    assert "batchformer_panoptic.batchformer" in result.stdout


def test_refusing_detectron2_bites() -> None:
    result = run_refusing({"detectron2"}, "from batchformer_panoptic import PanopticDETR")
    assert "refused: detectron2" in result.stderr


def test_every_folder_of_modules_is_a_package() -> None:
    folders = {path.parent for path in PACKAGE.rglob("*.py")}
    assert PACKAGE / "modeling" in folders
    assert [str(folder) for folder in folders if not (folder / "__init__.py").exists()] == []


def test_imports_are_declared() -> None:
    declared = required_names("options", "install_requires") | WITH_DETECTRON2
    declared |= required_names("options.extras_require", "timm")
    for extra in ("heic", "wandb", "mlflow", "onnx"):
        declared |= required_names("options.extras_require", extra)
    imported: dict[str, str] = {}
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
                names = [node.module]
            else:
                continue
            imported.update({name.partition(".")[0]: str(path) for name in names})
    ours = {*sys.stdlib_module_names, "batchformer_panoptic"}
    undeclared = {
        module: path
        for module, path in imported.items()
        if module not in ours and normalise(DISTRIBUTION_OF.get(module, module)) not in declared
    }
    assert undeclared == {}


def test_every_constraint_is_an_exact_pin() -> None:
    pattern = r"[A-Za-z0-9._-]+==[A-Za-z0-9.]+(; python_version (<|>=) \"3\.11\")?"
    assert [line for line in constraints() if not re.fullmatch(pattern, line)] == []


def test_a_package_has_one_pin_per_python() -> None:
    keys = [
        (normalise(line.split("==")[0]), line.partition(";")[2].strip()) for line in constraints()
    ]
    assert len(keys) == len(set(keys))
    for name, marker in keys:
        assert not marker or (name, "") not in keys, f"{name} is pinned with and without a marker"


@pytest.mark.parametrize(
    ("section", "key"),
    [("options", "install_requires")]
    + [("options.extras_require", key) for key in setup_cfg()["options.extras_require"]],
)
def test_every_requirement_is_pinned(section: str, key: str) -> None:
    assert required_names(section, key) - pins().keys() == set()


def test_set_up_tools_are_pinned(setup_env: ModuleType) -> None:
    assert {*setup_env.BUILD_TOOLS, setup_env.DETECTRON2} <= pins().keys()


def test_detectron2_is_never_a_requirement() -> None:
    names = set.union(
        required_names("options", "install_requires"),
        *(
            required_names("options.extras_require", key)
            for key in setup_cfg()["options.extras_require"]
        ),
    )
    assert "torch" in names
    assert not any("detectron2" in name for name in names)


def test_torch_has_no_upper_bound() -> None:
    ranges = [line for line in required("options", "install_requires") if "torch" in line]
    assert ranges == ["torch>=2.6", "torchvision"]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_documents_quote_the_pins(document: Path) -> None:
    quoted = re.findall(r"([A-Za-z][\w.-]*)==(\d[\w.]*\w)", document.read_text(encoding="utf-8"))
    wrong = [
        f"{name}=={version}"
        for name, version in quoted
        if version not in pins().get(normalise(name), set())
    ]
    assert wrong == []


def test_the_oldest_and_newest_python_agree(setup_env: ModuleType) -> None:
    oldest = "{}.{}".format(*setup_env.OLDEST)
    newest = "{}.{}".format(*setup_env.NEWEST)
    assert setup_cfg()["options"]["python_requires"] == f">={oldest}"
    classified = re.findall(r"Python :: (3\.\d+)", setup_cfg()["metadata"]["classifiers"])
    assert (classified[0], classified[-1]) == (oldest, newest)
    pyproject = (REPO_ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert f'target-version = "py{oldest.replace(".", "")}"' in pyproject
    assert f'python_version = "{oldest}"' in pyproject
    install = (REPO_ROOT / "INSTALL.md").read_text(encoding="utf-8")
    assert f"Python {', '.join(classified[:-1])} or {newest}" in install


def test_the_disk_space_in_install_is_the_one_checked(setup_env: ModuleType) -> None:
    install = (REPO_ROOT / "INSTALL.md").read_text(encoding="utf-8")
    assert f"{setup_env.DISK_GB} GB of free disk" in install


@pytest.mark.parametrize("version", [(3, 8), (3, 9), (3, 13), (4, 0)])
def test_another_python_is_refused(setup_env: ModuleType, version: tuple[int, int]) -> None:
    with pytest.raises(setup_env.SetupError, match=rf"Python {version[0]}\.{version[1]} does not"):
        setup_env.check_python(version)


@pytest.mark.parametrize("version", [(3, 10), (3, 11), (3, 12)])
def test_supported_pythons_are_accepted(setup_env: ModuleType, version: tuple[int, int]) -> None:
    assert setup_env.check_python(version) is None


def test_a_newer_python_is_accepted_with_a_detectron2_of_its_own(setup_env: ModuleType) -> None:
    assert setup_env.check_python((3, 13), None) is None


def test_a_full_disk_is_refused(
    setup_env: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        shutil, "disk_usage", lambda path: SimpleNamespace(free=3.5e9 if path == tmp_path else 0)
    )
    with pytest.raises(setup_env.SetupError, match=r"has 3\.5 GB free and 8 GB are needed"):
        setup_env.check_disk(tmp_path / "not" / "there")


def test_a_folder_that_is_no_environment_is_left_alone(
    setup_env: ModuleType, tmp_path: Path
) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(setup_env.SetupError, match="is not a virtual environment"):
        setup_env.prepare_venv(tmp_path)
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def fake_venv(folder: Path) -> None:
    (folder / "bin").mkdir(parents=True)
    (folder / "bin" / "python").touch()
    (folder / "half-installed").touch()


def test_an_interrupted_set_up_starts_again(
    setup_env: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    venv = tmp_path / "venv"
    fake_venv(venv)
    (venv / setup_env.STATE_FILE).write_text(setup_env.BUILDING)
    created = []
    monkeypatch.setattr(setup_env, "run", lambda command, purpose: created.append(command))
    monkeypatch.setattr(setup_env, "check_disk", lambda folder: None)
    assert setup_env.prepare_venv(venv) == (venv / "bin" / "python", True)
    assert created == [[sys.executable, "-m", "venv", str(venv)]]
    assert not (venv / "half-installed").exists()
    assert (venv / setup_env.STATE_FILE).read_text() == setup_env.BUILDING


@pytest.mark.parametrize("ours", [True, False])
def test_a_finished_environment_is_kept(setup_env: ModuleType, tmp_path: Path, ours: bool) -> None:
    fake_venv(tmp_path)
    if ours:
        (tmp_path / setup_env.STATE_FILE).write_text(setup_env.COMPLETE)
    assert setup_env.prepare_venv(tmp_path) == (tmp_path / "bin" / "python", ours)
    assert (tmp_path / "half-installed").exists()


def record_pip(
    setup_env: ModuleType, monkeypatch: pytest.MonkeyPatch, **found: object
) -> list[list[str]]:
    """The arguments of each call of pip for an environment of which ``found`` is known."""
    calls: list[list[str]] = []

    def record(python: Path, arguments: list[str], purpose: str) -> None:
        calls.append(arguments)
        path = Path(arguments[1])
        if arguments[0] == "--constraint" and path != setup_env.CONSTRAINTS:
            calls[-1] = [*arguments, *path.read_text().splitlines()]

    monkeypatch.setattr(setup_env, "pip", record)
    monkeypatch.setattr(setup_env, "probe", lambda python: {"site": "site-packages", **found})
    return calls


def test_peers_of_the_tests_are_only_for_our_environment(
    setup_env: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    have = {"torch": "2.6.0", setup_env.DETECTRON2: setup_env.pinned(setup_env.DETECTRON2)[-5:]}
    modules = ["detectron2", "panopticapi"]
    calls = record_pip(setup_env, monkeypatch, python=[3, 11], modules=modules, versions=have)
    setup_env.fill_foreign(Path("python"))
    installed = [word for call in calls for word in call]
    assert not any(word.startswith(("timm", "transformers", "efficientnet")) for word in installed)
    assert "ruff>=0.6" in installed
    calls.clear()
    setup_env.fill_ours(Path("python"))
    assert len(required("options.extras_require", "test")) >= 4
    (project,) = [word for call in calls for word in call if word.startswith(f"{REPO_ROOT}[")]
    assert project == f"{REPO_ROOT}[detectron2-needs,test,dev]"
    assert all("--constraint" in call for call in calls[:-1])
    assert calls[-1][-1] == setup_env.pinned(setup_env.DETECTRON2)


def test_what_an_environment_has_is_frozen(
    setup_env: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An installed CUDA build of torch, Detectron2 and OpenCV are not changed."""
    have = {"torch": "2.6.0+cu126", "numpy": "2.1.0", "opencv-python-headless": "4.12.0.88"}
    modules = ["detectron2", "panopticapi"]
    calls = record_pip(setup_env, monkeypatch, python=[3, 13], modules=modules, versions=have)
    setup_env.fill_foreign(Path("python"))
    words = [word for call in calls for word in call]
    frozen = {f"{name}=={version}" for name, version in have.items()}
    assert {word for word in words if "==" in word} == frozen
    others = set(words) - frozen
    assert not any(word.startswith(("sal-", "opencv", "numpy<", "torch==")) for word in others)
    assert calls[-1][-2:] == ["--editable", str(REPO_ROOT)]


def test_what_an_environment_lacks_is_added(
    setup_env: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(setup_env, "check_disk", lambda folder: None)
    calls = record_pip(setup_env, monkeypatch, python=[3, 12], modules=[], versions={})
    setup_env.fill_foreign(Path("python"))
    missing, panopticapi, detectron2, project = calls
    assert {setup_env.pinned("torch"), "numpy<2", "opencv-python>=4.6"} <= set(missing)
    assert panopticapi == ["--no-deps", setup_env.pinned("panopticapi-lite")]
    assert detectron2[-1] == setup_env.pinned(setup_env.DETECTRON2)
    assert detectron2[detectron2.index("--target") + 1] == "site-packages"
    assert project == ["--no-deps", "--editable", str(REPO_ROOT)]


def test_an_environment_describes_itself(setup_env: ModuleType, tmp_path: Path) -> None:
    found = setup_env.probe(Path(sys.executable))
    assert found["python"] == list(sys.version_info[:2])
    assert found["modules"] == ["detectron2", "panopticapi"]
    assert "torch" in found["versions"]
    assert setup_env.PROJECT not in found["versions"]
    assert Path(found["site"]).is_dir()
    broken = tmp_path / "python"
    broken.write_text("#!/bin/sh\nexit 1\n")
    broken.chmod(0o755)
    with pytest.raises(setup_env.SetupError, match="does not run"):
        setup_env.probe(broken)


def test_a_failed_set_up_is_one_line_and_status_2(
    setup_env: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "notes.txt").touch()
    stamp = tmp_path / "stamp"
    assert setup_env.main(["--venv", str(tmp_path), "--stamp", str(stamp)]) == 2
    assert capfd.readouterr().err.startswith(f"error: {tmp_path} exists and is not a virtual")
    monkeypatch.setattr(setup_env, "fill_foreign", lambda python: setup_env.run(["false"], "work"))
    assert setup_env.main(["--system", "--stamp", str(stamp)]) == 2
    assert capfd.readouterr().err.startswith("error: work: failed (see above)")
    assert not stamp.exists()


# Builds what `pip install` and `python -m build` build, without an environment of its own.
BUILD = """
import sys
from setuptools import build_meta
print(getattr(build_meta, sys.argv[1])(sys.argv[2]))
"""


def build(hook: str, source: Path, output: Path) -> Path:
    """Call a hook of the build backend and return the file that it wrote."""
    output.mkdir(exist_ok=True)
    command = [sys.executable, "-W", "ignore", "-c", BUILD, hook, str(output)]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True, check=True)
    return output / done.stdout.split()[-1]


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the checkout, since the backend writes into it."""
    folder = tmp_path_factory.mktemp("checkout")
    files = ["setup.py", "setup.cfg", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"]
    for name in [*files, "constraints.txt", "train_net.py"]:
        shutil.copy(REPO_ROOT / name, folder)
    ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in ("projects", "configs", "demo", "tools"):
        shutil.copytree(REPO_ROOT / name, folder / name, ignore=ignored)
    (folder / "datasets").mkdir()
    for path in (REPO_ROOT / "datasets").glob("*.py"):
        shutil.copy(path, folder / "datasets")
    return folder


@pytest.fixture(scope="module")
def wheel(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel that is built from the source distribution."""
    folder = tmp_path_factory.mktemp("built")
    shutil.unpack_archive(build("build_sdist", checkout, folder), folder)
    (source,) = [path for path in folder.iterdir() if path.is_dir()]
    return build("build_wheel", source, folder)


def test_the_wheel_contains_modules_configs_and_commands(wheel: Path, checkout: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if name.startswith(f"{PACKAGE.name}/")}
        entry_points = archive.read(
            next(name for name in archive.namelist() if name.endswith("entry_points.txt"))
        )
    expected = {path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py")}
    expected.add("deployment/page.html")
    for pattern in (
        "train_net.py",
        "demo/*.py",
        "tools/*.py",
        "datasets/*.py",
        "configs/**/*.yaml",
    ):
        found = {path.relative_to(checkout).as_posix() for path in checkout.glob(pattern)}
        assert found, pattern
        expected |= found
    # These work on the checkout itself.
    left_out = ("count_structure", "make_model_zoo", "setup_env", "study")
    expected -= {f"tools/{name}.py" for name in left_out}
    assert names == {f"{PACKAGE.name}/{name}" for name in expected}
    assert b"batchformer-panoptic = batchformer_panoptic.command_line:main" in entry_points


def test_an_editable_installation_uses_the_checkout(checkout: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(build("build_editable", checkout, tmp_path)) as archive:
        (link,) = [name for name in archive.namelist() if "dist-info" not in name]
        assert archive.read(link).decode().strip() == str(checkout / "projects")


@pytest.mark.slow
def test_the_wheel_works_without_a_checkout(wheel: Path, tmp_path: Path) -> None:
    site, empty = tmp_path / "site", tmp_path / "empty"
    shutil.unpack_archive(wheel, site, "zip")
    empty.mkdir()
    command = [sys.executable, "-W", "ignore", "-m", "batchformer_panoptic.command_line"]
    command += ["analyze-model", "--config-file", "configs/quickstart/mask2former_shapes.yaml"]
    command += ["--tasks", "parameter", "--opts", "MODEL.DETR.NUM_CLASSES", "7"]
    env = {**os.environ, "PYTHONPATH": str(site)}
    done = subprocess.run(command, cwd=empty, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "million parameters" in done.stdout
