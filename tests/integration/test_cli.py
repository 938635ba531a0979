"""What an operator does from the command line."""

from __future__ import annotations

import hashlib
import json
import re
from datetime import UTC, datetime
from typing import Any

import pytest
from click.testing import CliRunner, Result
from sqlalchemy import Engine, text
from structlog.testing import capture_logs

from positions import log_config
from positions.cli import cli
from positions.domain.events import Mode, PositionKey
from positions.domain.times import utc_text
from positions.errors import NotFound
from positions.settings import load
from positions.storage import api_keys, quarantine, validations
from positions.storage.database import transaction
from tests.integration.support import apply, execution, stored

BTC = PositionKey("BTCUSDT", Mode.ONE_WAY)
NOW = datetime(2026, 1, 1, tzinfo=UTC)


@pytest.fixture
def run(database_url: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(log_config, "configure", lambda _: None)

    def invoke(*arguments: str) -> Result:
        with capture_logs():
            return CliRunner().invoke(cli, arguments, env={"POSITION_MANAGER_DATABASE_URL": database_url})

    return invoke


def refuse(engine: Engine, message: dict[str, Any], reason: str = "because") -> None:
    refused = quarantine.Refused(
        queue="order-manager.order_executed",
        body=json.dumps(message).encode(),
        headers={},
        properties={"timestamp": "2025-01-15T09:00:00"},
        reason=reason,
        field="price",
    )
    with transaction(engine) as connection:
        quarantine.add(connection, [refused], now=NOW)


def test_quarantine_is_listed_and_read(engine: Engine, run: Any) -> None:
    refuse(engine, execution("BTCUSDT", "Buy", "1", "100"))
    refuse(engine, execution("BTCUSDT", "Buy", "1", "100"))
    listed = run("quarantine", "list")
    assert listed.exit_code == 0
    assert "2x  order-manager.order_executed" in listed.output
    assert "price: because" in listed.output
    (row,) = map(json.loads, run("quarantine", "list", "--json").output.splitlines())
    shown = json.loads(run("quarantine", "show", str(row["id"])).output)
    assert json.loads(shown["refused"]["body"])["asset"] == "BTCUSDT"
    assert shown["times_seen"] == 2
    assert row["last_seen_at"] == shown["last_seen_at"] == utc_text(NOW)
    missing = run("quarantine", "show", "999")
    assert missing.exit_code == 1


def test_a_replay_is_as_idempotent_as_a_redelivery(engine: Engine, run: Any) -> None:
    untimed = execution("BTCUSDT", "Buy", "1", "100", executed_at=None)
    refuse(engine, untimed)
    (row,) = map(json.loads, run("quarantine", "list", "--json").output.splitlines())
    assert run("quarantine", "replay", str(row["id"])).output.strip() == f"{row['id']}: 1 applied"
    assert run("quarantine", "list", "--json").output == ""
    assert run("quarantine", "replay", str(row["id"])).output.strip() == f"{row['id']}: 1 duplicate"
    assert stored(engine)[BTC]["size"] == 1
    assert stored(engine)[BTC]["opened_at"] == datetime(2025, 1, 15, 9, tzinfo=UTC)


def test_a_message_that_is_refused_again_stays(engine: Engine, run: Any) -> None:
    refuse(engine, execution("BTCUSDT", "Buy", "1", "NaN"))
    refuse(engine, execution("ETHUSDT", "Buy", "1", "100"))
    result = run("quarantine", "replay", "--all")
    assert result.exit_code == 1
    assert "not a finite number" in result.output
    (row,) = map(json.loads, run("quarantine", "list", "--json").output.splitlines())
    assert row["replayed_at"] is None
    assert [key.asset for key in stored(engine)] == ["ETHUSDT"]


def test_a_message_the_database_refuses_does_not_end_a_replay(engine: Engine, run: Any) -> None:
    for number in range(2):
        refuse(engine, execution("BTCUSDT", "Buy", "9" * 20, "1", number=number))
    refuse(engine, execution("ETHUSDT", "Buy", "1", "100"))
    result = run("quarantine", "replay", "--all")
    assert result.exit_code == 1
    assert "numeric field overflow" in result.output
    assert {key.asset for key in stored(engine)} == {"BTCUSDT", "ETHUSDT"}


def test_rebuild_finds_and_repairs_a_position_that_was_tampered_with(engine: Engine, run: Any) -> None:
    apply(engine, [execution("BTCUSDT", "Buy", "1", "100"), execution("ETHUSDT", "Buy", "1", "100")])
    clean = run("rebuild")
    assert (clean.exit_code, clean.stdout) == (0, "")
    assert "2 positions folded anew, 0 differ" in clean.stderr
    with transaction(engine) as connection:
        connection.execute(text("UPDATE positions SET size = 7 WHERE asset = 'BTCUSDT'"))
    found = run("rebuild", "--asset", "btcusdt", "--json")
    assert found.exit_code == 1
    row = json.loads(found.stdout)
    assert (row["figure"], row["stored"], row["folded"]) == ("size", "7", "1")
    assert run("rebuild", "--repair").exit_code == 1
    assert stored(engine)[BTC]["size"] == 1
    assert run("rebuild").exit_code == 0
    assert run("rebuild", "--asset", "NOSUCH").exit_code == 1


def test_a_key_is_created_once_listed_and_revoked(engine: Engine, run: Any) -> None:
    created = run("keys", "create", "risk", "--role", "operate", "--tier", "200", "--expires", "2999-01-31")
    assert created.exit_code == 0
    key = created.stdout.strip()
    assert re.fullmatch(r"pk_[A-Za-z0-9_-]{43}", key)
    other = json.loads(run("keys", "create", "ui", "--json").stdout)["key"]
    assert other != key
    with transaction(engine) as connection:
        risk, ui = api_keys.valid(connection)
    assert risk.digest == hashlib.sha256(key.encode()).hexdigest()
    listed = run("keys", "list")
    assert [line.split()[:3] for line in listed.output.splitlines()] == [
        ["risk", "operate", "200"],
        ["ui", "read", "default"],
    ]
    assert run("keys", "revoke", "ui").exit_code == 0
    as_json = run("keys", "list", "--json")
    first, second = map(json.loads, as_json.output.splitlines())
    created_at = first.pop("created")
    assert created_at.endswith("Z")
    assert first == {
        "name": "risk",
        "role": "operate",
        "tier": 200,
        "expires": "2999-01-31T00:00:00Z",
        "revoked": None,
    }
    assert second["revoked"] is not None
    for text_ in (listed.output, as_json.output):
        for secret in (key, other, risk.digest, ui.digest):
            assert secret not in text_
    missing = run("keys", "revoke", "nobody")
    assert missing.exit_code == 1
    assert isinstance(missing.exception, NotFound)


def test_a_key_for_the_settings_is_printed_and_not_stored(engine: Engine, run: Any) -> None:
    printed = run("keys", "create", "ui", "--tier", "5", "--expires", "90d", "--print-only")
    assert printed.exit_code == 0
    key, entry = printed.stdout.splitlines()
    environ = {"POSITION_MANAGER_API_KEYS": f"[{entry}]"}
    [found] = load(environ).keys
    assert (found.name, found.role, found.tier) == ("ui", "read", 5)
    assert found.hash == hashlib.sha256(key.encode()).hexdigest()
    assert found.expires is not None
    assert 89 <= (found.expires - datetime.now(UTC)).days <= 90
    with transaction(engine) as connection:
        assert api_keys.everything(connection) == []


@pytest.mark.parametrize(
    "arguments",
    [
        ["two words"],
        ["default"],
        ["k", "--expires", "2020-01-01"],
        ["k", "--expires", "0d"],
        ["k", "--expires", "soon"],
        ["k", "--tier", "0"],
        ["k", "--role", "admin"],
    ],
)
def test_a_key_that_could_not_be_used_is_not_created(engine: Engine, run: Any, arguments: list[str]) -> None:
    refused = run("keys", "create", *arguments)
    assert refused.exit_code == 2
    assert "pk_" not in refused.output
    with transaction(engine) as connection:
        assert api_keys.everything(connection) == []


def test_a_key_of_a_name_that_is_taken_is_refused_in_one_line(run: Any) -> None:
    run("keys", "create", "ui")
    refused = run("keys", "create", "ui")
    assert refused.exit_code == 1
    assert refused.output == "Error: there is, or was, a key of the name ui\n"


def test_snapshots_are_taken_of_one_moment_and_published(engine: Engine, run: Any) -> None:
    apply(engine, [execution("BTCUSDT", "Buy", "1", "100"), execution("ETHUSDT", "Sell", "2", "10")])
    taken = run("snapshot", "--json")
    assert taken.exit_code == 0
    rows = [json.loads(line) for line in taken.stdout.splitlines()]
    assert {row["asset"]: row["snapshot_data"]["size"] for row in rows} == {"BTCUSDT": "1", "ETHUSDT": "-2"}
    assert len({row["created_at"] for row in rows}) == 1
    with engine.connect() as connection:
        told = connection.execute(
            text("SELECT count(*) FROM outbox WHERE event_type = 'position_snapshot_created'")
        ).scalar()
    assert told == 2
    assert "1 snapshots taken" in run("snapshot", "--asset", "ethusdt").stderr
    assert isinstance(run("snapshot", "--asset", "nothing").exception, NotFound)


def test_validate_tells_what_differs_and_corrects_only_when_told_to(engine: Engine, run: Any) -> None:
    apply(engine, [execution("BTCUSDT", "Buy", "1", "100"), execution("ETHUSDT", "Buy", "1", "100")])
    assert run("validate").exit_code == 0
    with transaction(engine) as connection:
        connection.execute(text("UPDATE positions SET size = 7 WHERE asset = 'BTCUSDT'"))
    for _ in range(2):
        told = run("validate", "--json")
        assert told.exit_code == 1
        (row,) = map(json.loads, told.stdout.splitlines())
        assert (row["asset"], row["kind"], row["ours"], row["theirs"]) == ("BTCUSDT", "stored_size", "1", "7")
    assert stored(engine)[BTC]["size"] == 7
    fixed = run("validate", "--fix", "--asset", "btcusdt")
    assert fixed.exit_code == 1
    assert "BTCUSDT one-way net stored_size: ours 1, theirs 7: unknown, refolded" in fixed.stdout
    assert stored(engine)[BTC]["size"] == 1
    assert run("validate", "--fix").exit_code == 0
    assert run("validate", "--asset", "NONE").exit_code == 1
    with validations.alone(engine):
        assert "another validation is at work" in run("validate").output


def test_what_became_of_each_replayed_message_is_told_to_programs(engine: Engine, run: Any) -> None:
    refuse(engine, execution("BTCUSDT", "Buy", "1", "100"))
    refuse(engine, execution("BTCUSDT", "Buy", "1", "NaN"))
    done = run("quarantine", "replay", "--all", "--json")
    assert done.exit_code == 1
    first, second = sorted(map(json.loads, done.stdout.splitlines()), key=lambda row: int(row["id"]))
    assert first.keys() == {"id", "applied"}
    assert first["applied"] == 1
    assert second.keys() == {"id", "refused"}
