"""The time of one save, in which files of its folder are staged instead of written.

These functions are replaced while at least one window is open, and only then:

    torch.serialization._open_zipfile_writer    looked up by `torch.save` at each call
    torch.serialization._save                   pickles: gets a faster pickler for a staged file
    safetensors.torch.serialize_file            looked up by `save_file` at each call
    shutil.rmtree                               Trainer deletes older checkpoints before the new one is on the disk
    os.rename, os.replace, shutil.copyfile      what is moved or copied must be on the disk
    shutil.copytree                             the same

Each acts for the thread that opened a window and for paths below the folder of its save, and calls the original otherwise.
"""

from __future__ import annotations

import contextlib
import functools
import os
import pickle
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hf_cloudtrain.staging.job import StagedFile
from hf_cloudtrain.staging.memory import StagingMemory
from hf_cloudtrain.staging.pickling import FAST_PICKLE
from hf_cloudtrain.staging.recorders import TorchRecorder, path_of, stage_tensors, write_file


class Window:
    """One save of the thread that makes it.

    Args:
        folder: what is written below it is staged.
        deletable: whether a path that is deleted meanwhile is an older checkpoint, and waits for the new one.
        target: what the folder is called when it is whole; None: as now.

    Example:
        >>> window = Window("/out/checkpoint-500", memory)
        >>> window.open()
        >>> torch.save(model.state_dict(), "/out/checkpoint-500/model.pt")    # one copy in memory
        >>> window.close()
        >>> [file.path for file in window.files]
        ['model.pt']
    """

    def __init__(
        self,
        folder: str,
        memory: StagingMemory,
        deletable: Callable[[str], bool] = lambda path: False,
        target: str | None = None,
    ) -> None:
        self.folder = os.path.abspath(folder)
        self.target = os.path.abspath(target or folder)
        self.files: list[StagedFile] = []
        self.deleted: list[str] = []
        """What the framework wanted to delete."""
        self._memory = memory
        self._deletable = deletable
        self._thread = threading.get_ident()
        self._is_writing = False

    def open(self) -> None:
        """Stage from now on."""
        self._memory.used = 0
        _seams.add(self._thread, self)

    def close(self) -> None:
        """Write as always from now on."""
        _seams.remove(self)

    def relative(self, file: Any) -> str | None:
        """The path of a file below the folder; None for any other, behind a link, and where writing it fails as always."""
        path = path_of(file)
        if (
            path is None
            or self._is_writing
            or not path.startswith(self.folder + os.sep)
            or not os.path.isdir(os.path.dirname(path))
        ):
            return None
        relative = os.path.relpath(path, self.folder)
        real = os.path.join(os.path.realpath(self.folder), relative)
        return relative if os.path.realpath(path) == real else None

    def keep(self, file: StagedFile) -> None:
        """Take a complete file."""
        self.files.append(file)

    def missing(self) -> list[StagedFile]:
        """The staged files that are not on the disk: the script may have written some again since."""
        return [file for file in self.files if not os.path.lexists(os.path.join(self.folder, file.path))]

    def begin(self, relative: str) -> None:
        """A file is written: no reader must find an older one of its name, on the disk or staged."""
        self.files = [other for other in self.files if other.path != relative]
        with contextlib.suppress(FileNotFoundError):
            os.unlink(os.path.join(self.folder, relative))

    def open_archive(self, file: Any, relative: str, original: Callable[[Any], Any]) -> Any:
        """For `torch.save`."""
        self.begin(relative)
        return TorchRecorder(os.fspath(file), relative, self._memory, self.keep, original)

    def serialize(self, specs: Any, relative: str, metadata: Any, options: dict[str, Any]) -> bool:
        """For `safetensors.torch.save_file`; False if the file must be written as always."""
        self.begin(relative)
        staged = None
        if not options and isinstance(specs, dict):
            staged = stage_tensors(specs, relative, metadata, self._memory)
        if staged is not None:
            self.keep(staged)
        return staged is not None

    def write_now(self, path: Any) -> None:
        """What is staged below a path is written now."""
        absolute = path_of(path)
        found = [] if absolute is None else [file for file in self.files if self._is_in(file, absolute)]
        self.files = [file for file in self.files if file not in found]
        self._is_writing = True
        try:
            for file in found:
                write_file(Path(self.folder, file.path), file, self._memory)
        finally:
            self._is_writing = False

    def moves(self, source: Any, target: Any) -> None:
        """For `os.rename` and copies: what is staged below the source is written now, and what it replaces is not staged."""
        self.write_now(source)
        absolute = path_of(target) or ""
        if absolute.startswith(self.folder + os.sep):
            self.files = [file for file in self.files if not self._is_in(file, absolute)]

    def _is_in(self, file: StagedFile, absolute: str) -> bool:
        return f"{os.path.join(self.folder, file.path)}{os.sep}".startswith(absolute + os.sep)

    def delays(self, path: Any) -> bool:
        """For `shutil.rmtree`: whether a folder is deleted once this save is whole."""
        absolute = path_of(path)
        if absolute is None:
            return False
        self.files = [file for file in self.files if not self._is_in(file, absolute)]
        if not self.files or not self._deletable(absolute):
            return False
        self.deleted.append(absolute)
        return True


