"""What the manifest of each set-up must say, written before the code that says it. No torch: pytest reads this often.

`yes()`, `no(word)`, `not_verified(word)`: the reason must contain the word, which is the name of the class or argument that a
user would look for. Whether a set-up is really exact is not written here: the harness measures it.
"""

from __future__ import annotations

from dataclasses import dataclass

from hf_cloudtrain.checkpoints.exactness import Exactness


@dataclass(frozen=True)
class Answer:
    """What the manifest must say."""

    exact: bool | None
    word: str = ""
    """In the reason."""
    fast: bool = False
    """Whether it is part of `make test`."""
    todo: str = ""
    """What is missing until it holds."""

    def problem(self, recorded: Exactness) -> str | None:
        """How what was recorded differs; None if it does not."""
        if recorded.exact is self.exact and self.word in (recorded.reason or ""):
            return None
        wanted = {True: "yes", False: "no", None: "not verified"}[self.exact]
        return f"expected {wanted} {self.word!r}, recorded: {recorded}"


def yes(*, fast: bool = False, todo: str = "") -> Answer:
    return Answer(True, "", fast, todo)


def no(word: str, *, fast: bool = False, todo: str = "") -> Answer:
    return Answer(False, word, fast, todo)


def not_verified(word: str, *, fast: bool = False, todo: str = "") -> Answer:
    return Answer(None, word, fast, todo)


