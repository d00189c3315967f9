"""A training run is killed half-way, and a second machine finishes it. `make demo` starts this script.

    python examples/glue/demo.py [FOLDER]

Two processes train a small BERT on a synthetic dataset (run_glue.py) and store their checkpoints at a `file://` run URL.
After a few commits, the script kills all of them with SIGKILL and deletes the first machine's folder. The same command in an
empty folder then resumes the run. The first machine saves asynchronously and the second one as Trainer always does, so that the
table shows what a save costs in both ways. The table and the picture of the loss are made from the run's own records.
"""

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

import psutil
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from hf_cloudtrain.tracking.history import AttemptInfo, History, read_history

HERE = Path(__file__).resolve().parent
FOLDER = "demo-output"
MARKER = ".made-by-demo"
"""Marks a folder that this script created, so that the next demo may empty it."""

MAX_STEPS, SAVE_STEPS, LOGGING_STEPS = 450, 50, 5
CHECKPOINTS_BEFORE_KILL = 3
STEPS_LOST_AT_KILL = 20
"""Number of steps to wait after the last commit before the kill, so that some work is lost."""
PATIENCE = 600.0
"""Timeout of one phase in seconds. A phase takes about 30 s on two idle cores."""
OPTIONS = {
    "--task_name": "mrpc",
    "--max_steps": MAX_STEPS,
    "--save_steps": SAVE_STEPS,
    "--logging_steps": LOGGING_STEPS,
    "--learning_rate": 1e-4,
    "--vocab_size": 30_522,  # as BERT: checkpoints of 52 MB, so that the length of a save can be seen
    "--disable_tqdm": "true",
}
COLOURS = {1: "tab:blue", 2: "tab:green"}
LOSS = "tab:red"

console = Console(highlight=False)


class Machine:
    """One machine: an empty folder, and the processes that train in it."""

    def __init__(self, name: str, folder: Path, run_url: str, *, async_save: bool) -> None:
        self.name = name
        self.disk = folder / name
        self.log = folder / f"{name}.log"
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
        command += [
            str(HERE / "run_glue.py"),
            "--output_dir",
            str(self.disk / "output"),
            "--run_url",
            run_url,
        ]
        command += [str(word) for option in OPTIONS.items() for word in option]
        environment = os.environ | {
            "HF_CLOUDTRAIN_ASYNC_SAVE": str(int(async_save)),
            "HF_CLOUDTRAIN_HEARTBEAT": "0.2",  # seconds instead of 15: the demo polls the records
            "HF_HOME": str(self.disk / "cache"),
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
            "PYTHONUNBUFFERED": "1",  # SIGKILL would discard buffered output
        }
        self.disk.mkdir()
        with self.log.open("w") as log:
            self._process = subprocess.Popen(
                command, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )

    @property
    def exit_code(self) -> int | None:
        return self._process.poll()

    def kill(self) -> None:
        """Send SIGKILL to the launcher and all its descendants; torchrun puts its workers into sessions of their own."""
        launcher = psutil.Process(self._process.pid)
        launcher.suspend()  # so that it starts no process while we list its children
        processes = [launcher, *launcher.children(recursive=True)]
        for process in processes:
            process.kill()
        self._process.wait()
        wait_until(lambda: not any(map(_is_alive, processes)), f"{self.name} to die", seconds=30)

    def close(self) -> None:
        if self.exit_code is None:
            self.kill()


class Demo(NamedTuple):
    """What happened, for the table and the picture."""

    history: History
    lost: dict[int, float]
    """Losses of attempt 1 after its last checkpoint, by step. They are in no record, only in the output."""
    killed_at: float
    """Seconds since 1970."""


def main(folder: Path) -> Demo:
    started = time.time()
    make_empty(folder)
    store = folder / "storage" / "mrpc"
    run_url = f"file://{store.resolve()}"
    console.print(f"Run URL: {run_url}", soft_wrap=True)
    console.print(f"Output of the machines: {folder}/machine-1.log and machine-2.log\n", soft_wrap=True)

    console.print("[bold]1.[/] machine-1 starts: 2 processes under torchrun, a small BERT, synthetic data")
    with closing(Machine("machine-1", folder, run_url, async_save=True)) as machine:
        follow(machine, run_url, attempt=1, until=lost_enough)
        machine.kill()
    killed_at = time.time()
    shutil.rmtree(machine.disk)
    killed = read_history(run_url).attempts[0]
    console.print(
        f"[bold]2.[/] [red]SIGKILL[/] to all processes at step {killed.last_step}; machine-1's disk is deleted"
    )
    lost = losses_in_log(machine.log, after=killed.checkpoints[-1].step)

    console.print("[bold]3.[/] machine-2 starts: the same command, an empty folder")
    with closing(Machine("machine-2", folder, run_url, async_save=False)) as machine:
        follow(machine, run_url, attempt=2, until=lambda _: machine.exit_code == 0)
    demo = Demo(read_history(run_url), lost, killed_at)
    check(demo)
    console.print(f"[bold]4.[/] finished at step {demo.history.attempts[-1].last_step}\n")

    console.print(make_table(demo))
    if lost:
        console.print("The redone steps have the same losses as before the kill (grey in the picture).")
    if demo.history.goodput is not None:
        console.print(
            f"Goodput {demo.history.goodput:.0%}: the share of the run's wall time spent on steps that count."
        )
    picture = folder / "loss.png"
    draw(demo, picture)
    console.print(f"The demo took {time.time() - started:.0f} s.\n")
    print(f"Picture: {picture}   Checkpoints and the final model: {store}")
    return demo


