"""TrainLoop: scripts that count for themselves, and state that Accelerate does not hold. Exact, or said so."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, GradientAccumulationPlugin, set_seed
from torch.utils.data import DataLoader, TensorDataset

from hf_cloudtrain.checkpoints.catalog import Catalog
from hf_cloudtrain.integrations.loop.loop import TrainLoop
from hf_cloudtrain.resume.outside_state import OutsideState
from hf_cloudtrain.storage.client import Storage
from tests.integration import _loops
from tests.integration._loops import KilledError, Rows, difference

pytestmark = pytest.mark.filterwarnings("ignore:'set_vital' is deprecated:UserWarning")


@pytest.fixture(autouse=True)
def _alone() -> Any:
    _loops.forget_accelerate()
    yield
    _loops.forget_accelerate()


Body = Callable[[TrainLoop, Any, int, torch.Tensor, Any], None]
"""Takes the loop, the accelerator, the script's own index, the loss and the optimizer."""


def by_own_index(n: int, at: int) -> Body:
    """The pattern of Accelerate's examples: the script numbers the batches."""

    def body(loop: TrainLoop, accelerator: Any, index: int, loss: torch.Tensor, optimizer: Any) -> None:
        accelerator.backward(loss / n)
        if index % n == at:
            optimizer.step()
            optimizer.zero_grad()

    return body


def by_batch_index(n: int, at: int) -> Body:
    def body(loop: TrainLoop, accelerator: Any, index: int, loss: torch.Tensor, optimizer: Any) -> None:
        by_own_index(n, at)(loop, accelerator, loop.batch_index, loss, optimizer)

    return body


def train(
    run: Path,
    output_dir: Path,
    body: Body,
    *,
    kill: int | None = None,
    rows: int = 64,
    epochs: int = 2,
    save_steps: int | None = 4,
    seed: int = 1,
    stateful: bool = False,
    evaluates: bool = False,
    plugin: Any = None,
    average: bool | None = None,
) -> tuple[dict[str, torch.Tensor], list[int], TrainLoop]:
    """One attempt: weights, the loop's step as the script sees it in each batch, and the loop.

    Args:
        average: keep an average of the weights in a variable, and return it as the weights; True registers it.
    """
    _loops.forget_accelerate()
    set_seed(seed)
    accelerator = Accelerator(
        cpu=True,
        dataloader_config=DataLoaderConfiguration(use_stateful_dataloader=stateful),
        **({"gradient_accumulation_plugin": plugin} if plugin else {}),
    )
    model: Any = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.Dropout(0.3), torch.nn.Linear(8, 1))
    optimizer: Any = torch.optim.AdamW(model.parameters(), lr=0.05)
    batches: Any = DataLoader(Rows(rows), batch_size=4, shuffle=True)
    held_out: Any = DataLoader(TensorDataset(torch.arange(16.0)), batch_size=4)
    model, optimizer, batches, held_out = accelerator.prepare(model, optimizer, batches, held_out)
    ema = copy.deepcopy(model) if average is not None else None
    if average:
        accelerator.register_for_checkpointing(ema)
    loop = TrainLoop(accelerator, str(run), num_epochs=epochs, save_steps=save_steps, output_dir=output_dir)
    steps: list[int] = []
    for _epoch in loop.epochs():
        model.train()
        for index, batch in enumerate(loop.steps(batches)):
            loss = ((model(batch["x"]) - batch["x"].sum(1, keepdim=True)) ** 2).mean()
            body(loop, accelerator, index, loss, optimizer)
            steps.append(loop.global_step)
            if ema is not None:
                for mean, value in zip(ema.parameters(), model.parameters(), strict=True):
                    mean.data.mul_(0.9).add_(value.data, alpha=0.1)
            if kill is not None and loop.global_step == kill:
                loop._checkpointer.wait()
                raise KilledError(steps)
        if evaluates:
            for _ in loop.eval_batches(held_out):
                pass
        loop.end_epoch({"loss": 1.0})
    bare = accelerator.unwrap_model(model if ema is None else ema).state_dict()
    return {name: value.clone() for name, value in bare.items()}, steps, loop


def through_a_kill(folder: Path, body: Body, *, kill: int, **arguments: Any) -> tuple[float, list[Any]]:
    """The difference to an uninterrupted run, and the manifests of the run."""
    whole, _, loop = train(folder / "plain", folder / "whole", body, **arguments)
    with pytest.raises(KilledError):
        train(folder / "run", folder / "one", body, kill=kill, **arguments)
    resumed, _, again = train(folder / "run", folder / "two", body, **{**arguments, "seed": 9})
    gap = difference(whole, resumed)
    assert gap > 0 or again.global_step == loop.global_step
    return gap, manifests(folder / "run")


def manifests(run: Path) -> list[Any]:
    catalog = Catalog(Storage(str(run)))
    return [catalog.read(key) for key in catalog.checkpoints()]


