"""Captured calls, with a stand-in for CUDA's graphs: the same numbers as plain calls, or the reason why not."""

import contextlib
import inspect
import warnings

import pytest
import torch
from recorders import Played, Stub, Told
from tiny import QUICK, glow, stripes, tabular

from nfkernels.nn import graph
from nfkernels.nn.graph import CapturedCall, CapturedPasses, CudaRecorder, recorder_on
from nfkernels.training import Recipe, evaluate, finished, fit, trainer
from nfkernels.training.finished import draw
from nfkernels.training.optim import Optimizer
from nfkernels.training.step import LossModule, TrainStep


def test_a_call_is_plain_at_first_and_then_played_from_its_own_memory():
    places, stub, told = [], Stub(), Told()

    def function(x, y):
        places.append((x.data_ptr(), None if y is None else y.data_ptr()))
        return x * 2, None if y is None else x + y

    call = CapturedCall(function, stub, "it", tell=told)
    results = []
    for i in range(6):
        x, y = torch.full((3,), float(i)), torch.ones(3)
        result = call(x, y)
        results.append(result)
        assert call.captured == (i >= 3)
    for i, (twice, more) in enumerate(results):  # each in memory of its own: none was written over
        assert torch.equal(twice, torch.full((3,), 2.0 * i))
        assert torch.equal(more, torch.full((3,), i + 1.0))
    assert stub.asides == 3
    assert [played.count for played in stub.recordings] == [3]
    assert len(set(places[3:])) == 1
    assert not set(places[:3]) & set(places[3:])
    assert not told


def test_every_shape_has_a_recording_and_ever_new_ones_run_plainly():
    stub, told = Stub(), Told()
    call = CapturedCall(lambda x: x + 1, stub, "it", tell=told)
    for _ in range(5):
        for size in range(1, 11):
            assert torch.equal(call(torch.zeros(size)), torch.ones(size))
    assert len(stub.recordings) == 8
    assert call(torch.zeros(2, dtype=torch.int64)).dtype == torch.int64
    stub = Stub()
    call = CapturedCall(lambda x: x @ x, stub, "it", tell=told)
    for _ in range(5):
        assert call(torch.eye(2)).dtype == torch.float32
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert call(torch.eye(2)).dtype == torch.bfloat16
    assert len(stub.recordings) == 2
    assert not told


def test_what_waits_for_the_device_is_told_once_and_runs_plainly():
    stub, told = Stub(waits=["nn/mine.py, line 7, waits for the device", "another"]), Told()
    call = CapturedCall(lambda x: x + 1, stub, "the training step", tell=told)
    for _ in range(6):
        assert call(torch.zeros(1)) == 1
    assert told == [
        "the training step runs without a CUDA graph, so more slowly: nn/mine.py, line 7, waits for the device"
    ]
    assert not stub.recordings
    assert not call.captured
    call = CapturedCall(lambda x: x + 1, Stub(waits=["here"]), "it")
    call(torch.zeros(1))
    call(torch.zeros(1))
    with pytest.warns(UserWarning, match="it runs without a CUDA graph, so more slowly: here"):
        call(torch.zeros(1))


def test_a_recording_that_fails_is_told_and_errors_of_the_function_are_its_own():
    stub, told, calls = Stub(fails=True), Told(), []

    def function(x):
        calls.append(stub.recording)
        if stub.recording:
            raise RuntimeError("CUDA error: operation not permitted when stream is capturing\nmore lines")
        return x + 1

    call = CapturedCall(function, stub, "it", tell=told)
    for _ in range(6):
        assert call(torch.zeros(1)) == 1
    assert calls == [False] * 3 + [True] + [False] * 3
    assert told == [
        "it runs without a CUDA graph, so more slowly: CUDA error: operation not permitted when stream is capturing "
        "(RuntimeError)"
    ]

    def wrong(x):
        raise ValueError("no such thing")

    for stub in (Stub(), Stub(fails=True)):
        call = CapturedCall(wrong, stub, "it", tell=told)
        for _ in range(5):
            with pytest.raises(ValueError, match="no such thing"):
                call(torch.zeros(1))


def test_a_recording_casts_weights_itself():
    weight, caching = torch.nn.Parameter(torch.ones(4, 4)), []

    def function(x):
        caching.append(torch.is_autocast_cache_enabled())
        return x @ weight

    call = CapturedCall(function, Stub(), "it")
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        for _ in range(3):
            call(torch.ones(1, 4))
        made = {}

        def record(function, generators):
            made["caching"] = torch.is_autocast_cache_enabled()
            weight.fill_(2.0)  # as a step between two plays: the copy that plain calls have cast is of the old values
            played = Played(function)
            made["first"] = function()
            return played

        call._recorder.record = record
        call(torch.ones(1, 4))
        assert made["caching"] is False
        assert made["first"].tolist() == [[8.0] * 4]
        assert torch.is_autocast_cache_enabled()
    assert caching[:3] == [True] * 3


