"""The relay: publishes the outbox to the broker, in order, at least once.

One relay works at a time; others wait for its lock and take over when it goes. What the broker confirmed
is deleted, what it did not stays and is published again under the same message id, so that a consumer can
drop by `message_id`, or by position and version.
"""

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any

import structlog
from kombu import Connection as Broker
from kombu import Exchange, Producer, Queue
from sqlalchemy import Connection, Engine
from sqlalchemy.exc import DBAPIError

from positions import metrics
from positions.errors import Unavailable
from positions.messages.published import EVENT_TYPES, EXCHANGE, queue_of
from positions.storage import broker, outbox

log = structlog.get_logger(__name__)

LOCK = 4_800_002
WINDOW = 500
"""Messages on their way at a time: one wait for confirmations serves them all."""
POLL_S = 0.1
CONFIRM_S = 15.0
WAIT_FIRST_S, WAIT_MAX_S = 0.5, 10.0
KEPT_ON_REDIS = 10_000
"""Redis knows no queue limits: of messages that nobody takes, the newest so many are kept."""

_exchange = Exchange(EXCHANGE, type="topic", durable=True)
_queues = [Queue(queue_of(name), _exchange, routing_key=name, durable=True) for name in EVENT_TYPES]


def relay_outbox(engine: Engine, broker_url: str, *, stopping: Callable[[], bool]) -> None:
    """Publish the outbox until ``stopping()``; survives the loss of database and broker."""
    errors: tuple[type[BaseException], ...] = (DBAPIError, Unavailable, OSError, *broker.errors(broker_url))
    wait_s = WAIT_FIRST_S
    while not stopping():
        started = time.monotonic()
        try:
            with engine.connect() as session, broker.connect(broker_url) as connection:
                _work(session, connection, stopping)
        except errors as error:
            reason = str(getattr(error, "orig", error)).partition("\n")[0]
            if time.monotonic() - started > WAIT_MAX_S:
                wait_s = WAIT_FIRST_S
            metrics.RELAY_INTERRUPTIONS.inc()
            log.warning("relay_interrupted", error=type(error).__name__, reason=reason, wait_s=wait_s)
            _sleep(wait_s, stopping)
            wait_s = min(wait_s * 2, WAIT_MAX_S)


def _work(session: Connection, connection: Broker, stopping: Callable[[], bool]) -> None:
    """Publish until stopped or until an error ends it.

    Everything is read and deleted in the very session that holds the lock: with the session the lock is
    lost, and the work stops.
    """
    while not _locked(session):
        if stopping():
            return
        _sleep(1.0, stopping)
    publish = _publisher(connection)
    log.info("relay_started")
    passed = refused = 0
    while not stopping():
        with session.begin():
            rows = outbox.pending(session, WINDOW, after=passed)
        metrics.RELAY_POLLS.inc()
        if rows:
            confirmed = publish(rows)
            with session.begin():
                outbox.delete(session, confirmed)
            metrics.PUBLISHED.inc("confirmed", by=len(confirmed))
            metrics.PUBLISHED.inc("refused", by=len(rows) - len(confirmed))
            # The database's clock wrote it, and clocks of hosts differ.
            waited_s = (datetime.now(UTC) - rows[0].created_at).total_seconds()
            metrics.PUBLISH_LAG.observe(max(waited_s, 0.0))
            if len(confirmed) < len(rows):
                # A queue is full or missing. Messages for the others must not wait behind its own.
                passed = rows[-1].id
                refused += len(rows) - len(confirmed)
            log.debug("outbox_published", messages=len(confirmed))
        if refused and len(rows) < WINDOW:
            raise Unavailable(f"{refused} messages refused: a queue is missing or full")
        if len(rows) < WINDOW:
            _sleep(POLL_S, stopping)
            connection.heartbeat_check()
            with suppress(TimeoutError):
                connection.drain_events(timeout=0.001)


