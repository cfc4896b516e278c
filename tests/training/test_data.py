"""Image sets: every kind of source written small, read back exactly; every way to be wrong, told in a sentence."""

import dataclasses
import gzip
import os
import pickle
import random
import struct
import sys
import warnings

import pytest
import torch

np = pytest.importorskip("numpy")
Image = pytest.importorskip("PIL.Image")

from nfkernels.training.batches import Batches  # noqa: E402
from nfkernels.training.data import DataError, ImageData, load_images, split  # noqa: E402


def values(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def same(tensor, array):
    assert tensor.dtype == torch.uint8
    np.testing.assert_array_equal(tensor.numpy(), array)


def numbered(count, *, labels=True, test=None, grey_levels=256):
    """A set whose images are told apart by their first two values."""
    images = torch.zeros(count, 1, 2, 2, dtype=torch.uint8)
    images[:, 0, 0, 0], images[:, 0, 0, 1] = torch.arange(count) % 16, torch.arange(count) // 16
    names = tuple("abc") if labels else None
    return ImageData(images, torch.arange(count) % 3 if labels else None, grey_levels, names, "numbered", test)


def numbers(images):
    return (images[:, 0, 0, 0].int() + 16 * images[:, 0, 0, 1].int()).tolist()


def joined(parts):
    return [number for part in parts for number in part]


# --- digits, and what is not a source ---


def test_digits():
    digits = pytest.importorskip("sklearn.datasets").load_digits()
    data = load_images("digits")
    same(data.images, digits.images[:, None])
    assert data.labels.dtype == torch.int64
    assert data.labels.tolist() == digits.target.tolist()
    assert (data.grey_levels, data.classes, data.name) == (17, tuple("0123456789"), "digits")
    assert data.test is None
    assert int(data.images.max()) == 16


def test_digits_resized_keep_their_grey_levels():
    pytest.importorskip("sklearn")
    same(load_images(size=16).images[:, :, 4:12, 4:12], load_images().images.numpy())  # 8 more: padded
    larger = load_images(size=20, channels=3)  # resampled, where Lanczos overshoots 16
    assert larger.images.shape == (1797, 3, 20, 20)
    assert larger.images.max() == 16


@pytest.mark.parametrize(("module", "package"), [("sklearn.datasets", "scikit-learn"), ("PIL.Image", "Pillow")])
def test_a_missing_package_is_named_with_the_extra_that_brings_it(monkeypatch, tmp_path, module, package):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(DataError, match=rf'needs {package}, which is missing: pip install "nfkernels\[train\]"'):
        load_images("digits" if package == "scikit-learn" else tmp_path)


def test_sources_that_are_not_there(tmp_path):
    with pytest.raises(DataError, match="digit does not exist: did you mean digits"):
        load_images("digit")
    with pytest.raises(DataError, match=r"cats does not exist: expected \"digits\", a folder of pictures"):
        load_images(tmp_path / "cats")
    (tmp_path / "cifar-10-python.tar.gz").write_bytes(b"x")
    with pytest.raises(DataError, match=r"tar\.gz is not a kind of file that is known: expected .* an unpacked CIFAR"):
        load_images(tmp_path / "cifar-10-python.tar.gz")
    with pytest.raises(DataError, match="source of type int: expected"):
        load_images(3)


@pytest.mark.parametrize("size", [0, (8, -1), (8,), (8, 8, 8), "8", 8.0, True])
def test_a_size_that_is_none(size):
    with pytest.raises(DataError, match="expected one positive number of pixels, or a pair"):
        load_images(size=size)


@pytest.mark.parametrize("channels", [0, 1.0, True])
def test_channels_that_are_no_number(channels):
    with pytest.raises(DataError, match=r"channels .* expected a positive number"):
        load_images(channels=channels)


# --- folders of pictures ---


def save(array, path, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path, **options)


def test_flat_folder(tmp_path):
    pictures = values(3, 4, 6, 3)
    for name, picture in zip("bca", pictures, strict=True):
        save(picture, tmp_path / f"{name}.PNG")
    (tmp_path / "notes.txt").write_text("not a picture")
    (tmp_path / ".hidden.png").write_bytes(b"nor this")
    (tmp_path / ".cache").mkdir()
    save(pictures[0], tmp_path / ".cache" / "x.png")
    data = load_images(str(tmp_path))
    same(data.images, pictures[[2, 0, 1]].transpose(0, 3, 1, 2))
    assert data.images.is_contiguous()
    assert (data.labels, data.classes, data.grey_levels, data.name) == (None, None, 256, tmp_path.name)


def test_more_pictures_than_one_chunk(tmp_path):
    for number in range(600):
        save(np.full((1, 1), number % 251, np.uint8), tmp_path / f"{number:04}.bmp")
    data = load_images(tmp_path)
    assert data.images.flatten().tolist() == [number % 251 for number in range(600)]


def test_one_sub_folder_per_class(tmp_path):
    pictures = values(3, 4, 4, 3)
    save(pictures[0], tmp_path / "dog" / "1.png")
    save(pictures[1], tmp_path / "cat" / "2.png")
    save(pictures[2], tmp_path / "dog" / "0.png")
    (tmp_path / "empty").mkdir()
    data = load_images(tmp_path)
    same(data.images, pictures[[1, 2, 0]].transpose(0, 3, 1, 2))
    assert data.classes == ("cat", "dog")
    assert data.labels.tolist() == [0, 1, 1]
    assert data.labels.dtype == torch.int64


def test_jpeg_is_turned_upright(tmp_path):
    picture = np.zeros((8, 16), np.uint8)
    picture[:, 8:] = 255  # right half white: turned by a quarter clockwise, the lower half
    exif = Image.Exif()
    exif[0x0112] = 6
    save(picture, tmp_path / "a.jpg", exif=exif, quality=95)
    images = load_images(tmp_path).images
    assert images.shape == (1, 1, 16, 8)
    assert images[:, :, :7].max() < 30
    assert images[:, :, 9:].min() > 225


def test_grey_folder_has_one_channel_and_16_bits_become_the_high_byte(tmp_path):
    wide = np.array([[0, 255], [256, 65535]], np.uint16)
    save(np.full((2, 2), 7, np.uint8), tmp_path / "a.png")
    save(wide, tmp_path / "b.png")
    save(wide.astype(np.int32), tmp_path / "c.tif")
    same(load_images(tmp_path).images[:, 0], [[[7, 7], [7, 7]], [[0, 0], [1, 255]], [[0, 0], [1, 255]]])
    assert load_images(tmp_path, channels=3).images.shape == (3, 3, 2, 2)
    save(values(2, 2, 3), tmp_path / "d.png")
    assert load_images(tmp_path).images.shape == (4, 3, 2, 2)  # one colour picture: all in RGB


def test_channels_1_makes_grey_of_colour(tmp_path):
    save(np.full((2, 2, 3), (255, 0, 0), np.uint8), tmp_path / "red.png")
    same(load_images(tmp_path, channels=1).images, np.full((1, 1, 2, 2), 76))
    with pytest.raises(DataError, match="1 or 3 channels, not 4"):
        load_images(tmp_path, channels=4)


def test_palette_and_alpha(tmp_path):
    save(np.full((2, 2, 4), (10, 20, 30, 0), np.uint8), tmp_path / "a.png")
    palette = Image.fromarray(np.array([[(40, 50, 60), (0, 0, 0)]] * 2, np.uint8)).quantize(2)
    palette.save(tmp_path / "b.png", transparency=b"\x00\x80")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        images = load_images(tmp_path).images
    assert images[:, :, 0, 0].tolist() == [[10, 20, 30], [40, 50, 60]]


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (np.full((2, 2), 0.5, np.float32), "floating-point values"),
        (np.full((2, 2), 70000, np.int32), "values from 70000 to 70000"),
    ],
)
def test_pictures_of_more_than_16_bits(tmp_path, bad, reason):
    save(bad, tmp_path / "a.tif")
    with pytest.raises(DataError, match=rf"a\.tif holds {reason}.*: expected 8 or 16 bits"):
        load_images(tmp_path, channels=1)


