"""The task behind every event: a batch of raw messages, decoded and applied in one transaction."""

import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from datetime import UTC, datetime

import structlog
from celery import shared_task

from positions import metrics
from positions.domain.events import Event, Report
from positions.errors import (
    ConcurrencyConflict,
    DeepRefold,
    InvalidEvent,
    PositionsError,
    Suspected,
    Unavailable,
)
from positions.handlers.apply_events import apply_events
from positions.handlers.write_changes import Rules
from positions.messages import inbound
from positions.messages.inbound import Delivery
from positions.storage import attempts
from positions.storage.database import in_transaction, transaction
from positions.storage.quarantine import Refused, digest_of
from positions.tasks import resources

log = structlog.get_logger(__name__)

TASK_NAME = "positions.apply_events"
ALONE_ATTEMPTS = 3
"""A message that failed so often alone is put into quarantine."""
# A canonical log line names so many trace ids; the ledger has them all.
_TRACE_IDS_LOGGED = 20
_OUTCOMES = metrics.EVENTS.labels["outcome"]


@shared_task(
    name=TASK_NAME,
    Request="positions.tasks.intake:BatchRequest",
    # Expected while the database is away or writers collide: logged in one line, without a traceback.
    throws=(Unavailable, ConcurrencyConflict, Suspected),
)
def apply_batch(
    messages: Sequence[Delivery],
    *,
    park: str | None = None,
    redelivered: bool = False,
    lonely: bool = False,
    forgiven: Sequence[str] = (),
) -> dict[str, int]:
    """Apply a batch of messages and return how many had which outcome (shown in Flower).

    Args:
        messages: what to apply.
        park: put all of them into quarantine undecoded, for this reason.
        redelivered: they were delivered before: whether one of them ends its worker is kept account of.
        lonely: they are suspected, few or one, and this worker does nothing else meanwhile.
        forgiven: digests of messages that were begun and did not end, through no fault of theirs.

    Raises:
        Unavailable: the database is away; nothing was applied, the intake holds the batch.
        ConcurrencyConflict: nothing was applied; the messages go back to their queue.
        Suspected: nothing was applied; those it names are to come again lonely.
    """
    if not redelivered:
        return _apply_batch(messages, park=park)
    own = resources.current()
    queues = {digest_of(message.queue, message.body): message.queue for message in messages}

    def done() -> None:
        in_transaction(
            own.engine,
            lambda connection: attempts.done(connection, list(queues)),
            retry=own.retry,
        )

    # Tried once: with the tries of what follows it must end before the soft limit.
    with transaction(own.engine) as connection:
        if forgiven:
            attempts.done(connection, forgiven)
        begun = attempts.begun(connection, queues, alone=lonely, now=datetime.now(UTC))
        suspects = {digest: alone for digest, (alone, known) in begun.items() if known}
        if suspects and not lonely:
            raise Suspected(suspects)  # and nothing is noted
    if lonely and len(queues) == 1:
        ((digest, (alone, _)),) = begun.items()
        log.warning("event_suspected", queue=queues[digest], digest=digest, attempts=alone)
        if alone > ALONE_ATTEMPTS:
            park = park or f"begun {alone - 1} times apart and never ended: it takes its worker with it"
    try:
        result = _apply_batch(messages, park=park)
    except (ConcurrencyConflict, Unavailable):
        # No fault of theirs. Where the database is away the intake keeps in mind to forgive them.
        with suppress(Unavailable):
            done()
        raise
    # Before they are acknowledged: nobody would come back to forget them.
    done()
    return result


def _apply_batch(messages: Sequence[Delivery], *, park: str | None) -> dict[str, int]:
    started = time.perf_counter()
    own = resources.current()
    counts: Counter[str] = Counter()
    events: list[Event] = []
    refused: list[Refused] = []
    for message in messages:
        try:
            decoded = _decoded(message, own.settings.message_max_bytes, park)
        except InvalidEvent as error:
            refused.append(_refused(message, error))
        else:
            events.extend(decoded.events)
            counts["ignored"] += decoded.ignored is not None
            if decoded.refused:
                refused.append(_refused(message, decoded.refused))
    try:
        _apply(own, events, refused, counts)
    except MemoryError as error:
        # Celery would take its main process down with it; as another error it is isolated like any.
        raise PositionsError("out of memory") from error
    counts["quarantined"] += len(refused)
    result = {name: count for name, count in sorted(counts.items()) if count}
    _count(messages, events, counts)
    traces = dict.fromkeys(event.trace_id for event in events if event.trace_id)
    log.info(
        "events_applied",
        messages=len(messages),
        events=len(events),
        duration_ms=round((time.perf_counter() - started) * 1000, 1),
        trace_ids=list(traces)[:_TRACE_IDS_LOGGED],
        **result,
    )
    for each in refused:
        log.warning(
            "event_quarantined",
            queue=each.queue,
            reason=each.reason,
            field=each.field,
            digest=each.digest,
            trace_id=each.trace_id,
        )
    return result


def _count(messages: Sequence[Delivery], events: Sequence[Event], counts: Counter[str]) -> None:
    """Tell Prometheus of a batch that was committed, in a few steps for all of it."""
    now = datetime.now(UTC)
    for outcome in _OUTCOMES:
        if count := counts[outcome]:
            metrics.EVENTS.inc(outcome, by=count)
    metrics.REFOLDS.inc(by=counts["refolded"])
    metrics.BREAKS.inc(by=counts["breaks"])
    kinds = Counter("exchange_report" if isinstance(event, Report) else event.kind.value for event in events)
    for kind, count in kinds.items():
        metrics.EVENT_KINDS.inc(kind, by=count)
    metrics.BATCH_MESSAGES.observe(len(messages))
    metrics.INTAKE_LAG.observe((now - messages[0].received_at).total_seconds())
    happened = [event.at if isinstance(event, Report) else event.executed_at for event in events]
    if happened:
        metrics.EVENT_LAG.observe(max((now - max(happened)).total_seconds(), 0.0))


def _apply(
    own: resources.Resources, events: Sequence[Event], refused: Sequence[Refused], counts: Counter[str]
) -> None:
    """Apply a batch in one transaction; a position that would hold up the others, alone after it."""
    started = time.perf_counter()
    try:
        outcome = in_transaction(
            own.engine,
            lambda connection: apply_events(
                connection, events, refused, rules=Rules.of(own.settings), now=datetime.now(UTC)
            ),
            retry=own.retry,
        )
    except DeepRefold as deep:
        log.warning("deep_refold", positions=str(deep))
        _apply(own, [each for each in events if each.position not in deep.positions], refused, counts)
        for key in deep.positions:
            _apply(own, [each for each in events if each.position == key], [], counts)
    else:
        metrics.COMMITS.observe(time.perf_counter() - started)
        counts.update(outcome.counts)


def _decoded(message: Delivery, max_bytes: int, park: str | None) -> inbound.Decoded:
    if park is not None:
        raise InvalidEvent(park)
    return inbound.decode(message, max_bytes=max_bytes)


def _refused(message: Delivery, error: InvalidEvent) -> Refused:
    return Refused(
        queue=message.queue,
        body=message.body,
        headers=message.headers,
        properties=message.properties,
        reason=error.reason,
        field=error.field,
        trace_id=error.trace_id,
    )
