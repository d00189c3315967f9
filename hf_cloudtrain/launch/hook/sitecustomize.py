"""Runs at the start of each Python below `cloudtrain launch`, before the script.

It must stay cheap and stand alone: this Python may have no `hf_cloudtrain`, or be an old one. It waits until a module of
`_AWAITED` is imported, and only then imports the package. At its end it runs the `sitecustomize` that this Python would
have found without it.
"""

from __future__ import annotations

import os
import sys

TYPE_CHECKING = False  # the import of `typing` would cost more than all of this file
if TYPE_CHECKING:
    from importlib.machinery import ModuleSpec
    from types import ModuleType
    from typing import Any

_AWAITED = ("transformers.trainer", "accelerate.accelerator")


class _Awaiting:
    """On `sys.meta_path`: finds nothing itself, and hooks an awaited module once it has been executed.

    It stays there. Imports of other threads may be walking through the list, and would miss a finder if it became shorter.
    """

    is_of_cloudtrain_launch = True

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name not in _AWAITED:
            return None
        for finder in list(sys.meta_path):
            find = None if finder is self else getattr(finder, "find_spec", None)
            spec: ModuleSpec | None = None if find is None else find(name, path, target)
            if spec is not None:
                if spec.loader is not None:
                    spec.loader = _Loader(spec.loader)  # type: ignore[assignment]
                return spec
        return None


class _Loader:
    """The loader of an awaited module, which gets its true loader back before its first line runs."""

    def __init__(self, loader: Any) -> None:
        self._loader = loader

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def exec_module(self, module: ModuleType) -> None:
        module.__loader__ = self._loader
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        self._loader.exec_module(module)
        _hook(module)


def _hook(module: ModuleType) -> None:
    try:
        from hf_cloudtrain.launch import hooks
    except ImportError as error:
        _note("without-package", sys.executable)
        message = "[hf_cloudtrain] %s is not hooked, because %s cannot import hf_cloudtrain (%s). Install it there, in the version of `cloudtrain launch`.\n"
        sys.stderr.write(message % (module.__name__, sys.executable, error))
        return
    hooks.install(module)


def _note(what: str, value: str = "") -> None:
    """As `launch/notes.py`, which reads it."""
    path = os.environ.get("HF_CLOUDTRAIN_LAUNCH_NOTES")
    if not path:
        return
    try:
        file = os.open(path, os.O_WRONLY | os.O_APPEND)
    except OSError:  # of a launch that is over
        return
    try:
        os.write(file, f"{os.getpid()}\t{what}\t{value}\n".encode("utf-8", "replace"))
    except OSError:
        pass
    finally:
        os.close(file)


def _run_next() -> None:
    """Run the `sitecustomize` that was found without this one, under its own name; what it raises is shown by Python."""
    from importlib.machinery import PathFinder
    from importlib.util import module_from_spec

    here = os.path.dirname(os.path.abspath(__file__))
    others = [path for path in sys.path if os.path.abspath(path or os.curdir) != here]
    spec = PathFinder.find_spec("sitecustomize", others)
    if spec is None or spec.loader is None:
        return
    module = module_from_spec(spec)
    sys.modules["sitecustomize"] = module
    spec.loader.exec_module(module)


if os.environ.get("HF_CLOUDTRAIN_LAUNCH", "").strip().lower() == "off":
    _note("off")
elif not any(getattr(finder, "is_of_cloudtrain_launch", False) for finder in sys.meta_path):
    _note("python")
    sys.meta_path.insert(0, _Awaiting())
_run_next()
