"""obstore and opendal behind the interface of `hf_cloudtrain/storage/native.py`: the values of docs/decisions/0001-native-client.md.

Both send and fetch the same folder with `upload(source, size, path, on_bytes)` and `download(path, target, size, on_bytes)`, and compute
the digest on the way. Two files at a time, four parts of a file at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from io import FileIO
from typing import Any

from benchmarks.clients import Place, for_each_file, obstore_store, opendal_operator
from benchmarks.measure import GB, LINKS, Checkpoint, Contestant, Scale, Timing, Workplace, side_by_side
from benchmarks.report import Row
from benchmarks.sink import Sink
from hf_cloudtrain.storage.backend import PART_SIZE
from hf_cloudtrain.storage.digest import Digest
from hf_cloudtrain.storage.native import PARTS_IN_FLIGHT, NativeTransfer

BLOCK = 2**20


class OpendalTransfer:
    """`NativeTransfer` with opendal. A download is one stream for each file, because parallel ranges were slower."""

    def __init__(self, operator: Any) -> None:
        self._operator = operator

    def upload(self, source: FileIO, size: int, path: str, on_bytes: Callable[[int], None]) -> str:
        digest = Digest()
        with self._operator.open(path, "wb", chunk=PART_SIZE // 2, concurrent=PARTS_IN_FLIGHT) as target:
            while block := source.read(BLOCK):
                digest.update(block)
                target.write(block)
                on_bytes(len(block))
        return str(digest)

    def download(self, path: str, target: FileIO, size: int, on_bytes: Callable[[int], None]) -> str:
        digest = Digest()
        buffer = bytearray(BLOCK)
        view = memoryview(buffer)
        with self._operator.open(path, "rb") as source:
            while count := source.readinto(buffer):
                digest.update(view[:count])
                target.write(view[:count])
                on_bytes(count)
        return str(digest)


def run(scale: Scale) -> list[Row]:
    rows = []
    with Workplace() as work:
        checkpoint = Checkpoint(work.folder / "checkpoint", scale.pick(440_000_000, 30_000_000))
        for link, rate in LINKS.items():
            with Sink(rate) as sink:
                place = Place.of(sink)
                transfers = {
                    "obstore": NativeTransfer(obstore_store(place), "obstore"),
                    "opendal": OpendalTransfer(opendal_operator(place)),
                }
                contestants = [_upload(name, transfer, checkpoint) for name, transfer in transfers.items()]
                contestants += [
                    _download(name, transfer, checkpoint, work) for name, transfer in transfers.items()
                ]
                timings = side_by_side(contestants, scale.pick(3, 1))
            rows += [
                _row(f"seam, {what}, {link}", checkpoint, timings, what) for what in ("upload", "download")
            ]
    return rows


def _row(label: str, checkpoint: Checkpoint, timings: dict[str, Timing], what: str) -> Row:
    def shown(name: str) -> str:
        timing = timings[f"{what} {name}"]
        return (
            f"{name} {checkpoint.size / timing.median / GB:.2f} GB/s, "
            f"{timing.median_cpu / checkpoint.size * GB:.2f} CPU s a GB"
        )

    ratio = timings[f"{what} opendal"].median / timings[f"{what} obstore"].median
    return Row(label, shown("obstore"), shown("opendal"), f"{ratio:.2f}")


def _upload(name: str, transfer: Any, checkpoint: Checkpoint) -> Contestant:
    def one(file: str) -> None:
        with open(checkpoint.folder / file, "rb", buffering=0) as source:
            transfer.upload(source, checkpoint.sizes[file], file, _ignore)

    return Contestant(f"upload {name}", lambda: for_each_file(checkpoint, one))


def _download(name: str, transfer: Any, checkpoint: Checkpoint, work: Workplace) -> Contestant:
    target = work.folder / "downloaded"

    def one(file: str) -> None:
        with open(target / file, "w+b", buffering=0) as got:
            transfer.download(file, got, checkpoint.sizes[file], _ignore)

    return Contestant(
        f"download {name}",
        lambda: for_each_file(checkpoint, one),
        prepare=lambda: work.fresh("downloaded"),
    )


def _ignore(count: int) -> None:
    """Ignore the progress."""
