"""RandomState: what is drawn after a restore is what was drawn after the capture, here and in another process."""

from __future__ import annotations

import io
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from hf_cloudtrain.resume import random_state
from hf_cloudtrain.resume.random_state import RandomState, numpy_state, same_numpy_state

DRAWS: dict[str, Callable[[], Any]] = {
    "python": random.random,
    "python's gauss, which keeps a second number": lambda: random.gauss(0, 1),
    "torch": lambda: torch.rand(1).item(),
    "numpy": lambda: float(np.random.rand()),
    "numpy's gauss, which keeps a second number": lambda: float(np.random.standard_normal()),
}


@pytest.fixture(autouse=True)
def _as_it_was() -> Any:
    before = RandomState.capture()
    yield
    before.restore()


def stored(state: RandomState) -> RandomState:
    """Through a file, as another process reads it."""
    file = io.BytesIO()
    torch.save(state.to_record(), file)
    file.seek(0)
    return RandomState.from_record(torch.load(file, weights_only=True))


@pytest.mark.parametrize("name", DRAWS)
@pytest.mark.parametrize("through", [lambda state: state, stored], ids=["in memory", "through a file"])
def test_the_same_numbers_come_again_from(name: str, through: Callable[[RandomState], RandomState]) -> None:
    draw = DRAWS[name]
    draw()  # of two Gaussian numbers, the second one is waiting
    state = RandomState.capture()
    drawn = [draw() for _ in range(3)]
    through(state).restore()
    assert [draw() for _ in range(3)] == drawn


def test_a_capture_does_not_follow_what_is_drawn_after_it() -> None:
    state = RandomState.capture()
    before = state.torch.clone()
    torch.rand(8)
    assert torch.equal(state.torch, before)


def test_numpy_is_left_as_it_is_where_it_was_left_out() -> None:
    state = RandomState.capture(numpy=False)
    assert state.numpy is None
    np.random.rand()
    now = numpy_state()
    stored(state).restore()
    assert same_numpy_state(now, numpy_state())


def test_generators_are_set_in_the_order_in_which_they_were_captured() -> None:
    generators = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
    state = RandomState.capture(generators)
    drawn = [torch.rand(2, generator=generator).tolist() for generator in generators]
    assert drawn[0] != drawn[1]
    stored(state).restore(generators)
    assert [torch.rand(2, generator=generator).tolist() for generator in generators] == drawn


def test_a_generator_that_is_new_since_is_left_alone() -> None:
    state = RandomState.capture([torch.Generator().manual_seed(1)])
    one, other = torch.Generator(), torch.Generator().manual_seed(5)
    untouched = other.get_state()
    state.restore([one, other])
    assert one.initial_seed() == 1
    assert torch.equal(other.get_state(), untouched)


@pytest.mark.parametrize(
    ("draw", "same"),
    [
        (lambda: None, True),
        (np.random.rand, False),
        (lambda: np.random.rand(2000), False),
        (random.random, True),
        (lambda: torch.rand(1), True),
    ],
    ids=["nothing", "one number of numpy", "more than its whole state", "python", "torch"],
)
def test_it_is_seen_whether_numpy_drew(draw: Callable[[], Any], same: bool) -> None:
    before = numpy_state()
    draw()
    assert same_numpy_state(before, numpy_state()) is same


def test_it_is_seen_that_numpy_gave_the_second_of_two_gaussian_numbers() -> None:
    np.random.standard_normal()
    before = numpy_state()
    np.random.standard_normal()  # moves nothing but the number that was waiting
    assert not same_numpy_state(before, numpy_state())


class TestDevice:
    @pytest.fixture
    def device(self, monkeypatch: pytest.MonkeyPatch) -> _Device:
        device = _Device()
        monkeypatch.setattr(random_state, "_device_module", lambda: device)
        return device

    def test_its_state_is_captured_and_restored_where_asked_for(self, device: _Device) -> None:
        assert RandomState.capture().device is None
        state = RandomState.capture(device=True)
        device.state = torch.tensor([9], dtype=torch.uint8)
        stored(state).restore()
        assert device.state.tolist() == [7]

    def test_a_state_from_a_machine_with_one_is_left_out_on_a_machine_without(
        self, device: _Device, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        state = RandomState.capture(device=True)
        monkeypatch.setattr(random_state, "_device_module", lambda: None)
        torch.rand(1)
        stored(state).restore()
        assert torch.equal(torch.get_rng_state(), state.torch)

    def test_without_one_there_is_no_state(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
        assert RandomState.capture(device=True).device is None


class _Device:
    """The part of `torch.cuda` that has to do with random numbers."""

    def __init__(self) -> None:
        self.state = torch.tensor([7], dtype=torch.uint8)

    def get_rng_state(self) -> torch.Tensor:
        return self.state

    def set_rng_state(self, state: torch.Tensor) -> None:
        self.state = state
