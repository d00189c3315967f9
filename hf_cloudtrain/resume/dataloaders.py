"""Facts about a training DataLoader, whether torch, Accelerate or torchdata made it."""

from __future__ import annotations

import sys
from typing import Any

BY_INDEX = "index"
"""A resume skips batches by index: map-style data."""
BY_STATE = "state"
"""The stream or the DataLoader restores its own state."""
BY_READING = "reading"
"""A resume reads the batches again and discards them: a stream without a state of its own."""


def length(sized: Any) -> int | None:
    """Batches of a DataLoader for one rank, or samples of a dataset; None if unknown."""
    try:
        count: int = len(sized)
    except TypeError:
        return None
    return count


def batch_size_of(dataloader: Any) -> int | None:
    """Samples in one batch of one rank; None if unknown."""
    try:
        total = getattr(dataloader, "total_batch_size", None)
    except TypeError:  # of a batch sampler that has no size
        total = None
    if total is not None:
        from accelerate import PartialState

        return int(total) // int(PartialState().num_processes)
    size = getattr(dataloader, "batch_size", None) or getattr(dataloader.batch_sampler, "batch_size", None)
    return size if isinstance(size, int) else None


def samplers(base: Any) -> list[Any]:
    """The samplers of a DataLoader, from the one that torch iterates to the one that draws the order."""
    found = [base.batch_sampler if base.batch_sampler is not None else base.sampler]
    while True:
        inside = getattr(found[-1], "batch_sampler", None) or getattr(found[-1], "sampler", None)
        if inside is None or any(inside is other for other in found):
            return found
        found.append(inside)


def innermost_sampler(dataloader: Any) -> Any:
    """The sampler that draws the order."""
    return samplers(getattr(dataloader, "base_dataloader", dataloader))[-1]


def seed_of(dataloader: Any) -> int | None:
    """The seed from which Accelerate's seedable sampler draws each epoch's order; None for all others."""
    found: int | None = getattr(innermost_sampler(dataloader), "initial_seed", None)
    return found


def sampler_name(dataloader: Any) -> str:
    """The sampler that draws the order, as package and class, such as `torch.RandomSampler`."""
    kind = type(innermost_sampler(dataloader))
    return f"{kind.__module__.split('.')[0]}.{kind.__name__}"


def set_epoch(dataloader: Any, epoch: int) -> None:
    """Pass the number of the epoch to the object whose order depends on it."""
    for owner in (dataloader, innermost_sampler(dataloader), dataloader.dataset):
        if hasattr(owner, "set_epoch"):
            owner.set_epoch(epoch)
            return


def tell_epoch(dataloader: Any, epoch: int) -> None:
    """Tell the epoch to a batch sampler that neither Accelerate nor Trainer reaches, where they skip batches on several processes."""
    sampler = innermost_sampler(dataloader)
    if type(sampler).__name__ == "BatchRebalanceSampler":
        sampler.set_epoch(epoch)


def generators_of(base: Any) -> list[Any]:
    """The random generators that an order is drawn from, each once."""
    found: list[Any] = []
    for owner in (base, *samplers(base), base.dataset):
        generator = getattr(owner, "generator", None)
        if hasattr(generator, "get_state") and not any(generator is other for other in found):
            found.append(generator)
    return found


def share_generator(base: Any, states: tuple[Any, ...]) -> None:
    """Give the sampler a generator if the saved one had one: Accelerate does, if several ranks share the sampler."""
    import torch

    sampler = innermost_sampler(base)
    if states and not generators_of(base) and getattr(sampler, "generator", states) is None:
        sampler.generator = torch.Generator()


def is_dispatcher(dataloader: Any) -> bool:
    """Whether it is Accelerate's DataLoader whose rank 0 reads for all ranks."""
    return type(dataloader).__name__ == "DataLoaderDispatcher"


def reads_here(dataloader: Any) -> bool:
    """Whether this rank reads data: of a dispatcher's, only rank 0 does."""
    return not is_dispatcher(dataloader) or bool(dataloader.state.process_index == 0)


def fills_up(dataloader: Any) -> bool:
    """Whether the last batch of an epoch may be filled up with samples of the first one."""
    return is_dispatcher(dataloader) and dataloader.state.num_processes > 1 and not dataloader._drop_last


def fetches_per_batch(dataloader: Any) -> int:
    """Fetches for one batch of a rank: a dispatcher reads the batches of all ranks."""
    if not is_dispatcher(dataloader) or dataloader.split_batches:
        return 1
    return int(dataloader.state.num_processes)


def keeps_state(dataloader: Any) -> bool:
    """Whether it is a StatefulDataLoader, as Accelerate's `use_stateful_dataloader` makes them."""
    is_one = type(dataloader).__name__ == "StatefulDataLoader"
    return bool(getattr(dataloader, "use_stateful_dataloader", is_one))


def shuffles_in_a_buffer(dataset: Any) -> bool:
    """Whether a stream of `datasets` shuffles in a buffer: its state does not hold the buffer, so samples would be lost."""
    module = sys.modules.get("datasets.iterable_dataset")
    kind = getattr(module, "BufferShuffledExamplesIterable", ())
    waiting = [getattr(dataset, "_ex_iterable", None)]
    while waiting:
        one = waiting.pop()
        if isinstance(one, kind):
            return True
        if one is not None:
            waiting += [getattr(one, "ex_iterable", None), *getattr(one, "ex_iterables", ())]
    return False


def draw_no_seed(base: Any) -> None:
    """Leave torch's random state alone when the processes of a DataLoader start.

    Those that stay (`persistent_workers`) draw their seed once in a run. A resumed run starts them again, after the random
    states were restored, so it would draw the seed a second time, and every random number after it would differ.
    """
    import torch

    if base.generator is None:
        base.generator = torch.Generator()


def drop_first_iterator(base: Any) -> None:
    """Let the next iteration draw its random numbers as each one after it.

    Accelerate asks a StatefulDataLoader for its state, which then begins its first iteration at once; after a resume, that
    would stand in for a later one.
    """
    if getattr(base, "_initial_iter_for_state_dict", False):
        base._iterator = None
        base._initial_iter_for_state_dict = False


def is_seeded(dataset: Any) -> bool:
    """Whether the streams of `datasets` within a dataset are shuffled and mixed by seeds, not by the operating system."""
    waiting = [getattr(dataset, "_ex_iterable", None)]
    while waiting:
        one = waiting.pop()
        if type(one).__module__.startswith("datasets."):
            bits = getattr(getattr(one, "generator", None), "bit_generator", None)
            entropy = getattr(getattr(bits, "seed_seq", None), "entropy", 0)
            if (
                isinstance(entropy, int) and entropy >= 2**64
            ):  # numpy takes 128 bits, where it is given no seed
                return False
            waiting += [getattr(one, "ex_iterable", None), *getattr(one, "ex_iterables", ())]
    return True


def leave(dataloader: Any) -> None:
    """Tell Accelerate that the iteration has ended: it only notices an end that it reaches itself."""
    if hasattr(dataloader, "gradient_state") and hasattr(dataloader, "end"):
        dataloader.end()
