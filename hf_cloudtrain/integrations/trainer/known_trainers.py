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


def without_parameters_in_the_loss(_args: Any, trainer: Any) -> Exactness:
    """Of sentence-transformers: no checkpoint holds the parameters of a loss, such as those of SoftmaxLoss."""
    losses = trainer.loss.values() if isinstance(trainer.loss, dict) else [trainer.loss]
    held = {id(parameter) for parameter in trainer.model.parameters()}
    for loss in losses:
        own = loss.parameters() if hasattr(loss, "parameters") else ()
        if any(id(parameter) not in held for parameter in own):
            return Exactness.no(f"{type(loss).__name__} has parameters of its own, which no checkpoint holds")
    return EXACT


def with_a_fixed_reference(args: Any, _trainer: Any) -> Exactness:
    """Of TRL: a reference model that follows the trained one is in no checkpoint."""
    if getattr(args, "sync_ref_model", False):
        return Exactness.no("sync_ref_model=True changes the reference model, which no checkpoint holds")
    return EXACT


def without_a_buffer(args: Any, trainer: Any) -> Exactness:
    """Of TRL's GRPO and RLOO: they generate completions for several steps, and their sampler has a state of its own."""
    if args.num_iterations > 1 or args.steps_per_generation != args.gradient_accumulation_steps:
        return Exactness.no(
            "num_iterations or steps_per_generation keeps completions that no checkpoint holds"
        )
    if args.use_vllm:
        return Exactness.not_verified("generation with vLLM was not tested")
    if (trainer.state.epoch or 0) >= 1:
        return Exactness.no("its sampler draws another order where it is resumed after the first epoch")
    return with_a_fixed_reference(args, trainer)


_SENTENCES = "sentence_transformers"

KNOWN: dict[str, Finding] = {
    "transformers.trainer.Trainer": as_tested,
    "transformers.trainer_seq2seq.Seq2SeqTrainer": as_tested,
    "trl.trainer.sft_trainer.SFTTrainer": as_tested,
    "trl.trainer.dpo_trainer.DPOTrainer": with_a_fixed_reference,
    "trl.trainer.reward_trainer.RewardTrainer": as_tested,
    "trl.trainer.kto_trainer.KTOTrainer": with_a_fixed_reference,
    "trl.trainer.grpo_trainer.GRPOTrainer": without_a_buffer,
    "trl.trainer.rloo_trainer.RLOOTrainer": without_a_buffer,
    f"{_SENTENCES}.sentence_transformer.trainer.SentenceTransformerTrainer": without_parameters_in_the_loss,
    f"{_SENTENCES}.cross_encoder.trainer.CrossEncoderTrainer": without_parameters_in_the_loss,
    f"{_SENTENCES}.sparse_encoder.trainer.SparseEncoderTrainer": without_parameters_in_the_loss,
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
