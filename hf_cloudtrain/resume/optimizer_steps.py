"""Which optimizers have really stepped in a batch, as torch's hooks report it: a script may accumulate gradients itself.

    for index, batch in enumerate(batches):
        accelerator.backward(loss(batch))
        if index % 4 == 0:                     no accelerator.accumulate: Accelerate cannot tell that a step is not over
            optimizer.step(); optimizer.zero_grad()

`OptimizerSteps` counts such steps, keeps the gradients that wait for one, and says whether the script's own count can survive a
resume.
"""

from __future__ import annotations

import math
import weakref
from typing import Any

from hf_cloudtrain.checkpoints.exactness import EXACT, Exactness

_LOST = Exactness.no("it was saved within an accumulation, and its gradients are in no checkpoint")


class OptimizerSteps:
    """The steps of the optimizers that Accelerate has prepared.

    Example:
        >>> steps = OptimizerSteps(accelerator)
        >>> steps.watch()
        >>> for batch in batches:
        ...     steps.begin_batch()
        ...     train(batch)
        ...     if steps.end_batch():
        ...         print("an optimizer step is over")
    """

    def __init__(self, accelerator: Any) -> None:
        self.index_is_used = False
        """Whether the script asks for the index of the batch."""
        self._accelerator = accelerator
        self._watched: dict[int, _Optimizer] = {}
        """By its number among the prepared ones."""
        self._scaled: Any = None
        self._is_counted = True

    def watch(self) -> None:
        """Observe the optimizers that are prepared by now; one without torch's hook steps where gradients are in sync."""
        for number, prepared in enumerate(self._accelerator._optimizers):
            inner = getattr(prepared, "optimizer", prepared)
            if number not in self._watched and hasattr(inner, "_optimizer_step_post_hooks"):
                self._watched[number] = _Optimizer(prepared, inner)

    def close(self) -> None:
        """Observe them no more."""
        for one in self._watched.values():
            one.handle.remove()
        self._watched.clear()

    def begin_epoch(self, batches: int, *, resumed: bool) -> None:
        """An epoch begins at this batch. `resumed` in the middle of one: there the first step tells nothing about a count."""
        for one in self._watched.values():
            one.count.at = batches
            one.count.is_first = not resumed and not one.count.spacing

    def begin_batch(self) -> None:
        """A batch begins."""
        for one in self._watched.values():
            one.has_stepped = False
        self._scaled, self._is_counted = self._scaler_states(), False

    def end_batch(self) -> bool:
        """Whether an optimizer has stepped in the batch that ends. Call it once a batch."""
        stepped = self._is_counted = self.has_stepped
        if self._accelerator.sync_gradients:
            for one in self._watched.values():
                one.count.end_batch(one.has_stepped)
        return stepped

    def take_late_step(self) -> bool:
        """Whether an optimizer has stepped since `end_batch`, or in a batch that was left before its end."""
        late = self.has_stepped and not self._is_counted
        if late:
            self._is_counted = True
            for one in self._watched.values():
                one.count.step_late(one.has_stepped)
        return late

    @property
    def has_stepped(self) -> bool:
        """Whether an optimizer has stepped since the batch began; a step that the gradient scaler skipped counts."""
        if not self._watched:
            return bool(self._accelerator.sync_gradients)
        if self._scaler_states() is not self._scaled:
            for one in self._watched.values():
                one.has_stepped |= bool(getattr(one.prepared, "step_was_skipped", False))
        return any(one.has_stepped for one in self._watched.values())

    @property
    def batches_per_step(self) -> int:
        """Batches between the last two steps, where the script accumulates gradients itself; else 1."""
        counts = [one.count for one in self._watched.values()]
        return min((count.spacing or 1 for count in counts), default=1) if self._skips else 1

    def total(self, step: int, batch: int, batches: int | None, epochs_left: int) -> int | None:
        """Optimizer steps of the whole training, at a step that ends `batch` batches into an epoch of `batches`.

        Returns:
            None where the script does not accumulate gradients itself, or the length of the data is not known.
        """
        if not self._skips or batches is None:
            return None
        each = self.batches_per_step
        left = (batches - batch) // each
        return step + left + epochs_left * (math.ceil(batch / each) + left)

    def ends_with_epoch(self, batch: int, batches: int | None) -> bool:
        """Whether the gradients of all batches that are left wait for the next epoch, so that its end has this same step."""
        return self._skips and batches is not None and 0 < batches - batch < self.batches_per_step

    def exactness(self, *, between_epochs: bool, batches: int | None) -> Exactness:
        """Whether steps come in the same batches after a resume from here."""
        found = EXACT
        if self.index_is_used:
            return found
        for one in self._watched.values():
            found &= one.count.exactness(batches, between_epochs=between_epochs)
        if found.exact is False and self._accelerator._custom_objects:
            return Exactness.not_verified(found.reason or "")  # the script may store its count
        return found

    def pending_gradients(self) -> tuple[dict[int, list[Any]], Exactness]:
        """Gradients that wait for the next step, by the number of the optimizer; and whether these are all."""
        found: dict[int, list[Any]] = {}
        for number, prepared in enumerate(self._accelerator._optimizers):
            one = self._watched.get(number)
            waits = one.waits() if one else not self._accelerator.sync_gradients
            gradients = [parameter.grad for parameter in _parameters(prepared)] if waits else []
            if any(gradient is not None and bool(gradient.any()) for gradient in gradients):
                found[number] = gradients
        if all(_is_plain(gradient) for gradients in found.values() for gradient in gradients):
            return found, EXACT if found or self._watched or self._accelerator.sync_gradients else _LOST
        return {}, _LOST

    def load_gradients(self, saved: dict[int, list[Any]]) -> None:
        """Set what `pending_gradients` returned."""
        for number, gradients in saved.items():
            parameters = _parameters(self._accelerator._optimizers[number])
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = None if gradient is None else gradient.to(parameter.device)

    @property
    def _skips(self) -> bool:
        return bool(self._watched) and all(one.count.skips for one in self._watched.values())

    def _scaler_states(self) -> Any:
        """An object that the gradient scaler replaces in each update."""
        return getattr(self._accelerator.scaler, "_per_optimizer_states", None)


