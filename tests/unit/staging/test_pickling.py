"""The faster pickler makes the bytes of torch's own, and asks torch only where it must."""

from __future__ import annotations

import copyreg
import pickle
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import serialization

from hf_cloudtrain.staging.pickling import FAST_PICKLE

FLOATS = torch.arange(40.0).view(5, 8)


class Archive:
    """Keeps the records of one file."""

    def __init__(self) -> None:
        self.records: list[tuple[str, bytes]] = []

    def write_record(self, name: str, data: Any, size: int) -> None:
        if isinstance(data, torch.UntypedStorage):
            data = bytes(data.tolist())
        self.records.append((name, data.encode() if isinstance(data, str) else data[:size]))


class Marked(torch.Tensor):
    """A subclass, which is pickled by its name."""


class Words(OrderedDict):  # type: ignore[type-arg]
    """A subclass, which is pickled by its name."""


def with_attribute() -> torch.Tensor:
    tensor = FLOATS.clone()
    tensor.origin = "corpus"  # type: ignore[attr-defined]
    return tensor


def with_metadata() -> OrderedDict[str, Any]:
    state = torch.nn.BatchNorm1d(3).state_dict()
    assert vars(state)
    empty: OrderedDict[str, Any] = OrderedDict()
    empty.note = 5  # type: ignore[attr-defined]
    return OrderedDict(state=state, empty=empty, plain=OrderedDict(), words=Words(a=1))


def of_adamw(count: int) -> dict[str, Any]:
    weights = [torch.nn.Parameter(torch.ones(2)) for _ in range(count)]
    optimizer = torch.optim.AdamW(weights)
    for weight in weights:
        weight.grad = torch.ones(2)
    optimizer.step()
    return optimizer.state_dict()


def tensors_and_storages() -> list[Any]:
    numbers = torch.arange(5, dtype=torch.uint8)
    return [numbers, numbers.untyped_storage(), FLOATS[1:], torch.ones(2).storage(), FLOATS]


VALUES: dict[str, Callable[[], Any]] = {
    "AdamW": lambda: of_adamw(1_100),
    "the same tensor twice": lambda: [FLOATS, {"again": FLOATS}, FLOATS],
    "views": lambda: [FLOATS[1:], FLOATS.t(), FLOATS[::2, ::3], FLOATS.view(-1), FLOATS[2, 2]],
    "gradients": lambda: [FLOATS.clone().requires_grad_(), torch.nn.Parameter(FLOATS)],
    "not a leaf": lambda: FLOATS.clone().requires_grad_() * 2,
    "attributes": with_attribute,
    "ordered dictionaries": with_metadata,
    "subclass": lambda: [FLOATS.as_subclass(Marked), FLOATS],  # type: ignore[arg-type]
    "conjugate and negative": lambda: [
        torch.complex(FLOATS, FLOATS).conj(),
        torch.complex(FLOATS, FLOATS).conj().imag,
    ],
    "every dtype": lambda: [
        FLOATS.to(dtype)
        for dtype in vars(torch).values()
        if isinstance(dtype, torch.dtype) and dtype in {*_plain_dtypes()}
    ],
    "empty": lambda: [torch.empty(0), torch.empty(0, dtype=torch.int8), torch.empty(2, 0), torch.tensor(1)],
    "meta first": lambda: [torch.empty(2, device="meta"), FLOATS],
    "storages": tensors_and_storages,
    "storages only": lambda: [FLOATS.untyped_storage(), torch.ones(2).storage()],
    "sparse": lambda: [FLOATS.to_sparse(), FLOATS.to_sparse_csr(), FLOATS],
    "quantised": lambda: [torch.quantize_per_tensor(FLOATS, 0.1, 3, torch.qint8), FLOATS],
    "no tensor": lambda: {"step": 5, "kind": torch.float16, "size": torch.Size([2])},
}


def _plain_dtypes() -> set[torch.dtype]:
    floats = {torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn}
    ints = {torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint32}
    return {*floats, *ints, torch.bool, torch.complex64, torch.complex128}


def records(value: Any, module: Any, protocol: int = 2) -> list[tuple[str, bytes]]:
    archive = Archive()
    serialization._save(value, archive, module, protocol, False)
    return archive.records


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("case", VALUES)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_records_are_those_of_torch(case: str, protocol: int) -> None:
    value = VALUES[case]()
    plain = records(value, pickle, protocol)
    assert records(value, FAST_PICKLE, protocol) == plain


@pytest.mark.parametrize("module", [pickle, FAST_PICKLE], ids=["torch", "ours"])
def test_one_storage_of_two_types_is_refused_as_torch_does(module: Any) -> None:
    value = [FLOATS, FLOATS.view(torch.int32)]
    with pytest.raises(RuntimeError, match="view the same data as different types"):
        records(value, module)


def test_torch_names_the_first_storage_of_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = count_questions(monkeypatch)
    records(of_adamw(50), FAST_PICKLE)
    assert len(asked) == 1


def test_torch_names_all_storages_where_a_script_has_names_of_its_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def tag(storage: Any) -> str | None:
        return "cpu" if storage.nbytes() else "nowhere"

    monkeypatch.setattr(serialization, "_package_registry", list(serialization._package_registry))
    serialization.register_package(1, tag, lambda storage, location: None)
    value = [*of_adamw(5)["state"].values(), torch.empty(0)]
    plain = records(value, pickle)
    assert b"nowhere" in plain[0][1]
    asked = count_questions(monkeypatch)
    assert records(value, FAST_PICKLE) == plain
    assert len(asked) == 3 * 5 + 1


def test_torch_names_all_storages_if_it_does_so_in_a_different_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a later release may."""
    monkeypatch.setattr(serialization, "location_tag", lambda storage: "main memory")
    value = of_adamw(5)
    plain = records(value, pickle)
    assert records(value, FAST_PICKLE) == plain
    assert plain[0][1].count(b"main memory") == 1, "its name is in there, and the others refer to it"


def test_what_a_script_has_registered_for_a_type_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(copyreg.dispatch_table, OrderedDict, lambda value: (dict, ()))
    found = records(FLOATS, FAST_PICKLE)
    assert b"OrderedDict" not in found[0][1]


def count_questions(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The storages that torch names itself."""
    asked: list[Any] = []
    real = serialization.location_tag

    def location_tag(storage: Any) -> str:
        asked.append(storage)
        return real(storage)

    monkeypatch.setattr(serialization, "location_tag", location_tag)
    return asked
