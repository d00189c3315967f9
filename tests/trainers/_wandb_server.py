"""A stand-in for the server of W&B, as far as a run that resumes needs it: runs, their history and their summary.

    python -m tests.trainers._wandb_server PORT FILE

What it has is in FILE, a JSON object by run: `history` (its rows), `summary`, and `deleted`.
"""

from __future__ import annotations

import gzip
import http.server
import json
import re
import sys
import threading
from pathlib import Path
from typing import Any

ENTITY = {"id": "1", "name": "team"}


class Runs:
    """The runs, kept in a file after each change."""

    def __init__(self, path: Path) -> None:
        self._path, self._lock = path, threading.Lock()
        self.found: dict[str, dict[str, Any]] = json.loads(path.read_text()) if path.exists() else {}

    def keep(self) -> None:
        with self._lock:
            self._path.write_text(json.dumps(self.found))

    def bucket(self, name: str) -> dict[str, Any] | None:
        """A run as GraphQL answers it."""
        run = self.found.get(name)
        if run is None:
            return None
        tail = json.dumps([json.dumps(row) for row in run["history"][-1:]])
        facts = {"id": name, "name": name, "displayName": name, "description": "", "sweepName": None}
        lines = {"historyLineCount": len(run["history"]), "eventsLineCount": 0, "logLineCount": 0}
        ends = {"historyTail": tail, "eventsTail": "[]", "summaryMetrics": json.dumps(run["summary"])}
        more = {"config": "{}", "tags": [], "notes": "", "wandbConfig": json.dumps({"t": 1})}
        project = {"id": "1", "name": "huggingface", "entity": ENTITY}
        return {**facts, **lines, **ends, **more, "project": project}

    def take(self, name: str, files: dict[str, Any]) -> None:
        """What a file stream sends: rows from an offset on, and the summary."""
        run = self.found[name]
        for file, sent in files.items():
            rows = [json.loads(line) for line in sent["content"]]
            if file == "wandb-history.jsonl":
                run["history"][sent["offset"] :] = rows
            elif file == "wandb-summary.json":
                run["summary"] = rows[-1]
        self.keep()


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    runs: Runs

    def do_POST(self) -> None:
        sent = self._body()
        stream = re.fullmatch(r"/files/.*?([^/]+)/file_stream", self.path)
        if stream:
            self.runs.take(stream[1], sent.get("files") or {})
            self._answer({"exitcode": None, "limits": {}})
        elif self.path != "/graphql":
            self._answer({})
        else:
            self._query(sent.get("query", ""), sent.get("variables") or {})

    def do_GET(self) -> None:
        self._answer({})

    def do_PUT(self) -> None:
        self._body()
        self._answer({})

    def _query(self, query: str, variables: dict[str, Any]) -> None:
        name = str(variables.get("name"))
        if "viewer" in query and "Viewer" in query:
            viewer = {
                "id": "1",
                "entity": "team",
                "username": "u",
                "email": "",
                "flags": "{}",
                "teams": {"edges": []},
            }
            self._answer({"data": {"viewer": viewer}})
        elif "RunResumeStatus" in query:
            bucket = None if self.runs.found.get(name, {}).get("deleted") else self.runs.bucket(name)
            self._answer(
                {"data": {"model": {"id": "1", "name": "huggingface", "entity": ENTITY, "bucket": bucket}}}
            )
        elif "UpsertBucket" in query:
            if self.runs.found.get(name, {}).get("deleted"):
                text = f"run huggingface/{name} was previously created and deleted; try a new run name"
                self._answer({"errors": [{"message": text, "path": ["upsertBucket"]}]}, 409)
                return
            inserted = name not in self.runs.found
            self.runs.found.setdefault(name, {"history": [], "summary": {}})
            self.runs.keep()
            self._answer({"data": {"upsertBucket": {"bucket": self.runs.bucket(name), "inserted": inserted}}})
        elif "createRunFiles" in query:
            self._answer({"data": {"createRunFiles": {"runID": "1", "uploadHeaders": [], "files": []}}})
        else:
            self._answer({"data": {}})

    def _body(self) -> dict[str, Any]:
        data = b""
        if self.headers.get("Transfer-Encoding") == "chunked":
            while size := int(self.rfile.readline().strip() or b"0", 16):
                data += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        else:
            data = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Content-Encoding") == "gzip":
            data = gzip.decompress(data)
        try:
            found = json.loads(data)
        except ValueError:
            return {}
        return found if isinstance(found, dict) else {}

    def _answer(self, content: dict[str, Any], status: int = 200) -> None:
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        """Not on stderr."""


if __name__ == "__main__":
    Handler.runs = Runs(Path(sys.argv[2]))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Handler)
    print(server.server_address[1], flush=True)
    server.serve_forever()