def _locked(session: Connection) -> bool:
    with session.begin():
        return bool(session.exec_driver_sql("SELECT pg_try_advisory_lock(%(lock)s)", {"lock": LOCK}).scalar())


def _publisher(connection: Broker) -> Callable[[Sequence[Any]], list[int]]:
    """Declare where messages go, and return what publishes rows and returns the ids that arrived."""
    channel = connection.channel()
    _exchange(channel).declare()
    for queue in _queues:
        broker.ensure_queue(connection, queue.name)
        queue(channel).queue_bind()
    if connection.transport.driver_type == "amqp":
        return _Confirmed(connection, channel).publish
    producer = Producer(channel)

    def publish(rows: Sequence[Any]) -> list[int]:
        # No confirms here: Redis has the message when the call returns.
        for row in rows:
            producer.publish(row.body.encode(), exchange=_exchange, **_properties(row))
        for name in {row.event_type for row in rows}:
            channel.client.ltrim(queue_of(name), 0, KEPT_ON_REDIS - 1)
        return [row.id for row in rows]

    return publish


class _Confirmed:
    """Publishes a window of messages and waits once for all confirmations.

    kombu's own `confirm_publish` waits after each message, at a tenth of the pace.
    """

    def __init__(self, connection: Broker, channel: Any) -> None:
        self._connection, self._channel = connection, channel
        self._open: dict[int, int] = {}
        self._next_tag = 1
        self._lost: set[str] = set()
        channel.confirm_select()
        channel.events["basic_ack"].add(self._acknowledged)
        channel.events["basic_nack"].add(self._refused)
        channel.events["basic_return"].add(self._returned)

    def publish(self, rows: Sequence[Any]) -> list[int]:
        ids = {str(row.message_id): row.id for row in rows}
        self._open.clear()
        self._lost.clear()
        self._arrived: list[int] = []
        for row in rows:
            self._open[self._next_tag] = row.id
            self._next_tag += 1
            properties = _properties(row)
            routing_key = properties.pop("routing_key")
            message = self._channel.prepare_message(
                row.body.encode(),
                content_type=properties.pop("content_type"),
                content_encoding=properties.pop("content_encoding"),
                headers=properties.pop("headers"),
                properties=properties,
            )
            self._channel.basic_publish(message, exchange=EXCHANGE, routing_key=routing_key, mandatory=True)
        deadline = time.monotonic() + CONFIRM_S
        while self._open:
            self._connection.drain_events(timeout=max(0.01, deadline - time.monotonic()))
        # A message that no queue takes is returned, and confirmed all the same.
        lost = {ids[message_id] for message_id in self._lost if message_id in ids}
        return [id_ for id_ in self._arrived if id_ not in lost]

    def _settled(self, tag: int, multiple: bool) -> list[int]:
        tags = [each for each in self._open if each <= tag] if multiple else [tag]
        return [self._open.pop(each) for each in tags if each in self._open]

    def _acknowledged(self, tag: int, multiple: bool) -> None:
        self._arrived.extend(self._settled(tag, multiple))

    def _refused(self, tag: int, multiple: bool) -> None:
        self._settled(tag, multiple)

    def _returned(self, *returned: Any) -> None:
        self._lost.add(str(returned[-1].properties.get("message_id")))


def _properties(row: Any) -> dict[str, Any]:
    return {
        "routing_key": row.event_type,
        "content_type": "application/json",
        "content_encoding": "utf-8",
        "delivery_mode": 2,
        "message_id": str(row.message_id),
        "timestamp": int(datetime.now(UTC).timestamp()),
        "type": row.event_type,
        "headers": {"trace_id": row.trace_id},
    }


def _sleep(seconds: float, stopping: Callable[[], bool]) -> None:
    deadline = time.monotonic() + seconds
    while not stopping() and (left := deadline - time.monotonic()) > 0:
        time.sleep(min(left, 0.2))
