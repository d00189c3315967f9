"""RandomState: a restore repeats the numbers that followed the capture, in this process and in a different one."""

from __future__ import annotations

import io
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from hf_cloudtrain.resume import random_state
from hf_cloudtrain.resume.random_state import HostRandom, RandomState

DRAWS: dict[str, Callable[[], Any]] = {
    "python": random.random,
    "python's gauss, which keeps a second number": lambda: random.gauss(0, 1),
    "torch": lambda: torch.rand(1).item(),
    "numpy": lambda: float(np.random.rand()),
    "numpy's gauss, which keeps a second number": lambda: float(np.random.standard_normal()),
}


def stored(state: RandomState) -> RandomState:
    """Through a file, as a different process reads it."""
    file = io.BytesIO()
    torch.save(state.to_record(), file)
    file.seek(0)
    return RandomState.from_record(torch.load(file, weights_only=True))


@pytest.mark.parametrize("name", DRAWS)
@pytest.mark.parametrize("through", [lambda state: state, stored], ids=["in memory", "through a file"])
def test_the_same_numbers_are_drawn_again_from(
    name: str, through: Callable[[RandomState], RandomState]
) -> None:
    draw = DRAWS[name]
    draw()  # the second of two Gaussian numbers is cached
    state = RandomState.capture()
    drawn = [draw() for _ in range(3)]
    through(state).restore()
    assert [draw() for _ in range(3)] == drawn


def test_a_capture_does_not_change_with_later_draws() -> None:
    state = RandomState.capture()
    before = state.torch.clone()
    torch.rand(8)
    assert torch.equal(state.torch, before)


def test_a_restore_changes_neither_python_nor_numpy_if_they_were_left_out() -> None:
    state = RandomState.capture(host=False)
    assert state.host is None
    random.random(), np.random.rand()
    now = HostRandom.capture()
    stored(state).restore()
    assert now.is_now()


def test_generators_are_set_in_the_order_in_which_they_were_captured() -> None:
    generators = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
    state = RandomState.capture(generators)
    drawn = [torch.rand(2, generator=generator).tolist() for generator in generators]
    assert drawn[0] != drawn[1]
    stored(state).restore(generators)
    assert [torch.rand(2, generator=generator).tolist() for generator in generators] == drawn


def test_a_generator_that_was_not_captured_is_not_changed() -> None:
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
        (random.random, False),
        (lambda: torch.rand(1), True),
    ],
    ids=["nothing", "one number of numpy", "more than its whole state", "one number of Python", "torch"],
)
def test_the_states_of_the_host_detect_a_draw(draw: Callable[[], Any], same: bool) -> None:
    before = HostRandom.capture()
    draw()
    assert before.is_now() is same


@pytest.mark.parametrize(
    "draw", [np.random.standard_normal, lambda: random.gauss(0, 1)], ids=["numpy", "Python"]
)
def test_the_states_of_the_host_detect_a_draw_of_the_cached_gaussian_number(draw: Callable[[], Any]) -> None:
    draw()
    before = HostRandom.capture()
    draw()  # changes nothing but the cached number
    assert not before.is_now()


class TestDevice:
    @pytest.fixture
    def device(self, monkeypatch: pytest.MonkeyPatch) -> _Device:
        device = _Device()
        monkeypatch.setattr(random_state, "_device_module", lambda: device)
        return device

    def test_its_state_is_captured_and_restored_on_request(self, device: _Device) -> None:
        assert RandomState.capture().device is None
        state = RandomState.capture(device=True)
        device.state = torch.tensor([9], dtype=torch.uint8)
        stored(state).restore()
        assert device.state.tolist() == [7]

    def test_its_state_is_ignored_on_a_machine_without_an_accelerator(
        self, device: _Device, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        state = RandomState.capture(device=True)
        monkeypatch.setattr(random_state, "_device_module", lambda: None)
        torch.rand(1)
        stored(state).restore()
        assert torch.equal(torch.get_rng_state(), state.torch)

    def test_without_an_accelerator_the_state_is_none(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
        assert RandomState.capture(device=True).device is None


class _Device:
    """The part of `torch.cuda` that handles random states."""

    def __init__(self) -> None:
        self.state = torch.tensor([7], dtype=torch.uint8)

    def get_rng_state(self) -> torch.Tensor:
        return self.state

    def set_rng_state(self, state: torch.Tensor) -> None:
        self.state = state
