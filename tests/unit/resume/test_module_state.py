"""What a model keeps beside its weights is named where it changes."""

from __future__ import annotations

import gc
import random
import weakref
from collections import deque
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from hf_cloudtrain.resume.module_state import (
    ModuleState,
    OptimizerState,
    bare_model,
    of_adapter,
    schedule_rules,
    tensors_in,
)
from hf_cloudtrain.resume.state_look import Looker, StateLook

GENERATOR = torch.Generator()


class Kept:
    count = 0


class Net(torch.nn.Module):
    """Has a part with a value, and uses it."""

    def __init__(self, value: Any = None) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(2, 2)
        self.value = value

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.layer(x)
        return result


class Outside(Net):
    """Draws from a generator of its module."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * torch.rand((), generator=GENERATOR)


class Bare(torch.nn.Module):
    """Has nothing of its own."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.rand((), generator=GENERATOR)


def renamed(net: Net, value: int) -> None:
    del net.value
    net.other = value


def with_buffer(*, persistent: bool, size: int = 2) -> Net:
    net = Net()
    net.register_buffer("mean", torch.zeros(size), persistent=persistent)
    return net


def hooked(chance: random.Random, net: Net | None = None) -> Net:
    net = net or Net()
    net.layer.register_forward_hook(lambda module, args, output: output * chance.random())
    return net


CHANGES: dict[str, tuple[Any, Any, str]] = {
    "int": (Net(0), lambda net: setattr(net, "value", 1), "'value' of Net"),
    "tensor": (Net(torch.zeros(1)), lambda net: net.value.add_(1), "'value' of Net"),
    "python": (Net(random.Random(0)), lambda net: net.value.random(), "'value' of Net"),
    "numpy": (Net(np.random.default_rng(0)), lambda net: net.value.random(), "'value' of Net"),
    "torch": (Net(torch.Generator()), lambda net: torch.rand(1, generator=net.value), "'value' of Net"),
    "list": (Net([]), lambda net: net.value.append(1.0), "'value' of Net"),
    "numpy array": (Net(np.zeros(1)), lambda net: net.value.__setitem__(0, 1), "'value' of Net"),
    "object": (Net(Kept()), lambda net: setattr(net.value, "count", 1), "'value' of Net"),
    "deque": (Net(deque([1.0], 1)), lambda net: net.value.append(2.0), "'value' of Net"),
    "buffer": (with_buffer(persistent=False), lambda net: net.mean.add_(1), ".mean of the model"),
    "large buffer": (
        with_buffer(persistent=False, size=2**20 + 1),
        lambda net: net.mean.add_(1),
        ".mean of the model",
    ),
    "new large buffer": (
        with_buffer(persistent=False, size=2**20 + 1),
        lambda net: setattr(net, "mean", net.mean + 1),
        ".mean of the model",
    ),
    "module": (
        Outside(),
        lambda net: net(torch.ones(2)),
        "'GENERATOR', which Outside of the model uses, changes",
    ),
    "frozen": (
        Net(),
        lambda net: net.layer.requires_grad_(False),
        "the choice of trained weights of 'layer'",
    ),
    "hook": (
        hooked(random.Random(0)),
        lambda net: net(torch.ones(2)),
        "'chance' of a hook of Linear of the model",
    ),
    "hook that removes itself": (
        hooked(random.Random(0)),
        lambda net: net.layer._forward_hooks.clear(),
        "'chance' of a hook of Linear of the model",
    ),
    "nothing before": (Net(), lambda net: setattr(net, "value", 1), "'value' of Net"),
    "new": (Net(), lambda net: setattr(net, "other", 1), "'other' of Net"),
    "gone": (Net(0), lambda net: delattr(net, "value"), "'value' of Net"),
    "another name": (Net(), lambda net: renamed(net, 1), "'other' of Net"),
    "of a library": (
        torch.nn.Sequential(torch.nn.Dropout(0.1)),
        lambda net: setattr(net[0], "p", 0.2),
        "'p' of Dropout (0)",
    ),
    "late buffer": (
        Net(),
        lambda net: net.register_buffer("late", torch.zeros(1), persistent=False),
        ".late of the model",
    ),
    "late hook": (Net(), lambda net: hooked(random.Random(0), net), "'chance' of a hook of Linear"),
    "late module": (
        Net(),
        lambda net: net.add_module("late", torch.nn.Linear(1, 1)),
        "'in_features' of Linear (late)",
    ),
    "module that is gone": (Net(), lambda net: delattr(net, "layer"), "'in_features' of Linear (layer)"),
    "late code": (
        torch.nn.Sequential(),
        lambda net: net.add_module("late", Bare()),
        "'GENERATOR', which Bare of the model uses, changes",
    ),
    "within": (torch.nn.Sequential(Net(0)), lambda net: setattr(net[0], "value", 1), "'value' of Net (0)"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_changes_is_named(name: str) -> None:
    net, change, word = CHANGES[name]
    state = ModuleState(net)
    assert state.look().exact is True
    change(net)
    assert state.look().exact is None
    assert word in str(state.look())


def test_a_module_that_is_replaced_by_an_equal_one_has_not_changed() -> None:
    net = Net(0)
    state = ModuleState(net)
    net.layer = torch.nn.Linear(2, 2)
    assert state.look().exact is True


def test_only_modules_that_may_have_changed_are_looked_into(monkeypatch: pytest.MonkeyPatch) -> None:
    """Training waits for it, and a large model has thousands of modules."""
    sizes = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 8}
    model = transformers.BertModel(transformers.BertConfig(**sizes))
    state, looked, see = ModuleState(model), [], ModuleState._seen

    def seen(self: ModuleState, path: str, module: Any) -> Any:
        looked.append(path)
        return see(self, path, module)

    monkeypatch.setattr(ModuleState, "_seen", seen)
    model.eval()
    assert state.look().exact is True
    assert looked == ["embeddings"], "it has buffers of its own"


def test_what_a_checkpoint_holds_may_change() -> None:
    net = with_buffer(persistent=True)
    state = ModuleState(net)
    net(torch.ones(2)).sum().backward()
    with torch.no_grad():
        net.layer.weight.add_(net.layer.weight.grad)
    net.mean.add_(1)
    net.eval()
    assert state.look().exact is True


class Decaying(torch.optim.SGD):
    calls = 0

    def step(self, closure: Any = None) -> None:
        self.calls += 1
        super().step(closure)


class Saved(Decaying):
    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "calls": self.calls}


