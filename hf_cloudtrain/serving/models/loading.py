"""Loads the files of a model into a pipeline, and refuses what would answer at random."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

from hf_cloudtrain.errors import ConfigurationError, MissingExtraError
from hf_cloudtrain.serving.models.predictor import Predictor, RowError
from hf_cloudtrain.serving.models.source import ADAPTER, Model
from hf_cloudtrain.serving.models.tasks import Task, checked_parameters
from hf_cloudtrain.serving.models.untrusted import check_config, no_pickles


def load(model: Model) -> Predictor:
    """Load a model, and answer one row with it.

    Raises:
        ConfigurationError: the model cannot be loaded, or does not fit its task; the message says why.
    """
    import torch
    import transformers

    assert model.task is not None
    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]  # it has no types
    task = model.task
    network = _network(model)
    pieces: dict[str, Any] = {}
    source = model.processor or str(model.folder)
    kind, keyword = (
        ("AutoImageProcessor", "image_processor") if task.reads_images else ("AutoTokenizer", "tokenizer")
    )
    pieces[keyword] = _loaded(
        model,
        f"its {keyword.replace('_', ' ')} {source!r}",
        lambda: getattr(transformers, kind).from_pretrained(source, trust_remote_code=False),
    )
    rows = getattr(network.config, "vocab_size", None)
    if not task.reads_images and isinstance(rows, int) and len(pieces["tokenizer"]) > rows:
        raise ConfigurationError(
            f"{model.title} has embeddings for {rows} tokens, and its tokenizer ({source!r}) has {len(pieces['tokenizer'])}. "
            "Pass the tokenizer of the training: --processor FOLDER_OR_NAME"
        )
    if task.name == "text-classification":
        from hf_cloudtrain.serving.models.batched import TextClassification

        pieces["pipeline_class"] = TextClassification
    make: Any = transformers.pipeline  # its overloads want a literal for the task
    pipeline = _loaded(model, "its pipeline", lambda: make(task.name, model=network.eval(), **pieces))
    predictor = Predictor(pipeline, task)
    with torch.inference_mode():
        (answer,) = predictor.answers(
            [_sample(task, pieces)],
            checked_parameters(task, {"max_new_tokens": 1} if task.name == "text-generation" else None),
        )
    if isinstance(answer, RowError):
        raise ConfigurationError(f"{model.title} does not fit the task {task.name}: {answer.text}")
    return predictor


def _network(model: Model) -> Any:
    """The model, or its base with the adapter merged into it; in evaluation mode, with no weight left to chance."""
    import transformers
    from transformers.utils.peft_utils import find_adapter_config_file

    assert model.task is not None
    source = model.base or str(model.folder)
    kind = getattr(transformers, model.task.model_class)
    given: dict[str, Any] = {"use_safetensors": True, "trust_remote_code": False}
    if model.base is not None:
        given.update(_head_of_adapter(model))
    what = f"its base model {source!r}" if model.base else "its weights"
    if _loaded(model, what, lambda: find_adapter_config_file(source)) is not None:
        raise ConfigurationError(
            f"{model.title}: {what} cannot be loaded, because it is an adapter itself ({ADAPTER}). Merge it into its own base "
            "model (merge_and_unload), and pass the result: --base FOLDER_OR_NAME"
        )
    _check_config(model, source, what)
    network, info = _loaded(
        model, what, lambda: kind.from_pretrained(source, output_loading_info=True, **given)
    )
    if model.base is not None:
        return _loaded(model, "its adapter", lambda: _with_adapter(network, model))
    # Embeddings are read before the pooler, which many encoders are saved without.
    unused = "pooler." if model.task.name == "feature-extraction" else None
    missing = sorted(key for key in info["missing_keys"] if unused is None or unused not in key)
    if missing:
        raise ConfigurationError(
            f"{model.title} lacks weights of a {type(network).__name__}, such as {missing[0]!r}, so its answers would be random. "
            "Choose the checkpoint of a training for this task."
        )
    return network


def _with_adapter(network: Any, model: Model) -> Any:
    try:
        import peft
    except ImportError:
        raise MissingExtraError("peft is not installed, which an adapter needs: pip install peft") from None
    adapted = peft.PeftModel.from_pretrained(network, str(model.folder))
    return adapted.merge_and_unload()


def _head_of_adapter(model: Model) -> dict[str, Any]:
    """How to load the base model so that the classifier of the adapter fits; the base may have been saved with a different one."""
    from safetensors import safe_open
    from transformers import AutoConfig

    if (model.folder / "config.json").is_file():  # written by TrainLoop
        _check_config(model, str(model.folder), "its config.json")
        config = _loaded(
            model,
            "its config.json",
            lambda: AutoConfig.from_pretrained(str(model.folder), trust_remote_code=False),
        )
        return {"config": config, "ignore_mismatched_sizes": True}
    with safe_open(str(model.folder / "adapter_model.safetensors"), framework="pt") as file:
        shapes = [
            file.get_slice(name).get_shape()
            for name in file.keys()  # noqa: SIM118 - not a dict
            if name.endswith((".classifier.weight", ".score.weight", ".classifier.out_proj.weight"))
        ]
    return {"num_labels": shapes[0][0], "ignore_mismatched_sizes": True} if shapes else {}


def _check_config(model: Model, source: str, what: str) -> None:
    from transformers import PreTrainedConfig

    config, _ = _loaded(model, what, lambda: PreTrainedConfig.get_config_dict(source))
    check_config(config, model.title)


def _loaded(model: Model, what: str, read: Callable[[], Any]) -> Any:
    try:
        with no_pickles():
            return read()
    except ConfigurationError:
        raise
    except Exception as error:  # noqa: BLE001 - libraries raise all kinds for a damaged or foreign file
        text = " ".join(str(error).split())[:500]
        raise ConfigurationError(
            f"{model.title}: {what} cannot be loaded. {type(error).__name__}: {text}"
        ) from None


def _sample(task: Task, pieces: dict[str, Any]) -> Any:
    if task.reads_images:
        from PIL import Image

        held = io.BytesIO()
        Image.new("RGB", (32, 32)).save(held, "PNG")
        return held.getvalue()
    return f"a {pieces['tokenizer'].mask_token}" if task.name == "fill-mask" else "a"
