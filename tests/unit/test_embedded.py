import configparser
import os
import shlex
import signal
import socket
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from positions import settings
from positions.embedded import children, servers
from positions.embedded.folder import Folder, StartError, default_path, taken
from positions.embedded.supervision import Program, config
from positions.embedded.up import Chosen, Up

SLEEP = [sys.executable, "-c", "import time; print(flush=True); time.sleep(60)"]


def sleeping(record: Path) -> subprocess.Popen[bytes]:
    process = subprocess.Popen(
        children.command(record, SLEEP, stop_signal="TERM", user=None),
        stdout=subprocess.PIPE,
        start_new_session=True,
    )
    assert process.stdout
    process.stdout.readline()
    return process


def test_zombie_counts_as_ended() -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        assert children.started(process.pid) == children.started(process.pid) is not None
        process.kill()
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        assert children.started(process.pid) is None


def test_orphan_is_ended_the_way_it_asked_for(tmp_path: Path) -> None:
    with sleeping(tmp_path / "one.pid") as process:
        assert children.reap(tmp_path, "supervisord", grace_s=10) == 1
        assert process.wait() == -signal.SIGTERM
    assert list(tmp_path.iterdir()) == []


def test_process_that_was_given_a_recorded_pid_is_left_alone(tmp_path: Path) -> None:
    with sleeping(tmp_path / "one.pid") as process:
        (tmp_path / "one.pid").write_text(f"{process.pid} another-time TERM\n")
        assert children.reap(tmp_path, "supervisord", grace_s=10) == 0
        assert process.poll() is None
        process.kill()


def test_empty_record_is_no_obstacle(tmp_path: Path) -> None:
    (tmp_path / "one.pid").touch()
    assert children.reap(tmp_path, "supervisord", grace_s=10) == 0
    assert list(tmp_path.iterdir()) == []


def test_folder_is_open_once(tmp_path: Path) -> None:
    first = Folder(tmp_path)
    with pytest.raises(StartError, match=rf"already \(process {os.getpid()}\)"):
        Folder(tmp_path)
    first.close()
    Folder(tmp_path).close()


def test_secrets_are_kept_and_private(tmp_path: Path) -> None:
    first = Folder(tmp_path)
    secret = first.secret("api-key")
    assert first.secret("another") != secret
    first.close()
    second = Folder(tmp_path)
    assert second.secret("api-key") == secret
    second.close()
    assert stat.S_IMODE((tmp_path / "secrets.json").stat().st_mode) == 0o600


def test_port_is_kept_until_somebody_else_has_it(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    port = folder.port("postgres-port")
    assert folder.port("postgres-port") == port
    with socket.create_server(("127.0.0.1", port)):
        assert taken("127.0.0.1", port)
        assert folder.port("postgres-port") != port
    folder.close()


@pytest.mark.parametrize(
    ("uid", "state", "expected"),
    [
        (0, "/s", "/var/lib/positions"),
        (1000, "/s", "/s/positions"),
        (1000, "s", f"{Path.home()}/.local/state/positions"),
        (1000, "", f"{Path.home()}/.local/state/positions"),
    ],
)
def test_data_are_where_the_file_hierarchy_and_xdg_say(
    monkeypatch: pytest.MonkeyPatch, uid: int, state: str, expected: str
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: uid)
    assert default_path({"XDG_STATE_HOME": state}) == Path(expected)


@pytest.mark.parametrize(
    ("named", "own"),
    [
        ({}, Chosen(postgres=True, broker=True, redis=True)),
        ({"POSTGRES_HOST": "db"}, Chosen(postgres=False, broker=True, redis=True)),
        ({"POSITION_MANAGER_BROKER_URL": "amqp://b"}, Chosen(postgres=True, broker=False, redis=True)),
        ({"RABBITMQ_HOST": "b", "REDIS_HOST": "r"}, Chosen(postgres=True, broker=False, redis=False)),
        ({"POSTGRES_PASSWORD": "x", "REDIS_PORT": "1"}, Chosen(postgres=True, broker=True, redis=True)),
    ],
)
def test_server_that_is_named_is_not_run(named: dict[str, str], own: Chosen) -> None:
    assert Chosen.by(settings.load(named)) == own


@pytest.mark.parametrize("name", ["POSTGRES_HOST", "RABBITMQ_HOST"])
def test_invented_events_stay_out_of_servers_that_are_named(name: str) -> None:
    assert Chosen.by(settings.load({})).simulated
    assert not Chosen.by(settings.load({name: "theirs"})).simulated


def test_key_is_required_where_every_server_is_named(tmp_path: Path) -> None:
    named = {"POSTGRES_HOST": "db", "RABBITMQ_HOST": "b", "REDIS_HOST": "r"}
    named["POSITION_MANAGER_DATA_DIR"] = str(tmp_path / "none")
    with pytest.raises(StartError, match="POSITION_MANAGER_API_KEY"):
        Up(settings.load(named), named)
    assert not (tmp_path / "none").exists()


def test_commands_show_no_password(tmp_path: Path) -> None:
    postgres = servers.Postgres(programs=tmp_path, data=tmp_path, port=1, password="hidden")
    valkey = servers.Valkey(program=tmp_path, data=tmp_path / "valkey", port=1, password="hidden")
    valkey.prepare()
    assert "hidden" not in " ".join(postgres.command() + valkey.command())
    assert stat.S_IMODE((tmp_path / "valkey.conf").stat().st_mode) == 0o600


def test_stale_lock_of_postgres_does_not_block_once_its_pid_is_another_program(tmp_path: Path) -> None:
    for name, text in {"PG_VERSION": "18\n", "postmaster.pid": f"{os.getpid()}\n/data\n"}.items():
        (tmp_path / name).write_text(text)
    postgres = tmp_path / "postgres"
    postgres.write_text("#!/bin/sh\necho 'postgres (PostgreSQL) 18.6'\n")
    postgres.chmod(0o700)
    servers.Postgres(programs=tmp_path, data=tmp_path, port=1, password="x").prepare()
    assert not (tmp_path / "postmaster.pid").exists()


def test_data_of_another_major_version_are_refused(tmp_path: Path) -> None:
    (tmp_path / "PG_VERSION").write_text("17\n")
    postgres = tmp_path / "postgres"
    postgres.write_text("#!/bin/sh\necho 'postgres (PostgreSQL) 18.6'\n")
    postgres.chmod(0o700)
    with pytest.raises(StartError, match="made by PostgreSQL 17, and this release brings 18"):
        servers.Postgres(programs=tmp_path, data=tmp_path, port=1, password="x").prepare()


def test_supervisord_runs_the_words_it_is_given(tmp_path: Path) -> None:
    words = ["worker", "--hostname", "worker@%h", "a word"]
    text = config(
        [Program(name="worker", group="app", command=words)],
        groups=("servers", "app"),
        path=tmp_path / "socket",
        logs=tmp_path,
        directory=tmp_path,
        user=None,
    )
    parsed = configparser.RawConfigParser(inline_comment_prefixes=(";", "#"))
    parsed.read_string(text)
    assert shlex.split(parsed["program:worker"]["command"] % {}) == words
    assert parsed["program:worker"]["autostart"] == "false"
    assert parsed["group:app"]["programs"] == "worker"
    assert "group:servers" not in parsed
