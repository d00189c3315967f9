"""Which functions of the script the use of an object runs, and what their code names."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from hf_cloudtrain.resume.script_code import functions_of, may_draw, may_seed


def draws() -> float:
    return random.random()


def calls() -> float:
    return draws()


class Base:
    def __getitem__(self, index: int) -> float:
        return self.helper(index)

    def helper(self, index: int) -> float:
        return float(index)

    def not_called(self) -> float:
        return draws()


class Derived(Base):
    def helper(self, index: int) -> float:
        return super().helper(index) + calls()


class Holds:
    def __init__(self, *held: Any) -> None:
        self.held = list(held)

    def __getitem__(self, index: int) -> Any:
        return self.held[0]


class Transform:
    def __call__(self) -> float:
        return draws()


TRANSFORM = Transform()


def by_an_object_of_the_module() -> float:
    return TRANSFORM()


def by_torch() -> torch.Tensor:
    return torch.rand(1)


def by_an_own_generator(index: int) -> float:
    return float(np.random.default_rng(index).random())


def seeds(index: int) -> float:
    random.seed(index)
    return random.random()


def names(thing: Any) -> set[str]:
    return {function.__name__ for function in functions_of(thing)}


def test_methods_are_found_by_the_names_that_others_call() -> None:
    assert names(Base()) == {"__getitem__", "helper"}
    assert names(Derived()) == {"__getitem__", "helper", "calls", "draws"}


@pytest.mark.parametrize(
    "thing",
    [
        Holds(Transform()),
        Holds({"a": [draws]}),
        functools.partial(calls),
        Transform().__call__,
        by_an_object_of_the_module,
        lambda: [calls() for _ in range(2)],
        torch.utils.data.Subset(Derived(), range(2)),  # type: ignore[arg-type]
        by_torch,
    ],
)
def test_what_may_draw(thing: Any) -> None:
    assert may_draw(thing)


@pytest.mark.parametrize("thing", [Base(), Holds(1, "a"), by_an_own_generator, torch.rand, None])
def test_what_does_not(thing: Any) -> None:
    assert not may_draw(thing)


def test_a_function_that_seeds() -> None:
    def within() -> Callable[[int], float]:
        return seeds

    assert may_seed(functools.partial(seeds, 1))
    assert may_seed(within)
    assert not may_seed(draws)


def test_a_ring_of_objects_ends() -> None:
    one, other = Holds(), Holds(draws)
    one.held, other.held = [other], [one, draws]
    assert names(one) == {"__getitem__", "draws"}
