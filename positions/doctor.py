"""What is wrong, and how to mend it: every connection, setting, queue, migration and clock, looked at once.

Nothing is changed: a queue of ours that exists is declared as it is meant to be, which the broker refuses
where it is another; in Redis one key is written that ends after a second.
"""

from __future__ import annotations

import shutil
import socket
import tempfile
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

import amqp
import redis
from kombu.utils.url import parse_url
from redis.backoff import NoBackoff
from redis.retry import Retry
from sqlalchemy import Connection, make_url

from beat_schedule import JOBS_QUEUE, TASK_QUEUE
from positions import settings as settings_
from positions.errors import Unavailable
from positions.handlers.relay_outbox import LOCK
from positions.messages.published import EVENT_TYPES, EXCHANGE, queue_of
from positions.queries.health import activity, require_migrated
from positions.settings import PREFIX, Settings, SettingsError
from positions.storage import api_keys, broker
from positions.storage.database import connect, transaction
from positions.storage.migrate import ROOT
from positions.storage.tables import ledger, metadata, position_snapshots

Status = Literal["ok", "warning", "problem"]

OLDEST_POSTGRES = 140_000
SKEW_WARNING_S, SKEW_PROBLEM_S = 2.0, 60.0
"""Some times are of the hosts of workers, some of the database; an event ten minutes ahead is refused."""
STALLED_S = 60.0
SHORT_KEY_CHARS = 16
EXPIRES_SOON = timedelta(days=14)
FREE_BYTES = 500_000_000
CONNECT_S = 3.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """One thing that was looked at."""

    what: str
    status: Status
    said: str
    mend: str | None = None
    """What to do about it; None where all is well."""


def examine(
    environ: Mapping[str, str], *, clock: Callable[[], datetime] = lambda: datetime.now(UTC)
) -> Iterator[Finding]:
    """Look at everything that the settings in ``environ`` name, and yield what was found as it is found."""
    try:
        own = settings_.load(environ)
        keys = own.keys
        own.limits  # noqa: B018 - raises where they cannot be read
    except SettingsError as error:
        yield Finding(what="settings", status="problem", said=str(error), mend="correct what it names")
        return
    yield from _settings(environ, clock())
    stored = yield from _database(own, clock)
    yield from _keys(own, keys, stored, clock())
    yield from _broker(own)
    yield from _redis(own)
    yield from _disks(own)
    yield from _others(own)


def _settings(environ: Mapping[str, str], now: datetime) -> Iterator[Finding]:
    misspelt = settings_.unknown(environ)
    for name, nearest in misspelt.items():
        yield Finding(
            what="settings",
            status="warning",
            said=f"{name} is read by nothing",
            mend=f"is {nearest} meant?" if nearest else "remove it",
        )
    if not misspelt:
        yield Finding(what="settings", status="ok", said=f"all can be used, at {now:%Y-%m-%d %H:%M:%S} UTC")


def _database(
    own: Settings, clock: Callable[[], datetime]
) -> Generator[Finding, None, list[api_keys.StoredKey] | None]:
    """Yield what is found; return the keys of the API in the database, None where nobody can tell."""
    url = make_url(own.database)
    place = f"{url.host or 'the local socket'}:{url.port or 5432}/{url.database} as {url.username}"
    engine = connect(own.database, pool_size=1, application=f"{own.service_name} doctor")
    try:
        with transaction(engine) as connection:
            yield from _server(connection, place, clock)
            try:
                require_migrated(connection)
            except Unavailable:
                yield _unmigrated()
                return None
            yield Finding(what="migrations", status="ok", said="the schema is of this release or a newer one")
            yield from _rights(connection)
            yield from _flow(connection, clock())
            return api_keys.valid(connection)
    except Unavailable as error:
        if "UndefinedTable" in str(error):
            yield _unmigrated()
        else:
            yield Finding(
                what="database", status="problem", said=f"{place}: {error}", mend=_mend_database(str(error))
            )
        return None
    finally:
        engine.dispose()


def _unmigrated() -> Finding:
    return Finding(
        what="migrations",
        status="problem",
        said="the schema is older than this release, or not there",
        mend="run `positions migrate`",
    )


