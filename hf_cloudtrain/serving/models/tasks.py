"""The tasks that are served, by the architecture of a model, and the parameters that a client may set."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from hf_cloudtrain.errors import ConfigurationError

if TYPE_CHECKING:
    from pydantic import BaseModel


class RequestError(ValueError):
    """A request, or a row of one, that is not answered; the message says why.

    Args:
        status: of HTTP.
    """

    def __init__(self, text: str, status: int = 400) -> None:
        super().__init__(text)
        self.status = status


@dataclass(frozen=True)
class Task:
    """A task of transformers' `pipeline`."""

    name: str
    endings: tuple[str, ...]
    """How the names of its architectures end."""
    model_class: str
    peft_type: str | None
    """Its name in the record of an adapter."""
    parameters: tuple[str, ...] = ()
    """What a client may set, see `_limits`."""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    batches: bool = True
    """Whether rows may share a batch. A pipeline that returns the padding's features, or needs it on the left, takes one at a time."""
    reads_images: bool = False


TASKS = (
    Task(
        "text-classification",
        ("ForSequenceClassification",),
        "AutoModelForSequenceClassification",
        "SEQ_CLS",
        ("top_k", "function_to_apply"),
        {"truncation": True},
    ),
    Task(
        "token-classification",
        ("ForTokenClassification",),
        "AutoModelForTokenClassification",
        "TOKEN_CLS",
        ("aggregation_strategy",),
    ),
    Task(
        "image-classification",
        ("ForImageClassification",),
        "AutoModelForImageClassification",
        None,
        ("top_k", "function_to_apply"),
        reads_images=True,
    ),
    Task(
        "fill-mask",
        ("ForMaskedLM",),
        "AutoModelForMaskedLM",
        None,
        ("top_k",),
        {"tokenizer_kwargs": {"truncation": True}},
    ),
    Task(
        "text-generation",
        ("ForCausalLM", "LMHeadModel"),
        "AutoModelForCausalLM",
        "CAUSAL_LM",
        (
            *("max_new_tokens", "do_sample", "temperature", "top_k", "top_p", "repetition_penalty"),
            "return_full_text",
        ),
        {"max_new_tokens": 64},
        batches=False,
    ),
    Task(
        "feature-extraction",
        ("Model",),
        "AutoModel",
        "FEATURE_EXTRACTION",
        defaults={"truncation": True},
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
    known = ", ".join(task.name for task in TASKS)
    raise ConfigurationError(f"--task {name[:50]!r} must be one of: {known}.")


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


@functools.cache
def _limits() -> type[BaseModel]:
    """What clients may set. A function, because most processes need no pydantic, and importing it takes time."""
    from pydantic import BaseModel, ConfigDict, Field

    class Parameters(BaseModel):
        """The limits in which transformers computes. Everything else that a pipeline takes stays the server's."""

        model_config = ConfigDict(strict=True)

        top_k: int = Field(1, ge=1, le=10_000)
        function_to_apply: Literal["sigmoid", "softmax", "none"] = "none"
        aggregation_strategy: Literal["none", "simple", "first", "average", "max"] = "none"
        max_new_tokens: int = Field(1, ge=1, le=1024)
        do_sample: bool = False
        temperature: float = Field(1.0, ge=0.01, le=100)
        top_p: float = Field(1.0, gt=0, le=1)
        repetition_penalty: float = Field(1.0, ge=0.1, le=10)
        return_full_text: bool = True

    return Parameters


def checked_parameters(task: Task, given: object) -> dict[str, Any]:
    """The parameters of a request, over the defaults of the task.

    Raises:
        RequestError: a name, a type or a value that is not allowed.
    """
    if given is None:
        return dict(task.defaults)
    if not isinstance(given, dict):
        raise RequestError(f"'parameters' must be a JSON object, not {short(given)}.")
    for name in given:
        if name not in task.parameters:
            known = ", ".join(task.parameters) or "none"
            raise RequestError(f"Unknown parameter {short(name)}. Those of {task.name} are: {known}.")
    from pydantic import ValidationError

    try:
        found = _limits().model_validate(given)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        text = f"Parameter {first['loc'][0]!r}: {first['msg']}, not {short(first['input'])}."
        raise RequestError(text) from None
    return {**task.defaults, **found.model_dump(exclude_unset=True)}


def short(value: object) -> str:
    """A value for messages."""
    return json.dumps(value, default=repr)[:100]