ANSWERS: dict[str, Answer] = {
    # Trainer: arguments.
    "a list of samples": yes(fast=True),
    "three epochs, resumed in the first": yes(),
    "three epochs, resumed in the second": yes(),
    "three epochs, resumed in the third": yes(),
    "resumed from an epoch's last step": yes(fast=True),
    "max_steps beyond one epoch": yes(),
    "save_strategy epoch": yes(),
    "no shuffling": yes(),
    "a seed of its own for the data": yes(),
    "dataloader_drop_last": yes(),
    "gradient accumulation": yes(),
    "gradient accumulation with a short last step": yes(fast=True),
    "evaluation every few steps": yes(),
    "evaluation at each epoch's end": yes(),
    "saved at an epoch's last step, where evaluation follows": yes(),
    "evaluation before the first step": yes(),
    "the best model loaded at the end": yes(),
    "save_strategy best": yes(),
    "save_total_limit": yes(),
    "two loader processes and a list": yes(fast=True),
    "loader processes that fetch far ahead": yes(),
    "persistent loader processes": yes(fast=True),
    "persistent loader processes and evaluation": yes(),
    "label smoothing": yes(),
    "NEFTune, which draws noise for embeddings": yes(),
    "cosine schedule with warmup": yes(),
    "polynomial schedule": yes(),
    "constant learning rate with warmup": yes(),
    "a learning rate that falls on a plateau": yes(),
    "Adafactor": yes(),
    "SGD with momentum": yes(),
    "weight decay, without gradient clipping": yes(),
    "bf16": yes(),
    "gradient checkpointing": yes(),
    "counting input tokens": yes(),
    "auto_find_batch_size": yes(),
    "split_batches": yes(),
    "remove_unused_columns=False": yes(),
    "an order drawn from global states, resumed in the first epoch": yes(),
    "an order drawn from global states, resumed in the second epoch": no("order"),
    "samples grouped by length, resumed in the first epoch": yes(),
    "samples grouped by length, resumed in the second epoch": no("order"),
    "save_only_model": no("save_only_model"),
    "ignore_data_skip, resumed within an epoch": no("ignore_data_skip"),
    "ignore_data_skip, resumed from an epoch's last step": yes(),
    "two processes": yes(),
    "two processes with gradient accumulation": yes(),
    # Trainer: models and data.
    "a dataset of the hub": yes(),
    "a dataset of the hub in two loader processes": yes(),
    "a dataset of the hub in the format of torch": yes(),
    "a part of two lists joined": yes(),
    "frozen layers": yes(),
    "a causal language model with tied weights": yes(),
    "LoRA": yes(),
    "Seq2SeqTrainer": yes(),
    "padding to the longest of a batch": yes(),
    "batch norm": yes(),
    "an image model whose weights have other names in a checkpoint": no("names"),
    "a model of the user's own": yes(),
    "groups of parameters and a schedule of the user's own": yes(),
    # Trainer: streams.
    "a stream read once": yes(),
    "a stream read once, dispatched by the first process": yes(),
    "a stream of the hub": yes(),
    "a shuffled stream of the hub": yes(),
    "two streams of the hub, mixed": yes(),
    "a stream read twice, resumed in the first pass": yes(),
    "a stream read twice, resumed between the passes": yes(),
    "a stream read twice, resumed in the second pass": no("pass", fast=True),
    "a stream read three times, resumed late in the third pass": no("pass"),
    "a shuffled stream of the hub read twice, resumed in the second pass": no("pass"),
    "a stream that leaves samples out by chance": no("random"),
    # Trainer: data that draws random numbers.
    "augmentation that draws from torch": no("random", fast=True),
    "augmentation that draws from numpy": no("random"),
    "augmentation that draws from Python's random": no("random"),
    "augmentation, resumed from an epoch's last step": yes(),
    "augmentation in two loader processes": no("loader processes"),
    "augmentation by Python's random in two loader processes": no("loader processes"),
    "augmentation in persistent loader processes": no("loader processes"),
    "a dataset of the user's own": yes(),
    "a dataset of the user's own in two loader processes": yes(),
    "one sample in 48 is augmented, far from the resume": not_verified("random"),
    "one sample in 48 is augmented, in the next batch": no("random"),
    "one sample in 48 is augmented, in the batch after the next": not_verified("random"),
    "one sample in 48 is augmented, and was never fetched before": not_verified("Rarely"),
    "augmentation by a generator of the dataset's own": not_verified("OwnGenerator", fast=True),
    "augmentation by a transform with a generator of its own": not_verified("Transformed"),
    "augmentation by a generator of the module": not_verified("ModuleGenerator"),
    "a dataset that counts its reads": not_verified("Curriculum"),
    "a dataset that a callback tells the epoch": not_verified("Epochs"),
    "set_transform with a random transform": no("random"),
    "set_transform without chance": yes(),
    "masked language modeling": no("random", fast=True),
    "masked language modeling, resumed from an epoch's last step": yes(),
    "masks of whole words": no("random"),
    "a collator that drops words at random": no("random"),
    "a collator of the user's own, without chance": yes(),
    "a collator that counts its calls": not_verified("CountingCollator"),
    # Trainer: callbacks.
    "a callback with nothing but settings": yes(fast=True),
    "a callback that draws random numbers when something is logged": yes(),
    "a callback that adds noise to gradients": yes(),
    "a callback that exports its state, restored": yes(),
    "a callback that exports its state, not restored": no("Decay"),
    "early stopping, restored": yes(),
    "early stopping, not restored": no("EarlyStoppingCallback", fast=True),
    "early stopping, not restored, while each evaluation is better": yes(),
    "a callback that keeps a mean of the weights": not_verified("Mean", fast=True),
    "a callback that lowers the learning rate after some calls": not_verified("Countdown"),
    "a callback that collects losses": not_verified("Losses"),
    "a callback that draws random numbers after a save": no("random"),
    "a callback that draws random numbers as an epoch begins, resumed within an epoch": yes(),
    "a callback that draws random numbers as an epoch begins, resumed from an epoch's last step": not_verified(
        "DrawsAtEpoch"
    ),
    # Trainer: losses, models and subclasses with state.
    "a loss function of the user's own": yes(),
    "a loss whose own weights are trained": no("optimizer", fast=True),
    "a loss that keeps a running mean": not_verified("RunningLoss"),
    "a buffer that changes and is not persistent": not_verified("mean"),
    "a buffer that is not persistent, and constant": yes(),
    "a model that counts its calls": not_verified("calls"),
    "a model that draws from a generator of its own": not_verified("generator"),
    "a subclass that overrides compute_loss": not_verified("OwnLoss", fast=True),
    "a subclass that keeps batches": not_verified("Replay"),
    # Trainer: state that hides.
    "augmentation by a generator of the dataset's own in two loader processes": not_verified(
        "loader processes"
    ),
    "augmentation by a generator of the dataset's own in two loader processes, resumed from an epoch's last step": yes(),
    "a dataset that counts its reads in two loader processes": not_verified("'reads'"),
    "augmentation by a helper function": not_verified("CHANCE"),
    "augmentation by an object of the module": not_verified("SHIFT"),
    "augmentation of a part of a dataset": not_verified("GENERATOR"),
    "augmentation by an iterator": not_verified("factors"),
    "augmentation that seeds Python's random by the sample": not_verified("seeds"),
    "augmentation that seeds Python's random by the sample, in two loader processes": not_verified("seeds"),
    "a model that draws from a generator of Python": not_verified("chance"),
    "a model that keeps a window of values": not_verified("means"),
    "a model that draws from a generator of its module": not_verified("NOISE"),
    "a hook that draws from a generator": not_verified("hook"),
    "a loss that is a method of an object that counts": not_verified("calls"),
    "an optimizer that counts its steps": not_verified("Decaying"),
    "a callback that updates an average of its module": not_verified("Averages"),
    "a callback that ends epochs early": no("epoch"),
    "a callback that draws random numbers when an epoch's end is logged": not_verified("DrawsAtLog"),
    "a callback that unfreezes layers in the second epoch": not_verified("embeddings"),
    "two processes with an order from a generator, resumed from an epoch's last step": no("generator"),
    "two processes with batches balanced by length, resumed in the second epoch": yes(),
    "batches balanced by length, resumed in the second epoch": yes(),
    "a stream saved at the end of each pass": yes(),
    "a stream evaluated and saved at the end of each pass": no("evaluates"),
    "a stream that leaves samples out by chance, in two loader processes": not_verified("loader processes"),
    # TrainLoop.
    "loop": yes(fast=True),
    "loop, resumed from an epoch's end": yes(),
    "loop with a shuffle by a generator": yes(),
    "loop with accelerator.accumulate": yes(fast=True),
    "loop with accelerator.accumulate and a short last step": yes(),
    "loop in bf16": yes(),
    "loop with a seedable sampler": yes(),
    "loop with augmentation": yes(),
    "loop with two loader processes": yes(),
    "loop with persistent loader processes": yes(),
    "loop with augmentation in two loader processes": no("loader processes"),
    "loop with a stateful loader": yes(),
    "loop with a stateful loader and a prepared loader for evaluation": yes(fast=True),
    "loop over a stream, in its second pass": yes(),
    "loop over a stream that counts its passes, in its second pass": not_verified("Stream"),
    "loop with accumulation by hand at 0, 2, 4 of enumerate": no("batch_index"),
    "loop with accumulation by hand at 1, 3, 5 of enumerate": yes(),
    "loop with accumulation by hand and the loop's number of the batch": yes(fast=True),
    "loop with a mean of the weights in a variable": not_verified("Mean", fast=True),
    "loop with a mean of the weights that is registered": yes(),
    "loop with an optimizer that is not prepared": not_verified("optimizer"),
    "loop with a schedule that is not prepared": not_verified("schedule"),
    "loop with two models and two optimizers": yes(),
    "loop with a counter in a variable that anneals a term of the loss": not_verified("calls"),
    "loop that sums its losses for a printout": yes(),
    # TrainLoop: state that hides.
    "loop with a generator of the dataset's own in two loader processes": not_verified("loader processes"),
    "loop with a generator of the dataset's own in two loader processes, resumed from an epoch's end": yes(),
    "loop over a dataset whose state_dict is not asked for": not_verified("Unasked"),
    "loop over a stream with noise in two loader processes": yes(),
    "loop with a buffer that changes and is not persistent": not_verified("mean"),
    "loop with a model that counts its calls": not_verified("Annealed"),
    "loop with an evaluation in persistent processes": yes(),
    "loop with an evaluation in persistent processes that is not prepared": yes(),
    "loop in a class": yes(),
    "loop in a class whose method counts": not_verified("self.calls"),
    "loop with a generator in a variable": not_verified("chance"),
    "loop with a second loader that is never begun again": not_verified("others"),
    "loop with a memory of batches": not_verified("last"),
    "loop with an average that only a helper function knows": not_verified("MEANS"),
    "loop with a factor that falls": not_verified("weight"),
    "loop that unfreezes a layer at a step": not_verified("weights"),
    "loop with LoRA": yes(),
    "loop with LoRA and a head that is trained beside it": no("classifier"),
    "loop with a collator that knows the model": yes(),
    # The functions.
    "functions, with everything in the folder": not_verified("script decides"),
    "functions, without the random states": not_verified("script decides"),
}
