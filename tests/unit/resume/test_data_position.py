"""DataPosition: the rest of an epoch, in another process, is the rest that the uninterrupted epoch had."""

from __future__ import annotations

import gc
import io
import random
import weakref
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch.utils.data import (
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    WeightedRandomSampler,
)

from hf_cloudtrain.errors import ConfigurationError, ManifestError, PositionError
from hf_cloudtrain.resume.data_position import (
    BY_INDEX,
    BY_READING,
    BY_STATE,
    DataPosition,
    _chained,
    _plain,
)
from hf_cloudtrain.resume.random_state import RandomState

SIZE = 19
BATCHES = 5


class Rows(Dataset):
    """Its number and, with `noise`, one from each global random state. `read` says what was fetched."""

    def __init__(self, size: int = SIZE, *, noise: bool = False) -> None:
        self.size = size
        self.noise = noise
        self.read: list[int] = []

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> tuple[int, float]:
        self.read.append(index)
        if not self.noise:
            return index, 0.0
        return index, float(torch.rand(1)) + random.random() + float(np.random.rand())


class Stream(IterableDataset):
    """The same as a stream that cannot tell where it stands."""

    def __init__(self, size: int = SIZE, *, noise: bool = False) -> None:
        self.rows = Rows(size, noise=noise)
        self.at = self.begin_at = 0

    def __iter__(self) -> Iterator[tuple[int, float]]:
        self.at, self.begin_at = self.begin_at, 0
        while self.at < len(self.rows):
            self.at += 1
            yield self.rows[self.at - 1]


class StatefulStream(Stream):
    """The same as a stream that can."""

    def state_dict(self) -> dict[str, int]:
        return {"at": self.at}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.begin_at = state["at"]


class OwnBatches:
    """A batch sampler that somebody wrote: neither a sampler inside nor a batch size."""

    def __len__(self) -> int:
        return BATCHES

    def __iter__(self) -> Iterator[list[int]]:
        order = torch.randperm(SIZE).tolist()
        return (order[begin : begin + 4] for begin in range(0, SIZE, 4))


LOADERS: dict[str, Callable[[], Any]] = {
    "an order from the global state": lambda: loader(Rows(noise=True), shuffle=True),
    "no shuffling": lambda: loader(Rows(noise=True)),
    "a generator": lambda: loader(
        Rows(noise=True), shuffle=True, generator=torch.Generator().manual_seed(random.getrandbits(20))
    ),
    "a sampler with a generator": lambda: loader(
        Rows(noise=True), sampler=RandomSampler(Rows(), generator=torch.Generator().manual_seed(3))
    ),
    "weights": lambda: loader(Rows(noise=True), sampler=WeightedRandomSampler([1.0] * SIZE, SIZE)),
    "replacement": lambda: loader(
        Rows(noise=True), sampler=RandomSampler(Rows(), replacement=True, num_samples=SIZE)
    ),
    "one rank's share": lambda: loader(Rows(noise=True), sampler=DistributedSampler(Rows(), 1, 0)),
    "batches of its own": lambda: DataLoader(Rows(noise=True), batch_sampler=OwnBatches()),
    "samples in place of batches": lambda: DataLoader(Rows(5, noise=True), batch_size=None, shuffle=True),
    "a last batch that is dropped": lambda: loader(Rows(22, noise=True), shuffle=True, drop_last=True),
    "a stream": lambda: loader(Stream(noise=True)),
    "a stream with a state": lambda: loader(StatefulStream(noise=True)),
}


class Read(NamedTuple):
    """What a process saw of an epoch."""

    seen: list[Any]
    record: dict[str, Any]
    now: RandomState


@pytest.fixture(autouse=True)
def _as_it_was() -> Any:
    before = RandomState.capture()
    yield
    before.restore()


def loader(dataset: Any, **options: Any) -> Any:
    return DataLoader(dataset, batch_size=4, **options)


def another_process(seed: int) -> None:
    """All random states are other ones."""
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)


def train(
    dataloader: Any,
    *,
    stop: int | None = None,
    resume: Read | None = None,
    epoch: int = 1,
    ahead: int = 0,
    foreseen: bool = True,
) -> Read:
    """One epoch as TrainLoop goes through it; `ahead` batches are fetched before they are handed out."""
    place = DataPosition(dataloader)
    if resume is None:
        place.begin(epoch)
    else:
        place.begin(epoch, through_a_file(resume.record), resume.now)
    with place.watching():
        seen = list(batches_of(place, stop, ahead, foreseen))
    return Read(seen, place.state_dict(), place.random_state())


def batches_of(place: DataPosition, stop: int | None, ahead: int, foreseen: bool) -> Iterator[Any]:
    """Each batch and what training draws beside it."""
    batches = looked_ahead(iter(place.dataloader), ahead)
    for _ in range(place.to_read):
        next(batches)
    place.save_foreseen = foreseen
    while stop is None or place.batches < stop:
        batch = next(batches, None)
        place.settle()
        place.check_same_order()
        if batch is None:
            break
        yield [torch.as_tensor(part).tolist() for part in batch], training_draws()
        place.batches += 1


