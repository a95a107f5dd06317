"""Files of every format are read, or refused in one line without running code in them."""

import argparse
import io
import json
import pickle
import tarfile
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from batchformer_panoptic.checkpoint import read_class_table, read_weights
from batchformer_panoptic.checkpoint.files import non_finite
from batchformer_panoptic.errors import UserError
from helpers.small_checkpoint import CATEGORIES, WEIGHTS, write_pkl, write_pth, write_safetensors


class Exploit:
    """Unpickling it would create a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (Path.touch, (self.path,))


class Harmless:
    """An object that is not a weight."""


def _refusal(path: Path | str) -> str:
    with pytest.raises(UserError) as error:
        read_weights(str(path))
    line = str(error.value)
    assert str(path) in line
    assert "\n" not in line
    return line


def _assert_weights(content: dict[str, Any]) -> None:
    assert content["model"].keys() == WEIGHTS.keys()
    for name, value in content["model"].items():
        assert torch.equal(torch.as_tensor(value), WEIGHTS[name])


@pytest.mark.parametrize("name", ["w.pth", "w.pt", "pytorch_model.bin", "no_ending"])
@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize(
    "wrap",
    [
        pytest.param(lambda w: {"model": w, "iteration": 3}, id="model"),
        pytest.param(lambda w: OrderedDict(w), id="bare"),
        pytest.param(lambda w: {"state_dict": w, "epoch": 3}, id="state_dict"),
    ],
)
def test_files_of_torch(
    tmp_path: Path, name: str, zipped: bool, wrap: Callable[[Any], Any]
) -> None:
    path = write_pth(tmp_path / name, wrap(WEIGHTS), _use_new_zipfile_serialization=zipped)
    content = read_weights(str(path))
    _assert_weights(content)
    assert "state_dict" not in content
    assert {k: v for k, v in content.items() if k != "model"} == {
        k: v for k, v in wrap({}).items() if k in ("iteration", "epoch")
    }


def test_official_training_checkpoint(tmp_path: Path) -> None:
    args = argparse.Namespace(lr=1e-4, masks=True)
    path = write_pth(tmp_path / "w.pth", {"model": WEIGHTS, "args": args, "epoch": 3})
    before = set(torch.serialization.get_safe_globals())
    content = read_weights(str(path))
    assert content["args"] == args
    assert set(torch.serialization.get_safe_globals()) == before  # nothing is registered for good


def test_safetensors_with_metadata(tmp_path: Path) -> None:
    settings = {"INPUT.FORMAT": "RGB", "MODEL.PIXEL_MEAN": [1.5, 2.0, 3.0]}
    metadata = {"settings": json.dumps(settings), "class_table": json.dumps(CATEGORIES)}
    path = write_safetensors(tmp_path / "w.safetensors", {**metadata, "format": "pt"})
    content = read_weights(str(path))
    _assert_weights(content)
    assert content["settings"] == settings
    assert content["class_table"] == CATEGORIES
    assert content["format"] == "pt"
    table = read_class_table(str(path))
    assert table is not None
    assert table.names == ("ball", "grass")


def test_safetensors_without_metadata(tmp_path: Path) -> None:
    path = write_safetensors(tmp_path / "w.safetensors")
    assert read_weights(str(path)).keys() == {"model"}
    assert read_class_table(str(path)) is None


def test_model_zoo(tmp_path: Path) -> None:
    content = read_weights(str(write_pkl(tmp_path / "w.pkl")))
    _assert_weights(content)
    assert (content["__author__"], content["matching_heuristics"]) == ("x", True)


@pytest.mark.parametrize("nested", [True, False])
def test_caffe2_model_zoo(tmp_path: Path, nested: bool) -> None:
    blobs = {"conv1_w": np.ones(3), "conv1_w_momentum": np.ones(3)}
    path = write_pkl(tmp_path / "w.pkl", {"blobs": blobs} if nested else blobs)
    content = read_weights(str(path))
    assert content["model"].keys() == {"conv1_w"}
    assert (content["__author__"], content["matching_heuristics"]) == ("Caffe2", True)


def test_torch_file_called_pkl(tmp_path: Path) -> None:
    _assert_weights(read_weights(str(write_pth(tmp_path / "w.pkl"))))


def _plain_pickle(path: Path, content: Any) -> None:
    path.write_bytes(pickle.dumps(content))


def _zip(path: Path, content: Any) -> None:
    torch.save(content, path)


def _legacy(path: Path, content: Any) -> None:
    torch.save(content, path, _use_new_zipfile_serialization=False)


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("w.pth", _zip),
        ("w.pth", _legacy),
        ("w.pth", _plain_pickle),
        ("w.bin", _zip),
        ("w.pkl", _plain_pickle),
        ("w.pkl", _zip),
        ("w", _plain_pickle),
    ],
)
def test_malicious_pickle_is_not_run(
    tmp_path: Path, name: str, write: Callable[[Path, Any], None]
) -> None:
    trace = tmp_path / "trace"
    write(tmp_path / name, {"model": {"w": Exploit(trace)}, "__author__": "x"})
    line = _refusal(tmp_path / name)
    assert not trace.exists()
    assert "--allow-pickle" in line
    # The same file does run when it is allowed to: the test would notice.
    if write is not _plain_pickle or name == "w.pkl":
        with pytest.raises(UserError, match="'w' is a NoneType"):
            read_weights(str(tmp_path / name), allow_pickle=True)
        assert trace.exists()


@pytest.mark.parametrize(
    ("module", "name"), [("posix", "system"), ("builtins", "eval"), ("numpy", "load")]
)
def test_only_arrays_are_unpickled(tmp_path: Path, module: str, name: str) -> None:
    path = tmp_path / "w.pkl"
    path.write_bytes(f"c{module}\n{name}\n(S'x'\ntR.".encode())
    assert f"the Python object {module}.{name}" in _refusal(path)


def test_malicious_safetensors_name(tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    path = tmp_path / "w.safetensors"
    _plain_pickle(path, {"model": {"w": Exploit(trace)}})
    assert "not a safetensors file" in _refusal(path)
    assert not trace.exists()


def test_objects_are_read_when_allowed(tmp_path: Path) -> None:
    content = {"model": WEIGHTS, "extra": Harmless()}
    path = write_pth(tmp_path / "w.pth", content)
    assert "Harmless" in _refusal(path)
    loaded = read_weights(str(path), allow_pickle=True)
    _assert_weights(loaded)
    assert isinstance(loaded["extra"], Harmless)


def test_old_tar_file(tmp_path: Path) -> None:
    path = tmp_path / "w.pth"
    with tarfile.open(path, "w") as archive:
        archive.addfile(tarfile.TarInfo("storages"), io.BytesIO())
    assert "tar file" in _refusal(path)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "the file is empty"),
        (b"\n <!DOCTYPE html><html>404</html>", "an HTML or XML page: the download failed"),
        (b"\xef\xbb\xbf<html lang='en'>", "an HTML or XML page: the download failed"),
        (b'<?xml version="1.0"?><Error>AccessDenied</Error>', "the download failed"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "run git lfs pull"),
        (b'{"error": "Repository not found"}', "it is JSON text"),
        (b"\0" * 6000, "zeros only"),
        (b"no checkpoint", "truncated, damaged or not"),
        (b"\x80\x02garbage", "cannot be read"),
        (b"PK\x03\x04garbage", "it is truncated"),
    ],
)
@pytest.mark.parametrize("name", ["w.pth", "w.pkl", "w.bin"])
def test_what_is_no_checkpoint(tmp_path: Path, name: str, content: bytes, words: str) -> None:
    (tmp_path / name).write_bytes(content)
    line = _refusal(tmp_path / name)
    assert words in line or (name == "w.pkl" and "truncated, damaged or not" in line)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "the file is empty"),
        (b"<!DOCTYPE html><html>404</html>", "the download failed"),
        (b"garbage and more garbage", "not a safetensors file"),
    ],
)
def test_what_is_no_safetensors_file(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "w.safetensors"
    path.write_bytes(content)
    assert words in _refusal(path)


@pytest.mark.parametrize("key", ["settings", "class_table"])
def test_safetensors_with_broken_metadata(tmp_path: Path, key: str) -> None:
    path = write_safetensors(tmp_path / "w.safetensors", {key: "{broken"})
    assert f"its metadata '{key}' is not JSON" in _refusal(path)


def _write_legacy(path: Path) -> Path:
    return write_pth(path, _use_new_zipfile_serialization=False)


@pytest.mark.parametrize("share", [0.05, 0.3, 0.6, 0.98])
@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("w.pth", write_pth),
        ("w.pth", _write_legacy),
        ("w.pkl", write_pkl),
        ("w.safetensors", write_safetensors),
    ],
)
def test_truncated(tmp_path: Path, name: str, write: Callable[[Path], Path], share: float) -> None:
    path = write(tmp_path / name)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    line = _refusal(path)
    assert "truncated" in line
    assert "--allow-pickle" not in line


def test_damaged_inside(tmp_path: Path) -> None:
    path = write_pth(tmp_path / "w.pth")
    content = bytearray(path.read_bytes())
    start = content.find(b"ctorch._utils")
    content[start + 13 : start + 40] = b"\xff" * 27
    path.write_bytes(bytes(content))
    assert "damaged" in _refusal(path)


def test_torchscript(tmp_path: Path) -> None:
    torch.jit.script(torch.nn.Linear(2, 2)).save(str(tmp_path / "w.pth"))
    assert "TorchScript" in _refusal(tmp_path / "w.pth")


def test_zip_bomb(tmp_path: Path) -> None:
    path = tmp_path / "w.pth"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("w/data.pkl", b"\0" * 10**6)
    assert "would unpack to 1000000" in _refusal(path)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ([1, 2], "contains no weights"),
        ({"model": {}}, "contains no weights"),
        ({"model": {"w": 3}}, "'w' is a int"),
        ({"model": {3: torch.ones(1)}}, "3 is a Tensor"),
        ({"epoch": 3}, "'epoch' is a int"),
    ],
)
def test_no_weights(tmp_path: Path, content: Any, words: str) -> None:
    assert words in _refusal(write_pth(tmp_path / "w.pth", content))


def test_folder(tmp_path: Path) -> None:
    assert "is a folder" in _refusal(tmp_path)


def test_missing(tmp_path: Path) -> None:
    assert "not found" in _refusal(tmp_path / "none.pth")


def test_names_of_a_wrapped_model_are_unwrapped(tmp_path: Path) -> None:
    path = tmp_path / "ddp.pth"
    torch.save({"model": {"module.a": torch.ones(1), "module.b": torch.ones(2)}}, path)
    assert set(read_weights(str(path))["model"]) == {"a", "b"}
    torch.save({"model": {"module.a": torch.ones(1), "b": torch.ones(2)}}, path)
    assert set(read_weights(str(path))["model"]) == {"module.a", "b"}


def test_a_flipped_bit_is_refused_or_changes_nothing(tmp_path: Path) -> None:
    """Most of those that are read are in the padding between the parts."""
    content = {"model": WEIGHTS, "iteration": 3}
    path = write_pth(tmp_path / "w.pth", content)
    data = path.read_bytes()
    refused = 0
    for bit in range(0, 8 * len(data), 41):
        changed = bytearray(data)
        changed[bit // 8] ^= 1 << bit % 8
        path.write_bytes(changed)
        try:
            found = read_weights(str(path))
        except UserError:
            refused += 1
        else:
            assert found["iteration"] == 3
            _assert_weights(found)
    assert refused > 100


def test_a_part_marked_as_a_folder_is_refused(tmp_path: Path) -> None:
    """``torch.load`` leaves its tensor uninitialised."""
    path = write_pth(tmp_path / "w.pth", {"model": WEIGHTS})
    data = bytearray(path.read_bytes())
    name = data.rindex(b"w/data/1")  # in the directory at the end of the file
    data[name - 8] = 0x10  # of the attributes, which precede the name by 8 bytes
    path.write_bytes(data)
    assert "part data/1 is damaged" in _refusal(path)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["w.pth", "w.safetensors", "w.pkl"])
def test_weights_that_are_not_finite_are_refused(tmp_path: Path, name: str, value: float) -> None:
    weights = {"fine": torch.ones(3), "spoiled": torch.tensor([1.0, value])}
    path = tmp_path / name
    if name == "w.pth":
        write_pth(path, {"model": weights})
    elif name == "w.pkl":
        _plain_pickle(path, {"model": {k: v.numpy() for k, v in weights.items()}})
    else:
        save_file(weights, path)
    assert "NaN or infinite values in spoiled (1 in all)" in _refusal(path)


def test_non_finite_looks_into_all_types_and_containers() -> None:
    nan = float("nan")
    spoiled = {
        "half": torch.tensor(nan, dtype=torch.bfloat16),
        "eighth": torch.tensor([nan]).to(torch.float8_e4m3fn),
        "array": np.array([nan]),
        "state": {0: {"exp_avg": torch.tensor([1.0, -nan])}},
        "groups": [{"lr": torch.tensor(float("inf"))}],
    }
    fine = {
        "integers": torch.arange(3),
        "text": "nan",
        "empty": torch.zeros(0),
        "large": torch.full((3,), 3e38),  # their sum overflows
    }
    names = ["half", "eighth", "array", "state.0.exp_avg", "groups.0.lr"]
    assert non_finite({**spoiled, **fine}) == names
