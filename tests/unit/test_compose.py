"""docker-compose.yml and Dockerfile against the code: no engine is needed to see what they get wrong."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import yaml
from celery.bin.celery import celery

from beat_schedule import JOBS_QUEUE, SCHEDULE, TASK_QUEUE
from positions import metrics
from positions.cli import cli
from positions.embedded.up import Up
from positions.handlers.relay_outbox import CONFIRM_S
from positions.settings import load, secret_files, variables
from positions.tasks.intake import DRAIN_S

ROOT = Path(__file__).resolve().parents[2]
FILE = ROOT / "docker-compose.yml"
WHOLE = yaml.safe_load(FILE.read_text())
SERVICES: dict[str, dict[str, Any]] = WHOLE["services"]
OURS = {name: service for name, service in SERVICES.items() if service["image"] == "positions"}
SETTING = re.compile("(POSITION_MANAGER|POSTGRES|RABBITMQ|REDIS|WS_GATEWAY)_[A-Z_]+")


def command(service: str) -> list[str]:
    """Return what runs in the end, also where a shell reads a password first."""
    words: list[str] = OURS[service]["command"]
    if words[:2] == ["sh", "-c"]:
        (words,) = [line.split()[1:] for line in words[2].splitlines() if line.startswith("exec ")]
    return words


def stop_s(service: str) -> int:
    return int(OURS[service]["stop_grace_period"].removesuffix("s"))


@pytest.mark.parametrize(
    "validator",
    [
        ["docker-compose", "--file", str(FILE), "config", "--quiet"],
        ["check-jsonschema", "--builtin-schema", "vendor.compose-spec", str(FILE)],
    ],
    ids=["docker compose", "compose-spec"],
)
def test_the_file_is_accepted(validator: list[str]) -> None:
    program = Path(sys.executable).with_name(validator[0])
    done = subprocess.run([program, *validator[1:]], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    # A variable that is not set and has no default is only warned about.
    assert not done.stderr


def test_all_processes_are_there() -> None:
    assert SERVICES.keys() - OURS.keys() == {"postgres", "rabbitmq", "redis", "prometheus", "grafana"}
    assert OURS.keys() == {"migrate", "web", "worker", "jobs", "beat", "relay", "flower"}


def test_every_setting_that_is_passed_is_known() -> None:
    for service in OURS.values():
        passed = {name for name in service["environment"] if SETTING.fullmatch(name)}
        assert passed - (variables().keys() | secret_files().keys()) == set()
        # What is taken from the host under the name of a setting is handed on under that name.
        for name, value in service["environment"].items():
            if taken := re.match(r"\$\{(POSITION_MANAGER_\w+)", value):
                assert taken[1] == name


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


def test_secrets_are_files_and_each_service_is_given_its_own_only() -> None:
    for name, service in SERVICES.items():
        told = json.dumps([service.get("environment"), service.get("command"), service.get("healthcheck")])
        if name == "rabbitmq":
            told += "".join(f"/run/secrets/{each}" for each in service["secrets"])  # by run.sh
        if name == "postgres":
            told += (ROOT / "deploy/postgres/roles.sql").read_text()
        assert set(re.findall(r"/run/secrets/(\w+)", told)) == set(service.get("secrets", ())), name
        for variable, value in service.get("environment", {}).items():
            if re.search("PASSWORD|PASS|KEY|AUTH|SECRET", variable):
                # What there need not be is taken from the host's environment, and never written down.
                optional = value == f"${{{variable}:-}}"
                assert optional or variable.endswith("_FILE"), (name, variable)
    made = set(re.findall(r"\b\w+_password\b|\bapi_key\b", (ROOT / "deploy/secrets.sh").read_text()))
    assert made == WHOLE["secrets"].keys()
    assert {each["file"] for each in WHOLE["secrets"].values()} == {f"./secrets/{name}" for name in made}
    assert "secrets/" in (ROOT / ".gitignore").read_text().splitlines()


def test_only_migrations_may_change_the_schema_and_flower_may_read_no_message() -> None:
    roles = {
        name: service["environment"].get("POSTGRES_USER")
        for name, service in OURS.items()
        if "POSTGRES_HOST" in service["environment"]
    }
    assert roles.pop("migrate") == "positions_owner"
    assert set(roles.values()) == {"positions"}
    assert OURS["migrate"]["environment"]["POSITION_MANAGER_DATABASE_ROLE"] == "positions"
    users = {
        name: service["environment"]["RABBITMQ_USER"]
        for name, service in OURS.items()
        if "RABBITMQ_HOST" in service["environment"]
    }
    assert users.pop("flower") == "flower"
    assert set(users.values()) == {"positions"}


def test_only_the_api_is_reachable_from_other_hosts() -> None:
    outside = {
        name
        for name, service in SERVICES.items()
        if not all(port.startswith("127.0.0.1:") for port in service.get("ports", ()))
    }
    assert outside == {"web"}


def test_every_service_is_bounded_and_watched() -> None:
    for name, service in SERVICES.items():
        assert service["deploy"]["resources"]["limits"].keys() == {"cpus", "memory"}, name
        assert service["restart"], name
        assert service["logging"]["options"]["max-size"], name
        assert "healthcheck" in service or name == "migrate", name


def test_what_is_mounted_exists() -> None:
    mounted = [
        volume.split(":")[0]
        for service in SERVICES.values()
        for volume in service.get("volumes", ())
        if volume.startswith("./")
    ]
    assert mounted
    assert [each for each in mounted if not (ROOT / each).exists()] == []


def test_every_process_is_scraped_where_it_listens() -> None:
    jobs = yaml.safe_load((ROOT / "deploy/prometheus/prometheus.yml").read_text())["scrape_configs"]
    scraped = {
        job["job_name"]: (found["names"], found["port"])
        for job in jobs
        for found in job.get("dns_sd_configs", ())
    }
    assert scraped == {name: ([name], port) for name, port in {"web": 4800, **metrics.PORTS}.items()}
    for name in metrics.PORTS:
        assert OURS[name]["environment"]["POSITION_MANAGER_METRICS_HOST"] == "0.0.0.0"


def test_what_the_image_copies_exists_and_reaches_the_build() -> None:
    wanted = {
        source
        for line in re.findall(r"^COPY (?!--from)(.*)$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
        for source in line.split()[:-1]
    }
    allowed = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    assert {"requirements.lock", "positions", "migrations"} <= wanted == allowed
    assert [source for source in wanted if not (ROOT / source).exists()] == []
