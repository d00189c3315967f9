"""The wheel, in a fresh environment with only its declared dependencies, as after `pip install`."""

from __future__ import annotations

import configparser
import email
import json
import os
import re
import shutil
import subprocess
import sys
import venv
import zipfile
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from email.message import Message
from importlib.metadata import Distribution, distribution, distributions
from pathlib import Path, PurePath
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent.parent
SOURCES = ("setup.cfg", "pyproject.toml", "README.md", "LICENSE", "hf_cloudtrain", "examples")
TEMPLATE = ROOT / "examples" / "template"
LEFT_BEHIND = shutil.ignore_patterns("__pycache__", "output", "runs")
"""Files of Python, and of a training in an example."""

TRAIN = """
import sys
from datasets import Dataset
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments
from hf_cloudtrain import CloudTrainCallback

output_dir, run_url = sys.argv[1:]
model = BertForSequenceClassification(
    BertConfig(vocab_size=8, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
)
train = Dataset.from_dict({"input_ids": [[1, 2, 3]] * 8, "labels": [0, 1] * 4})
args = TrainingArguments(output_dir, max_steps=2, save_steps=2, report_to=[], use_cpu=True)
cloud = CloudTrainCallback(run_url)
trainer = Trainer(model=model, args=args, train_dataset=train, callbacks=[cloud])
trainer.train(resume_from_checkpoint=cloud.restore(args))
"""

IMPORT_ALL = """
import importlib, pkgutil
import hf_cloudtrain

names = [module.name for module in pkgutil.walk_packages(hf_cloudtrain.__path__, "hf_cloudtrain.")]
# What needs more than the package, with what its error names: a server is a class of uvicorn's, a plug-in one of axolotl's.
more = {
    "hf_cloudtrain.serving.app": "No module named 'starlette'",
    "hf_cloudtrain.serving.batching": "No module named 'prometheus_client'",
    "hf_cloudtrain.serving.metrics": "No module named 'prometheus_client'",
    "hf_cloudtrain.serving.server": "No module named 'uvicorn'",
    "hf_cloudtrain.ui.app": "No module named 'uvicorn'",
    "hf_cloudtrain.ui.guard": "No module named 'starlette'",
    "hf_cloudtrain.integrations.axolotl": "No module named 'axolotl'",
}
for name in names:
    try:
        importlib.import_module(name)
    except ImportError as error:
        if name not in more or more[name] not in str(error):
            raise
print(len(names))
"""


@dataclass(frozen=True)
class Environment:
    """A virtual environment without access to this one."""

    folder: Path

    def run(self, *command: str) -> subprocess.CompletedProcess[str]:
        """Run a program of the environment."""
        program = self.folder / "bin" / command[0]
        # Outside the repository, so that `hf_cloudtrain` is the installed one.
        return _run([program, *command[1:]], cwd=self.folder, env=_plain_environ())

    def output(self, *command: str) -> str:
        """Run a program that must succeed, and return its output."""
        return _succeed(self.run(*command))


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # From a copy: setuptools leaves a build folder beside the sources, and reads stale files from it.
    source = tmp_path_factory.mktemp("source")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, ignore=LEFT_BEHIND)
        else:
            shutil.copy(ROOT / name, source)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", "dist", "."]
    _succeed(_run(command, cwd=source))
    (path,) = (source / "dist").glob("*.whl")
    return path


