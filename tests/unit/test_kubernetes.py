"""The manifests under deploy/kubernetes against Kubernetes' own schemas, each other, and the code.

Custom resources (of CloudNativePG, RabbitMQ's operators and KEDA) have no schema here: what they name is
checked, their other fields are not.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from celery.bin.celery import celery

from beat_schedule import JOBS_QUEUE, TASK_QUEUE
from positions import metrics
from positions.cli import cli
from positions.handlers.relay_outbox import CONFIRM_S
from positions.messages.published import EVENT_TYPES, queue_of
from positions.settings import Settings, variables
from positions.tasks.intake import DRAIN_S

FOLDER = Path(__file__).resolve().parents[2] / "deploy" / "kubernetes"
VERSIONS = ("1.30", "1.33")
CUSTOM = ("postgresql.cnpg.io/", "rabbitmq.com/", "keda.sh/", "kustomize.config.k8s.io/")


def documents(folder: str) -> Iterator[dict[str, Any]]:
    """Yield what kustomize would of a folder, as it stands."""
    for name in yaml.safe_load((FOLDER / folder / "kustomization.yaml").read_text())["resources"]:
        yield from yaml.safe_load_all((FOLDER / folder / name).read_text())


BASE, SERVERS, AUTOSCALING = (list(documents(name)) for name in ("base", "servers", "autoscaling"))
EVERYTHING = [*BASE, *SERVERS, *AUTOSCALING]


def named(found: dict[str, Any]) -> str:
    return f"{found['kind']}/{found['metadata']['name']}"


def of_kind(*kinds: str) -> dict[str, dict[str, Any]]:
    return {each["metadata"]["name"]: each for each in EVERYTHING if each["kind"] in kinds}


def pod(workload: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = workload["spec"]["template"]["spec"]
    return found


def container(workload: dict[str, Any]) -> dict[str, Any]:
    (only,) = pod(workload)["containers"]
    return dict(only)


PODS = of_kind("Deployment", "Job")
OURS = {name: each for name, each in PODS.items() if name != "positions-redis"}


def test_every_file_is_part_of_a_kustomization() -> None:
    for folder in FOLDER.iterdir():
        own = yaml.safe_load((folder / "kustomization.yaml").read_text())
        patches = {patch["path"] for patch in own.get("patches", ())}
        files = {file.name for file in folder.iterdir()} - {"kustomization.yaml"}
        assert files == {name for name in own["resources"] if "/" not in name} | patches, folder


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("manifest", EVERYTHING, ids=named)
def test_manifests_are_what_kubernetes_takes(manifest: dict[str, Any], version: str) -> None:
    if not manifest["apiVersion"].startswith(CUSTOM):
        kubernetes_validate.validate(manifest, version, strict=True)


def test_all_processes_are_there() -> None:
    assert set(PODS) - set(OURS) == {"positions-redis"}
    assert set(OURS) == {
        f"positions-{name}" for name in ("migrate", "web", "worker", "jobs", "beat", "relay")
    }


@pytest.mark.parametrize("name", OURS)
def test_every_command_exists(name: str) -> None:
    program, *words = container(OURS[name])["command"]
    if program == "positions":
        assert words[0] in cli.commands
    elif program == "celery":
        assert words[:2] == ["-A", "celery_app"]
        assert words[2] in celery.commands
    else:
        assert [program, *words] == [
            "gunicorn",
            "-c",
            "python:positions.web.gunicorn_conf",
            "positions.web:create_app()",
        ]


def test_every_task_queue_has_its_worker() -> None:
    commands = [container(each)["command"] for each in OURS.values()]
    assert {words[words.index("-Q") + 1] for words in commands if "-Q" in words} == {TASK_QUEUE, JOBS_QUEUE}


def test_every_setting_is_known() -> None:
    base = yaml.safe_load((FOLDER / "base/kustomization.yaml").read_text())
    (config,) = base["configMapGenerator"]
    literals = dict(each.split("=", 1) for each in config["literals"])
    patch = yaml.safe_load((FOLDER / "whole/servers-env.yaml").read_text())
    passed = set(literals) | {each["name"] for step in patch for each in step.get("value", ())}
    assert passed - variables().keys() == set()
    assert passed >= {"POSTGRES_HOST", "RABBITMQ_HOST", "REDIS_HOST"}
    Settings.model_validate(literals)


def test_what_is_patched_in_whole_is_where_the_patch_looks() -> None:
    for name, each in OURS.items():
        references = container(each)["envFrom"]
        assert references[1] == {"secretRef": {"name": "positions-servers"}}, name
        assert "env" not in container(each), name


def test_every_queue_is_the_code_s() -> None:
    ours = {*Settings.model_validate({}).queues, *map(queue_of, EVENT_TYPES)}
    assert {each["spec"]["name"] for each in of_kind("Queue").values()} == ours
    scaled = of_kind("ScaledObject")["positions-worker"]["spec"]
    assert {trigger["metadata"]["queueName"] for trigger in scaled["triggers"]} == set(
        Settings.model_validate({}).queues
    )
    assert scaled["scaleTargetRef"]["name"] in PODS


def test_the_broker_s_user_may_do_what_is_needed_and_no_more() -> None:
    rights = of_kind("Permission")["positions"]["spec"]["permissions"]
    published = [queue_of(name) for name in EVENT_TYPES]
    consumed = list(Settings.model_validate({}).queues)
    own = [*published, TASK_QUEUE, JOBS_QUEUE, "position-manager", "celeryev", "w@h.celery.pidbox"]
    for name in own:
        assert all(re.match(rights[right], name) for right in ("configure", "write", "read")), name
    for name in consumed:
        assert re.match(rights["read"], name)
        assert not re.match(rights["write"], name)
    for name in ("", "orders", "amq.topic", "risk-manager.orders"):
        assert not any(re.match(pattern, name) for pattern in rights.values()), name


def test_selectors_and_secrets_name_what_is_there() -> None:
    for name, each in PODS.items():
        labels = each["spec"]["template"]["metadata"]["labels"]
        assert labels == {"app.kubernetes.io/name": name}
        if each["kind"] == "Deployment":
            assert each["spec"]["selector"]["matchLabels"] == labels
    for each in of_kind("Service", "PodDisruptionBudget").values():
        selector = each["spec"]["selector"]
        name = selector.get("matchLabels", selector)["app.kubernetes.io/name"]
        assert name == each["metadata"]["name"]
        assert name in PODS


def test_every_process_is_scraped_where_it_listens() -> None:
    for process, port in {"web": 4800, **metrics.PORTS}.items():
        workload = OURS[f"positions-{process}"]
        annotations = workload["spec"]["template"]["metadata"]["annotations"]
        assert annotations == {"prometheus.io/scrape": "true", "prometheus.io/port": str(port)}
        assert port in [each["containerPort"] for each in container(workload)["ports"]]
    (rule,) = of_kind("NetworkPolicy")["positions-metrics"]["spec"]["ingress"]
    (allowed,) = rule["ports"]
    assert set(range(allowed["port"], allowed["endPort"] + 1)) == set(metrics.PORTS.values())


def test_nothing_is_killed_while_it_finishes_its_work() -> None:
    grace = {name: pod(each).get("terminationGracePeriodSeconds", 0) for name, each in OURS.items()}
    assert grace["positions-worker"] > DRAIN_S
    assert grace["positions-relay"] > CONFIRM_S


def test_a_disruption_leaves_one_of_each_that_matters() -> None:
    assert set(of_kind("PodDisruptionBudget")) == {
        "positions-web",
        "positions-worker",
        "positions-relay",
    }


@pytest.mark.parametrize("name", PODS)
def test_pods_are_bounded_watched_and_may_do_little(name: str) -> None:
    workload = PODS[name]
    only = container(workload)
    assert pod(workload)["securityContext"]["runAsNonRoot"] is True
    assert pod(workload)["automountServiceAccountToken"] is False
    assert only["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert {"memory"} <= only["resources"]["limits"].keys()
    assert workload["kind"] == "Job" or "livenessProbe" in only


def test_no_secret_is_written_down() -> None:
    assert not of_kind("Secret")
    text = "".join(file.read_text() for file in FOLDER.rglob("*.yaml"))
    assert re.findall(r"(?i)(?:password|secret|key): *['\"]?[A-Za-z0-9]{12,}", text) == []
