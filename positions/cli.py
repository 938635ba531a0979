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
