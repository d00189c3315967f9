"""Whether the batches that a resume skips are those that were trained on, by their fingerprints."""

from __future__ import annotations

from itertools import islice
from typing import Any

from hf_cloudtrain.resume.loader_state import BY_STATE
from hf_cloudtrain.resume.watched_sampler import Fetches, chained, fingerprint_text


class OrderCheck:
    """Compares the sample order of a resumed epoch with that of the checkpoint.

    Args:
        record: what `DataPosition.state_dict` saved in this epoch; None if the epoch is not resumed.
        epoch: its number, for the message.
    """

    def __init__(self, record: dict[str, Any] | None = None, epoch: int = 0) -> None:
        self.problem: str | None = None
        """What is wrong with the order."""
        self._record = record or {}
        self._epoch = epoch
        self._by_state = self._record.get("way") == BY_STATE
        self._look_ahead: int | None = self._record.get("fetched")

    def fail(self, why: str) -> None:
        """Note that the skipped batches cannot be those of the checkpoint."""
        self.problem = (
            f"The {self._record['batches']} batches that were trained on in epoch {self._epoch} cannot be reproduced: {why}. "
            "Resume with the dataset, the sampler and the batch size of the checkpoint, or start a new run from that model."
        )

    def check_converted(self, sampler: Any) -> None:
        """Cut the order into batches of the old settings, and compare those of process 0."""
        old = self._record["old"]
        step = old["processes"] * old["batch"]
        order = list(islice(sampler, step * old["batches"]))
        fingerprint = 0
        for first in range(0, len(order), step):
            fingerprint = chained(fingerprint, order[first : first + old["batch"]])
        self._compare(old["fingerprint"], fingerprint, "the sample order differs")

    def check_skipped(self, fetches: Fetches) -> None:
        """Compare when all batches before the position are skipped."""
        if self._by_state:  # nothing was skipped here: the stream itself starts at the position
            fetches.fingerprint = int(self._record["fingerprint"], 16)
        elif "old" not in self._record:  # else compared when the order was drawn
            self._compare(self._record["fingerprint"], fetches.fingerprint, "the sample order differs")

    def check_fetched(self, fetches: Fetches) -> None:
        """Compare when as much is fetched as before the save.

        A sampler that draws while it is iterated may repeat the skipped batches, and then return others than the look-ahead
        had.
        """
        if fetches.count != self._look_ahead:
            return
        self._look_ahead = None
        if not self._by_state and self.problem is None:
            self._compare(
                self._record["fingerprint_fetched"], fetches.fingerprint, "the batch after them differs"
            )

    def _compare(self, saved: str, fingerprint: int, why: str) -> None:
        if saved != fingerprint_text(fingerprint):
            self.fail(why)
