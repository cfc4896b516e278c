"""Sets that are listed and streamed: folders, tar and Parquet shards; their order, parts, ranks and workers."""

import io
import json
import multiprocessing
import os
import sys
import tarfile

import pytest
import tiny
import torch
from forked import Process

np = pytest.importorskip("numpy")
Image = pytest.importorskip("PIL.Image")

from nfkernels.training import (  # noqa: E402
    Batches,
    DataError,
    ImageData,
    ImageStream,
    TrainingError,
    evaluate,
    fit,
    load_images,
    split,
)
from nfkernels.training.data import index_file, listing  # noqa: E402

COUNT = 22


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    """Every listing is kept, and in a folder of the test's own."""
    monkeypatch.setenv("NFKERNELS_CACHE", str(tmp_path_factory.mktemp("cache")))
    monkeypatch.setattr(index_file, "KEEP_FROM", 1)


def png(number):
    """A picture of two pixels that are its number, as a file's bytes."""
    file = io.BytesIO()
    Image.new("RGB", (2, 1), (number, number, number)).save(file, "PNG")
    return file.getvalue()


def flat_folder(path, count=COUNT, first=0):
    path.mkdir(parents=True, exist_ok=True)
    for number in range(first, first + count):
        (path / f"{number:03}.png").write_bytes(png(number))
    (path / "notes.txt").write_text("not a picture")
    (path / ".000.png").write_bytes(b"nor this")
    return path


def class_folder(path):
    for number in range(COUNT):
        folder = path / ("b" if number % 3 else "a")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{number:03}.png").write_bytes(png(number))
    return path


def tar_folder(path, *, names=("x-0.tar", "x-1.tar"), labels=True):
    path.mkdir(parents=True, exist_ok=True)
    for at, name in enumerate(names):
        with tarfile.open(path / name, "w") as tar:
            for number in range(at, COUNT, len(names)):
                members = {f"d/{number:03}.txt": b"passed over", f"d/{number:03}.png": png(number)}
                if labels:
                    members[f"d/{number:03}.cls"] = str(number % 3).encode()
                for member, content in members.items():
                    info = tarfile.TarInfo(member)
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
    return path


def parquet_folder(path, *, names=("x-0.parquet", "x-1.parquet"), struct=True, labels=True, meta=None):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path.mkdir(parents=True, exist_ok=True)
    for at, name in enumerate(names):
        numbers = range(at, COUNT, len(names))
        column = [{"bytes": png(n), "path": None} for n in numbers] if struct else [png(n) for n in numbers]
        columns = {"other": [1] * len(numbers), "image": column}
        if labels:
            columns["label"] = [n % 3 for n in numbers]
        table = pyarrow.table(columns)
        if meta is not None:
            table = table.replace_schema_metadata({"huggingface": json.dumps(meta)})
        parquet.write_table(table, path / name, row_group_size=4)
    return path


MAKERS = {"flat": flat_folder, "classes": class_folder, "tar": tar_folder, "parquet": parquet_folder}
KINDS = pytest.mark.parametrize("kind", MAKERS)


def streamed(kind, path, **options):
    return load_images(MAKERS[kind](path / kind), stream=True, **{"workers": 0, **options})


def numbers(images):
    assert images.dtype == torch.uint8
    assert images.shape[1:] == (3, 1, 2)
    assert bool((images == images[:, :1, :1, :1]).all())
    return images[:, 0, 0, 0].tolist()


def run(batches, steps):
    """Numbers of each batch."""
    return [numbers(batches.next()[0]) for _ in range(steps)]


def joined(batches):
    return [number for batch in batches for number in batch]


# --- what is read ---


