"""What is staged and written later equals, byte for byte, what the framework writes at once."""

from __future__ import annotations

import contextlib
import gc
import io
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import safetensors.numpy
import torch
import torch.distributed as dist
from safetensors.torch import save_file, save_model
from torch import save
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.utils.serialization import config as torch_config
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    TrainingArguments,
    get_linear_schedule_with_warmup,
)

from hf_cloudtrain.staging import recorders
from hf_cloudtrain.staging.job import StagedFile
from hf_cloudtrain.staging.memory import StagingMemory
from hf_cloudtrain.staging.recorders import write_file
from hf_cloudtrain.staging.window import Window

Write = Callable[[Path], object]

CHANCE = torch.Generator().manual_seed(1)
FLOATS = torch.randn(40, 30, generator=CHANCE)
FLOAT8 = [
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.float8_e8m0fnu,
    torch.float8_e4m3fnuz,
    torch.float8_e5m2fnuz,
]
INTS = [
    torch.uint8,
    torch.int8,
    torch.int16,
    torch.uint16,
    torch.int32,
    torch.uint32,
    torch.int64,
    torch.uint64,
]


class Tied(torch.nn.Module):
    """Two layers of one weight, and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)
        self.other.weight = self.one.weight
        self.register_buffer("mean", torch.ones(3))


def bert() -> BertForSequenceClassification:
    torch.manual_seed(1)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    return BertForSequenceClassification(BertConfig(vocab_size=50, max_position_embeddings=8, **sizes))


def compiled(model: torch.nn.Module | None = None) -> Any:
    return torch.compile(Tied() if model is None else model, backend="eager")


def gpt2() -> GPT2LMHeadModel:
    return GPT2LMHeadModel(GPT2Config(vocab_size=50, n_positions=8, n_embd=16, n_layer=1, n_head=2))


def trained_optimizer(count: int = 1) -> torch.optim.Optimizer:
    weights = [torch.nn.Parameter(torch.ones(3)) for _ in range(count)]
    optimizer = torch.optim.AdamW(weights)
    for weight in weights:
        weight.grad = torch.ones(3)
    optimizer.step()
    return optimizer


def of(value: object, name: str = "state.pt", **options: Any) -> Write:
    """torch.save of a value."""
    return lambda folder: torch.save(value, os.fspath(folder / name), **options)


def tensors(values: dict[str, torch.Tensor], name: str = "model.safetensors", **options: Any) -> Write:
    """save_file of tensors."""
    return lambda folder: save_file(values, folder / name, **options)


def lora(folder: Path) -> None:
    torch.manual_seed(1)
    targets = ["query", "value"]
    peft.get_peft_model(bert(), peft.LoraConfig(r=2, target_modules=targets)).save_pretrained(folder)


def in_the_folder(write: Callable[[], object]) -> Write:
    def call(folder: Path) -> None:
        before = os.getcwd()
        os.chdir(folder)
        try:
            write()
        finally:
            os.chdir(before)

    return call


def below(folder: Path) -> None:
    (folder / "global_step5/zero").mkdir(parents=True)
    torch.save(FLOATS, folder / "global_step5/zero/states.pt")


def to_a_file_object(folder: Path) -> None:
    with open(folder / "state.pt", "wb") as file:
        torch.save(FLOATS, file)


def twice(folder: Path) -> None:
    torch.save(FLOATS, folder / "state.pt")
    torch.save(FLOATS + 1, folder / "state.pt")


def scheduler() -> dict[str, Any]:
    return get_linear_schedule_with_warmup(trained_optimizer(), 2, 10).state_dict()


def random_states() -> dict[str, Any]:
    return {"python": random.getstate(), "numpy": np.random.get_state(), "cpu": torch.get_rng_state()}


STAGED: dict[str, Callable[[], Write]] = {
    "nested": lambda: of({"a": [FLOATS, {"b": (FLOATS + 1, 7, "text", None)}]}),
    "parameter": lambda: of(torch.nn.Parameter(FLOATS)),
    "tied weights": lambda: of(Tied().state_dict()),
    "whole module": lambda: of(Tied()),
    "not contiguous": lambda: of({"t": FLOATS.t(), "steps": FLOATS[::2, ::3]}),
    "views of one storage": lambda: of([FLOATS[:3], FLOATS[5:], FLOATS.view(-1)]),
    "bfloat16 and float16": lambda: of([FLOATS.bfloat16(), FLOATS.half(), FLOATS.double()]),
    "float8": lambda: of([FLOATS.to(kind) for kind in FLOAT8]),
    "integers and bool": lambda: of([*(FLOATS.abs().to(kind) for kind in INTS), FLOATS > 0]),
    "complex": lambda: of(torch.complex(FLOATS, FLOATS)),
    "sparse": lambda: of([FLOATS.relu().to_sparse(), FLOATS.relu().to_sparse_csr()]),
    "meta": lambda: of({"there": FLOATS, "meta": torch.empty(3, device="meta")}),
    "empty tensors": lambda: of([torch.empty(0), torch.empty(3, 0), torch.tensor(5.0)]),
    "quantised": lambda: of(torch.quantize_per_tensor(FLOATS, 0.1, 3, torch.qint8)),
    "storages": lambda: of([FLOATS.untyped_storage(), torch.ones(3).storage()]),
    "no tensor": lambda: of({"steps": 5, "array": np.arange(5)}),
    "scheduler": lambda: of(scheduler(), "scheduler.pt"),
    "random states": lambda: of(random_states(), "rng_state.pth"),
    "training arguments": lambda: of(TrainingArguments(output_dir="out", use_cpu=True), "training_args.bin"),
    "optimizer": lambda: of(trained_optimizer().state_dict(), "optimizer.pt"),
    "10,000 parameters": lambda: of(trained_optimizer(10_000).state_dict(), "optimizer.pt"),
    "compiled": lambda: of(compiled().state_dict()),
    "save as bound at import": lambda: lambda folder: save(FLOATS, folder / "state.pt"),
    "other protocol": lambda: of(FLOATS, pickle_protocol=4),
    "not ASCII": lambda: of(FLOATS, "größe-체크.pt"),
    "no suffix": lambda: of(FLOATS, "state"),
    "in a folder": lambda: below,
    "relative path": lambda: in_the_folder(lambda: torch.save(FLOATS, "state.pt")),
    "path with dots": lambda: of(FLOATS, "../checkpoint-5/./state.pt"),
    "the same name twice": lambda: twice,
    "safetensors": lambda: tensors({"b": FLOATS, "a": FLOATS.t().contiguous(), "c": torch.tensor(1.0)}),
    "safetensors: metadata": lambda: tensors({"a": FLOATS}, metadata={"format": "pt"}),
    "safetensors: integers": lambda: tensors({str(kind): FLOATS.abs().to(kind) for kind in INTS}),
    "safetensors: floats": lambda: tensors(
        {str(kind): FLOATS.to(kind) for kind in (torch.bfloat16, torch.float16, torch.float64, torch.bool)}
    ),
    "safetensors: float8": lambda: tensors({str(kind): FLOATS.to(kind) for kind in FLOAT8}),
    "safetensors: complex": lambda: tensors({"a": torch.complex(FLOATS, FLOATS)}),
    "safetensors: empty": lambda: tensors({"a": torch.empty(0), "b": torch.empty(2, 0), "c": FLOATS}),
    "safetensors: not ASCII": lambda: tensors({"größe": FLOATS}, "größe.safetensors"),
    "safetensors: tied model": lambda: lambda folder: save_model(Tied(), os.fspath(folder / "m.safetensors")),
    "save_pretrained": lambda: bert().save_pretrained,
    "save_pretrained: tied": lambda: gpt2().save_pretrained,
    "save_pretrained: shards": lambda: lambda folder: bert().save_pretrained(folder, max_shard_size="4KB"),
    "save_pretrained: LoRA": lambda: lora,
    "save_pretrained: compiled": lambda: lambda folder: compiled(bert()).save_pretrained(folder),
}
"""Each makes its values, and returns what writes them into a folder."""

ORDINARY: dict[str, Callable[[], Write]] = {
    "legacy format": lambda: of(FLOATS, _use_new_zipfile_serialization=False),
    "file object": lambda: to_a_file_object,
    "numpy": lambda: (
        lambda folder: safetensors.numpy.save_file({"a": FLOATS.numpy()}, folder / "a.safetensors")
    ),
    "float4": lambda: tensors({"a": torch.zeros(2, 4, dtype=torch.uint8).view(torch.float4_e2m1fn_x2)}),
    "TorchScript": lambda: (
        lambda folder: torch.jit.trace(torch.nn.Linear(2, 2), torch.ones(2)).save(str(folder / "model.pt"))
    ),
    "no tensors": lambda: tensors({}),
}


@pytest.fixture(autouse=True)
def stage_small_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recorders, "SMALL_FILE", 0)


@pytest.fixture
def memory() -> Iterator[StagingMemory]:
    memory = StagingMemory(2**24)
    yield memory
    memory.close()


@pytest.mark.parametrize("case", STAGED)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_staged_file_is_byte_identical(case: str, memory: StagingMemory, tmp_path: Path) -> None:
    write = STAGED[case]()
    plain = written(write, tmp_path / "plain/checkpoint-5")
    torch.manual_seed(2)
    window = staged(write, tmp_path / "ours/checkpoint-5", memory)
    kept = {name for name in plain if not name.endswith((".json", ".md"))}
    assert {file.path for file in window.files} == kept
    assert kept
    assert not kept & contents(Path(window.folder)).keys(), "nothing is there before it is whole"
    assert written_later(window, memory) == plain


@pytest.mark.parametrize("case", ORDINARY)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_what_is_not_known_is_written_as_always(case: str, memory: StagingMemory, tmp_path: Path) -> None:
    write = ORDINARY[case]()
    plain = written(write, tmp_path / "plain/checkpoint-5")
    window = staged(write, tmp_path / "ours/checkpoint-5", memory)
    assert (window.files, memory.used) == ([], 0)
    assert contents(Path(window.folder)).keys() == plain.keys()


@pytest.mark.parametrize("alignment", [64, 4096])
@pytest.mark.parametrize("crc32", [True, False])
def test_options_of_the_process_are_those_of_the_save(
    *, alignment: int, crc32: bool, memory: StagingMemory, tmp_path: Path
) -> None:
    write = of(FLOATS)
    with torch_config.patch("save.storage_alignment", alignment), crc32_option(crc32):
        plain = written(write, tmp_path / "plain/checkpoint-5")
        window = staged(write, tmp_path / "ours/checkpoint-5", memory)
    # The writer's own defaults may differ.
    with torch_config.patch("save.storage_alignment", 128), crc32_option(not crc32):
        assert written_later(window, memory) == plain


@contextlib.contextmanager
def crc32_option(value: bool) -> Iterator[None]:
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(value)
    yield
    torch.serialization.set_crc32_options(before)


@pytest.mark.parametrize("room", [0, 100, 2_000, 5_000, 20_000])
@pytest.mark.parametrize("kind", ["torch", "safetensors"])
def test_a_file_that_does_not_fit_is_written_as_always(kind: str, room: int, tmp_path: Path) -> None:
    """The memory ends before the first byte, or in the middle of the file."""
    memory = StagingMemory(2**20)
    memory.capacity = room
    values = {str(at): FLOATS + at for at in range(5)}
    write = of(values) if kind == "torch" else tensors(values)
    plain = written(write, tmp_path / "plain/checkpoint-5")
    window = staged(write, tmp_path / "ours/checkpoint-5", memory)
    assert (window.files, memory.used) == ([], 0)
    assert contents(Path(window.folder)) == plain
    memory.close()


@pytest.mark.parametrize("kind", ["torch", "safetensors"])
def test_a_small_file_is_written_at_once(
    kind: str, memory: StagingMemory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recorders, "SMALL_FILE", 2**20)
    write = of(FLOATS) if kind == "torch" else tensors({"a": FLOATS})
    window = staged(write, tmp_path / "ours/checkpoint-5", memory)
    assert (window.files, memory.used) == ([], 0)
    assert contents(Path(window.folder)) == written(write, tmp_path / "plain/checkpoint-5")


@pytest.mark.parametrize("is_small", [True, False])
def test_an_exception_within_a_save_leaves_nothing_staged(
    *, is_small: bool, memory: StagingMemory, tmp_path: Path
) -> None:
    class Stubborn:
        def __reduce__(self) -> Any:
            raise ZeroDivisionError("a bug of the user")

    memory.capacity = 100 if is_small else memory.capacity

    def write(folder: Path) -> None:
        torch.save(FLOATS[0], folder / "first.pt")
        with pytest.raises(ZeroDivisionError):
            torch.save([FLOATS, Stubborn()], folder / "state.pt")
        torch.save(FLOATS[1], folder / "last.pt")

    window = staged(write, tmp_path / "ours/checkpoint-5", memory)
    assert [file.path for file in window.files] == ([] if is_small else ["first.pt", "last.pt"])
    found = written_later(window, memory)
    for name, at in (("first.pt", 0), ("last.pt", 1)):
        assert torch.equal(torch.load(io.BytesIO(found[name])), FLOATS[at])
    assert gc.isenabled()


@pytest.mark.parametrize("fails", [True, False], ids=["fails", "is small"])
def test_a_file_that_an_object_saves_while_it_is_pickled_stays_whole(
    *, fails: bool, memory: StagingMemory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the file of the object itself is not staged."""
    monkeypatch.setattr(recorders, "SMALL_FILE", FLOATS.nbytes)

    class Saves:
        def __reduce__(self) -> Any:
            torch.save(FLOATS, folder / "beside.pt")
            return (int, ())

    class Stubborn:
        def __reduce__(self) -> Any:
            raise ZeroDivisionError("a bug of the user")

    def write(folder: Path) -> None:
        with pytest.raises(ZeroDivisionError) if fails else contextlib.nullcontext():
            torch.save([Saves(), Stubborn() if fails else 5], folder / "state.pt")
        torch.save(-FLOATS, folder / "last.pt")

    folder = tmp_path / "checkpoint-5"
    window = staged(write, folder, memory)
    assert [file.path for file in window.files] == ["beside.pt", "last.pt"]
    found = written_later(window, memory)
    assert torch.equal(torch.load(io.BytesIO(found["beside.pt"])), FLOATS)
    assert torch.equal(torch.load(io.BytesIO(found["last.pt"])), -FLOATS)


