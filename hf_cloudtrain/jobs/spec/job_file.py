"""The job file: one YAML document that says what to run, on how many machines, and where its checkpoints go.

    read_job(path) -> Job        everything wrong with the file is told at once, by line; nothing is started here
    job.plan()     -> Plan       nodes, processes, and the environment of each node: data, the same for every engine

PeriFlow's files are read as they are. Its keys are those of its public examples
(https://github.com/friendliai/periflow-python-sdk/tree/main/examples); `run_url`, `engine`, `max_restarts`, `env` and
the blocks of the engines are ours.
"""

from __future__ import annotations

import os
import posixpath
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
    model_validator,
)

from hf_cloudtrain import env as variables
from hf_cloudtrain.errors import ConfigurationError, JobFileError
from hf_cloudtrain.jobs.spec.diagnostics import MAX_BYTES, Document, Place, Problem, dotted, read_document
from hf_cloudtrain.jobs.spec.explainer import Explainer, quoted
from hf_cloudtrain.jobs.spec.machine import Machine, shape
from hf_cloudtrain.jobs.spec.node_plan import Plan
from hf_cloudtrain.jobs.spec.values import (
    CommandText,
    Count,
    DatasetName,
    Folder,
    Mount,
    Name,
    RunUrl,
    S3Url,
    Seconds,
    SlurmTime,
    Value,
    Variable,
    VmName,
    Whole,
    Word,
    check_folder,
    check_mount,
    check_vm,
)
from hf_cloudtrain.runtime.redaction import visible

MAX_PROBLEMS = 50
"""Problems told of one file; a file with more of them is no job file."""

# --- The document ------------------------------------------------------------------------------------------------------


class _Block(BaseModel):
    model_config = ConfigDict(
        extra="forbid", frozen=True, hide_input_in_errors=True, use_attribute_docstrings=True
    )

    @model_validator(mode="before")
    @classmethod
    def _leave_out_empty(cls, data: Any) -> Any:
        """`vm:` with nothing after it is as good as none, for what may be left out."""
        if not isinstance(data, dict):
            return data
        optional = {name for name, field in cls.model_fields.items() if not field.is_required()}
        return {key: value for key, value in data.items() if value is not None or key not in optional}


def _as_command(value: Any) -> Any:
    return {"run": value} if isinstance(value, str) else value


class Command(_Block):
    """What bash runs on each node."""

    setup: str | None = None
    """Runs before `run`, once on each node, such as `pip install -r requirements.txt`."""
    run: CommandText
    """The training, such as `torchrun main.py`: how many and where is in the environment."""


class Docker(_Block):
    """The image and the command."""

    image: Word | None = None
    """Image to run in, where the engine has one."""
    command: Annotated[Command, BeforeValidator(_as_command, json_schema_input_type=str | Command)]
    """One text, or `setup` and `run`."""


class Workspace(_Block):
    """The folder that is given with `-d`, as the job sees it."""

    mount_path: Mount = "/workspace"
    """Where the job finds the workspace."""


class JobSetting(_Block):
    """What runs."""

    type: Literal["custom"] = "custom"
    """PeriFlow's kind of job; a script of one's own is custom."""
    docker: Docker
    """The image and the command."""
    workspace: Workspace = Workspace()
    """The folder that is given with `-d`, as the job sees it."""


class Checkpoint(_Block):
    """Where the script keeps its checkpoints."""

    output_checkpoint_dir: Folder | None = None
    """Folder that the newest checkpoint is restored into before the command starts; relative to the workspace."""


class Data(_Block):
    """The dataset of the job."""

    name: DatasetName
    """Dataset of the store; `name@version` is one of its versions, else the newest."""
    mount_path: Mount
    """Where the job finds it, to read."""


class Local(_Block):
    """Options of the engine `local`."""

    nodes: Count | None = None
    """Agents to start. Default: as `vm` and `num_devices` have it."""
    nproc_per_node: Count | None = None
    """Processes of each agent. Default: as `vm` and `num_devices` have it."""


class Slurm(_Block):
    """Options of the engine `slurm`: those of `sbatch`, by their names there."""

    nodes: Count | None = None
    """Machines. Default: as `vm` and `num_devices` have it."""
    nproc_per_node: Count | None = None
    """Processes on each machine. Default: as `vm` and `num_devices` have it."""
    partition: Word | None = None
    """Partition to queue in. Default: the cluster's."""
    account: Word | None = None
    """Account to charge."""
    qos: Word | None = None
    """Quality of service to ask for."""
    time: SlurmTime | None = None
    """Time limit, such as `1-12:00:00`. Default: the partition's."""
    gres: Word | None = None
    """Resources of each node, such as `gpu:v100:4`. Default: the GPUs of `vm`."""


