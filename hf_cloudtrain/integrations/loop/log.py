"""What a loop reports: kept as it comes, read every logging interval, shown on a bar, summed up an epoch."""

from __future__ import annotations

import math
import numbers
from typing import Any

from hf_cloudtrain.errors import ConfigurationError


class LoopLog:
    """Values that were logged, without a device sync a step: tensors are kept detached until somebody reads.

    Example:
        >>> log = LoopLog()
        >>> log.add({"loss": loss})                    # a tensor on any device
        >>> log.interval()                             # means since the last call; here the device is waited for
        {'loss': 0.53}
    """

    def __init__(self) -> None:
        self._unread: dict[str, list[Any]] = {}
        self._interval: dict[str, list[float]] = {}
        self._epoch: dict[str, list[float]] = {}

    def add(self, values: dict[str, Any]) -> None:
        """Note values of one step."""
        for name, value in values.items():
            if not hasattr(value, "detach") and not isinstance(value, numbers.Real):
                raise ConfigurationError(
                    f"log({name}={value!r}) is neither a number nor a tensor; log numbers only."
                )
            kept = value.detach() if hasattr(value, "detach") else value
            self._unread.setdefault(name, []).append(kept)

    def interval(self) -> dict[str, float]:
        """Means of what came since the last call."""
        self._read()
        means = _means(self._interval)
        self._interval = {}
        return means

    def epoch(self) -> dict[str, float]:
        """Means of what came in this epoch; the next one begins."""
        self._read()
        means = _means(self._epoch)
        self._epoch = {}
        return means

    def forget(self) -> None:
        """Drop what is unread: on processes that report nothing."""
        self._unread.clear()

    def state_dict(self) -> dict[str, Any]:
        """Sums so far, for a checkpoint."""
        self._read()
        return {"interval": self._interval, "epoch": self._epoch}

    def load_state_dict(self, state: Any) -> None:
        """Go on from sums that `state_dict` gave; damaged ones are left out, for nothing depends on them."""
        state = state if isinstance(state, dict) else {}
        self._interval = _sums(state.get("interval"))
        self._epoch = _sums(state.get("epoch"))

    def _read(self) -> None:
        for name, values in self._unread.items():
            for value in _numbers(values):
                for sums in (self._interval, self._epoch):
                    total = sums.setdefault(name, [0.0, 0])
                    total[0] += value
                    total[1] += 1
        self._unread.clear()


def train_bar(epoch: int, phase: str, total: int | None, done: int, *, hidden: bool) -> Any:
    """The bar of one pass over a loader, on a terminal and in notebooks: `[Epoch 0] [TRAIN]:  12%|█▏        | 520/4387`."""
    from tqdm.auto import tqdm

    return tqdm(desc=f"[Epoch {epoch}] [{phase}]", total=total, initial=done, disable=hidden)


def shown(values: dict[str, float]) -> dict[str, str]:
    """Numbers as a bar has room for them: `2.56`, `7.8e-6`."""
    return {name: f"{value:.3g}".replace("e-0", "e-") for name, value in values.items()}


def number(value: Any) -> float:
    """A metric as a number; NaN where it is none."""
    try:
        return float(value)
    except (TypeError, ValueError):
        return math.nan


def _numbers(values: list[Any]) -> list[float]:
    """Values as numbers, with one wait for the device, not one each."""
    tensors = [value for value in values if hasattr(value, "detach")]
    if not tensors:
        return [float(value) for value in values]
    import torch

    read = iter(torch.stack([tensor.float().mean() for tensor in tensors]).tolist())
    return [next(read) if hasattr(value, "detach") else float(value) for value in values]


def _means(sums: dict[str, list[float]]) -> dict[str, float]:
    return {name: total / count for name, (total, count) in sums.items() if count}


def _sums(value: Any) -> dict[str, list[float]]:
    found = {}
    for name, pair in value.items() if isinstance(value, dict) else ():
        if isinstance(pair, list) and len(pair) == 2 and all(isinstance(one, (int, float)) for one in pair):
            found[str(name)] = [float(pair[0]), pair[1]]
    return found
