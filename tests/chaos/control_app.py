"""The same with acknowledgements as Celery's defaults have them: at hand-over, whatever comes of the task."""

from tests.integration.poisoned_app import app

app.conf.update(
    task_acks_late=False,
    task_reject_on_worker_lost=False,
    task_acks_on_failure=True,
    task_acks_on_timeout=True,
)

__all__ = ["app"]
