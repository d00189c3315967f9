"""Trainers of other libraries on tiny random models: one attempt each, in the environment of `make test-trainers`.

    python -m tests.trainers._trainers FOLDER [NAME ...]      trains uninterrupted; then killed, and resumed in an empty folder

It prints a JSON object for each: the difference of the weights, and what the manifest says.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")

import torch
import transformers
from datasets import Dataset
from transformers import (
    AutoTokenizer,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from hf_cloudtrain import CloudTrainCallback
from hf_cloudtrain.checkpoints.catalog import Catalog
from hf_cloudtrain.checkpoints.exactness import Exactness
from hf_cloudtrain.integrations.trainer.known_trainers import class_name
from hf_cloudtrain.storage.client import Storage
from tests.trainers._models import sentences, write_models

SAVED, KILLED = 4, 6
"""The step whose checkpoint is resumed from, and the one in which the process is killed; seven steps are an epoch and a bit."""

Make = Callable[[str, Path], Trainer]
SETUPS: dict[str, Make] = {}


def setup(name: str) -> Callable[[Make], Make]:
    def register(make: Make) -> Make:
        SETUPS[name] = make
        return make

    return register


def common(folder: str, **changes: Any) -> dict[str, Any]:
    """Arguments that all trainers understand: dropout, shuffling, several epochs, a checkpoint in the middle of one."""
    return {
        "output_dir": folder,
        "num_train_epochs": 2,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "save_steps": SAVED,
        "logging_steps": 1,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "dataloader_pin_memory": False,
        **changes,
    }


def tokenizer_of(folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(folder)


# TRL


def preferences(count: int = 9) -> Dataset:
    return Dataset.from_dict(
        {
            "prompt": sentences(count),
            "chosen": [f" {text}" for text in sentences(count, seed=1)],
            "rejected": [f" {text}" for text in sentences(count, seed=2)],
        }
    )


@setup("trl SFTTrainer")
def sft(folder: str, where: Path) -> Trainer:
    from trl import SFTConfig, SFTTrainer

    args = SFTConfig(**common(folder), max_length=16)
    return SFTTrainer(
        model=LlamaForCausalLM.from_pretrained(where / "llama"),
        args=args,
        train_dataset=Dataset.from_dict({"text": sentences(9)}),
        processing_class=tokenizer_of(where / "llama"),
    )


@setup("trl DPOTrainer")
def dpo(folder: str, where: Path) -> Trainer:
    from trl import DPOConfig, DPOTrainer

    return DPOTrainer(
        model=LlamaForCausalLM.from_pretrained(where / "llama"),
        args=DPOConfig(**common(folder), max_length=24),
        train_dataset=preferences(),
        processing_class=tokenizer_of(where / "llama"),
    )


@setup("trl RewardTrainer")
def reward(folder: str, where: Path) -> Trainer:
    from trl import RewardConfig, RewardTrainer

    return RewardTrainer(
        model=LlamaForSequenceClassification.from_pretrained(where / "llama-reward", num_labels=1),
        args=RewardConfig(**common(folder), max_length=24),
        train_dataset=preferences().remove_columns("prompt"),
        processing_class=tokenizer_of(where / "llama-reward"),
    )


@setup("trl KTOTrainer")
def kto(folder: str, where: Path) -> Trainer:
    try:
        from trl import KTOConfig, KTOTrainer
    except ImportError:
        from trl.experimental.kto import KTOConfig, KTOTrainer

    rows = preferences(9)
    data = Dataset.from_dict(
        {
            "prompt": rows["prompt"],
            "completion": rows["chosen"],
            "label": [number % 2 == 0 for number in range(len(rows))],
        }
    )
    return KTOTrainer(
        model=LlamaForCausalLM.from_pretrained(where / "llama"),
        ref_model=LlamaForCausalLM.from_pretrained(where / "llama"),
        args=KTOConfig(**common(folder), max_length=24),
        train_dataset=data,
        processing_class=tokenizer_of(where / "llama"),
    )


def length_reward(completions: list[str], **_: Any) -> list[float]:
    return [float(sum(word.endswith("1") for word in text.split())) for text in completions]


def group(kind: str, folder: str, where: Path, prompts: int = 4, **changes: Any) -> Trainer:
    import trl

    config, trainer = getattr(trl, f"{kind}Config"), getattr(trl, f"{kind}Trainer")
    options = {"num_generations": 2, "max_completion_length": 6, "beta": 0.1, **changes}
    return trainer(
        model=LlamaForCausalLM.from_pretrained(where / "llama"),
        args=config(**common(folder), **options),
        reward_funcs=length_reward,
        train_dataset=Dataset.from_dict({"prompt": sentences(prompts)}),
        processing_class=tokenizer_of(where / "llama"),
    )


@setup("trl RLOOTrainer")
def rloo(folder: str, where: Path) -> Trainer:
    return group("RLOO", folder, where, prompts=9)


@setup("trl GRPOTrainer")
def grpo(folder: str, where: Path) -> Trainer:
    return group("GRPO", folder, where, prompts=9)


@setup("trl RLOOTrainer, after its first epoch")
def rloo_later(folder: str, where: Path) -> Trainer:
    return group("RLOO", folder, where)


@setup("trl GRPOTrainer, after its first epoch")
def grpo_later(folder: str, where: Path) -> Trainer:
    return group("GRPO", folder, where)


@setup("trl GRPOTrainer, num_iterations=3")
def grpo_iterations(folder: str, where: Path) -> Trainer:
    return group("GRPO", folder, where, num_iterations=3)


@setup("trl GRPOTrainer, steps_per_generation=3")
def grpo_steps(folder: str, where: Path) -> Trainer:
    return group("GRPO", folder, where, steps_per_generation=3)


@setup("trl GRPOTrainer, sync_ref_model=True")
def grpo_reference(folder: str, where: Path) -> Trainer:
    return group("GRPO", folder, where, sync_ref_model=True, ref_model_sync_steps=1)


@setup("trl RLOOTrainer, num_iterations=3")
def rloo_iterations(folder: str, where: Path) -> Trainer:
    return group("RLOO", folder, where, num_iterations=3)


# sentence-transformers


def pairs(count: int = 9) -> dict[str, list[str]]:
    return {"anchor": sentences(count), "positive": sentences(count, seed=1)}


def encoder(where: Path) -> Any:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers import models as parts

    bert = parts.Transformer(str(where / "bert"), max_seq_length=16)
    return SentenceTransformer(modules=[bert, parts.Pooling(16)], device="cpu")


def sentence(folder: str, where: Path, data: dict[str, Any], loss: str, **options: Any) -> Trainer:
    import sentence_transformers as st
    from sentence_transformers import losses

    model = encoder(where)
    return st.SentenceTransformerTrainer(
        model=model,
        args=st.SentenceTransformerTrainingArguments(**common(folder)),
        train_dataset=Dataset.from_dict(data),
        loss=getattr(losses, loss)(model, **options),
    )


@setup("sentence-transformers SentenceTransformerTrainer")
def sentence_pairs(folder: str, where: Path) -> Trainer:
    return sentence(folder, where, pairs(), "MultipleNegativesRankingLoss")


@setup("sentence-transformers SentenceTransformerTrainer, SoftmaxLoss")
def sentence_softmax(folder: str, where: Path) -> Trainer:
    data = {**pairs(), "label": [number % 3 for number in range(9)]}
    options = {"sentence_embedding_dimension": 16, "num_labels": 3}
    return sentence(folder, where, data, "SoftmaxLoss", **options)


@setup("sentence-transformers CrossEncoderTrainer")
def cross(folder: str, where: Path) -> Trainer:
    from sentence_transformers.cross_encoder import (
        CrossEncoder,
        CrossEncoderTrainer,
        CrossEncoderTrainingArguments,
        losses,
    )

    model = CrossEncoder(str(where / "bert-classifier"), num_labels=1, max_length=16, device="cpu")
    return CrossEncoderTrainer(
        model=model,
        args=CrossEncoderTrainingArguments(**common(folder)),
        train_dataset=Dataset.from_dict({**pairs(), "label": [float(number % 2) for number in range(9)]}),
        loss=losses.BinaryCrossEntropyLoss(model),
    )


@setup("sentence-transformers SparseEncoderTrainer")
def sparse(folder: str, where: Path) -> Trainer:
    from sentence_transformers.sparse_encoder import (
        SparseEncoder,
        SparseEncoderTrainer,
        SparseEncoderTrainingArguments,
        losses,
    )
    from sentence_transformers.sparse_encoder.models import MLMTransformer, SpladePooling

    mlm = MLMTransformer(str(where / "bert-mlm"), max_seq_length=16)
    model = SparseEncoder(modules=[mlm, SpladePooling(pooling_strategy="max")], device="cpu")
    loss = losses.SpladeLoss(
        model=model,
        loss=losses.SparseMultipleNegativesRankingLoss(model=model),
        query_regularizer_weight=5e-5,
        document_regularizer_weight=3e-5,
    )
    return SparseEncoderTrainer(
        model=model,
        args=SparseEncoderTrainingArguments(**common(folder)),
        train_dataset=Dataset.from_dict(pairs()),
        loss=loss,
    )


# peft, under Trainer


def adapter(folder: str, where: Path, config: Any) -> Trainer:
    import peft

    torch.manual_seed(3)
    model = peft.get_peft_model(LlamaForCausalLM.from_pretrained(where / "llama"), config)
    rows = tokenizer_of(where / "llama")(sentences(9))["input_ids"]
    data = [{"input_ids": torch.tensor(ids), "labels": torch.tensor(ids)} for ids in rows]
    return Trainer(model=model, args=TrainingArguments(**common(folder)), train_dataset=data)


def peft_config(kind: str, **options: Any) -> Callable[[], Any]:
    def make() -> Any:
        import peft

        return getattr(peft, kind)(task_type="CAUSAL_LM", **options)

    return make


TARGETS = {"target_modules": ["q_proj", "v_proj"]}
ADAPTERS: dict[str, Callable[[], Any]] = {
    "LoRA": peft_config("LoraConfig", r=4, lora_dropout=0.1, **TARGETS),
    "LoRA with modules_to_save": peft_config("LoraConfig", r=4, modules_to_save=["lm_head"], **TARGETS),
    "DoRA": peft_config("LoraConfig", r=4, use_dora=True, **TARGETS),
    "IA3": peft_config(
        "IA3Config", target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]
    ),
    "LoHa": peft_config("LoHaConfig", r=4, **TARGETS),
    "LoKr": peft_config("LoKrConfig", r=4, **TARGETS),
    "AdaLoRA": peft_config(
        "AdaLoraConfig", init_r=6, target_r=4, total_step=10, tinit=1, tfinal=2, **TARGETS
    ),
    "OFT": peft_config("OFTConfig", r=2, oft_block_size=0, **TARGETS),
    "VeRA": peft_config("VeraConfig", r=4, **TARGETS),
    "prompt tuning": peft_config("PromptTuningConfig", num_virtual_tokens=4),
    "prefix tuning": peft_config("PrefixTuningConfig", num_virtual_tokens=4),
    "P-tuning": peft_config("PromptEncoderConfig", num_virtual_tokens=4, encoder_hidden_size=16),
}
for _name, _make in ADAPTERS.items():

    def _adapted(folder: str, where: Path, make: Callable[[], Any] = _make) -> Trainer:
        return adapter(folder, where, make())

    SETUPS[f"peft {_name}"] = _adapted


@setup("trl SFTTrainer with LoRA")
def sft_lora(folder: str, where: Path) -> Trainer:
    from trl import SFTConfig, SFTTrainer

    return SFTTrainer(
        model=LlamaForCausalLM.from_pretrained(where / "llama"),
        args=SFTConfig(**common(folder), max_length=16),
        train_dataset=Dataset.from_dict({"text": sentences(9)}),
        processing_class=tokenizer_of(where / "llama"),
        peft_config=ADAPTERS["LoRA"](),
    )


class Kill(TrainerCallback):
    """SIGKILL in a step, when the checkpoint before is committed."""

    def __init__(self, url: str) -> None:
        self.url = url

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == KILLED:
            catalog, deadline = Catalog(Storage(self.url)), time.monotonic() + 60
            while not catalog.checkpoints():
                assert time.monotonic() < deadline, "no checkpoint was committed"
                time.sleep(0.01)
            os.kill(os.getpid(), 9)


def attempt(name: str, where: Path, folder: Path, url: str | None, *, kills: bool) -> int:
    """Train in a process of its own; returns its exit code."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    code = 1
    try:
        transformers.set_seed(0)
        trainer, checkpoint = SETUPS[name](str(folder), where), None
        if url is not None:
            cloud = CloudTrainCallback(url)
            trainer.add_callback(cloud)
            checkpoint = cloud.restore(trainer.args)
        if kills:
            trainer.add_callback(Kill(str(url)))
        trainer.train(resume_from_checkpoint=checkpoint)
        losses = getattr(trainer, "loss", None)
        state = dict(trainer.model.state_dict())
        if isinstance(losses, torch.nn.Module):
            state |= {f"loss.{key}": value for key, value in losses.state_dict().items()}
        kept = {"class": class_name(trainer), "step": trainer.state.global_step, "state": state}
        torch.save(kept, f"{folder}.pt")
        code = 0
    except BaseException:  # noqa: BLE001 - the exit code tells it
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def difference(one: dict[str, Any], other: dict[str, Any]) -> float:
    """The largest difference of two models' weights."""
    first, second = one["state"], other["state"]
    assert first.keys() == second.keys()
    return max(float((first[key].double() - second[key].double()).abs().max()) for key in first)


