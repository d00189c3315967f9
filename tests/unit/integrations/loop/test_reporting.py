"""What a loop reports: means without a device sync a step, and how they look on the bar."""

from __future__ import annotations

import json
import math
import os
import re
from typing import Any

import numpy as np
import pytest
import torch

from hf_cloudtrain.errors import ConfigurationError
from hf_cloudtrain.integrations.loop.reporting import LoopLog, number, shown, train_bar


@pytest.fixture
def log() -> LoopLog:
    return LoopLog()


class TestMeans:
    def test_an_interval_holds_the_values_since_the_last_one_and_an_epoch_all_of_them(
        self, log: LoopLog
    ) -> None:
        for loss in (1.0, 2.0):
            log.add({"loss": loss})
        assert log.interval() == {"loss": 1.5}
        log.add({"loss": 6.0})
        assert log.interval() == {"loss": 6.0}
        assert log.interval() == {}
        assert log.epoch() == {"loss": 3.0}
        assert log.epoch() == {}

    def test_each_name_has_a_count_of_its_own(self, log: LoopLog) -> None:
        log.add({"loss": 1.0, "accuracy": 1})
        log.add({"loss": 3.0})
        assert log.interval() == {"loss": 2.0, "accuracy": 1.0}

    def test_numbers_and_tensors_of_one_name_keep_their_order_and_weight(self, log: LoopLog) -> None:
        for value in (1.0, torch.tensor(2.0), np.float32(3), torch.tensor([4.0, 8.0])):
            log.add({"loss": value})
        assert log.interval() == {"loss": (1 + 2 + 3 + 6) / 4}

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.bool])
    def test_a_tensor_may_be_of(self, log: LoopLog, dtype: torch.dtype) -> None:
        log.add({"loss": torch.ones(2, dtype=dtype)})
        assert log.interval() == {"loss": 1.0}

    def test_without_values_there_are_no_means(self, log: LoopLog) -> None:
        log.add({})
        assert log.interval() == log.epoch() == {}

    def test_forgotten_values_are_in_no_mean(self, log: LoopLog) -> None:
        log.add({"loss": 100.0})
        log.forget()
        log.add({"loss": 1.0})
        assert log.interval() == log.epoch() == {"loss": 1.0}

    def test_a_value_that_is_neither_number_nor_tensor_is_refused_by_name(self, log: LoopLog) -> None:
        with pytest.raises(ConfigurationError, match=r"log\(loss='low'\)"):
            log.add({"loss": "low"})


