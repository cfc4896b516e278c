"""The folder of a demo's pictures: made before anything is computed, and nobody else's file is ever replaced."""

from __future__ import annotations

import os
from pathlib import Path

from ..errors import TrainingError

# Written into every picture, so that a later demo knows which it may replace.
SOFTWARE = "nfkernels demo"


class PictureFolder:
    """``TrainingError`` where the folder cannot be made, or holds another picture under one of these names."""

    def __init__(self, path: str | os.PathLike[str], pictures: tuple[str, ...]) -> None:
        self.path = Path(path)
        self.pictures = tuple(self.path / name for name in pictures)
        if self.path.exists() and not self.path.is_dir():
            raise TrainingError(f"{self.path} is a file: expected a folder for the pictures, give another --out")
        for picture in self.pictures:
            if picture.exists() and not is_ours(picture):
                raise TrainingError(
                    f"{picture} is there already and was not drawn by {SOFTWARE}: it stays, give another --out"
                )
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            if not os.access(self.path, os.W_OK):
                raise PermissionError(13, "you may not write there")
        except OSError as error:
            raise TrainingError(f"the folder {self.path} cannot be made: {error.strerror}; give --out") from error

    def told(self) -> str:
        return f"in {self.path}: {', '.join(picture.name for picture in self.pictures)}"


def is_ours(picture: Path) -> bool:
    """Whether a file is a PNG with our name among the texts before its pixels."""
    try:
        with open(picture, "rb") as file:
            start = file.read(4096)
    except OSError:
        return False
    return start.startswith(b"\x89PNG") and SOFTWARE.encode() in start.partition(b"IDAT")[0]
