"""Every setting of the service: environment variables, read and validated once at start.

Only the roots (``celery_app``, the web factory, the command line) call :func:`load`; everything
below them is handed the values it needs.
"""

from __future__ import annotations

import difflib
import hashlib
import os
import re
from collections.abc import Mapping
from datetime import UTC, datetime
from decimal import Decimal
from functools import cache, cached_property
from pathlib import Path
from typing import Annotated, Any, Literal, get_args
from urllib.parse import quote, urlsplit

from pydantic import (
    AliasChoices,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SecretStr,
    TypeAdapter,
    ValidationError,
    field_validator,
)

PREFIX = "POSITION_MANAGER_"


class SettingsError(ValueError):
    """A setting is missing or wrong; the message names the variable."""


BROKER_SCHEMES = ("amqp", "amqps", "redis", "rediss", "valkey")
REDIS_SCHEMES = ("redis", "rediss", "unix")
PRICE_HOSTS = frozenset(
    {
        "api.bybit.com",
        "api.bytick.com",
        "api.bybit.nl",
        "api.bybit-tr.com",
        "api.bybit.kz",
        "api.bybitgeorgia.ge",
        "api.bybit.ae",
        "api.bybit.eu",
        "api.bybit.id",
        "api-demo.bybit.com",
        "api-testnet.bybit.com",
    }
)
"""The exchange's own (its integration guide): prices and keys are exchanged with no other."""
LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})
REQUESTS_PER_MINUTE_MAX = 1_000_000
KEY_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,59}")
"""Names of keys: they stand in log lines and in Redis."""
SECRET_MAX_CHARS = 100_000
DEFAULT_KEY = "default"
"""Name of the one key of the older service."""

Role = Literal["read", "operate"]


def moment(text: object) -> datetime:
    """Return the moment that ISO 8601 ``text`` names; a day is its beginning, and no zone is UTC.

    Raises:
        ValueError: it names none.
    """
    try:
        # Python lets a NUL at the end pass.
        at = datetime.fromisoformat(text.replace("\0", "?")) if isinstance(text, str) else None
        if at is not None:
            return at.replace(tzinfo=UTC) if at.tzinfo is None else at.astimezone(UTC)
    except (ValueError, OverflowError):
        pass
    raise ValueError("must be a time as ISO 8601, like 2027-01-31T00:00:00Z")


