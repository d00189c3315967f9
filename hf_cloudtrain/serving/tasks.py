"""The tasks that are served, by the architecture of a model, and the parameters that a client may set."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from hf_cloudtrain.errors import ConfigurationError

MAX_NEW_TOKENS = 1024
"""Tokens that a client may ask for in one answer."""
CLIENTS_MAX = 10_000
"""Largest number that a client may set for any other parameter."""
CHOICES = {
    "function_to_apply": ("sigmoid", "softmax", "none"),
    "aggregation_strategy": ("none", "simple", "first", "average", "max"),
}
"""What a client may set where transformers knows only some words."""


class InputError(ValueError):
    """What a client sent cannot be answered; the message says why."""


@dataclass(frozen=True)
class Task:
    """A task of transformers' `pipeline`."""

    name: str
    endings: tuple[str, ...]
    """How the names of its architectures end."""
    model_class: str
    peft_type: str | None
    """Its name in the record of an adapter."""
    parameters: Mapping[str, type | tuple[type, ...]]
    """What a client may set, and of which type. Everything else that a pipeline takes stays the server's."""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    batches: bool = True
    """Whether rows may share a batch. A pipeline that returns the padding's features, or needs it on the left, takes one at a time."""
    reads_images: bool = False


_NUMBER = (int, float)
TASKS = (
    Task(
        "text-classification",
        ("ForSequenceClassification",),
        "AutoModelForSequenceClassification",
        "SEQ_CLS",
        {"top_k": int, "function_to_apply": str},
        {"truncation": True},
    ),
    Task(
        "token-classification",
        ("ForTokenClassification",),
        "AutoModelForTokenClassification",
        "TOKEN_CLS",
        {"aggregation_strategy": str},
    ),
    Task(
        "image-classification",
        ("ForImageClassification",),
        "AutoModelForImageClassification",
        None,
        {"top_k": int, "function_to_apply": str},
        reads_images=True,
    ),
    Task(
        "fill-mask",
        ("ForMaskedLM",),
        "AutoModelForMaskedLM",
        None,
        {"top_k": int},
        {"tokenizer_kwargs": {"truncation": True}},
    ),
    Task(
        "text-generation",
        ("ForCausalLM", "LMHeadModel"),
        "AutoModelForCausalLM",
        "CAUSAL_LM",
        {
            "max_new_tokens": int,
            "do_sample": bool,
            "temperature": _NUMBER,
            "top_k": int,
            "top_p": _NUMBER,
            "repetition_penalty": _NUMBER,
            "return_full_text": bool,
        },
        {"max_new_tokens": 64},
        batches=False,
    ),
    Task(
        "feature-extraction",
        ("Model",),
        "AutoModel",
        "FEATURE_EXTRACTION",
        {},
        {"truncation": True},
        batches=False,
    ),
)


def task_of(architecture: str, title: str) -> Task:
    """The task of a model by the name of its class. Raises ConfigurationError."""
    for task in TASKS:
        if architecture.endswith(task.endings):
            return task
    names = ", ".join(task.name for task in TASKS)
    raise ConfigurationError(
        f"{title} holds a {architecture!r}, which no task here fits ({names}). Add a code/inference.py with model_fn and "
        "predict_fn to the checkpoint, and pass --trust-code."
    )


def task_named(name: str) -> Task:
    """The task with a name. Raises ConfigurationError."""
    for task in TASKS:
        if task.name == name:
            return task
    known = [task.name for task in TASKS]
    near = difflib.get_close_matches(name, known, n=1)
    hint = f" The nearest is {near[0]!r}." if near else ""
    raise ConfigurationError(f"--task {name[:50]!r} must be one of: {', '.join(known)}.{hint}")


def adapter_task(peft_type: object, title: str) -> Task:
    """The task of an adapter by the `task_type` of its record. Raises ConfigurationError."""
    for task in TASKS:
        if task.peft_type is not None and task.peft_type == peft_type:
            return task
    known = ", ".join(task.peft_type for task in TASKS if task.peft_type)
    raise ConfigurationError(
        f"The adapter of {title} has the task type {peft_type!r}, which must be one of: {known}. Set task_type in the "
        "configuration of peft, or merge the adapter into its model (merge_and_unload) and save that by name."
    )


def checked_parameters(task: Task, given: object) -> dict[str, Any]:
    """The parameters of a request, over the defaults of the task.

    Raises:
        InputError: a name, a type or a number that is not allowed.
    """
    if given is None:
        return dict(task.defaults)
    if not isinstance(given, dict):
        raise InputError(f"'parameters' must be a JSON object, not {_short(given)}.")
    for name, value in given.items():
        if name not in task.parameters:
            near = difflib.get_close_matches(str(name), task.parameters, n=1)
            hint = f" The nearest is {near[0]!r}." if near else ""
            known = ", ".join(sorted(task.parameters)) or "none"
            raise InputError(f"Unknown parameter {_short(name)}.{hint} Those of {task.name} are: {known}.")
        kind = task.parameters[name]
        is_number = isinstance(value, bool) and kind is not bool
        if is_number or not isinstance(value, kind):
            kinds = kind if isinstance(kind, tuple) else (kind,)
            raise InputError(
                f"Parameter {name!r} must be of type {' or '.join(k.__name__ for k in kinds)}, not {_short(value)}."
            )
        words = CHOICES.get(name)
        if words is not None and str(value).lower() not in words:
            raise InputError(f"Parameter {name!r} must be one of: {', '.join(words)}; it is {_short(value)}.")
        most = MAX_NEW_TOKENS if name == "max_new_tokens" else CLIENTS_MAX
        if isinstance(value, (int, float)) and not 0 <= value <= most:
            raise InputError(f"Parameter {name!r} must be between 0 and {most}, not {_short(value)}.")
    return {**task.defaults, **given}


def _short(value: object) -> str:
    try:
        return json.dumps(value)[:100]
    except (TypeError, ValueError):
        return repr(value)[:100]
