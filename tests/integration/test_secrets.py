"""No secret is said: in logs at their loudest, errors, task arguments, events, Flower or a command line."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from urllib.parse import quote, urlsplit

import psycopg2
import pytest
import requests
from celery import Celery
from sqlalchemy.engine import make_url

from tests.integration.api import ROOT
from tests.integration.processes import Process, environment, relay, web, worker
from tests.integration.support import EXECUTION_QUEUE, execution, publish
from tests.services import Port, PostgreSQL, RabbitMQ, wait_until

SECRETS = {
    "database": "pg-Tr0ub4dor&3/@:x",
    "broker": "mq-correct-horse",
    "key": "key-battery-staple-0123456789",
    "wrong key": "wrong-key-of-a-client-0123456789",
    "gateway": "gw-hunter2-0123456789",
    "flower": "fl-swordfish-0123456789",
}


@pytest.fixture
def env(
    database_url: str, postgres: PostgreSQL, broker_url: str, rabbitmq: RabbitMQ, redis_url: str
) -> Iterator[dict[str, str]]:
    """Settings of the service with secrets that can be told from any other text."""
    vhost = urlsplit(broker_url).path.strip("/")
    rabbitmq.evaluate(
        f'ok = rabbit_auth_backend_internal:add_user(<<"secret">>, <<"{SECRETS["broker"]}">>, <<"tests">>),'
        f'ok = rabbit_auth_backend_internal:set_permissions(<<"secret">>, <<"{vhost}">>,'
        ' <<".*">>, <<".*">>, <<".*">>, <<"tests">>)'
    )
    admin = make_url(database_url).set(drivername="postgresql").render_as_string(hide_password=False)
    with closing(psycopg2.connect(admin)) as connection, connection.cursor() as cursor:
        connection.autocommit = True
        cursor.execute("CREATE ROLE secret SUPERUSER LOGIN PASSWORD %s", (SECRETS["database"],))
        try:
            yield environment(
                make_url(database_url)
                .set(username="secret", password=SECRETS["database"])
                .render_as_string(hide_password=False),
                broker_url.replace("guest:guest", f"secret:{SECRETS['broker']}"),
                redis_url,
                api_key=SECRETS["key"],
                log_level="DEBUG",
            ) | {
                "WS_GATEWAY_URL": "http://127.0.0.1:9",
                "WS_GATEWAY_API_KEY": SECRETS["gateway"],
                "FLOWER_BASIC_AUTH": f"operator:{SECRETS['flower']}",
            }
        finally:
            cursor.execute("DROP OWNED BY secret CASCADE")
            cursor.execute("DROP ROLE secret")
            rabbitmq.evaluate('rabbit_auth_backend_internal:delete_user(<<"secret">>, <<"tests">>)')
    assert postgres.running


def said(text: str, redis_url: str) -> list[str]:
    """Return which secrets are in ``text``, as they are or as a URL holds them."""
    every = {**SECRETS, "redis": urlsplit(redis_url).password or "none"}
    return [name for name, secret in every.items() if secret in text or quote(secret, "") in text]


def test_running_processes_say_no_secret(
    env: dict[str, str], broker_url: str, redis_url: str, tmp_path: Path
) -> None:
    for name in ("worker", "jobs"):
        (tmp_path / name).mkdir()
    events: list[dict[str, object]] = []
    texts: dict[str, str] = {}
    with ExitStack() as stack:
        running = stack.enter_context(worker(env, tmp_path / "worker", "-E", "-Q", "positions.tasks"))
        publisher = stack.enter_context(relay(env, tmp_path))
        jobs = Process(
            ["celery", "-A", "celery_app", "worker", "-E", "-Q", "positions.jobs", "-n", "jobs@%h"],
            env,
            tmp_path / "jobs" / "jobs.log",
        )
        stack.callback(jobs.kill)
        arguments = ["celery", "-A", "celery_app", "beat", "--pidfile=", "-s", str(tmp_path / "schedule")]
        beat = Process(arguments, env, tmp_path / "beat.log")
        stack.callback(beat.kill)
        port = stack.enter_context(closing(Port())).number
        flower = Process(
            ["celery", "-A", "celery_app", "flower", f"--port={port}"], env, tmp_path / "flower.log"
        )
        stack.callback(flower.kill)
        address = stack.enter_context(web(env, tmp_path))
        for process in (running, publisher, jobs, beat, flower):
            for pid in (process.pid, *process.children):
                texts[f"command line of {process.log.stem}"] = Path(f"/proc/{pid}/cmdline").read_text()

        # What neighbours and clients send, good and bad.
        with Celery(broker=broker_url).connection_for_read() as connection:
            receiver = Celery(broker=broker_url).events.Receiver(connection, handlers={"*": events.append})
            bad = execution("BTCUSDT", "Buy", "many", "100", api_key=SECRETS["wrong key"])
            publish(broker_url, [(EXECUTION_QUEUE, execution("BTCUSDT", "Buy", "1", "100"))])
            publish(broker_url, [(EXECUTION_QUEUE, bad)])
            assert wait_until(
                lambda: sum(event["type"] == "task-succeeded" for event in _captured(receiver, events)) >= 1,
                limit_s=60,
            )
        for key in (SECRETS["key"], SECRETS["wrong key"]):
            for path in ("/positions", "/portfolio", f"/positions?asset={key}", "/events/quarantine", "/x"):
                answer = requests.get(f"{address}/api/v1{path}", headers={"X-API-Key": key}, timeout=30)
                if path != "/events/quarantine" and key not in path:
                    texts[f"answer of {path} to {key[:5]}"] = f"{answer.headers}{answer.text}"
        requests.get(f"{address}/api/v1/positions?api_key={SECRETS['wrong key']}", timeout=30)
        for path in ("/health", "/metrics", "/openapi.json"):
            texts[path] = requests.get(f"{address}{path}", timeout=30).text
        for what in ("conf", "active", "stats", "report", "registered", "reserved"):
            words = [sys.executable, "-m", "celery", "-A", "celery_app", "inspect", what]
            texts[f"inspect {what}"] = _output(words, env)
        auth = ("operator", SECRETS["flower"])
        assert wait_until(lambda: _workers(f"http://127.0.0.1:{port}", auth), limit_s=60)
        names = list(requests.get(f"http://127.0.0.1:{port}/api/workers", auth=auth, timeout=10).json())
        for page in (
            "",
            "tasks",
            "broker",
            "api/workers",
            "api/tasks",
            *(f"worker/{name}" for name in names),
        ):
            got = requests.get(f"http://127.0.0.1:{port}/{page}", auth=auth, timeout=30)
            assert got.status_code == 200, page
            texts[f"Flower's {page}"] = got.text
        assert running.terminate() == 0
    texts["task events"] = repr(events)
    logs = {str(file.relative_to(tmp_path)): file.read_text() for file in tmp_path.rglob("*.log")}
    assert len(logs) >= 6
    assert '"level": "debug"' in logs["worker/worker.log"]
    texts |= logs
    assert {name: found for name, text in texts.items() if (found := said(text, redis_url))} == {}


def _captured(receiver: object, events: list[dict[str, object]]) -> list[dict[str, object]]:
    receiver.capture(limit=1, timeout=2, wakeup=True)  # type: ignore[attr-defined]
    return events


def _workers(address: str, auth: tuple[str, str]) -> bool:
    try:
        return bool(requests.get(f"{address}/api/workers?refresh=1", auth=auth, timeout=20).json())
    except requests.RequestException:
        return False


def _output(words: list[str], env: dict[str, str]) -> str:
    done = subprocess.run(words, env=env, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    return done.stdout + done.stderr


@pytest.mark.parametrize(
    "words",
    [
        ["positions.cli", "migrate"],
        ["positions.cli", "rebuild"],
        ["positions.cli", "quarantine", "list"],
        ["positions.cli", "keys", "list"],
        ["positions.cli", "doctor"],
        [
            "gunicorn",
            "-c",
            "python:positions.web.gunicorn_conf",
            "--check-config",
            "positions.web:create_app()",
        ],
        ["celery", "-A", "celery_app", "inspect", "ping"],
        ["celery", "-A", "celery_app", "report"],
    ],
    ids=lambda words: " ".join(words[:3]),
)
def test_errors_of_connections_say_no_secret(words: list[str], env: dict[str, str], redis_url: str) -> None:
    refused = {
        name: value.replace("secret:", "nobody:")
        for name, value in env.items()
        if name in {"POSITION_MANAGER_DATABASE_URL", "POSITION_MANAGER_BROKER_URL"}
    }
    assert said(_output([sys.executable, "-m", *words], env | refused), redis_url) == []


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("API_KEYS", f'[{{"name": "x", "hash": "{SECRETS["key"]}"}}]'),
        ("API_KEYS", SECRETS["key"]),
        ("RATE_LIMIT_OVERRIDES", f"{SECRETS['key']}:many"),
        ("PORT", SECRETS["key"]),
        ("REDIS_URL", f"http://:{SECRETS['broker']}@127.0.0.1/0"),
        ("DATABASE_URL", f"no-url:{SECRETS['database']}"),
        ("DATABASE_URL", f"postgresql://x:{SECRETS['gateway']}@host:port/x"),
        ("DATABASE_URL", f"mysql://x:{SECRETS['gateway']}@host/x"),
        ("BROKER_URL", f"smtp://x:{SECRETS['broker']}@host"),
    ],
)
def test_a_wrong_setting_is_not_quoted(name: str, value: str, redis_url: str) -> None:
    wrong = environment("postgresql://127.0.0.1:9/x", "amqp://127.0.0.1:9//", redis_url) | {
        f"POSITION_MANAGER_{name}": value
    }
    output = _output([sys.executable, "-m", "positions.cli", "doctor"], wrong)
    assert output.startswith("problem")
    assert f"POSITION_MANAGER_{name}" in output
    assert said(output, redis_url) == []
