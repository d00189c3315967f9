"""trackio: a run is found by its name, within a project; without a name each start makes a new one.

What is logged lies in a database on this machine, on a Space, or on a server of one's own (`TRACKIO_SPACE_ID`,
`TRACKIO_SERVER_URL`). On a new machine the database of the old one is not there: then the log of the checkpoint fills it.
"""

from __future__ import annotations

import re
import secrets
from typing import Any

from hf_cloudtrain.tracking.services.service import TrackerContent, TrackerService, TrackerStart
from hf_cloudtrain.tracking.services.wandb import STEP


class Trackio(TrackerService):
    """trackio."""

    name = "trackio"
    trainer_callback = "TrackioCallback"
    ends_with_training = True
    id_argument = "name"

    def new_id(self, start: TrackerStart) -> str:
        """The user's name for the run, made unique: two runs with one name in one project would be one for trackio."""
        stem = re.sub(r"[^\w.-]+", "-", start.run_name or start.run).strip("-")
        return f"{stem or 'run'}-{secrets.token_hex(4)}"

    def arguments(self, tracker_id: str, start: TrackerStart) -> dict[str, Any]:
        """Of `trackio.init`."""
        return {"name": tracker_id, "resume": "allow"}

    def before_start(self, callback: Any, args: Any, tracker_id: str, start: TrackerStart) -> dict[str, str]:
        """Trainer's callback takes the name from its arguments."""
        args.run_name = tracker_id
        return {}

    def sent(self, tracker_id: str) -> TrackerContent:
        """From the rows of the run: Trainer's callback sends its step as a metric, Accelerate's as the step."""
        steps: dict[str, int] = {}
        for row in self._rows():
            step = row.get(STEP, row.get("step"))
            if isinstance(step, (int, float)):
                for name in row:
                    steps[name] = max(int(step), steps.get(name, -1))
        return TrackerContent(steps)

    def page(self, tracker_id: str) -> str | None:
        """Of a Space; a database on this machine has none."""
        from trackio import context_vars

        space = context_vars.current_space_id.get()
        return None if space is None else f"https://huggingface.co/spaces/{space}"

    def flush(self) -> None:
        """Send what waits, and end the run; a later start goes on with it."""
        import trackio
        from trackio import context_vars

        if context_vars.current_run.get() is not None:
            trackio.finish()

    def _rows(self) -> list[dict[str, Any]]:
        from trackio import context_vars
        from trackio.sqlite_storage import SQLiteStorage

        run = context_vars.current_run.get()
        if run is None:
            return []
        if context_vars.current_server.get() is None:
            return list(SQLiteStorage.get_logs(run.project, run.name, run_id=run.id))
        from trackio.remote_client import RemoteClient

        client = RemoteClient(
            context_vars.current_server.get(),
            write_token=context_vars.current_server_write_token.get(),
            verbose=False,
        )
        found = client.predict(api_name="/get_logs", project=run.project, run=run.name, run_id=run.id)
        return [row for row in found if isinstance(row, dict)] if isinstance(found, list) else []
