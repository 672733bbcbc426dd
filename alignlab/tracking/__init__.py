"""Scalars of a run: `metrics.jsonl` always, MLflow unless the recipe says `none`.

`tracker.py` is the log of a training, `mlflow_run.py` MLflow's run of a folder, `connection.py`
the way to MLflow, which may be away, `database.py` the SQLite file under it, `names.py` the names
that MLflow takes.
"""

from alignlab.tracking.tracker import SilentTracker, Tracker, ask, runs_address

__all__ = ["SilentTracker", "Tracker", "ask", "runs_address"]
