"""The intake: a bootstep of the ordinary Celery worker that turns raw queue messages into tasks.

Foreign services publish plain JSON and know nothing of Celery. The intake consumes their queues on a
channel of its own, collects messages into batches, and hands each batch to the worker as one request of
the registered task `positions.apply_events`, through the very function Celery uses for its own messages:
pool, events, Flower, time limits and logging follow. The messages behind a batch are acknowledged when,
and only when, the task has returned, which is after its transaction was committed.

What a batch that failed means:

=========================================  =====================================================
the database is away (`Unavailable`)       held here, tried again after a growing wait
`ConcurrencyConflict`                      back to the queue
its process was lost, or an unexpected     each message travels alone, so that one poison message
error                                      takes no neighbour down; of a large batch first few
                                           together (`FEW`). A message that failed alone
                                           `ALONE_ATTEMPTS` times is put into quarantine
a time limit was hit                       each message travels alone, as above: fewer may end in time.
                                           One alone is held; that is an attempt only if others were
                                           applied since it was held the time before
the connection to the broker was lost,     nothing: the broker delivers again, the ledger knows
or this process
=========================================  =====================================================

A time limit tells how long a task took, not whether its message or the database was slow: a frozen database
holds back even the signal of the limit. But one that serves others meanwhile is not what is slow.

What is delivered again travels apart from the rest, and the task keeps account of it in the database: a
message that was begun before and did not end may have taken the whole worker with it. It is suspected, and
applied with nothing beside it, but for a `FEW` others at first; one that was begun so `ALONE_ATTEMPTS` times
is put into quarantine. What did not end because the broker or the database went away is forgiven: the next
such task that this worker begins strikes it off the account first.
"""

import time
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from functools import lru_cache
from logging import Logger
from typing import Any

import structlog
from amqp import serialization
from amqp.exceptions import FrameSyntaxError
from celery import bootsteps
from celery.concurrency.solo import TaskPool as Solo
from celery.exceptions import SoftTimeLimitExceeded, TimeLimitExceeded
from celery.worker import state
from celery.worker.components import Pool
from celery.worker.request import Request
from kombu.utils.uuid import uuid

from positions import metrics
from positions.errors import ConcurrencyConflict, Suspected, Unavailable
from positions.messages.inbound import Delivery
from positions.settings import Settings
from positions.storage.broker import INTAKE_QUEUE, ensure_queue
from positions.storage.quarantine import digest_of
from positions.tasks import resources
from positions.tasks.events import ALONE_ATTEMPTS, TASK_NAME
from positions.tasks.frames import Delivered, Deliveries, read_in_bulk
from positions.tasks.lanes import Lanes, fitting

log = structlog.get_logger(__name__)

# So many messages of a batch that failed travel together, before each goes alone.
FEW = 32
PREFETCH_MAX = 65_535  # the protocol's
BASIC_CLASS = 60  # AMQP's number of the class of messages
HOLD_FIRST_S, HOLD_MAX_S = 0.5, 5.0
# Longer than a task may take (its hard limit), so that a clean stop leaves nothing half done.
DRAIN_S = 35.0


class BatchRequest(Request):  # type: ignore[misc] # Celery has no types
    """A request whose message is a :class:`Batch`."""

    def revoked(self) -> bool:
        """Events are never revoked: a revoked request is acknowledged, and the events would be lost."""
        return False

    def _announce_revoked(self, reason: str, terminated: bool, signum: Any, expired: bool) -> None:
        # Somebody terminated the task by hand. The base class would acknowledge.
        del reason, terminated, signum, expired
        self.reject(requeue=True)

    def on_failure(self, exc_info: Any, send_failed_event: bool = True, return_ok: bool = False) -> None:
        failure = exc_info.exception
        self.message.failure = getattr(failure, "exc", failure)
        super().on_failure(exc_info, send_failed_event=send_failed_event, return_ok=return_ok)

    def on_timeout(self, soft: bool, timeout: float) -> None:
        if not soft:
            self.message.failure = TimeLimitExceeded(timeout)
        super().on_timeout(soft, timeout)

    def info(self, safe: bool = False) -> dict[str, Any]:
        """What `inspect` shows: never the payloads."""
        del safe
        return {**super().info(safe=True), "args": self.argsrepr, "kwargs": self.kwargsrepr}