class KeyEntry(BaseModel):
    """A key in the settings."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    name: str = Field(pattern=f"^{KEY_NAME.pattern}$")
    hash: str = Field(pattern="^[0-9A-Fa-f]{64}$", description="SHA-256 of the key.")
    role: Role = "read"
    tier: int | None = Field(None, ge=1, le=REQUESTS_PER_MINUTE_MAX, description="Requests a minute.")
    expires: Annotated[
        datetime | None, BeforeValidator(lambda text: None if text is None else moment(text))
    ] = None


_ENTRIES = TypeAdapter(list[KeyEntry])
_HASH_OF_NOTHING = hashlib.sha256().hexdigest()
"""What a script makes whose variable for the key was empty: anyone would know that key."""


def _env(name: str, *others: str) -> Any:
    return AliasChoices(PREFIX + name, *others)


class Settings(BaseModel):
    """The validated settings. Durations are in the unit that ends their name; seconds otherwise."""

    model_config = ConfigDict(frozen=True, extra="ignore", hide_input_in_errors=True)

    # --- the service itself
    service_name: str = Field(
        "position-manager",
        validation_alias=_env("SERVICE_NAME"),
        max_length=60,
        description="Name in logs, events' subscription and Redis keys.",
    )
    host: str = Field(
        "0.0.0.0",  # noqa: S104 - the older service listens everywhere; what it serves needs a key
        validation_alias=_env("HOST"),
        description="Address the REST API listens on.",
    )
    port: int = Field(
        4800, validation_alias=_env("PORT"), ge=1, le=65535, description="Port of the REST API."
    )
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = Field(
        "INFO", validation_alias=_env("LOG_LEVEL"), description="What is logged."
    )
    log_format: Literal["auto", "json", "console"] = Field(
        "auto",
        validation_alias=_env("LOG_FORMAT"),
        description="`auto`: readable on a terminal, JSON everywhere else.",
    )
    api_key: SecretStr | None = Field(
        None,
        validation_alias=_env("API_KEY"),
        description="The one key of the older service; role `operate`.",
    )
    api_keys: SecretStr | None = Field(
        None,
        validation_alias=_env("API_KEYS"),
        description="Further keys, as JSON or as the path of a file that holds it: a list of objects with"
        " `name`, `hash` (SHA-256 of the key, hex), and optionally `role`, `tier` and `expires`.",
    )
    rate_limit_enabled: bool = Field(
        True, validation_alias=_env("RATE_LIMIT_ENABLED"), description="Whether requests are limited."
    )
    rate_limit_default: int = Field(
        100,
        validation_alias=_env("RATE_LIMIT_DEFAULT"),
        ge=1,
        le=REQUESTS_PER_MINUTE_MAX,
        description="Requests a minute of a key that has no tier.",
    )
    rate_limit_overrides: SecretStr | None = Field(
        None,
        validation_alias=_env("RATE_LIMIT_OVERRIDES"),
        description="Requests a minute of single keys: `key-or-name:limit,...`.",
    )
    trusted_proxies: int = Field(
        0,
        validation_alias=_env("TRUSTED_PROXIES"),
        ge=0,
        le=10,
        description="How many proxies before the REST API write `X-Forwarded-For`.",
    )

    metrics_host: str = Field(
        "127.0.0.1",
        validation_alias=_env("METRICS_HOST"),
        description="Address that workers, beat and relay serve `/metrics` at; the REST API has its own.",
    )
    metrics_port: int | None = Field(
        None,
        validation_alias=_env("METRICS_PORT"),
        ge=0,
        le=65535,
        description="Port of it; 0 is none. Unset: 4801 for a worker, 4802 for one named `jobs@...`, 4803 for"
        " beat, 4804 for the relay.",
    )

    # --- where the three servers are
    database_url: SecretStr | None = Field(
        None,
        validation_alias=_env("DATABASE_URL"),
        description="URL of PostgreSQL, instead of the `POSTGRES_*`.",
    )
    postgres_host: str | None = Field(
        None,
        validation_alias="POSTGRES_HOST",
        description="Host of PostgreSQL; none and no URL: `make run` starts its own.",
    )
    postgres_port: int = Field(
        5432, validation_alias="POSTGRES_PORT", ge=1, le=65535, description="Port of PostgreSQL."
    )
    postgres_db: str = Field("positions", validation_alias="POSTGRES_DB", description="Database.")
    postgres_user: str = Field(
        "postgres", validation_alias="POSTGRES_USER", description="Role that owns the tables or may use them."
    )
    postgres_password: SecretStr | None = Field(
        None, validation_alias="POSTGRES_PASSWORD", description="Its password."
    )
    database_role: Annotated[str | None, Field(pattern="^[a-z_][a-z0-9_]{0,62}$")] = Field(
        None,
        validation_alias=_env("DATABASE_ROLE"),
        description="Role that the service connects as where that is not the one that migrates: `positions"
        " migrate` grants it what the service needs, and no more.",
    )
    broker_url: SecretStr | None = Field(
        None, validation_alias=_env("BROKER_URL"), description="URL of RabbitMQ, instead of the `RABBITMQ_*`."
    )
    rabbitmq_host: str | None = Field(
        None,
        validation_alias="RABBITMQ_HOST",
        description="Host of RabbitMQ; none and no URL: `make run` uses its own Valkey.",
    )
    rabbitmq_port: int = Field(
        5672, validation_alias="RABBITMQ_PORT", ge=1, le=65535, description="Port of RabbitMQ."
    )
    rabbitmq_user: str = Field("guest", validation_alias="RABBITMQ_USER", description="User of RabbitMQ.")
    rabbitmq_password: SecretStr = Field(
        SecretStr("guest"), validation_alias="RABBITMQ_PASSWORD", description="Its password."
    )
    rabbitmq_vhost: str = Field("/", validation_alias="RABBITMQ_VHOST", description="Virtual host.")
    redis_url: SecretStr | None = Field(
        None, validation_alias=_env("REDIS_URL"), description="URL of Redis, instead of the `REDIS_*`."
    )
    redis_host: str | None = Field(
        None,
        validation_alias="REDIS_HOST",
        description="Host of Redis; none and no URL: `make run` starts its own Valkey.",
    )
    redis_port: int = Field(6379, validation_alias="REDIS_PORT", ge=1, le=65535, description="Port of Redis.")
    redis_password: SecretStr | None = Field(
        None, validation_alias="REDIS_PASSWORD", description="Password of Redis."
    )

    # --- intake
    position_queue: str = Field(
        "ws-gateway.position",
        validation_alias=_env("POSITION_QUEUE"),
        min_length=1,
        max_length=255,
        description="Queue of exchange reports.",
    )
    order_queues: Annotated[tuple[str, ...], Field(min_length=1, max_length=20)] = Field(
        ("order-manager.order_executed", "order-manager.order_events"),
        validation_alias=_env("ORDER_QUEUES"),
        description="Comma-separated names of the queues that carry executions and order reports.",
    )
    batch_size: int = Field(
        2000,
        validation_alias=_env("BATCH_SIZE"),
        ge=1,
        le=10_000,
        description="Messages in one transaction at most: so many only where there is a backlog.",
    )
    batch_wait_ms: int = Field(
        20,
        validation_alias=_env("BATCH_WAIT_MS"),
        ge=1,
        le=5000,
        description="How long an event waits for its batch to fill while a process is free.",
    )
    message_max_bytes: int = Field(
        262_144,
        validation_alias=_env("MESSAGE_MAX_BYTES"),
        ge=1024,
        description="A longer message is quarantined undecoded.",
    )

    # --- who wins when sources disagree (docs: domain rules)
    use_ws_avg_price: bool = Field(
        True,
        validation_alias=_env("USE_WS_AVG_PRICE"),
        description="Whether a reported average price may replace the folded one.",
    )
    avg_price_diff_threshold: Decimal = Field(
        Decimal("0.001"),
        validation_alias=_env("AVG_PRICE_DIFF_THRESHOLD"),
        ge=0,
        description="By which share of the folded average a reported one must differ to replace it.",
    )
    size_validation_threshold: Decimal = Field(
        Decimal("0.0001"),
        validation_alias=_env("SIZE_VALIDATION_THRESHOLD"),
        ge=0,
        description="Sizes that differ by more are a break.",
    )
    enable_timestamp_resolution: bool = Field(
        True,
        validation_alias=_env("ENABLE_TIMESTAMP_RESOLUTION"),
        description="Whether a report later than the last fill may set the size.",
    )
    timestamp_tolerance_seconds: Decimal = Field(
        Decimal(0),
        validation_alias=_env("TIMESTAMP_TOLERANCE_SECONDS"),
        ge=0,
        le=86_400,
        description="By how much later, seconds.",
    )
    price_staleness_threshold: int = Field(
        300,
        validation_alias=_env("PRICE_STALENESS_THRESHOLD"),
        ge=1,
        le=31_536_000,
        description="Age from which a price is stale, seconds.",
    )

    # --- the exchange's API
    price_api_url: str = Field(
        "https://api.bybit.com",
        validation_alias=_env("PRICE_API_URL"),
        description="Scheme and host, one of the exchange's own or this machine.",
    )
    price_api_timeout: int = Field(
        5, validation_alias=_env("PRICE_API_TIMEOUT"), ge=1, le=30, description="Seconds, for each try."
    )
    price_api_retries: int = Field(
        3,
        validation_alias=_env("PRICE_API_RETRIES"),
        ge=0,
        le=5,
        description="After waits of 1, 2, 4, ... seconds.",
    )
    bybit_api_key: SecretStr | None = Field(
        None,
        validation_alias=_env("BYBIT_API_KEY"),
        description="With `BYBIT_API_SECRET`: a key that may only read, to compare positions with the"
        " exchange's own.",
    )
    bybit_api_secret: SecretStr | None = Field(
        None, validation_alias=_env("BYBIT_API_SECRET"), description="Secret of that key."
    )

    # --- locking
    optimistic_lock_retries: int = Field(
        3,
        validation_alias=_env("OPTIMISTIC_LOCK_RETRIES"),
        ge=0,
        le=10,
        description="How often a lost transaction is tried again.",
    )
    optimistic_lock_backoff_base: int = Field(
        100,
        validation_alias=_env("OPTIMISTIC_LOCK_BACKOFF_BASE"),
        ge=1,
        le=10_000,
        description="Milliseconds before the first retry; doubled for each that follows.",
    )

    # --- portfolio
    portfolio_max_exposure_usdt: Decimal | None = Field(
        None,
        validation_alias=_env("PORTFOLIO_MAX_EXPOSURE_USDT"),
        ge=0,
        description="Gross exposure above which `limit_exceeded` is true.",
    )
    portfolio_update_interval: Decimal = Field(
        Decimal(1),
        validation_alias=_env("PORTFOLIO_UPDATE_INTERVAL"),
        ge=Decimal("0.1"),
        le=86_400,
        description="Shortest time between two `portfolio_updated`, seconds.",
    )

    metrics_cache_ttl: int = Field(
        10,
        validation_alias=_env("METRICS_CACHE_TTL"),
        ge=1,
        le=3600,
        description="Longest time, in seconds, that the portfolio's figures are served from the cache.",
    )

    # --- on a schedule
    snapshot_interval: int = Field(
        3600,
        validation_alias=_env("SNAPSHOT_INTERVAL"),
        ge=1,
        le=86_400,
        description="Seconds between snapshots of all positions, counted from the Unix epoch.",
    )
    snapshot_retention_days: int = Field(
        365,
        validation_alias=_env("SNAPSHOT_RETENTION_DAYS"),
        ge=1,
        le=36_500,
        description="Snapshots that are older are deleted.",
    )
    validation_interval: int = Field(
        1800, validation_alias=_env("VALIDATION_INTERVAL"), ge=1, le=86_400, description="Seconds."
    )
    ws_gateway_url: Annotated[str | None, Field(pattern=r"^https?://[^\s/?#@]+(/[^\s?#]*)?$")] = Field(
        None,
        validation_alias="WS_GATEWAY_URL",
        description="Base URL of the gateway that workers subscribe to positions at; needs its key too.",
    )
    ws_gateway_api_key: SecretStr | None = Field(
        None, validation_alias="WS_GATEWAY_API_KEY", description="Key for the gateway, sent as `X-API-Key`."
    )

    # --- serving
    web_workers: int = Field(
        2, validation_alias=_env("WEB_WORKERS"), ge=1, le=64, description="gunicorn processes."
    )
    web_threads: int = Field(
        8, validation_alias=_env("WEB_THREADS"), ge=1, le=64, description="Threads of each."
    )
    worker_concurrency: int = Field(
        2, validation_alias=_env("WORKER_CONCURRENCY"), ge=1, le=64, description="Pool size of a worker."
    )
    alive_file: str | None = Field(
        None,
        validation_alias=_env("ALIVE_FILE"),
        description="File that a worker or relay touches every few seconds while it gets on, for probes.",
    )
    simulator: Literal["auto", "on", "off"] = Field(
        "auto",
        validation_alias=_env("SIMULATOR"),
        description="`on`: a simulator invents the market, and the exchange is asked for nothing. `auto`: on"
        " the embedded default only.",
    )
    data_dir: str | None = Field(
        None,
        validation_alias=_env("DATA_DIR"),
        description="Where the embedded default keeps its data.",
    )

    @field_validator("price_api_url")
    @classmethod
    def _of_the_exchange(cls, url: str) -> str:
        """Return scheme and host anew, so that what was checked is what is asked."""
        parts = urlsplit(url)
        host, port = parts.hostname or "", parts.port
        if parts.path not in ("", "/") or parts.query or parts.fragment or "@" in parts.netloc:
            raise ValueError("must be scheme and host only")
        if host in PRICE_HOSTS and parts.scheme == "https" and port in (None, 443):
            return f"https://{host}"
        if host in LOOPBACK and parts.scheme in ("http", "https"):
            name = f"[{host}]" if ":" in host else host
            return f"{parts.scheme}://{name}{'' if port is None else f':{port}'}"
        raise ValueError(f"must be https:// and one of {', '.join(sorted(PRICE_HOSTS))}, or on this machine")

    @property
    def price_refresh_interval(self) -> float:
        """How often prices are looked at: five times while one grows stale, and once a minute at least."""
        return min(max(self.price_staleness_threshold / 5, 1), 60)

    @cached_property
    def database(self) -> str:
        """SQLAlchemy URL of PostgreSQL, with the password in clear: never log it."""
        if self.database_url:
            url = self.database_url.get_secret_value()
            scheme, _, rest = url.partition("://")
            return "postgresql+psycopg2://" + rest if scheme in ("postgres", "postgresql") else url
        password = (
            f":{quote(self.postgres_password.get_secret_value(), '')}" if self.postgres_password else ""
        )
        host = self.postgres_host or "127.0.0.1"
        return (
            f"postgresql+psycopg2://{quote(self.postgres_user, '')}{password}"
            f"@{host}:{self.postgres_port}/{quote(self.postgres_db, '')}"
        )

    @cached_property
    def broker(self) -> str:
        """URL of the broker for kombu, with the password in clear: never log it."""
        if self.broker_url:
            return self.broker_url.get_secret_value()
        return (
            f"amqp://{quote(self.rabbitmq_user, '')}:{quote(self.rabbitmq_password.get_secret_value(), '')}"
            f"@{self.rabbitmq_host or '127.0.0.1'}:{self.rabbitmq_port}/{quote(self.rabbitmq_vhost, '')}"
        )

    @cached_property
    def redis(self) -> str:
        """URL of Redis, with the password in clear: never log it."""
        if self.redis_url:
            return self.redis_url.get_secret_value()
        password = f":{quote(self.redis_password.get_secret_value(), '')}@" if self.redis_password else ""
        return f"redis://{password}{self.redis_host or '127.0.0.1'}:{self.redis_port}/0"

    @property
    def snapshot_tick(self) -> int:
        """How often, in seconds, is looked for snapshots to take: soon again where one could not be taken."""
        return min(self.snapshot_interval, 60)

    @cached_property
    def keys(self) -> tuple[KeyEntry, ...]:
        """The keys of `api_keys`.

        Raises:
            SettingsError: names the entry by its number: whatever stands in it may be the key itself.
        """
        variable, text = PREFIX + "API_KEYS", self.api_keys.get_secret_value() if self.api_keys else "[]"
        if not text.startswith("["):
            try:
                text = Path(text).read_text()
            except (OSError, ValueError) as error:
                reason = (isinstance(error, OSError) and error.strerror) or "it is no text"
                raise SettingsError(
                    f"{variable}: no JSON list, and as a file it cannot be read: {reason}"
                ) from None
        try:
            entries = tuple(_ENTRIES.validate_json(text))
        except ValidationError as error:
            lines = [": ".join((*_place(each["loc"]), each["msg"])) for each in error.errors()]
            raise SettingsError(f"{variable}: {'; '.join(lines)}") from None
        taken = {DEFAULT_KEY} if self.api_key else set()
        for number, entry in enumerate(entries, 1):
            if entry.hash.lower() == _HASH_OF_NOTHING:
                raise SettingsError(
                    f"{variable}: entry {number}: hash: is of an empty key; what was hashed must be the key"
                )
            for name, value in (("name", entry.name), ("hash", entry.hash.lower())):
                if value in taken:
                    raise SettingsError(f"{variable}: entry {number}: {name}: another key has it")
                taken.add(value)
        return entries

    @cached_property
    def limits(self) -> dict[str, int]:
        """Requests a minute by name of a key or the key itself: `rate_limit_overrides`.

        Raises:
            SettingsError: names the entry by its number: whatever stands in it may be the key itself.
        """
        text = self.rate_limit_overrides.get_secret_value() if self.rate_limit_overrides else ""
        found = {}
        for number, entry in enumerate(text.split(","), 1):
            if not entry.strip():
                continue
            whose, colon, limit = entry.strip().rpartition(":")
            if not (colon and whose.strip() and re.fullmatch("[0-9]{1,7}", limit.strip())) or not (
                1 <= int(limit) <= REQUESTS_PER_MINUTE_MAX
            ):
                raise SettingsError(
                    f"{PREFIX}RATE_LIMIT_OVERRIDES: entry {number}: must be key-or-name:limit,"
                    f" the limit from 1 to {REQUESTS_PER_MINUTE_MAX}"
                )
            found[whose.strip()] = int(limit)
        return found

    @property
    def queues(self) -> tuple[str, ...]:
        """The foreign queues the intake consumes."""
        return (self.position_queue, *self.order_queues)


def _place(loc: tuple[int | str, ...]) -> list[str]:
    return [f"entry {each + 1}" if isinstance(each, int) else each for each in loc]


def variables() -> dict[str, str]:
    """Return ``{environment variable: field name}`` of every setting, in the order of the class."""
    names: dict[str, str] = {}
    for field, info in Settings.model_fields.items():
        alias = info.validation_alias
        for name in alias.choices if isinstance(alias, AliasChoices) else (alias,):
            names[str(name)] = field
    return names


@cache
def secret_files() -> dict[str, str]:
    """Return ``{NAME_FILE: NAME}`` of every variable that holds a secret: the file's content is its value."""
    return {
        f"{name}_FILE": name
        for name, field in variables().items()
        if SecretStr in (annotation := Settings.model_fields[field].annotation, *get_args(annotation))
    }


