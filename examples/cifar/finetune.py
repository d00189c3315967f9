"""Train an image classifier on CIFAR-10 or CIFAR-100 with `Trainer`. The lines marked `# cloud:` are all that hf_cloudtrain adds.

The first command trains a small model from a configuration and downloads nothing but the data. The second fine-tunes a pretrained
ViT; the same command on any machine resumes the run:

    python examples/cifar/finetune.py --data_path data
    torchrun --nproc_per_node 2 examples/cifar/finetune.py --dataset cifar100 --data_path data \
        --model_name_or_path google/vit-base-patch16-224-in21k --run_url s3://bucket/runs/cifar-vit

All options of `TrainingArguments` work too.
"""

import os
import sys
from dataclasses import dataclass, field

import torch
from cifar_data import KINDS, CifarDataset, label_names
from cifar_models import FROM_CONFIG, make_config
from torch import Tensor
from torch.nn.functional import interpolate
from torch.utils.data import Dataset, Subset
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageClassification,
    BaseImageProcessor,
    EvalPrediction,
    HfArgumentParser,
    PreTrainedConfig,
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    set_seed,
)

from hf_cloudtrain import CloudTrainCallback  # cloud: the import

DEFAULTS = {
    "output_dir": "cifar-output",
    "do_train": True,
    "do_eval": True,
    "per_device_train_batch_size": 64,
    "per_device_eval_batch_size": 256,
    "logging_steps": 50,
    "save_steps": 500,
    "report_to": "none",
    "dataloader_pin_memory": torch.cuda.is_available(),
    # Without this, processes that torchrun starts on a machine without an accelerator all train as rank 0.
    "use_cpu": not torch.accelerator.is_available(),
    "ddp_find_unused_parameters": False,
}
"""Changed defaults of TrainingArguments, so that the script runs on a laptop without options."""
FRESH_LEARNING_RATE = 1e-3
"""New weights need a higher learning rate than the 5e-5 that suits a pretrained model."""


@dataclass
class DataArguments:
    """The data."""

    dataset: str = field(default="cifar10", metadata={"help": f"One of {', '.join(KINDS)}."})
    data_path: str = field(default=".", metadata={"help": "Folder with the original files, or its parent."})
    max_train_samples: int | None = field(
        default=None, metadata={"help": "Train on the first N images only."}
    )
    max_eval_samples: int | None = field(
        default=None, metadata={"help": "Evaluate on the first N images only."}
    )

    def __post_init__(self) -> None:
        if self.dataset not in KINDS:
            raise ValueError(f"--dataset '{self.dataset}' is unknown. Choose one of {', '.join(KINDS)}.")


