"""DataPosition: the rest of an epoch, in another process, is the rest that the uninterrupted epoch had."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import (
    DataLoader,
    RandomSampler,
    SequentialSampler,
)

from hf_cloudtrain.errors import ConfigurationError, PositionError
from hf_cloudtrain.resume.data_position import DataPosition
from tests.unit.resume._epochs import (
    BATCHES,
    LOADERS,
    SIZE,
    Rows,
    StatefulStream,
    Stream,
    another_process,
    loader,
    looked_ahead,
    train,
)


class TestLaw7Exact:
    @pytest.mark.parametrize("name", LOADERS)
    @pytest.mark.parametrize("ahead", [0, 1])
    @pytest.mark.parametrize("stop", [1, 3, 5])
    def test_batches_and_random_numbers_are_those_of_the_whole_epoch_with(
        self, name: str, ahead: int, stop: int
    ) -> None:
        make = LOADERS[name]
        another_process(1)
        whole = train(make(), ahead=ahead).seen
        another_process(1)
        saved = train(make(), stop=stop, ahead=ahead)
        another_process(2)
        rest = train(make(), resume=saved, ahead=ahead).seen
        assert len(whole) == BATCHES
        assert saved.seen + rest == whole

    @pytest.mark.parametrize("name", LOADERS)
    def test_a_second_stop_in_the_same_epoch_is_exact_too_with(self, name: str) -> None:
        make = LOADERS[name]
        another_process(1)
        whole = train(make(), ahead=1).seen
        another_process(1)
        first = train(make(), stop=1, ahead=1)
        another_process(2)
        second = train(make(), stop=4, resume=first, ahead=1)
        another_process(3)
        rest = train(make(), resume=second, ahead=1).seen
        assert first.seen + second.seen + rest == whole
        another_process(1)
        assert second.record["fingerprint"] == train(make(), stop=4, ahead=1).record["fingerprint"]

    @pytest.mark.parametrize("ahead", [0, 1])
    def test_the_epoch_after_is_the_one_of_an_uninterrupted_run(self, ahead: int) -> None:
        make = LOADERS["a generator"]
        another_process(1)
        uninterrupted = make()
        train(uninterrupted, ahead=ahead, epoch=0)
        whole = train(uninterrupted, ahead=ahead, epoch=1).seen
        another_process(1)
        saved = train(make(), stop=2, ahead=ahead, epoch=0)
        another_process(2)
        resumed = make()
        train(resumed, resume=saved, ahead=ahead, epoch=0)
        assert train(resumed, ahead=ahead, epoch=1).seen == whole

    def test_between_epochs_the_generators_continue(self) -> None:
        make = LOADERS["a generator"]
        another_process(1)
        uninterrupted = make()
        now = train(uninterrupted, epoch=0).now
        whole = train(uninterrupted, epoch=1).seen
        another_process(2)
        resumed = make()
        now.restore()
        DataPosition(resumed).restore_generators(now)
        assert train(resumed, epoch=1).seen == whole

    def test_each_epoch_of_a_sampler_has_its_own_order(self) -> None:
        make = LOADERS["one rank's share"]
        ids = [[batch[0] for batch, _ in train(make(), epoch=epoch).seen] for epoch in (0, 1, 1)]
        assert ids[0] != ids[1] == ids[2]


class TestSkipping:
    def test_what_is_skipped_is_not_fetched(self) -> None:
        saved = train(loader(Rows(), shuffle=True), stop=3)
        rows = Rows()
        train(loader(rows, shuffle=True), resume=saved)
        assert len(rows.read) == SIZE - 3 * 4

    def test_a_stream_with_a_state_is_not_read_again(self) -> None:
        saved = train(loader(StatefulStream()), stop=3, ahead=1)
        stream = StatefulStream()
        train(loader(stream), resume=saved, ahead=1)
        assert stream.rows.read == list(range(12, SIZE))

    def test_a_stream_without_a_state_says_how_much_is_to_be_read(self) -> None:
        saved = train(loader(Stream()), stop=3)
        position = DataPosition(loader(Stream()))
        position.begin(1, saved.record, saved.now)
        assert position.to_read == 3
        position.begin(2)
        assert position.to_read == 0


class TestFingerprint:
    def test_it_covers_what_was_trained_on_not_what_was_fetched(self) -> None:
        prints = {train(loader(Rows()), stop=3, ahead=ahead).record["fingerprint"] for ahead in (0, 1, 2)}
        assert len(prints) == 1

    def test_it_changes_with_every_batch(self) -> None:
        prints = [train(loader(Rows()), stop=stop).record["fingerprint"] for stop in range(BATCHES + 1)]
        assert len(set(prints)) == BATCHES + 1
        assert all(len(one) == 16 for one in prints)

    def test_a_different_order_is_an_error(self) -> None:
        saved = train(loader(Rows(), shuffle=True), stop=3)
        with pytest.raises(PositionError, match=r"The 3 batches .* in epoch 1 .* order differs"):
            train(loader(Rows()), resume=saved)

    def test_an_order_that_is_drawn_during_the_iteration_is_an_error(self) -> None:
        """The first batch is the same, and the one in the look-ahead would be different."""

        class Drawing(SequentialSampler):
            def __iter__(self) -> Iterator[int]:
                return (int(torch.randint(SIZE, ())) for _ in range(SIZE))

        another_process(1)
        saved = train(loader(Rows(), sampler=Drawing(Rows())), stop=2, ahead=1)
        another_process(2)
        with pytest.raises(PositionError, match="cannot be reproduced"):
            train(loader(Rows(), sampler=Drawing(Rows())), resume=saved, ahead=1)

    def test_an_epoch_that_is_too_short_is_an_error(self) -> None:
        saved = train(loader(Rows()), stop=4)
        with pytest.raises(PositionError, match="the epoch has only 2 batches"):
            train(loader(Rows(8)), resume=saved)

    def test_different_batches_of_a_stream_that_is_read_again_are_an_error(self) -> None:
        saved = train(loader(Stream()), stop=3)
        with pytest.raises(PositionError, match="cannot be reproduced"):
            train(DataLoader(Stream(), batch_size=2), resume=saved)

    def test_a_different_kind_of_dataset_is_an_error_before_anything_is_fetched(self) -> None:
        saved = train(loader(Rows()), stop=3)
        with pytest.raises(
            PositionError, match=r"saved as 'index', but this DataLoader resumes by 'reading'"
        ):
            train(loader(Stream()), resume=saved)


class TestCanBeSaved:
    """Reading numpy's and Python's states takes 40 us, so they are noted only before a save."""

    def at_a_save(self, *, foreseen: bool, draw: Callable[[], Any]) -> DataPosition:
        dataloader = loader(Rows())
        position = DataPosition(dataloader)
        position.begin(0)
        with position.watching():
            batches = looked_ahead(iter(dataloader), 1)
            for _ in range(2):
                position.save_foreseen = foreseen
                next(batches)
                position.batches += 1
                draw()
        return position

    @pytest.mark.parametrize(
        ("foreseen", "draw", "answer"),
        [
            (True, np.random.rand, True),
            (True, random.random, True),
            (False, np.random.rand, False),
            (False, random.random, False),
            (False, lambda: torch.rand(1), True),
            (False, lambda: None, True),
        ],
        ids=[
            "foreseen, numpy",
            "foreseen, Python",
            "numpy drew",
            "Python drew",
            "torch drew",
            "nothing drew",
        ],
    )
    def test_a_save_that_was_not_foreseen_can_wait(
        self, foreseen: bool, draw: Callable[[], Any], answer: bool
    ) -> None:
        assert self.at_a_save(foreseen=foreseen, draw=draw).can_be_saved() is answer

    def test_with_nothing_fetched_ahead_it_can_always_be_saved(self) -> None:
        dataloader = loader(Rows())
        position = DataPosition(dataloader)
        position.begin(0)
        with position.watching():
            next(iter(dataloader))
        position.batches += 1
        np.random.rand()
        assert position.can_be_saved()

    def test_the_hosts_states_are_in_a_save_that_was_not_foreseen_if_they_have_not_changed(self) -> None:
        position = self.at_a_save(foreseen=False, draw=lambda: None)
        before = position.state_dict()["before_fetch"]
        assert before["numpy"] is not None
        assert before["python"] == random.getstate()


class TestRecord:
    def test_before_the_first_epoch_the_position_is_unknown(self) -> None:
        with pytest.raises(ConfigurationError, match=r"Call begin\(\) before state_dict\(\)"):
            DataPosition(loader(Rows())).state_dict()

    def test_a_generator_that_two_objects_share_is_captured_once(self) -> None:
        generator = torch.Generator().manual_seed(3)
        rows = Rows()
        dataloader = loader(rows, generator=generator, sampler=RandomSampler(rows, generator=generator))
        assert len(DataPosition(dataloader).random_state().generators) == 1

    def test_a_second_epoch_starts_at_zero(self) -> None:
        dataloader = loader(Rows(), shuffle=True)
        position = DataPosition(dataloader)
        position.begin(0)
        with position.watching():
            list(dataloader)
        position.batches = BATCHES
        position.begin(1)
        record = position.state_dict()
        assert (record["batches"], record["fetched"], record["epoch"]) == (0, 0, 1)
        assert record["before_fetch"] is None
        assert int(record["fingerprint"], 16) == 0
