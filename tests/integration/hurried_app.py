"""The workers' root with time limits of seconds."""

from celery_app import app

app.conf.update(task_soft_time_limit=2, task_time_limit=5)

__all__ = ["app"]
