"""The random states of this process: Python's, numpy's, torch's and the accelerator's, and those of given generators.

They are kept in memory between two batches and stored in a file per rank. Reading numpy's takes 30 us and the others 8,
so it can be left out for a read before every batch.
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
    """None if it was left out: restoring does not change numpy's."""
    device: Any = None
    """State of this process's accelerator, uint8 tensor; None on a CPU."""
    generators: tuple[Any, ...] = ()

    @classmethod
    def capture(
        cls, generators: Iterable[Any] = (), *, numpy: bool = True, device: bool = False
    ) -> RandomState:
        """The states now. `device` also reads the accelerator's, without a synchronisation."""
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
        """States for a rank that the checkpoint does not have, from a seed of 32 bits; all ranks share the generators'."""
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
        """Set all states, and those of `generators` in the order in which they were captured."""
        import torch

        random.setstate(self.python)
        torch.set_rng_state(self.torch)
        if self.numpy is not None:
            import numpy

            numpy.random.set_state(self.numpy)
        if self.device is not None and _device_module():
            _device_module().set_rng_state(self.device)
        self.restore_generators(generators)

    def restore_generators(self, generators: Iterable[Any]) -> None:
        """Set the states of the generators alone."""
        for generator, state in zip(generators, self.generators, strict=False):
            generator.set_state(state)

    def to_record(self) -> dict[str, Any]:
        """Numbers, texts and tensors only, which `torch.load(weights_only=True)` reads."""
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
        """The states in what `to_record` returned."""
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
    """A seed of 32 bits that depends only on numbers, such as seed, rank and step."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:4], "big")


def numpy_state() -> Any:
    """The global state of numpy."""
    import numpy

    return numpy.random.get_state()


def same_numpy_state(one: Any, other: Any) -> bool:
    """Whether two states are equal, so that no number was drawn between them."""
    return bool((one[1] == other[1]).all()) and one[2:] == other[2:]


def _device_module() -> Any:
    import torch

    if not torch.accelerator.is_available():
        return None
    return torch.get_device_module(torch.accelerator.current_accelerator())