def test_ranks_that_talk_over_the_host_are_no_graph(monkeypatch):
    for backend, captured in (("gloo", False), ("nccl", True), ("cpu:gloo,cuda:nccl", True)):
        monkeypatch.setattr(graph, "_ranks", lambda backend=backend: backend)
        told = Told()
        calls = [CapturedCall(lambda x: x + 1, Stub(), "it", with_ranks=ranks, tell=told) for ranks in (True, False)]
        for at in range(14):
            for call in calls:
                call(torch.zeros(1))
            assert calls[0].captured == (captured and at >= 11)
            assert calls[1].captured == (at >= 3)
        assert told == ([] if captured else [
            "it runs without a CUDA graph, so more slowly: its ranks talk through gloo, which waits for the host; "
            "nccl does not"
        ])  # fmt: skip


# --- the trainer ----------------------------------------------------------------------------------------------------

RUN = QUICK | {"steps": 12, "validate_every": 4}


def trained(monkeypatch, stub, tmp_path, *, make=glow, data=None, **changes):
    """The weights and the log of a run whose device is said to have graphs (or, without a stub, none)."""
    monkeypatch.setattr(trainer, "recorder_on", lambda device: stub)
    flow = make()
    data = stripes(40) if data is None else data
    held_out = stripes(24, seed=1, labels=data.labels is not None)
    fit(flow, data, validation=held_out, run=tmp_path, **RUN | changes)
    return flow.state_dict(), (tmp_path / "metrics.jsonl").read_bytes()


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"optimizer": "adam", "flip": True, "clip": 0.1},
        {"optimizer": "adamax", "accumulate": 2, "precision": "bfloat16", "schedule": "exponential"},
    ],
    ids=["defaults", "adam", "adamax"],
)
def test_a_captured_run_is_the_uncaptured_one(monkeypatch, tmp_path, changes):
    stub = Stub()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plain, log = trained(monkeypatch, None, tmp_path / "plain", **changes)
        captured, captured_log = trained(monkeypatch, stub, tmp_path / "captured", **changes)
    assert log == captured_log
    assert all(torch.equal(plain[name], captured[name]) for name in plain)
    # The step was recorded after three, the pass of validation after three of its six (two draws, three times).
    assert sorted(played.count for played in stub.recordings) == [3, 9]
    assert [len(generators) for generators in stub.generators] == [1, 0]


def test_a_captured_run_gathers_its_batches_inside(monkeypatch, tmp_path):
    places, seen = [], []
    stub, data = Stub(), stripes(40, labels=True)
    gather = trainer.Batches.gather

    def watched(self, index):
        images, labels = gather(self, index)
        places.append(index.data_ptr())
        seen.append((images.clone(), labels.clone()))
        return images, labels

    monkeypatch.setattr(trainer.Batches, "gather", watched)
    weights = [trained(monkeypatch, stub, tmp_path / str(i), make=lambda: glow(classes=2), data=data)[0]
               for i, stub in enumerate((None, stub))]  # fmt: skip
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert len(places) == 24
    assert len(set(places[15:])) == 1
    for (images, labels), (others, other_labels) in zip(seen[:12], seen[12:], strict=True):
        assert torch.equal(images, others)
        assert torch.equal(labels, other_labels)


@pytest.mark.filterwarnings("ignore:evaluation runs without")  # whose recordings fail as well
@pytest.mark.parametrize("optimizer", ["adamw", "adamax"])
def test_a_recording_that_fails_half_way_leaves_nothing_behind(monkeypatch, tmp_path, optimizer):
    stub, apply = Stub(fails=True), Optimizer.apply

    def refusing(self, loss):
        if stub.recording:  # gradients are there by now, and noise was drawn
            assert all(p.grad is not None for p in self.parameters)
            raise RuntimeError("not while capturing")
        return apply(self, loss)

    monkeypatch.setattr(Optimizer, "apply", refusing)
    plain = trained(monkeypatch, None, tmp_path / "plain", optimizer=optimizer)
    with pytest.warns(UserWarning, match=r"the training step runs without.*: not while capturing \(RuntimeError\)"):
        captured = trained(monkeypatch, stub, tmp_path / "captured", optimizer=optimizer)
    assert plain[1] == captured[1]
    assert all(torch.equal(plain[0][name], captured[0][name]) for name in plain[0])