def _mend_database(reason: str) -> str:
    for part, mend in (
        ("password authentication failed", "correct POSTGRES_USER and POSTGRES_PASSWORD"),
        ("no password supplied", "set POSTGRES_PASSWORD"),
        ("does not exist", "create it, or correct POSTGRES_DB and POSTGRES_USER"),
        ("could not translate host name", "correct POSTGRES_HOST"),
        ("Connection refused", "start PostgreSQL, or correct POSTGRES_HOST and POSTGRES_PORT"),
        ("pg_hba.conf", "let this host in, in the server's pg_hba.conf"),
        ("too many clients", "raise max_connections, or run fewer processes and threads"),
        ("InsufficientPrivilege", f"run `positions migrate` as the owner with {PREFIX}DATABASE_ROLE"),
    ):
        if part in reason:
            return mend
    return "see the server's log; POSTGRES_* say where it is"


def _server(connection: Connection, place: str, clock: Callable[[], datetime]) -> Iterator[Finding]:
    before = clock()
    row = connection.exec_driver_sql(
        "SELECT clock_timestamp() AS at, current_setting('server_version_num')::int AS version,"
        " current_setting('server_version') AS name, pg_is_in_recovery() AS replica,"
        " current_setting('synchronous_commit') AS commits, current_setting('fsync') AS fsync,"
        " current_setting('max_connections')::int AS room, (SELECT rolsuper FROM pg_roles"
        " WHERE rolname = current_user) AS superuser, pg_database_size(current_database()) AS bytes,"
        " (SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'client backend') AS used"
    ).one()
    skew_s = (row.at - (before + (clock() - before) / 2)).total_seconds()
    yield Finding(
        what="database", status="ok", said=f"PostgreSQL {row.name} at {place}, {row.bytes / 1e6:.0f} MB"
    )
    if row.version < OLDEST_POSTGRES:
        yield Finding(
            what="database",
            status="problem",
            said=f"PostgreSQL {row.name} is too old",
            mend="use 14 or newer",
        )
    if row.replica:
        yield Finding(
            what="database",
            status="problem",
            said="this is a replica: nothing can be written",
            mend="correct POSTGRES_HOST: it must be the primary",
        )
    if row.commits == "off" or row.fsync == "off":
        yield Finding(
            what="database",
            status="problem",
            said=f"synchronous_commit is {row.commits}, fsync is {row.fsync}: commits may be lost",
            mend="turn both on: messages are acknowledged after the commit",
        )
    if row.used > row.room * 0.9:
        yield Finding(
            what="database",
            status="warning",
            said=f"{row.used} of {row.room} connections are in use",
            mend="raise max_connections, or run fewer processes and threads",
        )
    if row.superuser:
        yield Finding(
            what="database role",
            status="warning",
            said="the service connects as a superuser",
            mend=f"make roles with deploy/postgres/roles.sql, and set {PREFIX}DATABASE_ROLE for migrations",
        )
    status: Status = (
        "problem" if abs(skew_s) > SKEW_PROBLEM_S else "warning" if abs(skew_s) > SKEW_WARNING_S else "ok"
    )
    yield Finding(
        what="clock",
        status=status,
        said=f"the database's is {abs(skew_s):.1f} s {'ahead of' if skew_s > 0 else 'behind'} this host's",
        mend=None if status == "ok" else "let both hosts follow NTP",
    )


def _rights(connection: Connection) -> Iterator[Finding]:
    needed = {
        table.name: ("SELECT", "INSERT") if table is ledger else ("SELECT", "INSERT", "UPDATE", "DELETE")
        for table in metadata.sorted_tables
    }
    lacking = [
        f"{right} on {table}"
        for table, rights in needed.items()
        for right in rights
        if not connection.exec_driver_sql(
            "SELECT has_table_privilege(%(table)s, %(right)s)", {"table": table, "right": right}
        ).scalar()
    ]
    owns = connection.exec_driver_sql(
        "SELECT pg_has_role(relowner, 'USAGE') FROM pg_class WHERE oid = %(table)s::regclass",
        {"table": position_snapshots.name},
    ).scalar()
    if not owns:
        lacking.append(f"the ownership of {position_snapshots.name}, to make partitions")
    if lacking:
        yield Finding(
            what="database role",
            status="problem",
            said=f"it lacks {', '.join(lacking[:5])}{' and more' if len(lacking) > 5 else ''}",
            mend=f"run `positions migrate` as the owner with {PREFIX}DATABASE_ROLE",
        )