@pytest.mark.parametrize(("kind", "exact"), [(torch.optim.SGD, True), (Decaying, None), (Saved, True)])
def test_an_optimizer_that_counts(kind: type[torch.optim.SGD], exact: bool | None) -> None:
    optimizer = kind(Net().parameters(), 0.1)
    state = OptimizerState(optimizer)
    optimizer.step()
    assert state.look().exact is exact


def test_the_rule_of_a_schedule_that_counts() -> None:
    calls = [0]

    def rule(step: int) -> float:
        calls[0] += 1
        return 1 / calls[0]

    optimizer = torch.optim.SGD(Net().parameters(), 0.1)
    plain = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    counts = torch.optim.lr_scheduler.LambdaLR(optimizer, rule)
    looks = [StateLook(Looker(), schedule_rules(one)) for one in (plain, counts)]
    optimizer.step()
    plain.step()
    counts.step()
    assert [look.look().exact for look in looks] == [True, None]


def test_trained_weights_beside_an_adapter() -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["layer"], r=2)
    model = peft.get_peft_model(torch.nn.Sequential(Net(), torch.nn.Linear(2, 1)), config)
    assert of_adapter(model).exact is True
    head = model.base_model.model[1]
    head.weight.requires_grad_(True)
    assert of_adapter(model).exact is False
    assert "1 trained tensor outside of the adapter, such as 'base_model.model.1.weight'" in str(
        of_adapter(model)
    )
    assert of_adapter(model, ["base_model.model.1.weight"]).exact is True


@pytest.mark.parametrize(("kind", "exact"), [("PromptTuningConfig", True), ("PromptEncoderConfig", False)])
def test_prompts_that_are_trained(kind: str, exact: bool) -> None:
    peft = pytest.importorskip("peft")
    config = transformers.GPT2Config(vocab_size=8, n_positions=8, n_embd=4, n_layer=1, n_head=1)
    prompts = getattr(peft, kind)(task_type="CAUSAL_LM", num_virtual_tokens=2)
    model = peft.get_peft_model(transformers.GPT2LMHeadModel(config), prompts)
    assert of_adapter(model).exact is exact


def test_the_tensors_of_a_model_are_its_parameters_and_buffers() -> None:
    norm = torch.nn.BatchNorm1d(2)
    model = torch.nn.Sequential(torch.nn.Linear(2, 2, bias=False), norm, Net(), norm)
    model.register_module("nothing", None)
    model.register_buffer("none", None)
    found = {id(tensor) for tensor in tensors_in(model)}
    assert found == {id(tensor) for tensor in (*model.parameters(), *model.buffers())}


class _Unwraps:
    """An Accelerator that counts."""

    def __init__(self) -> None:
        self.calls = 0

    def unwrap_model(self, model: Any) -> Any:
        self.calls += 1
        return getattr(model, "module", model)


def test_a_model_is_unwrapped_once_and_not_kept() -> None:
    accelerator, bare = _Unwraps(), Net()
    wrapped = torch.nn.DataParallel(bare)
    for _ in range(3):
        assert bare_model(accelerator, wrapped) is bare
        assert bare_model(accelerator, bare) is bare
        assert bare_model(accelerator, "no module") == "no module"
    assert accelerator.calls == 2 + 3
    gone = weakref.ref(wrapped), weakref.ref(bare)
    del wrapped, bare
    gc.collect()
    assert [one() for one in gone] == [None, None]
