"""Which models are served, and what a client may set."""

from __future__ import annotations

from typing import Any

import pytest

from hf_cloudtrain.errors import ConfigurationError
from hf_cloudtrain.serving.tasks import (
    InputError,
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
        ConfigurationError, match=r"'text-clasification' must be one of.*'text-classification'"
    ):
        task_named("text-clasification")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"topk": 2}, "Unknown parameter \"topk\". The nearest is 'top_k'"),
        ({"batch_size": 2}, "Those of text-classification are: function_to_apply, top_k"),
        ({"top_k": "2"}, "'top_k' must be of type int"),
        ({"top_k": True}, "'top_k' must be of type int, not true"),
        ({"top_k": -1}, "between 0 and 10000"),
        ([1], "must be a JSON object"),
        (
            {"function_to_apply": "relu"},
            "'function_to_apply' must be one of: sigmoid, softmax, none; it is \"relu\"",
        ),
    ],
)
def test_a_parameter_that_is_not_allowed_is_refused(given: Any, message: str) -> None:
    with pytest.raises(InputError, match=message.replace("(", "\\(")):
        checked_parameters(task_named("text-classification"), given)


@pytest.mark.parametrize("word", ["softmax", "NONE"])
def test_words_that_transformers_knows_are_allowed(word: str) -> None:
    given = {"function_to_apply": word}
    assert checked_parameters(task_named("text-classification"), given)["function_to_apply"] == word
    with pytest.raises(InputError, match="must be one of: none, simple"):
        checked_parameters(task_named("token-classification"), {"aggregation_strategy": word + "x"})


def test_no_client_asks_for_answers_without_end() -> None:
    task = task_named("text-generation")
    with pytest.raises(InputError, match="between 0 and 1024, not 100000"):
        checked_parameters(task, {"max_new_tokens": 100_000})
    assert checked_parameters(task, {"temperature": 1, "do_sample": True})["temperature"] == 1
