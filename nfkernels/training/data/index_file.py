"""Listings kept from one start to the next, so that what has not changed is not listed again."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ..._atomic import atomic_write
from .listing import FolderListing, Listing, Stamps, stamp
from .shards import ParquetListing, TarListing

_FORMAT = "1"
# Below this many pictures, listing again is quicker than anyone notices, and leaves nothing behind.
KEEP_FROM = 10_000
_KINDS = {cls.__name__: cls for cls in (FolderListing, TarListing, ParquetListing)}


def index_file(root: Path) -> Path:
    """Where the listing of a folder or file is kept: in ``$NFKERNELS_CACHE``, or else in the user's cache folder."""
    own, shared = os.environ.get("NFKERNELS_CACHE"), os.environ.get("XDG_CACHE_HOME")
    folder = Path(own) if own else (Path(shared) if shared else Path.home() / ".cache") / "nfkernels"
    place = root.resolve()
    return folder / "listings" / f"{place.name}-{hashlib.sha256(os.fsencode(place)).hexdigest()[:16]}.safetensors"


def kept_listing(root: Path, make: Callable[[], tuple[Listing, Stamps]]) -> Listing:
    """The listing of ``root``: from its index file if nothing has changed since, or else from ``make``.

    A listing of many pictures is then written to the index file, from which it is mapped into memory, not read. The
    processes of a distributed run that share a cache folder wait for the first of them, which lists for all.

    Raises:
        DataError: as ``make`` does.
    """
    file = index_file(root)
    with _one_process_at_a_time(file.parent):
        listing = _load(file, root)
        if listing is None:
            listing, stamps = make()
            if len(listing) >= KEEP_FROM:
                _save(file, listing, stamps)
    return listing


def _load(file: Path, root: Path) -> Listing | None:
    """None where there is no index, or one that is damaged, of another version or out of date."""
    if not file.is_file():
        return None
    try:
        with safe_open(file, framework="pt") as content:
            facts = json.loads(content.metadata()["listing"])
            if facts["format"] != _FORMAT:
                return None
            for path, then in facts["stamps"].items():
                if stamp(root / path) != then:
                    return None
            tensors = {key: content.get_tensor(key) for key in facts["tensors"]}
        return _KINDS[facts["kind"]].restored(root, tensors, facts["facts"])
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _save(file: Path, listing: Listing, stamps: Stamps) -> None:
    tensors = listing.tensors()
    facts = {"format": _FORMAT, "kind": type(listing).__name__, "stamps": stamps, "facts": listing.facts()}
    facts["tensors"] = list(tensors)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(file) as temporary:
            save_file(tensors, temporary, {"listing": json.dumps(facts)})
    except (OSError, SafetensorError) as error:
        warnings.warn(
            f"the list of the {len(listing)} pictures in {listing.root} cannot be kept in {file} ({error}), so it is "
            "made again at every start: set NFKERNELS_CACHE to a folder that can be written",
            stacklevel=2,
        )


@contextlib.contextmanager
def _one_process_at_a_time(folder: Path) -> Iterator[None]:
    """Among the processes of a distributed run; without file locks, each goes its own way."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield
        return
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError, ImportError):
            import fcntl  # not on Windows

            folder.mkdir(parents=True, exist_ok=True)
            lock = stack.enter_context(open(folder / "lock", "ab"))
            fcntl.flock(lock, fcntl.LOCK_EX)  # let go of when the file is closed
        yield
