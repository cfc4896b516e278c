"""A stand-in for CUDA's graphs: what is recorded is played by calling the function anew, on its own memory."""

import contextlib

import torch


class Played:
    """Plays a recording by calling the function anew: on the inputs' own memory, as a graph does."""

    def __init__(self, function):
        self.function, self.outputs, self.count = function, None, 0

    def replay(self):
        self.count += 1
        outputs = self.function()
        if self.count == 1:
            self.outputs = outputs
        elif outputs is not None:  # a graph writes into the memory that it has
            for old, new in zip(_listed(self.outputs), _listed(outputs), strict=True):
                old.copy_(new)


def _listed(outputs):
    return outputs if isinstance(outputs, tuple) else [outputs]


class Stub:
    """Records without a device. ``waits``: what cannot be recorded; ``fails``: recordings fail inside the function."""

    def __init__(self, waits=(), fails=False):
        self.waits, self.fails, self.recordings, self.generators = list(waits), fails, [], []
        self.recording, self.asides = False, 0

    @contextlib.contextmanager
    def aside(self):
        self.asides += 1
        yield

    @contextlib.contextmanager
    def watched(self):
        yield self.waits

    def record(self, function, generators):
        if not self.fails:
            self.generators.append(list(generators))
            self.recordings.append(Played(function))
            return self.recordings[-1]
        states, default = [generator.get_state() for generator in generators], torch.get_rng_state()
        self.recording = True
        try:
            function()
        finally:
            self.recording = False
            torch.set_rng_state(default)
            for generator, state in zip(generators, states, strict=True):
                generator.set_state(state)
        raise RuntimeError("not here")


class Told(list):
    def __call__(self, text):
        self.append(text)
