"""The random states of this process: Python's, numpy's and torch's, and those of generators that somebody handed over.

They are kept in memory between two batches and stored in a file per process. numpy's takes 30 us to read and the
others 8, so whoever looks at every batch leaves it out.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class RandomState:
    """All random states at one moment.

    Example:
        >>> before = RandomState.capture()
        >>> torch.rand(1); before.restore(); torch.rand(1)      # the same number again
    """

    python: Any
    torch: Any
    """uint8 tensor, 5,056 bytes."""
    numpy: Any = None
    """None where it was left out: restoring leaves numpy as it is."""
    device: Any = None
    """State of this process's accelerator, uint8 tensor; None on a CPU."""
    generators: tuple[Any, ...] = ()

    @classmethod
    def capture(
        cls, generators: Iterable[Any] = (), *, numpy: bool = True, device: bool = False
    ) -> RandomState:
        """The states now. `device` also reads the accelerator's, which needs no synchronisation."""
        import torch

        return cls(
            python=random.getstate(),
            torch=torch.get_rng_state(),
            numpy=numpy_state() if numpy else None,
            device=_device_module().get_rng_state() if device and _device_module() else None,
            generators=tuple(generator.get_state() for generator in generators),
        )

    @classmethod
    def derived(cls, seed: int, generators: Iterable[Any] = ()) -> RandomState:
        """States of a process that did not exist: all from one seed of 32 bits.

        Args:
            generators: states of generators, which all processes share.
        """
        import numpy
        import torch

        device = None
        if _device_module():
            on_device = torch.Generator(device=torch.accelerator.current_accelerator())
            device = on_device.manual_seed(seed).get_state()
        return cls(
            python=random.Random(seed).getstate(),
            torch=torch.Generator().manual_seed(seed).get_state(),
            numpy=numpy.random.RandomState(seed).get_state(),
            device=device,
            generators=tuple(generators),
        )

    def restore(self, generators: Iterable[Any] = ()) -> None:
        """Set them again, those of `generators` in the order in which they were captured."""
        import torch

        random.setstate(self.python)
        torch.set_rng_state(self.torch)
        if self.numpy is not None:
            import numpy

            numpy.random.set_state(self.numpy)
        if self.device is not None and _device_module():
            _device_module().set_rng_state(self.device)
        for generator, state in zip(generators, self.generators, strict=False):
            generator.set_state(state)

    def to_record(self) -> dict[str, Any]:
        """Numbers, texts and tensors alone, which torch loads without unpickling anything else."""
        import torch

        numpy = self.numpy
        if numpy is not None:
            name, keys, position, has_gauss, gauss = numpy
            numpy = [name, torch.tensor(keys.astype("int64")), int(position), int(has_gauss), float(gauss)]
        return {
            "python": self.python,
            "torch": self.torch,
            "numpy": numpy,
            "device": self.device,
            "generators": list(self.generators),
        }

    @classmethod
    def from_record(cls, record: dict[str, Any]) -> RandomState:
        """What `to_record` made."""
        version, internal, gauss = record["python"]
        numpy = record["numpy"]
        if numpy is not None:
            numpy = (numpy[0], numpy[1].numpy().astype("uint32"), *numpy[2:])
        return cls(
            python=(version, tuple(internal), gauss),
            torch=record["torch"],
            numpy=numpy,
            device=record["device"],
            generators=tuple(record["generators"]),
        )


def derived_seed(*parts: int) -> int:
    """A seed of 32 bits that follows from numbers, such as seed, rank and step."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:4], "big")


def numpy_state() -> Any:
    """The global state of numpy."""
    import numpy

    return numpy.random.get_state()


def same_numpy_state(one: Any, other: Any) -> bool:
    """Whether nobody drew from numpy's global state between the two."""
    return bool((one[1] == other[1]).all()) and one[2:] == other[2:]


def _device_module() -> Any:
    import torch

    if not torch.accelerator.is_available():
        return None
    return torch.get_device_module(torch.accelerator.current_accelerator())
