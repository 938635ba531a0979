"""The `positions` command."""

import os
import sys

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
    from positions.storage.relay import run

    run(settings.load())


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
