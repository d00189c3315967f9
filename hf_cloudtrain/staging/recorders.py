"""What stands in for a file during a staged save: it keeps what would be written, and copies tensors into the shared memory.

torch.save pickles in this process, so the writer needs no class of the user: it gets the records of the zip archive. The functions
here know the private seams of torch and safetensors; where one looks different, the file is written as always.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hf_cloudtrain.staging.archive import names_of, suits, write_archive
from hf_cloudtrain.staging.copies import Copies
from hf_cloudtrain.staging.job import StagedFile
from hf_cloudtrain.staging.memory import StagingMemory

SMALL_FILE = 2**20
"""Bytes below which a file is written at once: that takes less time than to describe it."""


class TorchRecorder:
    """The zip archive of one `torch.save`, as `torch.serialization._open_zipfile_writer` opens it.

    Args:
        path: of the file.
        relative: the same, as the writer is told.
        keep: takes the file, once it is complete.
        open_file: opens the real archive.
    """

    def __init__(
        self,
        path: str,
        relative: str,
        memory: StagingMemory,
        keep: Callable[[StagedFile], None],
        open_file: Callable[[str], Any],
    ) -> None:
        self._path = path
        self._relative = relative
        self._memory = memory
        self._copies = Copies(memory)
        self._keep = keep
        self._open_file = open_file
        self._start = memory.used
        self._records: list[tuple[str, int, int]] = []
        self._real: Any = None
        """The real archive, where the file does not fit into the memory."""
        self._collects = False

    def __enter__(self) -> TorchRecorder:  # noqa: PYI034 - typing.Self needs Python 3.11
        # Pickling makes 100,000s of objects and no garbage; collections would take half of the time.
        self._collects = gc.isenabled()
        gc.disable()
        return self

    def write_record(self, name: str, data: Any, size: int) -> None:
        """As `PyTorchFileWriter.write_record`: `data` is text, bytes, a storage, or an address."""
        if self._real is None:
            self._begin()
            offset = self._copy(data, size)
            if offset is not None:
                self._records.append((name, offset, size))
                return
            self._write_for_real()
        self._writer.write_record(name, data, size)

    def __getattr__(self, name: str) -> Any:
        """Anything else that torch calls is for the real archive."""
        if name.startswith("_"):
            raise AttributeError(name)
        self._write_for_real()
        return getattr(self._writer, name)

    def __exit__(self, *failure: object) -> None:
        if self._collects:
            gc.enable()
        self._begin()
        if failure[0] is None and self._real is None:
            if self._memory.used - self._start >= SMALL_FILE:
                self._copies.finish()
                self._keep(
                    StagedFile(
                        self._relative, "torch", self._records, archive_options(self._path, self._records)
                    )
                )
                return
            self._write_for_real()
        self._copies.drop()
        self._memory.used = self._start
        if self._real is not None:
            self._real.__exit__(*failure)

    def _begin(self) -> None:
        """What is in memory now is not of this file: an object of the script may save a file of its own when it is pickled."""
        if not self._records:
            self._start = self._memory.used

    def _copy(self, data: Any, size: int) -> int | None:
        if isinstance(data, str):
            data = data.encode()
        if isinstance(data, bytes):
            return self._memory.put(data[:size])
        if isinstance(data, int):
            return self._memory.copy(data, size)
        return self._copies.add(data.data_ptr(), size, data)

    def _write_for_real(self) -> None:
        if self._real is None:
            self._copies.finish()
            self._real = self._open_file(self._path)
            self._writer = self._real.__enter__()
            replay(self._writer, self._memory, self._records)


def replay(writer: Any, memory: StagingMemory, records: list[Any]) -> None:
    """Write records that are in memory into a `torch._C.PyTorchFileWriter`."""
    import torch

    for name, offset, size in records:
        data: Any = b""
        if size:  # a storage of its bytes; an address would do, and is deprecated
            data = torch.frombuffer(memory.view(offset, size), dtype=torch.uint8).untyped_storage()
        writer.write_record(name, data, size)


def write_file(path: Path, file: StagedFile, memory: StagingMemory) -> None:
    """Write one staged file, byte for byte as the framework would have written it at this path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)  # an outbox may have a link to it
    if file.kind == "torch" and file.options["names"] is not None:
        records = ((name, memory.view(offset, size), size) for name, offset, size in file.parts)
        write_archive(path, records, file.options["names"], file.options["alignment"])
    elif file.kind == "torch":
        from torch import serialization
        from torch.utils.serialization import config

        serialization.set_crc32_options(file.options["crc32"])
        if "alignment" in file.options:
            config.save.storage_alignment = file.options["alignment"]
        with serialization._open_zipfile_writer(str(path)) as archive:
            replay(archive, memory, file.parts)
    else:
        from safetensors import TensorSpec, serialize_file

        specs = {
            name: TensorSpec(
                dtype=DTYPES[dtype], shape=shape, data_ptr=memory.address + offset, data_len=size
            )
            for name, dtype, shape, offset, size in file.parts
        }
        serialize_file(specs, str(path), metadata=file.options["metadata"])


def archive_options(path: str, records: list[tuple[str, int, int]]) -> dict[str, Any]:
    """The settings of this process that are part of an archive, and what the writer needs to make it without torch."""
    from torch import serialization

    options: dict[str, Any] = {"crc32": serialization.get_crc32_options(), "names": None}
    if hasattr(serialization, "_get_storage_alignment"):
        options["alignment"] = serialization._get_storage_alignment()
    if suits(path, [size for _, _, size in records], options):
        options["names"] = names_of(tuple(name for name, _, _ in records))
    return options


def stage_tensors(
    specs: dict[str, Any], relative: str, metadata: dict[str, str] | None, memory: StagingMemory
) -> StagedFile | None:
    """Copy what `safetensors.serialize_file` gets; None if it must be written as always.

    Args:
        specs: of safetensors 0.8: `TensorSpec` by name. Older releases pass bytes.
    """
    if not specs or not all(hasattr(spec, "data_ptr") for spec in specs.values()):
        return None
    if sum(spec.data_len for spec in specs.values()) < SMALL_FILE:
        return None
    start, copies = memory.used, Copies(memory)
    parts: list[tuple[Any, ...]] = []
    for name, spec in specs.items():
        offset = copies.add(spec.data_ptr, spec.data_len, None)  # the caller keeps the tensors
        if offset is None or spec.dtype not in DTYPES:
            copies.drop()
            memory.used = start
            return None
        parts.append((name, spec.dtype, list(spec.shape), offset, spec.data_len))
    copies.finish()
    return StagedFile(relative, "safetensors", parts, {"metadata": metadata})


DTYPES = {
    "BOOL": "bool",
    "U8": "uint8",
    "I8": "int8",
    "I16": "int16",
    "U16": "uint16",
    "F16": "float16",
    "BF16": "bfloat16",
    "I32": "int32",
    "U32": "uint32",
    "F32": "float32",
    "F64": "float64",
    "I64": "int64",
    "U64": "uint64",
    "C64": "complex64",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F8_E8M0": "float8_e8m0fnu",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
}
"""safetensors' own names of types, and the names that its constructor wants. Packed types (F4) are written as always."""


def path_of(file: Any) -> str | None:
    """The absolute path of what is given as a file; None for file objects."""
    if isinstance(file, str | os.PathLike):
        path = os.fspath(file)
        return os.path.abspath(path) if isinstance(path, str) else None
    return None
