"""An image set in memory, the error that explains itself, and the cut into train, validation and test."""

from __future__ import annotations

import dataclasses
import importlib
from numbers import Integral, Real
from types import ModuleType
from typing import TYPE_CHECKING, Any, overload

import torch

if TYPE_CHECKING:
    from .stream import ImageStream


class DataError(ValueError):
    """One sentence: what was given, what was expected, what to do."""


@dataclasses.dataclass(frozen=True, eq=False)
class ImageData:
    """Images in memory, with their labels if they have any.

    Args:
        images: uint8 `[N, C, H, W]`, contiguous, on the CPU, values 0 .. grey_levels - 1.
        labels: int64 `[N]`, each an index into `classes`; or None.
        grey_levels: how many values a channel can take: 17 for the digits, otherwise 256 or what ``in_bits`` left.
        classes: the class names; None exactly when labels is None.
        name: what reports call the set.
        test: the set's own test part, of the same image shape and classes, where the source has one.
        validation: likewise, the set's own validation part.

    Raises:
        DataError: the parts do not fit together.
    """

    images: torch.Tensor
    labels: torch.Tensor | None
    grey_levels: int
    classes: tuple[str, ...] | None
    name: str
    test: ImageData | None = None
    validation: ImageData | None = None

    def __post_init__(self) -> None:
        images, labels = self.images, self.labels
        if images.dtype != torch.uint8 or images.dim() != 4 or images.device.type != "cpu":
            raise DataError(
                f"{self.name}: images are {images.dtype} {list(images.shape)} on {images.device}, "
                "expected uint8 [N, C, H, W] on the CPU"
            )
        if not images.is_contiguous():
            raise DataError(f"{self.name}: images are not contiguous: pass images.contiguous()")
        # 256 levels cannot be exceeded, so the pass over the data is only paid by small sets.
        if self.grey_levels < 256 and images.numel() and int(images.max()) >= self.grey_levels:
            raise DataError(f"{self.name}: a value is {int(images.max())}, expected below {self.grey_levels}")
        if (labels is None) != (self.classes is None):
            raise DataError(f"{self.name}: labels and classes go together, but only one of them was given")
        if labels is not None:
            if labels.dtype != torch.int64 or labels.shape != (len(images),):
                raise DataError(
                    f"{self.name}: labels are {labels.dtype} {list(labels.shape)}, expected int64 [{len(images)}]"
                )
            if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < len(self.classes):
                raise DataError(
                    f"{self.name}: labels run from {int(labels.min())} to {int(labels.max())}, "
                    f"expected 0 to {len(self.classes) - 1}, one per class"
                )
        for part, own in (("test", self.test), ("validation", self.validation)):
            if own is not None and own.images.shape[1:] != images.shape[1:]:
                raise DataError(
                    f"{self.name}: training images are {list(images.shape[1:])} but {part} images are "
                    f"{list(own.images.shape[1:])}: pass --size to bring them to one size"
                )
            if own is not None and own.classes != self.classes:
                raise DataError(f"{self.name}: the training and {part} parts do not have the same classes")

    def __len__(self) -> int:
        return len(self.images)

    def take(self, index: torch.Tensor) -> ImageData:
        """The images (and labels) at int64 `[M]` indices, copied, without the test and validation parts."""
        labels = None if self.labels is None else self.labels[index]
        return dataclasses.replace(self, images=self.images[index], labels=labels, test=None, validation=None)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        channels, height, width = self.images.shape[1:]
        return channels, height, width

    def in_bits(self, bits: int) -> ImageData:
        """The set, its own parts included, with the upper ``bits`` (1 to 8) of its 8 kept: `2**bits` grey levels.

        Raises:
            DataError: another number of bits, or a set that does not have 256 grey levels.
        """
        check_bits(bits)
        if self.grey_levels != 256:
            raise DataError(
                f"{self.name} has {self.grey_levels} grey levels, and only sets of 256 can be cut to {bits} bits: "
                "leave out --n-bits"
            )
        if bits == 8:
            return self
        own = {"test": self.test, "validation": self.validation}
        parts: dict[str, Any] = {part: held and held.in_bits(bits) for part, held in own.items()}
        return dataclasses.replace(self, images=self.images >> (8 - bits), grey_levels=2**bits, **parts)


