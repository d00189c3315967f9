"""Where the records of a run are, below its URL.

<run URL>/.cloudtrain/
run.json                              name, created, versions, command line
attempts/000003.json                  exclusive create: who, where, resumed from what
claims/checkpoint-500.json            exclusive create: which attempt may write that folder
parts/000003-0000000500/0-of-2.json   what one host uploaded, see host_parts.py
checkpoints/000003-0000000500.json    the commit
folders/final-000001.json             the commit of a folder that was saved by name
pins/000003-0000000500.json           a user wants to keep this checkpoint
retiring/000003-0000000500.json       the manifest of a checkpoint whose deletion has begun, until it is done
best.json, last.json                  pointers
stop.json                             which attempt is asked to stop
complete.json                         that training is over before its last planned step, see completion.py
progress/000003.json                  heartbeat
steps/000003-0001.jsonl               step and metric records
trackers/mlflow-0001.json             exclusive create: the tracker run of this run, see tracking/services/runs.py
events/tensorboard-9f86d081/…         the event files of that tracker run, see tracking/services/event_files.py
actions/1795000000000-1f2e3d4c.json   what a user did to the run from a web page

Beside that folder:
index.html                            the page that lives with the run, see report/live.py
"""

from __future__ import annotations

from hf_cloudtrain.storage.names import META

RUN = f"{META}/run.json"
STOP = f"{META}/stop.json"
COMPLETE = f"{META}/complete.json"
ATTEMPTS = f"{META}/attempts"
CLAIMS = f"{META}/claims"
PARTS = f"{META}/parts"
CHECKPOINTS = f"{META}/checkpoints"
FOLDERS = f"{META}/folders"
PINS = f"{META}/pins"
RETIRING = f"{META}/retiring"
PROGRESS = f"{META}/progress"
STEPS = f"{META}/steps"
PAGE = "index.html"
PAGE_MARK = b'<meta name="generator" content="cloudtrain'
"""Tells a page of ours from a file of the user with the same name."""
TRACKERS = f"{META}/trackers"
EVENTS = f"{META}/events"
ACTIONS = f"{META}/actions"