def test_batches_that_come_from_elsewhere_are_copied_into_the_recorded_memory():
    data, ends = stripes(64, labels=True), []
    for stub in (None, Stub()):
        flow, places = glow(classes=2), []
        flow(data.images, data.labels)
        torch.manual_seed(1)  # dropout
        noise = torch.Generator().manual_seed(0)
        adam = Optimizer(flow, Recipe(batch_size=8, steps=8, flip=True, accumulate=2))
        step = TrainStep(LossModule(flow), adam, torch.zeros(3), noise)

        def run(images, labels, step=step, places=places):
            places.append(images.data_ptr())
            step.run(images, labels)

        call = CapturedCall(run, stub, "the step", generators=[noise])
        for at in range(8):
            adam.prepare(at)
            rows = slice(at * 8, at * 8 + 8)
            call(data.images[rows], data.labels[rows])
        ends.append([*flow.state_dict().values(), *adam.state_dict().values(), step.sums])
    assert all(map(torch.equal, *ends))
    assert len(set(places[3:])) == 1


def test_graphs_can_be_turned_off(monkeypatch):
    stub = Stub()
    monkeypatch.setattr(trainer, "recorder_on", lambda device: stub)
    fit(glow(), stripes(24), validation=stripes(24, seed=1), cuda_graph=False, **RUN)
    assert not stub.asides
    fit(glow(), stripes(24), **RUN)
    assert stub.asides == 4  # where gradients of ranks would be averaged, and three steps
    assert recorder_on(torch.device("cpu")) is None


def test_the_averaging_of_gradients_is_set_up_where_recordings_are_made(monkeypatch):
    # DistributedDataParallel keeps the nodes that add gradients up, and those stay on the stream they were made on.
    stub, inside, made = Stub(), [], []

    @contextlib.contextmanager
    def aside():
        inside.append(True)
        yield
        inside.pop()

    monkeypatch.setattr(stub, "aside", aside)
    monkeypatch.setattr(trainer, "recorder_on", lambda device: stub)
    monkeypatch.setattr(trainer.Ranks, "averaging", lambda self, module: made.append(bool(inside)) or module)
    fit(glow(), stripes(24), **RUN | {"steps": 1})
    assert made == [True]


# --- evaluation and sampling ----------------------------------------------------------------------------------------


def test_passes_of_a_flow_are_captured_only_where_no_gradients_are_needed():
    flow, stub = glow(classes=2).eval(), Stub()
    data = stripes(12, labels=True)
    with torch.no_grad():
        flow.train()(data.images, data.labels)
        flow.eval()

    def results():
        draw = torch.Generator().manual_seed(0)
        with torch.no_grad():
            return [
                flow.bits_per_dim(data.images, data.labels, draws=5, generator=draw),
                flow.sample(10, torch.tensor([0, 1]), generator=draw, batch_size=4),
                flow.decode(flow.encode(data.images, data.labels), data.labels),
            ]

    plain, passes = results(), CapturedPasses(flow, stub)
    for _ in range(4):
        with passes:
            assert all(map(torch.equal, plain, results()))
    assert len(stub.recordings) == 3  # data of 12, samples by 4, codes of 12
    counts = [played.count for played in stub.recordings]
    with passes:
        loss = flow.nll(data.images, data.labels)
        loss.backward()
        assert all(p.grad is not None for p in flow.bijection.parameters())
        with torch.no_grad():
            flow.train()
            flow(data.images, data.labels)
            flow.eval()
    results()
    assert [played.count for played in stub.recordings] == counts
    assert "forward" not in vars(flow.bijection)
    with torch.no_grad():  # weights that change are seen
        for p in flow.parameters():
            p.mul_(1.5)
    changed = results()
    assert not torch.equal(plain[0], changed[0])
    with passes:
        assert all(map(torch.equal, changed, results()))
    assert [played.count for played in stub.recordings] > counts
    with CapturedPasses(flow, None):
        assert "forward" not in vars(flow.bijection)


def test_evaluating_and_drawing_are_captured(monkeypatch):
    flow, data, stubs = glow().eval(), stripes(20), []
    with torch.no_grad():
        flow.train()(data.images)
        flow.eval()

    def results(**options):
        return evaluate(flow, data, draws=6, **options), draw(flow, 10, None, None, 0.7, seed=0)

    loss, images = results()
    monkeypatch.setattr(graph, "recorder_on", lambda device: stubs.append(Stub()) or stubs[-1])
    monkeypatch.setattr(finished, "images_at_once", lambda shape: 2)
    captured, drawn = results()
    assert captured == loss
    assert torch.equal(drawn, images)
    assert [[played.count for played in stub.recordings] for stub in stubs] == [[3], [2]]
    assert evaluate(flow, data, draws=6, cuda_graph=False) == loss
    assert len(stubs) == 2


