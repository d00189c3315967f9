"""Attributes that change are named; what is known or constant is not."""

from __future__ import annotations

import functools
import multiprocessing
import random
from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from hf_cloudtrain.resume.state_look import Looker, StateLook, changed

RNG = np.random.default_rng(0)


def by_a_helper() -> float:
    return float(RNG.random())


class Thing:
    pass


class Augments:
    def __call__(self) -> float:
        return float(RNG.random())


class Slotted:
    __slots__ = ("count",)

    def __init__(self) -> None:
        self.count = 0


class Counted:
    calls = 0


class Shared:
    def __init__(self) -> None:
        self.sum = 0.0

    def add(self) -> float:
        self.sum += 1.0
        return self.sum


SHARED = Shared()


def thing(**values: Any) -> Any:
    made = Thing()
    vars(made).update(values)
    return made


@pytest.mark.parametrize(
    ("value", "change"),
    [
        (0, lambda it: setattr(it, "value", 1)),
        ([1], lambda it: it.value.append(2)),
        (deque([1], 1), lambda it: it.value.append(2)),
        ({1}, lambda it: it.value.add(2)),
        (list(range(100)), lambda it: it.value.__setitem__(-1, 0)),
        (dict.fromkeys(range(100), 0), lambda it: it.value.update({99: 1})),
        ({"a": 1}, lambda it: it.value.update(a=2)),
        (torch.zeros(2), lambda it: it.value.add_(1)),
        (np.zeros(2), lambda it: it.value.__setitem__(0, 1)),
        (multiprocessing.Value("i", 0), lambda it: setattr(it.value, "value", 1)),
        (Slotted(), lambda it: setattr(it.value, "count", 1)),
        (thing(inner=thing(count=0)), lambda it: setattr(it.value.inner, "count", 1)),
        (random.Random(0), lambda it: it.value.random()),
        (np.random.default_rng(0), lambda it: it.value.random()),
        (torch.Generator(), lambda it: torch.rand(1, generator=it.value)),
        (
            torch.nn.Linear(1, 1),
            lambda it: it.value.weight.data.__class__ and it.value.weight.detach().add_(1),
        ),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_change_is_named(value: Any, change: Callable[[Any], object]) -> None:
    it, looker = thing(other=1, value=value), Looker()
    before = looker.look(it)
    assert changed(before, looker.look(it)) is None
    change(it)
    assert changed(before, looker.look(it)) == "value"


def test_a_generator_of_the_script_belongs_to_what_draws_from_it() -> None:
    it, looker = Augments(), Looker()
    before = looker.look(it)
    it()
    assert changed(before, looker.look(it)) == "RNG"


def test_what_a_helper_or_an_object_of_the_module_keeps_is_seen() -> None:
    class Calls:
        def __call__(self) -> float:
            return by_a_helper() + SHARED.add()

    it, looker = Calls(), Looker()
    before = looker.look(it)
    assert changed(before, looker.look(it)) is None
    it()
    assert changed(before, {**looker.look(it), "SHARED": before["SHARED"]}) == "RNG"
    assert changed(before, {**looker.look(it), "RNG": before["RNG"]}) == "SHARED"


def test_where_an_iterator_stands_cannot_be_seen() -> None:
    it, looker = thing(value=iter([1, 2])), Looker()
    assert changed(looker.look(it), looker.look(it)) == "value"


def test_of_a_method_only_what_it_uses_belongs_to_it() -> None:
    class Trainer:
        def __init__(self) -> None:
            self.step, self.seen = 0, 0

        def collate(self, samples: list[int]) -> list[int]:
            self.seen += 1
            return samples

    trainer, looker = Trainer(), Looker()
    before = looker.look(trainer.collate)
    trainer.step += 1
    assert changed(before, looker.look(trainer.collate)) is None
    trainer.collate([])
    assert changed(before, looker.look(trainer.collate)) == "seen"


def test_a_number_is_state_and_a_file_that_is_opened_is_not() -> None:
    opens, counts = thing(value=None), thing(value=None)
    looks = [StateLook(Looker(), [("train_dataset", one)]) for one in (opens, counts)]
    opens.value, counts.value = Thing(), 1
    assert [one.look().exact for one in looks] == [True, None]
    counts.value = None
    assert "Thing (train_dataset) keeps state ('value')" in str(looks[1].look())


def test_a_generator_in_a_partial_or_a_closure_is_seen() -> None:
    generator, looker = random.Random(0), Looker()

    def inside() -> float:
        return generator.random()

    for draws in (functools.partial(random.Random.random, generator), inside):
        before = looker.look(draws)
        draws()
        assert changed(before, looker.look(draws)) is not None


def test_what_a_function_keeps_is_seen() -> None:
    def counts(seen: list[int] = [0]) -> None:  # noqa: B006 - as people write it
        seen[0] += 1

    def calls() -> None:
        counts()

    def marks() -> None:
        marks.count = marks.count + 1  # type: ignore[attr-defined]

    marks.count = 0  # type: ignore[attr-defined]
    for function, name in (
        (counts, "a default of counts()[0]"),
        (calls, "a default of counts()[0]"),
        (marks, "count"),
    ):
        looker = Looker()
        before = looker.look(function)
        assert changed(before, looker.look(function)) is None
        function()
        assert changed(before, looker.look(function)) == name


def test_a_number_of_the_class_is_seen() -> None:
    it, looker = Counted(), Looker()
    before = looker.look(it)
    Counted.calls += 1
    assert changed(before, looker.look(it)) == "calls"


def test_what_is_known_may_change() -> None:
    model = torch.nn.Linear(1, 1)
    it, looker = thing(model=model), Looker([model])
    before = looker.look(it)
    model.weight.detach().add_(1)
    assert changed(before, looker.look(it)) is None
    assert looker.held(it) is None


@pytest.mark.parametrize(
    "value",
    [
        torch.zeros(1),
        torch.nn.Linear(1, 1),
        {"a": torch.zeros(1)},
        [thing(mean=torch.zeros(1))],
        iter([1]),
        random.Random(0),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_may_hold_state_is_named(value: Any) -> None:
    assert Looker().held(thing(other=[1, "a", None], value=value)) == "value"


def test_plain_values_hold_nothing() -> None:
    assert Looker().held(thing(a=1, b="text", c=[1, {"d": None}], e=print, f=Thing)) is None


@pytest.mark.parametrize("make", [lambda: torch.zeros(1), Thing], ids=["tensor", "object"])
def test_a_new_object_at_the_place_of_a_freed_one_looks_different(make: Callable[[], Any]) -> None:
    """As the mean that a module replaces at each step: the id is often that of an earlier one."""
    one, looker = thing(value=make()), Looker()
    before, freed = looker.look(one), id(one.value)
    others = []
    for _ in range(1000):
        one.value = None
        one.value = make()
        if id(one.value) == freed:
            break
        others.append(one.value)
    else:
        pytest.skip("the memory was not used again")
    assert changed(before, looker.look(one)) == "value"
    assert changed(looker.look(one), looker.look(one)) is None
