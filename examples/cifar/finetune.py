"""Trains an image classifier on CIFAR-10 or CIFAR-100 with `Trainer`. The lines marked `# cloud:` are all that hf_cloudtrain adds.

A small model from a configuration, nothing to download but the data; then a pretrained ViT, in a run that any machine
continues when it is given the same line again:

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
    # Without this, processes that torchrun starts on a machine with no accelerator each train alone, all as rank 0.
    "use_cpu": not torch.accelerator.is_available(),
    "ddp_find_unused_parameters": False,
}
"""Where this script departs from the defaults of TrainingArguments, so that a bare start on a laptop works."""
FRESH_LEARNING_RATE = 1e-3
"""Weights that start from nothing need more than the 5e-5 that suits a pretrained model."""


@dataclass
class DataArguments:
    """What to train on."""

    dataset: str = field(default="cifar10", metadata={"help": f"One of {', '.join(KINDS)}."})
    data_path: str = field(
        default=".", metadata={"help": "Folder of the original files, or the one that holds it."}
    )
    max_train_samples: int | None = field(
        default=None, metadata={"help": "Train on the first N images only."}
    )
    max_eval_samples: int | None = field(
        default=None, metadata={"help": "Evaluate on the first N images only."}
    )

    def __post_init__(self) -> None:
        if self.dataset not in KINDS:
            raise ValueError(f"--dataset '{self.dataset}' is unknown; choose one of {', '.join(KINDS)}")


@dataclass
class ModelArguments:
    """What to train, and where to keep things."""

    model_name_or_path: str | None = field(
        default=None,
        metadata={"help": "A model of the hub or a folder. Without it: --model, with fresh weights."},
    )
    model: str = field(default="small", metadata={"help": f"One of {', '.join(FROM_CONFIG)}."})
    cache_dir: str | None = field(default=None, metadata={"help": "Where downloaded models are kept."})
    run_url: str | None = field(default=None, metadata={"help": "Such as s3://bucket/cifar"})  # cloud: option

    def __post_init__(self) -> None:
        if self.model not in FROM_CONFIG:
            raise ValueError(f"--model '{self.model}' is unknown; choose one of {', '.join(FROM_CONFIG)}")


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Trains and evaluates, as the options say. Returns the metrics of the evaluation."""
    data_args, model_args, args = parse(argv)
    set_seed(args.seed)
    with args.main_process_first(desc="loading the model"):
        model, processor = load_model(data_args, model_args)
    train_data, eval_data = load_data(data_args, args.seed, processor)

    run_url = model_args.run_url or os.getenv("HF_CLOUDTRAIN_RUN_URL")  # cloud: neither: a plain local run
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
    """Makes a batch of images that are as large as the model wants them."""

    def __init__(self, size: tuple[int, int]) -> None:
        self._size = size

    def __call__(self, samples: list[tuple[Tensor, int]]) -> dict[str, Tensor]:
        images = torch.stack([image for image, _ in samples])
        if images.shape[-2:] != self._size:
            images = interpolate(images, self._size, mode="bilinear", align_corners=False)
        return {"pixel_values": images, "labels": torch.tensor([label for _, label in samples])}


class EpochCallback(TrainerCallback):
    """Tells the data set which epoch it is: where there is a sampler, Trainer tells that one alone."""

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
    """The model, and what says how it wants its images, where it has that."""
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
            ignore_mismatched_sizes=True,  # its head has other classes
        )
        processor = load_processor(source, cache_dir)
    else:
        model, processor = AutoModelForImageClassification.from_config(config), None
    # The loss of a classifier is a mean already. Trainer would take it for a sum over the labels of all processes, because
    # forward has **kwargs, and multiply it by their number.
    model.accepts_loss_kwargs = False
    return model, processor


def load_processor(source: str, cache_dir: str | None) -> BaseImageProcessor | None:
    try:
        return AutoImageProcessor.from_pretrained(source, cache_dir=cache_dir)
    except OSError:  # it has none
        return None


def load_data(
    data_args: DataArguments, seed: int, processor: BaseImageProcessor | None
) -> tuple[CifarDataset, CifarDataset]:
    colours = {"mean": getattr(processor, "image_mean", None), "std": getattr(processor, "image_std", None)}
    train = CifarDataset(data_args.dataset, data_args.data_path, augment=True, seed=seed, **colours)
    return train, CifarDataset(data_args.dataset, data_args.data_path, train=False, **colours)


def image_size(config: PreTrainedConfig, processor: BaseImageProcessor | None) -> tuple[int, int]:
    """Height and width that the model wants: by its processor, else by its configuration, else those of CIFAR."""
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