_MOVES = ((os, "rename"), (os, "replace"), (shutil, "copyfile"))
"""A script may write a file under a temporary name and rename it, or copy what it has written."""


class _Seams:
    """The replaced functions, counted: two trainers in one process may save at once, and end in any order."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._windows: list[tuple[int, Window]] = []
        self._replaced: list[tuple[Any, str, Any, Any]] = []

    def windows(self) -> list[Window]:
        """Of the calling thread; the one that was opened last comes first."""
        thread = threading.get_ident()
        return [window for owner, window in reversed(self._windows) if owner == thread]

    def window_of(self, file: Any) -> tuple[Window | None, str]:
        """The window that stages a file, and the file's path below its folder."""
        for window in self.windows():
            if (relative := window.relative(file)) is not None:
                return window, relative
        return None, ""

    def add(self, thread: int, window: Window) -> None:
        with self._lock:
            if not self._replaced:
                self._install()
            self._windows = [*self._windows, (thread, window)]

    def remove(self, window: Window) -> None:
        with self._lock:
            self._windows = [item for item in self._windows if item[1] is not window]
            if not self._windows:
                for home, name, original, ours in self._replaced:
                    # Whatever has replaced ours in the meantime stays, and ours below it does nothing.
                    if getattr(home, name) is ours:
                        setattr(home, name, original)
                self._replaced = []

    def _moving(self, original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def move(src: Any, dst: Any, *args: Any, **options: Any) -> Any:
            for window in self.windows():
                window.moves(src, dst)
            return original(src, dst, *args, **options)

        return move

    def _copying(self, original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def copytree(src: Any, dst: Any, *args: Any, **options: Any) -> Any:
            for window in self.windows():
                window.write_now(src)
                window.write_now(dst)  # the copy may replace some of its files
            return original(src, dst, *args, **options)

        return copytree

    def _install(self) -> None:
        import safetensors.torch
        from torch import serialization

        archive = serialization._open_zipfile_writer
        save: Callable[..., None] = serialization._save
        serialize = safetensors.torch.serialize_file  # type: ignore[attr-defined]
        remove = shutil.rmtree

        def open_archive(name_or_buffer: Any) -> Any:
            window, relative = self.window_of(name_or_buffer)
            if window is None:
                return archive(name_or_buffer)
            return window.open_archive(name_or_buffer, relative, archive)

        def save_faster(obj: Any, zip_file: Any, pickle_module: Any, *args: Any, **options: Any) -> None:
            if isinstance(zip_file, TorchRecorder) and pickle_module is pickle:
                pickle_module = FAST_PICKLE
            save(obj, zip_file, pickle_module, *args, **options)

        def serialize_file(tensor_dict: Any, filename: Any, metadata: Any = None, **options: Any) -> Any:
            window, relative = self.window_of(filename)
            if window is not None and window.serialize(tensor_dict, relative, metadata, options):
                return None
            return serialize(tensor_dict, filename, metadata=metadata, **options)

        def rmtree(path: Any, *args: Any, **options: Any) -> Any:
            if not any(window.delays(path) for window in self.windows()):
                remove(path, *args, **options)

        vars(rmtree).update(vars(remove))  # rmtree.avoids_symlink_attacks
        for home, name, ours in (
            (serialization, "_open_zipfile_writer", open_archive),
            (serialization, "_save", save_faster),
            (safetensors.torch, "serialize_file", serialize_file),
            (shutil, "rmtree", rmtree),
            (shutil, "copytree", self._copying(shutil.copytree)),
            *((home, name, self._moving(getattr(home, name))) for home, name in _MOVES),
        ):
            self._replaced.append((home, name, getattr(home, name), ours))
            setattr(home, name, ours)


_seams = _Seams()
