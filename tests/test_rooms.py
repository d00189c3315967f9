"""The rooms of the package: imports run downward only, one room alone knows the storage clients, and no file outgrows its noun."""

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

FLOORS: tuple[tuple[str, ...], ...] = (
    ("errors",),
    ("runtime",),
    ("env",),
    ("storage",),
    ("checkpoints",),
    ("resume", "tracking", "datasets", "staging"),
    ("preemption", "report"),
    ("integrations",),
    ("launch",),
    ("jobs",),
    ("serving", "ui"),
    ("cli",),
    ("testing",),
)
"""From the ground up. A room imports from lower floors and from itself, never from a neighbour on its own floor."""

INNER: dict[str, tuple[tuple[str, ...], ...]] = {
    "integrations": (
        ("messages", "staged_saves"),
        ("lifecycle",),
        ("trainer", "loop", "functions"),
        ("axolotl",),
    ),
    "jobs": (
        ("spec", "submission"),
        ("records", "logs", "inventory"),
        ("node",),
        ("gang", "start_failure", "verdict", "supervisor"),
        ("engines",),
        ("lifecycle",),
        ("deletion",),
    ),
    "serving": (
        ("models",),
        ("predict", "endpoints", "formats", "metrics"),
        ("user_code", "batching"),
        ("app",),
        ("server",),
    ),
    "cli": (
        ("tables", "curve"),
        ("output",),
        ("panels", "periflow", "runs"),
        ("completion",),
        ("arguments",),
        (
            "checkup",
            "clean",
            "compare",
            "delete",
            "download",
            "flush",
            "job_actions",
            "prune",
            "status",
            "stop",
            "watch",
        ),
        ("verify",),
        ("commands",),
    ),
}
"""The order inside a room that has floors of its own; the room's `__init__` is above them."""

PUBLIC = {"__init__"}
"""Hands on names of all rooms, so it is on top of them."""

MOST_OF_UI = 1_500
"""Lines of the live pages, with their script and style."""

MOST_OF_SERVING = {"": 900, "models": 950, "predict": 700, "endpoints": 520}
"""Lines of the server and of the rooms in it (docs/decisions/0017): none above 1,200, and none may grow much."""

CLIENTS = {"adlfs", "aiobotocore", "boto3", "botocore", "fsspec", "gcsfs", "obstore", "opendal", "s3fs"}
CLIENT_ROOM = "storage"
ASKS_AWS = "jobs/engines/sagemaker/api.py"
"""boto3 moves no bytes there: it asks SageMaker and CloudWatch, which no file system of fsspec does. One file, as with storage."""

MOST_FILE_LINES = 400
MOST_CLASS_LINES = 300


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_module_imports_only_from_lower_rooms_and_its_own(path: Path) -> None:
    assert list(breaches(module_of(path), path.read_text(), allowed_clients(path))) == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("storage.names", "import hf_cloudtrain.checkpoints.manifest"),
        ("errors", "from hf_cloudtrain.runtime.ranks import Ranks"),
        ("checkpoints.catalog", "from hf_cloudtrain.integrations.trainer import callbacks"),
        ("integrations.loop.loop", "from hf_cloudtrain import CloudTrainCallback"),
        ("storage.client", "def late():\n    from hf_cloudtrain.checkpoints.catalog import Catalog"),
        ("storage.client", "if TYPE_CHECKING:\n    from hf_cloudtrain.checkpoints.catalog import Catalog"),
        ("resume.sampler", "from hf_cloudtrain.tracking import history"),
        ("integrations.trainer.callbacks", "from hf_cloudtrain.integrations.loop import loop"),
        ("integrations.lifecycle", "from hf_cloudtrain.integrations.loop import loop"),
        ("jobs.spec.values", "from hf_cloudtrain.jobs.node.mounts import Mount"),
        ("jobs.engines.local", "from hf_cloudtrain.jobs import lifecycle"),
        ("cli.output", "from hf_cloudtrain.cli.commands import run"),
        ("checkpoints.outbox", "import fsspec.asyn"),
        ("cli.output", "from obstore.store import S3Store"),
        ("checkpoints.outbox", "importlib.import_module('botocore.session')"),
        ("checkpoints.outbox", "import_module('hf_cloudtrain.integrations.trainer.callbacks')"),
        ("checkpoints.outbox", "from .catalog import Catalog"),
        ("brand_new.module", "import os"),
    ],
)
def test_a_planted_breach_is_found(module: str, source: str) -> None:
    assert len(list(breaches(module, source))) == 1