def _read_secrets(environ: Mapping[str, str]) -> dict[str, str]:
    """Return the values of the variables that are given as files."""
    found = {}
    for variable, name in secret_files().items():
        path = environ.get(variable, "").strip()
        if not path:
            continue
        if environ.get(name, "").strip():
            raise SettingsError(f"{variable}: {name} is set too: which of the two is meant?")
        try:
            with Path(path).open() as file:
                text = file.read(SECRET_MAX_CHARS + 1).strip()
        except (OSError, ValueError) as error:
            reason = (isinstance(error, OSError) and error.strerror) or "it is no text"
            raise SettingsError(f"{variable}: cannot be read: {reason}") from None
        if not text or len(text) > SECRET_MAX_CHARS:
            raise SettingsError(
                f"{variable}: holds no secret, or one of more than {SECRET_MAX_CHARS} characters"
            )
        found[name] = text
    return found


def unknown(environ: Mapping[str, str]) -> dict[str, str | None]:
    """Return the ``POSITION_MANAGER_*`` variables no setting reads, each with the nearest known name."""
    known = variables().keys() | secret_files().keys()
    return {
        name: next(iter(difflib.get_close_matches(name, known, n=1, cutoff=0.8)), None)
        for name in environ
        if name.startswith(PREFIX) and name not in known
    }


