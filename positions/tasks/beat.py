"""Beat's scheduler: its file says when each job was last asked for, and does no harm when it is lost."""

from typing import Any

from celery.beat import PersistentScheduler


class Scheduler(PersistentScheduler):  # type: ignore[misc] # Celery has no types
    """Begins anew where its file cannot be read or is of a time to come; Celery's own ends or waits."""

    def setup_schedule(self) -> None:
        """Read the file, or make another: every job finds out for itself what is missing."""
        try:
            super().setup_schedule()
        except Exception as error:  # noqa: BLE001 - whatever unpickling raises
            self._store = self._destroy_open_corrupted_schedule(error)
            self._store.close()
            super().setup_schedule()

    def tick(self, *args: Any, **kwargs: Any) -> float:
        """Ask for what is due, and return in how many seconds to look again.

        Where the clock was set back, jobs go on from now: else none is asked for until it is as late again.
        """
        now = self.app.now()
        for entry in self.schedule.values():
            if entry.last_run_at > now:
                entry.last_run_at, self._heap = now, None
        wait_s: float = super().tick(*args, **kwargs)
        return wait_s
