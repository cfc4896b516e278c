"""What a run tells while it runs."""

import io
import os

import pytest

from nfkernels.training import progress
from nfkernels.training.loop import Progress
from nfkernels.training.progress import Bar, Lines, Silent, clock, reporter


def walk(watch):
    watch.start(0, 4)
    now = Progress(0, 4, "bits/dim")
    for step in range(1, 5):
        now.step, now.logged, now.validated = step, step % 2 == 0, step == 4
        if now.logged:
            now.loss, now.per_second, now.seconds_left = 3.0 - step / 4, 1234.4, 65.2
        if now.validated:
            now.validation = 2.25
        watch.step(now)
    watch.stop()


def test_lines_are_few_and_whole():
    file = io.StringIO()
    walk(Lines(file))
    assert file.getvalue().splitlines() == [
        "step 2/4, bpd 2.500, 1:05 left, 1234 images/s",
        "step 4/4, bpd 2.000, 1:05 left, 1234 images/s, validation 2.250",
    ]


def test_bar_shows_step_loss_speed_and_time_left():
    pytest.importorskip("tqdm")
    file = io.StringIO()
    walk(Bar(file))
    last = file.getvalue().split("\r")[-1]
    for part in ("step 4/4", "bpd 2.000", "validation 2.250", "1234 images/s", "1:05 left"):
        assert part in last


def test_a_narrow_terminal_gets_the_important_numbers_whole(monkeypatch):
    pytest.importorskip("tqdm")
    now = Progress(4, 4, "bits/dim", loss=2.0, validation=2.25, per_second=1234.4, seconds_left=65.2)
    texts = []
    for columns in (20, 30, 40, 55, 80):
        monkeypatch.setattr(progress, "_columns", lambda file, columns=columns: columns)
        texts.append(Bar(io.StringIO())._text(now))
    assert texts == [
        "",
        " bpd 2.000",
        " bpd 2.000, 1:05 left",
        " bpd 2.000, 1:05 left, 1234 images/s",
        " bpd 2.000, 1:05 left, 1234 images/s, validation 2.250",
    ]


@pytest.mark.parametrize("kind", [Lines, Bar])
def test_a_reader_that_has_gone_stops_nothing(kind):
    if kind is Bar:
        pytest.importorskip("tqdm")
    read, write = os.pipe()
    os.close(read)
    with open(write, "w") as file:
        walk(kind(file))
        print("still", file=file, flush=True)  # to nowhere, by now


def test_without_tqdm_a_terminal_gets_lines(monkeypatch):
    monkeypatch.setattr(progress.sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(progress.importlib.util, "find_spec", lambda name: None)
    assert isinstance(reporter(True), Lines)


def test_choice():
    assert isinstance(reporter(False), Silent)
    assert isinstance(reporter("lines"), Lines)
    own = Silent()
    assert reporter(own) is own
    with pytest.raises(ValueError, match="progress is 'loud'"):
        reporter("loud")
    walk(reporter(False))


def test_clock():
    assert [clock(s) for s in (0, 59.6, 187, 3765)] == ["0:00", "1:00", "3:07", "1:02:45"]
