"""Beat's scheduler: its file says when each job was last asked for, and does no harm when it is lost."""

from celery.beat import PersistentScheduler


class Scheduler(PersistentScheduler):  # type: ignore[misc] # Celery has no types
    """Begins anew where its file cannot be read; Celery's own gives up on some that were half written."""

    def setup_schedule(self) -> None:
        """Read the file, or make another: every job finds out for itself what is missing."""
        try:
            super().setup_schedule()
        except Exception as error:  # noqa: BLE001 - whatever unpickling raises
            self._store = self._destroy_open_corrupted_schedule(error)
            self._store.close()
            super().setup_schedule()