def make_empty(folder: Path) -> None:
    if folder.exists() and any(folder.iterdir()):
        if not (folder / MARKER).exists():
            raise SystemExit(
                f"'{folder}' is not empty, and it was not created by an earlier demo. Pass a different folder."
            )
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MARKER).touch()


def follow(machine: Machine, run_url: str, attempt: int, until: Callable[[AttemptInfo], bool]) -> AttemptInfo:
    """Print the progress of an attempt from its records on storage until `until` is true."""
    seen: set[int] = set()
    found: AttemptInfo | None = None

    def poll() -> bool:
        nonlocal found
        infos = [info for info in read_history(run_url).attempts if info.number == attempt]
        for info in infos:
            if found is None:
                console.print(f"   attempt {attempt} begins {_origin(info)}")
            found = info
            for key in info.checkpoints:
                if key.step not in seen:
                    console.print(f"   checkpoint-{key.step} is committed")
                    seen.add(key.step)
        if machine.exit_code is not None and not (found and until(found)):
            give_up(machine, f"{machine.name} exited too early, with code {machine.exit_code}")
        return found is not None and until(found)

    try:
        wait_until(poll, f"attempt {attempt}")
    except TimeoutError as error:
        give_up(machine, str(error))
    assert found is not None
    return found


def lost_enough(info: AttemptInfo) -> bool:
    """Whether a few checkpoints are committed and some steps follow the last of them."""
    steps = [key.step for key in info.checkpoints]
    return len(steps) >= CHECKPOINTS_BEFORE_KILL and info.last_step >= steps[-1] + STEPS_LOST_AT_KILL


def losses_in_log(log: Path, after: int) -> dict[int, float]:
    """The losses that Trainer printed, by step. Those after the last save are in no record: records are stored with each save."""
    printed = re.findall(r"\{'loss': '([^']+)'", log.read_text(errors="replace"))
    losses = {number * LOGGING_STEPS: float(loss) for number, loss in enumerate(printed, start=1)}
    return {step: loss for step, loss in losses.items() if step > after}


def wait_until(condition: Callable[[], bool], what: str, seconds: float = PATIENCE) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"timed out after {seconds:.0f} s waiting for {what}")
        time.sleep(0.1)


def give_up(machine: Machine, why: str) -> None:
    lines = machine.log.read_text(errors="replace").splitlines()
    raise SystemExit("\n".join([*lines[-30:], f"\n{why}. The full log is {machine.log}."]))


def check(demo: Demo) -> None:
    """Fail unless attempt 2 resumed where it should and the redone steps have the same losses."""
    first, second = demo.history.attempts
    if second.first_step != first.checkpoints[-1].step or second.last_step != MAX_STEPS:
        raise SystemExit(
            f"Attempt 2 trained from step {second.first_step} to {second.last_step}; "
            f"expected {first.checkpoints[-1].step} to {MAX_STEPS}."
        )
    kept = {log["step"]: log["loss"] for log in demo.history.logs if "loss" in log}
    if list(kept) != list(range(LOGGING_STEPS, MAX_STEPS + 1, LOGGING_STEPS)):
        raise SystemExit("The loss curve has a gap or a duplicate step.")
    for step, loss in demo.lost.items():
        if f"{kept[step]:.4g}" != f"{loss:.4g}":  # Trainer prints four digits
            raise SystemExit(
                f"Step {step} had a loss of {loss} in attempt 1 and of {kept[step]} in attempt 2."
            )