def load(environ: Mapping[str, str] | None = None) -> Settings:
    """Read the settings from ``environ`` (default: the process's).

    An empty variable counts as unset, as it does in a compose file. A secret may be in a file that the
    variable's name with `_FILE` after it names.

    Raises:
        SettingsError: names each variable that is wrong, without its value.
    """
    environ = os.environ if environ is None else environ
    environ = {**environ, **_read_secrets(environ)}
    given: dict[str, Any] = {name: value for name in variables() if (value := environ.get(name, "").strip())}
    queues = PREFIX + "ORDER_QUEUES"
    if queues in given:
        given[queues] = tuple(q.strip() for q in given[queues].split(",") if q.strip())
    try:
        made = Settings.model_validate(given)
    except ValidationError as error:
        lines = (f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise SettingsError("; ".join(lines)) from None
    if len(set(made.queues)) < len(made.queues):
        raise SettingsError(f"{queues}: names a queue twice, or the one of {PREFIX}POSITION_QUEUE")
    if bool(made.bybit_api_key) != bool(made.bybit_api_secret):
        raise SettingsError(f"{PREFIX}BYBIT_API_KEY and {PREFIX}BYBIT_API_SECRET: one without the other")
    # Not before it is needed: `positions --help` has no use for it.
    from sqlalchemy import make_url
    from sqlalchemy.exc import ArgumentError

    try:
        driver = make_url(made.database).drivername
    except (ArgumentError, ValueError):
        driver = ""
    if not driver.startswith("postgresql"):
        # What it is has a password in it.
        raise SettingsError(f"{PREFIX}DATABASE_URL: must be like postgresql://user:password@host:5432/name")
    if made.broker.partition("://")[0] not in BROKER_SCHEMES:
        raise SettingsError(f"{PREFIX}BROKER_URL: must begin with {'://, '.join(BROKER_SCHEMES)}://")
    if made.redis.partition("://")[0] not in REDIS_SCHEMES:
        raise SettingsError(f"{PREFIX}REDIS_URL: must begin with {'://, '.join(REDIS_SCHEMES)}://")
    return made
