"""The job file: PeriFlow's files are read as they are, all mistakes are reported at once, and no secret is shown."""

from __future__ import annotations

import difflib
import json
import re
import time
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_cloudtrain.cli.commands.job import TEMPLATE
from hf_cloudtrain.errors import ConfigurationError, JobFileError
from hf_cloudtrain.jobs.spec.diagnostics import every_key
from hf_cloudtrain.jobs.spec.job import Job
from hf_cloudtrain.jobs.spec.job_file import parse_job, read_job

DATA = Path(__file__).resolve().parents[3] / "data"
SMALLEST = "name: mnli\njob_setting: {docker: {command: torchrun train.py}}\n"

SHOWN_SETTING = re.compile(r"^( *)# ( *(?:- )?\w+:(?: |$))", re.MULTILINE)
"""A setting of the template that is shown as a comment; other comments are sentences."""


def problems(text: str) -> list[str]:
    with pytest.raises(JobFileError) as caught:
        parse_job(text.encode("utf-8", "surrogatepass"))
    return [problem.removeprefix("job.yml:") for problem in caught.value.problems]


def job_with(text: str) -> Job:
    return parse_job((SMALLEST + text).encode())


def only_problem(text: str) -> str:
    """The problem of the smallest job with these lines, which begin at line 3."""
    (problem,) = problems(SMALLEST + text)
    return problem


# --- What is accepted ---


def test_the_glue_file_of_periflow_is_read_as_it_is() -> None:
    job = read_job(DATA / "periflow_glue.yml")
    assert (job.experiment, job.name, job.num_devices) == ("huggingface-glue", "glue-run", 8)
    assert job.job_setting.docker.image == "friendliai/periflow:sdk"
    assert job.job_setting.workspace.mount_path == "/workspace"
    assert job.checkpoint_dir == "/workspace/ckpt"
    assert job.data is not None
    assert (job.data.name, job.data.mount_path) == ("mnli", "/workspace/data")
    assert job.command.setup is None
    assert job.command.run.splitlines()[1] == r"  --model_name_or_path bert-base-cased \ "[:-1]
    assert job.machine is not None
    assert job.machine.is_spot
    assert (job.engine, job.run_url, job.max_restarts) == ("local", None, 3)


@pytest.mark.parametrize("name", ["periflow_glue.yml", "periflow_cifar.yml"])
@pytest.mark.parametrize("engine", ["local", "slurm", "skypilot", "sagemaker"])
def test_the_files_of_periflow_are_two_nodes_of_four_processes_on_every_engine(
    name: str, engine: Any
) -> None:
    plan = read_job(DATA / name).plan(engine)
    assert (plan.nodes, plan.nproc_per_node, plan.world_size) == (2, 4, 8)


def test_a_name_and_a_command_are_enough() -> None:
    job = job_with("")
    assert job.command.run == "torchrun train.py"
    assert job.job_setting.workspace.mount_path == "/workspace"
    assert (job.data, job.checkpoint_dir, job.vm, dict(job.env)) == (None, None, None, {})
    assert job.plan().world_size == 1


def test_a_command_may_have_a_setup() -> None:
    job = parse_job(
        b"name: a\njob_setting:\n docker:\n  command:\n   setup: pip install x\n   run: python y\n"
    )
    assert (job.command.setup, job.command.run) == ("pip install x", "python y")


def test_empty_keys_count_as_left_out() -> None:
    # As PeriFlow's template has them.
    job = job_with(
        "vm:\nnum_devices:\ndata:\ncheckpoint:\n  output_checkpoint_dir:\nslurm:\n  time: ~\nenv:\n"
    )
    assert job == job_with("")


def test_variables_are_the_texts_in_the_file() -> None:
    job = job_with("env:\n  A: 1\n  B: yes\n  C: 010\n  D: 2026-01-01\n  E: ''\n  F:\n")
    assert job.env == {"A": "1", "B": "yes", "C": "010", "D": "2026-01-01", "E": "", "F": None}


def test_names_and_times_that_look_like_numbers_stay_text() -> None:
    job = parse_job(SMALLEST.replace("mnli", "1.10").encode() + b"slurm: {time: 1:30:00, account: 0123}\n")
    assert (job.name, job.slurm.time, job.slurm.account) == ("1.10", "1:30:00", "0123")


