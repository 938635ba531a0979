"""Services written for the older position manager are pointed here, and notice nothing but right figures."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from decimal import Decimal
from pathlib import Path
from random import Random
from typing import Any

import amqp
import pytest

from positions.messages.published import queue_of
from tests.conftest import Databases
from tests.e2e.conftest import Service
from tests.integration.api import KEY
from tests.integration.processes import environment, relay, web, worker
from tests.integration.support import EXECUTION_QUEUE, POSITION_QUEUE, channel_of, execution, publish
from tests.services import PostgreSQL, RabbitMQ, Redis, wait_until

PROGRAMS = Path(__file__).parent / "older_clients"
UNAVAILABLE = "unavailable"
LIMIT_S = 60


@pytest.fixture(scope="module")
def service(
    _own_databases: Databases,
    rabbitmq: RabbitMQ,
    redis_server: Redis,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Service]:
    """A service on servers of its own, which may be killed."""
    folder = tmp_path_factory.mktemp("older-clients")
    if not redis_server.running:
        redis_server.start()
    with ExitStack() as stack:
        broker = rabbitmq.add_vhost("older-clients")
        stack.callback(rabbitmq.delete_vhost, "older-clients")
        database = stack.enter_context(_own_databases.fresh())
        env = environment(database, broker, redis_server.database_url(15), rate_limit_default="1000000")
        stack.enter_context(worker(env, folder))
        stack.enter_context(relay(env, folder))
        yield Service(stack.enter_context(web(env, folder)), broker)


class Client:
    """A neighbour's process, and what it has come to believe since it started."""

    def __init__(self, program: str, folder: Path, *arguments: str) -> None:
        self._errors = folder / f"{program}.err"
        # Nothing of ours can be imported there: -I leaves out the environment and the current folder.
        with self._errors.open("wb") as errors:
            self._process = subprocess.Popen(
                [sys.executable, "-I", str(PROGRAMS / program), *arguments],
                cwd=folder,
                env={"PATH": os.defpath},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=errors,
            )
        self.beliefs: list[tuple[str, Any]] = []
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def believes(self, of: str) -> Any:
        return next((belief for each, belief in reversed(self.beliefs) if each == of), "nothing yet")

    def comes_to_believe(self, of: str, belief: Any) -> None:
        wait_until(
            lambda: self._process.poll() is not None or self._fits(self.believes(of), belief), limit_s=LIMIT_S
        )
        assert self._fits(self.believes(of), belief), (self.beliefs[-10:], self._errors.read_text())

    def since(self, mark: int) -> list[Any]:
        """Return the beliefs from ``mark``, a length of `beliefs`; fails where the process has."""
        assert self._process.poll() is None, self._errors.read_text()
        return [belief for _, belief in self.beliefs[mark:]]

    def close(self) -> None:
        ended_by_itself = self._process.poll() is not None
        self._process.kill()
        self._process.wait()
        self._reader.join()
        assert not ended_by_itself, self._errors.read_text()

    @staticmethod
    def _fits(found: Any, belief: Any) -> bool:
        """Tell whether what it believes is this, or among other figures these."""
        if isinstance(found, dict) and isinstance(belief, dict):
            return belief.items() <= found.items()
        return bool(found == belief)

    def _read(self) -> None:
        assert self._process.stdout
        with self._process.stdout as lines:
            for line in lines:
                told = json.loads(line)
                self.beliefs.append((told["of"], told["belief"]))


@contextmanager
def neighbours(service: Service, folder: Path, *wanted: str) -> Iterator[tuple[Client, Client]]:
    with (
        closing(Client("model_service.py", folder, service.address, KEY, *wanted)) as model,
        closing(Client("risk_manager.py", folder, service.address, KEY)) as risk,
    ):
        yield model, risk


def fill(service: Service, asset: str, side: str, quantity: str, price: str, **more: Any) -> str:
    """Publish a fill and return its trace id."""
    message = execution(asset, side, quantity, price, **more)
    publish(service.broker, [(EXECUTION_QUEUE, message)])
    return str(message["trace_id"])


def mark(service: Service, asset: str, price: str, mode: str = "one-way") -> None:
    """Publish a mark price."""
    report = {"event_type": "position", "data": {"symbol": asset, "markPrice": price, "mode": mode}}
    publish(service.broker, [(POSITION_QUEUE, report)])


