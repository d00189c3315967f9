"""What a training loader is made of, whether torch, Accelerate or torchdata made it."""

from __future__ import annotations

import sys
from typing import Any


def length(sized: Any) -> int | None:
    """How many batches a loader has for one process, or a data set samples; None where that is not known."""
    try:
        count: int = len(sized)
    except TypeError:
        return None
    return count


def batch_size_of(dataloader: Any) -> int | None:
    """Samples in one batch of one process; None where that is not known."""
    if hasattr(dataloader, "total_batch_size"):
        from accelerate import PartialState

        return int(dataloader.total_batch_size) // int(PartialState().num_processes)
    size = getattr(dataloader, "batch_size", None) or getattr(dataloader.batch_sampler, "batch_size", None)
    return size if isinstance(size, int) else None


def innermost_sampler(base: Any) -> Any:
    """The sampler that draws the order."""
    return samplers(base)[-1]


def seed_of(dataloader: Any) -> int | None:
    """What Accelerate's seedable sampler draws each epoch's order from; None for all others."""
    found: int | None = getattr(
        innermost_sampler(getattr(dataloader, "base_dataloader", dataloader)), "initial_seed", None
    )
    return found


def sampler_name(dataloader: Any) -> str:
    """The sampler that draws the order, as package and class, such as `torch.RandomSampler`."""
    kind = type(innermost_sampler(getattr(dataloader, "base_dataloader", dataloader)))
    return f"{kind.__module__.split('.')[0]}.{kind.__name__}"


def samplers(base: Any) -> list[Any]:
    """A loader's samplers, from the one that torch asks to the one that draws the order."""
    found = [base.batch_sampler if base.batch_sampler is not None else base.sampler]
    while True:
        inside = getattr(found[-1], "batch_sampler", None) or getattr(found[-1], "sampler", None)
        if inside is None or any(inside is other for other in found):
            return found
        found.append(inside)


def set_epoch(dataloader: Any, epoch: int) -> None:
    """Tell the number of the epoch to whatever makes the order depend on it."""
    for owner in (dataloader, innermost_sampler(getattr(dataloader, "base_dataloader", dataloader))):
        if hasattr(owner, "set_epoch"):
            owner.set_epoch(epoch)
            return
    if hasattr(dataloader.dataset, "set_epoch"):
        dataloader.dataset.set_epoch(epoch)


def is_dispatcher(dataloader: Any) -> bool:
    """Whether it is Accelerate's loader whose first process reads for all."""
    return type(dataloader).__name__ == "DataLoaderDispatcher"


def reads_here(dataloader: Any) -> bool:
    """Whether this process reads data: of a dispatcher's, only the first does."""
    return not is_dispatcher(dataloader) or bool(dataloader.state.process_index == 0)


def fills_up(dataloader: Any) -> bool:
    """Whether the last batch of an epoch may get samples of the first one."""
    return is_dispatcher(dataloader) and dataloader.state.num_processes > 1 and not dataloader._drop_last


def fetches_per_batch(dataloader: Any) -> int:
    """A dispatcher reads the batches of all processes and hands each its own."""
    if not is_dispatcher(dataloader) or dataloader.split_batches:
        return 1
    return int(dataloader.state.num_processes)


def keeps_state(dataloader: Any) -> bool:
    """Whether it is a StatefulDataLoader, as Accelerate's `use_stateful_dataloader` makes them."""
    return bool(
        getattr(dataloader, "use_stateful_dataloader", type(dataloader).__name__ == "StatefulDataLoader")
    )


def shuffles_in_a_buffer(dataset: Any) -> bool:
    """Whether a stream of `datasets` shuffles in a buffer, whose content its state does not hold: samples would be lost."""
    module = sys.modules.get("datasets.iterable_dataset")
    kind = getattr(module, "BufferShuffledExamplesIterable", None)
    if kind is None:
        return False
    waiting = [getattr(dataset, "_ex_iterable", None)]
    while waiting:
        one = waiting.pop()
        if isinstance(one, kind):
            return True
        if one is not None:
            waiting += [getattr(one, "ex_iterable", None), *getattr(one, "ex_iterables", ())]
    return False


def leave(dataloader: Any) -> None:
    """Tell Accelerate that this loader is not iterated any more: it only notices an end that it reaches itself."""
    if hasattr(dataloader, "gradient_state") and hasattr(dataloader, "end"):
        dataloader.end()
