"""Keys of the API: whose they are, what they may do, and that they can be taken away."""

from __future__ import annotations

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from flask.testing import FlaskClient
from sqlalchemy import Engine, insert
from sqlalchemy.exc import IntegrityError
from structlog.testing import capture_logs

from positions.errors import NotFound
from positions.settings import Role, SettingsError
from positions.storage import api_keys, tables
from positions.storage.database import transaction
from positions.web.auth import needs_operate
from tests.integration.api import KEY, NOWHERE, Make
from tests.services import PostgreSQL, wait_until

PATH = "/api/v1/nothing"
NOW = datetime(2026, 1, 1, tzinfo=UTC)


def create(engine: Engine, name: str, role: Role = "read", **more: Any) -> str:
    """Store a key and return it."""
    key = api_keys.generated()
    values: dict[str, Any] = {"requests_per_minute": None, "expires_at": None, **more}
    with transaction(engine) as connection:
        api_keys.create(connection, name=name, role=role, digest=api_keys.digest_of(key.encode()), **values)
    return key


def ask(client: FlaskClient, key: str, path: str = PATH, method: str = "GET") -> int:
    """Return the status; with a right key it is 404 where there is nothing."""
    return client.open(path, method=method, headers={"X-API-Key": key}).status_code


# --- in the database


def test_a_key_works_from_the_moment_it_is_created(
    make_app: Make, database_url: str, redis_url: str, engine: Engine
) -> None:
    client = make_app(database_url, redis=redis_url).test_client()
    key = create(engine, "risk", requests_per_minute=7)
    with capture_logs() as lines:
        response = client.get(PATH, headers={"X-API-Key": key})
    assert response.status_code == 404
    assert response.headers["RateLimit-Limit"] == "7"
    [line] = [each for each in lines if each["event"] == "request_served"]
    assert line["key_name"] == "risk"
    assert ask(client, key + "x") == 401
    assert ask(client, hashlib.sha256(key.encode()).hexdigest()) == 401


def test_a_revoked_key_stops_working_while_the_service_runs(
    make_app: Make, database_url: str, redis_url: str, engine: Engine
) -> None:
    client = make_app(
        database_url, redis=redis_url, POSITION_MANAGER_RATE_LIMIT_DEFAULT="10000"
    ).test_client()
    key, other = create(engine, "risk"), create(engine, "ui")
    assert ask(client, key) == 404
    with transaction(engine) as connection:
        api_keys.revoke(connection, "risk", now=NOW)
    assert wait_until(lambda: ask(client, key) == 401, limit_s=10)
    response = client.get(PATH, headers={"X-API-Key": key})
    assert response.get_json()["detail"] == "The API key is not known here."
    assert ask(client, other) == 404


def test_an_expired_key_is_told_so(make_app: Make, database_url: str, engine: Engine) -> None:
    client = make_app(database_url).test_client()
    expired = create(engine, "old", expires_at=datetime.now(UTC) - timedelta(seconds=1))
    valid = create(engine, "new", expires_at=datetime.now(UTC) + timedelta(days=1))
    response = client.get(PATH, headers={"X-API-Key": expired})
    assert response.status_code == 401
    assert response.get_json()["detail"] == "The API key has expired."
    assert response.headers["WWW-Authenticate"]
    assert ask(client, valid) == 404


def test_without_the_database_the_last_known_keys_work(
    make_app: Make, database_url: str, postgres: PostgreSQL, engine: Engine
) -> None:
    client = make_app(database_url).test_client()
    late = make_app(database_url).test_client()
    key = create(engine, "risk")
    assert ask(client, key) == 404
    postgres.kill()
    assert ask(client, key) == 404
    assert ask(client, "wrong") == 401
    # This one never read them: it cannot tell a wrong key from a right one.
    for unknown in (key, "wrong"):
        response = late.get(PATH, headers={"X-API-Key": unknown})
        assert response.status_code == 503
        assert int(response.headers["Retry-After"]) > 0
        assert response.get_json()["error_code"] == "unavailable"
    assert ask(late, KEY) == 404
    postgres.start()
    assert wait_until(lambda: ask(late, key) == 404, limit_s=10, interval_s=0.1)


def test_a_name_is_given_once(engine: Engine) -> None:
    create(engine, "risk")
    with pytest.raises(api_keys.KeyRefused, match="a key of the name risk"):
        create(engine, "risk")
    with transaction(engine) as connection:
        api_keys.revoke(connection, "risk", now=NOW)
        api_keys.revoke(connection, "risk", now=NOW + timedelta(days=1))
        [row] = api_keys.everything(connection)
        assert row.revoked_at == NOW
        assert api_keys.valid(connection) == []
        with pytest.raises(NotFound, match="nobody"):
            api_keys.revoke(connection, "nobody", now=NOW)
    with pytest.raises(api_keys.KeyRefused, match="or was"):
        create(engine, "risk")


