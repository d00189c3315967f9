"""Datasets of a store: folders of files in versions, committed and verified like checkpoints.

Reading order: `store` (create, list, download, delete), `cache` (the read-only local copy that all processes of a machine
share), `upload` (an upload that was interrupted and continues).
"""

from hf_cloudtrain.datasets.store import Dataset, DatasetStore, local_copy

__all__ = ["Dataset", "DatasetStore", "local_copy"]