def make_table(demo: Demo) -> Table:
    table = Table(title="The run, from its own records", title_justify="left")
    for column in ("no.", "steps", "saved", "a save", "end", "redone", "time lost"):
        table.add_column(column, justify="left" if column in ("a save", "end") else "right", no_wrap=True)
    first, second = demo.history.attempts
    table.add_row(
        "1",
        f"1 to {first.last_step}",
        str(len(first.checkpoints)),
        f"{_save_time(first)} async",
        f"[red]killed[/] at {first.last_step}",
        "",
        "",
    )
    table.add_row(
        "2",
        f"{second.first_step + 1} to {second.last_step}",
        str(len(second.checkpoints)),
        f"{_save_time(second)} plain",
        f"[green]{second.state}[/]",
        str(first.last_step - second.first_step),
        f"{seconds_lost(demo):.1f} s",
    )
    return table


def seconds_lost(demo: Demo) -> float:
    """Seconds from the kill until attempt 2 reached the same step: start-up, restore and redone steps."""
    first, second = demo.history.attempts
    caught_up = [
        log["time"]
        for log in demo.history.logs
        if log["attempt"] == second.number and log["step"] >= first.last_step
    ]
    return float(min(caught_up) - demo.killed_at)


def draw(demo: Demo, path: Path) -> None:
    """Draw the loss over steps and the step over time, both for both attempts."""
    figure = Figure(figsize=(13, 5), layout="constrained")
    figure.suptitle("One run on two machines: killed by SIGKILL, resumed from storage")
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    draw_loss(left, demo)
    draw_progress(right, demo)
    figure.savefig(path, dpi=120)


def draw_loss(axes: Axes, demo: Demo) -> None:
    history, lost = demo.history, demo.lost
    first, second = history.attempts
    logs = [log for log in history.logs if "loss" in log]
    top = 1.15 * max(log["loss"] for log in logs)
    axes.axvspan(second.first_step, first.last_step, color=LOSS, alpha=0.1)
    for info in history.attempts:
        # The curve of attempt 2 starts at the checkpoint that it resumed from.
        points = [log for log in logs if log["attempt"] == info.number or log["step"] == info.first_step]
        steps, losses = [log["step"] for log in points], [log["loss"] for log in points]
        axes.plot(steps, losses, color=COLOURS[info.number], label=f"attempt {info.number}")
        committed = [key.step for key in info.checkpoints]
        axes.plot(committed, [0.0] * len(committed), "^", color=COLOURS[info.number], clip_on=False, zorder=3)
    if lost:
        style = {"color": "grey", "linestyle": ":", "marker": "o", "fillstyle": "none"}
        axes.plot(list(lost), list(lost.values()), label="attempt 1, lost and redone", **style)
    axes.plot([], [], "^", color="black", label="committed checkpoint")
    axes.axvline(first.last_step, color=LOSS, linestyle="--")
    axes.annotate(f" killed at step {first.last_step}", (first.last_step, 0.97 * top), va="top", color=LOSS)
    axes.axvline(second.first_step, color=COLOURS[2], linestyle="--")
    resumed = f"resumed from checkpoint-{second.first_step} "
    axes.annotate(resumed, (second.first_step, 0.97 * top), va="top", ha="right", color=COLOURS[2])
    axes.set(xlabel="step", ylabel="training loss", xlim=(0, MAX_STEPS), ylim=(0, top))
    axes.legend(loc="upper right")


def draw_progress(axes: Axes, demo: Demo) -> None:
    history, killed_at = demo.history, demo.killed_at
    first, second = history.attempts
    zero = first.started
    for info in history.attempts:
        points = [(info.started, info.first_step)]
        points += [(log["time"], log["step"]) for log in history.logs if log["attempt"] == info.number]
        if info is first:
            points.append((killed_at, first.last_step))
        times, steps = zip(*sorted(points), strict=True)
        axes.plot([moment - zero for moment in times], steps, color=COLOURS[info.number])
    axes.plot(killed_at - zero, first.last_step, "x", color=LOSS, markersize=10, markeredgewidth=2)
    axes.axvspan(killed_at - zero, second.started - zero, color=LOSS, alpha=0.1)
    middle = (killed_at + second.started) / 2 - zero
    axes.annotate("a second machine\nstarts and restores", (middle, 10), ha="center", color=LOSS)
    axes.set(
        xlabel="seconds since the start of the run", ylabel="step", ylim=(0, 1.03 * MAX_STEPS), xlim=(0, None)
    )


def _save_time(info: AttemptInfo) -> str:
    """For how long a save held up training."""
    seconds = info.progress.get("save_seconds")
    return "unknown" if seconds is None else f"{seconds * 1e3:.0f} ms"


def _origin(info: AttemptInfo) -> str:
    return f"from checkpoint-{info.first_step}" if info.resumed_from else "at step 0"


def _is_alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else FOLDER))