def test_there_are_so_many_keys_and_no_more_whoever_creates_them(engine: Engine) -> None:
    rows = [
        {"name": f"k{number}", "digest": f"{number:064}", "role": "read"}
        for number in range(api_keys.KEYS_MAX - 1)
    ]
    with transaction(engine) as connection:
        connection.execute(insert(tables.api_keys), rows)

    def one_more(number: int) -> bool:
        try:
            create(engine, f"more-{number}")
        except api_keys.KeyRefused:
            return False
        return True

    def waits() -> bool:
        with transaction(engine) as connection:
            waiting = "SELECT count(*) FROM pg_locks WHERE NOT granted AND relation = 'api_keys'::regclass"
            return bool(connection.exec_driver_sql(waiting).scalar_one())

    with ThreadPoolExecutor(1) as threads:
        with transaction(engine) as connection:
            api_keys.create(
                connection, name="n", digest="d" * 64, role="read", requests_per_minute=None, expires_at=None
            )
            other = threads.submit(one_more, 1)
            assert wait_until(lambda: other.done() or waits(), limit_s=10)
        assert other.result() is False
    with transaction(engine) as connection:
        assert len(api_keys.valid(connection)) == api_keys.KEYS_MAX
        api_keys.revoke(connection, "k0", now=NOW)
    assert one_more(5)
    with pytest.raises(api_keys.KeyRefused, match="there are 1000 keys"):
        create(engine, "last")


@pytest.mark.parametrize("digest", ["", "rubbish", "d" * 63, "D" * 64, "g" * 64, "d" * 63 + "\n"])
def test_a_digest_that_is_none_cannot_be_stored(engine: Engine, digest: str) -> None:
    row = {"name": "risk", "digest": digest, "role": "read"}
    with pytest.raises(IntegrityError, match="api_keys_digest_check"), engine.begin() as connection:
        connection.execute(insert(tables.api_keys).values(row))


# --- roles


def test_who_may_only_read_changes_nothing(make_app: Make, database_url: str, engine: Engine) -> None:
    app = make_app(database_url)
    methods = ["GET", "POST", "PUT", "PATCH", "DELETE"]
    app.add_url_rule("/thing", view_func=lambda: "", endpoint="thing", methods=methods)
    app.add_url_rule("/inside", view_func=needs_operate(lambda: ""), endpoint="inside")
    client = app.test_client()
    read, operate = create(engine, "ui"), create(engine, "ops", "operate")
    assert {method: ask(client, read, "/thing", method) for method in [*methods, "HEAD", "OPTIONS"]} == {
        **dict.fromkeys(methods, 403),
        **dict.fromkeys(["GET", "HEAD", "OPTIONS"], 200),
    }
    for key in (operate, KEY):
        assert {ask(client, key, "/thing", method) for method in methods} == {200}
        assert ask(client, key, "/inside") == 200
    for method in ("GET", "HEAD"):
        assert ask(client, read, "/inside", method) == 403
    response = client.get("/inside", headers={"X-API-Key": read})
    assert response.content_type == "application/problem+json"
    assert response.get_json()["error_code"] == "forbidden"
    # Where there is nothing, or not by this method, nothing is forbidden.
    assert ask(client, read, PATH, "POST") == 404
    assert ask(client, read, "/inside", "POST") == 405


def test_the_operators_routes_are_closed_to_readers(
    make_app: Make, database_url: str, engine: Engine
) -> None:
    client = make_app(database_url).test_client()
    read = create(engine, "ui")
    assert ask(client, read, "/api/v1/positions") == 200
    assert ask(client, read, "/api/v1/events/quarantine") == 403
    assert ask(client, read, "/api/v1/events/quarantine/1/replay", "POST") == 403


# --- in the settings


def entry(key: str, name: str, **more: object) -> dict[str, object]:
    return {"name": name, "hash": hashlib.sha256(key.encode()).hexdigest(), **more}


def test_keys_of_the_settings_work_without_a_database(make_app: Make, tmp_path: Path) -> None:
    entries = [
        entry("first", "ui"),
        entry("second", "ops", role="operate", tier=9),
        entry("third", "old", expires="2020-01-01T00:00:00Z"),
    ]
    file = tmp_path / "keys.json"
    file.write_text(json.dumps(entries))
    nowhere = f"postgresql+psycopg2://{NOWHERE}/none"
    for given in (json.dumps(entries), str(file)):
        app = make_app(nowhere, POSITION_MANAGER_API_KEYS=given)
        app.add_url_rule("/thing", view_func=lambda: "", endpoint="thing", methods=["POST"])
        client = app.test_client()
        assert [ask(client, key) for key in ("first", "second", "third", KEY)] == [404, 404, 401, 404]
        assert [ask(client, key, "/thing", "POST") for key in ("first", "second")] == [403, 200]
        assert ask(client, "fourth") == 503


def test_all_keys_may_be_in_the_database_if_the_settings_say_so(
    make_app: Make, database_url: str, engine: Engine
) -> None:
    key = create(engine, "risk")
    with pytest.raises(SettingsError, match="POSITION_MANAGER_API_KEY: required"):
        make_app(database_url, POSITION_MANAGER_API_KEY="")
    client = make_app(database_url, POSITION_MANAGER_API_KEY="", POSITION_MANAGER_API_KEYS="[]").test_client()
    assert [ask(client, each) for each in (key, KEY, "")] == [404, 401, 401]


def test_a_wrong_setting_keeps_the_application_from_starting(make_app: Make, database_url: str) -> None:
    for name in ("API_KEYS", "RATE_LIMIT_OVERRIDES"):
        with pytest.raises(SettingsError, match=f"POSITION_MANAGER_{name}: "):
            make_app(database_url, **{f"POSITION_MANAGER_{name}": "rubbish"})
