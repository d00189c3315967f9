"""A served model beside a bare loop over `pipeline(batch)`, on the same cores: the rows of 64 clients, what the end loses, the start.

The model has the size of the one of examples/nsmc (two layers of width 128), and the texts have its lengths. A client sends its next
request when it has the answer to the last one. The clients run on the same cores, as one process. "Lost" counts requests that were sent and
not answered, while the server is stopped by SIGTERM under full load.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

from benchmarks.measure import Scale, percentile
from benchmarks.report import Row, at_least, at_most

CLIENTS = 64
WORDS = 12_000
LEAST_SHARE = 0.8
START_TARGET = 1.0


def run(scale: Scale) -> list[Row]:
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work, "model")
        write_model(folder)
        rows = texts(scale.pick(20_000, 500))
        bare, load = _bare(folder, rows)
        found = []
        begun = time.perf_counter()
        with _Server(folder) as server:
            start = time.perf_counter() - begun
            for size in (1, 16):
                seconds, waits, errors = asyncio.run(_ask_all(server.port, rows, size))
                times = f"p50 {percentile(waits, 50) * 1e3:.0f} ms, p99 {percentile(waits, 99) * 1e3:.0f} ms, errors {errors}"
                what = f"{CLIENTS} clients, {size} row{'s' * (size > 1)} a request"
                share = (len(rows) / seconds) / bare
                ours = f"{len(rows) / seconds:,.0f} rows/s, {times}"
                found.append(at_least(what, ours, f"pipeline {bare:,.0f} rows/s", share, LEAST_SHARE))
            lost = asyncio.run(_stop(server, rows))
        found.append(at_most("requests lost at SIGTERM", f"{lost} lost", "", lost, 0, ""))
        found.append(
            at_most(
                "start to the first answer",
                f"{start:.1f} s",
                f"load by pipeline {load:.1f} s",
                start - load,
                START_TARGET,
                " s",
            )
        )
        return found


def write_model(folder: Path) -> None:
    torch.manual_seed(1)
    config = BertConfig(
        vocab_size=WORDS,
        hidden_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=512,
        max_position_embeddings=64,
    )
    BertForSequenceClassification(config).save_pretrained(folder)
    backend = Tokenizer(models.WordLevel({"[PAD]": 0, **{f"w{n}": n for n in range(1, WORDS)}}, "[PAD]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=backend, model_max_length=64, pad_token="[PAD]").save_pretrained(
        folder
    )


def texts(count: int) -> list[str]:
    chance = random.Random(2)
    lengths = [min(64, max(1, round(chance.lognormvariate(2.6, 0.6)))) for _ in range(count)]
    return [" ".join(f"w{chance.randrange(1, WORDS)}" for _ in range(length)) for length in lengths]


def _bare(folder: Path, rows: Sequence[str]) -> tuple[float, float]:
    """Rows a second, and the seconds of a process that loads the pipeline and answers one row."""
    script = (
        "import json, sys, time\n"
        "from transformers import pipeline\n"
        "pipe = pipeline('text-classification', model=sys.argv[1])\n"
        "rows = json.load(sys.stdin)\n"
        "pipe(rows[:1])\n"
        "loaded = time.time()\n"
        "for start in range(0, len(rows), 64):\n"
        "    pipe(rows[start:start + 64], batch_size=64, truncation=True)\n"
        "print(json.dumps([loaded, time.time() - loaded]))\n"
    )
    begun = time.time()
    done = subprocess.run(
        [sys.executable, "-c", script, str(folder)],
        input=json.dumps(rows),
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    loaded, seconds = json.loads(done.stdout)
    return len(rows) / seconds, loaded - begun


class _Server:
    """`cloudtrain serve`, which has answered one request."""

    def __init__(self, folder: Path) -> None:
        command = [sys.executable, "-m", "hf_cloudtrain.cli", "serve", str(folder), "--port", "0", "--json"]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)

    def __enter__(self) -> _Server:  # noqa: PYI034 - typing.Self came with Python 3.11
        assert self.process.stdout
        self.port = int(json.loads(self.process.stdout.readline())["url"].rpartition(":")[2])
        asyncio.run(_ask_all(self.port, ["w1"], 1))
        return self

    def __exit__(self, *error: object) -> None:
        self.process.kill()
        self.process.wait()
        assert self.process.stdout
        self.process.stdout.close()


async def _ask(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, rows: Sequence[str]
) -> tuple[int, bool]:
    """The status, and whether the server closes the connection."""
    body = json.dumps({"inputs": list(rows)}).encode()
    head = f"POST /invocations HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    writer.write(head.encode() + body)
    answer = (await reader.readuntil(b"\r\n\r\n")).lower()
    await reader.readexactly(int(answer.partition(b"content-length: ")[2].split(b"\r\n")[0]))
    return int(answer.split()[1]), b"connection: close" in answer


async def _ask_all(port: int, rows: Sequence[str], size: int) -> tuple[float, list[float], int]:
    """Seconds for all rows, the seconds of each request, and the answers that were not 200."""
    waiting = [rows[start : start + size] for start in range(0, len(rows), size)]
    waits: list[float] = []
    errors = 0

    async def client() -> None:
        nonlocal errors
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        while waiting:
            begun = time.perf_counter()
            status, _ = await _ask(reader, writer, waiting.pop())
            waits.append(time.perf_counter() - begun)
            errors += status != 200
        writer.close()

    begun = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(CLIENTS)))
    return time.perf_counter() - begun, waits, errors


async def _stop(server: _Server, rows: Sequence[str]) -> int:
    """SIGTERM under load; the requests that were sent and not answered."""
    lost = answered = 0

    async def client() -> None:
        nonlocal lost, answered
        while True:
            try:
                reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
            except OSError:
                return  # it is closed, and nothing was sent
            closes = False
            while not closes:
                try:
                    status, closes = await _ask(reader, writer, rows[:1])
                except (OSError, asyncio.IncompleteReadError):
                    lost += 1
                    return
                answered += 1
                lost += status != 200
            writer.close()

    clients: list[Any] = [asyncio.ensure_future(client()) for _ in range(CLIENTS)]
    while answered < 5 * CLIENTS:  # noqa: ASYNC110 - the clients have no event
        await asyncio.sleep(0.01)
    os.kill(server.process.pid, signal.SIGTERM)
    await asyncio.gather(*clients)
    return lost
