"""Trackers go on: trainings that report to a real service, killed three times, beside one that is not interrupted.

    python -m tests.trainers._trackers FOLDER [NAME ...]

It prints a JSON object for each: the tracker runs, and what is wrong with their curves. Each attempt is a process of its own, on a
machine (a folder) of its own.
"""

from __future__ import annotations

import http.server
import json
import os
import signal
import struct
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
os.environ.update(WANDB_SILENT="true", WANDB_CONSOLE="off", MLFLOW_DISABLE_TELEMETRY="true")

from transformers import TrainerCallback

from hf_cloudtrain.checkpoints.catalog import Catalog
from hf_cloudtrain.storage.client import Storage
from hf_cloudtrain.tracking.status import run_state
from tests.integration import _attempts

ROOT = Path(__file__).resolve().parents[2]
KILLS = ((6, 4), (11, 8), (12, 8))
"""Three kills: the step, and the checkpoint that is committed by then. Before the first two the service has all steps."""
STEPS = 24
EVALUATED: dict[str, Any] = {"num_train_epochs": 4, "eval_strategy": "steps", "eval_steps": 4}
STEP = "train/global_step"
CLOCK = ("runtime", "per_second", "train_loss", "total_flos")
"""Parts of names of metrics that depend on the clock, or on one attempt alone."""

Curves = dict[str, list[tuple[int, float]]]
"""By metric: step and value of each point, as often as the service has it."""


class Bed:
    """One service, and where it keeps what it gets."""

    name = ""

    def __init__(self, folder: Path, part: str) -> None:
        self.folder = folder / f"{type(self).__name__}-{part}"
        self.folder.mkdir(parents=True)
        self.prepare()

    def prepare(self) -> None:
        """Set the variables of the service."""

    def curves(self) -> dict[str, Curves]:
        """By tracker run."""
        raise NotImplementedError

    def train(self, machine: str, **arguments: Any) -> int:
        """One attempt in a process of its own; its exit code, negative for a signal."""
        where = {"output_dir": str(self.folder / machine), "run_url": str(self.folder / "run")}
        given = {"report_to": self.name, **where, **EVALUATED, **arguments}
        return self.run(machine, lambda: _attempts.train(**given))

    def run(self, machine: str, script: Callable[[], Any]) -> int:
        """The same of any script."""
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                log = os.open(self.folder / f"{machine}.log", os.O_WRONLY | os.O_CREAT)
                os.dup2(log, 1), os.dup2(log, 2)
                os.chdir(self.folder)
                script()
                code = 0
            except SystemExit as error:
                code = int(str(error.code or 0))
            except BaseException:  # noqa: BLE001 - told in the log
                traceback.print_exc()
            finally:
                sys.stdout.flush(), sys.stderr.flush()
                self.leave()
                os._exit(code)
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

    def log(self, machine: str) -> str:
        return (self.folder / f"{machine}.log").read_text()

    def has(self, step: int) -> bool:
        """Whether the service has the logs of a step, as far as the training process can tell."""
        return True

    def leave(self) -> None:
        """What the service does when a process ends by itself."""

    def close(self) -> None:
        """End its server."""


class Arrival(TrainerCallback):
    """Waits at a step until the service has the one before: a kill that follows makes redone steps."""

    def __init__(self, bed: Bed, step: int) -> None:
        self.bed, self.step = bed, step

    def on_step_end(self, args, state, control, **kwargs):
        deadline = time.monotonic() + 60
        while state.global_step == self.step and not self.bed.has(self.step - 1):
            assert time.monotonic() < deadline, "the service did not get it"
            time.sleep(0.05)


