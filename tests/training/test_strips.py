"""CIFAR-10 as PNG files with a picture per row."""

import json

import pytest
import torch

np = pytest.importorskip("numpy")
Image = pytest.importorskip("PIL.Image")

from nfkernels.training.data import DataError, load_images  # noqa: E402


def package(folder, *, rows=2, labels="train_lables.json"):
    """Six files of random pictures, and what they should read as."""
    rng = np.random.default_rng(0)
    names = [f"data_batch_{i}.png" for i in range(1, 6)] + ["test_batch.png"]
    pictures = []
    for name in names:
        pixels = rng.integers(0, 256, (rows, 32, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels.reshape(rows, 1024, 3)).save(folder / name)
        pictures.append(torch.from_numpy(pixels).permute(0, 3, 1, 2))
    (folder / labels).write_text(json.dumps([i % 10 for i in range(5 * rows)]))
    (folder / "test_lables.json").write_text(json.dumps([9] * rows))
    return torch.cat(pictures[:5]), pictures[5]


@pytest.mark.parametrize("labels", ["train_lables.json", "train_labels.json"])
def test_pictures_and_labels(tmp_path, labels):
    train, test = package(tmp_path, labels=labels)
    data = load_images(tmp_path)
    assert torch.equal(data.images, train)
    assert torch.equal(data.test.images, test)
    assert data.labels.tolist() == list(range(10))
    assert data.test.labels.tolist() == [9, 9]
    assert (data.classes[6], data.test.classes[3], data.grey_levels) == ("frog", "cat", 256)
    (tmp_path / "test_batch.png").unlink()
    assert load_images(tmp_path).test is None


def test_what_is_wrong_is_named(tmp_path):
    package(tmp_path)
    (tmp_path / "data_batch_3.png").rename(tmp_path / "kept.png")
    with pytest.raises(DataError, match=r"lacks data_batch_3\.png of CIFAR-10: unpack the package again"):
        load_images(tmp_path)
    Image.new("RGB", (1023, 2)).save(tmp_path / "data_batch_3.png")
    with pytest.raises(DataError, match=r"data_batch_3\.png is 1023 pixels wide, expected 1024"):
        load_images(tmp_path)
    (tmp_path / "data_batch_3.png").write_bytes((tmp_path / "kept.png").read_bytes()[:500])
    with pytest.raises(DataError, match=r"data_batch_3\.png cannot be read as a PNG \(.+\)"):
        load_images(tmp_path)
    (tmp_path / "kept.png").rename(tmp_path / "data_batch_3.png")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[1, 2]", "holds 2 labels for 10 pictures"),
        ("[10]", "is not a list of class numbers from 0 to 9"),
        ("[true]", "is not a list of class numbers"),
        ('{"a": 1}', "is not a list of class numbers"),
        ("[1", "cannot be read as a list of labels"),
        (None, r"lacks train_lables\.json"),
    ],
)
def test_labels_that_do_not_fit(tmp_path, content, message):
    package(tmp_path)
    path = tmp_path / "train_lables.json"
    path.unlink() if content is None else path.write_text(content)
    with pytest.raises(DataError, match=message):
        load_images(tmp_path)