def measure(name: str, root: Path) -> dict[str, Any]:
    """Uninterrupted, and killed and resumed in an empty folder; where they differ, uninterrupted once more."""
    where, url = root.parent / "models", (root / "run").as_uri()
    root.mkdir()
    codes = [
        attempt(name, where, root / "whole", None, kills=False),
        attempt(name, where, root / "killed", url, kills=True),
        attempt(name, where, root / "resumed", url, kills=False),
    ]
    if codes != [0, -9, 0]:
        return {"name": name, "codes": codes}
    whole, resumed = (torch.load(root / f"{part}.pt") for part in ("whole", "resumed"))
    twice, gap = 0.0, difference(whole, resumed)
    if gap:
        attempt(name, where, root / "again", None, kills=False)
        twice = difference(whole, torch.load(root / "again.pt"))
    catalog = Catalog(Storage(url))
    first = catalog.read(catalog.checkpoints()[0])
    return {
        "name": name,
        "codes": codes,
        "class": whole["class"],
        "resumed_from": first.step,
        "twice": twice,
        "difference": gap,
        "exact": str(Exactness(first.exact, first.inexact_reason)),
    }


def main() -> None:
    """Measure all that are named, or all; one JSON object a line."""
    folder, *names = sys.argv[1:]
    import peft  # noqa: F401 - paid for before the forks
    import sentence_transformers  # noqa: F401
    import trl  # noqa: F401

    torch.set_num_threads(1)
    write_models(Path(folder) / "models")
    for number, name in enumerate(names or SETUPS):
        print("RESULT", json.dumps(measure(name, Path(folder) / str(number))), flush=True)


if __name__ == "__main__":
    main()
