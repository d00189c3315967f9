"""A training run that is killed half-way and finished by another machine, watched from outside. `make demo` starts it.

    python examples/glue/demo.py [FOLDER]

Two processes train a small BERT on a synthetic set (run_glue.py), with their checkpoints on a `file://` run URL. Once a few
are committed, everything is killed by SIGKILL and the machine's folder is deleted. The same command in an empty folder
continues the run. The whole story is read back from the run's own records: a table, and a picture of the loss.
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

import psutil
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from hf_cloudtrain.tracking.history import AttemptInfo, History, read_history

HERE = Path(__file__).resolve().parent
FOLDER = "demo-output"
MARKER = ".made-by-demo"
"""Says that a folder is ours, so that the next demo may empty it."""

MAX_STEPS, SAVE_STEPS, LOGGING_STEPS = 450, 50, 5
CHECKPOINTS_BEFORE_KILL = 3
STEPS_LOST_AT_KILL = 20
"""The kill waits until so many steps are done since the last commit, so that something is lost."""
PATIENCE = 600.0
"""Seconds that one phase may take on a slow and busy machine; they take about 30 on two cores."""
OPTIONS = {
    "--task_name": "mrpc",
    "--max_steps": MAX_STEPS,
    "--save_steps": SAVE_STEPS,
    "--logging_steps": LOGGING_STEPS,
    "--learning_rate": 1e-4,
    "--disable_tqdm": "true",
}
COLOURS = {1: "tab:blue", 2: "tab:green"}
LOSS = "tab:red"

console = Console(highlight=False)


class Machine:
    """One machine: an empty folder, and the processes that train in it."""

    def __init__(self, name: str, folder: Path, run_url: str) -> None:
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
            "HF_CLOUDTRAIN_HEARTBEAT": "0.2",  # seconds: the demo looks on by it, a real run is fine with 15
            "HF_HOME": str(self.disk / "cache"),
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
            "PYTHONUNBUFFERED": "1",  # what is in a buffer dies unread
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
        """SIGKILL to the launcher and everything below it: its workers are in sessions of their own."""
        launcher = psutil.Process(self._process.pid)
        launcher.suspend()  # it must not start anything while we look
        family = [launcher, *launcher.children(recursive=True)]
        for process in family:
            process.kill()
        self._process.wait()
        wait_until(lambda: not any(map(_runs, family)), f"{self.name} to die", seconds=30)

    def close(self) -> None:
        if self.exit_code is None:
            self.kill()


def main(folder: Path) -> None:
    started = time.time()
    make_empty(folder)
    store = folder / "storage" / "mrpc"
    run_url = f"file://{store.resolve()}"
    console.print(f"The run is {run_url}", soft_wrap=True)
    console.print(f"What the machines say is in {folder}/machine-1.log and machine-2.log\n", soft_wrap=True)

    console.print("[bold]1.[/] machine-1 starts: 2 processes under torchrun, a small BERT, a synthetic MRPC")
    with closing(Machine("machine-1", folder, run_url)) as machine:
        follow(machine, run_url, attempt=1, until=lost_enough)
        machine.kill()
    killed_at = time.time()
    shutil.rmtree(machine.disk)
    killed = read_history(run_url).attempts[0]
    console.print(
        f"[bold]2.[/] [red]SIGKILL[/] to everything at step {killed.last_step}; machine-1's disk is gone"
    )
    lost = losses_on_screen(machine.log, beyond=killed.checkpoints[-1].step)

    console.print("[bold]3.[/] machine-2 starts: the same command, an empty folder")
    with closing(Machine("machine-2", folder, run_url)) as machine:
        follow(machine, run_url, attempt=2, until=lambda _: machine.exit_code == 0)
    history = read_history(run_url)
    check(history, lost)
    console.print(f"[bold]4.[/] finished at step {history.attempts[-1].last_step}\n")

    console.print(make_table(history, killed_at))
    if lost:
        console.print("The steps done twice gave the same losses again (grey in the picture).")
    if history.goodput is not None:
        console.print(
            f"Goodput {history.goodput:.0%}: that share of the run's time went into steps that count."
        )
    picture = folder / "loss.png"
    draw(history, lost, killed_at, picture)
    console.print(f"The demo took {time.time() - started:.0f} s.\n")
    print(f"Picture: {picture}   Checkpoints and the final model: {store}")


def make_empty(folder: Path) -> None:
    if folder.exists() and any(folder.iterdir()):
        if not (folder / MARKER).exists():
            raise SystemExit(f"'{folder}' is not empty and no earlier demo made it: name another folder")
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MARKER).touch()


def follow(machine: Machine, run_url: str, attempt: int, until: Callable[[AttemptInfo], bool]) -> AttemptInfo:
    """Tell what happens in an attempt, as its records on storage show it, until something is the case."""
    seen: set[int] = set()
    found: AttemptInfo | None = None

    def look() -> bool:
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
            give_up(machine, f"{machine.name} ended too early, with exit code {machine.exit_code}")
        return found is not None and until(found)

    try:
        wait_until(look, f"attempt {attempt}")
    except TimeoutError as error:
        give_up(machine, str(error))
    assert found is not None
    return found


def lost_enough(info: AttemptInfo) -> bool:
    """A few checkpoints are committed, and some steps done since the last."""
    steps = [key.step for key in info.checkpoints]
    return len(steps) >= CHECKPOINTS_BEFORE_KILL and info.last_step >= steps[-1] + STEPS_LOST_AT_KILL


def losses_on_screen(log: Path, beyond: int) -> dict[int, float]:
    """By step, the losses that Trainer printed and that died with the machine: records are stored with each save."""
    printed = re.findall(r"\{'loss': '([^']+)'", log.read_text(errors="replace"))
    losses = {number * LOGGING_STEPS: float(loss) for number, loss in enumerate(printed, start=1)}
    return {step: loss for step, loss in losses.items() if step > beyond}


def wait_until(condition: Callable[[], bool], what: str, seconds: float = PATIENCE) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {seconds:.0f} s for {what}")
        time.sleep(0.1)


def give_up(machine: Machine, why: str) -> None:
    lines = machine.log.read_text(errors="replace").splitlines()
    raise SystemExit("\n".join([*lines[-30:], f"\n{why}; the whole log is {machine.log}"]))


def check(history: History, lost: dict[int, float]) -> None:
    """The demo must not show a success that was none."""
    first, second = history.attempts
    if second.first_step != first.checkpoints[-1].step or second.last_step != MAX_STEPS:
        raise SystemExit(
            f"attempt 2 went from step {second.first_step} to {second.last_step}: not as it should"
        )
    kept = {log["step"]: log["loss"] for log in history.logs if "loss" in log}
    if list(kept) != list(range(LOGGING_STEPS, MAX_STEPS + 1, LOGGING_STEPS)):
        raise SystemExit("the loss curve has a gap, or a step twice")
    for step, loss in lost.items():
        if f"{kept[step]:.4g}" != f"{loss:.4g}":  # Trainer prints four digits
            raise SystemExit(f"step {step} was done twice, with a loss of {loss} and then of {kept[step]}")


def make_table(history: History, killed_at: float) -> Table:
    table = Table(title="The run, from its own records", title_justify="left")
    for column in ("attempt", "steps", "checkpoints", "end", "redone", "time lost"):
        table.add_column(column, justify="left" if column == "end" else "right", no_wrap=True)
    first, second = history.attempts
    table.add_row(
        "1", f"1 to {first.last_step}", _committed(first), f"[red]killed[/] at {first.last_step}", "", ""
    )
    table.add_row(
        "2",
        f"{second.first_step + 1} to {second.last_step}",
        _committed(second),
        f"[green]{second.state}[/]",
        str(first.last_step - second.first_step),
        f"{seconds_lost(history, killed_at):.1f} s",
    )
    return table


def seconds_lost(history: History, killed_at: float) -> float:
    """From the kill until the run was again where it had been: start-up, restore, steps done again."""
    first, second = history.attempts
    return (
        min(
            log["time"]
            for log in history.logs
            if log["attempt"] == second.number and log["step"] >= first.last_step
        )
        - killed_at
    )


def draw(history: History, lost: dict[int, float], killed_at: float, path: Path) -> None:
    """The loss by step, and how far the run was by time, over both attempts."""
    figure = Figure(figsize=(13, 5), layout="constrained")
    figure.suptitle("One run, two machines: killed by SIGKILL, continued from storage")
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    draw_loss(left, history, lost)
    draw_way(right, history, killed_at)
    figure.savefig(path, dpi=120)


def draw_loss(axes: Axes, history: History, lost: dict[int, float]) -> None:
    first, second = history.attempts
    logs = [log for log in history.logs if "loss" in log]
    top = 1.15 * max(log["loss"] for log in logs)
    axes.axvspan(second.first_step, first.last_step, color=LOSS, alpha=0.1)
    for info in history.attempts:
        # A curve begins where the one before ends: at the checkpoint.
        points = [log for log in logs if log["attempt"] == info.number or log["step"] == info.first_step]
        steps, losses = [log["step"] for log in points], [log["loss"] for log in points]
        axes.plot(steps, losses, color=COLOURS[info.number], label=f"attempt {info.number}")
        committed = [key.step for key in info.checkpoints]
        axes.plot(committed, [0.0] * len(committed), "^", color=COLOURS[info.number], clip_on=False, zorder=3)
    if lost:
        style = {"color": "grey", "linestyle": ":", "marker": "o", "fillstyle": "none"}
        axes.plot(list(lost), list(lost.values()), label="attempt 1, superseded", **style)
    axes.plot([], [], "^", color="black", label="committed checkpoint")
    axes.axvline(first.last_step, color=LOSS, linestyle="--")
    axes.annotate(f" killed at step {first.last_step}", (first.last_step, 0.97 * top), va="top", color=LOSS)
    axes.axvline(second.first_step, color=COLOURS[2], linestyle="--")
    resumed = f"resumed from checkpoint-{second.first_step} "
    axes.annotate(resumed, (second.first_step, 0.97 * top), va="top", ha="right", color=COLOURS[2])
    axes.set(xlabel="step", ylabel="training loss", xlim=(0, MAX_STEPS), ylim=(0, top))
    axes.legend(loc="upper right")


def draw_way(axes: Axes, history: History, killed_at: float) -> None:
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
    axes.annotate("another machine\nstarts and restores", (middle, 10), ha="center", color=LOSS)
    axes.set(xlabel="seconds since the run began", ylabel="step", ylim=(0, 1.03 * MAX_STEPS), xlim=(0, None))


def _committed(info: AttemptInfo) -> str:
    steps = [key.step for key in info.checkpoints]
    return f"{len(steps)}: {steps[0]} to {steps[-1]}" if steps else "none"


def _origin(info: AttemptInfo) -> str:
    return f"from checkpoint-{info.first_step}" if info.resumed_from else "at step 0"


def _runs(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else FOLDER))
