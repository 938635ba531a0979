"""Children that leave a record of themselves, so that the next start can end those a kill -9 orphaned.

Run as a program, with the words ``RECORD SIGNAL USER COMMAND...``, it becomes the child: it writes the
record, gives up root for ``USER`` (empty: stays who it is), and executes the command.
"""

import ctypes
import os
import pwd
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

_PR_SET_PDEATHSIG = 1


def command(record: Path, program: Sequence[str], *, stop_signal: str, user: str | None) -> list[str]:
    """Return the command that runs ``program`` as a recorded child."""
    return [sys.executable, "-m", __name__, str(record), stop_signal, user or "", *program]


def started(pid: int) -> str | None:
    """Return when a process started, as a text that no later process of this pid has; None if it has ended.

    A zombie has ended: where no init reaps, it stays for ever.
    """
    if sys.platform != "linux":
        ps = subprocess.run(  # noqa: S603 - the words are ours
            ["/bin/ps", "-o", "stat=", "-o", "lstart=", "-p", str(pid)],
            capture_output=True,
            text=True,
            check=False,
        )
        state, _, when = ps.stdout.strip().partition(" ")
        return "_".join(when.split()) if state and "Z" not in state else None
    try:
        # The command's name, in brackets, may hold anything; state and start time (proc(5): 3 and 22) follow.
        fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    # The start is in ticks since the boot.
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return None if fields[0] in "ZX" else f"{fields[19]}@{boot}"


def reap(folder: Path, first: str, *, grace_s: float) -> int:
    """End every recorded child in the folder that still runs, and return how many did.

    The child recorded under ``first`` is asked alone to begin with, as it ends the others in order; all
    that still run after ``grace_s`` are asked themselves, and after as long again killed. A pid that
    meanwhile belongs to another process is left alone.
    """
    records = {record: child for record in folder.glob("*.pid") if (child := _read(record))}
    found = sum(_runs(*child) for child in records.values())
    leader = records.get(folder / f"{first}.pid")
    if leader and _runs(*leader):
        _ask(*leader)
        _wait(records, grace_s)
    for child in records.values():
        _ask(*child)
    _wait(records, grace_s if found else 0)
    for pid, when, _ in records.values():
        # Only while it lives is the group of its number surely its own.
        if started(pid) == when:
            with suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)
    _wait(records, grace_s if found else 0)
    for record in folder.glob("*.pid"):
        record.unlink()
    return found


def _read(record: Path) -> tuple[int, str, str] | None:
    # A power cut may leave an empty record.
    words = record.read_text().split()
    return (int(words[0]), words[1], words[2]) if len(words) == 3 else None


def _runs(pid: int, when: str, _: str) -> bool:
    return started(pid) == when


def _ask(pid: int, when: str, stop_signal: str) -> None:
    if started(pid) == when:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.Signals[f"SIG{stop_signal}"])


def _wait(records: dict[Path, tuple[int, str, str]], limit_s: float) -> None:
    deadline = time.monotonic() + limit_s
    while any(_runs(*child) for child in records.values()) and time.monotonic() < deadline:
        time.sleep(0.05)


def _become(record: Path, stop_signal: str, user: str, program: list[str]) -> None:
    whole = record.with_suffix(".new")
    whole.write_text(f"{os.getpid()} {started(os.getpid())} {stop_signal}\n")
    whole.replace(record)
    if user:
        entry = pwd.getpwnam(user)
        os.setgroups([])
        os.setgid(entry.pw_gid)
        os.setuid(entry.pw_uid)
    # A shell that put us in the background may have had these ignored, which a program would inherit.
    for ignored in (signal.SIGINT, signal.SIGQUIT):
        signal.signal(ignored, signal.SIG_DFL)
    if sys.platform == "linux":
        # Nothing outlives its parent, even one that ends without a word. After the change of user, which
        # clears the request.
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.Signals[f"SIG{stop_signal}"]))
    os.execvp(program[0], program)  # noqa: S606 - no shell is the point


if __name__ == "__main__":
    _become(Path(sys.argv[1]), sys.argv[2], sys.argv[3], sys.argv[4:])
