"""Requests to find the newest of 1,000 checkpoints and to restore it, counted by the endpoint.

A LIST returns up to 1,000 names, so 1,000 checkpoints need one. A large file needs one GET for each 16 MiB. The probe at a start (a
small object is written, read and deleted through both clients) is a separate row: it does not depend on the number of checkpoints.
"""

from __future__ import annotations

import dataclasses

from benchmarks.clients import Ours, Place
from benchmarks.measure import Checkpoint, Scale, Workplace
from benchmarks.report import Row
from benchmarks.sink import Sink
from hf_cloudtrain.checkpoints.catalog import Catalog
from hf_cloudtrain.checkpoints.download import download
from hf_cloudtrain.storage.backend import PART_SIZE
from hf_cloudtrain.storage.names import META


def run(scale: Scale) -> list[Row]:
    count = scale.pick(1_000, 20)
    with Workplace() as work, Sink() as sink:
        checkpoint = Checkpoint(work.folder / "checkpoint", 20_000_000)
        with Ours(Place.of(sink), checkpoint, work) as ours:
            ours.save_and_commit(step=count)
            _commit_earlier_ones(ours.checkpointer.catalog)
            opened = ours.opened(work.fresh("restored"))
        sink.reset()
        newest = opened.catalog.newest()
        finding = sink.stats()["requests"]
        assert newest is not None
        sink.reset()
        download(opened.catalog, opened.catalog.read(newest), work.folder / "restored" / "checkpoint")
        restoring = sink.stats()["requests"]
        sink.reset()
        opened.storage.check()
        probe = sink.stats()["requests"]
    own = sum(-(-size // PART_SIZE) for size in checkpoint.sizes.values())
    return [
        Row(
            f"requests to find the newest of {count:,}",
            _shown(finding),
            "",
            str(sum(finding.values())),
            "1 LIST",
            finding == {"ListObjectsV2": 1},
        ),
        Row(
            f"requests to restore it ({len(checkpoint.sizes)} files, {checkpoint.size / 1e6:.0f} MB)",
            _shown(restoring),
            f"{own} of the files' own",
            str(sum(restoring.values())),
            "1 GET + the files' own",
            restoring == {"GetObject": 1 + own},
        ),
        Row("requests of the probe at a start", _shown(probe), "", str(sum(probe.values()))),
    ]


def _commit_earlier_ones(catalog: Catalog) -> None:
    """Write the manifests of all earlier steps, as after a long run, without their files."""
    key = catalog.newest()
    assert key is not None
    newest = catalog.read(key)
    for step in range(1, newest.step):
        earlier = dataclasses.replace(key, step=step)
        manifest = dataclasses.replace(
            newest,
            key=str(earlier),
            folder=f"checkpoint-{step}",
            step=step,
            position=dataclasses.replace(newest.position, global_step=step),
        )
        catalog.storage.write(f"{META}/checkpoints/{earlier}.json", manifest.encode())


def _shown(requests: dict[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in sorted(requests.items()))
