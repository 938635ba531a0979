"""docker-compose.yml and Dockerfile against the code: no engine is needed to see what they get wrong.

Read as text: for the little that is asked here the file keeps to a simple form (our services begin with
`<<: *app`, their commands are JSON), and the tests say so where it does not.
"""

from __future__ import annotations

import ast
import json
import re
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from celery.bin.celery import celery

from beat_schedule import JOBS_QUEUE, SCHEDULE, TASK_QUEUE
from positions.cli import cli
from positions.embedded.up import Up
from positions.handlers.relay_outbox import CONFIRM_S
from positions.settings import load, variables
from positions.tasks.intake import DRAIN_S

ROOT = Path(__file__).resolve().parents[2]


def found(pattern: str, text: str) -> list[Any]:
    return re.findall(pattern, text, re.MULTILINE)


SHARED, _, _REST = (ROOT / "docker-compose.yml").read_text().partition("\nservices:\n")
SERVICES = dict(found(r"^  ([a-z]+):\n((?: {4}.*\n|\n)+)", _REST.partition("\nvolumes:\n")[0]))
OURS = {name: block for name, block in SERVICES.items() if "<<: *app" in block}


def command(service: str) -> list[str]:
    (line,) = found(r"^ {4}command: (\[.*\])$", OURS[service])
    words = json.loads(line)
    assert all(isinstance(word, str) for word in words)
    return list(words)


def stop_s(service: str) -> int:
    (seconds,) = found(r"^ {4}stop_grace_period: (\d+)s\b", OURS[service])
    return int(seconds)


def test_all_processes_are_there() -> None:
    assert SERVICES.keys() - OURS.keys() == {"postgres", "rabbitmq", "redis"}
    assert OURS.keys() == {"migrate", "web", "worker", "jobs", "beat", "relay", "flower"}


def test_every_setting_that_is_passed_is_known() -> None:
    text = SHARED + "".join(OURS.values())
    passed = set(found(r"^ +((?:POSITION_MANAGER|POSTGRES|RABBITMQ|REDIS|WS_GATEWAY)_[A-Z_]+):", text))
    assert passed >= {"POSTGRES_HOST", "RABBITMQ_HOST", "REDIS_HOST", "POSITION_MANAGER_API_KEY"}
    assert passed - variables().keys() == set()
    # What is taken from the host under the name of a setting is handed on under that name.
    assert found(r"^ +(\w+): \$\{(?!\1\b)POSITION_MANAGER_", text) == []


@pytest.mark.parametrize("service", OURS)
def test_every_command_exists(service: str) -> None:
    program, *words = command(service)
    if program == "positions":
        assert words[0] in cli.commands
    elif program == "celery":
        option, module, what = words[:3]
        assert option == "-A"
        tree = ast.parse((ROOT / f"{module}.py").read_text())
        names = [
            t.id
            for node in tree.body
            if isinstance(node, ast.Assign)
            for t in node.targets
            if isinstance(t, ast.Name)
        ]
        assert "app" in names
        assert what in celery.commands
    else:
        assert program == "gunicorn"
        option, config, target = words
        assert option == "-c"
        # Not imported: it ends the process where the API key is missing.
        assert find_spec(config.removeprefix("python:"))
        module, factory = target.removesuffix("()").split(":")
        assert callable(getattr(import_module(module), factory))


def queues(words: list[str]) -> str | None:
    return words[words.index("-Q") + 1] if "worker" in words else None


def test_every_queue_of_ours_has_its_worker(tmp_path: Path) -> None:
    declared = [TASK_QUEUE, JOBS_QUEUE]
    assert [queue for name in OURS if (queue := queues(command(name)))] == declared
    app = Up(load({"POSITION_MANAGER_DATA_DIR": str(tmp_path / "data")}), {}).commands()
    assert [queue for words in app.values() if (queue := queues(words))] == declared
    assert {job["queue"] for job in SCHEDULE.values()} <= set(declared)


def test_nothing_is_killed_while_it_finishes_its_work() -> None:
    assert stop_s("worker") > DRAIN_S
    assert stop_s("relay") > CONFIRM_S


def test_no_secret_is_written_down_and_none_may_be_forgotten() -> None:
    text = SHARED + _REST
    values = found(r"^ +\w*(?:PASSWORD|PASS|KEY|AUTH|SECRET)\w*: (.*)$", text)
    assert len(values) >= 8
    # Further keys are hashes; of these there need be none, nor a gateway.
    optional = {"${POSITION_MANAGER_API_KEYS:-}", "${WS_GATEWAY_API_KEY:-}"}
    assert [v for v in values if v not in optional and not re.search(r"\$\{\w+:\?[\w -]+\}$", v)] == []


def test_only_the_api_is_reachable_from_other_hosts() -> None:
    published = {
        name: ports
        for name, block in SERVICES.items()
        if (ports := [p for line in found(r"^ {4}ports: (\[.*\])$", block) for p in json.loads(line)])
    }
    assert sum("ports:" in block for block in SERVICES.values()) == len(published)
    outside = {
        name for name, ports in published.items() if not all(p.startswith("127.0.0.1:") for p in ports)
    }
    assert outside == {"web"}


def test_every_service_is_bounded_and_watched() -> None:
    for name, block in SERVICES.items():
        assert "limits: {cpus:" in block, name
        assert "memory:" in block, name
        assert "restart:" in block or "<<: *app" in block, name
        assert "healthcheck:" in block or name == "migrate", name


def test_what_the_image_copies_exists_and_reaches_the_build() -> None:
    wanted = {
        source
        for line in found(r"^COPY (?!--from)(.*)$", (ROOT / "Dockerfile").read_text())
        for source in line.split()[:-1]
    }
    allowed = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    assert {"requirements.lock", "positions", "migrations"} <= wanted == allowed
    assert [source for source in wanted if not (ROOT / source).exists()] == []
