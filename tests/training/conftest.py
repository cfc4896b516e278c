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


@pytest.fixture(scope="session")
def people(tmp_path_factory):
    """A table: two real columns, one of whole numbers, a constant, and one to condition on."""
    import numpy

    random = numpy.random.default_rng(0)
    size = 240
    kind = random.normal(size=size) * 3 + 10
    height = 170 + 8 * random.normal(size=size) + kind
    children = random.poisson(2, size=size)
    wage = numpy.exp(0.3 * random.normal(size=size) + 0.02 * height) * 100
    path = tmp_path_factory.mktemp("tables") / "people.csv"
    rows = zip(height, children, wage, [2020] * size, kind, strict=True)
    lines = ["height,children,wage,year,kind", *(",".join(f"{value:.7g}" for value in row) for row in rows)]
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture(scope="session")
def table_run(tmp_path_factory, people):
    from command_line import TABLE

    from nfkernels import cli

    threads = torch.get_num_threads()
    run = tmp_path_factory.mktemp("trained") / "run"
    assert cli.main(["train", "--data", str(people), *TABLE, "--context", "kind", "--out", str(run)]) == 0
    torch.set_num_threads(threads)
    return run