def _flow(connection: Connection, now: datetime) -> Iterator[Finding]:
    stored = activity(connection)
    relays = connection.exec_driver_sql(
        "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND granted AND classid = 0"
        " AND objid = %(lock)s"
        " AND database = (SELECT oid FROM pg_database WHERE datname = current_database())",
        {"lock": LOCK},
    ).scalar()
    oldest_s = (now - stored.outbox_oldest_at).total_seconds() if stored.outbox_oldest_at else 0.0
    if oldest_s > STALLED_S:
        yield Finding(
            what="outbox",
            status="problem",
            said=f"{stored.outbox} messages wait to be published, the oldest for {oldest_s:.0f} s",
            mend="see the relay's log: a queue is full, or the broker away"
            if relays
            else "run a relay: `positions relay`",
        )
    elif not relays:
        yield Finding(
            what="relay", status="warning", said="none works", mend="run a relay: `positions relay`"
        )
    else:
        yield Finding(what="relay", status="ok", said=f"one works; {stored.outbox} messages to publish")
    if stored.quarantine:
        yield Finding(
            what="quarantine",
            status="warning",
            said=f"{stored.quarantine} messages could not be applied",
            mend="`positions quarantine list` says why; `replay` applies them after a fix",
        )


def _keys(
    own: Settings,
    keys: tuple[settings_.KeyEntry, ...],
    stored: list[api_keys.StoredKey] | None,
    now: datetime,
) -> Iterator[Finding]:
    key = own.api_key.get_secret_value() if own.api_key else None
    if key is not None and len(key) < SHORT_KEY_CHARS:
        yield Finding(
            what="API keys",
            status="warning",
            said=f"{PREFIX}API_KEY has fewer than {SHORT_KEY_CHARS} characters: it can be guessed",
            mend="use a long random one, or `positions keys create`",
        )
    if own.api_key is None and own.api_keys is None:
        yield Finding(
            what="API keys",
            status="warning",
            said="no setting names any: web would not start with these settings",
            mend=f"set {PREFIX}API_KEY, or {PREFIX}API_KEYS=[] where all are in the database",
        )
    ends = {each.name: each.expires for each in keys} | {each.name: each.expires_at for each in stored or ()}
    for name, at in ends.items():
        if at and at < now + EXPIRES_SOON:
            yield Finding(
                what="API keys",
                status="warning",
                said=f"{name} {'expired' if at < now else 'expires'} on {at:%Y-%m-%d}",
                mend="create another, hand it out, revoke this one",
            )
    usable = [name for name, at in ends.items() if not at or at > now]
    if key is None and not usable and stored is not None:
        yield Finding(
            what="API keys", status="problem", said="no key may be used", mend="`positions keys create NAME`"
        )
    elif key is not None or usable:
        yield Finding(what="API keys", status="ok", said=f"{len(usable) + (key is not None)} may be used")


def _broker(own: Settings) -> Iterator[Finding]:
    if broker.is_redis(own.broker):
        yield from _redis_at(own.broker, "broker", "RABBITMQ_*", limits=False)
        yield Finding(
            what="broker",
            status="warning",
            said="Redis as a broker promises less than RabbitMQ",
            mend="name a RabbitMQ in RABBITMQ_HOST; fine beside the embedded default",
        )
        return
    parts = parse_url(own.broker)
    place = f"{parts['hostname']}:{parts['port'] or 5672}, vhost {parts['virtual_host'] or '/'}"
    place += f", as {parts['userid']}"
    try:
        connection = broker.connect(own.broker).transport.establish_connection()
    except (OSError, amqp.AMQPError) as error:
        yield Finding(
            what="broker", status="problem", said=f"{place}: {_line(error)}", mend=_mend_broker(error)
        )
        return
    with closing(connection):
        version = connection.server_properties.get("version", "")
        yield Finding(what="broker", status="ok", said=f"RabbitMQ {version} at {place}")
        yield from _queues(own, connection)


