"""`cloudtrain job` on this machine: real supervisors, nodes and trainings."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from hf_cloudtrain.checkpoints.catalog import Catalog
from hf_cloudtrain.jobs.records import JobStore
from hf_cloudtrain.jobs.spec.job_file import parse_job
from hf_cloudtrain.storage.client import Storage
from tests.integration._jobs import REPOSITORY, Desk, python, value_after
from tests.integration._serve import Served
from tests.integration._zygote import Zygote
from tests.servers import MotoServer

SECRET = "sesame-7f3a"


def test_a_job_finds_code_data_and_checkpoints_at_its_paths_and_leaves_a_record(
    desk: Desk, tmp_path: Path
) -> None:
    data = tmp_path / "data"
    data.mkdir()
    (data / "train.csv").write_text("a,b\n")
    desk.call("data", "create", "toy-data", str(data))
    desk.write(
        "pwd; ls /workspace/data; ls /workspace; ls -A ckpt; echo $CKPT_DIR $PROCESSED_ITERS\n"
        f"cd /workspace/project && {python('train.py', '10', '0')}",
        "data: {name: toy-data, mount_path: /workspace/data}",
    )
    result = desk.run("--wait")
    assert f"ends with {value_after(10)!r}" in result.stdout
    # The checkpoint folder is empty, and the folder of `-d` keeps its name.
    assert "/workspace/project\ntrain.csv\ndata\nproject\n/workspace/project/ckpt 0\n" in result.stdout
    record = desk.record("toy-1")
    assert (record.state, record.restarts, [start.exit_codes for start in record.starts]) == (
        "finished",
        0,
        [(0,)],
    )
    status = desk.status()
    assert (status["state"], status["run"]["step"], status["stalled"]) == ("finished", 10, None)
    assert json.loads(desk.call("job", "list", "--json").stdout)["jobs"][0]["id"] == "toy-1"
    assert "ends with" in desk.call("job", "logs", "toy").stdout
    assert [key.step for key in Catalog(Storage(record.run_url)).checkpoints()] == [5, 10]
    desk.wait_until(lambda: not desk.processes())  # the supervisor exits after it has written the record
    assert not Path("/workspace").exists()


def test_a_job_is_restarted_after_a_crash_from_its_newest_checkpoint(desk: Desk) -> None:
    (desk.project / "crash.py").write_text(
        "import os, runpy, signal, sys, threading, time\n"
        "from pathlib import Path\n"
        "import hf_cloudtrain as ct\n"
        "def crash():\n"
        "    steps = 0\n"
        "    while steps < 8:\n"
        "        time.sleep(0.01)\n"
        "        try:\n"
        "            steps = ct.processed_steps()\n"
        "        except ct.CloudTrainError:  # before init\n"
        "            pass\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "if not Path('crashed').exists():\n"
        "    Path('crashed').touch()\n"
        "    threading.Thread(target=crash).start()\n"
        "sys.argv = ['train.py', '40', '0.05']\n"
        "runpy.run_path('train.py', run_name='__main__')\n"
    )
    desk.write(python("crash.py"))
    result = desk.run("--wait")
    assert f"ends with {value_after(40)!r}" in result.stdout
    record = desk.record()
    assert (record.state, record.restarts) == ("finished", 1)
    assert [start.outcome for start in record.starts] == ["failed", "finished"]
    assert "begins at 0 with 0.0" in result.stdout
    assert result.stdout.count("begins at") == 2


def test_a_cancelled_job_saves_behind_a_tee_and_can_be_resumed(desk: Desk) -> None:
    desk.write(f"echo at $PROCESSED_ITERS\n{python('train.py', '60', '0.05')} | tee output.txt\necho never")
    desk.run()
    desk.wait_for_step(10)
    desk.call("job", "cancel", "toy", "--wait")
    record = desk.record()
    assert (record.state, record.starts[-1].outcome) == ("cancelled", "preempted")
    desk.wait_until(lambda: not desk.processes())  # the supervisor exits after it has written the record
    newest = Catalog(Storage(record.run_url)).checkpoints()[-1]
    assert str(newest) in (record.reason or "")
    assert "never" not in desk.log()
    result = desk.call("job", "run", "--resume", "toy", "--wait")
    assert f"begins at {newest.step} with" in result.stdout
    assert f"at {newest.step}\n" in result.stdout
    assert f"ends with {value_after(60)!r}" in result.stdout
    assert (desk.record().state, len(desk.record().starts)) == ("finished", 2)


def test_a_run_that_the_user_stops_is_not_restarted(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_CLOUDTRAIN_HEARTBEAT", "0.5")
    desk.write(python("train.py", "200", "0.05"))
    desk.run()
    desk.wait_for_step(5)
    desk.call("run", "stop", desk.record().run_url)
    record = desk.wait_until_over()
    assert (record.state, len(record.starts)) == ("cancelled", 1)
    assert "cloudtrain run stop" in (record.reason or "")


def test_a_job_whose_supervisor_was_killed_is_lost_and_can_be_resumed(desk: Desk) -> None:
    desk.write(python("train.py", "60", "0.05"))
    desk.run()
    desk.wait_for_step(5)
    os.kill(desk.record().handle["pid"], signal.SIGKILL)
    desk.wait_until(lambda: desk.status()["state"] == "lost")
    assert "cloudtrain job run --resume toy-1" in desk.status()["reason"]
    desk.call("job", "run", "--resume", "toy-1")  # while its node saves and exits
    assert desk.wait_until_over().state == "finished"
    assert f"ends with {value_after(60)!r}" in desk.log()
    desk.wait_until(lambda: not desk.processes())


def test_a_killed_node_leaves_no_process_and_is_restarted(desk: Desk) -> None:
    desk.write(python("train.py", "60", "0.05"))
    desk.run()
    desk.wait_for_step(5)
    desk.one_of("hf_cloudtrain.jobs.node.node").kill()
    record = desk.wait_until_over()
    assert (record.state, record.restarts) == ("finished", 1)
    assert record.starts[0].exit_codes == (None,)
    assert "lost" in (record.starts[0].reason or "")
    assert f"ends with {value_after(60)!r}" in desk.log()


@pytest.mark.slow
def test_a_command_that_does_not_stop_is_killed_after_its_grace(desk: Desk) -> None:
    (desk.project / "stubborn.py").write_text(
        "import signal, subprocess, sys, time\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "subprocess.Popen(['sleep', '1000'], start_new_session=True)\n"
        "print('up', flush=True)\n"
        "time.sleep(1000)\n"
    )
    desk.write(python("stubborn.py"), "env: {HF_CLOUDTRAIN_GRACE: 1}")
    desk.run()
    desk.wait_until(lambda: "up" in desk.log())
    desk.call("job", "cancel", "toy", "--wait")
    assert desk.record().state == "cancelled"
    assert "Nothing was saved" in (desk.record().reason or "")
    desk.wait_until(lambda: not desk.processes())  # the supervisor exits after it has written the record


def test_a_job_is_cancelled_during_its_setup(desk: Desk) -> None:
    desk.file.write_text(
        "name: toy\njob_setting:\n  docker:\n    command: {setup: echo slow; sleep 1000, run: echo never}\n"
    )
    desk.run()
    desk.wait_until(lambda: "slow" in desk.log())
    desk.call("job", "cancel", "toy", "--wait")
    assert desk.record().state == "cancelled"
    assert "never" not in desk.log()
    desk.wait_until(lambda: not desk.processes())  # the supervisor exits after it has written the record


def test_a_command_that_trains_nothing_has_failed(desk: Desk) -> None:
    desk.write("echo done")
    result = desk.run("--wait", code=1)
    assert desk.record().state == "failed"
    assert "trained nothing" in result.stderr


def test_a_command_that_cannot_start_is_started_once_and_names_what_to_mend(desk: Desk) -> None:
    desk.write(python("trian.py"))
    desk.run("--wait", code=1)
    record = desk.record()
    assert (record.state, len(record.starts)) == ("failed", 1)
    assert "trian.py' does not exist. The command starts in '/workspace/project'" in (record.reason or "")


def test_a_failed_setup_is_reported_with_its_exit_code(desk: Desk) -> None:
    desk.file.write_text(
        "name: toy\nmax_restarts: 0\njob_setting:\n  docker:\n    command: {setup: exit 7, run: echo never}\n"
    )
    desk.run("--wait", code=1)
    assert "setup of the job ended with exit code 7" in (desk.record().reason or "")


@pytest.mark.slow
def test_two_jobs_with_one_name_have_separate_runs_and_only_one_job_writes_to_a_run(
    desk: Desk, tmp_path: Path
) -> None:
    desk.write("sleep 1000")
    desk.run()
    desk.run()
    assert desk.record("toy-1").run_url != desk.record("toy-2").run_url
    desk.call("job", "cancel", "toy-1")
    desk.call("job", "cancel", "toy-2", "--wait")
    url = tmp_path / "run"
    desk.write("sleep 1000", f"run_url: {url}")
    desk.run()
    assert "'toy-3' is" in desk.run(code=1).stderr
    assert desk.store.ids() == ["toy-1", "toy-2", "toy-3"]
    desk.call("job", "cancel", "toy", "--wait")
    desk.wait_until_over("toy-1")
    desk.write(python("train.py", "5", "0"), f"run_url: {url}")
    desk.run("--wait")  # no other job writes to it now


def test_ctrl_c_on_logs_leaves_the_job_alone(desk: Desk) -> None:
    desk.write("echo up; sleep 1000")
    desk.run()
    desk.wait_until(lambda: "up" in desk.log())
    following = subprocess.Popen(
        [sys.executable, "-m", "hf_cloudtrain.cli", "job", "logs", "-f", "toy"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=REPOSITORY,
    )
    assert following.stdout is not None
    while "up" not in following.stdout.readline():
        pass
    following.send_signal(signal.SIGINT)
    _, errors = following.communicate(timeout=60)
    assert following.returncode == 130
    assert "toy-1 keeps running" in errors
    assert not desk.record().is_over
    desk.call("job", "cancel", "toy", "--wait")


def test_values_of_variables_reach_the_command_and_are_neither_shown_nor_stored(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FROM_SHELL", f"{SECRET}-shell")
    desk.write(
        'test "$IN_FILE$FROM_SHELL" = '
        f"{SECRET}-file{SECRET}-shell && echo right; unset IN_FILE FROM_SHELL; {python('train.py', '5', '0')}",
        f"env: {{IN_FILE: {SECRET}-file, FROM_SHELL: }}",
    )
    shown = [
        desk.run("--dry-run").output,
        desk.run("--wait").output,
        desk.call("job", "status", "toy").output,
    ]
    assert "right" in shown[1]
    assert desk.record().state == "finished"
    command = f"{SECRET}-file{SECRET}-shell"  # in the command itself, which is not a variable
    for text in (
        *shown,
        *(path.read_text(errors="replace") for path in desk.store_path.rglob("*") if path.is_file()),
    ):
        assert SECRET not in text.replace(command, "")


def test_a_variable_that_the_shell_lacks_is_reported_before_anything_starts(desk: Desk) -> None:
    desk.write("echo never", "env: {FROM_SHELL: }")
    assert "'FROM_SHELL'" in desk.run(code=1).stderr
    assert desk.store.ids() == []


@pytest.mark.parametrize(
    ("more", "part"),
    [
        ("data: {name: nothing, mount_path: /workspace/data}", "Dataset 'nothing' does not exist"),
        ("data: {name: mnli, mount_path: /etc}", "/etc"),
        ("num_devices: 3\nlocal: {nodes: 2}", "num_devices"),
    ],
)
def test_an_impossible_job_is_refused_and_nothing_is_started(desk: Desk, more: str, part: str) -> None:
    desk.write("echo never", more)
    assert part in desk.run(code=1).stderr
    assert desk.store.ids() == []


def test_modules_in_the_folder_of_the_submission_are_not_imported_and_the_folder_may_disappear(
    desk: Desk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    for name in ("logging.py", "argparse.py"):  # what a supervisor and a node import
        (folder / name).write_text("raise SystemExit('not this one')")
    monkeypatch.chdir(folder)
    desk.write(python("train.py", "5", "0"))
    desk.run()
    monkeypatch.chdir(tmp_path)
    shutil.rmtree(folder)
    assert desk.wait_until_over().state == "finished"


def test_a_missing_torchrun_is_reported(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hf_cloudtrain.jobs.engines.local.shutil.which", lambda *_, **__: None)
    desk.write("torchrun train.py")
    assert "pip install torch" in desk.run(code=1).stderr


def test_an_unknown_job_is_an_error_that_names_the_nearest(desk: Desk) -> None:
    desk.write("echo done")
    desk.run("--wait", code=1)
    assert "The nearest is 'toy-1'" in desk.call("job", "status", "toy-2", code=1).stderr
    assert "is over: failed" in desk.call("job", "cancel", "toy", code=1).stderr


@pytest.mark.slow
def test_the_job_in_the_readme_is_the_one_of_the_example_and_ends_in_a_served_model(
    desk: Desk, zygote: Zygote
) -> None:
    """With fewer steps; no line of it depends on this machine."""
    page = (REPOSITORY / "README.md").read_text()
    shown = page.split("```yaml\n")[1].split("```")[0]
    whole = (REPOSITORY / "examples" / "glue" / "job.yml").read_text()
    mine, example = (parse_job(text.encode()) for text in (shown, whole))
    assert mine == example.model_copy(update={"experiment": None})
    desk.file.write_text(whole.replace("--max_steps 6000", "--max_steps 20 --save_steps 10"))
    desk.call("job", "run", "-f", str(desk.file), "-d", str(REPOSITORY / "examples" / "glue"), "--wait")
    assert desk.status("glue")["run"]["step"] == 20
    assert desk.record("glue").nproc_per_node == 2
    assert not (REPOSITORY / "examples" / "glue" / "ckpt").exists()
    *_, serve, curl = re.findall(r"^\$ (.*?)(?:  +#.*)?$", page.split("```yaml\n")[1], re.MULTILINE)
    assert (serve, curl.startswith("curl -d '")) == ("cloudtrain serve glue", True)
    served = Served(zygote, *shlex.split(serve)[2:])
    status, answer = served.ask(shlex.split(curl)[2].encode(), "application/x-www-form-urlencoded")
    assert (status, set(answer[0])) == (200, {"label", "score"})
    assert f"Serving checkpoint-20 of {desk.record('glue').run_url!r}" in served.stop()


def test_a_port_in_use_is_reported(desk: Desk) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        desk.write(
            f"torchrun --nnodes 1 --node_rank 0 --master_addr 127.0.0.1 --master_port {port} train.py 5 0",
            "max_restarts: 0\nnum_devices: 2",
        )
        desk.run("--wait", code=1)
    assert "A port is in use" in (desk.record().reason or "")


@pytest.mark.slow
def test_jobs_of_this_machine_use_records_and_data_of_a_store_on_s3(
    desk: Desk, moto: MotoServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in moto.env.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("HOME", str(tmp_path))
    url = f"s3://{moto.make_bucket()}/store"
    monkeypatch.setenv("HF_CLOUDTRAIN_STORE", url)
    desk.store = JobStore(url)
    desk.call("data", "create", "code", str(desk.project))
    desk.write(
        python("/workspace/data/train.py", "5", "0"), "data: {name: code, mount_path: /workspace/data}"
    )
    desk.run("--wait")
    record = desk.record()
    assert (record.state, record.run_url) == ("finished", f"{url}/runs/toy-1")
    assert [key.step for key in Catalog(Storage(record.run_url)).checkpoints()] == [5]
    assert Path(record.home).is_relative_to(tmp_path)


PLAIN = """
import os, sys
import torch
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainerCallback, TrainingArguments, set_seed