class MLflow(Bed):
    """A database, which all machines reach."""

    name = "mlflow"

    def has(self, step: int) -> bool:
        import mlflow

        mlflow.flush_async_logging()
        return True

    def prepare(self) -> None:
        os.environ["MLFLOW_TRACKING_URI"] = f"sqlite:///{self.folder}/mlflow.db"

    def leave(self) -> None:
        import mlflow

        mlflow.flush_async_logging()

    def curves(self) -> dict[str, Curves]:
        import mlflow

        client = mlflow.MlflowClient(tracking_uri=os.environ["MLFLOW_TRACKING_URI"])
        found = {}
        for run in client.search_runs([one.experiment_id for one in client.search_experiments()]):
            histories = {name: client.get_metric_history(run.info.run_id, name) for name in run.data.metrics}
            found[run.info.run_id] = {
                name: [(point.step, point.value) for point in points] for name, points in histories.items()
            }
        return found


class Trackio(Bed):
    """A database of trackio, which all machines reach: as on a Space."""

    name = "trackio"

    def prepare(self) -> None:
        os.environ["TRACKIO_DIR"] = str(self.folder / "trackio")

    def has(self, step: int) -> bool:
        return any(
            step in dict(curve["train/loss"]) for curve in self._curves().values() if "train/loss" in curve
        )

    def curves(self) -> dict[str, Curves]:
        return in_child(self._curves)

    def _curves(self) -> dict[str, Curves]:
        from trackio.sqlite_storage import SQLiteStorage

        found: dict[str, Curves] = {}
        for run in SQLiteStorage.get_run_records("huggingface"):
            rows = SQLiteStorage.get_logs("huggingface", run["name"], run_id=run["id"])
            found[str(run["name"])] = points(rows, STEP)
        return found


class TensorBoard(Bed):
    """Event files, which are on each machine: the log of the checkpoint fills those of a new one."""

    name = "tensorboard"

    def curves(self) -> dict[str, Curves]:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        *_, machine = sorted(path for path in self.folder.iterdir() if (path / "runs").is_dir())
        found = {}
        for run in (machine / "runs").iterdir():
            events = EventAccumulator(str(run), size_guidance={"scalars": 0})
            events.Reload()
            found[run.name] = {
                tag: [(event.step, event.value) for event in events.Scalars(tag)]
                for tag in events.Tags()["scalars"]
            }
        return found


class WandbOffline(Bed):
    """Offline files: that of the newest attempt has the whole curve, and all of them one id."""

    name = "wandb"

    def prepare(self) -> None:
        os.environ["WANDB_MODE"] = "offline"

    def leave(self) -> None:
        import wandb

        wandb.teardown()

    def curves(self) -> dict[str, Curves]:
        files = [read_offline(path) for path in sorted(self.folder.glob("wandb/offline-run-*/*.wandb"))]
        found: dict[str, Curves] = {}
        for run, rows in files:
            if rows:  # wandb writes what it has with the first 32 kB, or at its end
                found[run] = points(rows, STEP)
        return found


class WandbOnline(WandbOffline):
    """A stand-in for its server."""

    def prepare(self) -> None:
        self.kept = self.folder / "server.json"
        command = [sys.executable, "-m", "tests.trainers._wandb_server", "0", str(self.kept)]
        self._server = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        assert self._server.stdout
        port = self._server.stdout.readline().strip()
        os.environ.update(
            WANDB_MODE="online", WANDB_BASE_URL=f"http://127.0.0.1:{port}", WANDB_API_KEY="1" * 40
        )

    def curves(self) -> dict[str, Curves]:
        return {run: points(kept["history"], STEP) for run, kept in self.runs().items() if kept["history"]}

    def runs(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.kept.read_text())
        return found

    def close(self) -> None:
        self._server.kill()
        self._server.wait()
        assert self._server.stdout
        self._server.stdout.close()


