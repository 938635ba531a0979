"""The `positions` command."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import re
import signal
import sys
import threading
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

import click
import structlog

from positions import settings
from positions.errors import NotFound, PositionsError, Unavailable

if TYPE_CHECKING:
    from sqlalchemy import Engine


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="positions")
def cli() -> None:
    """Position management for crypto derivatives."""


@cli.command()
def migrate() -> None:
    """Bring the database's schema up to this release."""
    from positions.storage.migrate import grant, upgrade

    own = settings.load()
    upgrade(own.database)
    if own.database_role:
        grant(own.database, own.database_role)


@cli.command()
def relay() -> None:
    """Publish the outbox to the broker until stopped; of several relays one works, the others wait."""
    from positions import log_config, metrics
    from positions.handlers.relay_outbox import relay_outbox
    from positions.liveness import touching
    from positions.storage.database import connect

    own = settings.load()
    log_config.configure(own)
    metrics.serve("relay", own)
    stopped = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stopped.set())
    engine = connect(own.database, pool_size=1, application=f"{own.service_name} relay")
    touch = touching(own.alive_file)

    def stopping() -> bool:
        # Asked at every turn of the relay's loop and while it waits, but not while it is stuck.
        touch()
        return stopped.is_set()

    relay_outbox(engine, own.broker, stopping=stopping)


@cli.command(context_settings={"show_default": True})
@click.option("--rate", type=click.FloatRange(0.1, 5000), default=20.0, help="Messages a second.")
@click.option("--count", type=click.IntRange(0), default=0, help="End after so many messages; 0 is never.")
@click.option("--seed", type=int, help="The same ids on every run: for an empty database.")
@click.option("--assets", type=click.IntRange(1, 12), default=12, help="How many assets are traded.")
@click.option("--room", type=click.IntRange(1), default=5000, help="Pause while so many messages wait.")
@click.option("--late", type=click.FloatRange(0, 1), default=0.005, help="Share of late messages.")
@click.option("--duplicates", type=click.FloatRange(0, 1), default=0.01, help="Share of doubled messages.")
@click.option(
    "--malformed-every", type=click.FloatRange(0), default=180.0, help="Seconds on average; 0 is never."
)
def simulate(
    *,
    rate: float,
    count: int,
    seed: int | None,
    assets: int,
    room: int,
    late: float,
    duplicates: float,
    malformed_every: float,
) -> None:
    """Feed the queues a realistic market, as an order manager and an exchange gateway would."""
    from positions import log_config
    from positions.simulator import Faults, run

    own = settings.load()
    log_config.configure(own)
    faults = Faults(late=late, duplicate=duplicates, malformed_every_s=malformed_every)
    run(own, rate=rate, count=count, seed=seed, assets=assets, room=room, faults=faults)


@cli.command()
def up() -> None:
    """Run the whole service in the foreground, with its own PostgreSQL and Valkey where none are named."""
    from positions.embedded.folder import StartError
    from positions.embedded.up import run

    try:
        run(settings.load(), os.environ)
    except StartError as error:
        raise click.ClickException(str(error)) from None


@cli.group()
def quarantine() -> None:
    """Messages that could not be applied: list, read and replay them."""


def _json(value: object) -> str:
    from positions.domain.times import utc_text

    return utc_text(value) if isinstance(value, datetime) else str(value)


def _json_line(data: object) -> None:
    click.echo(json.dumps(data, default=_json, ensure_ascii=False))


@quarantine.command("list")
@click.option("--limit", type=click.IntRange(1, 1000), default=50, show_default=True)
@click.option("--before", type=int, help="Only those with a smaller id: the next page.")
@click.option("--replayed", is_flag=True, help="Those that were replayed too.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object a line.")
def quarantine_list(*, limit: int, before: int | None, replayed: bool, as_json: bool) -> None:
    """List the newest messages in quarantine."""
    from positions.storage import quarantine as store
    from positions.storage.database import transaction

    with transaction(_engine()) as connection:
        messages = store.newest(connection, limit=limit, before=before, replayed=replayed)
    for kept in messages:
        if as_json:
            refused = kept.refused
            row = {"id": kept.id, "queue": refused.queue, "reason": refused.reason, "field": refused.field}
            times = {"last_seen_at": kept.last_seen_at, "replayed_at": kept.replayed_at}
            _json_line({**row, "times_seen": kept.times_seen, "bytes": len(refused.body), **times})
        else:
            reason = ": ".join(filter(None, (kept.refused.field, kept.refused.reason)))
            seen = f"{kept.last_seen_at:%Y-%m-%d %H:%M:%S} UTC  {kept.times_seen:4}x"
            click.echo(f"{kept.id:8}  {seen}  {kept.refused.queue:30}  {reason}")


