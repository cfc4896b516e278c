"""Adapters for FrEIA 0.2 (https://github.com/vislearn/FrEIA). The library itself is never imported.

Its layers are called ``layer((x,), c, rev, jac)`` and return ``((y,), logdet)``; the way back is the same call with
``rev=True``. The published wheel and the repository differ in places, so a layer's formula is asked of the layer.

Not here: the repository's splines, whose interval is learned and whose bins come from softplus instead of softmax,
which the spline op does not compute.
"""