def test_size_fits_the_short_side_and_keeps_the_middle(tmp_path):
    picture = values(8, 32, 3)
    save(picture, tmp_path / "wide.png")
    save(picture.transpose(1, 0, 2), tmp_path / "tall.png")
    with pytest.raises(DataError, match=r"sizes differ \(8 x 32 of tall\.png, 32 x 8 of wide\.png\): pass --size"):
        load_images(tmp_path)
    middle = picture[:, 12:20].transpose(2, 0, 1)
    same(load_images(tmp_path, size=8).images, [middle.transpose(0, 2, 1), middle])
    halved = np.asarray(Image.fromarray(picture).resize((16, 4), Image.Resampling.LANCZOS))
    np.testing.assert_allclose(load_images(tmp_path, size=4).images[1], halved[:, 6:10].transpose(2, 0, 1), atol=1)
    assert load_images(tmp_path, size=(6, 10)).images.shape == (2, 3, 6, 10)


def test_damaged_pictures_are_named(tmp_path):
    save(values(64, 64, 3), tmp_path / "a.png")
    save(values(64, 64, 3), tmp_path / "b.png")
    whole = (tmp_path / "b.png").read_bytes()
    (tmp_path / "b.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"b\.png cannot be read as a picture \(.+\): repair or remove it"):
        load_images(tmp_path)
    (tmp_path / "b.png").write_bytes(b"no picture at all")
    with pytest.raises(DataError, match=r"b\.png cannot be read as a picture \(cannot identify"):
        load_images(tmp_path, channels=3)


def test_only_the_listed_formats_are_opened(tmp_path):
    (tmp_path / "a.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 2 2\n%%EndComments\n%%EOF\n")
    Image.open(tmp_path / "a.png").close()  # Pillow takes it for EPS, which it would hand to Ghostscript
    with pytest.raises(DataError, match="cannot identify"):
        load_images(tmp_path)


def test_decompression_bombs_are_refused(tmp_path, monkeypatch):
    save(values(40, 40), tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500)
    with pytest.raises(DataError, match=r"a\.png cannot be read as a picture \(.*decompression bomb"):
        load_images(tmp_path)


def test_folders_that_are_not_sets(tmp_path):
    (tmp_path / "readme.md").write_text("")
    with pytest.raises(DataError, match=rf"{tmp_path} holds no picture: looked .* for \.png, \.jpg,.* CIFAR batches"):
        load_images(tmp_path)
    save(values(2, 2), tmp_path / "train" / "cat" / "a.png")
    with pytest.raises(DataError, match=r"only two folders deep: pass one of its sub-folders, such as .*train$"):
        load_images(tmp_path)
    save(values(2, 2), tmp_path / "dog" / "a.png")
    save(values(2, 2), tmp_path / "b.png")
    with pytest.raises(DataError, match=r"both pictures \(b\.png\) and sub-folders of pictures \(dog\)"):
        load_images(tmp_path)


# --- idx ---


def idx(array):
    return bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def write_idx(folder, part="train", count=3, joint="-", zipped=False, size=(28, 28), labels=True, seed=0):
    images, numbers = values(count, *size, seed=seed), values(count, seed=seed + 1) % 10
    for kind, array in (("images", images), ("labels", numbers))[: 2 if labels else 1]:
        path = folder / f"{part}-{kind}{joint}idx{array.ndim}-ubyte{'.gz' if zipped else ''}"
        path.write_bytes(gzip.compress(idx(array)) if zipped else idx(array))
    return images, numbers


@pytest.mark.parametrize("joint", "-.")
@pytest.mark.parametrize("zipped", [False, True])
def test_idx(tmp_path, joint, zipped):
    images, labels = write_idx(tmp_path, joint=joint, zipped=zipped)
    test_images, test_labels = write_idx(tmp_path, "t10k", 2, joint, zipped, seed=5)
    data = load_images(tmp_path)
    same(data.images, images[:, None])
    same(data.test.images, test_images[:, None])
    assert data.labels.tolist() == labels.tolist()
    assert data.test.labels.tolist() == test_labels.tolist()
    assert data.classes == data.test.classes == tuple(map(str, range(max(*labels, *test_labels) + 1)))
    assert data.name == tmp_path.name
    assert data.test.test is None


def test_idx_size_pads_by_up_to_8_and_resamples_otherwise(tmp_path):
    images, _ = write_idx(tmp_path, labels=False)
    write_idx(tmp_path, "t10k", labels=False)
    padded = load_images(tmp_path, size=32)
    same(padded.images, np.pad(images, ((0, 0), (2, 2), (2, 2)))[:, None])
    assert padded.labels is None
    assert padded.test.images.shape[2:] == (32, 32)
    same(load_images(tmp_path, size=(30, 36), channels=3).images[:, 2, 1:29, 4:32], images)
    for size in (14, (28, 32), 31, 38):
        height, width = size if isinstance(size, tuple) else (size, size)
        got = load_images(tmp_path, size=size).images
        side = min(28 * width / height, 28), min(28 * height / width, 28)
        box = ((28 - side[0]) / 2, (28 - side[1]) / 2, (28 + side[0]) / 2, (28 + side[1]) / 2)
        want = [Image.fromarray(image).resize((width, height), Image.Resampling.LANCZOS, box) for image in images]
        same(got[:, 0], np.stack([np.asarray(image) for image in want]))


def test_idx_files_that_are_damaged(tmp_path):
    images, _ = write_idx(tmp_path)
    path = tmp_path / "train-images-idx3-ubyte"
    good = idx(images)
    cases = [
        (good[:-1], r"states 3 x 28 x 28 values \(2352 bytes\) but holds only 2351: download it again"),
        (good + b"\0", "but holds more"),
        (b"\x89PNG" + good[4:], "not an idx3-ubyte file: it starts with 89 50 4e 47, expected 00 00 08 03"),
        (good[:10], "not an idx3-ubyte file"),
        (b"", "it starts with nothing"),
        (idx(images[0]), "starts with 00 00 08 02"),
        (b"\0\0\x08\x03" + b"\xff" * 12, "but holds only 0"),
        (idx(images[:0]), "states 0 x 28 x 28 values and so holds nothing"),
    ]
    for content, message in cases:
        path.write_bytes(content)
        with pytest.raises(DataError, match=f"train-images-idx3-ubyte .*{message}"):
            load_images(tmp_path)
    path.unlink()
    zipped = gzip.compress(good)
    for content in (zipped[:-40], zipped[:20] + b"\xff" * 40 + zipped[60:], good):
        (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(content)
        with pytest.raises(DataError, match=r"ubyte\.gz cannot be read \(.+\): download it again"):
            load_images(tmp_path)


def test_idx_parts_that_do_not_fit(tmp_path):
    write_idx(tmp_path, "t10k")
    with pytest.raises(DataError, match=r"t10k images but no train-images-idx3-ubyte\[\.gz\]"):
        load_images(tmp_path)
    write_idx(tmp_path, labels=False)
    with pytest.raises(DataError, match="labels for only one of its training and test parts"):
        load_images(tmp_path)
    write_idx(tmp_path, size=(20, 20))
    with pytest.raises(
        DataError, match=r"training images are \[1, 20, 20\] but test images are \[1, 28, 28\]: pass --size"
    ):
        load_images(tmp_path)
    assert load_images(tmp_path, size=20).test.images.shape == (3, 1, 20, 20)
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(idx(values(4)))
    with pytest.raises(DataError, match="holds 4 labels for the 3 images of train-images-idx3-ubyte"):
        load_images(tmp_path)


# --- CIFAR ---


def python_2_batch(data, labels, key=b"labels"):
    """A batch as Python 2's cPickle wrote the real ones: protocol 2, every string a BINSTRING, memo entries."""
    text = lambda word, memo: b"U" + bytes([len(word)]) + word + b"q" + bytes([memo])  # noqa: E731
    return b"".join([
        b"\x80\x02}q\x01(",
        text(b"batch_label", 2), text(b"training batch 1 of 5", 3),
        text(key, 4), b"]q\x05(", *(b"K" + bytes([label]) for label in labels), b"e",
        text(b"data", 6), b"cnumpy.core.multiarray\n_reconstruct\nq\x07cnumpy\nndarray\nq\x08K\x00\x85U\x01b\x87Rq\x09",
        b"(K\x01M", struct.pack("<H", data.shape[0]), b"M", struct.pack("<H", data.shape[1]), b"\x86",
        b"cnumpy\ndtype\nq\x0a", text(b"u1", 11), b"K\x00K\x01\x87Rq\x0c(K\x03", text(b"|", 13),
        b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89T", struct.pack("<I", data.size), data.tobytes(), b"tb",
        text(b"filenames", 14), b"]q\x0f(", *(text(b"a.png", 16) for _ in labels), b"e",
        b"u.",
    ])  # fmt: skip


def batch(count=2, seed=0):
    return values(count, 3072, seed=seed), [int(label) for label in values(count, seed=seed + 100) % 10]


def write_cifar(folder, encode, test=True):
    parts = [batch(seed=seed) for seed in range(6 if test else 5)]
    for name, part in zip([f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"], parts, strict=False):
        (folder / name).write_bytes(encode(*part))
    return parts


def python_3_batch(protocol, key=str):
    def encode(data, labels):
        content = {"batch_label": b"one of 5", "labels": labels, "data": data, "filenames": ["a.png"] * len(labels)}
        return pickle.dumps({key(k) if key is str else k.encode(): v for k, v in content.items()}, protocol)

    return encode


def moved_to_numpy_1(encode):
    """The same batch with its modules named as in numpy 1 (protocol 2 ends names by a newline, so that is enough)."""
    return lambda *part: encode(*part).replace(b"numpy._core.", b"numpy.core.")


ENCODERS = {
    "python 2": python_2_batch,
    **{f"protocol {protocol}": python_3_batch(protocol) for protocol in range(6)},
    **{f"protocol {protocol}, bytes keys": python_3_batch(protocol, bytes) for protocol in (0, 2, 5)},
    "numpy 1": moved_to_numpy_1(python_3_batch(2)),
    "read-only": lambda data, labels: python_3_batch(5)(
        np.frombuffer(data.tobytes(), np.uint8).reshape(data.shape), labels
    ),
}


@pytest.mark.parametrize("encode", ENCODERS.values(), ids=ENCODERS)
def test_cifar_10(tmp_path, encode):
    parts = write_cifar(tmp_path, encode)
    names = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
    (tmp_path / "batches.meta").write_bytes(pickle.dumps({b"label_names": [name.encode() for name in names]}, 2))
    data = load_images(tmp_path)
    same(data.images, np.concatenate([data for data, _ in parts[:5]]).reshape(10, 3, 32, 32))
    same(data.test.images, parts[5][0].reshape(2, 3, 32, 32))
    assert data.labels.tolist() == [label for _, labels in parts[:5] for label in labels]
    assert data.test.labels.tolist() == parts[5][1]
    assert data.classes == data.test.classes == tuple(names)
    assert data.labels.dtype == torch.int64


def test_the_python_2_batch_is_a_pickle():
    """Or the reader would be tested with a form of its own."""
    data, labels = batch()
    loaded = pickle.loads(python_2_batch(data, labels), encoding="bytes")
    assert loaded[b"labels"] == labels
    np.testing.assert_array_equal(loaded[b"data"], data)


def test_cifar_10_without_meta_or_test(tmp_path):
    parts = write_cifar(tmp_path, python_2_batch, test=False)
    data = load_images(tmp_path, size=40)
    assert data.test is None
    assert data.images.shape == (10, 3, 40, 40)
    assert data.classes == tuple(map(str, range(max(max(labels) for _, labels in parts) + 1)))
    (tmp_path / "data_batch_3").unlink()
    with pytest.raises(DataError, match="lacks data_batch_3 of CIFAR-10: unpack the archive again"):
        load_images(tmp_path)


def test_cifar_100(tmp_path):
    data, labels = batch()
    (tmp_path / "train").write_bytes(python_2_batch(data, labels, b"fine_labels"))
    (tmp_path / "meta").write_bytes(pickle.dumps({"fine_label_names": [f"class {i}" for i in range(100)]}, 2))
    loaded = load_images(tmp_path)
    same(loaded.images, data.reshape(2, 3, 32, 32))
    assert loaded.labels.tolist() == labels
    assert loaded.classes[99] == "class 99"


class Trap:
    """Makes a folder when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("where", ["alone", "data", "labels", "filenames", "state"])
def test_a_malicious_batch_is_not_run(tmp_path, protocol, where):
    write_cifar(tmp_path, python_2_batch)
    data, labels = batch()
    sprung = tmp_path / "sprung"
    content = {"data": data, "labels": labels, "filenames": []}
    if where == "alone":
        content = Trap(sprung)
    elif where == "state":  # an honest object first, its state last
        content["data"] = np.array([Trap(sprung)], dtype=object)
    else:
        content[where] = Trap(sprung)
    payload = pickle.dumps(content, protocol)
    pickle.loads(payload)
    assert sprung.is_dir()  # the trap works
    sprung.rmdir()
    (tmp_path / "data_batch_2").write_bytes(payload)
    with pytest.raises(DataError, match=r"data_batch_2 is not a CIFAR-10 batch: it asks for '(posix|nt)\.mkdir'"):
        load_images(tmp_path)
    assert not sprung.exists()


NOT_BATCHES = {
    "empty": (b"", "no complete pickle"),
    "cut off": (python_2_batch(*batch())[:-500], "no complete pickle"),
    "stack": (b"\x80\x02R.", "no complete pickle"),
    "memo": (b"\x80\x02h\x09.", "no complete pickle"),
    "a list": (pickle.dumps([1]), "does not hold a dictionary"),
    "INST": (b"(S'true'\nios\nsystem\n.", "uses the pickle instruction INST"),
    "OBJ": (b"(cnumpy\nndarray\no.", "uses the pickle instruction OBJ"),
    "NEWOBJ": (b"\x80\x02cnumpy\nndarray\n)\x81.", "uses the pickle instruction NEWOBJ"),
    "persistent": (b"Pos\n.", "uses the pickle instruction PERSID"),
    "codec": (b"\x80\x02c_codecs\nencode\nU\x01aU\x05rot13\x86R.", "encodes text in another way"),
    "call of data": (b"\x80\x02U\x01a)R.", "makes a call"),
    "BUILD of a list": (b"\x80\x02]Nb.", "sets the state"),
    "append to a dictionary": (b"\x80\x02}Na.", "not a list"),
    "a tuple as key": (b"\x80\x02}K\x01\x85Ns.", "other than plain dictionaries"),
    "a name that is no text": (b"\x80\x04NN\x93.", "asks for 'something'"),
    "no data": (pickle.dumps({"labels": [1]}), "it has no 'data'"),
    "no labels": (pickle.dumps({"data": batch()[0]}), "it has no 'labels'"),
    "bytes as data": (pickle.dumps({"data": b"x" * 6144, "labels": [1, 2]}), "data is not a numpy array"),
    "float": (pickle.dumps({"data": batch()[0] / 255, "labels": [1, 2]}), "data is not uint8"),
    "column-major 5": (
        pickle.dumps({"data": np.asfortranarray(batch()[0]), "labels": [1, 2]}, 5),
        "not a row-major array",
    ),
    "column-major 2": (
        pickle.dumps({"data": np.asfortranarray(batch()[0]), "labels": [1, 2]}, 2),
        "not a row-major array",
    ),
    "shape": (pickle.dumps({"data": batch()[0][:, :768], "labels": [1, 2]}), "row of 3072 bytes for each of its 2"),
    "too few bytes": (
        python_2_batch(batch()[0], [1, 2, 3]).replace(b"M\x02\0M\0\x0c", b"M\x03\0M\0\x0c"),
        "not one row of 3072 bytes",
    ),
    "more labels": (pickle.dumps({"data": batch()[0], "labels": [1, 2, 3]}), "for each of its 3 labels"),
    "nothing": (pickle.dumps({"data": batch()[0][:0], "labels": []}), "for each of its 0 labels"),
    "labels as text": (pickle.dumps({"data": batch()[0], "labels": ["1", "2"]}), "not a list of class numbers"),
    "labels as bool": (pickle.dumps({"data": batch()[0], "labels": [True, False]}), "not a list of class numbers"),
    "huge label": (pickle.dumps({"data": batch()[0], "labels": [1, 2**70]}), "not a list of class numbers"),
}  # fmt: skip


@pytest.mark.parametrize(("content", "message"), NOT_BATCHES.values(), ids=NOT_BATCHES)
def test_what_is_not_a_cifar_batch(tmp_path, content, message):
    write_cifar(tmp_path, python_2_batch)
    (tmp_path / "data_batch_4").write_bytes(content)
    with pytest.raises(DataError, match=f"data_batch_4 is not a CIFAR-10 batch: .*{message}"):
        load_images(tmp_path)


def test_cifar_meta_that_does_not_fit(tmp_path):
    write_cifar(tmp_path, python_2_batch)
    (tmp_path / "batches.meta").write_bytes(pickle.dumps({"label_names": 3}))
    with pytest.raises(DataError, match=r"batches\.meta is not a CIFAR-10 meta file: it has no list of label_names"):
        load_images(tmp_path)
    (tmp_path / "batches.meta").write_bytes(pickle.dumps({"label_names": ["only"]}))
    with pytest.raises(DataError, match=r"labels run from \d to \d, expected 0 to 0, one per class"):
        load_images(tmp_path)


@pytest.mark.parametrize("encode", [python_2_batch, python_3_batch(0), python_3_batch(5)], ids=["python 2", "0", "5"])
def test_mutated_batches_are_read_or_refused(tmp_path, encode):
    """Whatever bytes a file holds: a set or a DataError, nothing else."""
    good = encode(*batch(count=1))
    chance = random.Random(0)
    structure = [i for i in range(len(good)) if i < 160 or i > len(good) - 160]  # not the pixels
    refused = 0
    (tmp_path / "meta").write_bytes(pickle.dumps({"fine_label_names": list("0123456789")}))
    for _ in range(300):
        content = bytearray(good.replace(b"labels", b"fine_labels") if encode is not python_2_batch else good)
        for _ in range(chance.choice((1, 1, 3))):
            content[chance.choice(structure)] = chance.randrange(256)
        (tmp_path / "train").write_bytes(content)
        try:
            load_images(tmp_path)
        except DataError:
            refused += 1
    assert refused > 100


# --- numpy files ---


@pytest.mark.parametrize(
    ("shape", "axes"),
    [
        ((5, 8, 9), None),
        ((5, 8, 9, 3), (0, 3, 1, 2)),
        ((5, 3, 8, 9), (0, 1, 2, 3)),
        ((5, 2, 8, 9), (0, 1, 2, 3)),
        ((5, 8, 9, 4), (0, 3, 1, 2)),
        ((5, 3, 8, 4), (0, 3, 1, 2)),  # both could be: last
        ((5, 8, 1, 1), (0, 3, 1, 2)),
    ],
)
def test_npy_channels(tmp_path, shape, axes):
    array = values(*shape)
    np.save(tmp_path / "set.npy", array)
    data = load_images(tmp_path / "set.npy")
    same(data.images, array.transpose(axes) if axes else array[:, None])
    assert data.images.is_contiguous()
    assert (data.labels, data.classes, data.test, data.name, data.grey_levels) == (
        None,
        None,
        None,
        "set",
        256,
    )


def test_npy_in_column_major_order(tmp_path):
    np.save(tmp_path / "set.npy", np.asfortranarray(values(5, 8, 9)))
    same(load_images(tmp_path / "set.npy").images[:, 0], values(5, 8, 9))


@pytest.mark.parametrize("key", ["images", "x", "x_train", "data", "arr_0"])
@pytest.mark.parametrize("label_key", ["labels", "y", "y_train", None])
def test_npz_keys(tmp_path, key, label_key):
    array = values(4, 8, 8)
    np.savez(tmp_path / "set.npz", **{key: array}, **({label_key: [2, 0, 1, 2]} if label_key else {}))
    data = load_images(tmp_path / "set.npz")
    same(data.images, array[:, None])
    assert data.labels is None if label_key is None else data.labels.tolist() == [2, 0, 1, 2]
    assert data.classes == (("0", "1", "2") if label_key else None)


def test_npz_test_part_and_label_columns(tmp_path):
    train, test = values(4, 8, 8, 3), values(2, 8, 8, 3, seed=1)
    labels = np.array([[2], [0], [1], [2]], np.uint8)
    np.savez(tmp_path / "set.npz", x_train=train, y_train=labels, x_test=test, y_test=np.array([3, 0]))
    data = load_images(tmp_path / "set.npz")
    same(data.images, train.transpose(0, 3, 1, 2))
    same(data.test.images, test.transpose(0, 3, 1, 2))
    assert data.labels.tolist() == [2, 0, 1, 2]
    assert data.test.labels.tolist() == [3, 0]
    assert data.classes == data.test.classes == ("0", "1", "2", "3")


GOOD = values(4, 8, 8)
BAD_ARRAYS = {
    "float": ({"x": GOOD / 255}, r"x is float64, expected uint8 \(0 to 255\): convert it"),
    "rank": ({"x": GOOD[0]}, r"x has shape \[8, 8\], expected \[N, H, W\], \[N, H, W, C\] or"),
    "no channels": ({"x": values(4, 8, 8, 8)}, r"x has shape \[4, 8, 8, 8\], in which no axis can be the channels"),
    "one image or many": ({"x": values(8, 8, 3)}, r"may be one image \[H, W, C\] or many \[N, H, W\]"),
    "empty": ({"x": GOOD[:0]}, "so holds no image"),
    "objects": ({"x": np.array([{}, {}])}, "without loading python objects"),
    "keys": ({"pixels": GOOD, "a": GOOD}, "holds a, pixels: expected images under one of images, x, x_train"),
    "too few labels": ({"x": GOOD, "y": [1]}, r"y is int64 \[1\], expected one whole number for each of 4 images"),
    "float labels": ({"x": GOOD, "y": np.ones(4)}, "y is float64"),
    "negative labels": ({"x": GOOD, "y": [0, 1, -1, 0]}, "labels run from -1 to 1, expected class numbers"),
    "ids as labels": ({"x": GOOD, "y": [0, 1, 10**9, 0]}, "labels run from 0 to 1000000000, expected class numbers"),
    "half the labels": ({"x": GOOD, "y": [0] * 4, "x_test": GOOD}, "labels for only one of its training and test"),
    "sizes": (
        {"x": GOOD, "x_test": values(4, 9, 9)},
        r"training images are \[1, 8, 8\] but test images are \[1, 9, 9\]",
    ),
}


@pytest.mark.parametrize(("arrays", "message"), BAD_ARRAYS.values(), ids=BAD_ARRAYS)
def test_arrays_that_are_not_images(tmp_path, arrays, message):
    np.savez(tmp_path / "set.npz", **arrays)
    with pytest.raises(DataError, match=message):
        load_images(tmp_path / "set.npz")


def test_numpy_files_that_are_damaged_or_pickles(tmp_path):
    np.savez(tmp_path / "set.npz", x=GOOD)
    whole = (tmp_path / "set.npz").read_bytes()
    sprung = tmp_path / "sprung"
    for content in (whole[:-50], whole[:150] + b"xx" + whole[152:], b"", b"text", pickle.dumps(Trap(sprung))):
        (tmp_path / "set.npz").write_bytes(content)
        with pytest.raises(DataError, match=r"set\.npz cannot be read as uint8 images"):
            load_images(tmp_path / "set.npz")
    assert not sprung.exists()


def test_channels_of_arrays(tmp_path):
    grey, colour = values(4, 6, 6), values(4, 6, 6, 3)
    np.save(tmp_path / "grey.npy", grey)
    np.save(tmp_path / "colour.npy", colour)
    np.save(tmp_path / "four.npy", values(4, 6, 6, 4))
    same(load_images(tmp_path / "grey.npy", channels=3).images, np.stack([grey] * 3, axis=1))
    luma = np.stack([np.asarray(Image.fromarray(image).convert("L")) for image in colour])
    same(load_images(tmp_path / "colour.npy", channels=1).images[:, 0], luma)
    with pytest.raises(DataError, match=r"four\.npy: images have 4 channels and cannot be turned into 3"):
        load_images(tmp_path / "four.npy", channels=3)


# --- ImageData ---


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": torch.zeros(6, 1, 2, 2)}, r"images are torch.float32 \[6, 1, 2, 2\] on cpu, expected uint8"),
        ({"images": torch.zeros(6, 4, dtype=torch.uint8)}, r"expected uint8 \[N, C, H, W\] on the CPU"),
        ({"images": torch.zeros(6, 1, 2, 4, dtype=torch.uint8)[..., ::2]}, "not contiguous"),
        ({"grey_levels": 5}, "a value is 5, expected below 5"),
        ({"labels": None}, "labels and classes go together"),
        ({"labels": torch.zeros(5, dtype=torch.int64)}, r"labels are torch.int64 \[5\], expected int64 \[6\]"),
        ({"labels": torch.zeros(6)}, "labels are torch.float32"),
        ({"classes": ("a", "b")}, "labels run from 0 to 2, expected 0 to 1, one per class"),
        ({"test": numbered(2, labels=False)}, "do not have the same classes"),
    ],
)
def test_image_data_that_does_not_fit_together(change, message):
    with pytest.raises(DataError, match=message):
        dataclasses.replace(numbered(6), **change)


# --- split ---


def test_split_of_the_digits():
    pytest.importorskip("sklearn")
    assert [len(part) for part in split(load_images(), seed=0)] == [1350, 150, 297]
    assert [len(part) for part in split(load_images(), seed=0, validation=10)] == [1490, 10, 297]


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ({}, [80, 10, 10]),
        ({"validation": 7, "test": 0.25}, [68, 7, 25]),
        ({"validation": 0, "test": 0.0}, [100, 0, 0]),
        ({"validation": 0.001}, [89, 1, 10]),
        ({"validation": 50, "test": 49}, [1, 50, 49]),
    ],
)
def test_split_parts_are_disjoint_and_cover_everything(sizes, expected):
    data = numbered(100)
    parts = split(data, seed=3, **sizes)
    assert [len(part) for part in parts] == expected
    found = [numbers(part.images) for part in parts]
    assert sorted(joined(found)) == list(range(100))
    assert joined(found) != list(range(100))
    for part, which in zip(parts, found, strict=True):
        assert part.labels.tolist() == [number % 3 for number in which]
        assert (part.classes, part.name, part.grey_levels, part.test) == (data.classes, data.name, 256, None)


def test_split_depends_on_the_seed_alone():
    data = numbered(50, labels=False)
    first, again, other = (split(data, seed=seed) for seed in (1, 1, 2))
    assert [numbers(a.images) for a in first] == [numbers(b.images) for b in again]
    assert numbers(first[0].images) != numbers(other[0].images)
    torch.manual_seed(5)
    assert numbers(split(data, seed=1)[2].images) == numbers(first[2].images)


def test_split_keeps_the_sets_own_test_part():
    own = numbered(4)
    train, validation, test = split(numbered(50, test=own), seed=0)
    assert (len(train), len(validation)) == (45, 5)
    assert test is own
    assert train.test is None
    assert sorted(numbers(train.images) + numbers(validation.images)) == list(range(50))
    images = torch.zeros(60000, 1, 1, 1, dtype=torch.uint8)
    large = ImageData(images, None, 256, None, "large", ImageData(images[:1], None, 256, None, "large"))
    assert [len(part) for part in split(large, seed=0)] == [55000, 5000, 1]
    with pytest.raises(
        DataError, match=r"numbered has its own test part of 4 images: leave out the test size \(0\.1\)"
    ):
        split(numbered(50, test=own), seed=0, test=0.1)


@pytest.mark.parametrize("size", [-1, 1.0, 1.5, -0.1, float("nan"), True, "10"])
def test_split_sizes_that_are_none(size):
    with pytest.raises(DataError, match=r"validation size .* expected a number of images .* or a fraction"):
        split(numbered(20), seed=0, validation=size)
    with pytest.raises(DataError, match="test size"):
        split(numbered(20), seed=0, test=size)


@pytest.mark.parametrize(
    "sizes", [{"validation": 20}, {"validation": 10, "test": 10}, {"validation": 0.6, "test": 0.4}]
)
def test_split_leaves_something_to_train_on(sizes):
    with pytest.raises(DataError, match=r"numbered has 20 images, so .* leave none to train on: ask for fewer"):
        split(numbered(20), seed=0, **sizes)


# --- Batches ---


def take(batches, count):
    return [numbers(batches.next()[0]) for _ in range(count)]


def test_every_image_comes_once_an_epoch_in_another_order():
    batches = Batches(numbered(12), 4, seed=0)
    first, second = (joined(take(batches, 3)) for _ in range(2))
    assert sorted(first) == sorted(second) == list(range(12))
    assert first != second
    assert first != list(range(12))
    assert first == joined(take(Batches(numbered(12), 4, seed=0), 3))
    assert first != joined(take(Batches(numbered(12), 4, seed=1), 3))


def test_batches_carry_their_labels():
    images, labels = Batches(numbered(12), 5, seed=0).next()
    assert images.dtype == torch.uint8
    assert images.shape == (5, 1, 2, 2)
    assert images.is_contiguous()
    assert labels.dtype == torch.int64
    assert labels.tolist() == [number % 3 for number in numbers(images)]
    assert Batches(numbered(12, labels=False), 5, seed=0).next()[1] is None


def test_the_last_images_of_an_epoch():
    dropped = Batches(numbered(11), 4, seed=0)
    epochs = [joined(take(dropped, 2)) for _ in range(3)]
    assert all(len(set(epoch)) == 8 for epoch in epochs)
    assert dropped.epoch == 2
    assert len({frozenset(epoch) for epoch in epochs}) > 1  # others are dropped each time
    kept = Batches(numbered(11), 4, seed=0, drop_last=False)
    epoch = take(kept, 3)
    assert [len(part) for part in epoch] == [4, 4, 3]
    assert sorted(joined(epoch)) == list(range(11))
    assert len(take(kept, 1)[0]) == 4
    assert kept.epoch == 1


@pytest.mark.parametrize("drop_last", [True, False])
def test_a_batch_larger_than_the_set_is_the_set(drop_last):
    batches = Batches(numbered(5), 8, seed=0, drop_last=drop_last)
    first, second = take(batches, 2)
    assert sorted(first) == sorted(second) == list(range(5))
    assert batches.epoch == 1


def test_epochs_are_counted():
    batches = Batches(numbered(12), 4, seed=0)
    seen = [(batches.epoch, batches.epochs)]
    for _ in range(4):
        batches.next()
        seen.append((batches.epoch, batches.epochs))
    assert seen == [(0, 0.0), (0, pytest.approx(1 / 3)), (0, pytest.approx(2 / 3)), (0, 1.0), (1, pytest.approx(4 / 3))]


@pytest.mark.parametrize("drop_last", [True, False])
@pytest.mark.parametrize("steps", [0, 1, 3, 4, 7, 8])
def test_a_saved_order_continues_bit_for_bit(steps, drop_last):
    batches = Batches(numbered(14), 4, seed=0, drop_last=drop_last)
    take(batches, steps)
    state = batches.state_dict()
    assert all(isinstance(value, (int, torch.Tensor)) for value in state.values())
    saved = {key: value.clone() if isinstance(value, torch.Tensor) else value for key, value in state.items()}
    expected = take(batches, 9)
    resumed = Batches(numbered(14), 4, seed=99, drop_last=drop_last)
    take(resumed, 2)
    resumed.load_state_dict(state)  # the dictionary itself: it must not have moved on with the batches
    assert take(resumed, 9) == expected
    assert (resumed.epoch, resumed.epochs) == (batches.epoch, batches.epochs)
    assert all(torch.equal(torch.as_tensor(state[key]), torch.as_tensor(saved[key])) for key in saved)


def test_the_order_does_not_depend_on_the_global_generator():
    torch.manual_seed(0)
    first = take(Batches(numbered(12), 4, seed=0), 5)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    assert take(Batches(numbered(12), 4, seed=0), 5) == first
    assert torch.equal(torch.get_rng_state(), before)


def test_batches_that_cannot_be():
    with pytest.raises(DataError, match="batch size 0: expected at least 1"):
        Batches(numbered(4), 0, seed=0)
    with pytest.raises(DataError, match="numbered: there are no images"):
        Batches(numbered(0), 4, seed=0)
    batches = Batches(numbered(4), 2, seed=0)
    with pytest.raises(DataError, match="of 5 images but there are 4: resume with the data and split"):
        batches.load_state_dict(Batches(numbered(5), 2, seed=0).state_dict())
    with pytest.raises(DataError, match="data order lacks epoch, generator"):
        batches.load_state_dict({"position": 0, "images": 4})


# --- fewer bits ---


@pytest.mark.parametrize("bits", [1, 5, 8])
def test_the_upper_bits_are_kept(tmp_path, bits):
    train, test = values(4, 6, 6), values(2, 6, 6, seed=1)
    np.savez(tmp_path / "x.npz", images=train, x_test=test)
    data = load_images(tmp_path / "x.npz", bits=bits)
    same(data.images[:, 0], train >> (8 - bits))
    same(data.test.images[:, 0], test >> (8 - bits))
    assert (data.grey_levels, data.test.grey_levels) == (2**bits, 2**bits)
    assert split(data, seed=0)[0].grey_levels == 2**bits


def test_bits_that_cannot_be(tmp_path):
    pytest.importorskip("sklearn")
    with pytest.raises(DataError, match="digits has 17 grey levels, and only sets of 256 can be cut to 4 bits"):
        load_images("digits", bits=4)
    for bits in (0, 9, 2.0, True):
        with pytest.raises(DataError, match=r"bits .* expected a whole number from 1 to 8"):
            load_images(tmp_path, bits=bits)
