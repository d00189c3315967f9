"""Send the test reviews through an endpoint, and compare its labels with the right ones.

    cloudtrain endpoint create nsmc s3://bucket/runs/nsmc --best
    python examples/nsmc/label.py --data_dir nsmc --endpoint nsmc

It needs nothing but HTTP and the contract of SageMaker: `--url http://127.0.0.1:8080` asks `cloudtrain serve`.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor

from nsmc_data import LABELS, load_splits

CLIENTS = 8
"""Requests under way at once."""


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Print and return how many reviews were labelled, the accuracy, and how long it took."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--data_dir", required=True, help="folder with ratings_{train,test}.txt or {train,test}*.parquet")
    add("--endpoint", help="name of an endpoint of this machine")
    add("--url", help="URL of a server, in place of --endpoint")
    add("--subset", type=int, help="as in the training: label a third of N reviews")
    add("--seed", type=int, default=42, help="as in the training (%(default)s)")
    add("--rows", type=int, default=250, help="reviews in a request (%(default)s)")
    args = parser.parse_args(argv)
    url = args.url or url_of(args.endpoint)
    reviews = load_splits(args.data_dir, subset=args.subset, seed=args.seed).test
    begun = time.perf_counter()
    texts = reviews["document"][:]
    requests = [texts[start : start + args.rows] for start in range(0, len(texts), args.rows)]
    with ThreadPoolExecutor(CLIENTS) as clients:
        answers = [row for answer in clients.map(lambda rows: ask(url, rows), requests) for row in answer]
    seconds = time.perf_counter() - begun
    right = sum(
        row.get("label") == LABELS[label] for row, label in zip(answers, reviews["label"], strict=True)
    )
    found = {"reviews": len(answers), "accuracy": right / len(answers), "seconds": seconds}
    print(
        f"{found['reviews']} reviews, accuracy {found['accuracy']:.5f}, {len(answers) / seconds:.0f} reviews a second"
    )
    return found


def ask(url: str, rows: list[str]) -> list[dict[str, object]]:
    """One answer for each review: its label, or an error."""
    body = json.dumps({"inputs": rows}).encode()
    request = urllib.request.Request(f"{url}/invocations", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request) as response:
        answers: list[dict[str, object]] = json.load(response)
        return answers


def url_of(endpoint: str | None) -> str:
    if endpoint is None:
        raise SystemExit("Pass --endpoint NAME, or --url URL.")
    command = [sys.executable, "-m", "hf_cloudtrain.cli", "endpoint", "view", endpoint, "--json"]
    result = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if result.returncode:
        raise SystemExit(result.returncode)  # the command has printed the error
    handle = json.loads(result.stdout)["handle"]
    if "url" not in handle:
        raise SystemExit(
            f"'{endpoint}' is not on this machine. Ask it with `cloudtrain endpoint invoke {endpoint}`."
        )
    return str(handle["url"])


if __name__ == "__main__":
    main()
