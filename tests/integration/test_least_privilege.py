"""The service works as the roles that deploy/ gives it, and those roles may do nothing else."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path

import amqp
import psycopg2
import pytest
from psycopg2 import errors
from sqlalchemy.engine import make_url

from positions.handlers.take_snapshots import take_snapshots
from positions.storage import migrate
from positions.storage.database import connect, transaction
from tests.integration.api import ROOT
from tests.integration.processes import Process, environment, relay, worker
from tests.integration.support import EXECUTION_QUEUE, channel_of, execution, publish, stored
from tests.services import PostgreSQL, RabbitMQ, wait_until

PASSWORD = "of-the-tests"
USERS = ("admin", "neighbours", "positions", "flower")


@pytest.fixture
def roles(new_empty_database: str, postgres: PostgreSQL) -> Iterator[dict[str, str]]:
    """URL of a migrated database, for each of the two roles that roles.sql makes."""
    url = make_url(new_empty_database)
    script = (ROOT / "deploy/postgres/roles.sql").read_text()
    script = re.sub(r"^\\.*$", "", script, flags=re.MULTILINE).replace(':"DBNAME"', f'"{url.database}"')
    script = re.sub(r":'\w+'", f"'{PASSWORD}'", script)
    with closing(psycopg2.connect(dsn_of(new_empty_database))) as connection:
        connection.autocommit = True
        with connection.cursor() as cursor:
            cursor.execute(script)
            yield {
                name: url.set(username=name, password=PASSWORD).render_as_string(hide_password=False)
                for name in ("positions", "positions_owner")
            }
            cursor.execute(f'ALTER DATABASE "{url.database}" OWNER TO {make_url(postgres.url).username}')
            cursor.execute("DROP OWNED BY positions, positions_owner CASCADE")
            cursor.execute("DROP ROLE positions, positions_owner")


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[RabbitMQ]:
    """A broker with the definitions of deploy/, and the suite's own user beside them."""
    definitions = json.loads((ROOT / "deploy/rabbitmq/definitions.json").read_text())
    for user in definitions["users"]:
        assert user["password"] == f"@{user['name']}_password@"
        user["password"] = PASSWORD
    definitions["users"].append({"name": "guest", "password": "guest", "tags": []})
    everything = {"user": "guest", "vhost": "/", "configure": ".*", "write": ".*", "read": ".*"}
    definitions["permissions"].append(everything)
    file = tmp_path / "definitions.json"
    file.write_text(json.dumps(definitions))
    with RabbitMQ({"load_definitions": str(file)}) as server:
        yield server


def dsn_of(url: str) -> str:
    return make_url(url).set(drivername="postgresql").render_as_string(hide_password=False)


def url_of(broker: RabbitMQ, user: str) -> str:
    return broker.url.replace("guest:guest", f"{user}:{PASSWORD}")


