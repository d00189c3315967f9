"""The layers of the package: a module imports only from rows above it, and one row alone knows the clients."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = "hf_cloudtrain"
ROOT = Path(__file__).resolve().parent.parent
SOURCES = sorted((ROOT / PACKAGE).rglob("*.py"))

ROWS = (
    (
        "errors",
        "env",
        "rehearsal",
        "process",
        "redaction",
        "provenance",
        "progress",
        "meeting",
        "random_state",
        "loader_facts",
        "distributed",
        "signals",
    ),
    ("manifest", "native", "backends", "storage"),
    (
        *("catalog", "retention", "leftovers", "fence", "parts", "freeze", "outbox", "uploader", "watch"),
        *("downloader", "stale"),
    ),
    (
        "position",
        "schedule",
        "history",
        "run_state",
        "step_tracker",
        "sampler",
        "data_position",
        "shares",
        "checkpointer",
        "in_place",
        "outcome",
        "clouds",
        "notices",
        "preemption",
    ),
    (
        "trainer_state",
        "trainer_place",
        "session",
        "emergency",
        "callbacks",
        "loop_log",
        "loop_state",
        "loop_report",
        "loop_position",
        "loop_place",
        "loop_folder",
        "loop",
        "modes",
        "functional",
    ),
    (
        "data_cache",
        "data_upload",
        "datasets",
        "job_yaml",
        "job_problems",
        "machine",
        "plan",
        "job_values",
        "job",
        "submission",
        "job_record",
        "job_logs",
        "ignore_files",
        "workspace",
        "namespace",
        "mounts",
        "family",
        "node",
        "supervisor",
        "vms",
        "engines",
        "jobs",
    ),
    ("cli", "faulty_disk", "testing", "__init__"),
)
"""From the ground up. Within a row, a module may import those to its left."""

ORDER = [module for row in ROWS for module in row]

CLIENTS = {"adlfs", "aiobotocore", "boto3", "botocore", "fsspec", "gcsfs", "obstore", "opendal", "s3fs"}
KNOWS_CLIENTS = {"backends", "native"}
ASKS_AWS = "engines/sagemaker_api.py"
"""boto3 moves no bytes there: it asks SageMaker and CloudWatch, which no file system of fsspec does. One file, as with storage."""


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_module_imports_only_from_rows_above_it(path: Path) -> None:
    assert list(breaches(module_of(path), path.read_text(), known_in(path))) == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("manifest", "import hf_cloudtrain.storage"),
        ("env", "from hf_cloudtrain.distributed import World"),
        ("catalog", "from hf_cloudtrain import callbacks"),
        ("loop", "from hf_cloudtrain import CloudTrainCallback"),
        ("storage", "def late():\n    from hf_cloudtrain.catalog import Catalog"),
        ("storage", "if TYPE_CHECKING:\n    from hf_cloudtrain.catalog import Catalog"),
        ("uploader", "import fsspec.asyn"),
        ("cli", "from obstore.store import S3Store"),
        ("uploader", "importlib.import_module('botocore.session')"),
        ("uploader", "import_module('hf_cloudtrain.callbacks')"),
        ("uploader", "from .callbacks import CloudTrainCallback"),
        ("brand_new", "import os"),
    ],
)
def test_a_planted_breach_is_found(module: str, source: str) -> None:
    assert len(list(breaches(module, source))) == 1


def test_imports_of_rows_above_and_of_the_own_package_are_no_breach() -> None:
    assert list(breaches("outbox", "from hf_cloudtrain.catalog import Catalog\nimport json")) == []
    assert list(breaches("backends", "import fsspec\nfrom hf_cloudtrain import manifest, native")) == []
    assert list(breaches("cli", "from hf_cloudtrain.cli import run\nimport hf_cloudtrain.loop")) == []


def test_one_file_of_the_engines_asks_aws_and_knows_no_other_client() -> None:
    allowed = known_in(ROOT / PACKAGE / ASKS_AWS)
    assert list(breaches("engines", "import boto3\nimport botocore.config", allowed)) == []
    assert len(list(breaches("engines", "import s3fs", allowed))) == 1
    others = known_in(ROOT / PACKAGE / "engines" / "sagemaker.py")
    assert len(list(breaches("engines", "import boto3", others))) == 1


def test_every_module_of_the_table_that_exists_is_looked_at() -> None:
    looked_at = {module_of(path) for path in SOURCES}
    assert {"errors", "storage", "catalog", "checkpointer", "callbacks", "cli", "__init__"} <= looked_at


@pytest.mark.parametrize("statement", ["import hf_cloudtrain", "import hf_cloudtrain.cli"])
def test_importing_the_package_and_its_command_line_is_light(statement: str) -> None:
    code = f"{statement}\nimport sys\nprint(*sorted({{name.split('.')[0] for name in sys.modules}}))"
    loaded = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    heavy = {"accelerate", "datasets", "evaluate", "numpy", "pandas", "torch", "transformers"} | CLIENTS
    assert set(loaded.stdout.split()) & heavy == set()


def breaches(module: str, source: str, known: frozenset[str] = frozenset()) -> Iterator[str]:
    """What in the source of `module` goes against the layers, one sentence each; `known` are clients that its file may know."""
    if module not in ORDER:
        yield f"{module}: give it a row in ROWS, and in the design"
        return
    allowed = ORDER[: ORDER.index(module) + 1]
    for name in imported(ast.parse(source)):
        top, _, rest = name.partition(".")
        if name.startswith("."):
            yield f"{module} imports {name}: write it out, so that a reader sees the row"
        elif top == PACKAGE and module != "__init__":
            # `from hf_cloudtrain import Name` takes a name of the top row, wherever it is defined.
            part = rest.split(".")[0]
            target = part if part in ORDER else "__init__"
            if target not in allowed:
                yield f"{module} imports {name}, from the row of {target}"
        elif top in CLIENTS - known and module not in KNOWS_CLIENTS:
            yield f"{module} imports {name}: only {' and '.join(sorted(KNOWS_CLIENTS))} know the clients"


def imported(tree: ast.AST) -> Iterator[str]:
    """Every dotted name the tree imports, late and conditional imports included."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from _imported_from(node)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module") and node.args:
            target = node.args[0]
            if isinstance(target, ast.Constant):
                yield str(target.value)


def _imported_from(node: ast.ImportFrom) -> Iterator[str]:
    base = "." * node.level + (node.module or "")
    if base == PACKAGE:
        yield from (f"{base}.{alias.name}" for alias in node.names)
    else:
        yield base


def known_in(path: Path) -> frozenset[str]:
    """Clients that a file may know, whatever its row."""
    is_it = path.relative_to(ROOT / PACKAGE).as_posix() == ASKS_AWS
    return frozenset(("boto3", "botocore")) if is_it else frozenset()


def module_of(path: Path) -> str:
    """The name in the table: the first part below the package, without its ending."""
    return path.relative_to(ROOT / PACKAGE).parts[0].removesuffix(".py")