@quarantine.command("show")
@click.argument("id_", metavar="ID", type=int)
def quarantine_show(id_: int) -> None:
    """Print one message whole, as JSON."""
    from positions.storage import quarantine as store
    from positions.storage.database import transaction

    with transaction(_engine()) as connection:
        kept = store.find(connection, id_)
    data = dataclasses.asdict(kept)
    data["refused"]["body"] = kept.refused.body.decode(errors="backslashreplace")
    click.echo(json.dumps(data, default=_json, ensure_ascii=False, indent=2))


@quarantine.command("replay")
@click.argument("ids", metavar="[ID]...", type=int, nargs=-1)
@click.option("--all", "everything", is_flag=True, help="All that were not replayed yet.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object a line: what became of each.")
def quarantine_replay(*, ids: tuple[int, ...], everything: bool, as_json: bool) -> None:
    """Apply messages again, each in a transaction of its own; exit with 1 if one is refused again."""
    from sqlalchemy.exc import DataError

    from positions.handlers.replay_quarantine import replay_quarantine
    from positions.handlers.write_changes import Rules
    from positions.storage import quarantine as store
    from positions.storage.database import Retry, in_transaction, transaction

    if bool(ids) is everything:
        raise click.UsageError("name the messages, or give --all")
    own, engine, failed = settings.load(), _engine(), False
    wanted = list(ids)
    if everything:
        with transaction(engine) as connection:
            wanted = store.waiting(connection)
    for id_ in wanted:
        try:
            outcome = in_transaction(
                engine,
                lambda connection, id_=id_: replay_quarantine(  # type: ignore[misc]
                    connection,
                    id_,
                    rules=Rules.of(own),
                    max_bytes=own.message_max_bytes,
                    now=datetime.now(UTC),
                ),
                retry=Retry(),
            )
        except Unavailable:
            raise
        except (PositionsError, DataError) as error:
            failed, reason = True, str(error).splitlines()[0]
            if as_json:
                _json_line({"id": id_, "refused": reason})
            else:
                click.echo(f"{id_}: refused: {reason}", err=True)
        else:
            counts = {name: count for name, count in outcome.counts.items() if count}
            if as_json:
                _json_line({"id": id_, **counts})
            else:
                click.echo(f"{id_}: {', '.join(f'{count} {name}' for name, count in counts.items())}")
    sys.exit(1 if failed else 0)


@cli.group()
def keys() -> None:
    """Keys of the API that are kept in the database: create, list and revoke them."""


def _key_name(_context: click.Context, _parameter: click.Parameter, name: str) -> str:
    if not settings.KEY_NAME.fullmatch(name):
        raise click.BadParameter("must be 1 to 60 letters, digits, dots, hyphens and underscores")
    if name == settings.DEFAULT_KEY:
        raise click.BadParameter(f"is the name of the key in {settings.PREFIX}API_KEY")
    return name


def _expiry(_context: click.Context, _parameter: click.Parameter, given: str | None) -> datetime | None:
    if given is None:
        return None
    now = datetime.now(UTC)
    try:
        days = re.fullmatch("([0-9]{1,5})d", given)
        at = now + timedelta(days=int(days[1])) if days else settings.moment(given)
    except (ValueError, OverflowError):
        raise click.BadParameter("must be a day, a time as ISO 8601, or a number of days like 90d") from None
    if at <= now:
        raise click.BadParameter("is over already")
    return at.replace(microsecond=0)