def test_the_service_works_as_its_own_roles(
    roles: dict[str, str], broker: RabbitMQ, redis_url: str, tmp_path: Path
) -> None:
    owner = environment(
        roles["positions_owner"], url_of(broker, "positions"), redis_url, database_role="positions"
    )
    for _ in range(2):  # the second time as in each release after
        migration = Process(["positions.cli", "migrate"], owner, tmp_path / "migrate.log")
        assert migration.wait() == 0, migration.log.read_text()
    env = environment(roles["positions"], url_of(broker, "positions"), redis_url)
    published = "position-manager.position_updated"
    engine = connect(roles["positions"])
    with worker(env, tmp_path) as running, relay(env, tmp_path):
        messages = [execution("BTCUSDT", "Buy", "1", "100", number=number) for number in range(10)]
        publish(url_of(broker, "neighbours"), [(EXECUTION_QUEUE, each) for each in messages])
        publish(url_of(broker, "neighbours"), [(EXECUTION_QUEUE, b"{")])
        assert wait_until(lambda: sum(row["version"] for row in stored(engine).values()) > 0, limit_s=60)
        with closing(channel_of(url_of(broker, "neighbours"))) as connection:
            channel = connection.channel()
            assert wait_until(lambda: channel.basic_get(published, no_ack=True) is not None, limit_s=60)
        # Of a month that has no partition yet: the role makes it, and the owner alters it in the end.
        with transaction(engine) as session:
            take_snapshots(session, None, at=datetime.now(UTC) + timedelta(days=70), stale_after=timedelta(0))
        flower = environment(roles["positions"], url_of(broker, "flower"), redis_url)
        ping = Process(["celery", "-A", "celery_app", "inspect", "ping"], flower, tmp_path / "ping.log")
        assert ping.wait() == 0, ping.log.read_text()
        assert "pong" in ping.log.read_text()
        assert running.terminate() == 0
    engine.dispose()
    migrate.grant(roles["positions_owner"], "positions")
    with closing(psycopg2.connect(dsn_of(roles["positions_owner"]))) as connection:
        connection.cursor().execute("ALTER TABLE position_snapshots ADD COLUMN of_the_next_release int")


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE ledger SET price = 1",
        "DELETE FROM ledger",
        "TRUNCATE ledger",
        "DROP TABLE positions",
        "ALTER TABLE positions DISABLE TRIGGER portfolio_changed",
        "UPDATE alembic_version SET version_num = '1'",
        "CREATE ROLE another",
        "COPY (SELECT 1) TO PROGRAM 'true'",
    ],
)
def test_the_service_s_role_may_not(statement: str, roles: dict[str, str]) -> None:
    migrate.upgrade(roles["positions_owner"])
    migrate.grant(roles["positions_owner"], "positions")
    with closing(psycopg2.connect(dsn_of(roles["positions"]))) as connection, connection.cursor() as cursor:
        cursor.execute("SELECT count(*) FROM ledger")
        with pytest.raises(errors.InsufficientPrivilege):
            cursor.execute(statement)


def test_no_user_of_the_broker_may_do_what_is_another_s(broker: RabbitMQ) -> None:
    with closing(channel_of(broker.url)) as connection, closing(connection.channel()) as channel:
        for queue in (EXECUTION_QUEUE, "positions.tasks", "position-manager.position_updated"):
            channel.queue_declare(queue, durable=True, auto_delete=False)
        channel.exchange_declare("position-manager", "topic", durable=True, auto_delete=False)

    def refused(user: str, method: str, *arguments: object, **options: object) -> bool:
        with closing(channel_of(url_of(broker, user))) as connection:
            try:
                getattr(connection.channel(), method)(*arguments, **options)
            except amqp.AccessRefused:
                return True
            return False

    for user in USERS:
        allowed_to_read = {
            "admin": {EXECUTION_QUEUE, "positions.tasks", "position-manager.position_updated"},
            "positions": {EXECUTION_QUEUE, "positions.tasks", "position-manager.position_updated"},
            "neighbours": {EXECUTION_QUEUE, "position-manager.position_updated"},
            "flower": set(),
        }[user]
        for queue in (EXECUTION_QUEUE, "positions.tasks", "position-manager.position_updated"):
            assert refused(user, "basic_get", queue) is (queue not in allowed_to_read), (user, queue)
    # Nobody but the relay speaks in our name, and the service does not speak in a neighbour's.
    event = amqp.Message("{}")
    own_exchange = {"exchange": "position-manager", "routing_key": "position_updated"}
    for user, expected in (("neighbours", True), ("flower", True), ("positions", False)):
        with closing(channel_of(url_of(broker, user))) as connection:
            channel = connection.channel()
            channel.confirm_select()
            try:
                channel.basic_publish_confirm(event, **own_exchange)
                assert not expected, user
            except amqp.AccessRefused:
                assert expected, user
    assert refused("positions", "queue_declare", "somebody-else", durable=True)
    assert refused("neighbours", "queue_declare", "positions.tasks-2", durable=True)
    assert refused("flower", "queue_delete", EXECUTION_QUEUE)