@pytest.mark.parametrize("enabled", [True, False])
def test_the_garbage_collector_is_as_before(*, enabled: bool, memory: StagingMemory, tmp_path: Path) -> None:
    seen = []

    class Looks:
        def __reduce__(self) -> Any:
            seen.append(gc.isenabled())
            return (int, ())

    try:
        (gc.enable if enabled else gc.disable)()
        staged(of(Looks()), tmp_path / "checkpoint-5", memory)
        assert (gc.isenabled(), seen) == (enabled, [False])
    finally:
        gc.enable()


@pytest.fixture
def mesh() -> Iterator[DeviceMesh]:
    """Of one process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield DeviceMesh("cpu", [0])
    dist.destroy_process_group()


def test_tensors_of_a_mesh_are_byte_identical(
    mesh: DeviceMesh, memory: StagingMemory, tmp_path: Path
) -> None:
    write = of({"shard": distribute_tensor(FLOATS, mesh, [Shard(0)]), "plain": FLOATS})
    plain = written(write, tmp_path / "plain/checkpoint-5")
    window = staged(write, tmp_path / "ours/checkpoint-5", memory)
    assert written_later(window, memory) == plain


def test_a_tensor_that_changes_later_was_copied(memory: StagingMemory, tmp_path: Path) -> None:
    values = {"a": torch.zeros(1000), "b": torch.zeros(1000)}

    def write(folder: Path) -> None:
        torch.save(values, folder / "state.pt")
        save_file(values, folder / "model.safetensors")

    plain = written(write, tmp_path / "plain/checkpoint-5")
    window = staged(write, tmp_path / "ours/checkpoint-5", memory)
    values["a"].fill_(7.0)
    assert written_later(window, memory) == plain


def test_a_link_in_an_outbox_keeps_its_bytes(memory: StagingMemory, tmp_path: Path) -> None:
    """A writer that starts again writes over files to which the outbox may have a link."""
    write, folder = of(FLOATS), tmp_path / "checkpoint-5"
    window = staged(write, folder, memory)
    whole = written_later(window, memory)["state.pt"]
    os.link(folder / "state.pt", tmp_path / "link")
    memory.view(window.files[0].parts[-1][1], 1)[:] = b"?"
    write_file(folder / "state.pt", window.files[0], memory)
    assert (tmp_path / "link").read_bytes() == whole != (folder / "state.pt").read_bytes()


def written(write: Write, folder: Path) -> dict[str, bytes]:
    """What the framework writes."""
    folder.mkdir(parents=True)
    torch.manual_seed(2)
    write(folder)
    return contents(folder)


def staged(write: Write, folder: Path, memory: StagingMemory) -> Window:
    """The same in a window."""
    folder.mkdir(parents=True)
    window = Window(str(folder), memory)
    window.open()
    try:
        write(folder)
    finally:
        window.close()
    return window


def written_later(window: Window, memory: StagingMemory) -> dict[str, bytes]:
    """The folder once the writer is done with it; the description went through the memory, as to a process."""
    for file in window.files:
        write_file(Path(window.folder, file.path), StagedFile(**vars(file)), memory)
    return contents(Path(window.folder))


def contents(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()
    }