class WandbShared(WandbOnline):
    """One W&B run that the script starts, and in which two trainings log."""

    def losses(self, step: int) -> int:
        """How often it has a loss of a step."""
        try:
            rows = [row for run in self.runs().values() for row in run["history"]]
        except (OSError, ValueError):  # it is being written
            return 0
        return sum("train/loss" in row and row.get(STEP) == step for row in rows)

    def has(self, step: int) -> bool:
        return self.losses(step) > 1

    def train_twice(self, machine: str, **second: Any) -> int:
        """One attempt of the script."""
        run, folder = self.folder / "run", self.folder / machine

        def script() -> None:
            import wandb

            wandb.init(project="huggingface", id="mine", resume="allow")
            common: dict[str, Any] = {"report_to": self.name, **EVALUATED}
            _attempts.train(output_dir=f"{folder}/one", run_url=str(run), **common)
            _attempts.train(output_dir=f"{folder}/two", run_url=f"{run}/trainer-2", **common, **second)

        return self.run(machine, script)


BEDS: dict[str, type[Bed]] = {
    "mlflow": MLflow,
    "trackio": Trackio,
    "tensorboard": TensorBoard,
    "wandb offline": WandbOffline,
    "wandb": WandbOnline,
}


def points(rows: list[dict[str, Any]], step: str) -> Curves:
    """Rows of metrics as curves; `step` is the metric that holds the step."""
    found: Curves = {}
    for row in rows:
        for name, value in row.items():
            if (
                isinstance(value, (int, float))
                and isinstance(row.get(step), (int, float))
                and name[:1] != "_"
            ):
                found.setdefault(name, []).append((int(row[step]), value))
    return {name: values for name, values in found.items() if name not in ("step", "timestamp", step)}


def read_offline(path: Path) -> tuple[str, list[dict[str, Any]]]:
    """The id of the run and its rows in an offline file of W&B: records of protobuf in the log format of LevelDB."""
    from wandb.proto import wandb_internal_pb2

    run, rows = "", []
    for data in log_records(path.read_bytes()[7:]):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        run = record.run.run_id or run
        if record.HasField("history"):
            items = record.history.item
            rows.append(
                {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items}
            )
    return run, rows


def log_records(data: bytes) -> Iterator[bytes]:
    """The records of a LevelDB log (doc/log_format.md there), whose first block lacks 7 bytes."""
    at, whole = 0, b""
    while at + 7 <= len(data):
        left = 32768 - (at + 7) % 32768
        if left < 7:
            at += left
            continue
        _, size, kind = struct.unpack("<IHB", data[at : at + 7])
        if kind == 0:
            return
        whole += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):
            yield whole
            whole = b""


