"""The nodes of a Slurm job: the command of srun, and how its output is read."""

from __future__ import annotations

import pytest

from hf_cloudtrain.jobs.engines.slurm.gang import SlurmGang, bad_ends, master_port, srun
from tests.unit.jobs.engines.slurm._jobs import submission


def test_srun_does_not_kill_nodes_that_still_save_when_one_has_ended() -> None:
    argv = srun(submission(), "n1", 20_000, 3)
    assert "--kill-on-bad-exit=0" in argv
    assert "--wait=0" in argv
    assert argv[-1].endswith(
        "-m hf_cloudtrain.jobs.node.node /shared/jobs/toy-1 --master-addr n1 --master-port 20000 --start 3 --node-rank $SLURM_NODEID"
    )


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("srun: error: n1: task 0: Exited with exit code 75", {0: 75}),
        ("srun: error: n[1-3]: tasks 0-1,5: Exited with exit code 1", {0: 1, 1: 1, 5: 1}),
        ("srun: error: n2: task 1: Killed", {1: None}),
        ("srun: error: n2: task 1: Segmentation fault (core dumped)", {1: None}),
        ("srun: launch/slurm: _task_finish: Received task exit notification", {}),
        ("Traceback: task 3: Exited with exit code 1", {}),
    ],
)
def test_the_exit_codes_of_nodes_are_read_from_the_output_of_srun(
    line: str, expected: dict[int, int | None]
) -> None:
    assert bad_ends(line) == expected


def test_all_nodes_are_lost_when_srun_could_not_launch_them() -> None:
    gang = SlurmGang(submission("num_devices: 2\nslurm: {nodes: 2}"), "7")
    assert gang._codes(1) == (None, None)
    assert gang._codes(0) == (0, 0)
    gang._ends = {1: 75}
    assert gang._codes(75) == (0, 75)
    gang.launch_failure = "srun: error: task 1 launch failed"
    assert gang._codes(0) == (None, None)


def test_each_start_of_each_job_has_a_port_of_its_own_below_the_ephemeral_ports() -> None:
    ports = {master_port(str(job), start) for job in range(50) for start in range(1, 50)}
    assert len(ports) == 50 * 49
    assert all(1024 < port < 32768 for port in ports)
