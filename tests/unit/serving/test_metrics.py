"""The text that Prometheus reads."""

from __future__ import annotations

from hf_cloudtrain.serving.metrics import Metrics


def test_counters_and_histograms() -> None:
    metrics = Metrics({"model": 'final of "s3://b"'})
    metrics.request(200, 0.02)
    metrics.request(200, 100.0)
    metrics.request(400, 0.001)
    metrics.rows(3, 1)
    metrics.batch(3, 0.01)
    lines = metrics.text(waiting=7).splitlines()
    assert {
        'cloudtrain_serve_info{model="final of \\"s3://b\\""} 1',
        'cloudtrain_serve_requests_total{code="200"} 2',
        'cloudtrain_serve_requests_total{code="400"} 1',
        'cloudtrain_serve_rows_total{outcome="answered"} 3',
        'cloudtrain_serve_rows_total{outcome="failed"} 1',
        "cloudtrain_serve_waiting_rows 7",
        'cloudtrain_serve_request_seconds_bucket{le="0.005"} 1',
        'cloudtrain_serve_request_seconds_bucket{le="0.025"} 2',
        'cloudtrain_serve_request_seconds_bucket{le="60.0"} 2',
        'cloudtrain_serve_request_seconds_bucket{le="+Inf"} 3',
        "cloudtrain_serve_request_seconds_count 3",
        'cloudtrain_serve_batch_rows_bucket{le="4.0"} 1',
    } <= set(lines)
    named = {line.split()[2] for line in lines if line.startswith("# TYPE")}
    assert all(any(line.startswith(name) for name in named) for line in lines if not line.startswith("#"))
