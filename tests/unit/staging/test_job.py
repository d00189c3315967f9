"""The description of a save travels through the shared memory unchanged."""

from __future__ import annotations

from hf_cloudtrain.staging.job import StagedFile, WriteJob


def test_a_job_is_the_same_after_the_way_through_the_memory() -> None:
    files = [
        StagedFile(
            "optimizer.pt",
            "torch",
            [["data.pkl", 0, 10], ["data/0", 64, 100]],
            {"crc32": True, "alignment": 64},
        ),
        StagedFile(
            "größe.safetensors",
            "safetensors",
            [["a", "F32", [2, 3], 192, 24]],
            {"metadata": {"format": "pt"}},
        ),
    ]
    job = WriteJob(
        output_dir="/out",
        folder="/out/_cloudtrain/saving/checkpoint-5-1",
        target="/out/checkpoint-5",
        files=files,
        entry="{}",
        inode=7,
        since_ns=5,
        delete=["/out/checkpoint-1"],
        connection=("s3://bucket/run", {"key": "secret"}),
    )
    assert WriteJob.decode(job.encode()) == job.__class__(
        **{**vars(job), "connection": ["s3://bucket/run", {"key": "secret"}]}
    )
    assert [file.size for file in files] == [110, 24]
    assert job.size == 134
