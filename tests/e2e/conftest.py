"""One running service for all tests that look at it from outside."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass
from typing import Any

import pytest
import requests

from tests.integration.api import KEY
from tests.integration.processes import environment, relay, web, worker
from tests.integration.support import POSITION_QUEUE, channel_of
from tests.services import wait_until


@dataclass
class Service:
    address: str
    broker: str

    def get(self, path: str) -> requests.Response:
        return requests.get(f"{self.address}{path}", headers={"X-API-Key": KEY}, timeout=10)

    def position(self, asset: str, **expected: str) -> dict[str, Any]:
        """Return the position once it shows what is expected."""
        found: dict[str, Any] = {}

        def shows() -> bool:
            answer = self.get(f"/api/v1/positions/{asset}")
            found.update(answer.json() if answer.ok else {})
            return all(found.get(name) == value for name, value in expected.items())

        assert wait_until(shows, limit_s=30), found
        return found

    def received(self, queue: str, trace_id: str) -> Any:
        """Return the message of ``trace_id`` that a neighbour takes from a published queue."""
        taken: list[Any] = []
        with closing(channel_of(self.broker)) as connection, closing(connection.channel()) as channel:

            def take() -> bool:
                while (message := channel.basic_get(queue, no_ack=True)) is not None:
                    if message.properties["application_headers"]["trace_id"] == trace_id:
                        taken.append(message)
                return bool(taken)

            assert wait_until(take, limit_s=30)
        return taken[0]


@pytest.fixture(scope="session")
def service(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """Worker, relay and API on a broker that the gateway has set up with arguments of its own."""
    folder = tmp_path_factory.mktemp("service")
    rabbitmq, redis = request.getfixturevalue("rabbitmq"), request.getfixturevalue("redis_server")
    new_database = request.getfixturevalue("new_database")
    with ExitStack() as stack:
        broker = rabbitmq.add_vhost("main-job")
        with closing(channel_of(broker)) as connection, closing(connection.channel()) as channel:
            limits = {"x-message-ttl": 86_400_000, "x-max-length": 100_000, "x-overflow": "drop-head"}
            channel.queue_declare(POSITION_QUEUE, durable=True, auto_delete=False, arguments=limits)
        env = environment(
            stack.enter_context(new_database()), broker, redis.url, rate_limit_default="1000000"
        )
        stack.enter_context(worker(env, folder))
        stack.enter_context(relay(env, folder))
        yield Service(stack.enter_context(web(env, folder)), broker)