class Skypilot(_Block):
    """Options of the engine `skypilot`."""

    managed: bool = True
    """A managed job, which SkyPilot starts again on another machine when its own is taken away."""
    bucket: RunUrl | None = None
    """Bucket to mount, to look into; checkpoints do not go through it. Default: that of `run_url`."""


class Metric(_Block):
    """A number that SageMaker reads from the log."""

    name: Word
    """Its name in CloudWatch, such as `train:loss`."""
    regex: CommandText
    """Finds it in a line of the log; its first group is the number."""


class Sagemaker(_Block):
    """Options of the engine `sagemaker`."""

    role: Word | None = None
    """ARN of the role that the training job takes on."""
    instance_type: Word | None = None
    """Such as `ml.g5.12xlarge`. Default: the one that has the GPUs of `vm`."""
    checkpoint_s3_uri: S3Url | None = None
    """What SageMaker keeps equal to `/opt/ml/checkpoints`. Default: a folder of `run_url`."""
    output_s3_uri: S3Url | None = None
    """Where SageMaker puts `/opt/ml/model`. Default: a folder of `run_url`."""
    channels: dict[Name, S3Url] = {}
    """Further data, by the name of its channel: `/opt/ml/input/data/NAME`."""
    metric_definitions: list[Metric] = []
    """Numbers for CloudWatch."""
    max_run: Seconds | None = None
    """Longest training, in seconds."""
    max_wait: Seconds | None = None
    """Longest training and waiting for spot machines together, in seconds."""


EngineName = Literal["local", "slurm", "skypilot", "sagemaker"]


class Job(_Block):
    """What a job file says; `read_job` reads one.

    Example:
        >>> job = read_job("job.yml")
        >>> plan = job.plan()
        >>> plan.nodes, plan.nproc_per_node
        (2, 4)
    """

    experiment: Name | None = None
    """Jobs that belong together."""
    name: Name
    """Name of the job, and of its run."""
    vm: VmName | None = None
    """Machine: `[cloud]-[memory]-[gpu]-[count]g-[region][-spot]`, such as `azure-16gb-v100-4g-eastus-spot`."""
    num_devices: Count | None = None
    """GPUs in all, a multiple of what a machine has. Default: those of one machine, or 1 without `vm`."""
    job_setting: JobSetting
    """What runs."""
    checkpoint: Checkpoint = Checkpoint()
    """Where the script keeps its checkpoints."""
    data: Data | None = None
    """The dataset of the job."""
    run_url: RunUrl | None = None
    """Where the run goes: any fsspec URL, or an absolute path. Default: a folder of the user's store."""
    engine: EngineName = "local"
    """What starts the processes."""
    max_restarts: Annotated[Whole, Field(ge=0, le=10_000)] = 3
    """Restarts after a crash. A machine that is taken away is no crash."""
    env: Annotated[dict[Variable, Value | None], Field(repr=False)] = {}
    """Variables for the command; one without a value is taken from the shell that submits the job."""
    local: Local = Local()
    """Options of the engine `local`."""
    slurm: Slurm = Slurm()
    """Options of the engine `slurm`."""
    skypilot: Skypilot = Skypilot()
    """Options of the engine `skypilot`."""
    sagemaker: Sagemaker = Sagemaker()
    """Options of the engine `sagemaker`."""

    @property
    def command(self) -> Command:
        """What bash runs on each node."""
        return self.job_setting.docker.command

    @property
    def machine(self) -> Machine | None:
        """What `vm` names."""
        return None if self.vm is None else Machine.parse(self.vm)

    @property
    def checkpoint_dir(self) -> str | None:
        """The checkpoint folder as the script sees it, absolute; None where the job names none."""
        folder = self.checkpoint.output_checkpoint_dir
        if folder is None:
            return None
        return posixpath.normpath(posixpath.join(self.job_setting.workspace.mount_path, folder))

    def plan(
        self, engine: EngineName | None = None, *, nodes: int | None = None, nproc_per_node: int | None = None
    ) -> Plan:
        """How many nodes with how many processes; an argument beats the engine's block, and that beats `vm`.

        Raises:
            ConfigurationError: the devices cannot be divided so.
        """
        block = getattr(self, engine or self.engine)
        nodes, nproc_per_node = shape(
            self.num_devices,
            self.vm,
            nodes or getattr(block, "nodes", None),
            nproc_per_node or getattr(block, "nproc_per_node", None),
        )
        return Plan(nodes, nproc_per_node, self.checkpoint_dir, self.env)


# --- The file ----------------------------------------------------------------------------------------------------------

UNSUPPORTED = {
    "job_setting.docker.env_var": "write the variables below `env`, at the top.",
    "job_setting.docker.credential_id": "log in to the registry where the image is pulled.",
    "job_setting.launch_mode": "the command is started once on each node.",
    "job_setting.template_id": "only jobs of the type 'custom' are run.",
    "job_setting.model_config": "only jobs of the type 'custom' are run.",
    "checkpoint.input": "a job resumes from its `run_url`; a model to start from is a dataset, below `data`.",
    "dist": "how the ranks share the work is the script's own matter.",
    "plugin": "report from the script, as with report_to='wandb', and put its key below `env`.",
    "<<": "merge keys are not accepted. Write the keys out.",
}
"""Keys of PeriFlow's later files, and what there is in their place."""


