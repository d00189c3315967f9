"""Commands of other projects as people type them, none of which knows of this package, and what they read.

Each runs in a working directory of its own, which `prepare` fills: models, data and configuration, no output.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from datasets import ClassLabel, Dataset, Features, Value

from tests.conftest import SHARED_DATA
from tests.trainers._models import sentences, write_models

ROOT = Path(__file__).resolve().parents[2]
GLUE = SHARED_DATA / "glue"
TEXTS, CLASSES = (
    {"sentence1": Value("string"), "sentence2": Value("string")},
    ClassLabel(names=["not_equivalent", "equivalent"]),
)
SCRIPTS = Path(__file__).parent / "scripts"
FETCHED = "FETCHED_SCRIPTS"
"""Environment variable: a folder with scripts that are not ours, such as run_glue.py; docs/integrations.md says where from."""
STEPS, SAVE_STEPS = 60, 5
TRAINERS, SWIFT, AXOLOTL = ".venv-trainers", ".venv-swift", ".venv-axolotl"
COMMON: dict[str, Any] = {
    "output_dir": "out",
    "max_steps": STEPS,
    "per_device_train_batch_size": 2,
    "learning_rate": 0.01,
    "save_steps": SAVE_STEPS,
    "logging_steps": 1,
    "report_to": "none",
}


@dataclass(frozen=True)
class Command:
    """One command line, unmodified."""

    name: str
    """Of its row in docs/integrations.md."""
    line: str
    """As it is typed."""
    prepare: Callable[[Path], None]
    """Writes what the command reads into its working directory."""
    weights: str
    """Glob of the weights at the end of training; the last match by name counts."""
    resumed_weights: str | None = None
    """The same after a resume, where the script then gives it a different name."""
    environment: str = TRAINERS
    settings: Mapping[str, str] = field(default_factory=dict)
    """Environment variables."""
    fetched: str | None = None
    """The name of its script, where that is not ours and must be fetched."""
    options: str = ""
    """Of `cloudtrain launch`."""
    plugged: str | None = None
    """The line with a plug-in of ours, where that is what is tested and not `cloudtrain launch`; it has the run URL from its
    environment."""
    exact: bool = True
    """Whether a resume must give the same weights: every Trainer."""
    shown: str | None = None
    """In the table, where the line is long."""
    packages: tuple[str, ...] = ("transformers",)
    """Whose versions the table names, of its environment."""
    limits: str = ""

    @property
    def python(self) -> Path:
        """The interpreter of its environment."""
        return ROOT / self.environment / "bin" / "python"

    @property
    def by_hand(self) -> bool:
        """Whether `make test-trainers` cannot get what it needs."""
        return self.fetched is not None or self.environment == AXOLOTL

    @property
    def missing(self) -> str | None:
        """What it lacks here, if anything."""
        if not self.python.exists():
            return f"no {self.environment}: make test-trainers"
        if self.fetched and not (Path(os.environ.get(FETCHED, "nowhere")) / self.fetched).exists():
            return f"{self.fetched} is not in the folder that {FETCHED} names"
        return None


def models(folder: Path, *names: str) -> None:
    """Copies of the models with these names."""
    store = folder.parent / "models"
    if not store.exists():
        write_models(store)
    for name in names:
        shutil.copytree(store / name, folder / name)


def script(folder: Path, name: str) -> None:
    """One of our scripts."""
    shutil.copy(SCRIPTS / name, folder / name)


def rows(path: Path, *found: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in found))


def text(folder: Path) -> None:
    """Language modelling: `trl sft`."""
    models(folder, "llama")
    rows(folder / "data" / "train.jsonl", *({"text": line} for line in sentences(25)))
    settings = {"model_name_or_path": "llama", "dataset_name": "data", "use_cpu": True, "max_length": 16}
    (folder / "sft.yaml").write_text(yaml.safe_dump({**COMMON, **settings}))


def preferences(folder: Path) -> None:
    """Chosen and rejected answers: `trl dpo`."""
    models(folder, "llama")
    chosen, rejected = sentences(25, seed=1), sentences(25, seed=2)
    rows(
        folder / "data" / "train.jsonl",
        *(
            {"prompt": prompt, "chosen": f" {good}", "rejected": f" {bad}"}
            for prompt, good, bad in zip(sentences(25), chosen, rejected, strict=True)
        ),
    )
    settings = {"model_name_or_path": "llama", "dataset_name": "data", "use_cpu": True, "max_length": 24}
    (folder / "dpo.yaml").write_text(yaml.safe_dump({**COMMON, **settings}))


def axolotl(folder: Path) -> None:
    """A configuration of axolotl, and the same one with the plug-in."""
    models(folder, "llama")
    rows(folder / "train.jsonl", *({"text": line} for line in sentences(25)))
    settings = {
        "base_model": "llama",
        "datasets": [{"path": "train.jsonl", "ds_type": "json", "type": "completion"}],
        "output_dir": "out",
        "sequence_len": 16,
        "micro_batch_size": 2,
        "gradient_accumulation_steps": 1,
        "max_steps": STEPS,
        "save_steps": SAVE_STEPS,
        "logging_steps": 1,
        "optimizer": "adamw_torch",
        "lr_scheduler": "linear",
        "learning_rate": 0.01,
        "bf16": False,
        "fp16": False,
        "val_set_size": 0,
        "seed": 42,
    }
    (folder / "plain.yml").write_text(yaml.safe_dump(settings))
    plugin = {"plugins": ["hf_cloudtrain.integrations.axolotl.CloudTrainPlugin"]}
    (folder / "cloud.yml").write_text(yaml.safe_dump({**settings, **plugin}))


def similar(folder: Path) -> None:
    """Pairs of STS-B: the script of sentence-transformers."""
    models(folder, "bert")
    script(folder, "sts.py")
    for part, count in (("train", 240), ("validation", 40)):
        pairs = Dataset.from_parquet(str(GLUE / "stsb" / f"{part}.parquet"))
        (folder / "data").mkdir(exist_ok=True)
        pairs.select(range(count)).to_parquet(folder / "data" / f"{part}.parquet")


def paraphrases(folder: Path) -> None:
    """MRPC, and a local folder for each name of the hub that the scripts of transformers and Accelerate ask for."""
    models(folder, "bert")
    (folder / "bert").rename(folder / "bert-base-cased")
    data, features = folder / "nyu-mll" / "glue", Features({**TEXTS, "label": CLASSES, "idx": Value("int32")})
    (data / "mrpc").mkdir(parents=True)
    for part, count in (("train", 320), ("validation", 64), ("test", 8)):
        pairs = Dataset.from_parquet(str(GLUE / "mrpc" / f"{part}.parquet"))
        pairs.select(range(count)).cast(features).to_parquet(data / "mrpc" / f"{part}.parquet")
    files = [{"split": part, "path": f"mrpc/{part}.parquet"} for part in ("train", "validation", "test")]
    card = {"configs": [{"config_name": "mrpc", "data_files": files}]}
    (data / "README.md").write_text(f"---\n{yaml.safe_dump(card)}---\n")
    (folder / "glue").mkdir()
    script(folder / "glue", "glue.py")


def classified(folder: Path) -> None:
    """A script with a plain Trainer."""
    models(folder, "bert")
    script(folder, "classify.py")
    rows(
        folder / "train.jsonl",
        *({"text": line, "label": number % 2} for number, line in enumerate(sentences(50))),
    )


def chats(folder: Path) -> None:
    """Questions and answers: ms-swift."""
    models(folder, "llama")
    rows(
        folder / "train.jsonl",
        *(
            {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]}
            for asked, said in zip(sentences(25), sentences(25, seed=1), strict=True)
        ),
    )


_SWIFT = (
    "swift sft --model llama --model_type llama --template llama --dataset train.jsonl --torch_dtype float32 "
    f"--max_steps {STEPS} --save_steps {SAVE_STEPS} --logging_steps 1 --per_device_train_batch_size 2 --learning_rate 1e-2 "
    "--gradient_accumulation_steps 1 --split_dataset_ratio 0 --output_dir out --report_to none"
)
_GLUE = (
    f"--output_dir out --num_train_epochs 3 --save_steps {SAVE_STEPS} --logging_steps 1 --per_device_train_batch_size 16 "
    "--max_seq_length 32 --learning_rate 1e-3 --report_to none --use_cpu"
)
_MODEL = "out/model.safetensors"
_NO_TELEMETRY = {"AXOLOTL_DO_NOT_TRACK": "1", "DO_NOT_TRACK": "1"}
_TRL = ("trl", "transformers")
COMMANDS = {
    command.name: command
    for command in [
        Command("TRL, sft", "trl sft --config sft.yaml", text, _MODEL, packages=_TRL),
        Command("TRL, dpo", "trl dpo --config dpo.yaml", preferences, _MODEL, packages=_TRL),
        Command(
            "sentence-transformers, STS",
            "python sts.py bert data",
            similar,
            "out/final/model.safetensors",
            shown="python sts.py",
            packages=("sentence-transformers", "transformers"),
            limits="a loss with parameters of its own is not exact ([tested trainers](trainers.md))",
        ),
        Command(
            "ms-swift, sft with LoRA",
            _SWIFT,
            chats,
            f"out/*/checkpoint-{STEPS}/adapter_model.safetensors",
            environment=SWIFT,
            shown="swift sft --model … --dataset …",
            packages=("ms-swift", "transformers"),
            limits="an environment of its own; not with `--use_flash_ckpt`",
        ),
        Command(
            "ms-swift, sft of all weights",
            f"{_SWIFT} --tuner_type full --add_version false",
            chats,
            f"out/checkpoint-{STEPS}/model.safetensors",
            environment=SWIFT,
            shown="swift sft --tuner_type full …",
            packages=("ms-swift", "transformers"),
            limits="as above",
        ),
        Command(
            "axolotl, launch",
            "axolotl train plain.yml --launcher python",
            axolotl,
            _MODEL,
            environment=AXOLOTL,
            settings=_NO_TELEMETRY,
            shown="axolotl train sft.yml",
            packages=("axolotl", "transformers"),
            limits="needs Python ≥ 3.12; by hand: [how](#axolotl)",
        ),
        Command(
            "axolotl, plug-in",
            "axolotl train plain.yml --launcher python",
            axolotl,
            _MODEL,
            environment=AXOLOTL,
            settings=_NO_TELEMETRY,
            plugged="axolotl train cloud.yml --launcher python",
            shown="axolotl train sft.yml",
            packages=("axolotl", "transformers"),
            limits="the [plug-in](#axolotl) in the place of `cloudtrain launch`; as above",
        ),
        Command(
            "torchrun, 2 processes",
            "torchrun --standalone --nproc-per-node 2 classify.py",
            classified,
            _MODEL,
            shown="torchrun --nproc-per-node 2 train.py",
            packages=("torch", "transformers"),
            limits="on several machines, the same line on each: [recipe](#torchrun-and-kubeflow)",
        ),
        Command(
            "transformers, run_glue.py",
            f"python run_glue.py --model_name_or_path bert-base-cased --task_name mrpc --do_train --do_eval {_GLUE}",
            paraphrases,
            _MODEL,
            fetched="run_glue.py",
            shown="python run_glue.py --task_name mrpc …",
            limits="by hand: [how](#scripts-that-are-not-ours)",
        ),
        Command(
            "Accelerate, complete_nlp_example.py",
            f"python complete_nlp_example.py --cpu --checkpointing_steps {SAVE_STEPS} --output_dir out",
            paraphrases,
            f"out/step_{STEPS}/model.safetensors",
            # Resumed after its first epoch, the script counts its folders from 0 again.
            f"../run/checkpoint-{STEPS}/model.safetensors",
            fetched="complete_nlp_example.py",
            options="--resume-option --resume_from_checkpoint",
            exact=False,
            shown="python complete_nlp_example.py --checkpointing_steps 5 …",
            packages=("accelerate",),
            limits="with `--resume-option --resume_from_checkpoint` before the `--`; the script's own resume differs as much without "
            "this package; by hand: [how](#scripts-that-are-not-ours)",
        ),
    ]
}
