"""Keys and limits as settings say them, and how a process keeps the keys of the database."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from positions.errors import Unavailable
from positions.settings import KeyEntry, SettingsError, load
from positions.web import auth
from positions.web.auth import Key, KeyRing, keys_of
from positions.web.limits import network
from tests.services import wait_until

HASH = hashlib.sha256(b"the-key").hexdigest()


def _entries(text: str) -> tuple[KeyEntry, ...]:
    return load({"POSITION_MANAGER_API_KEYS": text}).keys


# --- settings


def test_keys_are_read_inline_and_from_a_file(tmp_path: Path) -> None:
    full = {"name": "risk", "hash": HASH.upper(), "role": "operate", "tier": 200, "expires": "2027-01-31"}
    text = json.dumps([full, {"name": "ui", "hash": "0" * 64}])
    file = tmp_path / "keys.json"
    file.write_text(text)
    for given in (text, str(file)):
        risk, ui = _entries(given)
        assert (risk.name, risk.role, risk.tier) == ("risk", "operate", 200)
        assert risk.expires == datetime(2027, 1, 31, tzinfo=UTC)
        assert (ui.role, ui.tier, ui.expires) == ("read", None, None)
    assert _entries("[]") == ()
    assert load({}).keys == ()


@pytest.mark.parametrize(
    ("change", "entry", "what"),
    [
        ({"name": "two words"}, 2, "name"),
        ({"name": None}, 2, "name"),
        ({"hash": "abc"}, 2, "hash"),
        ({"role": "admin"}, 2, "role"),
        ({"tier": 0}, 2, "tier"),
        ({"tier": "many"}, 2, "tier"),
        ({"expires": "tomorrow"}, 2, "expires"),
        ({"expires": 1}, 2, "expires"),
        ({"key": "the-key"}, 2, "key"),
        ({"name": "one"}, 2, "name"),
        ({"hash": "1" * 64}, 2, "hash"),
        ({"hash": hashlib.sha256(b"").hexdigest().upper()}, 2, "hash: is of an empty key"),
        ({"expires": "2027-01-31T00:00:00Z\0"}, 2, "expires"),
    ],
)
def test_a_wrong_key_is_named_by_its_place_and_never_shown(
    change: dict[str, object], entry: int, what: str
) -> None:
    entries = [{"name": "one", "hash": "1" * 64}, {"name": "other", "hash": HASH, **change}]
    with pytest.raises(
        SettingsError, match=f"^POSITION_MANAGER_API_KEYS: entry {entry}: {what}[:;] "
    ) as raised:
        _entries(json.dumps(entries))
    for secret in (HASH, "the-key", "1" * 64):
        assert secret not in str(raised.value)


@pytest.mark.parametrize("text", ["[", '[{"name": "a"', "/nowhere/at/all", '{"hash": "the-key"}', "[1]"])
def test_what_is_no_list_of_keys_is_named_by_its_variable_and_never_shown(text: str) -> None:
    with pytest.raises(SettingsError, match=r"^POSITION_MANAGER_API_KEYS: ") as raised:
        _entries(text)
    assert "the-key" not in str(raised.value)


def test_the_name_of_the_one_key_is_taken_while_there_is_one() -> None:
    keys = json.dumps([{"name": "default", "hash": HASH}])
    assert load({"POSITION_MANAGER_API_KEYS": keys}).keys
    with pytest.raises(SettingsError, match="entry 1: name"):
        load({"POSITION_MANAGER_API_KEYS": keys, "POSITION_MANAGER_API_KEY": "k"}).keys  # noqa: B018


def test_limit_of_a_key_is_its_override_or_its_tier_or_the_default() -> None:
    names = ("by-name", "by-key", "tier", "none")
    keys = [{"name": name, "hash": hashlib.sha256(f"key:of,{name}".encode()).hexdigest()} for name in names]
    keys[1] |= {"hash": HASH}
    for entry in keys[:3]:
        entry |= {"tier": 50}  # type: ignore[dict-item]
    environ = {
        "POSITION_MANAGER_API_KEY": "a:b",
        "POSITION_MANAGER_API_KEYS": json.dumps(keys),
        "POSITION_MANAGER_RATE_LIMIT_OVERRIDES": " by-name:7, the-key : 8,nobody:1, a:b:9,",
        "POSITION_MANAGER_RATE_LIMIT_DEFAULT": "33",
    }
    found = {key.name: key.requests_per_minute for key in keys_of(load(environ)).values()}
    assert found == {"by-name": 7, "by-key": 8, "tier": 50, "none": 33, "default": 9}


@pytest.mark.parametrize("entry", ["secret", "secret:", "secret:0", "secret:x", ":5", "secret:1000001"])
def test_a_wrong_override_is_named_by_its_place_and_never_shown(entry: str) -> None:
    environ = {"POSITION_MANAGER_API_KEY": "k", "POSITION_MANAGER_RATE_LIMIT_OVERRIDES": f"ok:1,{entry}"}
    with pytest.raises(SettingsError, match=r"^POSITION_MANAGER_RATE_LIMIT_OVERRIDES: entry 2: ") as raised:
        keys_of(load(environ))
    assert "secret" not in str(raised.value)


@pytest.mark.parametrize(
    ("address", "counted_as"),
    [
        ("192.0.2.7", "192.0.2.7"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("2001:db8:1:2:ffff::", "2001:db8:1:2::/64"),
        ("::ffff:192.0.2.7", "192.0.2.7"),
        ("fe80::1%eth0", "fe80::/64"),
        ("no address", "unknown"),
        (None, "unknown"),
    ],
)
def test_what_one_host_can_call_itself_is_one_address(address: str | None, counted_as: str) -> None:
    assert network(address) == counted_as


def test_a_url_that_is_no_redis_is_named() -> None:
    with pytest.raises(SettingsError, match=r"^POSITION_MANAGER_REDIS_URL: ") as raised:
        load({"POSITION_MANAGER_REDIS_URL": "http://user:secret@127.0.0.1"})
    assert "secret" not in str(raised.value)


# --- the keys of a process


class Database:
    """Keys that are read when the test lets them be."""

    def __init__(self) -> None:
        self.keys: dict[bytes, Key] = {}
        self.reads = 0
        self.away = False
        self.hangs = threading.Event()
        self.hangs.set()

    def add(self, key: str) -> None:
        self.keys[hashlib.sha256(key.encode()).digest()] = _key(key)

    def read(self) -> dict[bytes, Key]:
        self.reads += 1
        assert self.hangs.wait(30)
        if self.away:
            raise Unavailable("away")
        return dict(self.keys)


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def _key(name: str) -> Key:
    return Key(name=name, role="read", requests_per_minute=1)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def database() -> Iterator[Database]:
    made = Database()
    with capture_logs():
        yield made
        made.hangs.set()


@pytest.fixture
def find(database: Database, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], str | None]:
    """Names of keys, by the keys; a read that is not held up is waited for."""
    monkeypatch.setattr(auth, "WAIT_S", 30.0)
    ring = KeyRing({hashlib.sha256(b"own").digest(): _key("own")}, database.read, clock=clock)

    def found(given: str) -> str | None:
        key = ring.find(given.encode())
        return key.name if key else None

    return found


Find = Callable[[str], str | None]


def at_once(ask: Callable[[], list[str | None]]) -> list[str | None]:
    """Return what ``ask`` does, which must not wait for the half minute that a read may take here."""
    found: list[str | None] = []
    thread = threading.Thread(target=lambda: found.extend(ask()))
    thread.start()
    thread.join(20)
    assert not thread.is_alive()
    return found


def test_keys_of_the_settings_need_no_database(find: Find, database: Database) -> None:
    assert find("own") == "own"
    assert database.reads == 0


def test_a_known_key_costs_no_reading(find: Find, database: Database, clock: Clock) -> None:
    database.add("a")
    assert [find("a") for _ in range(100)] == ["a"] * 100
    clock.now += auth.READ_AGAIN_S
    assert find("a") == "a"
    assert database.reads == 1


def test_a_new_key_is_taken_at_once(find: Find, database: Database, clock: Clock) -> None:
    assert find("a") is None
    database.add("a")
    clock.now += auth.PAUSE_S
    assert find("a") == "a"


def test_unknown_keys_do_not_ask_the_database_each(find: Find, database: Database, clock: Clock) -> None:
    for _ in range(100):
        assert find("x") is None
    assert database.reads == 1
    clock.now += auth.PAUSE_S
    for _ in range(100):
        assert find("x") is None
    assert database.reads == 2


def test_a_revoked_key_is_not_taken_after_some_seconds(find: Find, database: Database, clock: Clock) -> None:
    database.add("a")
    assert find("a") == "a"
    database.keys.clear()
    clock.now += auth.TRUSTED_S + 0.001
    assert find("a") is None


def test_one_thread_reads_anew_while_others_go_on(find: Find, database: Database, clock: Clock) -> None:
    database.add("a")
    assert find("a") == "a"
    database.hangs.clear()
    clock.now += auth.READ_AGAIN_S + 0.001
    assert at_once(lambda: [find("a") for _ in range(5)]) == ["a"] * 5
    assert wait_until(lambda: database.reads == 2, limit_s=5)


def test_with_the_database_away_the_last_keys_are_used(find: Find, database: Database, clock: Clock) -> None:
    database.add("a")
    assert find("a") == "a"
    database.away = True
    for _ in range(3):
        clock.now += 3600
        assert find("a") == "a"
        assert find("b") is None
    assert database.reads == 4
    database.away = False
    database.add("b")
    clock.now += 3600
    assert find("b") == "b"


def test_an_unknown_key_is_not_refused_before_the_keys_were_read(
    find: Find, database: Database, clock: Clock
) -> None:
    database.add("a")
    database.away = True
    for _ in range(3):
        with pytest.raises(Unavailable):
            find("a")
    database.away = False
    clock.now += auth.PAUSE_S
    assert find("a") == "a"


def test_a_database_that_hangs_holds_up_only_who_came_first(
    find: Find, database: Database, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    database.add("a")
    assert find("a") == "a"
    database.hangs.clear()
    monkeypatch.setattr(auth, "WAIT_S", 0.01)
    clock.now += 3600
    assert find("a") == "a"
    monkeypatch.setattr(auth, "WAIT_S", 30.0)
    clock.now += 30.0
    assert at_once(lambda: [find("a") for _ in range(5)]) == ["a"] * 5
    assert wait_until(lambda: database.reads == 2, limit_s=5)
