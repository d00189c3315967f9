"""The description of one staged save, which the training puts into the shared memory and the writer reads from it.

It travels in the memory, because a slow writer would make the training wait at a socket.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class StagedFile:
    """One file that is in memory only."""

    path: str
    """Relative to the folder of the checkpoint."""
    kind: str
    """`torch` or `safetensors`."""
    parts: list[tuple[Any, ...]]
    """torch: name, offset, size of each record. safetensors: name, dtype, shape, offset, size of each tensor."""
    options: dict[str, Any] = field(default_factory=dict)
    """torch: the options of its file writer. safetensors: the metadata."""

    @property
    def size(self) -> int:
        """Bytes of its parts."""
        return sum(part[-1] for part in self.parts)


@dataclass(frozen=True)
class WriteJob:
    """What the writer does for one save."""

    output_dir: str
    folder: str
    """Where the other files of the checkpoint are, and where the staged ones are written."""
    target: str
    """The name that the folder gets when it is whole."""
    files: list[StagedFile]
    entry: str
    """The outbox entry, encoded, without its files."""
    inode: int = 0
    """Of `folder`, which keeps it when it is renamed."""
    since_ns: int = 0
    """See `Outbox.accept`."""
    delete: list[str] = field(default_factory=list)
    """Older checkpoints, which the framework wanted to delete; they go when the new one is whole."""
    in_place: bool = False
    """Whether `target` is a folder that is written again and again: it gets copies of the staged files, and keeps its name."""
    connection: tuple[str, dict[str, Any]] | None = None
    """URL and options of the run's storage, for the upload if the training is killed."""

    @property
    def size(self) -> int:
        """Bytes of the staged files."""
        return sum(file.size for file in self.files)

    def encode(self) -> bytes:
        """As bytes for `decode`."""
        # Not dataclasses.asdict, which copies every one of 30,000 parts.
        record = {**vars(self), "files": [vars(file) for file in self.files]}
        return json.dumps(record, separators=(",", ":")).encode()

    @classmethod
    def decode(cls, data: bytes) -> WriteJob:
        """The job in bytes that `encode` made."""
        record = json.loads(data)
        return cls(**{**record, "files": [StagedFile(**file) for file in record["files"]]})
