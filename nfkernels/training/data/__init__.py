"""Image sets for training image flows: read once and kept in memory as uint8, or streamed where they are too large.

`load_images` reads the digits, folders and shards of pictures, MNIST-style idx files, CIFAR and uint8 numpy arrays;
`split` cuts train, validation and test parts from what it read. Everything that can be wrong with an input is a
`DataError`: one sentence for whoever gave the input. No pickle is ever loaded.
"""

from .image_data import DataError, ImageData, split
from .load import load_images
from .stream import ImageStream

__all__ = ["DataError", "ImageData", "ImageStream", "load_images", "split"]
