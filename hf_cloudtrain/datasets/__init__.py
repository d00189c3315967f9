"""The datasets of a store: folders of files in versions, committed and verified like checkpoints.

Reading order:

- `store`: create, list, find and delete versions;
- `upload`: an upload, recorded on this machine so that it continues after an interruption;
- `cache`: the read-only local copy that all processes of a machine share.

    data create -> store -> upload -> checkpoints (claim, send, commit) -> <store>/datasets/glue.2/
    local_copy  -> store -> cache  -> checkpoints (download, verify)    -> ~/.cache/hf_cloudtrain/datasets/…/glue

May import `checkpoints` and the rooms below. `DatasetStore`, `Dataset` and `local_copy` are public.
"""

from hf_cloudtrain.datasets.store import Dataset, DatasetStore, local_copy

__all__ = ["Dataset", "DatasetStore", "local_copy"]