def test_a_relative_checkpoint_folder_is_in_the_workspace() -> None:
    assert job_with("checkpoint: {output_checkpoint_dir: out/ckpt/}").checkpoint_dir == "/workspace/out/ckpt"


def test_paths_are_normalized() -> None:
    job = job_with("data: {name: mnli@2, mount_path: //data//mnli/./}")
    assert job.data is not None
    assert (job.data.name, job.data.mount_path) == ("mnli@2", "/data/mnli")


@pytest.mark.parametrize(
    "path", ["/usr/src/app", "/usr/local/data", "/opt/ml", "/home/me", "/var/data", "/mnt"]
)
def test_a_folder_that_hides_nothing_may_be_a_mount_path(path: str) -> None:
    job = job_with(f"data: {{name: {'a' * 64}, mount_path: {path}}}")  # the longest name of a dataset
    assert job.data is not None
    assert job.data.mount_path == path


@pytest.mark.parametrize("url", ["s3://b/r", "hf://buckets/me/r", "file:///tmp/r", "/tmp/r", "memory://r"])
def test_a_run_url_may_be_any_url_or_an_absolute_path(url: str) -> None:
    assert job_with(f"run_url: {url}").run_url == url


def test_a_run_url_below_the_home_folder_is_that_of_the_user_who_submits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HOME", "/home/user")
    assert job_with("run_url: ~/runs").run_url == "/home/user/runs"


def test_every_key_is_in_the_template_and_all_of_it_can_be_used() -> None:
    job = parse_job(TEMPLATE.encode())
    assert (job.name, job.plan().world_size) == ("my-job", 1)
    settings_shown = SHOWN_SETTING.sub(r"\1\2", TEMPLATE)
    whole = parse_job(settings_shown.encode())
    shown = set(_keys_of(yaml.safe_load(settings_shown)))
    assert shown >= {path for path in every_key(Job) if path[:1] != ("env",)}
    assert whole.plan().world_size == 1, "the block of an engine beats vm"
    assert whole.plan("skypilot").nodes == 2
    assert whole.sagemaker.metric_definitions[0].name == "train:loss"


def _keys_of(data: Any, above: tuple[str, ...] = ()) -> Any:
    for key, value in data.items():
        yield (*above, key)
        for item in value if isinstance(value, list) else [value]:
            if isinstance(item, dict):
                yield from _keys_of(item, (*above, key))


@pytest.mark.parametrize(
    "text", [*(DATA.glob("periflow_*.yml")), SMALLEST, TEMPLATE], ids=lambda text: str(text)[-20:]
)
def test_what_is_read_also_fits_the_schema(text: Any) -> None:
    schema = Job.model_json_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    content = text.read_text() if isinstance(text, Path) else text
    jsonschema.validate(yaml.safe_load(content), schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**yaml.safe_load(content), "nmae": 1}, schema)


def test_every_key_has_a_description_in_the_schema() -> None:
    schema = Job.model_json_schema()
    for model in (schema, *schema["$defs"].values()):
        for name, field in model["properties"].items():
            of_block = schema["$defs"].get(field.get("$ref", "").split("/")[-1], {})
            assert len(field.get("description") or of_block.get("description", "")) > 8, name


# --- What is refused ---


