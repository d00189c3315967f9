"""The table of engines: one name in the job file, on the command line and in the table, and all methods behind it."""

from __future__ import annotations

import inspect
from typing import get_args

import pytest

from hf_cloudtrain.cli.commands.job import EngineChoice
from hf_cloudtrain.jobs.engines import protocol
from hf_cloudtrain.jobs.engines.protocol import Engine, engine
from hf_cloudtrain.jobs.engines.sagemaker import engine as sagemaker
from hf_cloudtrain.jobs.engines.skypilot import engine as skypilot
from hf_cloudtrain.jobs.engines.slurm import engine as slurm
from hf_cloudtrain.jobs.records import State
from hf_cloudtrain.jobs.spec.job import EngineName, Job

NAMES = get_args(EngineName)


def test_table_job_file_and_command_line_name_the_same_engines() -> None:
    assert tuple(protocol._HOMES) == NAMES
    assert tuple(choice.value for choice in EngineChoice) == NAMES
    assert set(NAMES) <= set(Job.model_fields), "each engine has a block of options"


@pytest.mark.parametrize("name", NAMES)
def test_each_engine_has_the_methods_of_the_protocol(name: str) -> None:
    for method, expected in inspect.getmembers(Engine, inspect.isfunction):
        if not method.startswith("_"):
            found = inspect.signature(getattr(type(engine(name)), method))
            assert list(found.parameters) == list(inspect.signature(expected).parameters), method


@pytest.mark.parametrize(
    "table", [slurm.WAITING, slurm.ENDED, skypilot.STATES, skypilot.ENDS, sagemaker._STATES]
)
def test_the_states_of_a_service_become_states_of_jobs(table: dict[str, State]) -> None:
    assert set(table.values()) <= set(get_args(State))