def test_imports_of_lower_rooms_and_of_the_own_room_are_no_breach() -> None:
    assert (
        list(
            breaches(
                "checkpoints.outbox", "from hf_cloudtrain.checkpoints.catalog import Catalog\nimport json"
            )
        )
        == []
    )
    assert (
        list(breaches("storage.fsspec_backend", "import fsspec\nfrom hf_cloudtrain.storage import native"))
        == []
    )
    assert (
        list(breaches("cli.commands.run", "from hf_cloudtrain.cli import output\nimport hf_cloudtrain.env"))
        == []
    )
    assert list(breaches("jobs.lifecycle", "from hf_cloudtrain.jobs.engines import engine")) == []


def test_one_file_of_the_engines_asks_aws_and_knows_no_other_client() -> None:
    allowed = allowed_clients(ROOT / PACKAGE / ASKS_AWS)
    assert list(breaches("jobs.engines.sagemaker.api", "import boto3\nimport botocore.config", allowed)) == []
    assert len(list(breaches("jobs.engines.sagemaker.api", "import s3fs", allowed))) == 1
    others = allowed_clients(ROOT / PACKAGE / "jobs" / "engines" / "sagemaker" / "engine.py")
    assert len(list(breaches("jobs.engines.sagemaker.engine", "import boto3", others))) == 1


def test_every_room_is_on_a_floor_and_every_floor_exists() -> None:
    rooms = {module_of(path).split(".")[0] for path in SOURCES} - PUBLIC
    assert rooms == {room for floor in FLOORS for room in floor}


def test_the_package_has_at_most_three_modules_at_its_top() -> None:
    assert len(list((ROOT / PACKAGE).glob("*.py"))) <= 3


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_is_one_noun(path: Path) -> None:
    source = path.read_text()
    assert len(source.splitlines()) <= MOST_FILE_LINES
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ClassDef):
            assert (node.end_lineno or 0) - node.lineno + 1 <= MOST_CLASS_LINES, node.name


@pytest.mark.parametrize(
    "path",
    [path for path in SOURCES if path.name == "__init__.py"],
    ids=lambda path: str(path.relative_to(ROOT)),
)
def test_each_room_says_what_it_is_for(path: Path) -> None:
    docstring = ast.get_docstring(ast.parse(path.read_text())) or ""
    files = {other.stem for other in path.parent.glob("*.py")} - {"__init__", "__main__"}
    if path.parent.name != PACKAGE:
        assert {name for name in files if name not in docstring} == set(), "name each file, in reading order"


def test_no_module_imports_itself_by_a_detour() -> None:
    graph = {module_of(path): set(edges(path)) for path in SOURCES}
    assert list(circles(graph)) == []


def test_a_planted_circle_is_found() -> None:
    assert list(circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}})) == [["a", "b", "c"]]


@pytest.mark.parametrize("statement", ["import hf_cloudtrain", "import hf_cloudtrain.cli"])
def test_importing_the_package_and_its_command_line_is_light(statement: str) -> None:
    code = f"{statement}\nimport sys\nprint(*sorted({{name.split('.')[0] for name in sys.modules}}))"
    loaded = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    heavy = {"accelerate", "datasets", "evaluate", "numpy", "pandas", "torch", "transformers"} | CLIENTS
    assert set(loaded.stdout.split()) & heavy == set()


def breaches(module: str, source: str, clients: frozenset[str] = frozenset()) -> Iterator[str]:
    """What in the source of `module` goes against the order of the rooms, one sentence each."""
    room = module.split(".", maxsplit=1)[0]
    if room not in PUBLIC and floor_of(FLOORS, room) is None:
        yield f"{module}: give the room {room!r} a floor in FLOORS, and in the design"
        return
    for name in imported(ast.parse(source)):
        top, _, rest = name.partition(".")
        if name.startswith("."):
            yield f"{module} imports {name}: write it out, so that a reader sees the room"
        elif top == PACKAGE and room not in PUBLIC:
            if not may_import(module, rest):
                yield f"{module} imports {name}"
        elif top in CLIENTS - clients and room != CLIENT_ROOM:
            yield f"{module} imports {name}: only {CLIENT_ROOM}/ knows the clients"


