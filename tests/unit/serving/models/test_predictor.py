"""Loaded models: one answer or one error a row, and no model that answers at random."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import Any

import pytest

from hf_cloudtrain.errors import ConfigurationError
from hf_cloudtrain.serving.models.loading import load
from hf_cloudtrain.serving.models.predictor import Predictor, RowError
from hf_cloudtrain.serving.models.source import Wish, model_of_folder
from tests import tiny_models


def folder(tmp_path: Path, kind: str, **changes: Any) -> Path:
    """A model's folder.

    Args:
        changes: of its config.json.
    """
    files = tiny_models.files(kind)
    target = tmp_path / kind
    target.mkdir()
    for name, data in files.items():
        (target / name).write_bytes(data)
    config = json.loads(files["config.json"])
    (target / "config.json").write_text(json.dumps({**config, **changes}))
    return target


def loaded(tmp_path: Path, kind: str, **changes: Any) -> Predictor:
    return load(model_of_folder(folder(tmp_path, kind, **changes), Wish()))


def answers(predictor: Predictor, *rows: Any, **parameters: Any) -> list[Any]:
    found = predictor.answers(rows, predictor.parameters(parameters))
    json.dumps([row for row in found if not isinstance(row, RowError)], allow_nan=False)
    return found


def near(answer: dict[str, Any] | list[dict[str, Any]], expected: Any) -> bool:
    """Whether labels are equal and scores almost: a batch adds in a different order."""
    if isinstance(answer, list):
        return len(answer) == len(expected) and all(map(near, answer, expected))
    return bool(answer["label"] == expected["label"] and abs(answer["score"] - expected["score"]) < 1e-6)


def png(color: str = "red", size: int = 9) -> bytes:
    from PIL import Image

    held = io.BytesIO()
    Image.new("RGB", (size, size), color).save(held, "PNG")
    return held.getvalue()


class TestText:
    def test_each_row_has_a_label_and_a_score(self, tmp_path: Path) -> None:
        predictor = loaded(tmp_path, "BertForSequenceClassification")
        many = answers(predictor, "a good film", "bad", {"text": "a", "text_pair": "film"}, "")
        assert [set(row) for row in many] == [{"label", "score"}] * 4
        assert all(row["label"] in tiny_models.LABELS for row in many)
        assert answers(predictor, "bad")[0]["label"] == many[1]["label"]
        assert answers(predictor, "bad")[0]["score"] == pytest.approx(many[1]["score"], abs=1e-6)

    def test_a_batch_has_the_answers_of_transformers_own_pipeline(self, tmp_path: Path) -> None:
        from transformers import pipeline

        make: Any = pipeline
        own = make("text-classification", model=str(folder(tmp_path, "BertForSequenceClassification")))
        predictor = load(model_of_folder(tmp_path / "BertForSequenceClassification", Wish()))
        rows = [
            "a good film",
            {"text": "a", "text_pair": "bad film"},
            "bad",
            {"text": "it was good", "text_pair": "a film"},
        ]
        for parameters in ({}, {"top_k": 2}, {"function_to_apply": "sigmoid"}):
            found = answers(predictor, *rows, **parameters)
            for row, answer in zip(rows, found, strict=True):
                expected = own(row, **parameters)
                expected = (
                    expected[0] if isinstance(expected, list) and "top_k" not in parameters else expected
                )
                assert near(answer, expected)

    def test_a_model_without_padding_takes_one_row_at_a_time(self, tmp_path: Path) -> None:
        target = folder(tmp_path, "BertForSequenceClassification")
        tokenizer = tiny_models.tokenizer()
        tokenizer.pad_token = None
        tokenizer.save_pretrained(target)
        predictor = load(model_of_folder(target, Wish()))
        assert [set(row) for row in answers(predictor, "good", "a bad film")] == [{"label", "score"}] * 2

    def test_a_bad_row_does_not_fail_the_others(self, tmp_path: Path) -> None:
        predictor = loaded(tmp_path, "BertForSequenceClassification")
        rows = ["good", 7, None, "\ud800", {"txt": "a"}, {"text": 1}, ["a"], "bad"]
        found = answers(predictor, *rows)
        assert [isinstance(row, RowError) for row in found] == [False, *[True] * 6, False]
        assert all(row.is_input for row in found[1:-1])
        assert found[1].text == "An input must be a text, not 7."

    def test_a_row_that_fails_in_the_model_does_not_fail_the_others(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        predictor = loaded(tmp_path, "BertForSequenceClassification")
        preprocess = predictor._pipeline.preprocess

        def fails(texts: list[str], **more: Any) -> Any:
            if "film" in texts:
                raise RuntimeError("odd word")
            return preprocess(texts, **more)

        monkeypatch.setattr(predictor._pipeline, "preprocess", fails)
        found = answers(predictor, *["good"] * 9, "film", *["bad"] * 6)
        assert [index for index, row in enumerate(found) if isinstance(row, RowError)] == [9]
        assert found[9] == RowError("RuntimeError: odd word", is_input=False)

    def test_a_long_text_is_cut_to_the_length_of_the_model(self, tmp_path: Path) -> None:
        predictor = loaded(tmp_path, "BertForSequenceClassification")
        assert "label" in answers(predictor, "good " * 100_000)[0]

    def test_a_tokenizer_without_a_limit_has_that_of_the_model(self, tmp_path: Path) -> None:
        target = folder(tmp_path, "BertForSequenceClassification")
        settings = json.loads((target / "tokenizer_config.json").read_text())
        del settings["model_max_length"]
        (target / "tokenizer_config.json").write_text(json.dumps(settings))
        assert "label" in answers(load(model_of_folder(target, Wish())), "good " * 100)[0]

    def test_parameters(self, tmp_path: Path) -> None:
        (three,) = answers(loaded(tmp_path, "BertForSequenceClassification"), "good", top_k=3)
        assert {row["label"] for row in three} == set(tiny_models.LABELS)


class TestOtherTasks:
    def test_tokens(self, tmp_path: Path) -> None:
        predictor = loaded(tmp_path, "BertForTokenClassification")
        alone, *_ = found = answers(predictor, "good film", "it was a bad film")
        assert [token["word"] for token in found[1]] == "it was a bad film".split()
        assert [token["entity"] for token in answers(predictor, "good film")[0]] == [
            token["entity"] for token in alone
        ]

    @pytest.mark.parametrize("rows", [["a [MASK] film"], ["a [MASK] film", "it was [MASK]"]])
    def test_masks(self, tmp_path: Path, rows: list[str]) -> None:
        found = answers(loaded(tmp_path, "BertForMaskedLM"), *rows, top_k=2)
        assert [[set(guess) >= {"token_str", "score"} for guess in row] for row in found] == [
            [True] * 2
        ] * len(rows)

    def test_a_text_without_a_mask_fails_alone(self, tmp_path: Path) -> None:
        found = answers(loaded(tmp_path, "BertForMaskedLM"), "a film", "a [MASK] film")
        assert found[0] == RowError("The text must have the mask '[MASK]'.", is_input=True)
        assert len(found[1]) == 5

    def test_a_row_that_the_tokenizer_cannot_read_fails_alone(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        predictor = loaded(tmp_path, "BertForMaskedLM")
        prepared = predictor._prepared

        def fail(row: Any, parameters: dict[str, Any]) -> Any:
            return prepared(row, parameters) if row != "bad" else {}["bad"]

        monkeypatch.setattr(predictor, "_prepared", fail)
        found = answers(predictor, "bad", "a [MASK] film")
        assert found[0] == RowError("KeyError: 'bad'", is_input=False)
        assert len(found[1]) == 5

    def test_no_more_guesses_than_words(self, tmp_path: Path) -> None:
        predictor = loaded(tmp_path, "BertForMaskedLM")
        assert len(answers(predictor, "a [MASK] film", top_k=10_000)[0]) == predictor._config.vocab_size

    def test_generation(self, tmp_path: Path) -> None:
        predictor = loaded(tmp_path, "GPT2LMHeadModel")
        found = answers(predictor, "a good", "the", max_new_tokens=3)
        texts = [row[0]["generated_text"] for row in found]
        hottest = {
            "do_sample": True,
            "temperature": 100,
            "top_p": 1,
            "top_k": 10_000,
            "repetition_penalty": 10,
        }
        coldest = {
            "do_sample": True,
            "temperature": 0.01,
            "top_p": 1e-9,
            "top_k": 1,
            "repetition_penalty": 0.1,
        }
        for extreme in (hottest, coldest):
            assert not isinstance(answers(predictor, "a good", max_new_tokens=3, **extreme)[0], RowError)
        assert [texts[0].startswith("a good"), texts[1].startswith("the")] == [True, True]
        long, empty = answers(predictor, "good " * 30, "", max_new_tokens=3)
        assert "with max_new_tokens=3 it must have between 1 and 30" in long.text
        assert empty.is_input

    def test_embeddings_do_not_depend_on_the_other_rows(self, tmp_path: Path) -> None:
        predictor = loaded(tmp_path, "BertModel")
        short, long = answers(predictor, "good", "it was a good film")
        assert [len(short[0]), len(long[0])] == [3, 7]
        assert answers(predictor, "good")[0] == short

    def test_images(self, tmp_path: Path) -> None:
        predictor = loaded(tmp_path, "ViTForImageClassification")
        text = base64.b64encode(png()).decode()
        found = answers(predictor, text, png(), f"data:image/png;base64,{text}", png("blue", 20))
        assert found[0] == found[1] == found[2]
        assert {label["label"] for label in found[3]} == set(tiny_models.LABELS)

    def test_no_program_is_run_for_an_image(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Pillow gives EPS to Ghostscript."""
        from PIL import EpsImagePlugin, Image

        ran: list[object] = []
        monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *given: ran.append(given) or png_of_pillow)
        png_of_pillow = Image.new("RGB", (9, 9)).im
        eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n"
        (error,) = answers(loaded(tmp_path, "ViTForImageClassification"), eps)
        assert isinstance(error, RowError)
        assert error.is_input
        assert not ran

    def test_no_image_is_read_from_a_path_or_a_url(self, tmp_path: Path) -> None:
        file = tmp_path / "a.png"
        file.write_bytes(png())
        predictor = loaded(tmp_path, "ViTForImageClassification")
        for row in (str(file), f"file://{file}", "http://127.0.0.1:1/a.png", b"GIF89a", "AAAA", 7):
            (error,) = answers(predictor, row)
            assert isinstance(error, RowError), row
            assert error.is_input