class Batch:
    """Messages that travel as one task; for Celery, a message of its own protocol.

    The headers name our task, always: whatever headers a foreign message has, it is data.
    """

    content_type = content_encoding = None  # the body is Python data already, there is nothing to decode

    def __init__(
        self,
        intake: "Intake",
        messages: Sequence[Delivery],
        tags: Sequence[Any],
        *,
        attempts: int = 0,
        park: str | None = None,
        redelivered: bool = False,
        lonely: bool = False,
        turn: int | None = None,
    ) -> None:
        self.turn = turn
        """Of the lane that the messages waited in."""
        self.messages, self.tags, self.attempts = messages, tags, attempts
        self.park = park
        self.redelivered, self.lonely = redelivered, lonely
        self.forgiven: frozenset[str] = frozenset()
        self.failure: BaseException | None = None
        self.waits_s = HOLD_FIRST_S
        """How long it waits before it is tried again, if it has to be."""
        self.others_applied: int | None = None
        """How many batches the intake had applied when this one was last held."""
        self.id = uuid()
        self.settlement = intake.settlement
        self._intake = intake
        by_queue = ", ".join(
            f"{count} {queue}" for queue, count in Counter(m.queue for m in messages).items()
        )
        flags = {"redelivered": redelivered, "lonely": lonely}
        options = {name: value for name, value in {"park": park, **flags}.items() if value}
        self.headers = {
            "lang": "py",
            "task": TASK_NAME,
            "id": self.id,
            "root_id": self.id,
            "parent_id": None,
            "argsrepr": f"<{by_queue}>",
            "kwargsrepr": repr(options),
            "origin": "intake",
            "ignore_result": True,
        }
        self.properties: dict[str, Any] = {}
        self.delivery_info = {
            "exchange": "",
            "routing_key": "intake",
            "redelivered": redelivered,
        }
        self.body: tuple[Any, ...] = ((tuple(messages),), options, {})
        self.payload = self.body

    def forgive(self, digests: set[str]) -> None:
        """Let the task forget first that these were begun."""
        self.forgiven = frozenset(digests)
        self.body[1]["forgiven"] = sorted(digests)

    def ack_log_error(self, logger: Logger, errors: Any, multiple: bool = False) -> None:
        """Called by Celery when the task has succeeded."""
        del logger, errors, multiple
        self._intake.succeeded(self)

    def reject_log_error(self, logger: Logger, errors: Any, requeue: bool = False) -> None:
        """Called by Celery when the task has failed, for whatever reason."""
        del logger, errors, requeue
        self._intake.failed(self)


class Settlement:
    """The deliveries of one channel that are neither acknowledged nor given back.

    One frame acknowledges all up to a tag (`multiple`). RabbitMQ closes the channel (406) unless that tag
    is still outstanding, and would acknowledge open ones below it: so a tag waits until all before it are
    settled.
    """

    def __init__(self, channel: Any, *, multiple: bool) -> None:
        self.channel = channel
        self.multiple = multiple
        self._open: deque[Any] = deque()
        self._settled: dict[Any, bool] = {}

    def opened(self, tag: Any) -> None:
        if self.multiple:
            self._open.append(tag)

    def acknowledge(self, tags: Sequence[Any]) -> None:
        if not self.multiple:
            for tag in tags:
                self.channel.basic_ack(tag)
            return
        self._settled.update(dict.fromkeys(tags, True))
        self._advance()

    def give_back(self, tags: Sequence[Any]) -> None:
        for tag in tags:
            self.channel.basic_reject(tag, requeue=True)
        if self.multiple:
            self._settled.update(dict.fromkeys(tags, False))
            self._advance()

    def finish(self) -> None:
        """Acknowledge what waits behind open deliveries, one by one; nothing more will be settled."""
        for tag, acknowledged in self._settled.items():
            if acknowledged:
                self.channel.basic_ack(tag)
        self._settled.clear()

    def _advance(self) -> None:
        last = None
        while self._open and self._open[0] in self._settled:
            tag = self._open.popleft()
            if self._settled.pop(tag):
                last = tag
        if last is not None:
            self.channel.basic_ack(last, multiple=True)


