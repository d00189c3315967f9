"""OutsideState: what a script holds in its variables, found where it changes and Accelerate does not save it."""

from __future__ import annotations

import copy
import random
from collections import deque
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from hf_cloudtrain.checkpoints.exactness import Exactness
from hf_cloudtrain.resume.outside_state import OutsideState

AVERAGE = torch.nn.Linear(2, 2)


def update_average() -> None:
    torch.nn.init.zeros_(AVERAGE.weight)


class Average:
    """A moving average as people write it: no module, and no way to save it."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.shadow = {name: value.clone() for name, value in model.named_parameters()}

    def update(self, model: torch.nn.Module) -> None:
        for name, value in model.named_parameters():
            self.shadow[name] = 0.9 * self.shadow[name] + 0.1 * value.data


class Centre(torch.nn.Module):
    """A loss with a buffer that follows the data."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("centre", torch.zeros(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.centre.mul_(0.9).add_(0.1 * x.detach().mean(0))
        return ((x - self.centre) ** 2).mean()


class Meter:
    """A mean for the log."""

    def __init__(self) -> None:
        self.sum: Any = 0

    def add(self, value: Any) -> None:
        self.sum += value


def accelerator_of(*models: Any, optimizers: Any = (), schedulers: Any = (), custom: Any = ()) -> Any:
    return SimpleNamespace(
        _models=list(models),
        _optimizers=list(optimizers),
        _schedulers=list(schedulers),
        _custom_objects=list(custom),
        _dataloaders=[],
        unwrap_model=lambda model: model,
        scaler=None,
        distributed_type="DistributedType.NO",
    )


