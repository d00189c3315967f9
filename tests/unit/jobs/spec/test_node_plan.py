"""The environment of each node: the contract with the script, the same on every engine."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import pytest

from hf_cloudtrain import env
from hf_cloudtrain.errors import ConfigurationError
from hf_cloudtrain.jobs.spec.job import shape
from hf_cloudtrain.jobs.spec.job_file import parse_job
from hf_cloudtrain.jobs.spec.node_plan import CONTRACT, Plan
from hf_cloudtrain.jobs.spec.values import Machine
from hf_cloudtrain.launch.environment import FOLDER

WHERE: Any = {
    "master_addr": "node-0",
    "master_port": 6000,
    "run_url": "s3://bucket/runs/mnli",
    "exit_file": "/tmp/exit.json",
}
V100 = "azure-16gb-v100-4g-eastus-spot"


def environment(plan: Plan, node_rank: int = 0, **changes: Any) -> dict[str, str]:
    return plan.environment(node_rank, **{**WHERE, **changes})


# --- Machines ---


def test_the_name_of_a_machine_type_is_parsed() -> None:
    assert Machine.parse(V100) == Machine("azure", 16, "v100", 4, "eastus", is_spot=True)
    aws = Machine.parse("aws-80gb-a100-8g-us-east-1")
    assert aws == Machine("aws", 80, "a100", 8, "us-east-1", is_spot=False)
    assert Machine.parse("gcp-24gb-rtx-4090-1g-asia-northeast3-spot").gpu == "rtx-4090"
    for name in (V100, str(aws)):
        assert str(Machine.parse(name)) == name


@pytest.mark.parametrize(
    "name",
    [
        *("", "v100", "azure-v100-4g-eastus", "azure-16-v100-4g-eastus", "azure-16gb-v100-4-eastus"),
        *(
            "azure-16gb-v100-4g",
            "azure-16gb-v100-4g-",
            "azure-16gb--4g-eastus\n",
            "azure-16gb-v100-4g-east us",
            *("azure-16gb-v100-4g-spot", "azure-16gb-v100-4g--spot", "azure-1\u0666gb-v100-4g-eastus"),
            *("azure-16gb-v100-99999g-eastus", "azure-16gb-v100-4g-east-", "azure-16gb-v100-4g-" + "e" * 200),
        ),
    ],
)
def test_another_name_is_not_a_machine_type(name: str) -> None:
    with pytest.raises(ConfigurationError, match=r"\[cloud\]-\[memory\]"):
        Machine.parse(name)


@pytest.mark.parametrize(
    ("devices", "vm", "nodes", "nproc_per_node", "expected"),
    [
        (None, None, None, None, (1, 1)),
        (8, None, None, None, (1, 8)),
        (None, V100, None, None, (1, 4)),
        (4, V100, None, None, (1, 4)),
        (8, V100, None, None, (2, 4)),
        (8, V100, None, 1, (2, 1)),
        (8, V100, 1, None, (1, 4)),
        (8, V100, 3, 2, (3, 2)),
        (8, None, 2, None, (2, 4)),
        (8, None, None, 2, (4, 2)),
        (8, None, 3, 1, (3, 1)),
        (None, None, 2, None, (2, 1)),
        (None, None, None, 2, (1, 2)),
    ],
)
def test_devices_become_nodes_and_processes(
    devices: Any, vm: Any, nodes: Any, nproc_per_node: Any, expected: Any
) -> None:
    assert shape(devices, vm, nodes, nproc_per_node) == expected


@pytest.mark.parametrize(
    ("devices", "vm", "nodes", "nproc_per_node", "hint"),
    [
        (6, V100, None, None, "Use 4 or 8"),
        (2, V100, None, None, "Use 4"),
        (8, None, 3, None, "nodes=3.*Use 6 or 9"),
        (8, None, None, 3, "nproc_per_node=3"),
    ],
)
def test_a_count_that_does_not_divide_is_refused(
    devices: Any, vm: Any, nodes: Any, nproc_per_node: Any, hint: str
) -> None:
    with pytest.raises(
        ConfigurationError, match=f"'num_devices' must be a multiple of .*, not {devices}\\."
    ) as caught:
        shape(devices, vm, nodes, nproc_per_node)
    assert re.search(hint, str(caught.value))


def test_an_argument_overrides_the_engines_block_and_the_block_overrides_the_machine() -> None:
    job = parse_job(
        b"name: a\njob_setting: {docker: {command: x}}\nnum_devices: 8\n"
        b"vm: azure-16gb-v100-4g-eastus\nlocal: {nproc_per_node: 2}\nslurm: {nodes: 1}\n"
    )
    shapes = [
        job.plan(),
        job.plan("slurm"),
        job.plan("skypilot"),
        job.plan(nodes=5),
        job.plan(nproc_per_node=1),
        job.plan("slurm", nodes=3),
    ]
    assert [(plan.nodes, plan.nproc_per_node) for plan in shapes] == [
        *((2, 2), (1, 4), (2, 4), (5, 2), (2, 1), (3, 4))
    ]


# --- The environment ---


def test_the_environment_of_a_node_has_the_whole_contract() -> None:
    assert environment(Plan(2, 4, "/workspace/ckpt"), 1) == {
        "MASTER_ADDR": "node-0",
        "MASTER_PORT": "6000",
        "WORLD_SIZE": "8",
        "RANK": "4",
        "LOCAL_RANK": "0",
        "NODE_RANK": "1",
        "NUM_NODES": "2",
        "NPROC_PER_NODE": "4",
        "PET_NNODES": "2",
        "PET_NODE_RANK": "1",
        "PET_NPROC_PER_NODE": "4",
        "PET_MASTER_ADDR": "node-0",
        "PET_MASTER_PORT": "6000",
        "PET_MAX_RESTARTS": "0",
        "PET_SHUTDOWN_TIMEOUT": "30",
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
        "HF_CLOUDTRAIN_RUN_URL": "s3://bucket/runs/mnli",
        "HF_CLOUDTRAIN_EXIT_FILE": "/tmp/exit.json",
        "HF_CLOUDTRAIN_GRACE": "30",
        "HF_CLOUDTRAIN_CHECKPOINT_DIR": "/workspace/ckpt",
    }


def test_the_contract_is_what_is_set_and_the_checkpoint_that_a_launcher_restores() -> None:
    found = environment(Plan(1, 1, "/ckpt", experiment="warmup", launch=True))
    assert {*found, env.RESTORED_CHECKPOINT} - {"PYTHONPATH"} == set(CONTRACT)


def test_launch_puts_the_hook_in_front_of_the_path_of_the_job_or_of_the_shell() -> None:
    plan = Plan(1, 1, variables={"PYTHONPATH": "src"}, launch=True)
    assert environment(plan)["PYTHONPATH"] == f"{FOLDER}:src"
    assert (
        environment(Plan(1, 1, launch=True), shell={"PYTHONPATH": f"{FOLDER}:lib"})["PYTHONPATH"]
        == f"{FOLDER}:lib"
    )
    assert environment(Plan(1, 1, launch=True))[env.LAUNCH_NOTES] == "/tmp/exit.json.launch"
    assert "PYTHONPATH" not in environment(Plan(1, 1), shell={"PYTHONPATH": "lib"})


def test_without_a_checkpoint_folder_none_is_named() -> None:
    assert env.CHECKPOINT_DIR not in environment(Plan(1, 1))


def test_torchrun_with_no_option_takes_the_plan_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.distributed.run import get_args_parser

    for name, value in environment(Plan(2, 4, "/ckpt"), 1, grace=45.5).items():
        monkeypatch.setenv(name, value)
    taken = get_args_parser().parse_args(["train.py"])
    assert (str(taken.nnodes), str(taken.nproc_per_node), int(taken.node_rank)) == ("2", "4", 1)
    assert (taken.master_addr, int(taken.master_port), taken.rdzv_backend) == ("node-0", 6000, "static")
    assert (int(taken.max_restarts), int(taken.shutdown_timeout)) == (0, 46)


def test_our_own_code_reads_what_was_planned(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in environment(Plan(1, 1, "/ckpt"), grace=45.5).items():
        monkeypatch.setenv(name, value)
    assert (env.run_url(None), env.checkpoint_dir(None)) == ("s3://bucket/runs/mnli", "/ckpt")
    assert (env.grace(None), env.exit_file()) == (45.5, "/tmp/exit.json")


def test_the_grace_time_of_a_job_is_in_its_env() -> None:
    plan = Plan(1, 1, variables={env.GRACE: "119.5"})
    told = environment(plan)
    assert (told[env.GRACE], told["PET_SHUTDOWN_TIMEOUT"]) == ("119.5", "120")
    assert environment(plan, grace=10)[env.GRACE] == "10"


def test_a_variable_without_a_value_is_taken_from_the_shell() -> None:
    plan = Plan(1, 1, variables={"DEBUG": "1", "TOKEN": None})
    told = environment(plan, shell={"TOKEN": "hunter2", "OTHER": "x"})
    assert (told["DEBUG"], told["TOKEN"]) == ("1", "hunter2")
    assert "OTHER" not in told


def test_a_variable_that_the_shell_lacks_is_an_error() -> None:
    with pytest.raises(ConfigurationError, match=r"'TOKEN' from this shell.*export TOKEN="):
        environment(Plan(1, 1, variables={"TOKEN": None}), shell={"TOKENS": "x"})


def test_no_value_of_a_jobs_own_variables_is_shown() -> None:
    plan = Plan(1, 1, variables={"LEVEL": "hunter2", "TOKEN": None, env.GRACE: "60"})
    shown = plan.shown(environment(plan, shell={"TOKEN": "hunter2"}))
    assert (shown["LEVEL"], shown["TOKEN"], shown[env.GRACE]) == ("***", "***", "60")
    assert shown["MASTER_ADDR"] == "node-0"
    assert "hunter2" not in repr(plan)


@pytest.mark.parametrize("node_rank", [-1, 2])
def test_a_node_rank_out_of_range_is_refused(node_rank: int) -> None:
    with pytest.raises(ConfigurationError, match=f"node_rank={node_rank}"):
        environment(Plan(2, 4), node_rank)


def test_every_node_has_its_own_ranks_and_everything_else_alike() -> None:
    environments = [environment(Plan(3, 2), rank) for rank in range(3)]
    assert [one["RANK"] for one in environments] == ["0", "2", "4"]
    own = {"RANK", "NODE_RANK", "PET_NODE_RANK"}
    alike = [{name: value for name, value in one.items() if name not in own} for one in environments]
    assert alike[0] == alike[1] == alike[2]


def test_a_plan_is_data() -> None:
    plan = Plan(2, 4)
    assert dataclasses.replace(plan, nodes=2) == plan
