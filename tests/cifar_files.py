"""Generate CIFAR datasets in the original layout: pickles as Python 2 and an old numpy wrote them."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np

CLASSES = {"cifar10": 10, "cifar100": 100}
ROWS = 40
"""Images in each file."""


def write_set(folder: Path, dataset: str) -> None:
    """Write the folder of one dataset below `folder`. Each class has its own colour, so that a model can learn it."""
    if dataset == "cifar10":
        home, names, key = folder / "cifar-10-batches-py", ("batches.meta", "label_names"), "labels"
        files = [*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"]
    else:
        home, names, key = folder / "cifar-100-python", ("meta", "fine_label_names"), "fine_labels"
        files = ["train", "test"]
    home.mkdir(parents=True)
    for number, name in enumerate(files):
        pixels, labels = content_of(dataset, number)
        content = {"batch_label": "generated", key: labels, "data": pixels}
        (home / name).write_bytes(b"\x80\x02" + python2(content) + b".")
    (home / names[0]).write_bytes(b"\x80\x02" + python2({names[1]: names_of(dataset)}) + b".")


def content_of(dataset: str, number: int = 0) -> tuple[np.ndarray, list[int]]:
    """Return pixels (40, 3072) and labels of the file with this number; the test file is the last."""
    chance = np.random.default_rng((len(dataset), number))
    labels = chance.integers(0, CLASSES[dataset], ROWS)
    colours = np.random.default_rng(7).integers(40, 215, (CLASSES[dataset], 3))[labels]
    pixels = colours[:, :, None] + chance.integers(-40, 40, (ROWS, 3, 32 * 32))
    return pixels.astype(np.uint8).reshape(ROWS, -1), labels.tolist()


def names_of(dataset: str) -> list[str]:
    return [f"class {number}" for number in range(CLASSES[dataset])]


def python2(value: object) -> bytes:
    """Return the opcodes that push the value, as Python 2 wrote them in protocol 2."""
    if isinstance(value, dict):
        return b"}(" + b"".join(python2(key) + python2(item) for key, item in value.items()) + b"u"
    if isinstance(value, list):
        return b"](" + b"".join(map(python2, value)) + b"e"
    if isinstance(value, tuple):
        return b"(" + b"".join(map(python2, value)) + b"t"
    if isinstance(value, str):
        text = value.encode("latin1")
        return (b"U" + bytes([len(text)]) if len(text) < 256 else b"T" + struct.pack("<i", len(text))) + text
    if isinstance(value, int):
        return b"J" + struct.pack("<i", value)
    assert isinstance(value, np.ndarray)
    assert value.dtype == np.uint8
    return array(value.shape, value.tobytes())


def array(shape: tuple[int, ...], raw: bytes, code: str = "u1") -> bytes:
    """Return the opcodes that push an array with any shape, bytes and type, right or wrong."""
    new = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n" + python2((0,)) + python2("b") + b"tR"
    kind = b"cnumpy\ndtype\n" + python2((code, 0, 1)) + b"R(J\x03\0\0\0" + python2("|") + b"NNN"
    kind += python2(-1) + python2(-1) + python2(0) + b"tb"
    return new + b"(" + python2(1) + python2(shape) + kind + b"\x89" + python2(raw.decode("latin1")) + b"tb"
