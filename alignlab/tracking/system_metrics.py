"""The machine's load in MLflow's run: MLflow's own measurement, by a thread of its own.

It measures every 10 s, and sends from that thread: a training waits for it at its end only. Where
MLflow is away, it ends until the run is resumed. What it measured is nowhere else.
"""

import logging

log = logging.getLogger(__name__)


class SystemMetrics:
    """Measures until `end`.

    Args:
        run_id: of a run of MLflow that is open.
        uri: where MLflow is.

    Raises:
        MlflowException: MLflow does not answer.
    """

    def __init__(self, run_id: str, uri: str) -> None:
        from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

        self._monitor = SystemMetricsMonitor(run_id, resume_logging=True, tracking_uri=uri)
        self._monitor.start()

    def end(self) -> None:
        """Sends what was measured; nothing is measured any more."""
        self._monitor.finish()