class TestAccumulationByTheScript:
    @pytest.mark.parametrize(
        ("n", "at", "rows", "kill"), [(2, 0, 64, 6), (4, 3, 64, 5), (3, 0, 44, 7), (3, 2, 44, 7)]
    )
    def test_law_7_it_is_exact_by_the_loops_index(
        self, tmp_path: Path, n: int, at: int, rows: int, kill: int
    ) -> None:
        gap, found = through_a_kill(
            tmp_path, by_batch_index(n, at), kill=kill, rows=rows, save_steps=2, epochs=3
        )
        assert gap == 0.0
        assert all(manifest.exact for manifest in found)

    def test_steps_of_the_optimizer_are_counted_and_not_batches(self, tmp_path: Path) -> None:
        _, steps, loop = train(tmp_path / "run", tmp_path / "out", by_batch_index(2, 0))
        assert steps[:5] == [0, 1, 1, 2, 2], "as a script sees it within the body"
        assert loop.global_step == 16
        found = manifests(tmp_path / "run")
        assert {manifest.step for manifest in found} <= {4, 8, 12, 16}
        assert {manifest.position.max_steps for manifest in found} == {16}

    def test_the_checkpoint_of_an_epoch_holds_the_gradients_that_wait_for_the_next(
        self, tmp_path: Path
    ) -> None:
        train(tmp_path / "run", tmp_path / "out", by_batch_index(2, 0), epochs=1)
        record = torch.load(tmp_path / "out" / "checkpoint-8" / "loop_state_0.pt", weights_only=True)
        assert list(record["gradients"]) == [0]

    def test_a_count_of_the_script_that_starts_over_within_an_epoch_is_not_exact(
        self, tmp_path: Path
    ) -> None:
        gap, found = through_a_kill(tmp_path, by_own_index(2, 0), kill=6, epochs=1)
        assert gap > 0
        assert found[0].exact is False
        assert "loop.batch_index" in str(found[0].inexact_reason)

    def test_a_count_of_the_script_is_exact_where_its_period_divides_the_position(
        self, tmp_path: Path
    ) -> None:
        gap, found = through_a_kill(tmp_path, by_own_index(4, 3), kill=3, save_steps=2)
        assert gap == 0.0
        assert all(manifest.exact for manifest in found)

    def test_a_step_that_depends_on_something_else_is_not_verified(self, tmp_path: Path) -> None:
        def body(loop: TrainLoop, accelerator: Any, index: int, loss: torch.Tensor, optimizer: Any) -> None:
            accelerator.backward(loss)
            if index not in (2, 3, 7):
                optimizer.step()
                optimizer.zero_grad()

        train(tmp_path / "run", tmp_path / "out", body, epochs=1, save_steps=None)
        assert manifests(tmp_path / "run")[0].exact is None

    def test_a_step_after_the_last_batch_is_counted(self, tmp_path: Path) -> None:
        at_the_end: list[Any] = []

        def body(loop: TrainLoop, accelerator: Any, index: int, loss: torch.Tensor, optimizer: Any) -> None:
            by_batch_index(3, 2)(loop, accelerator, index, loss, optimizer)
            at_the_end[:] = [optimizer]

        end_epoch = TrainLoop.end_epoch

        def step_first(loop: TrainLoop, metrics: Any = None) -> None:
            at_the_end[0].step()
            at_the_end[0].zero_grad()
            end_epoch(loop, metrics)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(TrainLoop, "end_epoch", step_first)
            _, _, loop = train(tmp_path / "run", tmp_path / "out", body, rows=44, save_steps=None)
        assert loop.global_step == 2 * 4, "three of nine batches, and one of the last two"
        record = torch.load(tmp_path / "out" / "checkpoint-8" / "loop_state_0.pt", weights_only=True)
        assert "gradients" not in record


def test_law_7_an_epoch_that_ends_within_an_accumulation_is_exact(tmp_path: Path) -> None:
    def body(loop: TrainLoop, accelerator: Any, index: int, loss: torch.Tensor, optimizer: Any) -> None:
        with accelerator.accumulate():
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()

    plugin = GradientAccumulationPlugin(num_steps=2, sync_with_dataloader=False)
    gap, found = through_a_kill(tmp_path, body, kill=3, rows=20, epochs=3, save_steps=None, plugin=plugin)
    assert gap == 0.0
    assert all(manifest.exact for manifest in found)
    assert found[0].step == 2, "five batches: the fifth waits for the next epoch"


def every_batch(loop: TrainLoop, accelerator: Any, index: int, loss: torch.Tensor, optimizer: Any) -> None:
    accelerator.backward(loss)
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("kill", [2, 5])
def test_law_7_stateful_loaders_are_exact_with_an_evaluation(tmp_path: Path, kill: int) -> None:
    arguments: dict[str, Any] = {"rows": 20, "save_steps": 2, "epochs": 3}
    gap, found = through_a_kill(tmp_path, every_batch, kill=kill, stateful=True, evaluates=True, **arguments)
    assert gap == 0.0
    assert all(manifest.exact for manifest in found)


def test_a_look_that_fails_ends_no_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: Any) -> None:
        raise RuntimeError("not now")

    monkeypatch.setattr(OutsideState, "begin", fail)
    train(tmp_path / "run", tmp_path / "out", every_batch, rows=8, epochs=1, save_steps=None)
    assert manifests(tmp_path / "run")[0].inexact_reason == "a look at it ended with RuntimeError: not now"


@pytest.mark.parametrize(("registered", "exact"), [(False, None), (True, True)])
def test_an_average_of_the_weights_is_exact_where_accelerate_saves_it(
    tmp_path: Path, registered: bool, exact: bool | None
) -> None:
    gap, found = through_a_kill(tmp_path, every_batch, kill=3, rows=20, save_steps=2, average=registered)
    assert (gap == 0.0) is bool(exact)
    assert {manifest.exact for manifest in found} == {exact}
    assert registered or "register_for_checkpointing(ema)" in str(found[0].inexact_reason)
