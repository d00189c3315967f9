"""OptimizerSteps: which batches end with a step, however the script decides it."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from hf_cloudtrain.resume.optimizer_steps import OptimizerSteps


class Script:
    """A model, an accelerator that has prepared its optimizers, and the loop around them."""

    def __init__(self, *, optimizers: int = 1, scaler: Any = None) -> None:
        self.layers = [torch.nn.Linear(2, 1) for _ in range(optimizers)]
        self.optimizers = [torch.optim.SGD(layer.parameters(), lr=0.1) for layer in self.layers]
        self.accelerator = SimpleNamespace(
            _optimizers=self.optimizers, _custom_objects=[], sync_gradients=True, scaler=scaler
        )
        self.steps = OptimizerSteps(self.accelerator)
        self.steps.watch()
        self.steps.begin_epoch(0, resumed=False)

    def batch(self, *stepping: int) -> bool:
        """One batch; these optimizers step in it."""
        self.steps.begin_batch()
        for layer in self.layers:
            layer(torch.ones(1, 2)).sum().backward()
        for number in stepping:
            self.optimizers[number].step()
            self.optimizers[number].zero_grad()
        return self.steps.end_batch()

    def exactness(self, *, batches: int | None = 8, between_epochs: bool = False) -> bool | None:
        return self.steps.exactness(between_epochs=between_epochs, batches=batches).exact


@pytest.fixture
def script() -> Iterator[Script]:
    made = Script()
    yield made
    made.steps.close()


def test_a_batch_without_a_step_does_not_count(script: Script) -> None:
    assert [script.batch(*stepping) for stepping in ((), (0,), (), (0,))] == [False, True, False, True]
    assert script.steps.batches_per_step == 2


def test_an_optimizer_without_hooks_steps_where_gradients_are_in_sync() -> None:
    accelerator = SimpleNamespace(
        _optimizers=[SimpleNamespace(param_groups=[])], sync_gradients=True, scaler=None, _custom_objects=[]
    )
    steps = OptimizerSteps(accelerator)
    steps.watch()
    steps.begin_batch()
    assert steps.end_batch()
    accelerator.sync_gradients = False
    steps.begin_batch()
    assert not steps.end_batch()
    gradients, exactness = steps.pending_gradients()
    assert gradients == {}
    assert exactness.exact is False, "its gradients are where we cannot read them"


def test_a_step_that_the_scaler_skipped_counts(script: Script) -> None:
    class Prepared:
        def __init__(self, optimizer: Any) -> None:
            self.optimizer, self.step_was_skipped = optimizer, False
            self.param_groups = optimizer.param_groups

    prepared = Prepared(script.optimizers[0])
    scaler = SimpleNamespace(_per_optimizer_states={})
    script.accelerator._optimizers, script.accelerator.scaler = [prepared], scaler
    steps = OptimizerSteps(script.accelerator)
    steps.watch()
    steps.begin_batch()
    assert not steps.end_batch()
    steps.begin_batch()
    scaler._per_optimizer_states, prepared.step_was_skipped = {}, True  # as GradScaler.update does
    assert steps.end_batch()
    steps.begin_batch()
    assert not steps.end_batch(), "the flag alone is of the batch before"


@pytest.mark.parametrize(
    ("pattern", "within", "between"),
    [
        ("1111", True, True),
        ("0101", True, True),  # every second batch, wherever the count began
        ("1010", False, True),  # a count from 0, which starts over
        ("0110", None, None),
        ("0010", None, None),
        ("0000", None, None),
    ],
)
def test_a_count_of_the_script_is_judged_by_its_steps(pattern: str, within: Any, between: Any) -> None:
    script = Script()
    last = pattern.rindex("1") + 1 if "1" in pattern else 4
    for number, step in enumerate(pattern, 1):
        script.batch(*((0,) if step == "1" else ()))
        if number == last:
            assert script.exactness() is within
    assert script.exactness(between_epochs=True) is between


def test_by_the_loops_index_any_pattern_is_exact(script: Script) -> None:
    script.batch(0)
    script.batch()
    script.steps.index_is_used = True
    assert script.exactness() is True


def test_a_script_that_stores_objects_of_its_own_may_store_its_count(script: Script) -> None:
    for stepping in ((0,), (), (0,)):
        script.batch(*stepping)
    assert script.exactness() is False
    script.accelerator._custom_objects.append(object())
    assert script.exactness() is None


def test_data_of_unknown_length_is_not_verified(script: Script) -> None:
    for stepping in ((), (0,), (), (0,)):
        script.batch(*stepping)
    assert script.exactness(batches=None) is None
    assert script.steps.total(2, 4, None, 1) is None


class TestGradients:
    def test_those_of_an_optimizer_that_has_not_stepped_are_kept_and_set_again(self) -> None:
        script, resumed = Script(optimizers=2), Script(optimizers=2)
        script.batch(0)
        gradients, exactness = script.steps.pending_gradients()
        assert list(gradients) == [1]
        assert exactness.exact is True
        resumed.steps.load_gradients(gradients)
        assert resumed.layers[0].weight.grad is None
        assert torch.equal(resumed.layers[1].weight.grad, torch.ones(1, 2))

    def test_those_that_a_step_has_used_do_not_wait(self, script: Script) -> None:
        script.steps.begin_batch()
        script.layers[0](torch.ones(1, 2)).sum().backward()
        script.optimizers[0].step()  # set to zero before the next backward, as in PyTorch's tutorial
        script.steps.end_batch()
        assert script.steps.pending_gradients()[0] == {}

    def test_those_of_a_backward_after_the_step_wait(self, script: Script) -> None:
        script.batch(0)
        script.layers[0](torch.ones(1, 2)).sum().backward()
        assert list(script.steps.pending_gradients()[0]) == [0]

    def test_those_that_are_zero_do_not_wait(self, script: Script) -> None:
        script.batch()
        script.optimizers[0].zero_grad(set_to_none=False)
        assert script.steps.pending_gradients()[0] == {}

    def test_those_of_another_kind_of_tensor_are_named_as_lost(self, script: Script) -> None:
        class Sharded(torch.Tensor):
            pass

        script.batch()
        script.layers[0].weight.grad = torch.ones(1, 2).as_subclass(Sharded)  # type: ignore[assignment]
        gradients, exactness = script.steps.pending_gradients()
        assert gradients == {}
        assert exactness.exact is False


@pytest.mark.parametrize(
    ("pattern", "batches", "each"), [("1001001", 16, 6), ("001001", 16, 5), ("0101", 16, 8)]
)
def test_the_steps_of_the_training_follow_from_the_pattern(pattern: str, batches: int, each: int) -> None:
    script = Script()
    for step in pattern:
        script.batch(*((0,) if step == "1" else ()))
    assert script.steps.total(pattern.count("1"), len(pattern), batches, epochs_left=2) == 3 * each


def test_the_last_step_of_an_epoch_is_foreseen(script: Script) -> None:
    for stepping in ((0,), (), (0,), (), (0,)):
        script.batch(*stepping)
    assert script.steps.ends_with_epoch(5, 6)
    assert not script.steps.ends_with_epoch(5, 7)
    assert not script.steps.ends_with_epoch(5, 5)


def test_a_step_after_the_last_batch_is_taken_once(script: Script) -> None:
    script.batch()
    assert not script.steps.take_late_step()
    script.optimizers[0].step()
    assert script.steps.take_late_step()
    assert not script.steps.take_late_step()


def test_an_optimizer_that_is_no_longer_observed_has_no_hook(script: Script) -> None:
    script.steps.close()
    assert not script.optimizers[0]._optimizer_step_post_hooks