def in_child(work: Callable[[], Any]) -> Any:
    """What `work` returns in a process of its own: some services read their variables only once."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        with os.fdopen(write, "w") as file:
            file.write(json.dumps(work()))
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as file:
        text = file.read()
    os.waitpid(pid, 0)
    return json.loads(text)


def lasting(curves: Curves) -> Curves:
    """Without what depends on the clock, in the order of the steps."""
    return {
        name: sorted((int(step), value) for step, value in values)
        for name, values in curves.items()
        if not any(part in name for part in CLOCK)
    }


def measure(name: str, folder: Path) -> dict[str, Any]:
    """Kill a training three times, and compare what the service has with that of an uninterrupted one."""
    began = time.monotonic()
    bed = BEDS[name](folder, "killed")
    for number, (kill_at, committed) in enumerate(KILLS):
        wait = [Arrival(bed, kill_at)] if number < 2 else []
        code = bed.train(f"machine-{number}", kill_at=kill_at, committed=committed, callbacks=wait)
        assert code == -signal.SIGKILL, bed.log(f"machine-{number}")
    assert bed.train("machine-9") == 0, bed.log("machine-9")
    found = bed.curves()
    bed.close()
    plain = BEDS[name](folder, "plain")
    assert plain.train("machine-9", run_url=None) == 0, plain.log("machine-9")
    (expected,) = plain.curves().values()
    plain.close()
    whole, wanted = lasting(next(iter(found.values()))), lasting(expected)
    return {
        "name": name,
        "runs": sorted(found),
        "trackers": run_state(Catalog(Storage(str(bed.folder / "run")))).trackers,
        "points": sum(map(len, whole.values())),
        "wrong": {
            metric: [whole.get(metric), wanted.get(metric)]
            for metric in sorted(whole.keys() | wanted.keys())
            if whole.get(metric) != wanted.get(metric)
        },
        "seconds": round(time.monotonic() - began, 1),
    }


def deleted(name: str, folder: Path) -> dict[str, Any]:
    """Delete the tracker run between two attempts: which runs the service has, and the steps of the new one."""
    bed = BEDS[name](folder, "deleted")
    assert bed.train("machine-0", kill_at=6, committed=4) == -signal.SIGKILL, bed.log("machine-0")
    if isinstance(bed, WandbOnline):
        (old,) = bed.runs()
        bed.close()
        bed.kept.write_text(json.dumps({old: {"history": [], "summary": {}, "deleted": True}}))
        bed.prepare()
    else:
        old = in_child(delete_of_mlflow)
    assert bed.train("machine-1") == 0, bed.log("machine-1")
    (new,) = (run for run in bed.curves().items() if run[0] != old)
    told = f"The {bed.name} run {old} does not go on (it was deleted). This attempt reports to a new one, {new[0]}."
    losses = next(
        values for metric, values in new[1].items() if metric.endswith("loss") and "eval" not in metric
    )
    bed.close()
    return {
        "name": f"{name} deleted",
        "steps": [step for step, _ in losses],
        "told": told in bed.log("machine-1"),
    }


def delete_of_mlflow() -> str:
    import mlflow

    (run,) = mlflow.search_runs(search_all_experiments=True, output_format="list")
    mlflow.delete_run(run.info.run_id)
    return str(run.info.run_id)


def shared(folder: Path) -> dict[str, Any]:
    """A script with two trainings and one W&B run, killed in the second one: which steps the service lacks, or has again."""
    bed = WandbShared(folder, "shared")
    kill: dict[str, Any] = {"kill_at": 12, "committed": 8, "callbacks": [Arrival(bed, 12)]}
    assert bed.train_twice("machine-0", **kill) == -signal.SIGKILL, bed.log("machine-0")
    assert bed.train_twice("machine-1") == 0, bed.log("machine-1")
    counts = {step: bed.losses(step) for step in range(1, STEPS + 1)}
    bed.close()
    return {
        "name": "wandb shared",
        "runs": sorted(bed.runs()),
        "lost": [step for step, count in counts.items() if count < 2],
        "twice": [step for step, count in counts.items() if count > 2],
        "told": "The wandb run mine holds a different training, too" in bed.log("machine-0"),
    }


def out_of_order(name: str, folder: Path) -> dict[str, Any]:
    """A server that answers nothing but 500, with a password in its URL: what is said, and where the password is."""
    bed = BEDS[name](folder, "500")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), AlwaysFails)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    os.environ["MLFLOW_TRACKING_URI"] = f"http://me:{PASSWORD}@127.0.0.1:{server.server_address[1]}"
    code = bed.train("machine-0")
    server.shutdown()
    found = [
        str(path)
        for path in bed.folder.rglob("*")
        if path.is_file() and PASSWORD.encode() in path.read_bytes()
    ]
    told = bed.log("machine-0").count(
        "The tracker mlflow did not start, and is tried again later. Training goes on."
    )
    return {"name": f"{name} 500", "code": code, "password": found, "told": told}


PASSWORD = "hush-hush-hush"


class AlwaysFails(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.send_error(500)

    do_POST = do_GET  # noqa: N815 - named by http.server

    def log_message(self, *_: Any) -> None:
        """Not on stderr."""


if __name__ == "__main__":
    where, names = Path(sys.argv[1]), sys.argv[2:]
    results: list[Callable[[], dict[str, Any]]] = [partial(measure, name, where) for name in names or BEDS]
    if not names:
        results += [partial(deleted, name, where) for name in ("mlflow", "wandb")]
        results += [partial(shared, where), partial(out_of_order, "mlflow", where)]
    for result in results:
        print("RESULT", json.dumps(result()), flush=True)
