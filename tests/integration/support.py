"""What integration tests share: events as the neighbours publish them, and the oracle."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from datetime import UTC, datetime, timedelta
from random import Random
from typing import Any

import amqp
from kombu.utils.url import parse_url
from sqlalchemy import Connection, Engine, select

from positions.domain.events import Event, PositionKey
from positions.domain.figures import Figures, figures
from positions.domain.numbers import exact
from positions.domain.orders import fills_of
from positions.domain.position import Policy, empty, refolded
from positions.handlers.apply_events import Outcome, apply_events
from positions.handlers.write_changes import Rules
from positions.messages.inbound import Delivery, decode
from positions.storage import ledger
from positions.storage.database import Retry, connect, in_transaction, transaction
from positions.storage.tables import positions as positions_table

RULES = Rules(policy=Policy(), price_stale_after=timedelta(seconds=300))
POSITION_QUEUE = "ws-gateway.position"
EXECUTION_QUEUE = "order-manager.order_executed"
ORDER_QUEUE = "order-manager.order_events"


def execution(asset: str, side: str, quantity: str, price: str, **fields: Any) -> dict[str, Any]:
    """Return an `order_executed` message."""
    number = fields.pop("number", 0)
    at = datetime(2025, 1, 15, 10, tzinfo=UTC) + timedelta(seconds=number)
    return {
        "event_type": "order_executed",
        "asset": asset,
        "side": side,
        "execution_quantity": quantity,
        "execution_price": price,
        "execution_fees": "0",
        "executed_at": at.isoformat(),
        "order_id": f"order-{asset}-{number}",
        "execution_id": f"{asset}-{number}",
        "trace_id": f"trace-{asset}-{number}",
        **fields,
    }


def executions(number: int, assets: int = 40, seed: int = 1) -> list[dict[str, Any]]:
    """Return `order_executed` messages of random trades, in the order of their times."""
    random = Random(seed)
    return [
        execution(
            f"A{random.randrange(assets)}USDT",
            random.choice(["Buy", "Sell"]),
            str(random.randint(1, 900) / 1000),
            str(random.randint(1000, 9000) / 100),
            number=each,
        )
        for each in range(number)
    ]


def events_of(messages: Iterable[dict[str, Any] | bytes]) -> list[Event]:
    """Return what the service decodes ``messages`` to."""
    return [
        event
        for message in messages
        for event in decode(
            Delivery(
                queue=EXECUTION_QUEUE,
                body=message if isinstance(message, bytes) else json.dumps(message).encode(),
                headers={},
                properties={},
                received_at=datetime.now(UTC),
            ),
            max_bytes=100_000,
        ).events
    ]


def apply(engine: Engine, messages: Iterable[dict[str, Any]], retry: Retry | None = None) -> Outcome:
    """Apply ``messages`` as one batch."""
    events = events_of(messages)
    return in_transaction(
        engine,
        lambda connection: apply_events(connection, events, [], rules=RULES, now=datetime.now(UTC)),
        retry=retry or Retry(),
    )


@contextmanager
def connected(database_url: str, pool_size: int) -> Iterator[Engine]:
    """Connections to a database, until the block ends."""
    engine = connect(database_url, pool_size=pool_size)
    try:
        yield engine
    finally:
        engine.dispose()


def emptied(engine: Engine) -> None:
    """Empty the tables for the next example of a law; no connection keeps positions that are gone."""
    with transaction(engine) as connection:
        connection.exec_driver_sql(
            "TRUNCATE positions, ledger, outbox, fold_points, breaks, position_snapshots CASCADE"
        )
    engine.dispose()


def stored(engine: Engine) -> dict[PositionKey, dict[str, Any]]:
    """Return all rows of the positions table."""
    with engine.connect() as connection:
        rows = connection.execute(select(positions_table)).mappings().all()
    return {PositionKey.of(row["asset"], row["mode"]): dict(row) for row in rows}


def folded(engine: Engine) -> dict[PositionKey, Figures]:
    """Return the figures of every position of executions, folded anew from the ledger."""
    with transaction(engine) as connection, exact():
        ids = [str(row["id"]) for row in stored(engine).values()]
        entries = ledger.after(connection, dict.fromkeys(ids))
        return {
            key: figures(refolded(empty(key), fills_of(mine), RULES.policy)[0])
            for key, mine in entries.items()
        }


def assert_positions_are_the_fold_of_the_ledger(engine: Engine) -> None:
    rows, expected = stored(engine), folded(engine)
    assert rows.keys() == expected.keys()
    for key, found in expected.items():
        for name in ("size", "average_entry_price", "realized_pnl", "realized_gross", "fees_paid"):
            assert rows[key][name] == getattr(found, name), (key, name)


def stuck(engine: Engine) -> set[int]:
    """Return the database's processes in which a batch waits, for a lock or a trigger that sleeps."""
    with engine.connect() as connection:
        found = connection.exec_driver_sql(
            "SELECT pid FROM pg_stat_activity WHERE datname = current_database()"
            " AND query LIKE '%%INSERT INTO ledger%%' AND wait_event IN ('relation', 'PgSleep')"
        )
        return set(found.scalars())


def changed(connection: Connection) -> None:
    """Let what was written past the service count as a change, as an UPDATE of any position does."""
    connection.exec_driver_sql("UPDATE positions SET version = version WHERE false")


def channel_of(url: str) -> amqp.Connection:
    """Return a plain AMQP connection, as a neighbour that knows nothing of us would open."""
    parts = parse_url(url)
    connection = amqp.Connection(
        f"{parts['hostname']}:{parts['port'] or 5672}",
        userid=parts["userid"],
        password=parts["password"],
        virtual_host=parts["virtual_host"] or "/",
    )
    connection.connect()
    return connection


def publish(url: str, messages: Sequence[tuple[str, dict[str, Any] | bytes]], **properties: Any) -> None:
    """Publish ``(queue, message)`` pairs to the default exchange, persistent, and wait for the confirms."""
    with closing(channel_of(url)) as connection, closing(connection.channel()) as channel:
        channel.confirm_select()
        confirmed: list[tuple[int, bool]] = []
        channel.events["basic_ack"].add(lambda tag, multiple: confirmed.append((tag, multiple)))
        for queue, message in messages:
            body = message if isinstance(message, bytes) else json.dumps(message).encode()
            channel.basic_publish(
                amqp.Message(body, content_type="application/json", delivery_mode=2, **properties),
                exchange="",
                routing_key=queue,
            )
        while max((tag for tag, _ in confirmed), default=0) < len(messages):
            connection.drain_events(timeout=10)