def step_of(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> torch.Tensor:
    loss: torch.Tensor = model(torch.rand(3, 2)).pow(2).sum()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss


class TestFound:
    def test_a_copy_of_the_model_that_follows_it(self) -> None:
        model = torch.nn.Linear(2, 2)
        ema = copy.deepcopy(model)
        outside = OutsideState(accelerator_of(model))
        outside.begin()
        for parameter in ema.parameters():
            parameter.data.mul_(0.5)  # `data` leaves no trace in the version of the tensor
        found = outside.look()
        assert found.exact is None
        assert found.reason is not None
        assert "'ema'" in found.reason
        assert "accelerator.register_for_checkpointing(ema)" in found.reason

    def test_a_copy_in_a_variable_of_the_function_around(self) -> None:
        ema = torch.nn.Linear(2, 2)
        outside = OutsideState(accelerator_of(torch.nn.Linear(2, 2)))

        def train() -> Exactness:
            outside.begin()
            with torch.no_grad():
                ema.weight.add_(1)
            return outside.look()

        assert "'ema'" in str(train())

    def test_an_average_in_an_object_of_the_script(self) -> None:
        model = torch.nn.Linear(2, 2)
        average = Average(model)
        outside = OutsideState(accelerator_of(model))
        outside.begin()
        average.update(model)
        torch.nn.init.ones_(model.weight)
        average.update(model)
        assert "average.shadow['weight']" in str(outside.look())

    def test_the_attribute_of_a_trainer_class(self) -> None:
        class Trainer:
            def __init__(self) -> None:
                self.ema = torch.nn.Linear(2, 2)
                self.outside = OutsideState(accelerator_of(torch.nn.Linear(2, 2)))

            def train(self) -> Exactness:
                self.outside.begin()
                torch.nn.init.zeros_(self.ema.weight)
                return self.outside.look()

        assert "'self.ema'" in str(Trainer().train())

    def test_an_optimizer_and_its_schedule_that_are_not_prepared(self) -> None:
        model = torch.nn.Linear(2, 2)
        optimizer = torch.optim.AdamW(model.parameters())
        outside = OutsideState(accelerator_of(model))
        outside.begin()
        step_of(model, optimizer)
        assert "call accelerator.prepare(optimizer)" in str(outside.look())

    def test_a_schedule_of_a_prepared_optimizer(self) -> None:
        model = torch.nn.Linear(2, 2)
        optimizer = torch.optim.AdamW(model.parameters())
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
        outside = OutsideState(accelerator_of(model, optimizers=[optimizer]))
        outside.begin()
        step_of(model, optimizer)
        schedule.step()
        assert "'schedule'" in str(outside.look())

    def test_a_gradient_scaler(self) -> None:
        scaler = torch.amp.GradScaler("cpu")
        outside = OutsideState(accelerator_of(torch.nn.Linear(2, 2)))
        outside.begin()
        scaler.load_state_dict({**scaler.state_dict(), "_growth_tracker": 5})
        assert "'scaler'" in str(outside.look())

    def test_a_loss_with_a_buffer(self) -> None:
        loss = Centre()
        outside = OutsideState(accelerator_of(torch.nn.Linear(2, 2)))
        outside.begin()
        loss(torch.rand(4, 2))
        assert "'loss'" in str(outside.look())

    def test_a_tensor_that_is_changed_in_place(self) -> None:
        baseline = torch.zeros(3)
        outside = OutsideState(accelerator_of(torch.nn.Linear(2, 2)))
        outside.begin()
        baseline += 1
        assert "the tensor 'baseline', which changes" in str(outside.look())

    def test_parameters_of_a_loss_that_only_the_optimizer_knows_are_not_exact(self) -> None:
        model, loss = torch.nn.Linear(2, 2), torch.nn.Linear(2, 1)
        optimizer = torch.optim.AdamW([*model.parameters(), *loss.parameters()])
        outside = OutsideState(accelerator_of(model, optimizers=[optimizer]))
        outside.begin()
        step_of(torch.nn.Sequential(model, loss), optimizer)
        assert outside.look().exact is False
        kept = OutsideState(accelerator_of(model, optimizers=[optimizer], custom=[loss]))
        kept.begin()
        assert kept.look().exact is True

    @pytest.mark.parametrize("saves", range(1, 6))
    def test_parameters_that_come_to_the_optimizer_after_some_saves(self, saves: int) -> None:
        model, late = torch.nn.Linear(2, 2), torch.nn.Linear(2, 1)
        optimizer = torch.optim.SGD(model.parameters())
        outside = OutsideState(accelerator_of(model, optimizers=[optimizer]))
        outside.begin()
        for _ in range(saves):
            assert outside.look().exact is not False
        model.late = torch.nn.Linear(2, 1)
        optimizer.add_param_group({"params": list(model.late.parameters())})
        assert outside.look().exact is not False, "the model holds them"
        optimizer.add_param_group({"params": list(late.parameters())})
        assert outside.look().exact is False

    def test_a_counter(self) -> None:
        calls, outside = 0, OutsideState(accelerator_of(torch.nn.Linear(2, 2)))
        outside.begin()
        for _ in range(3):
            calls += 2
        assert "the counter 'calls' starts over" in str(outside.look())

    def test_an_attribute_that_a_method_counts(self) -> None:
        class Trainer:
            def __init__(self) -> None:
                self.calls, self.step, self.weight = 0, 0, 1.0
                self.outside = OutsideState(accelerator_of(torch.nn.Linear(2, 2)))

            def one(self, step: int) -> None:
                self.step = step
                self.calls += 1

            def two(self) -> None:
                self.weight *= 0.9

            def train(self, one: bool) -> Exactness:
                self.outside.begin()
                for step in range(3):
                    self.one(step) if one else self.two()
                return self.outside.look()

        assert "the counter 'self.calls' starts over" in str(Trainer().train(one=True))
        assert "'self.weight' starts over" in str(Trainer().train(one=False))

    def test_a_factor_that_falls(self) -> None:
        weight, outside = 1.0, OutsideState(accelerator_of(torch.nn.Linear(2, 2)))
        outside.begin()
        for _ in range(3):
            weight *= 0.9
        assert "'weight' starts over" in str(outside.look())

    def test_a_memory_of_batches(self) -> None:
        memory: deque[Any] = deque(maxlen=2)
        losses: deque[float] = deque(maxlen=2)
        outside = OutsideState(accelerator_of(torch.nn.Linear(2, 2)))
        outside.begin()
        losses.append(1.0)
        assert outside.look().exact is True
        memory.append({"x": torch.ones(2)})
        assert "the tensors in 'memory'" in str(outside.look())

    def test_an_average_that_only_a_helper_knows(self) -> None:
        outside = OutsideState(accelerator_of(torch.nn.Linear(2, 2)))
        outside.begin()
        update_average()
        assert "'AVERAGE'" in str(outside.look())

    def test_an_average_that_only_a_closure_knows(self) -> None:
        def update_of(ema: torch.nn.Linear) -> Callable[[], object]:
            return lambda: torch.nn.init.zeros_(ema.weight)

        update = update_of(torch.nn.Linear(2, 2))
        outside = OutsideState(accelerator_of(torch.nn.Linear(2, 2)))
        outside.begin()
        update()
        assert "'ema'" in str(outside.look())

    @pytest.mark.parametrize(
        ("generator", "draw"),
        [
            (torch.Generator(), lambda it: torch.rand(1, generator=it)),
            (random.Random(0), lambda it: it.random()),
            (np.random.default_rng(0), lambda it: it.random()),
        ],
        ids=["torch", "python", "numpy"],
    )
    def test_a_generator_in_a_variable(self, generator: Any, draw: Callable[[Any], object]) -> None:
        outside = OutsideState(accelerator_of(torch.nn.Linear(2, 2)))
        outside.begin()
        assert outside.look().exact is True
        draw(generator)
        assert "the generator 'generator' starts over" in str(outside.look())

    def test_an_iterator_in_a_variable(self) -> None:
        others, outside = iter([1, 2]), OutsideState(accelerator_of(torch.nn.Linear(2, 2)))
        outside.begin()
        assert "the iterator 'others' starts over" in str(outside.look())
        assert next(others) == 1

    def test_a_loader_of_persistent_processes_that_was_read(self) -> None:
        held_out = torch.utils.data.DataLoader([1, 2], num_workers=1, persistent_workers=True)  # type: ignore[arg-type]
        outside = OutsideState(accelerator_of(torch.nn.Linear(2, 2)))
        outside.begin()
        assert outside.look().exact is True
        assert len(list(held_out)) == 2
        assert "the processes of 'held_out' stay" in str(outside.look())

    def test_a_counter_that_is_set_to_a_sum(self) -> None:
        calls, outside = 0, OutsideState(accelerator_of(torch.nn.Linear(2, 2)))
        outside.begin()
        for _ in range(3):
            calls = calls + 1
        assert "the counter 'calls' starts over" in str(outside.look())

    def test_an_average_that_begins_with_the_first_step(self) -> None:
        average: dict[str, torch.Tensor] = {}
        outside = OutsideState(accelerator_of(torch.nn.Linear(2, 2)))
        outside.begin()
        average["weight"] = torch.ones(2)
        assert outside.look().exact is True
        average["weight"] = 0.9 * average["weight"]
        assert "average['weight']" in str(outside.look())

    def test_an_average_of_numpy_in_an_object_with_a_state(self) -> None:
        class Average:
            def __init__(self) -> None:
                self.mean = np.zeros(2)

            def state_dict(self) -> dict[str, Any]:
                return {"mean": self.mean}

            def load_state_dict(self, state: dict[str, Any]) -> None: ...

        average, outside = Average(), OutsideState(accelerator_of(torch.nn.Linear(2, 2)))
        outside.begin()
        average.mean += 1
        assert "'average' (Average)" in str(outside.look())

    def test_a_buffer_of_the_model_that_is_not_persistent(self) -> None:
        model = torch.nn.Linear(2, 2)
        model.register_buffer("mean", torch.zeros(1), persistent=False)
        outside = OutsideState(accelerator_of(model))
        outside.begin()
        model.mean.add_(1)
        assert ".mean of the model changes" in str(outside.look())

    def test_what_was_found_once_stays_found(self) -> None:
        ema = torch.nn.Linear(2, 2)
        outside = OutsideState(accelerator_of(torch.nn.Linear(2, 2)))
        outside.begin()
        torch.nn.init.zeros_(ema.weight)
        assert outside.look().exact is None
        del ema
        assert outside.look().exact is None


class TestNotFound:
    def test_the_generator_of_a_loader_which_the_position_has(self) -> None:
        generator = torch.Generator()
        loader = torch.utils.data.DataLoader([1, 2], shuffle=True, generator=generator)  # type: ignore[arg-type]
        outside = OutsideState(accelerator_of(torch.nn.Linear(2, 2)))
        outside.begin()
        assert len(list(loader)) == 2
        assert outside.look().exact is True

    def test_the_best_value_so_far(self) -> None:
        best, outside = 1.0, OutsideState(accelerator_of(torch.nn.Linear(2, 2)))
        outside.begin()
        for value in (0.5, 0.7):
            best = min(best, value)
        assert (best, outside.look().exact) == (0.5, True)

    def test_what_accelerate_saves(self) -> None:
        model = torch.nn.Linear(2, 2)
        optimizer = torch.optim.AdamW(model.parameters())
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
        ema = torch.optim.swa_utils.AveragedModel(model)
        parts = {"model": model, "optimizer": optimizer}
        outside = OutsideState(
            accelerator_of(model, optimizers=[optimizer], schedulers=[schedule], custom=[ema])
        )
        outside.begin()
        step_of(model, optimizer)
        schedule.step()
        ema.update_parameters(model)
        assert parts
        assert outside.look().exact is True

    def test_what_does_not_change(self) -> None:
        teacher, loss = torch.nn.Linear(2, 2), torch.nn.CrossEntropyLoss(weight=torch.ones(2))
        scale, names = torch.tensor([1.0]), [torch.ones(2)]
        outside = OutsideState(accelerator_of(torch.nn.Linear(2, 2)))
        outside.begin()
        assert loss(teacher(scale * names[0]), torch.ones(2)) is not None
        assert outside.look().exact is True

    def test_tensors_of_a_batch_and_means_for_the_log(self) -> None:
        model, meter, total, losses = torch.nn.Linear(2, 2), Meter(), 0, []
        outside = OutsideState(accelerator_of(model))
        outside.begin()
        for _ in range(3):
            batch = {"x": torch.rand(3, 2)}
            loss = model(batch["x"]).sum().detach()
            total += loss
            meter.add(loss)
            losses.append(loss)
            assert outside.look().exact is True

    def test_a_module_of_an_own_parameter_list_is_read_without_drawing_random_numbers(self) -> None:
        class Drawing:
            def state_dict(self) -> dict[str, float]:
                return {"drawn": 0 * float(torch.rand(()))}

            def load_state_dict(self, state: dict[str, float]) -> None: ...

        drawing = Drawing()
        outside = OutsideState(accelerator_of(torch.nn.Linear(2, 2)))
        before = torch.get_rng_state()
        outside.begin()
        assert outside.look().exact is True
        assert torch.equal(torch.get_rng_state(), before)
        assert drawing

    def test_a_count_of_each_epoch_and_the_number_of_a_batch(self) -> None:
        outside = OutsideState(accelerator_of(torch.nn.Linear(2, 2)))
        for _epoch in range(2):
            correct = 0
            outside.begin()
            for _number, hit in enumerate([1, 0, 1]):
                correct += hit
                assert outside.look().exact is True
            assert correct == 2

    def test_an_object_that_cannot_be_read_does_not_end_the_training(self) -> None:
        class Broken:
            def state_dict(self) -> dict[str, float]:
                raise RuntimeError("not now")

            def load_state_dict(self, state: dict[str, float]) -> None: ...

        broken = Broken()
        outside = OutsideState(accelerator_of(torch.nn.Linear(2, 2)))
        outside.begin()
        assert outside.look().exact is True
        assert broken


@pytest.mark.parametrize("wrap", [list, tuple])
def test_a_copy_in_a_container_is_found(wrap: Any) -> None:
    copies = wrap([torch.nn.Linear(2, 2)])
    outside = OutsideState(accelerator_of(torch.nn.Linear(2, 2)))
    outside.begin()
    torch.nn.init.zeros_(copies[0].weight)
    assert "'copies[0]'" in str(outside.look())
