"""An empty folder to run commands in, and a small trained run for those that only read it."""

import pytest
import torch


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """The test runs in an empty folder, and leaves torch's thread count as it was."""
    threads = torch.get_num_threads()
    monkeypatch.chdir(tmp_path)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def digits_run(tmp_path_factory):
    from command_line import QUICK

    from nfkernels import cli

    threads = torch.get_num_threads()
    run = tmp_path_factory.mktemp("trained") / "run"
    assert cli.main(["train", *QUICK, "--classes", "--out", str(run)]) == 0
    torch.set_num_threads(threads)
    return run
