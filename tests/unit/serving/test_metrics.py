"""The text that Prometheus reads."""

from __future__ import annotations

from hf_cloudtrain.serving.metrics import Metrics


def test_counters_and_histograms() -> None:
    metrics = Metrics({"model": 'final of "s3://b"'})
    for seconds in (0.02, 100.0):
        metrics.requests.labels(200).inc()
        metrics.request_seconds.observe(seconds)
    metrics.rows.labels("failed").inc(3)
    metrics.batch_rows.observe(3)
    assert {
        'cloudtrain_serve_info{model="final of \\"s3://b\\""} 1.0',
        'cloudtrain_serve_requests_total{code="200"} 2.0',
        'cloudtrain_serve_rows_total{outcome="failed"} 3.0',
        "cloudtrain_serve_waiting_rows 0.0",
        'cloudtrain_serve_request_seconds_bucket{le="0.025"} 1.0',
        'cloudtrain_serve_request_seconds_bucket{le="60.0"} 1.0',
        'cloudtrain_serve_request_seconds_bucket{le="+Inf"} 2.0',
        'cloudtrain_serve_batch_rows_bucket{le="4.0"} 1.0',
    } <= set(metrics.text().decode().splitlines())