@pytest.fixture(scope="module")
def fresh(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """The wheel and all distributions that its Requires-Dist leads to, linked from this environment.

    pip would fetch the same versions again: minutes and a gigabyte, to end at the same files.
    """
    folder = tmp_path_factory.mktemp("fresh")
    venv.create(folder, symlinks=True)
    (site_packages,) = (folder / "lib").glob("python*/site-packages")
    declared = [Requirement(text) for text in metadata(wheel).get_all("Requires-Dist", [])]
    expose(closure(declared), site_packages)
    pip = [
        sys.executable,
        "-m",
        "pip",
        "--disable-pip-version-check",
        "--python",
        str(folder / "bin" / "python"),
    ]
    _succeed(_run([*pip, "install", "--no-deps", "--no-index", wheel]))
    _succeed(_run([*pip, "check"]))
    return Environment(folder)


def test_the_wheel_declares_every_dependency_of_setup_cfg(wheel: Path) -> None:
    config = setup_cfg()
    expected = {normal(line) for line in lines(config["options"]["install_requires"])}
    for extra, text in config["options.extras_require"].items():
        expected |= {normal(f'{line}; extra == "{extra}"') for line in lines(text)}
    assert len(expected) > 20
    assert {normal(text) for text in metadata(wheel).get_all("Requires-Dist", [])} == expected


def test_the_wheel_has_complete_metadata(wheel: Path) -> None:
    told = metadata(wheel)
    assert (told["Name"], told["Version"], told["License-Expression"]) == (
        "hf_cloudtrain",
        "0.1.0",
        "Apache-2.0",
    )
    assert told["Requires-Python"] == ">=3.10"
    assert set(told.get_all("Provides-Extra", [])) == {
        "s3",
        "gcs",
        "azure",
        "report",
        "sagemaker",
        "serve",
        "skypilot",
        "ui",
        "dev",
    }
    assert told.get_payload(), "the README is the page of the package"


def test_the_wheel_contains_the_package_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = {PurePath(name) for name in archive.namelist()}
    package = {path for path in names if path.parts[0] == "hf_cloudtrain"}
    assert {path.parts[0].partition("-")[2] for path in names - package} == {
        f"{metadata(wheel)['Version']}.dist-info"
    }
    sources = {path.relative_to(ROOT) for path in (ROOT / "hf_cloudtrain").rglob("*.py")}
    template = {PurePath("hf_cloudtrain/template") / name for name in template_files()}
    files = (
        "py.typed",
        "cli/commands/job.yml",
        "report/charts.js",
        "report/live.js",
        "report/page.css",
        "report/report.html",
        "ui/static/ui.css",
        "ui/static/page.html",
        "ui/static/page.js",
    )
    data = {PurePath("hf_cloudtrain") / name for name in files}
    assert package == {*data, *sources, *template}


def test_the_fresh_environment_contains_only_declared_dependencies(fresh: Environment) -> None:
    code = "import importlib.util as u; print(*(n for n in ('torch', 's3fs', 'obstore', 'pytest') if u.find_spec(n)))"
    assert fresh.output("python", "-c", code).split() == ["torch"]


def test_import_is_light_and_comes_from_the_wheel(fresh: Environment) -> None:
    code = "import hf_cloudtrain, sys; print('torch' in sys.modules, 'transformers' in sys.modules, hf_cloudtrain.__file__)"
    torch, transformers, file = fresh.output("python", "-c", code).split()
    assert (torch, transformers) == ("False", "False")
    assert Path(file).is_relative_to(fresh.folder)


def test_every_module_imports_without_any_extra(fresh: Environment) -> None:
    assert int(fresh.output("python", "-c", IMPORT_ALL)) > 10


def test_the_command_line_shows_its_help(fresh: Environment) -> None:
    shown = fresh.output("cloudtrain", "--help")
    assert "checkpoint" in shown
    assert "run" in shown


def test_a_new_project_is_the_template_of_the_repository(fresh: Environment, tmp_path: Path) -> None:
    made = json.loads(fresh.output("cloudtrain", "new", str(tmp_path / "project"), "--json"))
    assert set(made["files"]) == template_files()
    for name in made["files"]:
        assert (tmp_path / "project" / name).read_bytes() == (TEMPLATE / name).read_bytes()


def test_a_missing_extra_is_named(fresh: Environment) -> None:
    refused = fresh.run("cloudtrain", "checkpoint", "list", "s3://bucket/run")
    assert refused.returncode != 0
    assert "hf_cloudtrain[s3]" in refused.stderr
    refused = fresh.run("cloudtrain", "run", "report", str(fresh.folder))
    assert refused.returncode == 1
    assert "hf_cloudtrain[report]" in refused.stderr
    assert "Traceback" not in refused.stderr


def test_training_and_the_command_line_work_on_a_folder(fresh: Environment, tmp_path: Path) -> None:
    run_url = (tmp_path / "run").as_uri()
    fresh.output("python", "-c", TRAIN, str(tmp_path / "out"), run_url)
    listed = json.loads(fresh.output("cloudtrain", "checkpoint", "list", run_url, "--json"))
    assert [checkpoint["folder"] for checkpoint in listed["checkpoints"]] == ["checkpoint-2"]


def template_files() -> set[str]:
    """The files of `examples/template`, without those of Python and of a training."""
    found = (path.relative_to(TEMPLATE) for path in TEMPLATE.rglob("*") if path.is_file())
    return {path.as_posix() for path in found if not {"__pycache__", "output", "runs"} & set(path.parts)}


def setup_cfg() -> configparser.ConfigParser:
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    return config


def metadata(wheel: Path) -> Message:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        return email.message_from_bytes(archive.read(name))


def lines(text: str) -> list[str]:
    stripped = (line.strip() for line in text.splitlines())
    return [line for line in stripped if line and not line.startswith("#")]


def normal(text: str) -> str:
    requirement = Requirement(text)
    return str(requirement).replace(requirement.name, canonicalize_name(requirement.name), 1)


def closure(declared: Iterable[Requirement]) -> list[Distribution]:
    """All distributions that the requirements lead to, including extras of dependencies."""
    found: dict[str, Distribution] = {}
    seen: set[tuple[str, str]] = set()
    todo = [(requirement, "") for requirement in declared]
    while todo:
        requirement, extra = todo.pop()
        if requirement.marker and not requirement.marker.evaluate({"extra": extra}):
            continue
        name = canonicalize_name(requirement.name)
        found.setdefault(name, distribution(name))
        for wanted in ("", *requirement.extras):
            if (name, wanted) not in seen:
                seen.add((name, wanted))
                todo += [(Requirement(text), wanted) for text in found[name].requires or ()]
    return list(found.values())


def expose(wanted: list[Distribution], site_packages: Path) -> None:
    """Link the files of these distributions, and of no others, into `site_packages`."""
    names = {canonicalize_name(found.name) for found in wanted}
    owners: defaultdict[str, set[str]] = defaultdict(set)
    for found in distributions():
        for top in tops(found):
            owners[top].add(canonicalize_name(found.name))
    for found in wanted:
        for top in tops(found):
            # A namespace package may contain files of other distributions.
            assert owners[top] <= names, f"{top} belongs to {owners[top] - names} too: link it file by file"
            if not (site_packages / top).exists():
                (site_packages / top).symlink_to(Path(str(found.locate_file(top))).resolve())


def tops(found: Distribution) -> set[str]:
    """The files and folders of a distribution directly below site-packages; none of its scripts and caches."""
    first = {path.parts[0] for path in found.files or ()}
    return {top for top in first if top != ".." and not re.fullmatch(r"__pycache__|.*\.pth", top)}


def _run(command: Sequence[str | Path], **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, check=False, capture_output=True, text=True, **options)


def _succeed(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def _plain_environ() -> dict[str, str]:
    foreign = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")
    return {name: value for name, value in os.environ.items() if name not in foreign}
