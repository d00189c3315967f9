"""The batch sampler that a DataPosition observes, and the fingerprint of its indices."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
from torch.utils.data import (
    SequentialSampler,
)

from hf_cloudtrain.resume.data_position import DataPosition
from hf_cloudtrain.resume.watched_sampler import chained
from tests.unit.resume._epochs import (
    BATCHES,
    Rows,
    loader,
    train,
)


class TestChained:
    def test_order_and_borders_of_the_batches_count(self) -> None:
        def of(*batches: Any) -> int:
            fingerprint = 0
            for indices in batches:
                fingerprint = chained(fingerprint, indices)
            return fingerprint

        different = [of([0, 1], [2, 3]), of([2, 3], [0, 1]), of([0, 1, 2, 3]), of([1, 0], [2, 3]), of([0, 1])]
        assert len(set(different)) == len(different)

    @pytest.mark.parametrize("indices", [7, "key", ["a", "b"], [("row", 3)], [2**70], None, [None]])
    def test_indices_may_be_anything(self, indices: Any) -> None:
        assert chained(0, indices) != chained(1, indices)
        assert chained(0, indices) != chained(0, [indices])


class TestWatchedSampler:
    def test_it_has_the_attributes_of_the_batch_sampler(self) -> None:
        dataloader = loader(Rows(), sampler=SequentialSampler(Rows()), drop_last=True)
        inner: Any = dataloader.batch_sampler
        with DataPosition(dataloader).watching():
            watched = dataloader.batch_sampler
            assert len(watched) == len(inner)
            assert (watched.batch_size, watched.drop_last, watched.sampler) == (4, True, inner.sampler)
            assert not hasattr(watched, "no_such_thing")

    def test_an_attribute_that_is_set_reaches_the_batch_sampler(self) -> None:
        dataloader = loader(Rows())
        with DataPosition(dataloader).watching():
            dataloader.batch_sampler.batch_size = 19
            assert len(list(dataloader)) == 1

    def test_other_iterations_in_between_and_afterwards_are_not_counted(self) -> None:
        dataloader = loader(Rows())
        position = DataPosition(dataloader)
        position.begin(0)
        with position.watching():
            batches = iter(dataloader)
            next(batches)
            next(iter(dataloader))
            next(batches)
        list(dataloader)
        assert position.state_dict()["fetched"] == 2

    def test_a_second_position_on_the_same_loader_takes_over(self) -> None:
        dataloader = loader(Rows())
        for epoch in range(2):
            position = DataPosition(dataloader)
            position.begin(epoch)
            with position.watching():
                list(dataloader)
            assert position.state_dict()["fetched"] == BATCHES

    def test_a_loader_is_released_after_its_iteration(self) -> None:
        dataloader = loader(Rows())
        train(dataloader)
        gone = weakref.ref(dataloader)
        collecting = gc.isenabled()
        gc.disable()  # reference counts alone: worker processes must end with their DataLoader, not some time later
        try:
            del dataloader
            assert gone() is None
        finally:
            if collecting:
                gc.enable()

    def test_memory_does_not_grow_with_the_number_of_batches(self) -> None:
        dataloader = loader(Rows(400))
        position = DataPosition(dataloader)
        position.begin(0)
        with position.watching():
            list(dataloader)
        assert len(position._fetches._recent) <= 4, "law 12: nothing grows with the number of batches"