def _mend_broker(error: Exception) -> str:
    if isinstance(error, amqp.AccessRefused):
        return "correct RABBITMQ_USER and RABBITMQ_PASSWORD"
    if isinstance(error, amqp.NotAllowed | amqp.NotFound | amqp.ConnectionForced):
        return "correct RABBITMQ_VHOST, or let the user into it"
    return "start RabbitMQ, or correct RABBITMQ_HOST and RABBITMQ_PORT"


def _queues(own: Settings, connection: Any) -> Iterator[Finding]:
    def declare(name: str, *, passive: bool) -> Any:
        # A channel each: an error closes it.
        with closing(connection.channel()) as channel:
            return channel.queue_declare(name, passive=passive, durable=True, auto_delete=False)

    def state(name: str) -> tuple[int, int] | None:
        try:
            found = declare(name, passive=True)
        except amqp.NotFound:
            return None
        return found.message_count, found.consumer_count

    _, workers = state(broker.INTAKE_QUEUE) or (0, 0)
    waiting = 0
    for name in own.queues:
        try:
            found = state(name)
        except amqp.AMQPError as error:
            yield Finding(
                what=f"queue {name}",
                status="problem",
                said=_line(error),
                mend="its owner must let others in: not exclusive, with rights for our user",
            )
            continue
        if found is None:
            yield Finding(
                what=f"queue {name}",
                status="warning",
                said="is not there; a worker declares it, plain and durable",
                mend="start its publisher, or correct the name in " + _queue_setting(own, name),
            )
            continue
        messages, consumers = found
        waiting += messages
        if consumers > workers:
            yield Finding(
                what=f"queue {name}",
                status="problem",
                said=f"{consumers} consume it, {workers} of them ours: the others take messages we never see",
                mend="stop them, or give them a queue of their own (`rabbitmqctl list_consumers`)",
            )
        else:
            said = f"{messages} messages wait, {consumers} consumers"
            yield Finding(what=f"queue {name}", status="ok", said=said)
    if not workers:
        yield Finding(
            what="workers",
            status="problem" if waiting else "warning",
            said=f"none takes events in; {waiting} messages wait",
            mend="run one: `celery -A celery_app worker`",
        )
    for name, what in ((TASK_QUEUE, "workers"), (JOBS_QUEUE, "jobs")):
        found = state(name)
        if found is None or not found[1]:
            yield Finding(
                what=f"queue {name}",
                status="warning",
                said="nobody consumes it" if found else "is not there yet",
                mend=f"run a worker: `celery -A celery_app worker -Q {name}`",
            )
            continue
        try:
            declare(name, passive=False)
        except amqp.AMQPError as error:
            yield Finding(
                what=f"queue {name}",
                status="problem",
                said=_line(error),
                mend="delete it while nothing is in it: a worker declares it anew; limits belong in a policy",
            )
        else:
            yield Finding(what=f"queue {name}", status="ok", said=f"{found[1]} consumers ({what})")
    yield from _published(connection, state)


def _published(connection: Any, state: Callable[[str], tuple[int, int] | None]) -> Iterator[Finding]:
    try:
        with closing(connection.channel()) as channel:
            channel.exchange_declare(EXCHANGE, "topic", passive=True)
    except amqp.NotFound:
        yield Finding(
            what=f"exchange {EXCHANGE}",
            status="warning",
            said="is not there yet",
            mend="the relay declares it: `positions relay`",
        )
        return
    missing = [queue_of(name) for name in EVENT_TYPES if state(queue_of(name)) is None]
    yield Finding(
        what=f"exchange {EXCHANGE}",
        status="warning" if missing else "ok",
        said=f"{', '.join(missing)} are not there" if missing else "is there, with its queues",
        mend="restart the relay, which declares them" if missing else None,
    )


