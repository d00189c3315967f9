"""Whether a checkpoint's place in data and schedule fits the configuration that resumes it (law 8)."""

from __future__ import annotations

from hf_cloudtrain.errors import PositionError
from hf_cloudtrain.manifest import Position

_WORDS = {
    "world_size": "processes",
    "per_device_train_batch_size": "samples a batch and process",
    "gradient_accumulation_steps": "batches an optimizer step",
}


def refuse_other_topology(saved: Position, now: Position, what: str) -> None:
    """Stop where samples would be skipped or repeated.

    Frameworks compute the place in the data from the number of steps alone, and finish "successfully" at half the
    data when a step means something else than before.

    Raises:
        PositionError: names every difference.
    """
    changes = [
        f"{before} {words} before, {after} now"
        for name, words in _WORDS.items()
        if (before := getattr(saved, name)) is not None
        and (after := getattr(now, name)) is not None
        and before != after
    ]
    if changes:
        raise PositionError(
            f"{what} cannot be resumed here: {'; '.join(changes)}. The same step would mean another place in the data. "
            "Use the same numbers, or start a run of its own from the model in that checkpoint."
        )
