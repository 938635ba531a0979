"""The portfolio's gross exposure is kept with every change, and is what a sum over all positions would be."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal
from typing import Any

import pytest
from alembic import command
from sqlalchemy import Engine

from positions.storage import migrate
from positions.storage.portfolio import GROSS_EXPOSURE
from tests.integration.support import apply, execution

SCAN = "SELECT coalesce(sum((long_size - short_size) * current_price), 0) FROM positions"


def price(asset: str, mark: str, *, number: int = 0) -> dict[str, Any]:
    data = {"symbol": asset, "markPrice": mark, "timestamp": f"2025-01-15T11:00:{number:02d}Z"}
    return {"event_type": "position", "data": data, "event_id": f"{asset}-{number}"}


def kept(engine: Engine) -> Decimal:
    with engine.connect() as connection:
        found: Decimal = connection.execute(GROSS_EXPOSURE).scalar_one()
        assert found == connection.exec_driver_sql(SCAN).scalar_one()
    return found


def test_it_follows_fills_prices_and_closes(engine: Engine) -> None:
    assert kept(engine) == 0
    apply(engine, [execution("BTCUSDT", "Buy", "0.5", "50000", number=1)])
    assert kept(engine) == 0  # no price is known
    apply(engine, [price("BTCUSDT", "50000.000000000000000001")])
    assert kept(engine) == Decimal("25000.0000000000000000005")
    apply(engine, [execution("ETHUSDT", "Sell", "2", "3000", number=1), price("ETHUSDT", "3000")])
    assert kept(engine) == Decimal("31000.0000000000000000005")
    apply(engine, [execution("BTCUSDT", "Sell", "0.5", "51000", number=2)])
    assert kept(engine) == 6000


def test_both_legs_of_a_hedge_count(engine: Engine) -> None:
    legs = [
        execution("BTCUSDT", side, "1", "100", number=number, mode="hedge", position_idx=number)
        for number, side in enumerate(["Buy", "Sell"], 1)
    ]
    mark = price("BTCUSDT", "100")
    mark["data"]["positionIdx"] = 1
    apply(engine, [*legs, mark])
    assert kept(engine) == 200


@pytest.mark.parametrize(
    "statement",
    [
        "INSERT INTO positions (asset, long_size, current_price) VALUES ('X', 2, 3), ('Y', 1, NULL)",
        "UPDATE positions SET current_price = current_price * 1.000000000000000001",
        "UPDATE positions SET current_price = NULL WHERE asset = 'A1USDT'",
        "DELETE FROM positions WHERE asset = 'BY-HAND'",
        "TRUNCATE positions CASCADE",
    ],
)
def test_it_follows_what_is_done_by_hand(engine: Engine, statement: str) -> None:
    for number in range(3):
        asset = f"A{number}USDT"
        apply(engine, [execution(asset, "Buy", "1.5", "10", number=number), price(asset, "10.1")])
    with engine.begin() as connection:
        connection.exec_driver_sql(
            "INSERT INTO positions (asset, long_size, current_price) VALUES ('BY-HAND', 1, 7)"
        )
        connection.exec_driver_sql(statement)
    kept(engine)
    apply(engine, [execution("LATER", "Buy", "1", "10", number=1), price("LATER", "10")])
    kept(engine)


def test_it_is_exact_whoever_writes_at_the_same_time(engine: Engine) -> None:
    def write(writer: int) -> None:
        for number in range(10):
            assets = [f"A{(writer * 3 + number + each) % 7}USDT" for each in range(4)]
            fills = [
                execution(asset, "Buy", f"0.00{number + 1}", "9.7", number=writer * 100 + number)
                for asset in assets
            ]
            marks = [price(asset, f"{writer + 1}.{number:02d}3", number=number) for asset in assets]
            apply(engine, [*fills, *marks])

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(write, range(4)))
    assert kept(engine) > 0


def test_what_rolls_back_is_not_counted(engine: Engine) -> None:
    apply(engine, [execution("BTCUSDT", "Buy", "1", "10", number=1), price("BTCUSDT", "10")])
    with engine.connect() as connection:
        connection.exec_driver_sql("UPDATE positions SET current_price = 20")
        assert connection.execute(GROSS_EXPOSURE).scalar_one() == 20
        connection.rollback()
    assert kept(engine) == 10


def test_a_database_with_positions_gets_the_sum_of_what_it_has(database_url: str, engine: Engine) -> None:
    apply(engine, [execution("BTCUSDT", "Buy", "1", "10", number=1), price("BTCUSDT", "10")])
    command.downgrade(migrate.config(database_url), "0005")
    migrate.upgrade(database_url)
    assert kept(engine) == 10
    apply(engine, [execution("BTCUSDT", "Sell", "0.4", "10", number=2)])
    assert kept(engine) == 6