class Crash(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 7 and not os.path.exists(args.output_dir + "/checkpoint-4/was-here"):
            os._exit(3)

set_seed(1)
rows = [{"input_ids": torch.full((8,), number), "labels": torch.tensor(number % 2)} for number in range(24)]
size = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
model = BertForSequenceClassification(BertConfig(vocab_size=32, **size))
args = TrainingArguments("ckpt", max_steps=12, per_device_train_batch_size=2, save_steps=2, report_to="none", use_cpu=True)
if os.path.isdir("ckpt/checkpoint-4"):
    open("ckpt/checkpoint-4/was-here", "w").close()
Trainer(model, args, train_dataset=rows, callbacks=[Crash()]).train()
"""


@pytest.mark.slow
def test_launch_auto_restarts_a_script_without_our_code_from_its_newest_checkpoint(desk: Desk) -> None:
    (desk.project / "plain.py").write_text(PLAIN)
    desk.write(f"{sys.executable} plain.py", "launch: auto")
    assert "/launch/hook" in desk.run("--dry-run").stdout
    desk.run("--wait")
    record = desk.record("toy-1")
    assert (record.state, record.restarts) == ("finished", 1)
    keys = Catalog(Storage(record.run_url)).checkpoints()
    assert keys[-1].attempt == 2
    assert keys[-1].step == 12
    assert "has hooked the train() of Trainer" in desk.log("toy-1")


def test_launch_auto_says_on_each_node_that_it_has_hooked_nothing(desk: Desk) -> None:
    desk.write(f"{sys.executable} -c pass", "launch: auto")
    desk.run("--wait", code=1)
    assert "has hooked no training on this node: it ran a Python process, which imported neither" in desk.log(
        "toy-1"
    )
    desk.write(python("train.py", "5", "0"), "launch: auto")
    desk.run("--wait")
    assert "has hooked no training" not in desk.log("toy-2")