@dataclass
class ModelArguments:
    """The model, and where to store things."""

    model_name_or_path: str | None = field(
        default=None,
        metadata={"help": "A Hub model or a folder. Without it: --model, with new weights."},
    )
    model: str = field(default="small", metadata={"help": f"One of {', '.join(FROM_CONFIG)}."})
    cache_dir: str | None = field(default=None, metadata={"help": "Folder for downloaded models."})
    run_url: str | None = field(default=None, metadata={"help": "Such as s3://bucket/cifar"})  # cloud: option

    def __post_init__(self) -> None:
        if self.model not in FROM_CONFIG:
            raise ValueError(f"--model '{self.model}' is unknown. Choose one of {', '.join(FROM_CONFIG)}.")


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Train and evaluate as the options say. Return the metrics of the evaluation."""
    data_args, model_args, args = parse(argv)
    set_seed(args.seed)
    with args.main_process_first(desc="loading the model"):
        model, processor = load_model(data_args, model_args)
    train_data, eval_data = load_data(data_args, args.seed, processor)

    run_url = model_args.run_url or os.getenv("HF_CLOUDTRAIN_RUN_URL")  # cloud: without it a local run
    cloud = CloudTrainCallback(run_url) if run_url else None  # cloud: one line to name the run
    trainer = Trainer(
        model=model,
        args=args,
        train_dataset=first(train_data, data_args.max_train_samples),
        eval_dataset=first(eval_data, data_args.max_eval_samples),
        data_collator=Collator(image_size(model.config, processor)),
        compute_metrics=compute_metrics,
        processing_class=processor,
        callbacks=[EpochCallback(train_data)],
    )
    if cloud:  # cloud: with a run ...
        trainer.add_callback(cloud)  # cloud: ... steps are tracked and checkpoints uploaded

    final_dir = os.path.join(args.output_dir, "final")
    if args.do_train:
        checkpoint = args.resume_from_checkpoint
        checkpoint = cloud.restore(args) if cloud else checkpoint  # cloud: None on the first start
        result = trainer.train(resume_from_checkpoint=checkpoint)
        trainer.save_model(final_dir)
        record(trainer, "train", result.metrics)
        trainer.save_state()
    metrics = trainer.evaluate() if args.do_eval else {}
    record(trainer, "eval", metrics)
    if cloud and args.do_train:  # cloud: the final model ...
        cloud.save(final_dir, name="final")  # cloud: ... is committed like a checkpoint
    return metrics


class Collator:
    """Makes a batch of images in the size that the model expects."""

    def __init__(self, size: tuple[int, int]) -> None:
        self._size = size

    def __call__(self, samples: list[tuple[Tensor, int]]) -> dict[str, Tensor]:
        images = torch.stack([image for image, _ in samples])
        if images.shape[-2:] != self._size:
            images = interpolate(images, self._size, mode="bilinear", align_corners=False)
        return {"pixel_values": images, "labels": torch.tensor([label for _, label in samples])}


class EpochCallback(TrainerCallback):
    """Sets the epoch of the dataset: Trainer sets that of a sampler only."""

    def __init__(self, dataset: CifarDataset) -> None:
        self._dataset = dataset

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        self._dataset.set_epoch(int(state.epoch or 0))


def parse(argv: list[str] | None = None) -> tuple[DataArguments, ModelArguments, TrainingArguments]:
    argv = sys.argv[1:] if argv is None else argv
    parser = HfArgumentParser((DataArguments, ModelArguments, TrainingArguments), description=__doc__)
    parser.set_defaults(**DEFAULTS)
    if parser.parse_known_args(argv)[0].model_name_or_path is None:
        parser.set_defaults(learning_rate=FRESH_LEARNING_RATE)
    return parser.parse_args_into_dataclasses(argv)


def load_model(
    data_args: DataArguments, model_args: ModelArguments
) -> tuple[PreTrainedModel, BaseImageProcessor | None]:
    """Return the model and its image processor, if it has one."""
    source, cache_dir = model_args.model_name_or_path, model_args.cache_dir
    names = label_names(data_args.dataset, data_args.data_path)
    if source:
        config = AutoConfig.from_pretrained(source, cache_dir=cache_dir)
    else:
        config = make_config(model_args.model, len(names))
    config.id2label = dict(enumerate(names))
    config.label2id = {name: at for at, name in enumerate(names)}
    if source:
        model = AutoModelForImageClassification.from_pretrained(
            source,
            config=config,
            cache_dir=cache_dir,
            ignore_mismatched_sizes=True,  # its head has different classes
        )
        processor = load_processor(source, cache_dir)
    else:
        model, processor = AutoModelForImageClassification.from_config(config), None
    # The loss of a classifier is a mean. Because forward has **kwargs, Trainer would treat it as a sum over the labels of all
    # processes and multiply it by their number.
    model.accepts_loss_kwargs = False
    return model, processor


def load_processor(source: str, cache_dir: str | None) -> BaseImageProcessor | None:
    try:
        return AutoImageProcessor.from_pretrained(source, cache_dir=cache_dir)
    except OSError:  # the model has none
        return None


def load_data(
    data_args: DataArguments, seed: int, processor: BaseImageProcessor | None
) -> tuple[CifarDataset, CifarDataset]:
    colours = {"mean": getattr(processor, "image_mean", None), "std": getattr(processor, "image_std", None)}
    train = CifarDataset(data_args.dataset, data_args.data_path, augment=True, seed=seed, **colours)
    return train, CifarDataset(data_args.dataset, data_args.data_path, train=False, **colours)


def image_size(config: PreTrainedConfig, processor: BaseImageProcessor | None) -> tuple[int, int]:
    """Return height and width from the processor, else from the configuration, else those of CIFAR."""
    size = dict(getattr(processor, "size", None) or {})
    if "height" in size:
        return size["height"], size["width"]
    size = size.get("shortest_edge") or getattr(config, "image_size", None) or 32
    return (size, size) if isinstance(size, int) else tuple(size)


def first(dataset: Dataset, most: int | None) -> Dataset:
    return dataset if most is None else Subset(dataset, range(min(most, len(dataset))))


def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def record(trainer: Trainer, split: str, metrics: dict[str, float]) -> None:
    trainer.log_metrics(split, metrics)
    trainer.save_metrics(split, metrics)


if __name__ == "__main__":
    main()