def training_draws() -> list[float]:
    return [float(torch.rand(1)), random.random(), float(np.random.rand())]


def looked_ahead(batches: Iterator[Any], ahead: int) -> Iterator[Any]:
    """As Accelerate's loaders: they only know that a batch is the last one when they have asked for another."""
    waiting = []
    for batch in batches:
        waiting.append(batch)
        if len(waiting) > ahead:
            yield waiting.pop(0)
    yield from waiting


def through_a_file(record: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(record, file)
    file.seek(0)
    loaded: dict[str, Any] = torch.load(file, weights_only=True)
    return loaded


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

    def test_between_epochs_the_generators_go_on(self) -> None:
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

    def test_each_epoch_of_a_sampler_has_its_order(self) -> None:
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

    def test_a_stream_without_one_says_how_much_is_to_be_read(self) -> None:
        saved = train(loader(Stream()), stop=3)
        place = DataPosition(loader(Stream()))
        place.begin(1, saved.record, saved.now)
        assert place.to_read == 3
        place.begin(2)
        assert place.to_read == 0

    @pytest.mark.parametrize(
        ("dataset", "workers", "way"),
        [
            (Rows, 0, BY_INDEX),
            (Rows, 2, BY_INDEX),
            (Stream, 0, BY_READING),
            (StatefulStream, 0, BY_STATE),
            (StatefulStream, 1, BY_READING),  # its state is in the other process
        ],
    )
    def test_the_way_follows_from_the_data(self, dataset: Any, workers: int, way: str) -> None:
        assert DataPosition(loader(dataset(), num_workers=workers)).way == way


class TestFingerprint:
    def test_it_is_of_what_was_trained_on_not_of_what_was_fetched(self) -> None:
        prints = {train(loader(Rows()), stop=3, ahead=ahead).record["fingerprint"] for ahead in (0, 1, 2)}
        assert len(prints) == 1

    def test_it_changes_with_every_batch(self) -> None:
        prints = [train(loader(Rows()), stop=stop).record["fingerprint"] for stop in range(BATCHES + 1)]
        assert len(set(prints)) == BATCHES + 1
        assert all(len(one) == 16 for one in prints)

    def test_order_and_borders_of_the_batches_count(self) -> None:
        def of(*batches: Any) -> int:
            fingerprint = 0
            for indices in batches:
                fingerprint = _chained(fingerprint, indices)
            return fingerprint

        different = [of([0, 1], [2, 3]), of([2, 3], [0, 1]), of([0, 1, 2, 3]), of([1, 0], [2, 3]), of([0, 1])]
        assert len(set(different)) == len(different)

    @pytest.mark.parametrize("indices", [7, "key", ["a", "b"], [("row", 3)], [2**70], None, [None]])
    def test_indices_may_be_anything(self, indices: Any) -> None:
        assert _chained(0, indices) != _chained(1, indices)
        assert _chained(0, indices) != _chained(0, [indices])

    def test_another_order_is_refused(self) -> None:
        saved = train(loader(Rows(), shuffle=True), stop=3)
        with pytest.raises(PositionError, match=r"The 3 batches .* in epoch 1 .* order is another one"):
            train(loader(Rows()), resume=saved)

    def test_an_order_that_is_drawn_as_it_goes_is_refused(self) -> None:
        """The first batch comes again, and the one in the look-ahead would be another one."""

        class Drawing(SequentialSampler):
            def __iter__(self) -> Iterator[int]:
                return (int(torch.randint(SIZE, ())) for _ in range(SIZE))

        another_process(1)
        saved = train(loader(Rows(), sampler=Drawing(Rows())), stop=2, ahead=1)
        another_process(2)
        with pytest.raises(PositionError, match="cannot be found again"):
            train(loader(Rows(), sampler=Drawing(Rows())), resume=saved, ahead=1)

    def test_an_epoch_that_is_too_short_is_refused(self) -> None:
        saved = train(loader(Rows()), stop=4)
        with pytest.raises(PositionError, match="the epoch has only 2 batches"):
            train(loader(Rows(8)), resume=saved)

    def test_another_order_of_a_stream_that_is_read_away_is_refused(self) -> None:
        saved = train(loader(Stream()), stop=3)
        with pytest.raises(PositionError, match="cannot be found again"):
            train(DataLoader(Stream(), batch_size=2), resume=saved)

    def test_another_kind_of_data_is_refused_before_anything_is_fetched(self) -> None:
        saved = train(loader(Rows()), stop=3)
        with pytest.raises(PositionError, match=r"kept by 'index'.*goes by 'reading'"):
            train(loader(Stream()), resume=saved)

    def test_a_stream_whose_state_is_missing_is_refused(self) -> None:
        saved = train(loader(StatefulStream()), stop=3)
        with pytest.raises(ManifestError, match="position in the stream is missing"):
            train(loader(StatefulStream()), resume=saved._replace(record={**saved.record, "state": None}))


class TestCanBeSaved:
    """numpy's state costs 30 us, so it is only noted where a save is coming."""

    def at_a_save(self, *, foreseen: bool, draw: Callable[[], Any]) -> DataPosition:
        dataloader = loader(Rows())
        place = DataPosition(dataloader)
        place.begin(0)
        with place.watching():
            batches = looked_ahead(iter(dataloader), 1)
            for _ in range(2):
                place.save_foreseen = foreseen
                next(batches)
                place.batches += 1
                draw()
        return place

    @pytest.mark.parametrize(
        ("foreseen", "draw", "answer"),
        [
            (True, np.random.rand, True),
            (False, np.random.rand, False),
            (False, random.random, True),
            (False, lambda: torch.rand(1), True),
        ],
        ids=["foreseen", "numpy drew", "python drew", "torch drew"],
    )
    def test_a_save_that_nobody_foresaw_can_wait(
        self, foreseen: bool, draw: Callable[[], Any], answer: bool
    ) -> None:
        assert self.at_a_save(foreseen=foreseen, draw=draw).can_be_saved() is answer

    def test_with_nothing_fetched_ahead_it_can_always_be_saved(self) -> None:
        dataloader = loader(Rows())
        place = DataPosition(dataloader)
        place.begin(0)
        with place.watching():
            next(iter(dataloader))
        place.batches += 1
        np.random.rand()
        assert place.can_be_saved()

    def test_numpy_at_rest_is_noted_though_nobody_foresaw_the_save(self) -> None:
        place = self.at_a_save(foreseen=False, draw=random.random)
        before = place.state_dict()["before_fetch"]
        assert before["numpy"] is not None


class TestRecord:
    def test_a_generator_that_two_share_is_set_once(self) -> None:
        generator = torch.Generator().manual_seed(3)
        rows = Rows()
        dataloader = loader(rows, generator=generator, sampler=RandomSampler(rows, generator=generator))
        assert len(DataPosition(dataloader).random_state().generators) == 1

    def test_of_a_stream_it_holds_what_torch_loads_safely(self) -> None:
        class Told(StatefulStream):
            def state_dict(self) -> dict[str, Any]:
                return {
                    "at": np.int64(self.at),
                    "order": np.arange(3),
                    "files": ("a", "b"),
                    "done": {1: True},
                }

        record = through_a_file(train(loader(Told()), stop=2).record)
        assert record["state"]["at"] == 8
        assert type(record["state"]["at"]) is int
        assert record["state"]["order"].tolist() == [0, 1, 2]
        assert record["state"]["files"] == ("a", "b")

    def test_what_cannot_be_stored_is_named(self) -> None:
        with pytest.raises(ConfigurationError, match="'Rows', which cannot be stored"):
            _plain({"at": [Rows()]})

    def test_a_second_epoch_forgets_the_first(self) -> None:
        dataloader = loader(Rows(), shuffle=True)
        place = DataPosition(dataloader)
        place.begin(0)
        with place.watching():
            list(dataloader)
        place.batches = BATCHES
        place.begin(1)
        record = place.state_dict()
        assert (record["batches"], record["fetched"], record["epoch"]) == (0, 0, 1)
        assert record["before_fetch"] is None
        assert int(record["fingerprint"], 16) == 0


class TestWatch:
    def test_the_batch_sampler_is_in_all_else_what_it_was(self) -> None:
        dataloader = loader(Rows(), sampler=SequentialSampler(Rows()), drop_last=True)
        inner: Any = dataloader.batch_sampler
        with DataPosition(dataloader).watching():
            watched = dataloader.batch_sampler
            assert len(watched) == len(inner)
            assert (watched.batch_size, watched.drop_last, watched.sampler) == (4, True, inner.sampler)
            assert not hasattr(watched, "no_such_thing")

    def test_what_is_set_on_the_batch_sampler_arrives(self) -> None:
        dataloader = loader(Rows())
        with DataPosition(dataloader).watching():
            dataloader.batch_sampler.batch_size = 19
            assert len(list(dataloader)) == 1

    def test_a_look_at_the_data_between_and_after_is_none_of_its_business(self) -> None:
        dataloader = loader(Rows())
        place = DataPosition(dataloader)
        place.begin(0)
        with place.watching():
            batches = iter(dataloader)
            next(batches)
            next(iter(dataloader))
            next(batches)
        list(dataloader)
        assert place.state_dict()["fetched"] == 2

    def test_another_position_on_the_same_loader_takes_over(self) -> None:
        dataloader = loader(Rows())
        for epoch in range(2):
            place = DataPosition(dataloader)
            place.begin(epoch)
            with place.watching():
                list(dataloader)
            assert place.state_dict()["fetched"] == BATCHES

    def test_a_loader_is_let_go_when_nobody_iterates_it(self) -> None:
        dataloader = loader(Rows())
        train(dataloader)
        gone = weakref.ref(dataloader)
        collecting = gc.isenabled()
        gc.disable()  # reference counts alone: worker processes end with their loader, not some time later
        try:
            del dataloader
            assert gone() is None
        finally:
            if collecting:
                gc.enable()

    def test_looking_back_is_bounded(self) -> None:
        dataloader = loader(Rows(400))
        place = DataPosition(dataloader)
        place.begin(0)
        with place.watching():
            list(dataloader)
        assert len(place._recent) <= 4, "law 12: nothing grows with the number of batches"
