"""The workers' root with one task more: an event is published as a Celery task of its own, the usual way."""

from datetime import UTC, datetime

from celery import shared_task

from celery_app import app
from positions.messages.inbound import Delivery
from positions.tasks.events import apply_batch


@shared_task(name="benchmark.apply_one")
def apply_one(body: str) -> None:
    apply_batch([Delivery("benchmark", body.encode(), {}, {}, datetime.now(UTC))])


__all__ = ["app"]
