"""Other libraries: their layers as contenders of the ops (``layers.py``), and ``python -m benchmarks peers``: their own
models before and after ``nfkernels.accelerate``."""