def check_bits(bits: int) -> None:
    """``DataError`` unless ``bits`` is a whole number from 1 to 8."""
    if isinstance(bits, bool) or not isinstance(bits, int) or not 1 <= bits <= 8:
        raise DataError(f"bits {bits!r}: expected a whole number from 1 to 8")


def need(module: str, what: str, extra: str = "train") -> ModuleType:
    """Import an optional dependency of training; a DataError that names the extra that brings it if it is missing."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = {"PIL": "Pillow", "sklearn": "scikit-learn", "pyarrow": "pyarrow"}.get(module.split(".")[0], module)
        raise DataError(f'{what} needs {package}, which is missing: pip install "nfkernels[{extra}]"') from error


@overload
def split(
    data: ImageData,
    *,
    seed: int,
    validation: int | float | None = None,
    test: int | float | None = None,
) -> tuple[ImageData, ImageData, ImageData]: ...


@overload
def split(
    data: ImageData | ImageStream,
    *,
    seed: int,
    validation: int | float | None = None,
    test: int | float | None = None,
) -> tuple[ImageData | ImageStream, ImageData, ImageData]: ...


def split(
    data: ImageData | ImageStream,
    *,
    seed: int,
    validation: int | float | None = None,
    test: int | float | None = None,
) -> tuple[ImageData | ImageStream, ImageData, ImageData]:
    """Cut a set into train, validation and test: disjoint, together everything, the same for the same seed.

    An int is a number of images, a float a fraction of the set (at least one image unless it is 0). Left out:

    - a set with its own test part keeps that as test; validation, unless the set has its own too, is 10 % of the rest,
      at most 5000 images;
    - the digits: 1350 train, 150 validation, 297 test;
    - anything else: 10 % validation, 10 % test.

    Of an ImageStream the training part remains one, and of parts of its own as many images are taken as are asked for;
    left out, validation is at most 2000 and test at most 10,000 images.

    Args:
        data: `[N]` images.
        seed: of the permutation that the cut is made in.
        validation, test: sizes of those parts.

    Returns:
        train, validation, test, each with data's name, classes and grey levels (and a copy of its images).

    Raises:
        DataError: a size out of range, a size for a part that the set has as its own, or nothing left to train on.
    """
    if not isinstance(data, ImageData):
        return data.split(seed=seed, validation=validation, test=test)
    total = len(data)
    is_digits = data.grey_levels == 17 and total == 1797
    own = {"validation": data.validation, "test": data.test}
    for part, size in (("validation", validation), ("test", test)):
        if own[part] is not None and size is not None:
            raise DataError(
                f"{data.name} has its own {part} part of {len(own[part])} images: leave out the {part} size ({size})"
            )
    tenth = part_size(0.1, total, "validation")
    if data.test is not None:
        n_test, default_validation = 0, min(tenth, 5000)
    else:
        default_test, default_validation = (297, 150) if is_digits else (tenth, tenth)
        n_test = default_test if test is None else part_size(test, total, "test")
    if data.validation is not None:
        n_validation = 0
    else:
        n_validation = default_validation if validation is None else part_size(validation, total, "validation")
    n_train = total - n_validation - n_test
    if n_train < 1 and validation is None and test is None:
        least, parts = (
            (3, "to train, to validate and to test") if data.test is None else (2, "to train and to validate")
        )
        raise DataError(f"{data.name} has {total} image{'s' * (total != 1)}: at least {least} are needed, {parts} on")
    if n_train < 1:
        raise DataError(
            f"{data.name} has {total} images, so {n_validation} for validation and {n_test} for test leave none to "
            "train on: ask for fewer"
        )
    order = torch.randperm(total, generator=torch.Generator().manual_seed(seed))
    train, held_out, own_test = (data.take(part) for part in order.split([n_train, n_validation, n_test]))
    held_out = held_out if data.validation is None else data.validation
    return train, held_out, own_test if data.test is None else data.test


def part_size(value: int | float, total: int, part: str) -> int:
    """Images that a size asks for: an int, or a fraction of ``total``. ``DataError`` for anything else."""
    if isinstance(value, Integral) and not isinstance(value, bool) and value >= 0:
        return int(value)
    if isinstance(value, Real) and not isinstance(value, Integral) and 0 <= value < 1:
        return max(1, round(value * total)) if value else 0
    raise DataError(f"{part} size {value!r}: expected a number of images (an int) or a fraction from 0 to below 1")
