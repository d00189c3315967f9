"""Trains an image classifier on CIFAR-10 or CIFAR-100 in plain PyTorch. The lines marked `# cloud:` are what hf_cloudtrain adds.

A small model on the CPU of this machine; then ResNet-50 on two GPUs, in a run that any machine continues when it is given
the same line again:

    python examples/cifar/main.py --use-cpu --data-path data --save cifar-output
    torchrun --nproc_per_node 2 examples/cifar/main.py --dataset cifar100 --data-path data --save cifar-output \
        --run-url s3://bucket/runs/cifar
"""

import argparse
import math
import os
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from cifar_data import KINDS, CifarDataset
from cifar_models import MODELS, make_model
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader, Subset
from transformers import get_cosine_schedule_with_warmup

import hf_cloudtrain as ct  # cloud: the import

WARMUP = 0.05
"""Share of all steps in which the learning rate rises to --lr. In the others a cosine takes it down to 0."""


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    device = start_processes(args.use_cpu)
    train(args, device)
    # Not before the model is gone, at the end of train(): gloo may hang in the end of a group that only a model still holds.
    dist.destroy_process_group()


def train(args: argparse.Namespace, device: torch.device) -> None:
    rank, world_size = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(args.seed)

    train_data = CifarDataset(args.dataset, args.data_path, augment=True, seed=args.seed)
    sampler = ct.ResumableSampler(train_data, seed=args.seed)  # cloud: knows its place in the data
    train_loader = DataLoader(
        train_data, args.batch_size, sampler=sampler, num_workers=args.num_dataloader_workers
    )
    test_data = CifarDataset(args.dataset, args.data_path, train=False)
    own_share = Subset(test_data, range(rank, len(test_data), world_size))
    test_loader = DataLoader(own_share, args.batch_size, num_workers=args.num_dataloader_workers)

    net = make_model(args.model, KINDS[args.dataset].num_classes).to(device)
    model = DistributedDataParallel(net)
    optimizer = SGD(net.parameters(), lr=args.lr, momentum=0.9, weight_decay=5e-4)
    global_batch_size = args.batch_size * world_size
    total_steps = args.total_epochs * math.ceil(len(train_data) / global_batch_size)
    lr_scheduler = get_cosine_schedule_with_warmup(optimizer, round(WARMUP * total_steps), total_steps)

    ct.init(total_train_steps=total_steps, run_url=args.run_url, checkpoint_dir=args.save)  # cloud: the run
    folder = ct.restore()  # cloud: the newest checkpoint on storage, or None
    parts = {"model": net, "optimizer": optimizer, "lr_scheduler": lr_scheduler, "sampler": sampler}
    checkpoint = Checkpoint(args, global_batch_size, parts)
    step = checkpoint.load(folder or args.load or args.save)
    refuse_wrong_start(args, step, total_steps)

    clock = Clock(step)
    for epoch in range(sampler.epoch, args.total_epochs):
        sampler.set_epoch(epoch)
        train_data.set_epoch(epoch)
        for images, labels in train_loader:
            with ct.train_step():  # cloud: counts and times the step
                loss = train_step(model, images.to(device), labels.to(device), optimizer, lr_scheduler)
            step += 1
            sampler.advance(len(labels))  # cloud: these are done; what the workers have fetched is not
            learning_rate = lr_scheduler.get_last_lr()[0]
            ct.metric({"loss": loss, "learning_rate": learning_rate})  # cloud: kept with the run

            if step % args.log_interval == 0:
                say(
                    f"[Step {step} / {total_steps} ({step / total_steps:.1%})] loss = {loss.item():.5f}, learning rate = "
                    f"{learning_rate:.5f}, {clock.steps_per_second(step) * global_batch_size:.1f} images / s"
                )
            last = step == total_steps
            due = last or step % args.save_interval == 0
            due = due or ct.is_emergency_save()  # cloud: and when the machine is about to go
            if args.save and due:
                if rank == 0:
                    checkpoint.save(args.save, step)
                ct.upload_checkpoint()  # cloud: in the background, from a copy; the last one is waited for
            if last or step % args.test_interval == 0:
                loss, accuracy = validate(net, test_loader, device)
                say(f"[Step {step}] validation: loss = {loss:.5f}, accuracy = {accuracy:.2%}")


def train_step(
    model: nn.Module, images: Tensor, labels: Tensor, optimizer: Optimizer, lr_scheduler: LRScheduler
) -> Tensor:
    """The loss of this process's batch, still on the device."""
    loss = cross_entropy(model(images).logits, labels)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    lr_scheduler.step()
    return loss.detach()


@torch.no_grad()
def validate(net: nn.Module, loader: DataLoader, device: torch.device) -> tuple[float, float]:
    """Mean loss and accuracy over the test images of all processes."""
    for buffer in net.buffers():
        dist.broadcast(buffer, 0)  # each process has its own running means; those of rank 0 are saved
    net.eval()
    sums = torch.zeros(3, device=device)
    for images, labels in loader:
        logits, wanted = net(images.to(device)).logits, labels.to(device)
        sums[0] += cross_entropy(logits, wanted, reduction="sum")
        sums[1] += (logits.argmax(-1) == wanted).sum()
        sums[2] += len(wanted)
    net.train()
    dist.all_reduce(sums)
    loss, correct, count = sums.tolist()
    return loss / count, correct / count