@keys.command("create", context_settings={"show_default": True})
@click.argument("name", callback=_key_name)
@click.option("--role", type=click.Choice(["read", "operate"]), default="read", help="What it may do.")
@click.option(
    "--tier",
    type=click.IntRange(1, settings.REQUESTS_PER_MINUTE_MAX),
    help="Requests a minute.  [default: the service's]",
)
@click.option("--expires", callback=_expiry, help="A day (its beginning, UTC), a time, or days: 90d.")
@click.option("--print-only", is_flag=True, help="Store nothing; print the entry for the settings too.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
def keys_create(
    *,
    name: str,
    role: settings.Role,
    tier: int | None,
    expires: datetime | None,
    print_only: bool,
    as_json: bool,
) -> None:
    """Create a key and print it: this once, as only its hash is kept."""
    from positions.domain.times import utc_text
    from positions.storage import api_keys
    from positions.storage.database import transaction

    key = api_keys.generated()
    digest = api_keys.digest_of(key.encode())
    entry: dict[str, object] = {"name": name, "hash": digest, "role": role}
    if tier:
        entry["tier"] = tier
    if expires:
        entry["expires"] = utc_text(expires)
    if not print_only:
        try:
            with transaction(_engine()) as connection:
                api_keys.create(
                    connection,
                    name=name,
                    digest=digest,
                    role=role,
                    requests_per_minute=tier,
                    expires_at=expires,
                )
        except api_keys.KeyRefused as error:
            raise click.ClickException(str(error)) from None
    if as_json:
        _json_line({"key": key, **({"entry": entry} if print_only else {"name": name})})
        return
    click.echo(key)
    if print_only:
        click.echo(f"for the list in {settings.PREFIX}API_KEYS:", err=True)
        _json_line(entry)
    else:
        click.echo(f"{name} may be used now; the key is not shown again", err=True)


@keys.command("list")
@click.option("--json", "as_json", is_flag=True, help="One JSON object a line.")
def keys_list(*, as_json: bool) -> None:
    """List all keys in the database, revoked ones too."""
    from positions.storage import api_keys
    from positions.storage.database import transaction

    with transaction(_engine()) as connection:
        found = api_keys.everything(connection)
    for key in found:
        row = {"name": key.name, "role": key.role, "tier": key.requests_per_minute}
        times = {"created": key.created_at, "expires": key.expires_at, "revoked": key.revoked_at}
        if as_json:
            _json_line({**row, **times})
        else:
            tier = f"{key.requests_per_minute or 'default'}"
            shown = "  ".join(f"{name} {at:%Y-%m-%d}" for name, at in times.items() if at)
            click.echo(f"{key.name:30}  {key.role:7}  {tier:>7}  {shown}")


@keys.command("revoke")
@click.argument("name")
def keys_revoke(name: str) -> None:
    """Revoke a key; within five seconds nothing takes it any more."""
    from positions.storage import api_keys
    from positions.storage.database import transaction

    with transaction(_engine()) as connection:
        api_keys.revoke(connection, name, now=datetime.now(UTC))
    click.echo(f"{name} is revoked", err=True)


@cli.command()
@click.option("--asset", help="Only the positions in this asset.")
@click.option("--repair", is_flag=True, help="Write positions that differ anew.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object for each position that differs.")
def rebuild(*, asset: str | None, repair: bool, as_json: bool) -> None:
    """Fold positions anew from the ledger and report any difference; exit with 1 if there is one.

    The service goes on working meanwhile: each position is compared in a snapshot of its own.
    """
    from decimal import Decimal

    from positions.domain.numbers import plain
    from positions.handlers.rebuild_position import rebuild_position
    from positions.handlers.write_changes import Rules
    from positions.storage import positions as store
    from positions.storage.database import transaction

    own = Rules.of(settings.load())
    engine = _engine()
    snapshots = engine.execution_options(isolation_level="REPEATABLE READ")
    with transaction(engine) as connection:
        keys = store.keys(connection, asset=asset.upper() if asset else None)
    if asset and not keys:
        raise NotFound(f"no position in {asset.upper()}")
    differing = 0
    quiet = as_json or not sys.stderr.isatty()
    with click.progressbar(keys, file=sys.stderr, hidden=quiet, label="folding") as shown:
        for key in shown:
            now = datetime.now(UTC)
            with transaction(snapshots) as connection:
                found = rebuild_position(connection, key, rules=own, now=now, repair=False)
            if found and repair:
                with transaction(engine) as connection:
                    found = rebuild_position(connection, key, rules=own, now=now, repair=True)
            if not found:
                continue
            differing += 1
            for name, pair in found.items():
                stored, folded = (plain(each) if isinstance(each, Decimal) else each for each in pair)
                row = {"asset": key.asset, "mode": key.mode, "figure": name}
                if as_json:
                    _json_line({**row, "stored": stored, "folded": folded, "repaired": repair})
                else:
                    click.echo(
                        f"{key.asset} {key.mode} {name}: stored {stored}, the ledger folds to {folded}"
                    )
    click.echo(f"{len(keys)} positions folded anew, {differing} differ", err=True)
    sys.exit(1 if differing else 0)


@cli.command()
@click.option("--asset", help="Only the positions in this asset.")
@click.option(
    "--json", "as_json", is_flag=True, help="One JSON object a line, the snapshot as the API has it."
)
def snapshot(*, asset: str | None, as_json: bool) -> None:
    """Take a snapshot of every position now, all of one moment; published as those on schedule are."""
    from positions.handlers.take_snapshots import take_snapshots
    from positions.messages.outbound import object_of
    from positions.storage import positions as store
    from positions.storage.database import Retry, in_transaction, transaction

    own, engine = settings.load(), _engine()
    keys = None
    if asset:
        with transaction(engine) as connection:
            keys = store.keys(connection, asset=asset.upper())
        if not keys:
            raise NotFound(f"no position in {asset.upper()}")
    taken = in_transaction(
        engine,
        lambda connection: take_snapshots(
            connection,
            keys,
            at=datetime.now(UTC),
            stale_after=timedelta(seconds=own.price_staleness_threshold),
        ),
        retry=Retry(),
    )
    for view in taken if as_json else ():
        _json_line(object_of(view))
    click.echo(f"{len(taken)} snapshots taken", err=True)


@cli.command()
@click.option("--json", "as_json", is_flag=True, help="One JSON object a line, and one for all at the end.")
def doctor(*, as_json: bool) -> None:
    """Look at every connection, setting, queue, migration and clock, and say how to mend what is wrong.

    Nothing is changed. Exit with 1 if there is a problem; a warning is none.
    """
    from positions.doctor import examine

    colors = {"ok": "green", "warning": "yellow", "problem": "red"}
    counts = dict.fromkeys(colors, 0)
    logging.disable()  # what could be logged is what is said here
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    for found in examine(os.environ):
        counts[found.status] += 1
        if as_json:
            _json_line(dataclasses.asdict(found))
            continue
        status = click.style(f"{found.status:8}", fg=colors[found.status])
        click.echo(f"{status} {found.what}: {found.said}")
        if found.mend:
            click.echo(f"         -> {found.mend}")
    if as_json:
        _json_line({"healthy": not counts["problem"], **counts})
    else:
        click.echo(", ".join(f"{count} {status}" for status, count in counts.items()), err=True)
    sys.exit(1 if counts["problem"] else 0)


@cli.command()
@click.option("--asset", help="Only the positions in this asset.")
@click.option("--venue/--no-venue", default=True, help="Ask the exchange too, where its key is set.")
@click.option("--fix/--no-fix", default=False, help="Keep what is found, and correct what the rules allow.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object for each break.")
def validate(*, asset: str | None, venue: bool, fix: bool, as_json: bool) -> None:
    """Compare positions with ledger, reports and the exchange; exit with 1 if one differed.

    The service goes on working meanwhile. What is rounding only is shown, and is no difference.
    """
    from positions.domain.events import PositionKey
    from positions.handlers.validate_position import Validation
    from positions.handlers.validate_positions import Validator
    from positions.handlers.write_changes import Rules
    from positions.messages.outbound import object_of
    from positions.storage import positions as store
    from positions.storage import validations
    from positions.storage.database import Retry, transaction
    from positions.venue.bybit import Bybit

    own, engine = settings.load(), _engine()
    exchange = Bybit.of(own)
    if not exchange.signs and venue and not as_json:
        click.echo("the exchange is not asked: there is no key of it in the settings", err=True)
    validator = Validator(
        engine=engine,
        rules=Rules.of(own),
        retry=Retry(retries=own.optimistic_lock_retries, base_ms=own.optimistic_lock_backoff_base),
        venue=exchange if venue and exchange.signs else None,
        fix=fix,
    )
    with transaction(engine) as connection:
        keys = store.keys(connection, asset=asset.upper() if asset else None)
    if asset and not keys:
        raise NotFound(f"no position in {asset.upper()}")
    validated = differing = 0

    def show(key: PositionKey, found: Validation) -> None:
        for each in found.breaks:
            row = {"asset": key.asset, "mode": key.mode, **object_of(each)}
            if as_json:
                _json_line(row)
            else:
                end = f", {each.resolution}" if each.resolution else ""
                detail = f" ({each.detail})" if each.detail else ""
                figures = f"ours {row['ours']}, theirs {row['theirs']}"
                click.echo(
                    f"{key.asset} {key.mode} {each.leg} {each.kind}: {figures}: {each.cause}{detail}{end}"
                )

    quiet = as_json or not sys.stderr.isatty()
    with (
        validations.alone(engine) as alone,
        click.progressbar(length=len(keys), file=sys.stderr, hidden=quiet, label="validating") as bar,
    ):
        if not alone:
            raise click.ClickException("another validation is at work")
        everything = ((key, validator.one(key)) for key in keys) if asset else validator.run(limit=None)
        for key, found in everything:
            bar.update(1)
            validated += 1
            differing += not found.is_valid
            show(key, found)
    click.echo(f"{validated} positions validated, {differing} differed", err=True)
    sys.exit(1 if differing else 0)


def _engine() -> Engine:
    from positions import log_config
    from positions.storage.database import connect

    own = settings.load()
    log_config.configure(own)
    return connect(own.database, pool_size=2, application=f"{own.service_name} cli")


def main() -> None:
    """Run the command; a wrong setting is one line on standard error, not a traceback."""
    try:
        cli()
    except (settings.SettingsError, NotFound, Unavailable) as error:
        sys.exit(f"positions: {error}")


if __name__ == "__main__":
    main()
