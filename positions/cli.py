"""The `positions` command."""

import os
import signal
import sys
import threading

import click

from positions import settings


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="positions")
def cli() -> None:
    """Position management for crypto derivatives."""


@cli.command()
def migrate() -> None:
    """Bring the database's schema up to this release."""
    from positions.storage.migrate import upgrade

    upgrade(settings.load().database)


@cli.command()
def relay() -> None:
    """Publish the outbox to the broker until stopped; of several relays one works, the others wait."""
    from positions import log_config
    from positions.handlers.relay_outbox import relay_outbox
    from positions.storage.database import connect

    own = settings.load()
    log_config.configure(own)
    stopped = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stopped.set())
    engine = connect(own.database, pool_size=1, application=f"{own.service_name} relay")
    relay_outbox(engine, own.broker, stopping=stopped.is_set)


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


def main() -> None:
    """Run the command; a wrong setting is one line on standard error, not a traceback."""
    try:
        cli()
    except settings.SettingsError as error:
        sys.exit(f"positions: {error}")


if __name__ == "__main__":
    main()