class Intake(bootsteps.StartStopStep):  # type: ignore[misc] # Celery has no types
    """Consumes the foreign queues for as long as the worker's consumer runs."""

    requires = ("celery.worker.consumer.tasks:Tasks",)

    def __init__(self, consumer: Any, **_: Any) -> None:
        self.settings: Settings = resources.current().settings
        self.settlement: Settlement | None = None
        self._consumer = consumer
        self._hub: Any = None
        self._forgiven: set[str] = set()
        self._applied = 0
        self._reset()
        consumer.intake = self

    def include_if(self, c: Any) -> bool:
        """Tell whether this worker is one for events; one that only does jobs (`-Q`) takes none in."""
        return c.app.conf.task_default_queue in c.app.amqp.queues.consume_from

    def _reset(self) -> None:
        """Forget everything that belongs to a channel: its delivery tags die with it."""
        self.settlement = None
        self._stopping = False
        self._lanes = Lanes(
            self._capacity(self._consumer),
            batch_size=self.settings.batch_size,
            wait_s=self.settings.batch_wait_ms / 1000,
        )
        self._timer_set = False
        self._again: list[tuple[Delivery, Any]] = []
        self._ready: deque[Batch] = deque()
        self._in_flight: dict[str, Batch] = {}

    @property
    def in_flight(self) -> frozenset[str]:
        """Ids of the batches that the pool has."""
        return frozenset(self._in_flight)

    def start(self, c: Any) -> None:
        """Open the channel; consuming begins when the event loop does, or a backlog would find no pool."""
        for queue in self.settings.queues:
            ensure_queue(c.connection, queue)
        channel = c.connection.channel()
        channel.auto_decode = False  # py-amqp would turn bodies into str
        channel.basic_qos(0, min(self._lanes.prefetch, PREFETCH_MAX), False)
        self.settlement = Settlement(channel, multiple=c.connection.transport.driver_type == "amqp")
        if self.settlement.multiple:
            ensure_queue(c.connection, INTAKE_QUEUE)
            self._queues = {f"intake.{c.hostname}.{queue}".encode(): queue for queue in self.settings.queues}
            read_in_bulk(c.connection.connection, Deliveries(channel, self._queues, self._delivered))

    def register_with_event_loop(self, c: Any, hub: Any) -> None:
        """Begin to consume."""
        self._hub = hub
        if self.settlement is None:
            return
        if self.settlement.multiple:  # Redis does not count consumers
            # First: who looks meanwhile takes none of ours for a stranger.
            self.settlement.channel.basic_consume(
                INTAKE_QUEUE,
                no_ack=True,
                callback=lambda _message: None,
                consumer_tag=f"intake.{c.hostname}",
            )
        for queue in self.settings.queues:
            self.settlement.channel.basic_consume(
                queue,
                no_ack=False,
                callback=lambda message, queue=queue: self._received(queue, message),
                consumer_tag=f"intake.{c.hostname}.{queue}",
            )
        log.info("intake_started", queues=self.settings.queues, batch_size=self.settings.batch_size)

    def drain(self) -> None:
        """Stop consuming, and wait for the batches that were handed over."""
        settlement, c = self.settlement, self._consumer
        if settlement is None or c.connection is None:
            return
        # What comes while the broker is told, and what is not begun, stays unacknowledged and goes back.
        self._stopping = True
        for queue in self.settings.queues:
            settlement.channel.basic_cancel(f"intake.{c.hostname}.{queue}")
        if settlement.multiple:
            settlement.channel.basic_cancel(f"intake.{c.hostname}")
        begun = len(self._in_flight)
        deadline = time.monotonic() + DRAIN_S
        while self._in_flight and self._hub is not None and time.monotonic() < deadline:
            self._hub.call_later(0.1, lambda: None)  # so that the loop comes back
            self._hub.run_once()
        settlement.finish()
        log.info("intake_drained", batches=begun - len(self._in_flight), left=len(self._in_flight))

    def stop(self, c: Any) -> None:
        """Forget the channel: its connection was lost, or is about to be closed."""
        del c
        for batch in self._in_flight.values():
            self._settle_account(batch, blameless=True)
        self._reset()

    def succeeded(self, batch: Batch) -> None:
        """Acknowledge the messages of ``batch``."""
        if batch.settlement is not self.settlement or self.settlement is None:
            return  # the channel they came on is gone: they are delivered again, and found in the ledger
        self._in_flight.pop(batch.id, None)
        self._applied += 1
        self.settlement.acknowledge(batch.tags)
        self._hand_over()

    def failed(self, batch: Batch) -> None:
        """Hold, give back or isolate the messages of ``batch``."""
        if batch.settlement is not self.settlement or self.settlement is None:
            return
        self._in_flight.pop(batch.id, None)
        failure = batch.failure
        log_failure = log.bind(task_id=batch.id, messages=len(batch.messages), reason=_reason(failure))
        several = len(batch.messages) > 1
        slow = isinstance(failure, SoftTimeLimitExceeded | TimeLimitExceeded) and (
            several or batch.others_applied in (None, self._applied)
        )
        away = isinstance(failure, Unavailable) or (slow and not several)
        conflict = isinstance(failure, ConcurrencyConflict)
        self._settle_account(batch, blameless=away or slow or conflict)
        if conflict:
            metrics.BATCHES_FAILED.inc("given_back")
            log_failure.warning("batch_given_back")
            self.settlement.give_back(batch.tags)
        elif away or batch.park is not None:
            metrics.BATCHES_FAILED.inc("held")
            log_failure.warning("batch_held", wait_s=batch.waits_s)
            self._hold(batch, attempts=batch.attempts, park=batch.park)
        elif isinstance(failure, Suspected):
            metrics.BATCHES_FAILED.inc("isolated")
            log_failure.warning("batch_isolated")
            self._set_apart(batch, failure.tried)
        elif several:
            metrics.BATCHES_FAILED.inc("isolated")
            log_failure.error("batch_isolated")
            size = FEW if len(batch.messages) > FEW else 1
            self._split(
                batch.messages, batch.tags, size, redelivered=batch.redelivered, lonely=batch.redelivered
            )
        else:
            attempts = batch.attempts + 1
            log_failure.error("event_failed_alone", attempts=attempts)
            given_up = attempts >= ALONE_ATTEMPTS
            metrics.BATCHES_FAILED.inc("parked" if given_up else "alone")
            park = f"failed {attempts} times alone: {_reason(failure)}" if given_up else None
            self._hold(batch, attempts=attempts, park=park)
        self._hand_over()

    def _settle_account(self, batch: Batch, *, blameless: bool) -> None:
        """Keep for the next task what ``batch`` was to forgive and may not have, and itself if it may be."""
        self._forgiven |= batch.forgiven
        if blameless and batch.redelivered:
            self._forgiven.update(digest_of(message.queue, message.body) for message in batch.messages)

    def _set_apart(self, batch: Batch, tried: Mapping[str, int]) -> None:
        """Let those go alone that were tried apart before, other suspects few together, the rest as ever."""
        pairs: tuple[list[tuple[Delivery, Any]], ...] = ([], [], [])
        for message, tag in zip(batch.messages, batch.tags, strict=True):
            times = tried.get(digest_of(message.queue, message.body))
            pairs[0 if times is None else 1 if times == 0 else 2].append((message, tag))
        for of_kind, size, lonely in zip(
            pairs, (len(batch.messages), FEW, 1), (False, True, True), strict=True
        ):
            messages, tags = [message for message, _ in of_kind], [tag for _, tag in of_kind]
            self._split(messages, tags, size, redelivered=True, lonely=lonely)

    def _split(
        self, messages: Sequence[Delivery], tags: Sequence[Any], size: int, *, redelivered: bool, lonely: bool
    ) -> None:
        """Let ``messages`` travel next, so many together."""
        for start in range(0, len(messages), size):
            part = slice(start, start + size)
            self._ready.append(
                Batch(self, messages[part], tags[part], redelivered=redelivered, lonely=lonely)
            )

    def _hold(self, batch: Batch, *, attempts: int, park: str | None) -> None:
        """Try the messages of ``batch`` again after its wait; the next one will be longer."""
        again = Batch(
            self,
            batch.messages,
            batch.tags,
            attempts=attempts,
            park=park,
            redelivered=batch.redelivered,
            lonely=batch.lonely,
        )
        again.waits_s = min(batch.waits_s * 2, HOLD_MAX_S)
        again.others_applied = self._applied
        self._hub.call_later(batch.waits_s, self._resume, again)

    def _received(self, queue: str, message: Any) -> None:
        """Take one raw message in."""
        if self.settlement is None or self._stopping:
            return
        body = (
            message.body
            if isinstance(message.body, bytes)
            else str(message.body or "").encode(errors="surrogatepass")
        )
        properties = dict(message.properties)
        headers = properties.pop("application_headers", None) or getattr(message, "headers", None) or {}
        raw = Delivery(queue, body, headers, _plain(properties), datetime.now(UTC))
        self._collect(
            self.settlement, raw, message.delivery_tag, again=bool(message.delivery_info.get("redelivered"))
        )

    def _delivered(self, delivered: Delivered, now: datetime) -> None:
        """Take one message in as it came in its frames."""
        if self.settlement is None or self._stopping:
            return
        headers, properties = _read_properties(delivered.properties)
        raw = Delivery(self._queues[delivered.consumer], delivered.body, headers, properties, now)
        self._collect(self.settlement, raw, delivered.tag, again=delivered.again)

    def _collect(self, settlement: Settlement, raw: Delivery, tag: Any, *, again: bool) -> None:
        """Put a message into the batch that fills."""
        settlement.opened(tag)
        if again:
            self._received_again(raw, tag)
            return
        if self._lanes.put(raw, tag):
            self._hand_over()
        self._look_again()

    def _received_again(self, message: Delivery, tag: Any) -> None:
        """Collect what was delivered before into batches of its own."""
        if not self._again:
            self._hub.call_later(self.settings.batch_wait_ms / 1000, self._flush_again, self.settlement)
        self._again.append((message, tag))
        if len(self._again) >= self.settings.batch_size:
            self._flush_again(self.settlement)

    def _flush_again(self, settlement: Settlement | None) -> None:
        if settlement is not self.settlement:
            return
        messages, tags = [message for message, _ in self._again], [tag for _, tag in self._again]
        self._again.clear()
        while messages:
            length = fitting(messages, self.settings.batch_size)
            self._ready.append(Batch(self, messages[:length], tags[:length], redelivered=True))
            del messages[:length], tags[:length]
        self._hand_over()

    def _look_again(self) -> None:
        """Look again when the next lane is due."""
        if not self._timer_set and (wait_s := self._lanes.due_in_s()) is not None:
            self._timer_set = True
            self._hub.call_later(wait_s, self._waited, self.settlement)

    def _waited(self, settlement: Settlement | None) -> None:
        if settlement is self.settlement:
            self._timer_set = False
            self._hand_over()
            self._look_again()

    def _resume(self, batch: Batch) -> None:
        if batch.settlement is self.settlement:
            self._ready.append(batch)
            self._hand_over()

    def _hand_over(self) -> None:
        """Give batches to the pool, one for each of its processes; what comes meanwhile fills the next."""
        capacity = self._capacity(self._consumer)
        while not self._stopping and len(self._in_flight) < capacity:
            begun = self._in_flight.values()
            # A pool that has grown since has processes without a turn.
            busy = {each.turn for each in begun if each.turn is not None and capacity <= self._lanes.turns}
            lonely = any(batch.lonely for batch in begun)
            if begun and (lonely or (self._ready and self._ready[0].lonely)):
                return
            if self._ready:
                batch = self._ready.popleft()
            elif served := self._lanes.serve(busy):
                batch = Batch(self, served.messages, served.tags, turn=served.turn)
            else:
                return
            if batch.redelivered and self._forgiven:
                batch.forgive(self._forgiven)
                self._forgiven.clear()
            self._in_flight[batch.id] = batch
            self._consumer.task_consumer.on_message(batch)
            if isinstance(self._consumer.pool, Solo):
                # It is done already, and its acknowledgement waits for the loop to come round.
                self._hub.call_later(0.001, lambda: None)

    def _capacity(self, c: Any) -> int:
        return int(getattr(c.pool, "num_processes", None) or c.controller.concurrency or 1)