def test_all_problems_are_reported_at_once_with_line_and_key() -> None:
    reported = problems("""\
nmae: x
vm: azure-v100
num_devices: six
job_setting:
  docker: {comand: x}
data:
  name: a b
env: {1X: a}
slurm: {nodes: 0}
engine: slrum
""")
    lines = [(line.split(":")[0], line.split("'")[1]) for line in reported]
    assert lines == [
        ("1", "name"),
        ("1", "nmae"),
        ("2", "vm"),
        ("3", "num_devices"),
        ("5", "job_setting.docker.command"),
        ("5", "job_setting.docker.comand"),
        ("6", "data.mount_path"),
        ("7", "data.name"),
        ("8", "env.1X"),
        ("9", "slurm.nodes"),
        ("10", "engine"),
    ]


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("num_devces: 1", "The nearest known key is 'num_devices'."),
        ("mount_path: /x", "known below 'job_setting.workspace' and below 'data'"),
        ("data: {name: x, mount_path: /x, run_url: s3://b/r}", "known at the top level"),
        ("comand: x", "The nearest known key is 'command', below 'job_setting.docker'"),
        ("slurm: {xyzzy: 1}", "Known here: nodes, nproc_per_node, partition"),
        ("sagemaker: {metric_definitions: [{name: a, regex: b, regx: c}]}", "nearest known key is 'regex'."),
        ("plugin: {wandb: {credential_id: x}}", "report_to='wandb'"),
        ("checkpoint: {input: {id: 1, mount_path: /x}}", "resumes from its `run_url`"),
        ("<<: {engine: slurm}", "merge keys"),
    ],
)
def test_an_unknown_key_is_reported_with_the_nearest_known_one(text: str, hint: str) -> None:
    problem = only_problem(text)
    assert problem.startswith("3: ")
    assert hint in problem


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("vm: azure-16gb-v100-4g-eastus-spot\nnum_devices: 6", "a multiple of the 4 GPUs"),
        ("vm: azure-16gb-v100-4g-eastus-spot\nnum_devices: 2", "Use 4."),
        ("vm: Azure-16gb-v100-4g-eastus", "is not a machine type"),
        ("vm: azure-16gb-v100-0g-eastus", "is not a machine type"),
        ("num_devices: 0", "must be at least 1, not '0'"),
        ("num_devices: 1.5", "whole number"),
        ("num_devices: 99999999999999999999", "must be at most 65536"),
        ("num_devices: 6_0", "whole number, not '6_0'"),
        ("vm: azure-16gb-v100-4g-eastus\nnum_devices: 6.0", "whole number, not '6.0'"),
        ("max_restarts: 3.0", "whole number"),
        ("num_devices: [8]", "whole number, not a list"),
        ("num_devices: {a: 8}", "whole number, not a mapping"),
        ("num_devices: 8\nengine: slurm\nslurm: {nodes: 3}", "a multiple of nodes=3"),
        ("max_restarts: -1", "must be at least 0"),
        ("engine: torchrun", "must be 'local', 'slurm', 'skypilot' or 'sagemaker', not 'torchrun'"),
        ("experiment: my jobs", "Try 'my-jobs'"),
        ("data: mnli", "must be a mapping with these keys: name, mount_path"),
        ("data: {name: mnli}", "'data.mount_path' is missing"),
        ("data: {name: '', mount_path: /x}", "'data.name'"),
        ("data: {name: ../x, mount_path: /x}", "'data.name'"),
        ("data: {name: x@../y, mount_path: /x}", "'data.name'"),
        ("data: {name: mnli@new, mount_path: /x}", "the version must be a whole number"),
        ("data: {name: mnli@0, mount_path: /x}", "the version must be a whole number"),
        ("data: {name: checkpoint-5, mount_path: /x}", "the name of a dataset"),
        ("data: {name: 'huggingface:mnli', mount_path: /x}", "public datasets"),
        ("data: {name: x, mount_path: data}", "must be an absolute path"),
        ("data: {name: x, mount_path: /}", "hide"),
        ("data: {name: x, mount_path: /usr/}", "hide the machine's own '/usr'"),
        ("data: {name: x, mount_path: /usr/lib/python3}", "hide the machine's own '/usr'"),
        ("data: {name: x, mount_path: /etc/ssl}", "hide the machine's own '/etc'"),
        ("data: {name: x, mount_path: /usr/local}", "hide the machine's own '/usr/local'"),
        ("data: {name: x, mount_path: /usr/local/lib}", "hide the machine's own '/usr/local/lib'"),
        ("data: {name: x, mount_path: /var/lib}", "hide the machine's own '/var/lib'"),
        ("data: {name: x, mount_path: '/%s'}" % ("x/" * 1024), "control characters, not '/x/x/x"),
        ("data: {name: x, mount_path: /x/../etc}", "without '..'"),
        ("data: {name: x, mount_path: /proc/self}", "hide the machine's own '/proc'"),
        ("data: {name: x, mount_path: /workspace}", "hide the workspace"),
        ('data: {name: x, mount_path: "/x\\ny"}', "control characters"),
        ("checkpoint: {output_checkpoint_dir: .}", "contains the code of the workspace"),
        ("checkpoint: {output_checkpoint_dir: /data/x}\ndata: {name: x, mount_path: /data}", "overlaps the read-only dataset"),
        ("checkpoint: {output_checkpoint_dir: /data}\ndata: {name: x, mount_path: /data/x}", "overlaps the read-only dataset"),
        ("run_url: runs/mnli", "The script does not run in this folder"),
        ("run_url: ''", "must be a URL"),
        ("run_url: s3://b/${USER}/run", "'${USER}' stands in it as it is"),
        ("run_url: s3:/b/run", "Write 's3://b/run'"),
        ("checkpoint: {output_checkpoint_dir: $HOME/ckpt}", "which a job file does not replace"),
        ("checkpoint: {output_checkpoint_dir: ~/ckpt}", "which a job file does not replace"),
        ("run_url: s3://b/%s" % ("x" * 2048), "at most 2048 characters"),
        ("env: [A=1]", "must be a mapping"),
        ("env: {A-B: 1}", "is not the name of a variable"),
        ("env: {RANK: 1}", "set by the engine"),
        ("env: {HF_CLOUDTRAIN_RUN_URL: s3://b/r}", "Write `run_url`"),
        ("env: {HF_CLOUDTRAIN_CHECKPOINT_DIR: /x}", "Write `output_checkpoint_dir`"),
        ("env: {HF_CLOUDTRAIN_GRACE: soon}", "seconds above 0"),
        ("env: {HF_CLOUDTRAIN_GRACE: nan}", "seconds above 0"),
        ("slurm: {partition: 'a\n  b'}", "one word"),
        ("slurm: {qos: --wrap=x}", "does not begin with '-'"),
        ("slurm: {time: tomorrow}", "days-hours"),
        ("slurm: {time: 1\u0660}", "days-hours"),  # a digit elsewhere
        ("skypilot: {managed: maybe}", "true or false"),
        ("sagemaker: {output_s3_uri: gs://b}", "must be an S3 URL"),
        ("sagemaker: {channels: {train: }}", "'sagemaker.channels.train' is empty"),
        ("sagemaker: {metric_definitions: {name: x}}", "must be a list"),
        ("a: *x", "aliases"),
        ("name: again", "'name' is a duplicate: it is already set in line 1"),
    ],
)  # fmt: skip
def test_an_invalid_value_is_refused_with_what_is_valid(text: str, part: str) -> None:
    reported = problems(SMALLEST + text)
    assert any(part in problem for problem in reported), reported
    assert all(problem.split(":")[0] in ("3", "4", "5") for problem in reported)