class Checkpoint:
    """What a checkpoint holds, and the options that must be the same when it is loaded."""

    NAME = "checkpoint.pt"

    def __init__(self, args: argparse.Namespace, global_batch_size: int, parts: dict[str, Any]) -> None:
        self._parts = parts
        self._batch = global_batch_size
        self._same = {"model": args.model, "dataset": args.dataset, "seed": args.seed}

    def save(self, folder: str, step: int) -> None:
        content = {name: part.state_dict() for name, part in self._parts.items()}
        content |= {"step": step, "options": self._same | {"global_batch_size": self._batch}}
        path = Path(folder, self.NAME)
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_suffix(".tmp")
        torch.save(content, beside)
        os.replace(beside, path)  # whoever reads it, finds the old one or the new one, each whole

    def load(self, folder: str | None) -> int:
        """The step that the checkpoint in the folder was saved at; 0 where there is none."""
        if folder is None or not Path(folder, self.NAME).exists():
            return 0
        content: dict[str, Any] = torch.load(Path(folder, self.NAME), map_location="cpu", weights_only=True)
        self._refuse_other(folder, content["options"])
        for name, part in self._parts.items():
            part.load_state_dict(content[name])
        return content["step"]

    def _refuse_other(self, folder: str, saved: dict[str, Any]) -> None:
        for name, value in self._same.items():
            if saved[name] != value:
                raise SystemExit(
                    f"the checkpoint in '{folder}' was made with --{name} {saved[name]}, not {value}: use the same, or "
                    "another --save"
                )
        if saved["global_batch_size"] != self._batch:
            raise SystemExit(
                f"the checkpoint in '{folder}' was made with batches of {saved['global_batch_size']} over all processes, "
                f"not {self._batch}: set --batch-size to that number divided by the number of processes"
            )


def refuse_wrong_start(args: argparse.Namespace, step: int, total_steps: int) -> None:
    folder = args.load or args.save
    if args.run_url and step != ct.processed_steps():  # cloud: a run counts its own steps
        raise SystemExit(
            f"'{folder}' holds a checkpoint of step {step} from elsewhere, and '{args.run_url}' has none: start the run "
            "without it, with another --save"
        )
    if step >= total_steps:
        raise SystemExit(
            f"'{folder}' holds a checkpoint of step {step}, and {args.total_epochs} epochs have {total_steps} steps, so "
            "nothing is left to do: raise --total-epochs to go on"
        )


class Clock:
    """Steps a second since the last look."""

    def __init__(self, step: int) -> None:
        self._step, self._time = step, time.perf_counter()

    def steps_per_second(self, step: int) -> float:
        steps, seconds = step - self._step, time.perf_counter() - self._time
        self._step, self._time = step, time.perf_counter()
        return steps / seconds


def start_processes(use_cpu: bool) -> torch.device:
    """Make the process group and return this process's device."""
    if not use_cpu and not torch.accelerator.is_available():
        raise SystemExit("torch sees no accelerator on this machine: add --use-cpu")
    if use_cpu:
        device = torch.device("cpu")
    else:
        device = torch.device(torch.accelerator.current_accelerator().type, int(os.getenv("LOCAL_RANK", "0")))
        torch.accelerator.set_device_index(device.index)
    backend = dist.get_default_backend_for_device(device)
    if dist.is_torchelastic_launched():
        dist.init_process_group(backend)
    else:  # without torchrun: a group of one
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    return device


def say(line: str) -> None:
    if dist.get_rank() == 0:
        print(line, flush=True)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", choices=MODELS, help="default: resnet50, and small with --use-cpu")
    add("--dataset", choices=list(KINDS), default="cifar10")
    add(
        "--data-path", default=".", metavar="DIR", help="the original files' folder, or the one that holds it"
    )
    add("--batch-size", type=above_0, default=256, metavar="N", help="images a step of each process")
    add("--total-epochs", type=above_0, default=200, metavar="N")
    add("--lr", type=float, default=0.1, metavar="X", help="learning rate at its highest")
    save = os.getenv("HF_CLOUDTRAIN_CHECKPOINT_DIR")  # cloud: where a launcher says so
    add("--save", default=save, metavar="DIR", help="folder for checkpoint.pt; default: nothing is saved")
    add("--load", metavar="DIR", help="folder of a checkpoint.pt to go on from; default: that of --save")
    add("--save-interval", type=above_0, default=500, metavar="N", help="steps between two checkpoints")
    add("--test-interval", type=above_0, default=500, metavar="N", help="steps between two validations")
    add(
        "--log-interval", type=above_0, default=100, metavar="N", help="steps between two lines on the screen"
    )
    workers = min(4, os.cpu_count() or 1)
    add("--num-dataloader-workers", type=int, default=workers, metavar="N", help="loaders of each process")
    add("--use-cpu", action="store_true", help="train on the CPU")
    add("--seed", type=int, default=0, metavar="N", help="of weights, order of the data, and augmentation")
    url = os.getenv("HF_CLOUDTRAIN_RUN_URL")  # cloud: neither: a plain local run
    add("--run-url", default=url, metavar="URL", help="such as s3://bucket/cifar")  # cloud: the option
    args = parser.parse_args(argv)
    if args.run_url and not args.save:
        parser.error("a run needs a folder for its checkpoints: add --save DIR")
    args.model = args.model or ("small" if args.use_cpu else "resnet50")
    return args


def above_0(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"'{text}' is not a whole number above 0")
    return int(text)


if __name__ == "__main__":
    main()
