"""``--preset``: the options of published models by name, and where their data comes from.

The architecture, and the recipe as far as the paper (Kingma & Dhariwal 2018) and its code tell it: Adamax at 0.001 with
ten epochs of warm-up, width 512, 64 images of 32 x 32 per GPU. The paper's code then keeps that rate until somebody
stops it, after days on many GPUs. These runs end, so their rate falls to zero; their length, averaging, clipping and
bfloat16 networks are not the paper's. Activations are rebuilt from outputs instead of stored, and scales are at least
1e-3, so that no inverse divides by less.
"""

from __future__ import annotations

from typing import Any

_GLOW: dict[str, Any] = {
    "width": 512,
    "dropout": 0.0,
    "memory": "reversible",
    "scale_map": "nflows",  # sigmoid(r + 2), the paper's, + 1e-3
    "batch_size": 64,
    "optimizer": "adamax",
    "lr": 1e-3,
    "schedule": "cosine",
    "betas": (0.9, 0.999),
    "weight_decay": 0.0,
    "ema": 0.999,
    "precision": "bfloat16",
    "validate_every": 1000,
    "validation_draws": 1,
    "patience": 1000,
    "log_every": 100,
}

PRESETS: dict[str, dict[str, Any]] = {
    # What `nfkernels train` does without any option.
    "glow-digits": {"data": "digits"},
    # Paper: 3.35 bits per dimension. Affine couplings, K = 32, L = 3, 8 bits.
    "glow-cifar10": {
        **_GLOW,
        "size": [32, 32],
        "n_bits": 8,
        "levels": 3,
        "depth": 32,
        "steps": 100_000,
        "warmup": 7000,  # ten epochs of 45,000 images
        "flip": True,
    },
    # Paper: 4.09 bits per dimension. Affine couplings, K = 48, L = 3, 8 bits.
    "glow-imagenet32": {
        **_GLOW,
        "size": [32, 32],
        "n_bits": 8,
        "levels": 3,
        "depth": 48,
        "steps": 400_000,
        "warmup": 7800,  # 500,000 images, as the paper's code counts them
        "ema": 0.9995,
        "validate_every": 5000,
    },
    # The paper's 256 x 256 faces: additive couplings, K = 32, L = 6, 5 bits; one image per GPU on 40 of them.
    "glow-celeba": {
        **_GLOW,
        "size": [256, 256],
        "n_bits": 5,
        "levels": 6,
        "depth": 32,
        "scale_map": "additive",
        "batch_size": 32,
        "steps": 200_000,
        "warmup": 2000,
        "flip": True,
        "validate_every": 2000,
    },
}

# How to get what is not given; nothing downloads by itself.
SOURCES = {
    "glow-cifar10": "get cifar-10-python.tar.gz from https://www.cs.toronto.edu/~kriz/cifar.html, unpack it and give "
    "--data cifar-10-batches-py",
    "glow-imagenet32": "get the downsampled 32 x 32 ImageNet from https://image-net.org/download-images (with an "
    "account), and give --data with the folder of its pictures",
    "glow-celeba": "get the pictures of CelebA-HQ (https://github.com/tkarras/progressive_growing_of_gans tells how) "
    "and give --data with their folder",
}
