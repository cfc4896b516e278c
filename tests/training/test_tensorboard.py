"""--tensorboard: the same run, and its numbers and samples on the board, once each, also after a resume."""

import sys
from pathlib import Path

import pytest
import torch
from command_line import QUICK, refused

for package in ("sklearn", "matplotlib", "PIL", "tensorboard"):
    pytest.importorskip(package)

from nfkernels import cli  # noqa: E402
from nfkernels.plot.images import tiles  # noqa: E402

pytestmark = pytest.mark.usefixtures("elsewhere")


def board(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    read = EventAccumulator(folder, size_guidance={"images": 0, "scalars": 0})
    read.Reload()
    return read


def test_the_board_shows_the_run_and_changes_nothing():
    assert cli.main(["train", *QUICK, "--quiet", "--classes", "--out", "with", "--tensorboard"]) == 0
    assert cli.main(["train", *QUICK, "--quiet", "--classes", "--out", "without"]) == 0
    assert Path("with/metrics.jsonl").read_bytes() == Path("without/metrics.jsonl").read_bytes()
    assert not Path("without/tensorboard").exists()
    assert cli.main(["train", "--resume", "with", "--steps", "8", "--quiet", "--tensorboard"]) == 0
    read = board("with/tensorboard")
    for tag in ("loss/training", "lr", "gradient norm"):
        assert [event.step for event in read.Scalars(tag)] == [2, 4, 6, 8]
    assert [event.step for event in read.Scalars("loss/validation")] == [3, 6, 8]
    drawn = read.Images("samples")
    assert {image.step for image in drawn} <= {3, 6, 8}
    height, width = tiles(torch.zeros(16, 1, 8, 8, dtype=torch.uint8)).shape  # four by four digits
    assert (drawn[0].width, drawn[0].height) == (width, height)


def test_a_missing_package_is_told_before_the_training(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    monkeypatch.delattr(torch.utils, "tensorboard", raising=False)
    assert 'pip install "nfkernels[tensorboard]"' in refused(capsys, "train", *QUICK, "--tensorboard")
    assert not Path("runs").exists()
