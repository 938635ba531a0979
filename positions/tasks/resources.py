"""What tasks need and a process has once: the settings and the database's engine."""

from dataclasses import dataclass
from functools import cached_property

from sqlalchemy import Engine

from positions.messages.outbound import PortfolioSums
from positions.settings import Settings
from positions.storage.database import Retry, connect
from positions.storage.portfolio import Sums
from positions.venue.bybit import Bybit


@dataclass
class Resources:
    """Made by the worker's root before it forks; what holds a connection is opened on first use.

    The worker's main process never touches the database, so that no forked child inherits a connection.
    """

    settings: Settings

    @cached_property
    def engine(self) -> Engine:
        """The database: as many connections as tasks may run at once in this process."""
        return connect(
            self.settings.database,
            pool_size=max(2, self.settings.worker_concurrency),
            application=f"{self.settings.service_name} worker",
        )

    @cached_property
    def sums(self) -> Sums[PortfolioSums]:
        """What the portfolio is made of, as this process read it last."""
        return Sums(PortfolioSums())

    @cached_property
    def venue(self) -> Bybit:
        """The exchange's own API; what it knows of how the exchange does is this process's."""
        return Bybit.of(self.settings)

    @property
    def retry(self) -> Retry:
        """How a lost transaction is tried again."""
        return Retry(
            retries=self.settings.optimistic_lock_retries,
            base_ms=self.settings.optimistic_lock_backoff_base,
        )


_resources: Resources | None = None


def use(resources: Resources) -> None:
    """Set what :func:`current` returns; called once, by the root."""
    global _resources  # noqa: PLW0603 - a Celery task has no other way to be handed anything
    _resources = resources


def current() -> Resources:
    """Return this process's resources."""
    if _resources is None:
        raise RuntimeError("no root has called positions.tasks.resources.use() yet")
    return _resources
