"""The keys of a job file, as models: their types, their defaults and, as docstrings, their descriptions in the schema.

PeriFlow's files are read as they are. Its keys are those of its public examples
(https://github.com/friendliai/periflow-python-sdk/tree/main/examples); `run_url`, `engine`, `max_restarts`, `env` and
the blocks of the engines are ours.
"""

from __future__ import annotations

import posixpath
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from hf_cloudtrain.errors import ConfigurationError
from hf_cloudtrain.jobs.spec.node_plan import Plan
from hf_cloudtrain.jobs.spec.values import (
    CommandText,
    Count,
    DatasetName,
    Folder,
    Machine,
    MountPath,
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
    is_below,
)


class _Block(BaseModel):
    model_config = ConfigDict(
        extra="forbid", frozen=True, hide_input_in_errors=True, use_attribute_docstrings=True
    )

    @model_validator(mode="before")
    @classmethod
    def _leave_out_empty(cls, data: Any) -> Any:
        """An empty optional key (`vm:`) counts as left out."""
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
    """The training, such as `torchrun main.py`: torchrun finds nodes and processes in its environment."""


class Docker(_Block):
    """The image and the command."""

    image: Word | None = None
    """Image to run in, if the engine runs images."""
    command: Annotated[Command, BeforeValidator(_as_command, json_schema_input_type=str | Command)]
    """One text, or `setup` and `run`."""


class Workspace(_Block):
    """The folder that is submitted with `-d`, as the job sees it."""

    mount_path: MountPath = "/workspace"
    """Where the job finds the workspace. The folder given with `-d` keeps its name in it: `/workspace/cifar`."""


class JobSetting(_Block):
    """What runs."""

    type: Literal["custom"] = "custom"
    """PeriFlow's kind of job; your own script is custom."""
    docker: Docker
    workspace: Workspace = Workspace()


class Checkpoint(_Block):
    """Where the script keeps its checkpoints."""

    output_checkpoint_dir: Folder | None = None
    """Folder that the newest checkpoint is restored into before the command starts; relative to where it starts."""


class Data(_Block):
    """The dataset of the job."""

    name: DatasetName
    """Dataset of the store: its newest version, or the one in `name@version`."""
    mount_path: MountPath
    """Where the job finds it, read-only."""


class Local(_Block):
    """Options of the engine `local`."""

    nodes: Count | None = None
    """Number of nodes. Default: from `vm` and `num_devices`."""
    nproc_per_node: Count | None = None
    """Processes on each node. Default: from `vm` and `num_devices`."""


class Slurm(Local):
    """Options of the engine `slurm`, named as the options of `sbatch`."""

    partition: Word | None = None
    """Partition to queue in. Default: the cluster's."""
    account: Word | None = None
    """Account to charge."""
    qos: Word | None = None
    """Quality of service to request."""
    time: SlurmTime | None = None
    """Time limit, such as `1-12:00:00`. Default: the partition's."""
    gres: Word | None = None
    """Resources of each node, such as `gpu:v100:4`. Default: the GPUs of `vm`."""


class Skypilot(_Block):
    """Options of the engine `skypilot`."""

    managed: bool = True
    """A managed job, which SkyPilot restarts on a new machine when its machine is preempted."""
    bucket: RunUrl | None = None
    """Bucket to mount for browsing; checkpoints do not go through it. Default: the bucket of `run_url`."""


class Metric(_Block):
    """A number that SageMaker reads from the log."""

    name: Word
    """Its name in CloudWatch, such as `train:loss`."""
    regex: CommandText
    """Matches a line of the log; its first group is the number."""


class Sagemaker(_Block):
    """Options of the engine `sagemaker`."""

    role: Word | None = None
    """ARN of the role that the training job assumes."""
    instance_type: Word | None = None
    """Such as `ml.g5.12xlarge`. Default: the type with the GPUs of `vm`."""
    checkpoint_s3_uri: S3Url | None = None
    """Where SageMaker synchronizes `/opt/ml/checkpoints`. Default: a folder of `run_url`."""
    output_s3_uri: S3Url | None = None
    """Where SageMaker stores `/opt/ml/model`. Default: a folder of `run_url`."""
    channels: dict[Name, S3Url] = {}
    """More data, by channel name: mounted at `/opt/ml/input/data/NAME`."""
    metric_definitions: list[Metric] = []
    """Numbers for CloudWatch."""
    max_run: Seconds | None = None
    """Longest training time, in seconds."""
    max_wait: Seconds | None = None
    """Longest training time plus waiting time for spot machines, in seconds."""


EngineName = Literal["local", "slurm", "skypilot", "sagemaker"]


def shape(
    num_devices: int | None, vm: str | None, nodes: int | None, nproc_per_node: int | None
) -> tuple[int, int]:
    """Number of nodes, and of processes on each; `nodes` and `nproc_per_node` override what `vm` has.

    Raises:
        ConfigurationError: the devices cannot be divided evenly.

    Example:
        >>> shape(8, "azure-16gb-v100-4g-eastus-spot", None, None)
        (2, 4)
    """
    if vm is not None:
        gpus = Machine.parse(vm).gpus
        found = _quotient(num_devices or gpus, gpus, f"the {gpus} GPUs of {vm!r}")
        return nodes or found, nproc_per_node or gpus
    if nodes and nproc_per_node:
        return nodes, nproc_per_node
    devices = num_devices or nodes or nproc_per_node or 1
    parts, key = (nodes, "nodes") if nodes else (nproc_per_node or devices, "nproc_per_node")
    rest = _quotient(devices, parts, f"{key}={parts}")
    return (parts, rest) if nodes else (rest, parts)