class _Optimizer:
    """One prepared optimizer, observed."""

    def __init__(self, prepared: Any, inner: Any) -> None:
        self.prepared = prepared
        self.has_stepped = False
        self.count = _Count()
        self.handle = inner.register_step_post_hook(self._note)
        self._used: tuple[Any, int] | None = None

    def _note(self, *_: Any) -> None:
        self.has_stepped = True
        self._used = _mark(self.prepared)

    def waits(self) -> bool:
        """Whether it has gradients that it has not used."""
        now = _mark(self.prepared)
        if not self.has_stepped or now is None or self._used is None:
            return not self.has_stepped or now is not None
        return now[0]() is not self._used[0]() or now[1] != self._used[1]


class _Count:
    """In which batches an optimizer steps, and whether a count of the script explains it."""

    def __init__(self) -> None:
        self.at = 0
        """Batches of this epoch."""
        self.is_first = False
        """Whether no step was seen since the training began."""
        self.skips = False
        """Whether there was a batch without a step."""
        self.spacing = 0
        """Batches between the last two steps."""
        self.since = 0
        self._first = self._intervals = 0
        self._is_regular = True

    def end_batch(self, stepped: bool) -> None:
        """Count a batch."""
        self.at += 1
        self.since += 1
        if not stepped:
            self.skips = True
            return
        if self.is_first:
            self._first, self.is_first = self.since, False
        else:
            self._is_regular &= (
                self.since >= self._first if self._intervals == 0 else self.since == self.spacing
            )
            self._intervals += 1
        self.spacing, self.since = self.since, 0

    def step_late(self, stepped: bool) -> None:
        """Count a step after the last batch."""
        if stepped:
            self.since = 0

    def exactness(self, batches: int | None, *, between_epochs: bool) -> Exactness:
        """Whether a count that starts at 0 after a resume gives the same steps."""
        if not self.skips:
            return EXACT
        why = "an optimizer does not step in each batch, and the script counts the batches itself instead of by loop.batch_index"
        each, from_zero = self.spacing, 0 < self._first < self.spacing
        is_known = self._is_regular and self._intervals > 0 and each > 1
        if not is_known or batches is None or batches % each:
            return Exactness.not_verified(why)
        if between_epochs:
            return EXACT if from_zero or not self.since else Exactness.not_verified(why)
        if self.at % each == 0:
            return EXACT
        return Exactness.no(why) if from_zero else Exactness.not_verified(why)


def _parameters(optimizer: Any) -> list[Any]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _is_plain(gradient: Any) -> bool:
    import torch

    return gradient is None or type(gradient) is torch.Tensor


def _mark(optimizer: Any) -> tuple[Any, int] | None:
    """Tells whether the first gradient is another one later."""
    for parameter in _parameters(optimizer):
        if parameter.grad is not None:
            return weakref.ref(parameter.grad), parameter.grad._version
    return None
