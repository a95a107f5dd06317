"""The commands of docs/your_data.md run in order on a small set."""

import shlex
from pathlib import Path

import pytest
import torch

from helpers.commands import REPO_ROOT, documented_commands, load_script
from helpers.pennfudan_download import write_download

SHORT_TRAINING = "SOLVER.MAX_ITER 2 SOLVER.IMS_PER_BATCH 2 INPUT.LARGE_SCALE_JITTER.SIZE 64"
SMALL_IMAGES = "INPUT.MIN_SIZE_TEST 48 MODEL.DETR.NUM_OBJECT_QUERIES 10"


@pytest.mark.slow
def test_commands_run_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "configs").symlink_to(REPO_ROOT / "configs")
    monkeypatch.chdir(tmp_path)
    write_download(Path("PennFudanPed.zip"))
    lines = documented_commands(REPO_ROOT / "docs" / "your_data.md")
    scripts = [shlex.split(line)[1] for line in lines]
    assert scripts == [
        "tools/convert_checkpoint.py",
        "datasets/prepare_pennfudan.py",
        "tools/check_dataset.py",
        "train_net.py",
        "tools/visualize_predictions.py",
        "tools/predict.py",
    ]
    threads = torch.get_num_threads()
    for line in lines:
        script, *arguments = shlex.split(line.replace("--num 12", "--num 2"))[1:]
        if script == "train_net.py":
            arguments += shlex.split(f"{SHORT_TRAINING} {SMALL_IMAGES}")
        elif "--opts" in arguments:
            arguments += shlex.split(SMALL_IMAGES)
        assert load_script(script).main(arguments) == 0, (line, capsys.readouterr().err)
    torch.set_num_threads(threads)
    output = Path("output/finetune/mask2former_efficientnet_lite0")
    assert len(list((output / "pictures").glob("*Ped*"))) == 2
    assert len(list((output / "predictions" / "overlays").iterdir())) == 40
