"""``python -m benchmarks glow``: nfkernels' Glow beside the same Glow in plain PyTorch and in normflows."""