class Exposure:
    """What the risk manager is to believe of one asset, whatever else there is."""

    def __init__(self, risk: Client) -> None:
        self._risk = risk

    def of(self, asset: str) -> str | None:
        belief = self._risk.believes("exposure")
        return belief["by_asset"].get(asset) if isinstance(belief, dict) else None

    def becomes(self, asset: str, value: str | None) -> None:
        assert wait_until(lambda: self.of(asset) == value, limit_s=LIMIT_S), self._risk.beliefs[-10:]


def test_fills_change_what_neighbours_believe(service: Service, tmp_path: Path) -> None:
    one_way, hedge, other = "btcusdt", "BTCUSDT:hedge", "EthUsdt:one-way"
    with neighbours(service, tmp_path, one_way, hedge, other) as (model, risk):
        for each in (one_way, hedge, other):
            model.comes_to_believe(each, None)
        empty = {"total": "0", "net": "0", "by_asset": {}, "limit_exceeded": False}
        risk.comes_to_believe("exposure", empty)

        fill(service, "BTCUSDT", "Buy", "0.5", "50000", execution_fees="1.25", number=1)
        bought = {"size": "0.5", "average_entry_price": "50000", "realized_pnl": "-1.25"}
        model.comes_to_believe(one_way, bought | {"current_price": None})
        # Open, and no price known: it says so, and makes none up.
        Exposure(risk).becomes("BTCUSDT", None)
        risk.comes_to_believe("exposure", {"total": "0", "by_asset": {"BTCUSDT": None}})
        mark(service, "BTCUSDT", "50100")
        model.comes_to_believe(one_way, bought | {"current_price": "50100", "unrealized_pnl": "50"})
        risk.comes_to_believe(
            "exposure", {"total": "25050", "net": "25050", "by_asset": {"BTCUSDT": "25050"}}
        )
        assert model.believes(hedge) is None

        # The other mode is another position, with two legs that both count.
        fill(service, "btcusdt", "buy", "2", "50000", mode="hedge", position_idx=1, number=2)
        fill(service, "BTCUSDT", "Sell", "0.5", "50000", mode="hedge", position_idx=2, number=3)
        model.comes_to_believe(hedge, {"size": "1.5", "average_entry_price": None})
        mark(service, "BTCUSDT", "50100", "hedge")
        risk.comes_to_believe("exposure", {"total": "150300", "net": "100200"})
        assert model.believes(one_way)["size"] == "0.5"

        fill(service, "ethusdt", "sell", "3", "4000", number=4)
        model.comes_to_believe(other, {"size": "-3", "average_entry_price": "4000"})
        mark(service, "ETHUSDT", "4100")
        risk.comes_to_believe("exposure", {"total": "162600", "net": "87900"})

        # Flat is a position of size 0; there is one.
        fill(service, "BTCUSDT", "Sell", "0.5", "50200", number=5)
        model.comes_to_believe(
            one_way,
            {"size": "0", "average_entry_price": None, "realized_pnl": "98.75", "unrealized_pnl": "0"},
        )
        risk.comes_to_believe("exposure", {"total": "137550", "net": "62850"})
        assert model.believes(hedge)["size"] == "1.5"
        for client in (model, risk):
            assert UNAVAILABLE not in client.since(0)


def test_right_after_a_committed_update_the_next_read_is_right(service: Service, tmp_path: Path) -> None:
    random = Random(7)
    size = Decimal(0)
    fill(service, "SOLUSDT", "Buy", "1", "10", number=0)
    service.position("SOLUSDT", size="1")
    mark(service, "SOLUSDT", "10")
    service.position("SOLUSDT", current_price="10")
    with (
        # They keep every cache warm with what is about to be old.
        neighbours(service, tmp_path, "SOLUSDT") as (model, risk),
        closing(channel_of(service.broker)) as connection,
        closing(connection.channel()) as channel,
    ):
        told: list[amqp.Message] = []
        channel.basic_consume(queue_of("position_updated"), no_ack=True, callback=told.append)
        size = Decimal(1)
        for number in range(1, 31):
            change = Decimal(random.randint(1, 9999)) / 1000
            side = "Sell" if size > change and random.random() < 0.4 else "Buy"
            size += change if side == "Buy" else -change
            trace_id = fill(service, "SOLUSDT", side, str(change), "10", number=number)
            while not any(each.headers["trace_id"] == trace_id for each in told):
                connection.drain_events(timeout=LIMIT_S)
            assert Decimal(json.loads(told[-1].body)["size"]) == size
            # New connections: more than one process answers.
            for _ in range(3):
                assert Decimal(service.get("/api/v1/positions/solusdt").json()["size"]) == size
                exposure = service.get("/api/v1/portfolio/exposure").json()["by_asset"]["SOLUSDT"]["exposure"]
                assert Decimal(exposure) == size * 10
        model.comes_to_believe("SOLUSDT", {"size": service.get("/api/v1/positions/SOLUSDT").json()["size"]})
        Exposure(risk).becomes("SOLUSDT", str(exposure))
        for client in (model, risk):
            assert UNAVAILABLE not in client.since(0)


