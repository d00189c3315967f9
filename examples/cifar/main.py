"""Train an image classifier on CIFAR-10 or CIFAR-100 in plain PyTorch. The lines marked `# cloud:` are what hf_cloudtrain adds.

The first command trains a small model on the CPU of this machine. The second trains ResNet-50 on two GPUs; the same command on any
machine resumes the run:

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
"""Share of all steps in which the learning rate rises to --lr. A cosine then takes it to 0."""


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    device = start_processes(args.use_cpu)
    train(args, device)
    # Only after train() has released the model: destroying a group that a model still holds can hang with gloo.
    dist.destroy_process_group()


def train(args: argparse.Namespace, device: torch.device) -> None:
    rank, world_size = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(args.seed)

    train_data = CifarDataset(args.dataset, args.data_path, augment=True, seed=args.seed)
    sampler = ct.ResumableSampler(train_data, seed=args.seed)  # cloud: knows its position in the data
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
    check_start(args, step, total_steps)

    clock = Clock(step)
    for epoch in range(sampler.epoch, args.total_epochs):
        sampler.set_epoch(epoch)
        train_data.set_epoch(epoch)
        for images, labels in train_loader:
            with ct.train_step():  # cloud: counts and times the step
                loss = train_step(model, images.to(device), labels.to(device), optimizer, lr_scheduler)
            step += 1
            sampler.advance(len(labels))  # cloud: counts trained samples, not prefetched ones
            learning_rate = lr_scheduler.get_last_lr()[0]
            ct.metric({"loss": loss, "learning_rate": learning_rate})  # cloud: stored with the run

            if step % args.log_interval == 0:
                report(
                    f"[Step {step} / {total_steps} ({step / total_steps:.1%})] loss = {loss.item():.5f}, learning rate = "
                    f"{learning_rate:.5f}, {clock.steps_per_second(step) * global_batch_size:.1f} images / s"
                )
            last = step == total_steps
            due = last or step % args.save_interval == 0
            due = due or ct.is_emergency_save()  # cloud: also before a preemption
            if args.save and due:
                if rank == 0:
                    checkpoint.save(args.save, step)
                ct.upload_checkpoint()  # cloud: in the background; waits only for the last one
            if last or step % args.test_interval == 0:
                loss, accuracy = validate(net, test_loader, device)
                report(f"[Step {step}] validation: loss = {loss:.5f}, accuracy = {accuracy:.2%}")


def train_step(
    model: nn.Module, images: Tensor, labels: Tensor, optimizer: Optimizer, lr_scheduler: LRScheduler
) -> Tensor:
    """Train on one batch. Return its loss, still on the device."""
    loss = cross_entropy(model(images).logits, labels)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    lr_scheduler.step()
    return loss.detach()


@torch.no_grad()
def validate(net: nn.Module, loader: DataLoader, device: torch.device) -> tuple[float, float]:
    """Return the mean loss and accuracy over the test images of all processes."""
    for buffer in net.buffers():
        dist.broadcast(buffer, 0)  # the running means differ by process; those of rank 0 are saved
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
    """The content of a checkpoint, and the options that must be the same when it is loaded."""

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
        temporary = path.with_suffix(".tmp")
        torch.save(content, temporary)
        os.replace(temporary, path)  # a reader finds either the old file or the new one, never a part

    def load(self, folder: str | None) -> int:
        """Load the checkpoint in the folder. Return its step, or 0 if there is none."""
        if folder is None or not Path(folder, self.NAME).exists():
            return 0
        content: dict[str, Any] = torch.load(Path(folder, self.NAME), map_location="cpu", weights_only=True)
        self._check_options(folder, content["options"])
        for name, part in self._parts.items():
            part.load_state_dict(content[name])
        return content["step"]

    def _check_options(self, folder: str, saved: dict[str, Any]) -> None:
        for name, value in self._same.items():
            if saved[name] != value:
                raise SystemExit(
                    f"The checkpoint in '{folder}' was saved with --{name} {saved[name]}, not {value}. Use the same "
                    "value, or a different --save."
                )
        if saved["global_batch_size"] != self._batch:
            raise SystemExit(
                f"The checkpoint in '{folder}' was saved with batches of {saved['global_batch_size']} over all processes, "
                f"not {self._batch}. Set --batch-size to that number divided by the number of processes."
            )


def check_start(args: argparse.Namespace, step: int, total_steps: int) -> None:
    folder = args.load or args.save
    if args.run_url and step != ct.processed_steps():  # cloud: the run counts its own steps
        raise SystemExit(
            f"'{folder}' holds a checkpoint of step {step} that does not belong to the run '{args.run_url}'. If the run was "
            "killed before it was uploaded, delete it; else start the run with a different --save."
        )
    if step >= total_steps:
        raise SystemExit(
            f"'{folder}' holds a checkpoint of step {step}, and {args.total_epochs} epochs have {total_steps} steps, so "
            "training is complete. Raise --total-epochs to train longer."
        )


class Clock:
    """Steps per second since the last call."""

    def __init__(self, step: int) -> None:
        self._step, self._time = step, time.perf_counter()

    def steps_per_second(self, step: int) -> float:
        steps, seconds = step - self._step, time.perf_counter() - self._time
        self._step, self._time = step, time.perf_counter()
        return steps / seconds


def start_processes(use_cpu: bool) -> torch.device:
    """Create the process group. Return the device of this process."""
    if not use_cpu and not torch.accelerator.is_available():
        raise SystemExit("torch finds no accelerator on this machine. Add --use-cpu.")
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


def report(line: str) -> None:
    if dist.get_rank() == 0:
        print(line, flush=True)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", choices=MODELS, help="default: resnet50, and small with --use-cpu")
    add("--dataset", choices=list(KINDS), default="cifar10")
    add("--data-path", default=".", metavar="DIR", help="folder with the original files, or its parent")
    add("--batch-size", type=positive, default=256, metavar="N", help="images in a step of each process")
    add("--total-epochs", type=positive, default=200, metavar="N")
    add("--lr", type=float, default=0.1, metavar="X", help="maximum learning rate")
    save = os.getenv("HF_CLOUDTRAIN_CHECKPOINT_DIR")  # cloud: set by a launcher
    add("--save", default=save, metavar="DIR", help="folder for checkpoint.pt; default: nothing is saved")
    add("--load", metavar="DIR", help="folder of a checkpoint.pt to continue from; default: --save")
    add("--save-interval", type=positive, default=500, metavar="N", help="steps between two checkpoints")
    add("--test-interval", type=positive, default=500, metavar="N", help="steps between two validations")
    add("--log-interval", type=positive, default=100, metavar="N", help="steps between two printed lines")
    workers = min(4, os.cpu_count() or 1)
    add(
        "--num-dataloader-workers",
        type=int,
        default=workers,
        metavar="N",
        help="data loading processes for each process",
    )
    add("--use-cpu", action="store_true", help="train on the CPU")
    add(
        "--seed", type=int, default=0, metavar="N", help="of the weights, the data order and the augmentation"
    )
    url = os.getenv("HF_CLOUDTRAIN_RUN_URL")  # cloud: without it a local run
    add("--run-url", default=url, metavar="URL", help="such as s3://bucket/cifar")  # cloud: the option
    args = parser.parse_args(argv)
    if args.run_url and not args.save:
        parser.error("A run needs a folder for its checkpoints. Add --save DIR.")
    args.model = args.model or ("small" if args.use_cpu else "resnet50")
    return args


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"'{text}' must be a positive integer")
    return int(text)


if __name__ == "__main__":
    main()