def read_job(path: str | os.PathLike[str]) -> Job:
    """The job in a file. Nothing is started.

    Raises:
        JobFileError: with everything that is wrong, each with its line.
    """
    with Path(path).open("rb") as file:
        return parse_job(file.read(MAX_BYTES + 1), os.fspath(path))


def parse_job(content: bytes, source: str = "job.yml") -> Job:
    r"""The job in the content of a file; `source` is what errors call it.

    Raises:
        JobFileError: with everything that is wrong, each with its line.

    Example:
        >>> job = parse_job(b"name: mnli\njob_setting: {docker: {command: torchrun train.py}}")
        >>> job.plan().world_size
        1
    """
    document = read_document(content)
    job, problems = _validated(document)
    if problems or job is None:
        raise JobFileError("\n".join(visible(f"{source}:{problem}") for problem in _told(problems)))
    return job


def _validated(document: Document) -> tuple[Job | None, list[Problem]]:
    if document.data is None:
        return None, list(document.problems)
    job = None
    problems = list(document.problems)
    try:
        job = Job.model_validate(document.data)
    except ValidationError as error:
        explainer = Explainer(Job, UNSUPPORTED, secret=frozenset(("env",)), limit=MAX_PROBLEMS)
        problems += explainer.explain(error, document)
    # On what was written rather than on the job: a person wants to hear of all that is wrong in one go.
    problems += [Problem(document.line(place), text, place) for place, text in _relations(document.data)]
    return job, problems


def _told(problems: list[Problem]) -> tuple[str, ...]:
    problems.sort(key=lambda problem: problem.line)
    told = [str(problem) for problem in problems[:MAX_PROBLEMS]]
    if len(problems) > MAX_PROBLEMS:
        told.append(f"{problems[MAX_PROBLEMS].line}: … and {len(problems) - MAX_PROBLEMS} more.")
    return tuple(told)


def _relations(data: dict[str, Any]) -> Iterator[tuple[Place, str]]:
    """What is wrong between values that are each right by themselves."""
    yield from _shape_problems(data)
    yield from _mount_problems(data)
    place = ("env", variables.GRACE)
    grace = _valid(data, place, str)
    if grace is not None:
        try:
            seconds = float(grace)
        except ValueError:
            seconds = -1.0
        if not 0 < seconds < 1e9:
            yield place, f"{dotted(place)} is {quoted(grace)}, not a number of seconds above 0."


def _shape_problems(data: dict[str, Any]) -> Iterator[tuple[Place, str]]:
    engine = _valid(data, ("engine",), str) or "local"
    try:
        shape(
            _valid(data, ("num_devices",), _count),
            _valid(data, ("vm",), check_vm),
            _valid(data, (engine, "nodes"), _count),
            _valid(data, (engine, "nproc_per_node"), _count),
        )
    except ConfigurationError as error:
        yield ("num_devices",), str(error)


def _mount_problems(data: dict[str, Any]) -> Iterator[tuple[Place, str]]:
    workspace = _valid(data, ("job_setting", "workspace", "mount_path"), check_mount) or "/workspace"
    dataset = _valid(data, ("data", "mount_path"), check_mount)
    folder = _valid(data, ("checkpoint", "output_checkpoint_dir"), check_folder)
    if dataset is not None and _is_below(workspace, dataset):
        place: Place = ("data", "mount_path")
        yield (
            place,
            f"{dotted(place)} is {quoted(dataset)}, which would hide the workspace {quoted(workspace)}. Name another.",
        )
    if folder is None:
        return
    place = ("checkpoint", "output_checkpoint_dir")
    folder = posixpath.normpath(posixpath.join(workspace, folder))
    if _is_below(workspace, folder):
        yield (
            place,
            f"{dotted(place)} is {quoted(folder)}, the workspace with the code in it. Name a folder of its own.",
        )
    elif dataset is not None and (_is_below(folder, dataset) or _is_below(dataset, folder)):
        yield (
            place,
            f"{dotted(place)} is {quoted(folder)}, where the dataset is, which is there to read. Name another folder.",
        )


def _is_below(path: str, folder: str) -> bool:
    return path == folder or path.startswith(folder.rstrip("/") + "/")


_count = TypeAdapter[int](Count).validate_python


def _valid(data: Any, place: Place, check: Any) -> Any:
    """The value at a place, where there is one and it is right."""
    for key in place:
        data = data.get(key) if isinstance(data, dict) else None
    try:
        return check(data) if isinstance(data, str) else None
    except ValueError:
        return None
