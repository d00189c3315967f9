"""Which models are served, and what a client may set."""

from __future__ import annotations

from typing import Any

import pytest

from hf_cloudtrain.errors import ConfigurationError
from hf_cloudtrain.serving.models.tasks import (
    RequestError,
    adapter_task,
    checked_parameters,
    task_named,
    task_of,
)


@pytest.mark.parametrize(
    ("architecture", "name"),
    [
        ("BertForSequenceClassification", "text-classification"),
        ("RobertaForTokenClassification", "token-classification"),
        ("ViTForImageClassification", "image-classification"),
        ("ElectraForMaskedLM", "fill-mask"),
        ("LlamaForCausalLM", "text-generation"),
        ("GPT2LMHeadModel", "text-generation"),
        ("BertModel", "feature-extraction"),
    ],
)
def test_the_architecture_decides(architecture: str, name: str) -> None:
    assert task_of(architecture, "x").name == name


def test_what_is_not_served_is_refused_with_a_way_out() -> None:
    with pytest.raises(ConfigurationError, match=r"'BertForQuestionAnswering'.*--trust-code"):
        task_of("BertForQuestionAnswering", "checkpoint-5")
    with pytest.raises(ConfigurationError, match="task type 'QUESTION_ANS', which must be one of: SEQ_CLS"):
        adapter_task("QUESTION_ANS", "checkpoint-5")
    with pytest.raises(
        ConfigurationError, match="'text-clasification' must be one of: text-classification, token"
    ):
        task_named("text-clasification")


@pytest.mark.parametrize(
    ("task", "given", "message"),
    [
        (
            "text-classification",
            {"topk": 2},
            'Unknown parameter "topk". Those of text-classification are: top_k, func',
        ),
        ("text-classification", {"top_k": "2"}, "'top_k': Input should be a valid integer, not \"2\""),
        ("text-classification", {"top_k": True}, "'top_k': Input should be a valid integer, not true"),
        ("text-classification", {"top_k": None}, "not null"),
        ("text-classification", {"top_k": 0}, "greater than or equal to 1, not 0"),
        ("text-classification", [1], "must be a JSON object, not [1]"),
        (
            "text-classification",
            {"function_to_apply": "relu"},
            "'sigmoid', 'softmax' or 'none', not \"relu\"",
        ),
        ("token-classification", {"aggregation_strategy": "softmax"}, "'simple'"),
        ("feature-extraction", {"top_k": 1}, "Those of feature-extraction are: none"),
        (
            "text-generation",
            {"temperature": 0},
            "'temperature': Input should be greater than or equal to 0.01, not 0",
        ),
        ("text-generation", {"temperature": float("nan")}, "'temperature'"),
        ("text-generation", {"top_p": 5}, "'top_p': Input should be less than or equal to 1, not 5"),
        ("text-generation", {"repetition_penalty": 0.0}, "greater than or equal to 0.1"),
        ("text-generation", {"max_new_tokens": 0}, "greater than or equal to 1"),
        ("text-generation", {"max_new_tokens": 100_000}, "less than or equal to 1024, not 100000"),
    ],
)
def test_a_parameter_that_is_not_allowed_is_refused(task: str, given: Any, message: str) -> None:
    with pytest.raises(RequestError) as caught:
        checked_parameters(task_named(task), given)
    assert message in str(caught.value)
    assert caught.value.status == 400


def test_what_is_not_given_stays_the_default_of_the_task() -> None:
    task = task_named("text-generation")
    assert checked_parameters(task, None) == checked_parameters(task, {}) == {"max_new_tokens": 64}
    found = checked_parameters(task, {"temperature": 1, "do_sample": True})
    assert found == {"max_new_tokens": 64, "temperature": 1.0, "do_sample": True}
    assert isinstance(found["temperature"], float)  # transformers refuses the number 1
