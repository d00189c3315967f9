"""The documentation matches the code: commands, options, links, public names, paths and counted requests."""

from __future__ import annotations

import ast
import re
import shlex
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import typer.main
import yaml
from typer.testing import CliRunner

import hf_cloudtrain
from benchmarks.sink import Sink
from docs.site import rooms
from hf_cloudtrain import Checkpointer, Position, env
from hf_cloudtrain.checkpoints.ownership import Ownership
from hf_cloudtrain.cli import app
from hf_cloudtrain.preemption.sources import StopRequest
from hf_cloudtrain.tracking.tracker import StepTracker
from tests.test_rooms import FLOORS

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
CONTRIBUTING = ROOT / "CONTRIBUTING.md"
CLI_PAGE = ROOT / "docs" / "cli.md"
EXAMPLE_PAGES = sorted((ROOT / "examples").glob("*/README.md"))
PAGES = sorted(
    [
        README,
        CONTRIBUTING,
        ROOT / "CHANGELOG.md",
        *EXAMPLE_PAGES,
        *(ROOT / "docs").rglob("*.md"),
    ]
)
SOURCES = sorted((ROOT / "hf_cloudtrain").rglob("*.py"))


def blocks(page: Path, languages: str) -> list[str]:
    """The fenced blocks of a page in some languages, such as `console|bash`."""
    return re.findall(rf"^```(?:{languages})\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)


def commands(group: Any, *path: str) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every command of the tree that does something, with the arguments that call it."""
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, *path, name)
        else:
            yield (*path, name), command


COMMANDS = dict(commands(typer.main.get_command(app)))
each_command = pytest.mark.parametrize("arguments", COMMANDS, ids=" ".join)


def help_of(arguments: tuple[str, ...]) -> str:
    result = CliRunner().invoke(app, [*arguments, "--help"])
    assert result.exit_code == 0
    text: str = result.stdout
    return text


def section_of(arguments: tuple[str, ...]) -> str:
    """The section of the page about one command."""
    heading = f"\n## cloudtrain {' '.join(arguments)}\n"
    page = CLI_PAGE.read_text()
    assert page.count(heading) == 1
    return page.split(heading)[1].split("\n## ")[0]


@each_command
def test_help_says_what_a_command_does_and_gives_an_example(arguments: tuple[str, ...]) -> None:
    summary, example = help_of(arguments).split("Example", 1)
    assert len(summary.split("\n\n")[1].split()) >= 5
    assert f"cloudtrain {' '.join(arguments)} " in example


@pytest.mark.parametrize("arguments", sorted({(), *(arguments[:1] for arguments in COMMANDS)}), ids=" ".join)
def test_help_of_a_group_gives_an_example(arguments: tuple[str, ...]) -> None:
    summary, example = help_of(arguments).split("Example", 1)
    assert " ".join(("cloudtrain", *arguments)) in example
    cut = [line for line in summary.splitlines()[1:] if line.endswith("...")]
    assert cut == [], "too long for the list of commands in 80 columns"


@each_command
def test_a_command_has_json_output(arguments: tuple[str, ...]) -> None:
    assert ("--json" in help_of(arguments)) == (arguments != ("launch",)), "its stdout is the command's"


@each_command
def test_the_page_has_an_entry_with_an_example_for_a_command(arguments: tuple[str, ...]) -> None:
    assert f"cloudtrain {' '.join(arguments)} " in section_of(arguments)
    anchor = "-".join(("cloudtrain", *arguments))
    assert f"[`cloudtrain {' '.join(arguments)}`](#{anchor})" in CLI_PAGE.read_text()


@each_command
def test_the_page_explains_every_option_of_a_command(arguments: tuple[str, ...]) -> None:
    general = CLI_PAGE.read_text().split("\n## For all commands\n")[1].split("\n## ")[0]
    text = general + section_of(arguments)
    options = [
        name
        for parameter in COMMANDS[arguments].params
        for name in parameter.opts
        if name.startswith("--") and name != "--help"
    ]
    assert options
    assert [name for name in options if not re.search(rf"(?<![\w-]){name}(?![\w-])", text)] == []


def test_the_page_has_no_entry_for_a_removed_command() -> None:
    documented = set(re.findall(r"^## cloudtrain (.+)$", CLI_PAGE.read_text(), re.MULTILINE))
    assert documented == {" ".join(arguments) for arguments in COMMANDS}


def test_each_environment_variable_is_documented_and_each_that_is_named_exists() -> None:
    names = {value for name, value in vars(env).items() if name.isupper() and isinstance(value, str)}
    assert "HF_CLOUDTRAIN_RUN_URL" in names
    text = "".join(page.read_text() for page in PAGES)
    assert {name for name in names if name not in text} == set()
    assert set(re.findall(r"HF_CLOUDTRAIN_[A-Z0-9_]*[A-Z0-9]", text)) - names == set()


SHOWN = [
    pytest.param(line, id=f"{page.relative_to(ROOT)}: {line}")
    for page in PAGES
    for block in blocks(page, "console|bash|sh|shell")
    for line in re.findall(r"^(?:\$ )?((?:\w+=\S+ )*cloudtrain .*)$", block, re.MULTILINE)
] + [
    pytest.param(line, id=f"--help: {line}")
    for arguments in COMMANDS
    for line in re.findall(r"^ +(cloudtrain .*)$", help_of(arguments), re.MULTILINE)
]


@pytest.mark.parametrize("line", SHOWN)
def test_a_command_that_is_shown_can_be_typed(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = shlex.split(line, comments=True)
    if ">" in arguments:
        arguments = arguments[: arguments.index(">")]
    while "=" in arguments[0]:
        name, _, value = arguments.pop(0).partition("=")
        monkeypatch.setenv(name, value)
    path = tuple(
        arguments[1:3] if tuple(arguments[1:3]) in COMMANDS else arguments[1:2]
    )  # `cloudtrain new` is not in a group
    assert path in COMMANDS
    COMMANDS[path].make_context(" ".join(["cloudtrain", *path]), arguments[1 + len(path) :]).close()


def test_shown_commands_are_found_at_all() -> None:
    found = " ".join(str(parameter.id) for parameter in SHOWN)
    assert all(source in found for source in ("README.md", "docs/cli.md", "--help"))


SCRIPTS = [
    pytest.param(script, id=f"{page.relative_to(ROOT)}: {script}")
    for page in PAGES
    for block in blocks(page, "console|bash|sh|shell")
    for script in dict.fromkeys(
        re.findall(r"(?:python|torchrun|launch)\b.*?((?:examples|docs|benchmarks)/\S+\.py)", block)
    )
]


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_that_is_shown_exists(script: str) -> None:
    assert (ROOT / script).is_file()


def test_a_make_target_that_is_shown_exists() -> None:
    makefile = (ROOT / "Makefile").read_text()
    shown = {
        target
        for page in PAGES
        for text in (*blocks(page, "console|bash"), *re.findall(r"`(make [^`]*)`", page.read_text()))
        for target in re.findall(r"^(?:\$ )?make ([a-z-]+)", text, re.MULTILINE)
    }
    assert {"demo", "test", "test-slow", "docs"} <= shown
    assert {target for target in shown if not re.search(rf"^{target}:", makefile, re.MULTILINE)} == set()


PYTHON = [
    pytest.param(text, id=f"{page.relative_to(ROOT)}: {text.splitlines()[0]}")
    for page in PAGES
    for text in blocks(page, "python")
]


@pytest.mark.parametrize("text", PYTHON)
def test_python_that_is_shown_parses(text: str) -> None:
    ast.parse("\n".join(line for line in text.splitlines() if not line.startswith("%")))


def test_names_that_a_page_imports_are_public() -> None:
    imported = {
        (node.module, alias.name)
        for page in PAGES
        for text in blocks(page, "python|diff")
        for node in ast.walk(ast.parse(as_python(text)))
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith("hf_cloudtrain")
        for alias in node.names
    }
    assert ("hf_cloudtrain", "CloudTrainCallback") in imported
    public = {"hf_cloudtrain", "hf_cloudtrain.errors", "hf_cloudtrain.datasets", "hf_cloudtrain.testing"}
    assert {module for module, _ in imported} <= public
    for module, name in imported:
        exec(f"from {module} import {name}")


def as_python(text: str) -> str:
    """A block as it is after its change, without the magics of a notebook."""
    lines = [line for line in text.splitlines() if not line.startswith(("%", "-"))]
    return "\n".join(line.removeprefix("+") for line in lines)


def test_messages_name_only_commands_that_exist() -> None:
    named = {
        (match[1], match[2]): source.name
        for source in SOURCES
        for match in re.finditer(r"`cloudtrain ([a-z]+) ([a-z]+)", source.read_text())
    }
    assert ("checkpoint", "flush") in named
    assert {arguments: name for arguments, name in named.items() if arguments not in COMMANDS} == {}


def test_the_messages_on_the_troubleshooting_page_are_in_the_sources() -> None:
    quoted = re.findall(r'\*\*"([^"]+)"\*\*', (ROOT / "docs" / "troubleshooting.md").read_text())
    assert len(quoted) >= 12
    sources = "\n".join(source.read_text() for source in SOURCES)
    in_one_line = re.sub(r'"\s*f?"', "", sources)  # a long message is written as several texts
    assert [text for text in quoted if text not in in_one_line] == []


LINKS = [
    pytest.param(page, target, id=f"{page.relative_to(ROOT)}: {target}")
    for page in PAGES
    for target in re.findall(r"\]\((?!https?:)([^)\s]+)\)", page.read_text())
]


@pytest.mark.parametrize(("page", "target"), LINKS)
def test_a_link_has_a_target(page: Path, target: str) -> None:
    name, _, anchor = target.partition("#")
    file = page.parent / name if name else page
    assert file.exists()
    if anchor:
        headings = re.findall(r"^#+ (.+)$", file.read_text(), re.MULTILINE)
        assert anchor in {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_no_page_is_an_orphan() -> None:
    reached, waiting = {README}, [README]
    while waiting:
        page = waiting.pop()
        for target in re.findall(r"\]\((?!https?:|#)([^)\s#]+)", page.read_text()):
            found = (page.parent / target).resolve()
            found = found / "README.md" if found.is_dir() else found
            if found.suffix == ".md" and found not in reached:
                reached.add(found)
                waiting.append(found)
    assert [page.relative_to(ROOT).as_posix() for page in PAGES if page not in reached] == []


def test_the_menu_of_the_site_has_each_page_once() -> None:
    def pages_of(entry: Any) -> Iterator[str]:
        if isinstance(entry, str):
            yield entry
        else:
            for inner in entry.values() if isinstance(entry, dict) else entry:
                yield from pages_of(inner)

    found = Counter(pages_of(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]))
    expected = {page.relative_to(ROOT).as_posix().removeprefix("docs/") for page in PAGES}
    assert found == Counter(expected - {"README.md"} | {"index.md"})


def test_the_first_page_shows_one_way_of_at_most_14_lines_that_parses() -> None:
    (block,) = blocks(README, "diff")
    assert len(block.splitlines()) <= 14
    ast.parse(as_python(block))
    assert blocks(README, "python") == []


@pytest.mark.parametrize("name", ["loop", "functions"])
def test_the_other_ways_begin_with_a_whole_example_of_at_most_14_lines(name: str) -> None:
    first = blocks(ROOT / "docs" / f"{name}.md", "python")[0]
    assert len(first.splitlines()) <= 14
    ast.parse(first)


def test_the_first_page_shows_two_pictures_of_at_most_200_kb_together() -> None:
    """The loss of a run that was killed and resumed, and the live page."""
    pictures = [ROOT / path for path in re.findall(r"!\[[^\]]{40,}\]\(([^)]+)\)", README.read_text())]
    assert len(pictures) == 2
    assert all(picture.read_bytes().startswith(b"\x89PNG") for picture in pictures)
    assert sum(picture.stat().st_size for picture in pictures) <= 200_000


def test_the_reference_has_every_public_name() -> None:
    text = "".join(page.read_text() for page in (ROOT / "docs" / "api").glob("*.md"))
    listed = re.findall(r"^::: (\S+)$", text, re.MULTILINE)
    names = {f"hf_cloudtrain.{name}" for name in hf_cloudtrain.__all__ if name != "CloudTrainError"}
    assert sorted(listed) == sorted(
        names | {f"hf_cloudtrain.{name}" for name in ("datasets", "errors", "testing")}
    )


def test_the_requests_of_the_cost_page_are_those_that_storage_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_CLOUDTRAIN_HEARTBEAT", "1000")  # seconds: no heartbeat but those below
    page = (ROOT / "docs" / "cost.md").read_text()
    rows = re.findall(r"^\| ([^|]+) \| (\d+) \| (\d+) \| (\d+) \| (\d+) \| (\d+) \|$", page, re.MULTILINE)
    written = {row[0]: dict(zip(KINDS, map(int, row[1:]), strict=True)) for row in rows}
    with Sink() as sink:
        assert written == dict(count_requests(sink, tmp_path))


KINDS = {
    "PUT": {"PutObject", "CreateMultipartUpload", "UploadPart", "CompleteMultipartUpload"},
    "LIST": {"ListObjectsV2"},
    "GET": {"GetObject"},
    "HEAD": {"HeadObject"},
    "DELETE": {"DeleteObject"},
}
"""What storage bills by one price, and the requests of S3 that it stands for."""
SIZES = {"model.safetensors": 40 * 2**20, "trainer_state.json": 100, "rng_state.pth": 100}
"""Files of a checkpoint: one in three parts of 16 MiB, and two small ones."""
PUTS, GETS = 2 + (3 + 2), 2 + 3
"""Requests of the files themselves, by the second table of the page."""


def count_requests(sink: Sink, folder: Path) -> Iterator[tuple[str, dict[str, int]]]:
    """Each event of the page, with the requests that it makes besides those of the files."""

    def counted(work: Callable[[], object], *, puts: int = 0, gets: int = 0) -> dict[str, int]:
        sink.reset()
        work()
        requests = Counter(sink.stats()["requests"])
        assert requests.keys() <= set().union(*KINDS.values())
        found = {kind: sum(requests[name] for name in names) for kind, names in KINDS.items()}
        return found | {"PUT": found["PUT"] - puts, "GET": found["GET"] - gets}

    def run(name: str) -> Checkpointer:
        return Checkpointer("s3://bench/run", folder / name, storage_options=sink.storage_options)

    def start(checkpointer: Checkpointer, step: int) -> None:
        checkpointer.restore()
        checkpointer.begin(step)

    def save(step: int) -> None:
        first.save(checkpoint, Position(global_step=step))
        first.wait()

    checkpoint = folder / "checkpoint-1"
    checkpoint.mkdir(parents=True)
    for name, size in SIZES.items():
        with (checkpoint / name).open("wb") as file:
            file.truncate(size)
    first, second = run("first"), run("second")
    try:
        yield "start of a new run", counted(lambda: start(first, 0))
        save(1)  # the first save finds no pointer
        yield "save, besides the files", counted(lambda: save(2), puts=PUTS)
        yield "heartbeat", counted(lambda: heartbeat(first))
        yield "start that resumes, besides the files", counted(lambda: start(second, 2), gets=GETS)
    finally:
        first.close()
        second.close()


def heartbeat(checkpointer: Checkpointer) -> None:
    """What rank 0 does once in each interval, in three threads."""
    catalog, attempt = checkpointer.catalog, checkpointer.attempt
    assert attempt is not None
    Ownership(catalog, attempt).look()
    StopRequest(catalog, attempt.number).look()
    tracker = StepTracker(catalog, attempt.number, first_step=0, total_steps=10)
    tracker.begin_step()
    tracker.end_step(1)
    tracker.close("training")
    tracker.start()  # closed already: it writes the records and the heartbeat once, and ends
    deadline = time.monotonic() + 30
    while tracker._thread.is_alive():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_the_map_of_rooms_is_made_from_the_docstrings() -> None:
    text = CONTRIBUTING.read_text()
    assert text == rooms.page(text), "run docs/site/rooms.py"
    assert "TODO" not in text


def test_the_order_of_imports_on_the_page_is_that_of_the_test() -> None:
    floors = (floor[0] if len(floor) == 1 else f"{{{', '.join(floor)}}}" for floor in FLOORS)
    assert f"\n{' < '.join(floors)}\n" in CONTRIBUTING.read_text()


def test_the_table_of_changes_names_paths_that_exist() -> None:
    table = CONTRIBUTING.read_text().split("## Where to change what\n")[1].split("\n## ")[0]
    paths = re.findall(r"`([^`\s]+/[^`\s]*)`", table)
    assert len(paths) >= 15
    assert [path for path in paths if not (ROOT / path).exists()] == []
    for subject in SUBJECTS:
        assert re.search(rf"^\| [^|]*{subject}[^|]* \| [^|]*`[^|]+ \|$", table, re.MULTILINE), subject


SUBJECTS = (
    "retry policy",
    "digest",
    "preemption notice",
    "run status",
    "launcher",
    "environment variable",
    "storage back end",
    "command of `cloudtrain`",
    "metric in the heartbeat",
)
"""What a contributor wants to change most often; each has one row."""


def test_the_tests_that_a_promise_names_exist() -> None:
    page = (ROOT / "docs" / "guarantees.md").read_text()
    named = set(re.findall(r"`((?:tests/)?[\w/]+\.py|tests/\w+)`", page))
    assert len(named) >= 12
    for name in named:
        assert list(ROOT.glob(name if name.startswith("tests") else f"tests/*/{name}")), name
    laws = {int(number) for number in re.findall(r"^\| (\d+) ", page, flags=re.MULTILINE)}
    assert laws == set(range(1, 13))