@KINDS
def test_a_stream_holds_what_memory_would(tmp_path, kind):
    stream = streamed(kind, tmp_path)
    data = load_images(tmp_path / kind, channels=3)
    assert isinstance(stream, ImageStream)
    assert isinstance(data, ImageData)
    assert (len(stream), stream.image_shape, stream.grey_levels) == (COUNT, (3, 1, 2), 256)
    assert (stream.name, stream.classes) == (kind, data.classes)
    whole = stream.load()
    assert torch.equal(whole.images, data.images)
    assert sorted(numbers(whole.images)) == list(range(COUNT))
    if kind == "flat":
        assert whole.labels is data.labels is None
    else:
        expected = [0 if n % 3 == 0 else 1 if kind == "classes" else n % 3 for n in numbers(whole.images)]
        assert whole.labels.tolist() == data.labels.tolist() == expected
        assert whole.classes == (("a", "b") if kind == "classes" else ("0", "1", "2"))
    index = torch.tensor([20, 3, 11])
    assert torch.equal(stream.take(index).images, data.images[index])


def test_one_file_of_many_pictures(tmp_path):
    tar_folder(tmp_path, names=("one.tar",), labels=False)
    data = load_images(tmp_path / "one.tar")
    assert (data.name, data.classes, data.images.shape) == ("one", None, (COUNT, 3, 1, 2))
    parquet_folder(tmp_path, names=("two.parquet",), struct=False, labels=False)
    assert torch.equal(load_images(tmp_path / "two.parquet").images, data.images)


def test_large_sets_are_streamed(tmp_path, monkeypatch):
    from nfkernels.training.data import pictures

    flat_folder(tmp_path)
    monkeypatch.setattr(pictures, "MEMORY", COUNT * 6)
    assert isinstance(load_images(tmp_path), ImageData)
    monkeypatch.setattr(pictures, "MEMORY", COUNT * 6 - 1)
    assert isinstance(load_images(tmp_path), ImageStream)
    assert isinstance(load_images(tmp_path, stream=False), ImageData)
    assert isinstance(load_images(tmp_path, channels=1), ImageData)


def test_bits_and_sizes(tmp_path):
    flat_folder(tmp_path)
    stream = load_images(tmp_path, stream=True, bits=5, size=4, channels=1)
    assert (stream.image_shape, stream.grey_levels) == ((1, 4, 4), 32)
    expected = load_images(tmp_path, size=4, channels=1, bits=5)
    assert torch.equal(stream.load().images, expected.images)
    assert expected.images.max() == (COUNT - 1) >> 3


def test_names_of_classes_in_parquet(tmp_path):
    meta = {"info": {"features": {"label": {"names": ["cat", "dog", "owl", "fox"]}}}}
    parquet_folder(tmp_path, meta=meta)
    assert load_images(tmp_path).classes == ("cat", "dog", "owl", "fox")


# --- batches ---


@KINDS
def test_an_epoch_has_every_picture_once(tmp_path, kind):
    batches = streamed(kind, tmp_path).batches(5, seed=3, drop_last=False)
    assert (batches.epoch, batches.epochs) == (0, 0.0)
    epochs = [run(batches, 5) for _ in range(2)]
    assert (batches.epoch, batches.epochs) == (1, 2.0)
    for epoch in epochs:
        assert [len(batch) for batch in epoch] == [5, 5, 5, 5, 2]
        assert sorted(joined(epoch)) == list(range(COUNT))
    assert epochs[0] != epochs[1]


@pytest.mark.parametrize("kind", ["flat", "classes", "tar"])
@pytest.mark.parametrize("drop_last", [True, False])
def test_the_order_is_that_of_batches_in_memory(tmp_path, kind, drop_last):
    stream = streamed(kind, tmp_path)
    ours = stream.batches(4, seed=5, drop_last=drop_last)
    theirs = Batches(stream.load(), 4, seed=5, drop_last=drop_last)
    for _ in range(14):
        (images, labels), (expected, expected_labels) = ours.next(), theirs.next()
        assert torch.equal(images, expected)
        assert (labels is None) == (kind == "flat")
        assert labels is None or torch.equal(labels, expected_labels)
        assert (ours.epoch, ours.epochs) == (theirs.epoch, theirs.epochs)
    state, expected = ours.state_dict(), theirs.state_dict()
    assert torch.equal(state.pop("generator"), expected.pop("generator"))
    assert state == expected