def _quotient(devices: int, parts: int, divisor: str) -> int:
    lower = devices // parts * parts
    if lower != devices:
        hint = f"Use {lower} or {lower + parts}." if lower else f"Use {parts}."
        raise ConfigurationError(f"'num_devices' must be a multiple of {divisor}, not {devices}. {hint}")
    return devices // parts


class Job(_Block):
    """The content of a job file; `read_job` reads one.

    Example:
        >>> job = read_job("job.yml")
        >>> plan = job.plan()
        >>> plan.nodes, plan.nproc_per_node
        (2, 4)
    """

    experiment: Name | None = None
    """Name of a group of jobs."""
    name: Name
    """Name of the job, and of its run."""
    vm: VmName | None = None
    """Machine: `[cloud]-[memory]-[gpu]-[count]g-[region][-spot]`, such as `azure-16gb-v100-4g-eastus-spot`."""
    num_devices: Count | None = None
    """Total number of GPUs, a multiple of those of a machine. Default: one machine, or 1 without `vm`."""
    job_setting: JobSetting
    checkpoint: Checkpoint = Checkpoint()
    data: Data | None = None
    """The dataset of the job."""
    run_url: RunUrl | None = None
    """Where the run is stored: any fsspec URL, or an absolute path. Default: a folder of your store."""
    engine: EngineName = "local"
    """What starts the processes."""
    launch: Literal["auto", "off"] = "off"
    """`auto`: the command runs as below `cloudtrain launch`, so that unmodified scripts upload and resume."""
    max_restarts: Annotated[Whole, Field(ge=0, le=10_000)] = 3
    """Restarts after a crash. A preemption does not count as a crash."""
    env: Annotated[dict[Variable, Value | None], Field(repr=False)] = {}
    """Variables for the command; one without a value is taken from the shell that submits the job."""
    local: Local = Local()
    slurm: Slurm = Slurm()
    skypilot: Skypilot = Skypilot()
    sagemaker: Sagemaker = Sagemaker()

    @property
    def command(self) -> Command:
        """What bash runs on each node."""
        return self.job_setting.docker.command

    @property
    def machine(self) -> Machine | None:
        """The machine that `vm` names."""
        return None if self.vm is None else Machine.parse(self.vm)

    @property
    def checkpoint_dir(self) -> str | None:
        """The checkpoint folder as the script sees it, absolute; None where the job names none."""
        folder = self.checkpoint.output_checkpoint_dir
        if folder is None:
            return None
        return posixpath.normpath(posixpath.join(self.job_setting.workspace.mount_path, folder))

    def start_folder(self, name: str) -> str:
        """Where the command starts: in the user's folder of this name, which is below the mount path; "" without one."""
        return posixpath.normpath(posixpath.join(self.job_setting.workspace.mount_path, name))

    def with_folder(self, name: str) -> Job:
        """The job with a user's folder of this name: a relative checkpoint folder is in it, where the command starts.

        Raises:
            ConfigurationError: the checkpoints or the dataset would be at the path of that folder, or its name has a
                character that no path in a job file may have.
        """
        start = self.start_folder(name)
        data = None if self.data is None else self.data.mount_path
        folder = self.checkpoint.output_checkpoint_dir
        if folder is not None:
            folder = posixpath.normpath(posixpath.join(start, folder))
            try:
                check_folder(folder)
            except ValueError as error:
                raise ConfigurationError(
                    f"'checkpoint.output_checkpoint_dir' is in the folder given with -d, whose name it cannot contain: it "
                    f"{error} Rename the folder, or write an absolute path."
                ) from None
        for key, path in (("checkpoint.output_checkpoint_dir", folder), ("data.mount_path", data)):
            if path is not None and is_below(start, path):
                raise ConfigurationError(
                    f"{key!r} is {path!r}, where the folder given with -d is: {start!r}. Use a different path, or rename "
                    "the folder."
                )
        return self.model_copy(update={"checkpoint": Checkpoint(output_checkpoint_dir=folder)})

    def plan(
        self, engine: EngineName | None = None, *, nodes: int | None = None, nproc_per_node: int | None = None
    ) -> Plan:
        """Nodes and processes: an argument overrides the engine's block, and the block overrides `vm`.

        Raises:
            ConfigurationError: the devices cannot be divided evenly.
        """
        block = getattr(self, engine or self.engine)
        nodes, nproc_per_node = shape(
            self.num_devices,
            self.vm,
            nodes or getattr(block, "nodes", None),
            nproc_per_node or getattr(block, "nproc_per_node", None),
        )
        launch, experiment = self.launch == "auto", self.experiment
        return Plan(
            nodes, nproc_per_node, self.checkpoint_dir, self.env, experiment=experiment, launch=launch
        )