def test_without_the_database_neighbours_are_told_so_and_recover_by_themselves(
    service: Service, postgres: PostgreSQL, tmp_path: Path
) -> None:
    fill(service, "XRPUSDT", "Buy", "100", "2", number=1)
    service.position("XRPUSDT", size="100")
    mark(service, "XRPUSDT", "2.5")
    service.position("XRPUSDT", current_price="2.5")
    with neighbours(service, tmp_path, "XRPUSDT", "NONE") as (model, risk):
        model.comes_to_believe("XRPUSDT", {"size": "100"})
        model.comes_to_believe("NONE", None)
        Exposure(risk).becomes("XRPUSDT", "250")
        before = risk.believes("exposure")
        marks = len(model.beliefs), len(risk.beliefs)
        postgres.kill()
        try:
            # At once, not when what is kept somewhere has become old.
            for _ in range(10):
                assert service.get("/api/v1/portfolio/exposure").status_code == 503
            risk.comes_to_believe("exposure", UNAVAILABLE)
            for of in ("XRPUSDT", "NONE"):
                model.comes_to_believe(of, UNAVAILABLE)
            # What happens meanwhile waits for it.
            fill(service, "XRPUSDT", "Buy", "20", "2", number=2)
            # For a good while, and whoever answers: never figures, and never that there is no position.
            asked = [service.get("/api/v1/portfolio/exposure").status_code for _ in range(50)]
            assert set(asked) == {503}
            assert service.get("/api/v1/positions/NONE").status_code == 503
            assert risk.since(marks[1]) == [UNAVAILABLE]
            assert model.since(marks[0]) == [UNAVAILABLE] * 2
        finally:
            postgres.start()
        model.comes_to_believe("XRPUSDT", {"size": "120"})
        model.comes_to_believe("NONE", None)
        Exposure(risk).becomes("XRPUSDT", "300")
        after = risk.believes("exposure")
        assert Decimal(after["total"]) - Decimal(before["total"]) == 50
        figures = [each for each in risk.since(marks[1]) if each != UNAVAILABLE]
        assert all(each in (before, after) for each in figures)
        assert figures == sorted(figures, key=lambda each: Decimal(each["total"]))


def test_without_redis_neighbours_notice_nothing(
    service: Service, redis_server: Redis, tmp_path: Path
) -> None:
    fill(service, "ADAUSDT", "Buy", "10", "1", number=1)
    service.position("ADAUSDT", size="10")
    mark(service, "ADAUSDT", "1")
    with neighbours(service, tmp_path, "ADAUSDT") as (model, risk):
        model.comes_to_believe("ADAUSDT", {"size": "10", "current_price": "1"})
        Exposure(risk).becomes("ADAUSDT", "10")
        marks = len(model.beliefs), len(risk.beliefs)
        redis_server.kill()
        try:
            for number in range(2, 5):
                fill(service, "ADAUSDT", "Buy", "10", "1", number=number)
                model.comes_to_believe("ADAUSDT", {"size": str(10 * number)})
                Exposure(risk).becomes("ADAUSDT", str(10 * number))
        finally:
            redis_server.start()
        fill(service, "ADAUSDT", "Buy", "10", "1", number=5)
        model.comes_to_believe("ADAUSDT", {"size": "50"})
        Exposure(risk).becomes("ADAUSDT", "50")
        assert [each["size"] for each in model.since(marks[0])] == ["20", "30", "40", "50"]
        assert [each["by_asset"]["ADAUSDT"] for each in risk.since(marks[1])] == ["20", "30", "40", "50"]