def _queue_setting(own: Settings, name: str) -> str:
    return PREFIX + ("POSITION_QUEUE" if name == own.position_queue else "ORDER_QUEUES")


def _redis(own: Settings) -> Iterator[Finding]:
    yield from _redis_at(own.redis, "Redis", "REDIS_*", limits=True)


def _redis_at(url: str, what: str, variables: str, *, limits: bool) -> Iterator[Finding]:
    parts = urlsplit(url)
    place = f"{parts.hostname}:{parts.port or 6379}" if parts.hostname else parts.path
    client = redis.Redis.from_url(
        url, socket_timeout=CONNECT_S, socket_connect_timeout=CONNECT_S, retry=Retry(NoBackoff(), 0)
    )
    with closing(client):
        try:
            server: Any = client.info()
            client.set("positions:doctor", "1", ex=1)
        except redis.RedisError as error:
            full = isinstance(error, redis.exceptions.OutOfMemoryError)
            refused = isinstance(error, redis.AuthenticationError)
            yield Finding(
                what=what,
                status="problem",
                said=f"{place}: {_line(error)}",
                mend="raise maxmemory, or find what fills it"
                if full
                else f"correct the password in {variables}"
                if refused or "NOAUTH" in str(error)
                else f"start it, or correct {variables}",
            )
            return
    name = "Valkey" if "valkey_version" in server else "Redis"
    version = server.get("valkey_version") or server["redis_version"]
    yield Finding(what=what, status="ok", said=f"{name} {version} at {place}")
    policy, room = server.get("maxmemory_policy", "noeviction"), int(server.get("maxmemory", 0))
    if limits and policy != "noeviction":
        # Without a maximum nothing is evicted, yet.
        yield Finding(
            what=f"{what} eviction",
            status="problem" if room else "warning",
            said=f"maxmemory-policy is {policy}: a limit may be forgotten, and a client let in beyond it",
            mend="set maxmemory-policy noeviction; the caches need none, they live for seconds",
        )
    if room and int(server["used_memory"]) > room * 0.9:
        yield Finding(
            what=f"{what} memory",
            status="warning",
            said=f"{int(server['used_memory']) / 1e6:.0f} of {room / 1e6:.0f} MB are in use",
            mend="raise maxmemory, or find what fills it",
        )


def _disks(own: Settings) -> Iterator[Finding]:
    wanted = [Path(tempfile.gettempdir()), Path("/dev/shm"), ROOT]  # noqa: S108 - looked at
    if own.data_dir:
        wanted.append(Path(own.data_dir))
    seen = {path.stat().st_dev: path for path in reversed(wanted) if path.is_dir()}
    for path in seen.values():
        free, size = shutil.disk_usage(path).free, shutil.disk_usage(path).total
        short = free < min(FREE_BYTES, size / 4)
        yield Finding(
            what=f"disk {path}",
            status="warning" if short else "ok",
            said=f"{free / 1e9:.1f} of {size / 1e9:.1f} GB are free",
            mend="make room: logs, metrics and beat's schedule are written there" if short else None,
        )


def _others(own: Settings) -> Iterator[Finding]:
    others = {"exchange's prices": (own.price_api_url, PREFIX + "PRICE_API_URL")}
    if own.ws_gateway_url:
        others["gateway"] = (own.ws_gateway_url, "WS_GATEWAY_URL")
    for what, (url, variable) in others.items():
        parts = urlsplit(url)
        port = parts.port or (443 if parts.scheme == "https" else 80)
        try:
            socket.create_connection((parts.hostname or "", port), timeout=CONNECT_S).close()
        except OSError as error:
            yield Finding(
                what=what,
                status="warning",
                said=f"{parts.hostname}:{port}: {_line(error)}",
                mend=f"let this host reach it, or correct {variable}",
            )
        else:
            yield Finding(what=what, status="ok", said=f"{parts.hostname}:{port} answers")


def _line(error: Exception) -> str:
    """Return an error in one line."""
    text = (str(error) or type(error).__name__).strip().splitlines()[0]
    return text[:300]