def guard_properties() -> None:
    """Let a message with properties that cannot be read be one without any.

    py-amqp reads them while it reads the frame: a time that is out of range, or a header nested without end,
    would be an error of the connection, and end the worker at every start.
    """
    read = serialization.PROPERTY_CLASSES[BASIC_CLASS]

    def read_or_none(buffer: Any, offset: int) -> tuple[dict[str, Any], int]:
        try:
            result: tuple[dict[str, Any], int] = read(buffer, offset)
        except (ValueError, OverflowError, RecursionError, FrameSyntaxError):
            log.warning("properties_unreadable")
            return {}, offset
        return result

    serialization.PROPERTY_CLASSES[BASIC_CLASS] = read_or_none


class Drain(bootsteps.StartStopStep):  # type: ignore[misc] # Celery has no types
    """Lets the intake finish before a clean shutdown of the worker touches the pool.

    Once the consumer stops, Celery forgets every job that no process has said to have begun: one that was
    just handed over would be done, and its messages not acknowledged. A batch left half written to the
    pipe of a process would have worker and process wait for each other for ever.
    """

    def close(self, w: Any) -> None:
        if not state.should_terminate and (intake := getattr(w.consumer, "intake", None)):
            intake.drain()


def drain_before_the_pool() -> None:
    """Let :class:`Drain` be closed before the pool.

    Celery closes steps that do not depend on each other in any order, and a pool that is closed drops the
    batch that waits for one of its processes without a word.
    """
    Pool.requires = (*Pool.requires, Drain)


def _reason(failure: BaseException | None) -> str:
    """Return what went wrong in one line."""
    lines = str(failure).splitlines() or [""]
    return f"{type(failure).__name__}: {lines[0][:200]}"


@lru_cache(maxsize=64)
def _read_properties(raw: bytes) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """Return the headers and properties in a content header; most messages of a queue have the same."""
    properties, _ = serialization.PROPERTY_CLASSES[BASIC_CLASS](raw, 0)
    headers = properties.pop("application_headers", None) or {}
    return headers, _plain(properties)


def _plain(properties: dict[str, Any]) -> dict[str, Any]:
    """Return the AMQP properties a message was published with; kombu's virtual transports add their own."""
    known = (
        "content_type",
        "content_encoding",
        "message_id",
        "timestamp",
        "type",
        "app_id",
        "correlation_id",
    )
    return {name: properties[name] for name in known if properties.get(name) is not None}
