"""What each Python below `cloudtrain launch` does at its start, with libraries that cost nothing to import."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from hf_cloudtrain import env
from hf_cloudtrain.launch.environment import FOLDER, hooked
from hf_cloudtrain.launch.notes import read_notes, why_nothing

REPOSITORY = Path(__file__).resolve().parents[3]
WRAPPED = "import transformers.trainer as t; print(hasattr(t.Trainer.train, '__wrapped__'))"


class Machine:
    """A command's Python, with libraries named transformers and accelerate in front of the real ones."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.libraries = folder / "libraries"
        self.notes_file = folder / "notes"
        self.notes_file.touch()
        for name, text in {
            "transformers/trainer.py": "class Trainer:\n    def train(self, resume_from_checkpoint=None):\n        return 1\n",
            "accelerate/accelerator.py": "class Accelerator:\n    pass\n",
        }.items():
            path = self.libraries / name
            path.parent.mkdir(parents=True)
            path.with_name("__init__.py").touch()
            path.write_text(text)

    def run(self, code: str, *options: str, python: str = sys.executable, **variables: str) -> str:
        """What it prints to stdout."""
        return self.start(code, *options, python=python, **variables).stdout.strip()

    def start(
        self, code: str, *options: str, python: str = sys.executable, **variables: str
    ) -> subprocess.CompletedProcess[str]:
        given = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(self.libraries), **variables}
        paths = hooked(given, run_url="run", notes=str(self.notes_file))
        script = self.folder / "script.py"
        script.write_text(textwrap.dedent(code))
        return subprocess.run(
            [python, *options, str(script)], env=paths, capture_output=True, text=True, check=True
        )

    @property
    def notes(self) -> list[str]:
        return [note.what for note in read_notes(str(self.notes_file))]


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def test_a_script_that_does_not_train_imports_nothing_of_the_package(machine: Machine) -> None:
    code = "import sys; print([name for name in sys.modules if name.startswith(('hf_cloudtrain', 'typing'))])"
    assert machine.run(code) == "[]"
    assert machine.notes == ["python"]


def test_trainer_is_hooked_when_it_is_imported(machine: Machine) -> None:
    assert machine.run(WRAPPED) == "True"
    assert machine.notes == ["python", "imported"]


def test_the_module_keeps_its_own_loader_and_the_function_its_source_and_signature(machine: Machine) -> None:
    code = """
        import inspect, transformers.trainer as t
        print(type(t.__loader__).__name__, type(t.__spec__.loader).__name__)
        print("return 1" in inspect.getsource(t.Trainer.train), inspect.signature(t.Trainer.train))
    """
    assert machine.run(code).splitlines() == [
        "SourceFileLoader SourceFileLoader",
        "True (self, resume_from_checkpoint=None)",
    ]


def test_a_reloaded_module_is_hooked_again(machine: Machine) -> None:
    assert (
        machine.run(f"import importlib, transformers.trainer as t; importlib.reload(t)\n{WRAPPED}") == "True"
    )


def test_an_import_after_a_fork_is_hooked(machine: Machine) -> None:
    code = f"""
        import os
        if os.fork() == 0:
            {WRAPPED}
        else:
            os.wait()
    """
    assert machine.run(code) == "True"
    assert machine.notes == ["python", "imported"]


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_a_process_of_multiprocessing_is_hooked(machine: Machine, method: str) -> None:
    code = f"""
        import multiprocessing
        def work():
            {WRAPPED}
        if __name__ == "__main__":
            process = multiprocessing.get_context({method!r}).Process(target=work)
            process.start()
            process.join()
    """
    assert machine.run(code) == "True"


def test_the_sitecustomize_that_was_there_still_runs(machine: Machine) -> None:
    (machine.libraries / "sitecustomize.py").write_text("import builtins; builtins.mine = __name__\n")
    code = f"import sitecustomize, sys; print(mine, sitecustomize.__file__)\n{WRAPPED}"
    assert machine.run(code).splitlines() == [
        f"sitecustomize {machine.libraries / 'sitecustomize.py'}",
        "True",
    ]


def test_an_error_in_that_sitecustomize_is_shown_by_python_as_without_the_hook(machine: Machine) -> None:
    (machine.libraries / "sitecustomize.py").write_text("1 / 0\n")
    done = machine.start(WRAPPED)
    assert "Error in sitecustomize; set PYTHONVERBOSE for traceback:\nZeroDivisionError" in done.stderr
    assert done.stdout == "True\n"


def test_two_hooks_on_the_path_hook_once(machine: Machine) -> None:
    other = machine.folder / "other"
    other.mkdir()
    (other / "sitecustomize.py").write_text((Path(FOLDER) / "sitecustomize.py").read_text())
    code = f"{WRAPPED}\nprint(hasattr(t.Trainer.train.__wrapped__, '__wrapped__'))"
    path = f"{other}:{machine.libraries}"
    assert machine.run(code, PYTHONPATH=path).splitlines() == ["True", "False"]
    assert hooked({"PYTHONPATH": f"{FOLDER}:a"}, run_url="run")["PYTHONPATH"] == f"{FOLDER}:a"


def test_a_process_may_opt_out(machine: Machine) -> None:
    assert machine.run(WRAPPED, **{env.LAUNCH: "off"}) == "False"
    assert machine.notes == ["off"]
    assert why_nothing(read_notes(str(machine.notes_file))) == "HF_CLOUDTRAIN_LAUNCH is 'off'"


@pytest.mark.parametrize("option", ["-I", "-E", "-S"])
def test_a_python_that_reads_no_hook_is_known_by_its_silence(machine: Machine, option: str) -> None:
    libraries = f"import sys; sys.path.insert(0, {str(machine.libraries)!r})\n"
    assert machine.run(libraries + WRAPPED, option) == "False"
    assert machine.notes == []
    assert "`python -I`" in str(why_nothing([]))


def test_a_python_without_the_package_says_so_and_goes_on(machine: Machine) -> None:
    python = sys._base_executable  # type: ignore[attr-defined]
    if python == sys.executable:
        pytest.skip("the tests do not run in a virtual environment")
    done = machine.start(WRAPPED, python=python)
    assert done.stdout == "False\n"
    assert done.stderr.count("cannot import hf_cloudtrain") == 1
    assert machine.notes == ["python", "without-package"]
    assert "install it there" in str(why_nothing(read_notes(str(machine.notes_file))))


def test_a_folder_of_notes_that_is_gone_does_not_matter(machine: Machine) -> None:
    machine.notes_file.unlink()
    assert machine.run(WRAPPED) == "True"
