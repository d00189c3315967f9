"""The time of one save, in which files of its folder are staged instead of written.

Three functions are replaced while at least one window is open, and only then:

    torch.serialization._open_zipfile_writer    looked up by `torch.save` at each call
    safetensors.torch.serialize_file            looked up by `save_file` at each call
    shutil.rmtree                               Trainer deletes older checkpoints before the new one is on the disk

Each acts for the thread that opened a window and for paths below the folder of its save, and calls the original otherwise.
"""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Callable
from typing import Any

from hf_cloudtrain.staging.job import StagedFile
from hf_cloudtrain.staging.memory import StagingMemory
from hf_cloudtrain.staging.recorders import TorchRecorder, path_of, stage_tensors


class Window:
    """One save of the thread that makes it.

    Args:
        folder: absolute; what is written below it is staged.
        deletable: whether a path that is deleted meanwhile is an older checkpoint, and waits for the new one.

    Example:
        >>> window = Window("/out/checkpoint-500", memory)
        >>> window.open()
        >>> torch.save(model.state_dict(), "/out/checkpoint-500/model.pt")    # one copy in memory
        >>> window.close()
        >>> [file.path for file in window.files]
        ['model.pt']
    """

    def __init__(
        self, folder: str, memory: StagingMemory, deletable: Callable[[str], bool] = lambda path: False
    ) -> None:
        self.folder = folder
        self.files: list[StagedFile] = []
        self.deleted: list[str] = []
        """What the framework wanted to delete."""
        self._memory = memory
        self._deletable = deletable
        self._thread = threading.get_ident()

    def open(self) -> None:
        """Stage from now on."""
        self._memory.used = 0
        _seams.add(self._thread, self)

    def close(self) -> None:
        """Write as always from now on."""
        _seams.remove(self._thread, self)

    @property
    def is_open(self) -> bool:
        """Whether it stages."""
        return _seams.window() is self

    def relative(self, file: Any) -> str | None:
        """The path of a file below the folder; None for any other."""
        path = path_of(file)
        inside = path is not None and path.startswith(self.folder + os.sep)
        return os.path.relpath(path, self.folder) if path is not None and inside else None

    def keep(self, file: StagedFile) -> None:
        """Take a complete file, which replaces an earlier one of its name."""
        self.files = [other for other in self.files if other.path != file.path] + [file]
        # A reader must not find an older file under this name.
        if os.path.lexists(path := os.path.join(self.folder, file.path)):
            os.unlink(path)

    def forget(self, relative: str) -> None:
        """A file is written as always, in place of one that was staged under its name."""
        self.files = [other for other in self.files if other.path != relative]

    def open_archive(self, file: Any, original: Callable[[Any], Any]) -> Any:
        """For `torch.save`."""
        relative = self.relative(file)
        if relative is None:
            return original(file)
        self.forget(relative)
        return TorchRecorder(os.fspath(file), relative, self._memory, self.keep, original)

    def serialize(
        self, specs: Any, file: Any, metadata: Any, original: Callable[..., Any], options: dict[str, Any]
    ) -> Any:
        """For `safetensors.torch.save_file`."""
        relative = self.relative(file)
        staged = None
        if relative is not None:
            self.forget(relative)
            if not options and isinstance(specs, dict):
                staged = stage_tensors(specs, relative, metadata, self._memory)
        if staged is None:
            return original(specs, file, metadata=metadata, **options)
        self.keep(staged)
        return None

    def delete(self, path: Any, original: Callable[..., Any], *args: Any, **options: Any) -> Any:
        """For `shutil.rmtree`."""
        absolute = path_of(path)
        if absolute is None or not self.files or not self._deletable(absolute):
            return original(path, *args, **options)
        self.deleted.append(absolute)
        return None


class _Seams:
    """The replaced functions, counted: two trainers in one process may save at once, and end in any order."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._windows: dict[int, Window] = {}
        self._originals: list[tuple[Any, str, Any]] = []

    def window(self) -> Window | None:
        """Of the calling thread."""
        return self._windows.get(threading.get_ident())

    def add(self, thread: int, window: Window) -> None:
        with self._lock:
            self._windows[thread] = window
            if not self._originals:
                self._install()

    def remove(self, thread: int, window: Window) -> None:
        with self._lock:
            if self._windows.get(thread) is window:
                del self._windows[thread]
            if not self._windows:
                for home, name, original in self._originals:
                    setattr(home, name, original)
                self._originals = []

    def _install(self) -> None:
        import safetensors.torch
        from torch import serialization

        archive = serialization._open_zipfile_writer
        serialize = safetensors.torch.serialize_file  # type: ignore[attr-defined]
        remove = shutil.rmtree

        def open_archive(name_or_buffer: Any) -> Any:
            window = self.window()
            return archive(name_or_buffer) if window is None else window.open_archive(name_or_buffer, archive)

        def serialize_file(tensor_dict: Any, filename: Any, metadata: Any = None, **options: Any) -> Any:
            window = self.window()
            if window is None:
                return serialize(tensor_dict, filename, metadata=metadata, **options)
            return window.serialize(tensor_dict, filename, metadata, serialize, options)

        def rmtree(path: Any, *args: Any, **options: Any) -> Any:
            window = self.window()
            if window is None:
                return remove(path, *args, **options)
            return window.delete(path, remove, *args, **options)

        vars(rmtree).update(vars(remove))  # rmtree.avoids_symlink_attacks
        for home, name, ours in (
            (serialization, "_open_zipfile_writer", open_archive),
            (safetensors.torch, "serialize_file", serialize_file),
            (shutil, "rmtree", rmtree),
        ):
            self._originals.append((home, name, getattr(home, name)))
            setattr(home, name, ours)


_seams = _Seams()
