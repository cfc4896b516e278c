"""Image sets for training image flows: read once, kept in memory as uint8.

`load_images` reads the digits, a folder of pictures, MNIST-style idx files, CIFAR batches and uint8 numpy arrays;
`split` cuts train, validation and test parts from what it read. Everything that can be wrong with an input is a
`DataError`: one sentence for whoever gave the input. No pickle is ever loaded.
"""

from .image_data import DataError, ImageData, split
from .load import load_images

__all__ = ["DataError", "ImageData", "load_images", "split"]
