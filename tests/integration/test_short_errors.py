"""An expected error of ours ends a script with a short traceback and our sentence; the rest is at DEBUG level."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest

from hf_cloudtrain import CheckpointUploadCallback, CloudTrainCallback, TrainLoop
from hf_cloudtrain.errors import ConfigurationError
from tests.servers import Server

ROOT = Path(__file__).resolve().parents[2]
MOST_LINES = 15
FOREIGN = re.compile(r"During handling|direct cause|site-packages|botocore/|fsspec/|s3fs/|threading\.py")

OPEN = """
import sys
from hf_cloudtrain import Checkpointer
checkpointer = Checkpointer(sys.argv[1], "out", storage_options={options})
{then}
"""
RESTORE = OPEN.format(options=None, then="checkpointer.restore()")
SAVED = """
from pathlib import Path
from hf_cloudtrain import Checkpointer, Position
first = Checkpointer("run", "first")
first.begin(0)
folder = Path("first/checkpoint-5")
folder.mkdir(parents=True)
(folder / "model").write_bytes(b"model")
first.save(folder, Position(global_step=5))
first.wait(60)
"""

SCRIPTS: dict[str, tuple[str, str]] = {
    "unknown protocol": (
        RESTORE.replace("sys.argv[1]", "'s4://bucket/run'"),
        "ConfigurationError: 's4://bucket/run' .*Write 's3://bucket/run'",
    ),
    "missing extra": (
        "import sys; sys.modules['s3fs'] = None\n" + RESTORE.replace("sys.argv[1]", "'s3://bucket/run'"),
        r"MissingExtraError: 's3://' needs packages that are not installed: pip install 'hf_cloudtrain\[s3\]'",
    ),
    "no credentials": (
        RESTORE.replace("sys.argv[1]", "'s3://bucket/run'"),
        "StoragePermissionError: Could not write to 's3://bucket/run': no credentials were found .*`cloudtrain doctor`",
    ),
    "no run URL": (
        RESTORE.replace("sys.argv[1]", "None"),
        "ConfigurationError: No run URL was given.*HF_CLOUDTRAIN_RUN_URL",
    ),
    "output_dir below a file": (
        "open('out', 'w')\n" + RESTORE.replace("sys.argv[1]", "'run'"),
        r"ConfigurationError: .*'.*/out' ",
    ),
    "forgotten restore": (
        SAVED + "Checkpointer('run', 'second').begin(0)\n",
        "RunHasCheckpointsError: .*fresh=True",
    ),
    "function API": (
        "import hf_cloudtrain as ct\nct.init(10, 's4://bucket/run', 'ckpt')\nct.restore()\n",
        "ConfigurationError: 's4://bucket/run' .*Write 's3://bucket/run'",
    ),
}


def run(script: str, folder: Path, *arguments: str) -> list[str]:
    """The lines that a script, which must fail, writes to stderr."""
    (folder / "train.py").write_text(script)
    ended = subprocess.run(
        [sys.executable, "train.py", *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 1, ended.stderr
    return ended.stderr.splitlines()


def check_short(lines: list[str], sentence: str) -> None:
    shown = "\n".join(lines)
    assert len(lines) <= MOST_LINES, shown
    assert re.match(rf"hf_cloudtrain\.errors\.{sentence}", lines[-1]), shown
    assert not FOREIGN.search(shown), shown


@pytest.mark.parametrize("case", SCRIPTS)
def test_a_script_ends_with_one_short_traceback(case: str, tmp_path: Path) -> None:
    script, sentence = SCRIPTS[case]
    check_short(run(script, tmp_path), sentence)


def test_a_missing_bucket_is_one_short_traceback_and_the_rest_is_at_debug_level(
    moto: Server, tmp_path: Path
) -> None:
    script = OPEN.format(options=moto.storage_options, then="checkpointer.restore()")
    sentence = "ObjectNotFoundError: Could not write to 's3://no-such-bucket/run': it does not exist .*Create the bucket"
    check_short(run(script, tmp_path, "s3://no-such-bucket/run"), sentence)
    logged = (
        "import logging; logging.basicConfig(); logging.getLogger('hf_cloudtrain').setLevel('DEBUG')\n"
        + script
    )
    shown = "\n".join(run(logged, tmp_path, "s3://no-such-bucket/run"))
    assert "NoSuchBucket" in shown
    assert "botocore/" in shown
    assert moto.storage_options["secret"] not in shown


@pytest.mark.parametrize(
    "construct",
    [
        CloudTrainCallback,
        CheckpointUploadCallback,
        lambda: TrainLoop(object(), num_epochs=1),  # type: ignore[arg-type]
    ],
    ids=["CloudTrainCallback", "CheckpointUploadCallback", "TrainLoop"],
)
def test_the_error_of_a_constructor_has_one_frame_of_ours(construct: Callable[[], object]) -> None:
    with pytest.raises(ConfigurationError, match="No run URL was given") as raised:
        construct()
    inner = [
        frame for frame in traceback.extract_tb(raised.value.__traceback__) if frame.filename != __file__
    ]
    assert [frame.name for frame in inner] == ["public"]
    assert raised.value.__suppress_context__