@KINDS
def test_workers_change_nothing(tmp_path, kind):
    stream = streamed(kind, tmp_path)
    stream.take(torch.arange(3))  # its files are open when the workers are forked
    without = stream.batches(4, seed=1)
    expected = [without.next() for _ in range(12)]
    with_two = streamed(kind, tmp_path, workers=2).batches(4, seed=1)
    for images, labels in expected:
        got, got_labels = with_two.next()
        assert torch.equal(got, images)
        assert labels is None or torch.equal(got_labels, labels)
    with_two.close()


@KINDS
@pytest.mark.parametrize("steps", [0, 1, 4, 5, 7])
def test_an_order_is_taken_up_again(tmp_path, kind, steps):
    """Wherever it stood: in the middle of an epoch, at its end, before the first batch."""
    stream = streamed(kind, tmp_path)
    first = stream.batches(5, seed=2)
    run(first, steps)
    state = first.state_dict()
    expected = run(first, 8)
    second = stream.batches(5, seed=99)
    run(second, 3)
    second.load_state_dict(state)
    assert second.epochs == state["epoch"] + state["position"] / COUNT
    assert run(second, 8) == expected
    assert second.state_dict()["position"] == first.state_dict()["position"]


def test_an_order_is_taken_up_again_with_workers(tmp_path):
    """Which have by then decoded further, into the next epoch."""
    stream = streamed("flat", tmp_path, workers=1)
    first = stream.batches(5, seed=2)
    run(first, 3)
    state = first.state_dict()
    assert (state["epoch"], state["position"]) == (0, 15)
    expected = run(first, 4)
    first.load_state_dict(state)
    assert run(first, 4) == expected
    first.close()


@KINDS
@pytest.mark.parametrize("drop_last", [True, False])
def test_ranks_share_each_batch(tmp_path, kind, drop_last):
    stream = streamed(kind, tmp_path)
    whole = stream.batches(6, seed=4, drop_last=drop_last)
    parts = [stream.batches(6, seed=4, rank=rank, world=2, drop_last=drop_last) for rank in range(2)]
    for _ in range(9):
        both = [run(part, 1)[0] for part in parts]
        assert both[0] + both[1] == run(whole, 1)[0]
        assert len(both[0]) == len(both[1])
    assert [part.state_dict()["position"] for part in parts] == [whole.state_dict()["position"]] * 2


def test_a_run_goes_on_with_other_ranks(tmp_path):
    stream = streamed("flat", tmp_path)
    two = [stream.batches(4, seed=4, rank=rank, world=2) for rank in range(2)]
    for part in two:
        run(part, 3)
    one = stream.batches(4, seed=0)
    one.load_state_dict(two[1].state_dict())
    assert run(one, 1)[0] == run(two[0], 1)[0] + run(two[1], 1)[0]


def test_workers_end_with_the_batches(tmp_path):
    before = len(multiprocessing.active_children())
    batches = streamed("flat", tmp_path, workers=1).batches(5, seed=2)
    run(batches, 1)
    assert len(multiprocessing.active_children()) == before + 1
    del batches
    assert len(multiprocessing.active_children()) == before