class TestLaw12Cheap:
    def test_a_tensor_is_not_read_before_the_report(
        self, log: LoopLog, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        reads: list[int] = []
        for name in ("item", "tolist", "__float__", "cpu"):
            monkeypatch.setattr(torch.Tensor, name, _counted(getattr(torch.Tensor, name), reads))
        for step in range(5):
            log.add({"loss": torch.tensor(float(step)), "norm": torch.tensor(1.0)})
        assert reads == []
        log.interval()
        assert len(reads) == 2, "one read a name, whatever the number of steps"

    def test_the_graph_of_a_tensor_is_not_kept(self, log: LoopLog) -> None:
        loss = torch.ones(1, requires_grad=True) * 2
        log.add({"loss": loss})
        assert not log._unread["loss"][0].requires_grad

    def test_values_are_dropped_after_they_were_read(self, log: LoopLog) -> None:
        log.add({"loss": torch.tensor(1.0)})
        log.interval()
        assert log._unread == {}


class TestState:
    def test_a_new_process_continues_with_the_sums(self, log: LoopLog) -> None:
        log.add({"loss": torch.tensor(1.0)})
        log.interval()
        log.add({"loss": 3.0})
        other = LoopLog()
        other.load_state_dict(json.loads(json.dumps(log.state_dict())))
        other.add({"loss": 8.0})
        assert other.interval() == {"loss": 5.5}
        assert other.epoch() == {"loss": 4.0}

    def test_a_nan_goes_through(self, log: LoopLog) -> None:
        log.add({"loss": math.nan})
        other = LoopLog()
        other.load_state_dict(json.loads(json.dumps(log.state_dict())))
        assert math.isnan(other.epoch()["loss"])

    @pytest.mark.parametrize(
        "damaged",
        [
            None,
            [],
            {"interval": 3},
            {"epoch": {"loss": [1.0]}},
            {"epoch": {"loss": ["1", 1]}},
            {"epoch": {"loss": 2}},
        ],
    )
    def test_damaged_sums_are_dropped(self, log: LoopLog, damaged: Any) -> None:
        log.load_state_dict(damaged)
        assert log.interval() == log.epoch() == {}

    def test_intact_sums_beside_damaged_ones_are_kept(self, log: LoopLog) -> None:
        log.load_state_dict({"epoch": {"loss": [6.0, 3], "norm": None}, "interval": None})
        assert log.epoch() == {"loss": 2.0}

    def test_a_sum_of_nothing_has_no_mean(self, log: LoopLog) -> None:
        log.load_state_dict({"epoch": {"loss": [0.0, 0]}})
        assert log.epoch() == {}


class TestShown:
    @pytest.mark.parametrize(
        ("value", "text"),
        [(2.5612, "2.56"), (7.8e-6, "7.8e-6"), (1e-12, "1e-12"), (0.0, "0"), (12345.0, "1.23e+04")],
    )
    def test_a_number_is_short(self, value: float, text: str) -> None:
        assert shown({"loss": value}) == {"loss": text}

    def test_the_bar_shows_epoch_phase_and_values(self, capsys: pytest.CaptureFixture[str]) -> None:
        with train_bar(0, "TRAIN", 4387, 520, hidden=False) as bar:
            bar.set_postfix(shown({"loss": 2.5612, "lr": 7.8e-6}))
        text = capsys.readouterr().err.replace("\r", "\n")
        assert re.search(r"\[Epoch 0\] \[TRAIN\]:  12%\|█[^|]*\| 520/4387 \[", text)
        assert "loss=2.56, lr=7.8e-6]" in text

    def test_a_terminal_of_80_columns_shows_all_values(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(os, "get_terminal_size", lambda *_: os.terminal_size((80, 24)))
        with train_bar(12, "TRAIN", 438_700, 52_000, hidden=False) as bar:
            bar.set_postfix(shown({"loss": 2.5612, "lr": 7.8e-6}))
            text = bar.format_meter(**{**bar.format_dict, "ncols": 80, "elapsed": 700.0, "rate": 53.5})
        assert len(text) <= 80
        assert text.endswith("loss=2.56, lr=7.8e-6]")

    def test_other_processes_show_nothing(self, capsys: pytest.CaptureFixture[str]) -> None:
        with train_bar(0, "TRAIN", 2, 0, hidden=True) as bar:
            bar.update()
            bar.set_postfix(shown({"loss": 1.0}))
        assert capsys.readouterr().err == ""

    def test_a_stream_without_a_length_has_a_bar(self, capsys: pytest.CaptureFixture[str]) -> None:
        with train_bar(3, "VALID", None, 0, hidden=False) as bar:
            bar.update(7)
        assert "[Epoch 3] [VALID]: 7it" in capsys.readouterr().err


@pytest.mark.parametrize(("value", "wanted"), [(1, 1.0), ("0.5", 0.5), (torch.tensor(2.0), 2.0)])
def test_a_metric_is_a_number(value: Any, wanted: float) -> None:
    assert number(value) == wanted


@pytest.mark.parametrize("value", [None, "high", [1.0], {"f1": 1.0}])
def test_a_metric_that_is_not_a_number_is_nan(value: Any) -> None:
    assert math.isnan(number(value))


def _counted(real: Any, reads: list[int]) -> Any:
    def call(*args: Any, **options: Any) -> Any:
        reads.append(1)
        return real(*args, **options)

    return call
