"""Machine types by name, and how many nodes and processes a number of devices makes."""

from __future__ import annotations

import dataclasses
import re

from hf_cloudtrain.errors import ConfigurationError

MAX_LENGTH = 200
"""Characters of the longest name; memory and GPU count have up to four digits."""


@dataclasses.dataclass(frozen=True)
class Machine:
    """A machine type: `[cloud]-[memory]-[gpu]-[count]g-[region][-spot]`.

    Example:
        >>> Machine.parse("azure-16gb-v100-4g-eastus-spot").gpus
        4
    """

    cloud: str
    memory_gb: int
    """Memory of one GPU."""
    gpu: str
    gpus: int
    region: str
    is_spot: bool

    @classmethod
    def parse(cls, text: str) -> Machine:
        """The machine type of a name. Raises ConfigurationError."""
        match = re.fullmatch(
            r"([a-z0-9]+)-([1-9][0-9]{0,3})gb-([a-z0-9]+(?:-[a-z0-9]+)*)-([1-9][0-9]{0,3})g"
            r"-(?!spot$)([a-z0-9]+(?:-[a-z0-9]+)*?)(-spot)?",
            text
            if len(text) <= MAX_LENGTH
            else "",  # the cost of the search grows with the square of the length
        )
        if match is None:
            raise ConfigurationError(
                f"{text[:100]!r} is not a machine type. Write it as [cloud]-[memory]-[gpu]-[count]g-[region][-spot], such as "
                "'azure-16gb-v100-4g-eastus-spot'."
            )
        cloud, memory, gpu, gpus, region, spot = match.groups()
        return cls(cloud, int(memory), gpu, int(gpus), region, spot is not None)

    def __str__(self) -> str:
        spot = "-spot" if self.is_spot else ""
        return f"{self.cloud}-{self.memory_gb}gb-{self.gpu}-{self.gpus}g-{self.region}{spot}"


def shape(
    num_devices: int | None, vm: str | None, nodes: int | None, nproc_per_node: int | None
) -> tuple[int, int]:
    """Number of nodes, and of processes on each; `nodes` and `nproc_per_node` override what `vm` has.

    Raises:
        ConfigurationError: the devices cannot be divided evenly.

    Example:
        >>> shape(8, "azure-16gb-v100-4g-eastus-spot", None, None)
        (2, 4)
    """
    if vm is not None:
        gpus = Machine.parse(vm).gpus
        devices = num_devices or gpus
        if devices % gpus:
            raise ConfigurationError(
                f"'num_devices' must be a multiple of the {gpus} GPUs of {vm!r}, not {devices}. {_multiples(devices, gpus)}"
            )
        return nodes or devices // gpus, nproc_per_node or gpus
    if nodes and nproc_per_node:
        return nodes, nproc_per_node
    devices = num_devices or nodes or nproc_per_node or 1
    parts, key = (nodes, "nodes") if nodes else (nproc_per_node or devices, "nproc_per_node")
    if devices % parts:
        raise ConfigurationError(
            f"'num_devices' must be a multiple of {key}={parts}, not {devices}. {_multiples(devices, parts)}"
        )
    return (parts, devices // parts) if nodes else (devices // parts, parts)


def _multiples(count: int, of: int) -> str:
    below = count // of * of
    return f"Use {below} or {below + of}." if below else f"Use {of}."