def test_rows_of_parquet_are_mixed_within_stretches_of_row_groups(tmp_path):
    stream = streamed("parquet", tmp_path)
    stream.listing.window = 8
    starts = stream.listing.group_starts
    group_of = torch.bucketize(torch.arange(COUNT), starts, right=True) - 1
    order = stream.shuffled(torch.Generator().manual_seed(0))
    assert sorted(order.tolist()) == list(range(COUNT))
    groups = group_of[order].tolist()
    spans = [COUNT - groups[::-1].index(g) - groups.index(g) for g in set(groups)]
    assert max(spans) <= 8 + 4  # a group's rows are never further apart than a stretch is long
    assert max(spans) > 4  # and not left together
    # No more row groups are held than lie in a stretch, and each is read once per epoch.
    read = []
    fetch = type(stream.listing)._read
    stream.listing._read = lambda opened, group: read.append(group) or fetch(stream.listing, opened, group)
    stream.listing.__dict__.pop("_opened")
    run(stream.batches(2, seed=0), COUNT // 2)
    assert len(read) == len(starts) - 1
    assert stream.listing._opened.rows <= 8 + 4


def test_batches_that_cannot_be(tmp_path):
    stream = streamed("flat", tmp_path)
    with pytest.raises(DataError, match="batch size 0: expected at least 1"):
        stream.batches(0, seed=0)
    with pytest.raises(DataError, match="batch size 5 cannot be shared equally by 2 processes"):
        stream.batches(5, seed=0, world=2)
    batches = stream.batches(100, seed=0)
    assert len(run(batches, 1)[0]) == COUNT
    with pytest.raises(DataError, match="lacks epoch, position: resume from another checkpoint"):
        batches.load_state_dict({"generator": torch.tensor(0), "images": 1})
    with pytest.raises(DataError, match="order is of 21 images but there are 22"):
        batches.load_state_dict(batches.state_dict() | {"images": 21})


@pytest.mark.parametrize("workers", [0, 1])
def test_a_broken_picture_is_named(tmp_path, workers):
    folder = flat_folder(tmp_path / "set")
    (folder / "005.png").write_bytes(png(5)[:40])
    stream = load_images(folder, stream=True, workers=workers)
    batches = stream.batches(COUNT, seed=0)
    with pytest.raises(DataError) as caught:
        batches.next()
    assert str(caught.value).startswith(f"{folder / '005.png'} cannot be read as a picture (")
    assert "\n" not in str(caught.value)
    (folder / "005.png").write_bytes(png(5))
    assert sorted(run(batches, 1)[0]) == list(range(COUNT))


def test_a_picture_of_another_size_is_named(tmp_path):
    folder = flat_folder(tmp_path)
    Image.new("RGB", (3, 1)).save(folder / "007.png")
    with pytest.raises(DataError, match=r"sizes differ \(2 x 1 of 000\.png, 3 x 1 of 007\.png\): pass --size"):
        load_images(folder, stream=True).load()


# --- parts ---


def ids(data):
    return numbers(data.images)


@KINDS
def test_split_takes_validation_and_test_into_memory(tmp_path, kind):
    stream = streamed(kind, tmp_path)
    train, validation, test = split(stream, seed=1, validation=4, test=0.25)
    assert (len(train), len(validation), len(test)) == (COUNT - 4 - 6, 4, 6)
    assert isinstance(train, ImageStream)
    seen = run(train.batches(4, seed=0), 3)
    assert sorted(joined(seen) + ids(validation) + ids(test)) == list(range(COUNT))
    again = split(stream, seed=1, validation=4, test=0.25)
    assert torch.equal(again[1].images, validation.images)
    assert not torch.equal(split(stream, seed=2, validation=4, test=0.25)[1].images, validation.images)
    if kind != "flat":
        labels = dict(zip(ids(stream.load()), stream.load().labels.tolist(), strict=True))
        assert validation.labels.tolist() == [labels[n] for n in ids(validation)]
    assert [len(part) for part in split(stream, seed=0)] == [18, 2, 2]
    with pytest.raises(DataError, match="20 for validation and 2 for test leave none to train on: ask for fewer"):
        split(stream, seed=0, validation=20, test=2)


@pytest.mark.parametrize("stream", [True, False])
def test_folders_that_are_parts(tmp_path, stream):
    flat_folder(tmp_path / "train", 10)
    flat_folder(tmp_path / "val", 4, first=100)
    data = load_images(tmp_path, stream=stream, channels=3)
    assert (len(data), len(data.test), data.validation) == (10, 4, None)
    train, validation, test = split(data, seed=0)
    assert (len(train), len(validation), sorted(ids(test))) == (9, 1, [100, 101, 102, 103])
    flat_folder(tmp_path / "test", 3, first=200)
    data = load_images(tmp_path, stream=stream, channels=3, bits=7)
    train, validation, test = split(data, seed=0)
    assert (len(train), len(validation), sorted(ids(test))) == (10, 4, [100, 100, 101])
    assert {part.grey_levels for part in (train, validation, test)} == {128}


def test_a_part_needs_no_picture_of_every_class(tmp_path):
    class_folder(tmp_path / "train")
    flat_folder(tmp_path / "val" / "b", 2)
    stream = load_images(tmp_path, stream=True, workers=0)
    assert split(stream, seed=0)[2].labels.tolist() == [1, 1]
    (tmp_path / "val" / "b").rename(tmp_path / "val" / "c")
    with pytest.raises(DataError, match="val has a class c, which the training part does not have"):
        load_images(tmp_path, stream=True)
    flat_folder(tmp_path / "val" / "x").parent.rename(tmp_path / "x")
    flat_folder(tmp_path / "val")
    with pytest.raises(DataError, match=r"only some of its parts are labelled, and .*val is not one of them"):
        load_images(tmp_path, stream=True)


@pytest.mark.parametrize("kind", ["tar", "parquet"])
def test_shards_that_are_parts(tmp_path, kind):
    names = [f"set-train-0.{kind}", f"set-train-1.{kind}", f"validation-0-of-1.{kind}"]
    stream = load_images(MAKERS[kind](tmp_path, names=names), stream=True, workers=0)
    train, validation, test = split(stream, seed=0)
    assert sorted(ids(test)) == list(range(2, COUNT, 3))
    assert test.labels.tolist() == [2] * 7
    assert sorted(ids(validation) + joined(run(train.batches(7, seed=0), 2))) == [n for n in range(COUNT) if n % 3 != 2]
    (tmp_path / names[0]).rename(tmp_path / f"more.{kind}")
    with pytest.raises(DataError, match=f"named as parts .* but more.{kind} is not"):
        load_images(tmp_path)


# --- listings ---


@pytest.fixture
def scans(monkeypatch):
    """Folders that were scanned."""
    seen, scan = [], os.scandir

    def counted(path):
        seen.append(os.fsdecode(path))
        return scan(path)

    monkeypatch.setattr(listing.os, "scandir", counted)
    return seen


def test_a_folder_is_listed_once(tmp_path, scans):
    folder = class_folder(tmp_path / "set")
    stream = load_images(folder, stream=True, workers=0)
    assert sorted(scans) == [str(folder), str(folder / "a"), str(folder / "b")]
    run(split(stream, seed=0)[0].batches(4, seed=0), 9)
    again = load_images(folder, stream=True)
    assert len(scans) == 3
    assert again.fingerprint() == stream.fingerprint()
    assert torch.equal(again.load().images, stream.load().images)
    assert len(scans) == 3
    # A picture more, in a folder of a class: the root itself does not change by that.
    (folder / "b" / "new.png").write_bytes(png(50))
    assert len(load_images(folder, stream=True)) == COUNT + 1
    assert len(scans) == 6


def test_small_sets_leave_nothing_behind(tmp_path, monkeypatch, scans):
    monkeypatch.setattr(index_file, "KEEP_FROM", COUNT + 1)
    folder = flat_folder(tmp_path / "set")
    for _ in range(2):
        load_images(folder)
    assert len(scans) == 2
    assert not os.listdir(os.environ["NFKERNELS_CACHE"])


@pytest.mark.parametrize("kind", ["tar", "parquet"])
def test_shards_are_listed_again_when_one_has_changed(tmp_path, kind, monkeypatch):
    from nfkernels.training.data import pictures

    stream = streamed(kind, tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(pictures, "_list_shards", None)  # would be called
        assert load_images(tmp_path / kind, stream=True).fingerprint() == stream.fingerprint()
    shard = tmp_path / kind / f"x-1.{kind}"
    shard.write_bytes((tmp_path / kind / f"x-0.{kind}").read_bytes())
    assert load_images(tmp_path / kind, stream=True).fingerprint() != stream.fingerprint()


@pytest.mark.parametrize("damage", ["short", "text", "version"])
def test_a_damaged_index_is_made_again(tmp_path, damage, scans):
    folder = flat_folder(tmp_path / "set")
    load_images(folder)
    file = index_file.index_file(folder)
    content = file.read_bytes()
    changed = {
        "short": content[:-5],
        "text": b"text",
        "version": content.replace(rb"\"format\": \"1\"", rb"\"format\": \"0\""),
    }
    assert changed[damage] != content
    file.write_bytes(changed[damage])
    assert len(load_images(folder)) == COUNT
    assert len(scans) == 2
    assert file.read_bytes() == content


def test_an_index_that_cannot_be_kept(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("NFKERNELS_CACHE", str(tmp_path / "file"))
    with pytest.warns(UserWarning, match="list of the 22 pictures in .* cannot be kept in .*: set NFKERNELS_CACHE"):
        assert len(load_images(flat_folder(tmp_path / "set"))) == COUNT


def test_ranks_wait_for_one_of_them_to_list(tmp_path):
    pytest.importorskip("fcntl")
    folder = class_folder(tmp_path / "set")
    program = """
import os, sys, time
from nfkernels.training.data import index_file, listing, load_images
index_file.KEEP_FROM = 1
scan = os.scandir
def slow(path):
    print("scanned", flush=True)
    time.sleep(0.2)
    return scan(path)
listing.os.scandir = slow
print(len(load_images(sys.argv[1], stream=True)))
"""
    environment = {**os.environ, "WORLD_SIZE": "2"}
    ranks = [Process(["-c", program, str(folder)], env=environment) for _ in range(2)]
    lines = sorted(rank.communicate(timeout=120)[0] for rank in ranks)
    assert lines == ["22\n", "scanned\n" * 3 + "22\n"]


def test_a_fingerprint_knows_names_labels_and_options_but_not_the_place(tmp_path):
    one = load_images(class_folder(tmp_path / "one"), stream=True)
    assert one.fingerprint() == load_images(class_folder(tmp_path / "deeper" / "one"), stream=True).fingerprint()
    others = [load_images(tmp_path / "one", stream=True, **options) for options in ({"bits": 5}, {"size": 4})]
    others += [one.without_labels(), split(one, seed=0)[0], split(one, seed=1)[0]]
    (tmp_path / "one" / "a" / "000.png").rename(tmp_path / "one" / "b" / "000.png")
    others.append(load_images(tmp_path / "one", stream=True))
    assert len({one.fingerprint(), *(other.fingerprint() for other in others)}) == 7


# --- what is wrong with shards ---


def test_tar_files_that_cannot_be_read(tmp_path):
    folder = tar_folder(tmp_path / "set", names=("x.tar",))
    content = (folder / "x.tar").read_bytes()
    for damaged in (content[: 512 * 5 + 20], b"text", b""):
        (folder / "x.tar").write_bytes(damaged)
        with pytest.raises(DataError, match=r"x\.tar (is cut off in|cannot be read as an uncompressed tar file)"):
            load_images(folder)
    with tarfile.open(folder / "x.tar", "w"):
        pass
    with pytest.raises(DataError, match="the tar files hold no picture"):
        load_images(folder)
    with tarfile.open(folder / "x.tar", "w") as tar:
        for name, value in (("1.png", png(1)), ("1.cls", b"0"), ("2.png", png(2))):
            info = tarfile.TarInfo(name)
            info.size = len(value)
            tar.addfile(info, io.BytesIO(value))
    with pytest.raises(DataError, match=r"x\.tar: 2 has no \.cls label, unlike the pictures before it"):
        load_images(folder)


def test_a_broken_picture_in_a_shard_is_named(tmp_path):
    folder = tar_folder(tmp_path, names=("x.tar",))
    content = (folder / "x.tar").read_bytes()
    (folder / "x.tar").write_bytes(content.replace(png(4), b"\0" * len(png(4))))
    with pytest.raises(
        DataError, match=r"d/004\.png in .*x\.tar cannot be read as a picture \(cannot identify image file\)"
    ):
        load_images(folder)


def test_parquet_files_that_cannot_be_read(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    write = pytest.importorskip("pyarrow.parquet").write_table
    (tmp_path / "x.parquet").write_bytes(b"text")
    with pytest.raises(DataError, match=r"x\.parquet cannot be read as a Parquet file"):
        load_images(tmp_path)
    for columns, message in [
        ({"picture": [png(1)]}, "has the columns picture: expected encoded pictures in a column image or img"),
        ({"image": ["text"]}, "has the columns image: expected encoded pictures"),
        ({"image": [png(1)], "label": ["cat"]}, "label is of type string, expected whole numbers"),
        ({"image": [png(1), png(2)], "label": [1, None]}, "1 rows have no label"),
        ({"image": [png(1), png(2)], "label": [1, -2]}, "labels run from -2 to 1"),
        ({"image": [png(1), None]}, r"row 1 of .*x\.parquet holds no picture"),
        ({"image": [png(1), b"text"]}, r"row 1 of .*x\.parquet cannot be read as a picture"),
    ]:
        write(pyarrow.table(columns), tmp_path / "x.parquet")
        with pytest.raises(DataError, match=message):
            load_images(tmp_path)
    tar_folder(tmp_path)
    with pytest.raises(DataError, match=r"holds both \.parquet and \.tar shards"):
        load_images(tmp_path)


def test_a_missing_library_is_named_with_the_extra_that_brings_it(tmp_path, monkeypatch):
    parquet_folder(tmp_path)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(DataError, match=r'needs pyarrow, which is missing: pip install "nfkernels\[stream\]"'):
        load_images(tmp_path)


def test_what_cannot_be_streamed(tmp_path):
    np.save(tmp_path / "x.npy", np.zeros((3, 4, 4, 3), np.uint8))
    with pytest.raises(DataError, match=r"x\.npy is always read into memory as a whole: leave out --stream"):
        load_images(tmp_path / "x.npy", stream=True)
    for workers in (-1, True, 1.0):
        with pytest.raises(DataError, match="expected a number of processes, 0 or more"):
            load_images(tmp_path, workers=workers)


# --- training ---


def stripes_folder(path, *, labels):
    data = tiny.stripes(40, labels=True)
    for at, (image, label) in enumerate(zip(data.images, data.labels.tolist(), strict=True)):
        folder = path / data.classes[label] if labels else path
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray((image[0] * 60).numpy()).save(folder / f"{at:03}.png")
    return path


def glow(classes):
    from nfkernels.models import Glow

    torch.manual_seed(0)
    return Glow((1, 4, 4), levels=1, steps=2, hidden=8, grey_levels=16, classes=classes, dropout=0.2)


@pytest.mark.parametrize("classes", [None, 2])
def test_a_flow_is_trained_on_a_stream_as_in_memory(tmp_path, classes):
    folder = stripes_folder(tmp_path / "set", labels=classes is not None)
    stream = load_images(folder, stream=True, channels=1, bits=4, workers=1)
    train, validation, _ = split(stream, seed=0)
    in_memory = fit(glow(classes), train.load(), validation=validation, steps=7, **tiny.QUICK)
    result = fit(glow(classes), train, validation=validation, steps=7, **tiny.QUICK)
    assert result.history == in_memory.history
    # And stopped in the middle of an epoch, it goes on bit for bit.
    part = tmp_path / "run"

    def stop(now):
        return now.step == 3

    fit(glow(classes), train, validation=validation, steps=7, run=part, callback=stop, **tiny.QUICK)
    resumed = fit(glow(classes), train, validation=validation, run=part, resume=True)
    assert [entry for entry in resumed.history if entry["step"] == 7] == [
        entry for entry in result.history if entry["step"] == 7
    ]
    other = split(stream, seed=1)[0]
    with pytest.raises(TrainingError, match="train data is not what"):
        fit(glow(classes), other, validation=validation, run=part, resume=True)


def test_a_stream_is_only_trained_on(tmp_path):
    stream = load_images(stripes_folder(tmp_path, labels=False), stream=True, channels=1, bits=4)
    with pytest.raises(DataError, match=r"is streamed and so can only be trained on: take parts of it with split\(\)"):
        evaluate(glow(None), stream)
    with pytest.raises(DataError, match="has no labels, and the flow is conditioned on classes"):
        fit(glow(2), stream, steps=1)
    with pytest.raises(DataError, match="has 256 grey levels, the flow was built for 16"):
        fit(glow(None), load_images(tmp_path, stream=True, channels=1), steps=1)
