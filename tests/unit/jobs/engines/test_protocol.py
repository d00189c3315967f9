"""The table of engines: one name in the job file, on the command line and in the table, and all methods behind it."""

from __future__ import annotations

import ast
import importlib.util
import inspect
import re
from importlib.machinery import ModuleSpec
from pathlib import Path
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

ROOT = Path(__file__).resolve().parents[4]
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


def test_each_module_that_a_string_names_exists_and_each_program_can_be_started() -> None:
    named, started = set(), set()
    for path in (ROOT / "hf_cloudtrain").rglob("*.py"):
        text = path.read_text()
        strings = [node.value for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Constant)]
        named |= {text for text in strings if re.fullmatch(r"hf_cloudtrain(\.\w+)+", str(text))}
        started |= set(re.findall(r"-m (hf_cloudtrain(?:\.\w+)+)", text))
    found = {name: importlib.util.find_spec(name) for name in named | started}
    assert {name for name, spec in found.items() if spec is None} == set()
    programs = {name for name, spec in found.items() if spec is not None and is_program(spec)}
    assert started <= programs
    assert {
        "hf_cloudtrain.jobs.node.node",
        "hf_cloudtrain.jobs.engines.local",
        "hf_cloudtrain.jobs.engines.slurm.batch_main",
        "hf_cloudtrain.jobs.engines.skypilot.node_main",
        "hf_cloudtrain.jobs.engines.sagemaker.container_main",
        "hf_cloudtrain.jobs.engines.sagemaker.node_main",
    } <= programs


def is_program(spec: ModuleSpec) -> bool:
    path = Path(str(spec.origin))
    return path.with_name("__main__.py").exists() or '__name__ == "__main__"' in path.read_text()