@pytest.mark.parametrize(
    ("command", "part"),
    [
        ("''", "is empty"),
        ("", "is empty"),
        ("[torchrun, train.py]", "must be a mapping with these keys: setup, run"),
        ("{setup: x}", "command.run' is missing"),
    ],
)
def test_a_job_without_a_command_is_refused(command: str, part: str) -> None:
    (problem,) = problems(f"name: a\njob_setting: {{docker: {{command: {command}}}}}")
    assert problem.startswith("2: ")
    assert part in problem


def test_what_the_reader_refused_is_not_reported_as_missing_too() -> None:
    assert [problem.split(":")[0] for problem in problems("name: *a\n" + SMALLEST.split("\n")[1])] == ["1"]


def test_a_truncated_file_is_reported_once() -> None:
    (problem,) = problems("name: x\njob_setting: [")
    assert problem.startswith("2: invalid YAML")


def test_of_many_mistakes_the_first_ones_are_reported() -> None:
    reported = problems(
        "".join(f"key{i}: &x y\n" for i in range(50)) + "".join(f"key{i}: x\n" for i in range(50, 5000))
    )
    assert [problem.split(":")[0] for problem in reported] == ["1", "1", *map(str, range(1, 50))]
    assert reported[-1] == "49: … and 4952 more."


