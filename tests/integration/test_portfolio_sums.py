"""Sums that a process keeps and goes on from are to the digit what reading everything gives."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from random import Random
from typing import Any, Self

import psycopg2
import pytest
from sqlalchemy import Connection, Engine, event
from sqlalchemy.engine import make_url

from positions.messages.outbound import PortfolioSums, PortfolioView, object_of, to_json
from positions.storage import portfolio
from positions.storage.database import transaction
from positions.storage.portfolio import Sums
from tests.integration.support import apply, execution, executions
from tests.services import wait_until

NOW = datetime(2025, 1, 15, 12, tzinfo=UTC)


@dataclass(frozen=True, kw_only=True, slots=True)
class Told(PortfolioSums):
    """Sums that remember of which assets they were told last."""

    last: tuple[str, ...] = ()

    def with_rows(self, rows: Iterable[Mapping[Any, Any]]) -> Self:
        given = list(rows)
        # Not the zero-argument form: a dataclass with slots is another class than the one in the body.
        made = PortfolioSums.with_rows(self, given)
        return type(self)(
            by_asset=made.by_asset,
            amounts=made.amounts,
            counts=made.counts,
            last=tuple(sorted(row["asset"] for row in given)),
        )


@contextmanager
def moment(engine: Engine) -> Iterator[Connection]:
    """Yield a connection whose readings are all of one moment, as requests read."""
    with transaction(engine.execution_options(isolation_level="REPEATABLE READ")) as connection:
        yield connection


def shown(sums: PortfolioSums, asset: str | None = None) -> str:
    view = PortfolioView.of(sums, max_exposure=None, now=NOW, stale_after=timedelta(minutes=150), asset=asset)
    return to_json(object_of(view))


def assert_right(kept: Sums[Told], connection: Connection) -> tuple[str, ...]:
    """Assert that what is kept and gone on from is what there is; return the assets that were read."""
    found, whole = kept.read(connection), Sums(PortfolioSums()).read(connection)
    assert shown(found) == shown(whole)
    assert found.by_asset == whole.by_asset
    return found.last


def read(kept: Sums[Told], engine: Engine) -> tuple[str, ...]:
    with moment(engine) as connection:
        return assert_right(kept, connection)


def settled(kept: Sums[Told], engine: Engine) -> bool:
    """Read until nothing is read again: what runs beside the test, such as ANALYZE, began later then.

    Returns True, so that it can be asserted.
    """
    return wait_until(lambda: read(kept, engine) == (), limit_s=60)


def price(asset: str, mark: str, number: int) -> dict[str, Any]:
    data = {"symbol": asset, "markPrice": mark, "timestamp": f"2025-01-15T{9 + number % 3:02d}:00:00Z"}
    return {"event_type": "position", "data": {**data, "seq": number}, "event_id": f"{asset}-{number}"}


ALL = tuple(sorted(f"A{number}USDT" for number in range(12)))


@pytest.fixture
def kept(engine: Engine) -> Sums[Told]:
    """Sums that have been read once, of a dozen positions."""
    apply(engine, executions(300, assets=len(ALL)))
    apply(engine, [price(asset, "50.125", 1) for asset in ALL[1:]])
    made = Sums(Told())
    assert read(made, engine) == ALL
    assert settled(made, engine)
    return made


def by_hand(engine: Engine, *statements: str) -> None:
    with engine.begin() as connection:
        for statement in statements:
            connection.exec_driver_sql(statement)


def test_only_assets_that_were_written_are_summed_up_again(engine: Engine, kept: Sums[Told]) -> None:
    apply(engine, [execution("A3USDT", "Buy", "0.5", "49", number=1000), price("A7USDT", "51", 2)])
    assert read(kept, engine) == ("A3USDT", "A7USDT")
    assert settled(kept, engine)
    # Of an asset that is traded in two modes, both positions.
    hedged = execution("A3USDT", "Buy", "1", "48", number=1, mode="hedge", position_idx=1, execution_id="h")
    apply(engine, [hedged])
    assert read(kept, engine) == ("A3USDT",)


def test_a_reading_is_of_one_moment_also_where_each_statement_has_its_own(
    engine: Engine, kept: Sums[Told]
) -> None:
    asked: list[str] = []
    event.listen(engine, "before_cursor_execute", lambda *given: asked.append(given[2]))
    with transaction(engine) as connection:
        assert kept.read(connection).last == ()
    assert len(asked) == 1


def test_a_new_asset_is_put_in_order(engine: Engine, kept: Sums[Told]) -> None:
    apply(
        engine,
        [execution("A10-USDT", "Buy", "1", "10", number=1), execution("0X", "Buy", "1", "9", number=1)],
    )
    assert read(kept, engine) == ("0X", "A10-USDT")
    with moment(engine) as connection:
        assert list(kept.read(connection).by_asset) == sorted([*ALL, "0X", "A10-USDT"])


@pytest.mark.parametrize("ends", ["commit", "rollback"])
def test_what_was_not_over_at_one_reading_is_seen_at_the_next(
    engine: Engine, kept: Sums[Told], ends: str
) -> None:
    """However many transactions that began later ended before it, and were read."""
    with engine.connect() as slow, engine.connect() as nested:
        # Without triggers: of connections two may share a counter of versions, and would wait for each other.
        for each in (slow, nested):
            each.exec_driver_sql("SET LOCAL session_replication_role = replica")
        slow.exec_driver_sql("UPDATE positions SET current_price = 77.7 WHERE asset = 'A1USDT'")
        nested.exec_driver_sql("SAVEPOINT one")
        nested.exec_driver_sql("UPDATE positions SET current_price = 78.8 WHERE asset = 'A2USDT'")
        nested.exec_driver_sql("RELEASE one")
        for number in range(3):
            apply(engine, [execution("A3USDT", "Buy", "0.5", "49", number=1000 + number)])
            assert read(kept, engine) == ("A3USDT",)
        getattr(slow, ends)()
        assert ("A1USDT" in read(kept, engine)) is (ends == "commit")
        getattr(nested, ends)()
        assert ("A2USDT" in read(kept, engine)) is (ends == "commit")


@pytest.mark.parametrize(
    "statements",
    [
        ["UPDATE positions SET size = size + 1, long_size = long_size + 1, current_price = NULL"],
        ["UPDATE positions SET asset = 'MOVED' WHERE asset = 'A1USDT'"],
        ["INSERT INTO positions (asset, long_size, current_price) VALUES ('B', 2, 3), ('C', 1, NULL)"],
        ["DELETE FROM positions WHERE asset = 'BY-HAND'"],
        [
            "DELETE FROM positions WHERE asset = 'BY-HAND'",
            "INSERT INTO positions (asset, long_size, current_price) VALUES ('B', 2, 3)",
        ],
        ["TRUNCATE positions CASCADE"],
        # From here on versions are given twice.
        ["TRUNCATE portfolio_versions", "UPDATE positions SET current_price = 3 WHERE asset = 'A1USDT'"],
        ["DELETE FROM portfolio_versions", "UPDATE positions SET current_price = 3 WHERE asset = 'A1USDT'"],
        ["VACUUM (FREEZE, FULL) positions"],
        ["CREATE TABLE other AS TABLE positions", "TRUNCATE positions CASCADE",
         "INSERT INTO positions TABLE other"],
    ],
    ids=["update", "rename", "insert", "delete", "replace", "empty", "versions emptied", "versions deleted",
         "vacuum", "restore"],
)  # fmt: skip
def test_what_is_done_by_hand_is_seen(engine: Engine, kept: Sums[Told], statements: list[str]) -> None:
    by_hand(engine, "INSERT INTO positions (asset, long_size, current_price) VALUES ('BY-HAND', 1, 7)")
    read(kept, engine)
    by_hand(engine.execution_options(isolation_level="AUTOCOMMIT"), *statements)
    read(kept, engine)
    apply(engine, [execution("LATER", "Buy", "1", "10", number=1), price("LATER", "10", 1)])
    read(kept, engine)


def test_an_earlier_moment_does_not_get_what_another_thread_read_later(
    engine: Engine, kept: Sums[Told]
) -> None:
    with moment(engine) as early:
        early.exec_driver_sql("SELECT 1")
        early_version = portfolio.version(early)
        apply(engine, [execution("A3USDT", "Buy", "0.5", "49", number=1000)])
        assert read(kept, engine) == ("A3USDT",)
        assert assert_right(kept, early) == ALL
        assert early_version == portfolio.version(early)
    assert "A3USDT" in read(kept, engine)


def test_one_does_not_go_on_from_another_servers_or_a_long_past_reading(
    engine: Engine, kept: Sums[Told], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(portfolio, "TRANSACTIONS_MAX", 3)
        for _ in range(4):
            by_hand(engine, "UPDATE positions SET current_price = 3 WHERE asset = 'A1USDT'")
        assert read(kept, engine) == ALL
    assert settled(kept, engine)
    by_hand(engine, "UPDATE positions SET current_price = 4 WHERE asset = 'A1USDT'")
    assert read(kept, engine) == ("A1USDT",)
    # As a process sees it whose connections lead to another server by now.
    assert kept._last
    object.__setattr__(kept._last, "era", "another")
    assert read(kept, engine) == ALL


def test_of_too_many_assets_nothing_is_kept(
    engine: Engine, kept: Sums[Told], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(portfolio, "KEPT_MAX_ASSETS", len(ALL))
    apply(engine, [execution("ONE-MORE", "Buy", "1", "10", number=1)])
    assert read(kept, engine) == ("ONE-MORE",)
    for _ in range(2):
        assert read(kept, engine) == tuple(sorted([*ALL, "ONE-MORE"]))


@pytest.mark.parametrize("seed", range(4))
def test_any_order_of_what_transactions_do_gives_the_same(
    engine: Engine, kept: Sums[Told], database_url: str, seed: int
) -> None:
    """Three transactions at a time, with savepoints, each ended at some time; and a reading now and then."""
    random = Random(seed)
    url = make_url(database_url).set(drivername="postgresql").render_as_string(hide_password=False)
    others = [psycopg2.connect(url) for _ in range(3)]
    reads, partial = 0, 0
    for step in range(400):
        other = random.choice(others)
        cursor = other.cursor()
        asset = f"A{random.randrange(14)}USDT"
        doing = random.choice(
            ["update"] * 5 + ["savepoint", "back", "insert", "delete", "commit", "rollback"]
        )
        try:
            cursor.execute("SET LOCAL lock_timeout = '1ms'")
            cursor.execute("SAVEPOINT step")
            if doing == "update":
                cursor.execute(
                    "UPDATE positions SET long_size = %s, short_size = %s, size = %s, unrealized_pnl = %s,"
                    " realized_pnl = realized_pnl + %s, current_price = %s, current_price_at = %s"
                    " WHERE asset = %s",
                    (
                        random.choice([0, 1, "1.5", "0.000000000000000001"]),
                        random.choice([0, -1]),
                        random.choice([-2, 0, "3.25"]),
                        random.choice(["0.1", "-99999999999999999999.999999999999999999"]),
                        random.choice(["0.000000000000000001", -3, 0]),
                        random.choice([None, "100.50", "99999999999999999999.999999999999999999"]),
                        random.choice([None, NOW, NOW - timedelta(hours=3)]),
                        asset,
                    ),
                )
            elif doing == "insert":
                cursor.execute(
                    "INSERT INTO positions (asset, mode, size, long_size) VALUES (%s, 'hedge', 1, 1)"
                    " ON CONFLICT DO NOTHING",
                    (asset,),
                )
            elif doing == "delete":
                cursor.execute("DELETE FROM positions WHERE asset = %s AND mode = 'hedge'", (asset,))
            elif doing == "savepoint":
                cursor.execute("SAVEPOINT kept_%s" % random.randrange(3))  # noqa: UP031
            elif doing == "back":
                cursor.execute("ROLLBACK TO kept_%s" % random.randrange(3))  # noqa: UP031
            elif doing == "commit":
                other.commit()
            elif doing == "rollback":
                other.rollback()
        except psycopg2.Error:
            # Another holds the row, or there is no such savepoint.
            other.cursor().execute("ROLLBACK TO step")
        if step % 3 == 0:
            reads += 1
            partial += len(read(kept, engine)) < len(ALL)
    for other in others:
        other.close()
    read(kept, engine)
    assert partial > reads / 2


def test_threads_that_read_and_writers_of_other_processes_at_the_same_time(
    engine: Engine, kept: Sums[Told]
) -> None:
    stop = threading.Event()
    wrong: list[BaseException] = []
    partial = [0, 0]

    def write(writer: int) -> None:
        random, number = Random(writer), 0
        while not stop.is_set():
            number += 1
            assets = random.sample([*ALL, f"NEW{writer}-{number % 40}"], 3)
            fills = [
                execution(
                    asset,
                    random.choice(["Buy", "Sell"]),
                    "0.013",
                    f"{random.randint(1, 999) / 7:.9f}",
                    number=number,
                    execution_id=f"{writer}-{number}-{asset}",
                    order_id=None,
                )
                for asset in assets
            ]
            apply(engine, [*fills, price(assets[0], f"{random.randint(1, 999) / 7:.12f}", number)])

    def look(reader: int) -> None:
        try:
            for _ in range(60):
                found = read(kept, engine)
                partial[reader] += len(found) < len(ALL)
        except BaseException as error:  # noqa: BLE001 - told below
            wrong.append(error)

    writers = [threading.Thread(target=write, args=(each,)) for each in range(3)]
    readers = [threading.Thread(target=look, args=(each,)) for each in range(2)]
    for thread in (*writers, *readers):
        thread.start()
    for thread in readers:
        thread.join()
    stop.set()
    for thread in writers:
        thread.join()
    assert wrong == []
    assert min(partial) > 0
