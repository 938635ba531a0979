"""The workers' root: settings, logging, queues, event intake, task discovery.

Run as `celery -A celery_app worker` and `celery -A celery_app beat`. A worker with `-Q positions.tasks` takes
events in and leaves the jobs to one with `-Q positions.jobs`; one without `-Q` does both.
"""

import gc
from contextlib import suppress
from threading import Thread
from typing import Any

from celery import Celery
from celery.signals import setup_logging, worker_ready
from kombu import Queue
from kombu.exceptions import OperationalError

from beat_schedule import JOBS_QUEUE, SCHEDULE, TASK_QUEUE, Job
from positions import log_config
from positions.settings import load
from positions.storage.broker import transport_options
from positions.tasks import gateway, resources
from positions.tasks.alive import Alive
from positions.tasks.intake import Drain, Intake, drain_before_the_pool, guard_properties
from positions.tasks.measured import measure

settings = load()
resources.use(resources.Resources(settings))


def _entry(job: Job) -> dict[str, Any]:
    every = float(getattr(settings, job["every"]) if isinstance(job["every"], str) else job["every"])
    return {
        "task": job["task"],
        "schedule": every,
        "relative": every >= 60,  # on whole minutes, hours or days, not so long after beat was started
        # A tick that was not served before the next is due is worth nothing. Clocks of hosts differ a little.
        "options": {"queue": job["queue"], "expires": max(every, 60)},
    }


_TASKS = ("events", "portfolio", "prices", "retention", "snapshots", "validation")
app = Celery("positions", include=[f"positions.tasks.{name}" for name in _TASKS])
app.conf.update(
    broker_url=settings.broker,
    broker_transport_options=transport_options(settings.broker),
    broker_heartbeat=10,  # the default notices a dead broker after two minutes
    broker_connection_timeout=5,
    broker_connection_max_retries=None,  # the default gives up after 100
    broker_connection_retry_on_startup=True,
    broker_channel_error_retry=True,  # otherwise a 406 ends the worker
    # Acknowledged only after the task has returned, given back when its process is killed; what a failed
    # batch means is for the intake to say.
    task_acks_late=True,
    task_reject_on_worker_lost=True,
    task_acks_on_failure=False,
    task_acks_on_timeout=False,
    worker_cancel_long_running_tasks_on_connection_loss=True,  # roll back, do not race the redelivery
    worker_enable_prefetch_count_reduction=False,  # it would shrink the prefetch of a channel it does not own
    worker_prefetch_multiplier=1,
    worker_concurrency=settings.worker_concurrency,
    worker_max_tasks_per_child=10_000,
    worker_max_memory_per_child=300_000,  # KiB
    task_time_limit=30,
    task_soft_time_limit=20,
    task_ignore_result=True,
    task_store_errors_even_if_ignored=False,
    result_backend=None,
    accept_content=["json"],
    task_serializer="json",
    enable_utc=True,
    timezone="UTC",
    task_default_queue=TASK_QUEUE,
    task_queues=[Queue(name, durable=True) for name in (TASK_QUEUE, JOBS_QUEUE)],
    task_create_missing_queues=False,  # a typo in a queue's name is an error, not a queue nobody reads
    worker_send_task_events=True,
    task_send_sent_event=True,
    worker_hijack_root_logger=False,
    worker_redirect_stdouts=False,
    beat_scheduler="positions.tasks.beat:Scheduler",
    beat_max_loop_interval=5,
    beat_schedule={name: _entry(job) for name, job in SCHEDULE.items()},
)
# A batch is many objects that live as long as it does: the collector would look at all of them again and
# again. What is loaded by now stays, and is left alone, in the pool's processes too.
gc.set_threshold(50_000, 20, 100)
gc.freeze()
app.steps["consumer"].add(Intake)
app.steps["worker"].add(Drain)
app.steps["worker"].add(Alive)
drain_before_the_pool()
guard_properties()
measure(settings)


@worker_ready.connect(weak=False)
def _begin_jobs(**_: Any) -> None:
    if JOBS_QUEUE in app.amqp.queues.consume_from:
        # Apart: neither the broker nor the gateway may hold the worker up.
        Thread(target=_at_start, daemon=True).start()


def _at_start() -> None:
    for job in SCHEDULE.values():
        if job.get("at_start"):
            with suppress(OperationalError):  # the broker is gone again: beat asks soon enough
                entry = _entry(job)
                app.send_task(entry["task"], **entry["options"])
    gateway.subscribe(settings)


@setup_logging.connect(weak=False)
def _configure_logging(**_: Any) -> None:
    log_config.configure(settings)
    log_config.warn_of_unknown_settings()
