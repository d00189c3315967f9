"""What transformers and peft would read or run because the files of a model say so, and what is refused of it.

- The index of shards may name any file of this machine, and a pickle.
- `config.json` may name a kernel for attention: compiled code on the Hub.
- The record of an adapter may name modules to import (Megatron) and other adapters (X-LoRA).
"""

from __future__ import annotations

import contextlib
import pickle
from collections.abc import Collection, Iterator
from typing import Any, NoReturn

from hf_cloudtrain.errors import ConfigurationError

WEIGHTS = ".safetensors"
INDEX = ".index.json"
"""How the name of an index of shards ends."""
KERNELS = ("attn_implementation", "experts_implementation")
"""How the names of settings end that may name a kernel."""

ADAPTERS = ("LORA", "ADALORA", "LOHA", "LOKR", "IA3")
"""Types of adapters that peft merges into their model."""


def check_index(index: dict[str, Any], names: Collection[str], title: str) -> None:
    """Refuse an index of shards that names other files than the safetensors of its own folder. Raises ConfigurationError."""
    shards = index.get("weight_map")
    named = shards.values() if isinstance(shards, dict) else [shards]
    for name in named:
        if not isinstance(name, str) or not name.endswith(WEIGHTS) or name not in names:
            raise ConfigurationError(
                f"The index of the weights of {title} names {str(name)[:100]!r}, which is not one of its safetensors. Choose a "
                "different checkpoint."
            )


def check_config(config: object, title: str) -> None:
    """Refuse settings of a model, at any depth, that name a kernel on the Hub. Raises ConfigurationError."""
    found = [config]
    while found:
        now = found.pop()
        found += now.values() if isinstance(now, dict) else now if isinstance(now, list) else ()
        for name, value in now.items() if isinstance(now, dict) else ():
            if str(name).endswith(KERNELS) and "/" in str(value):
                raise ConfigurationError(
                    f"config.json of {title} sets {name} to {str(value)[:100]!r}, which is code on the Hub. No code that a model "
                    "names is run. Remove the setting, and serve the folder."
                )


def check_adapter(record: dict[str, Any], title: str) -> None:
    """Refuse an adapter that is more than weights: of other kinds, or for Megatron. Raises ConfigurationError."""
    kind = record.get("peft_type")
    if kind in ADAPTERS and not record.get("megatron_config"):
        return
    what = "for Megatron" if kind in ADAPTERS else f"of the type {str(kind)[:50]!r}"
    raise ConfigurationError(
        f"The adapter of {title} is {what}. Served are {', '.join(ADAPTERS)} for models of transformers. Merge the adapter into "
        "its model (merge_and_unload) and save that by name."
    )


@contextlib.contextmanager
def no_pickles() -> Iterator[None]:
    """Refuse in this process, until the end of the block, what torch would read from a pickle."""
    import torch

    def refuse(*_: Any, **__: Any) -> NoReturn:
        raise pickle.UnpicklingError("It is a pickle, which may run code. Only safetensors are read.")

    load = torch.load
    setattr(torch, "load", refuse)  # noqa: B010 - mypy forbids the assignment
    try:
        yield
    finally:
        setattr(torch, "load", load)  # noqa: B010
