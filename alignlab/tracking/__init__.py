"""Scalars of a run: `metrics.jsonl` always, MLflow unless the recipe says `none`, others if asked.

`tracker.py` is the log of a training, `points.py` what of its rows trackers get, `names.py` the
names that they take. Of MLflow: `mlflow_run.py` is its run of a folder, `run_content.py` what it
gets besides rows, `system_metrics.py` the machine's load, `connection.py` the way to it, which may
be away, `database.py` the SQLite file under it. `other_trackers.py` is the interface and the table
of the others, `wandb_run.py` and `tensorboard_run.py`.
"""

from alignlab.tracking.tracker import SilentTracker, Tracker, ask, runs_address

__all__ = ["SilentTracker", "Tracker", "ask", "runs_address"]
