"""Jobs: tasks that take their time or ask other hosts, on workers that take no events in."""

from functools import partial

from celery import shared_task

from positions.errors import Unavailable

LIMIT_S = 900
SOFT_LIMIT_S = LIMIT_S - 60

# Acknowledged when it begins: the next tick finds what one that died has left to do. Of a job that is not,
# Redis delivers a copy each visibility timeout (45 s), and RabbitMQ gives up the channel after half an hour.
job = partial(
    shared_task,
    acks_late=False,
    soft_time_limit=SOFT_LIMIT_S,
    time_limit=LIMIT_S,
    throws=(Unavailable,),
)
"""`@job(name="positions.verb")`: a task of the queue of jobs.

It finds out what is missing and does it in transactions of its own, so that ticks that are missed, doubled or
killed half way do no harm; returns what it did, for Flower; and lets `Unavailable` end it.
"""
