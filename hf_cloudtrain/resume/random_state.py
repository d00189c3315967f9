"""The random states of this process: Python's, numpy's, torch's and the accelerator's, and those of given generators.

They are kept in memory between two batches and stored in a file per rank. Reading numpy's takes 30 us, Python's 10 and torch's 2,
so the first two can be left out of a read before every batch.
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

    torch: Any
    """uint8 tensor, 5,056 bytes."""
    host: HostRandom | None = None
    """None if it was left out: restoring changes neither Python's nor numpy's."""
    device: Any = None
    """State of this process's accelerator, uint8 tensor; None on a CPU."""
    generators: tuple[Any, ...] = ()

    @classmethod
    def capture(
        cls, generators: Iterable[Any] = (), *, host: bool = True, device: bool = False
    ) -> RandomState:
        """The states now. `device` also reads the accelerator's, without a synchronisation."""
        import torch

        return cls(
            torch=torch.get_rng_state(),
            host=HostRandom.capture() if host else None,
            device=_device_module().get_rng_state() if device and _device_module() else None,
            generators=tuple(generator.get_state() for generator in generators),
        )

    @classmethod
    def derived(cls, seed: int, generators: Iterable[Any] = ()) -> RandomState:
        """States for a rank that the checkpoint does not have, from a seed of 32 bits; all ranks share the generators'."""
        import numpy
        import torch

        device = None
        if _device_module():
            on_device = torch.Generator(device=torch.accelerator.current_accelerator())
            device = on_device.manual_seed(seed).get_state()
        return cls(
            torch=torch.Generator().manual_seed(seed).get_state(),
            host=HostRandom(random.Random(seed).getstate(), numpy.random.RandomState(seed).get_state()),
            device=device,
            generators=tuple(generators),
        )

    def restore(self, generators: Iterable[Any] = ()) -> None:
        """Set all states, and those of `generators` in the order in which they were captured."""
        import torch

        torch.set_rng_state(self.torch)
        if self.host is not None:
            self.host.restore()
        if self.device is not None and _device_module():
            _device_module().set_rng_state(self.device)
        self.restore_generators(generators)

    def restore_generators(self, generators: Iterable[Any]) -> None:
        """Set the states of the generators alone."""
        for generator, state in zip(generators, self.generators, strict=False):
            generator.set_state(state)

    def to_record(self) -> dict[str, Any]:
        """Numbers, texts and tensors only, which `torch.load(weights_only=True)` reads."""
        return {
            **(HostRandom() if self.host is None else self.host).to_record(),
            "torch": self.torch,
            "device": self.device,
            "generators": list(self.generators),
        }

    @classmethod
    def from_record(cls, record: dict[str, Any]) -> RandomState:
        """The states in what `to_record` returned."""
        return cls(
            torch=record["torch"],
            host=HostRandom.from_record(record),
            device=record["device"],
            generators=tuple(record["generators"]),
        )


@dataclass(frozen=True)
class HostRandom:
    """The global states of Python and numpy, which most trainings never draw from between two batches."""

    python: Any = None
    numpy: Any = None

    @classmethod
    def capture(cls) -> HostRandom:
        """The states now."""
        import numpy

        return cls(random.getstate(), numpy.random.get_state())

    def is_now(self) -> bool:
        """Whether no number was drawn since `capture`."""
        now = HostRandom.capture()
        same_keys = bool((self.numpy[1] == now.numpy[1]).all())
        return self.python == now.python and same_keys and self.numpy[2:] == now.numpy[2:]

    def restore(self) -> None:
        """Set the states that are known."""
        if self.python is not None:
            random.setstate(self.python)
        if self.numpy is not None:
            import numpy

            numpy.random.set_state(self.numpy)

    def to_record(self) -> dict[str, Any]:
        """See `RandomState.to_record`."""
        numpy = self.numpy
        if numpy is not None:
            import torch

            name, keys, position, has_gauss, gauss = numpy
            numpy = [name, torch.tensor(keys.astype("int64")), int(position), int(has_gauss), float(gauss)]
        return {"python": self.python, "numpy": numpy}

    @classmethod
    def from_record(cls, record: dict[str, Any]) -> HostRandom:
        """The states in what `to_record` returned."""
        python, numpy = record["python"], record["numpy"]
        if python is not None:
            version, internal, gauss = python
            python = (version, tuple(internal), gauss)
        if numpy is not None:
            numpy = (numpy[0], numpy[1].numpy().astype("uint32"), *numpy[2:])
        return cls(python, numpy)


def derived_seed(*parts: int) -> int:
    """A seed of 32 bits that depends only on numbers, such as seed, rank and step."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:4], "big")


def _device_module() -> Any:
    import torch

    if not torch.accelerator.is_available():
        return None
    return torch.get_device_module(torch.accelerator.current_accelerator())