def test_lengths_and_other_contexts_are_left_to_the_flow():
    flow, stub = tabular(context=1).eval(), Stub()
    x, side = torch.randn(4, 2), torch.ones(4, 1)
    with torch.no_grad(), CapturedPasses(flow, stub):
        for _ in range(5):
            wanted = flow.bijection(x, side, lengths=None)
        assert len(stub.recordings) == 1
        for _ in range(5):
            with contextlib.suppress(ValueError, NotImplementedError):
                flow.bijection(x, side, lengths=torch.tensor([2, 2, 2, 2]))
        assert len(stub.recordings) == 1
        assert torch.equal(flow.bijection(x, side)[0], wanted[0])


# --- CUDA's own recorder, as far as it goes without a device --------------------------------------------------------


class Generator:
    """One of CUDA's: only those have states that graphs share."""

    def __init__(self, state="fresh"):
        assert {"clone_state", "graphsafe_set_state"} <= set(dir(torch.Generator))
        self.state = state

    def clone_state(self):
        return Generator(f"copy of {self.state}")

    def graphsafe_set_state(self, other):
        self.state = other.state


class Cuda:
    """Stands for ``torch.cuda``: what is called, in which order."""

    def __init__(self, monkeypatch):
        self.events, self.mode, self.current = [], 0, "main"
        signature = inspect.signature(torch.cuda.graph.__init__)
        outer = self

        class Stream:
            def __init__(self, *_):
                self.name = "side"

            def wait_stream(self, other):
                outer.events.append(f"{self.name} waits for {other.name}")

        class Graph:
            def register_generator_state(self, generator):
                outer.events.append("registered")

            def replay(self):
                outer.events.append("replay")

        @contextlib.contextmanager
        def stream(which):
            before, outer.current = outer.current, which.name
            try:
                yield
            finally:
                outer.current = before

        @contextlib.contextmanager
        def capture(cuda_graph, **options):
            signature.bind(None, cuda_graph, **options)
            outer.events.append(f"capture on {options['stream'].name}, {options['capture_error_mode']}")
            outer.current = options["stream"].name  # and so it stays where the capture fails
            try:
                yield
            except RuntimeError:
                raise RuntimeError("failed due to a previous error") from None
            outer.events.append("captured")
            outer.current = "main"

        main = Stream()
        main.name = "main"
        self.default = Generator()
        fakes = {
            "Stream": Stream, "CUDAGraph": Graph, "stream": stream, "graph": capture, "current_stream": lambda _: main,
            "current_device": lambda: 0, "graph_pool_handle": lambda: (1, 0), "default_generators": [self.default],
            "device": lambda _: contextlib.nullcontext(), "get_sync_debug_mode": lambda: self.mode,
            "set_sync_debug_mode": lambda mode: setattr(self, "mode", mode),
        }  # fmt: skip
        for name, fake in fakes.items():
            assert hasattr(torch.cuda, name)
            monkeypatch.setattr(torch.cuda, name, fake)


def test_cuda_calls_come_in_their_order(monkeypatch):
    cuda = Cuda(monkeypatch)
    recorder = recorder_on(torch.device("cuda"))
    assert isinstance(recorder, CudaRecorder)
    with recorder.aside():
        assert cuda.current == "side"
    assert cuda.events == ["side waits for main", "main waits for side"]
    cuda.events.clear()
    recording = recorder.record(lambda: (torch.ones(1), None), [Generator()])
    recording.replay()
    assert cuda.events == ["registered", "capture on side, thread_local", "captured", "replay"]
    assert recording.outputs[0] == 1


def test_a_capture_that_fails_puts_generators_back(monkeypatch):
    cuda = Cuda(monkeypatch)
    own = Generator()

    def function():
        own.state = cuda.default.state = "capturing"
        raise RuntimeError("no")

    recorder = CudaRecorder(torch.device("cuda", 0))
    with pytest.raises(RuntimeError, match="no"):
        recorder.record(function, [own])
    assert own.state == cuda.default.state == "copy of fresh"
    assert cuda.current == "main"


def test_what_synchronises_is_found_and_other_warnings_pass(monkeypatch):
    cuda = Cuda(monkeypatch)
    recorder = CudaRecorder(torch.device("cuda", 0))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with recorder.watched() as found:
            assert cuda.mode == "warn"
            warnings.warn("Synchronization debug mode is a prototype feature", stacklevel=1)
            warnings.warn("called a synchronizing CUDA operation (Triggered internally at ...)", stacklevel=1)
            warnings.warn("mine", stacklevel=1)
    assert cuda.mode == 0
    assert [str(warning.message) for warning in caught] == ["mine"]
    assert len(found) == 1
    assert found[0].startswith("training/test_graph.py, line ")
    assert found[0].endswith(", waits for the device")