class TestNotLoaded:
    def test_weights_that_are_missing_are_not_left_to_chance(self, tmp_path: Path) -> None:
        target = folder(tmp_path, "BertForMaskedLM", architectures=["BertForSequenceClassification"])
        with pytest.raises(
            ConfigurationError, match=r"lacks weights of a BertForSequenceClassification.*random"
        ):
            load(model_of_folder(target, Wish()))

    def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(self, tmp_path: Path) -> None:
        target = folder(tmp_path, "BertForSequenceClassification")
        tokenizer = tiny_models.tokenizer()
        tokenizer.add_tokens([f"new{number}" for number in range(20)])
        tokenizer.save_pretrained(target)
        with pytest.raises(ConfigurationError, match=r"embeddings for 20 tokens.* has 33.*--processor"):
            load(model_of_folder(target, Wish()))

    def test_a_task_that_the_model_does_not_fit(self, tmp_path: Path) -> None:
        target = folder(tmp_path, "GPT2LMHeadModel")
        with pytest.raises(ConfigurationError, match=r"cannot be loaded|does not fit|lacks weights"):
            load(model_of_folder(target, Wish(task="fill-mask")))

    def test_code_that_a_configuration_names_is_not_run(self, tmp_path: Path) -> None:
        code = {"AutoConfig": "own.Own", "AutoModelForSequenceClassification": "own.Own"}
        target = folder(tmp_path, "BertForSequenceClassification", model_type="own", auto_map=code)
        (target / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
        with pytest.raises(ConfigurationError, match="cannot be loaded"):
            load(model_of_folder(target, Wish()))
        assert not (tmp_path / "ran").exists()

    @pytest.mark.parametrize(
        "changes",
        [
            {"attn_implementation": "evil/kernel"},
            {"_attn_implementation": "evil/kernel:attention"},
            {"text_config": {"attn_implementation": "paged|evil/kernel"}},
            {"attn_implementation": {"": "eager", "text": "evil/kernel"}},
            {"experts_implementation": "evil/kernel"},
        ],
    )
    def test_a_kernel_that_a_configuration_names_is_not_loaded(
        self, tmp_path: Path, changes: dict[str, Any]
    ) -> None:
        target = folder(tmp_path, "BertForSequenceClassification", **changes)
        with pytest.raises(ConfigurationError, match=r"evil/kernel.*, which is code on the Hub"):
            load(model_of_folder(target, Wish()))

    def test_other_settings_of_attention_stay(self, tmp_path: Path) -> None:
        predictor = loaded(tmp_path, "BertForSequenceClassification", attn_implementation="eager")
        assert "label" in answers(predictor, "good")[0]

    def test_damaged_weights(self, tmp_path: Path) -> None:
        target = folder(tmp_path, "BertForSequenceClassification")
        (target / "model.safetensors").write_bytes(b"nonsense")
        with pytest.raises(ConfigurationError, match=r"its weights cannot be loaded\. Safetensor"):
            load(model_of_folder(target, Wish()))


class TestAdapter:
    def made(self, tmp_path: Path, **how: Any) -> tuple[Path, Any]:
        """An adapter with a classifier of five labels over a base model with three; and the adapted model."""
        import peft
        import torch
        from transformers import AutoModelForSequenceClassification

        base = folder(tmp_path, "BertForSequenceClassification")
        network = AutoModelForSequenceClassification.from_pretrained(
            base, num_labels=5, ignore_mismatched_sizes=True
        )
        config = peft.LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["value"], **how)
        adapted = peft.get_peft_model(network, config)
        with torch.no_grad():
            for name, weights in adapted.named_parameters():
                if "lora_B" in name:
                    weights.add_(1.0)
        adapted.save_pretrained(tmp_path / "adapter")
        return tmp_path / "adapter", adapted.eval()

    def test_is_merged_into_its_base_model(self, tmp_path: Path) -> None:
        import torch

        adapter, network = self.made(tmp_path)
        predictor = load(model_of_folder(adapter, Wish()))
        with torch.no_grad():
            expected = network(**tiny_models.tokenizer()("a good film", return_tensors="pt")).logits.softmax(
                -1
            )
        (found,) = answers(predictor, "a good film", top_k=5)
        by_label = {row["label"]: row["score"] for row in found}
        assert [by_label[f"LABEL_{n}"] for n in range(5)] == pytest.approx(expected[0].tolist(), abs=1e-5)

    def test_a_base_model_that_is_elsewhere_is_named_by_the_user(self, tmp_path: Path) -> None:
        adapter, _ = self.made(tmp_path)
        moved = (tmp_path / "BertForSequenceClassification").rename(tmp_path / "moved")
        with pytest.raises(ConfigurationError, match=r"its base model '.*' cannot be loaded"):
            load(model_of_folder(adapter, Wish()))
        assert "label" in answers(load(model_of_folder(adapter, Wish(base=str(moved)))), "good")[0]

    def test_a_base_model_that_is_an_adapter_itself_is_refused(self, tmp_path: Path) -> None:
        """transformers would load the model that its record names, which nothing has checked."""
        adapter, _ = self.made(tmp_path)
        record = json.dumps({"base_model_name_or_path": "evil/model", "peft_type": "LORA"})
        (tmp_path / "BertForSequenceClassification" / "adapter_config.json").write_text(record)
        with pytest.raises(
            ConfigurationError, match=r"its base model '.*' cannot be loaded, because it is an adapter"
        ):
            load(model_of_folder(adapter, Wish()))

    def test_a_base_model_with_pickled_shards_is_refused(self, tmp_path: Path) -> None:
        import torch
        from safetensors.torch import load_file

        adapter, _ = self.made(tmp_path)
        base = tmp_path / "BertForSequenceClassification"
        weights = load_file(base / "model.safetensors")
        (base / "model.safetensors").unlink()
        torch.save(weights, base / "shard.bin")
        index = {"metadata": {}, "weight_map": dict.fromkeys(weights, "shard.bin")}
        (base / "model.safetensors.index.json").write_text(json.dumps(index))
        with pytest.raises(ConfigurationError, match=r"its base model '.*' cannot be loaded"):
            load(model_of_folder(adapter, Wish()))

    def test_a_kernel_that_its_own_configuration_names_is_not_loaded(self, tmp_path: Path) -> None:
        adapter, network = self.made(tmp_path)
        settings = {**network.config.to_dict(), "attn_implementation": "evil/kernel"}
        (adapter / "config.json").write_text(json.dumps(settings))
        with pytest.raises(ConfigurationError, match="code on the Hub"):
            load(model_of_folder(adapter, Wish()))
