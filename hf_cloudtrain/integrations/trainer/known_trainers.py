"""The trainers that were killed, resumed and compared at a difference of 0.0, and where each of them is known to differ.

`make test-trainers` runs the comparison. A trainer that is not in `KNOWN` may hold state that no checkpoint has.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hf_cloudtrain.checkpoints.exactness import EXACT, Exactness

Finding = Callable[[Any, Any], Exactness]
"""From the TrainingArguments and the trainer: what is known of a resume with this class."""


def as_tested(_args: Any, _trainer: Any) -> Exactness:
    """Exact with every setting, as far as the class decides."""
    return EXACT


KNOWN: dict[str, Finding] = {
    "transformers.trainer.Trainer": as_tested,
    "transformers.trainer_seq2seq.Seq2SeqTrainer": as_tested,
}
"""By the class itself, as module and name; a subclass is a class of its own."""


def of_trainer(args: Any, trainer: Any) -> Exactness:
    """What the class of a trainer decides.

    Example:
        >>> of_trainer(args, Trainer(model, args))
        Exactness(exact=True, reason=None)
    """
    name = class_name(trainer)
    finding = KNOWN.get(name)
    if finding is None:
        return Exactness.not_verified(
            f"{name.rpartition('.')[2]} is not one of the trainers that were tested, and may hold state of its own"
        )
    replaced = sorted(key for key in vars(trainer) if callable(getattr(type(trainer), key, None)))
    if replaced:
        return Exactness.not_verified(f"the trainer's {replaced[0]}() was replaced, and may hold state")
    return finding(args, trainer)


def class_name(thing: Any) -> str:
    """The class of an object, as module and name."""
    return f"{type(thing).__module__}.{type(thing).__qualname__}"