def test_of_many_mistakes_only_the_reported_ones_are_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    searches = []
    search = difflib.get_close_matches
    monkeypatch.setattr(
        difflib, "get_close_matches", lambda *args, **kw: searches.append(1) or search(*args, **kw)
    )
    reported = problems("".join(f"key{i}: x\n" for i in range(500)) + "num_devices: x\n")
    assert reported.pop(0) == "1: 'name' is missing."
    assert reported.pop(0) == "1: 'job_setting' is missing."
    assert [": unknown key 'key" in problem for problem in reported] == [True] * 48 + [False]
    assert len(searches) <= 100, "each takes a millisecond, and a file may have 30,000 unknown keys"


def test_an_error_has_one_line_per_problem_whatever_it_quotes() -> None:
    with pytest.raises(ConfigurationError) as caught:
        parse_job(b'"a\\nb": 1\nname: "x\\e\\r\\u2028y"\njob_setting: {docker: {command: x}}', "a\nb.yml")
    assert isinstance(caught.value, JobFileError)
    assert [problem.split(": ")[0] for problem in caught.value.problems] == ["a\\nb.yml:1", "a\\nb.yml:2"]
    assert str(caught.value).isascii()


@pytest.mark.parametrize(
    "text",
    [
        "env: hunter2",
        "env: {TOKEN: [hunter2]}",
        "env: {HF_CLOUDTRAIN_RUN_URL: hunter2}",
        "env: {BAD-NAME: hunter2}",
        "HF_TOKEN: hunter2",
        "run_url: s3://key:hunter2@bucket/run",
        "experiment: token=hunter2",
        "env:\n  TOKEN: hunter2\n TOKEN: hunter2",
        "env: {LEVEL=hunter2}",
        "env: {LEVEL=hunter2: a, LEVEL=hunter2: b}",
        "env: {? LEVEL=hunter2 : [x]}",
    ],
)
def test_no_problem_shows_a_secret(text: str) -> None:
    reported = problems(SMALLEST + text)
    assert reported
    assert "hunter2" not in "".join(reported)


@pytest.mark.parametrize(
    "text",
    [
        "? " + "x" * 60_000 + "\n: 1",
        "experiment: " + "token" * 12_000,
        "vm: a-1gb-" + "a-1g-" * 12_000,
        "name: " + "eyJ-" * 15_000,
    ],
    ids=lambda text: text[:12],
)
def test_no_hostile_text_takes_hours(text: str) -> None:
    begun = time.process_time()
    assert problems(SMALLEST + text)
    assert time.process_time() - begun < 10, (
        "a minute and more where the cost grows with the square of the length"
    )


def test_a_job_does_not_show_its_variables() -> None:
    job = job_with("env: {TOKEN: hunter2}")
    assert "hunter2" not in repr(job) + str(job) + repr(job.plan())


# --- Hostile files ---

VALID = [(DATA / "periflow_glue.yml").read_text(), SHOWN_SETTING.sub(r"\1\2", TEMPLATE)]


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(VALID), st.data())
def test_a_damaged_job_file_is_read_or_refused_and_nothing_else(text: str, data: st.DataObject) -> None:
    for _ in range(data.draw(st.integers(1, 4))):
        start = data.draw(st.integers(0, len(text)))
        end = min(len(text), start + data.draw(st.integers(0, 30)))
        text = text[:start] + data.draw(st.text("ab:-[]{}&*!?|>#%@\"'\\ \n0~<", max_size=6)) + text[end:]
    _is_read_or_refused(text)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_any_value_at_any_key_is_read_or_refused_and_nothing_else(data: st.DataObject) -> None:
    job = yaml.safe_load(VALID[0])
    for path in data.draw(st.lists(st.sampled_from(list(every_key(Job))), min_size=1, max_size=3)):
        block = job
        for key in path[:-1]:
            block[key] = block.get(key) if isinstance(block.get(key), dict) else {}
            block = block[key]
        block[path[-1]] = data.draw(VALUES)
    _is_read_or_refused(json.dumps(job))


def _is_read_or_refused(text: str) -> None:
    try:
        job = parse_job(text.encode("utf-8", "surrogatepass"))
    except JobFileError as error:
        reported = str(error).split("\n")
    else:
        assert job.plan().world_size >= 1
        return
    assert reported
    assert all(re.match(r"job\.yml:\d+: .", problem) for problem in reported)