def may_import(module: str, target: str) -> bool:
    """Whether the order allows it; both names without the package's."""
    room, other = module.split(".", maxsplit=1)[0], target.split(".", maxsplit=1)[0]
    mine, theirs = floor_of(FLOORS, room), floor_of(FLOORS, other)
    if mine is None or theirs is None:
        return False  # `from hf_cloudtrain import Name` takes a public name, which is above all rooms
    if room != other:
        return theirs < mine
    part, other_part = (name.split(".")[1] if "." in name else "" for name in (module, target))
    inner = INNER.get(room, ())
    if part in ("", "__main__"):
        return True
    mine, theirs = floor_of(inner, part), floor_of(inner, other_part)
    if not inner or part == other_part:
        return True
    return mine is not None and theirs is not None and theirs <= mine and not is_neighbour(room, mine, theirs)


def is_neighbour(room: str, mine: int, theirs: int) -> bool:
    """The three integrations import nothing from one another."""
    return room == "integrations" and mine == theirs


def floor_of(floors: tuple[tuple[str, ...], ...], name: str) -> int | None:
    return next((index for index, floor in enumerate(floors) if name in floor), None)


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
    if base.startswith(PACKAGE):
        modules = {module_of(path) for path in SOURCES}
        for alias in node.names:
            inner = f"{base}.{alias.name}".removeprefix(f"{PACKAGE}.")
            yield f"{PACKAGE}.{inner}" if inner in modules or base == PACKAGE else base
    else:
        yield base


def edges(path: Path) -> Iterator[str]:
    """The modules that a module imports when it is imported itself: late imports and those for types are no part of a circle."""
    tree = ast.parse(path.read_text())
    early = [node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))]
    modules = {module_of(other) for other in SOURCES}
    for name in imported(ast.Module(body=list(early), type_ignores=[])):
        inner = name.removeprefix(f"{PACKAGE}.")
        if name.startswith(f"{PACKAGE}.") and inner in modules:
            yield inner


def circles(graph: dict[str, set[str]]) -> Iterator[list[str]]:
    """Each circle once, from its first name on."""
    for start in sorted(graph):
        stack = [[start]]
        visited = {start}
        while stack:
            way = stack.pop()
            for target in sorted(graph.get(way[-1], ())):
                if target == start and start == min(way):
                    yield way
                    stack = []
                    break
                if target not in visited:
                    visited.add(target)
                    stack.append([*way, target])


def allowed_clients(path: Path) -> frozenset[str]:
    """Clients that a file may know, whatever its room."""
    is_it = path.relative_to(ROOT / PACKAGE).as_posix() == ASKS_AWS
    return frozenset(("boto3", "botocore")) if is_it else frozenset()


def module_of(path: Path) -> str:
    """The dotted name below the package; a room's `__init__` is the room, the package's own is `__init__`."""
    parts = path.relative_to(ROOT / PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if len(parts) > 1 and parts[-1] == "__init__" else parts)


@pytest.mark.parametrize("room", MOST_OF_SERVING, ids=lambda room: room or "server")
def test_the_server_and_the_rooms_in_it_stay_small(room: str) -> None:
    files = (ROOT / PACKAGE / "serving" / room).glob("*.py")
    assert sum(len(path.read_text().splitlines()) for path in files) <= MOST_OF_SERVING[room] <= 1_200


def test_serving_has_no_room_without_a_limit() -> None:
    assert {path.parent.name for path in (ROOT / PACKAGE / "serving").rglob("*/*.py")} == {
        *MOST_OF_SERVING
    } - {""}


def test_the_live_pages_stay_small() -> None:
    files = [
        path for path in (ROOT / PACKAGE / "ui").rglob("*") if path.suffix in (".py", ".js", ".css", ".html")
    ]
    assert sum(len(path.read_text().splitlines()) for path in files) <= MOST_OF_UI
