"""Writes what of docs/reference/ is made from the code: `make docs`. A test tells when it was forgotten."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
from pydantic import SecretStr

from positions import metrics, settings
from positions.cli import cli
from positions.web import create_app

ROOT = Path(__file__).resolve().parents[1]


def metrics_page() -> str:
    """Return the page about metrics."""
    ports = ", ".join(f"{name} {port}" for name, port in metrics.PORTS.items())
    intro = (
        "The web process answers `/metrics` beside its API, without a key. The others serve it at a port of"
        f" their own: {ports}, unless `POSITION_MANAGER_METRICS_PORT` says otherwise, to this host only,"
        " unless `POSITION_MANAGER_METRICS_HOST` does. Each figure is of all processes of the service that is"
        " scraped: the pool of a worker, the workers of gunicorn. What was counted ends with the service, as"
        " Prometheus expects. Of several web processes, each tells all gauges: use `max`, not `sum`."
    )
    lines = ["# Metrics", "", "Made from `positions/metrics.py` by `make docs`.", "", intro, ""]
    lines += ["Money is exact in the API and a float here.", ""]
    about = {
        "counter": ("Counters", "The rate is what tells: `rate(positions_events_total[5m])`."),
        "histogram": (
            "Histograms",
            "`histogram_quantile(0.99, sum by (le) (rate(positions_commit_duration_seconds_bucket[5m])))`.",
        ),
        "gauge": ("Gauges", "Asked for at a scrape, and kept for five seconds. What is unknown is missing."),
    }
    for kind, (title, said) in about.items():
        lines += [f"## {title}", "", said, "", "| name | labels | from | what |", "|---|---|---|---|"]
        for family in metrics.FAMILIES:
            if family.kind == kind:
                labels = "<br>".join(
                    f"`{label}`" + (f": {', '.join(values)}" if values else "")
                    for label, values in family.labels.items()
                )
                what = family.about.replace("|", "\\|")
                lines.append(f"| `{family.exposed_as}` | {labels} | {', '.join(family.by)} | {what} |")
        lines.append("")
    return "\n".join(lines)


def settings_page() -> str:
    """Return the page about settings."""
    lines = ["# Settings", "", "Made from `positions/settings.py` by `make docs`.", ""]
    intro = (
        "Environment variables, read once at start; an empty one counts as unset. A wrong value ends the"
        " process with a message that names the variable, an unknown `POSITION_MANAGER_*` is warned about."
        " A secret may be in a file: each variable that holds one (password, key, URL of a server) has"
        " another with `_FILE` after its name, for the file's path."
    )
    lines += [intro, "", "| variable | default | what |", "|---|---|---|"]
    for name, field in settings.variables().items():
        about = settings.Settings.model_fields[field]
        what = " ".join(filter(None, (about.description, _bounds(about.metadata))))
        lines.append(f"| `{name}` | {_default(about.default)} | {_cell(what)} |")
    return "\n".join([*lines, ""])


def _bounds(metadata: list[Any]) -> str:
    """Return in words between which numbers a setting must lie."""
    low = next((each.ge for each in metadata if hasattr(each, "ge")), None)
    high = next((each.le for each in metadata if hasattr(each, "le")), None)
    if low is None:
        return ""
    return f"{_number(low)} or more." if high is None else f"{_number(low)} to {_number(high)}."


def _number(value: Any) -> str:
    return f"{int(value) if value == int(value) else value:,}"


def _default(value: Any) -> str:
    if value is None:
        return "unset"
    if isinstance(value, SecretStr):
        return f"`{value.get_secret_value()}`"
    if isinstance(value, tuple):
        return f"`{','.join(value)}`"
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


COMPLETION = {
    "bash": 'eval "$(_POSITIONS_COMPLETE=bash_source positions)"',
    "zsh": 'eval "$(_POSITIONS_COMPLETE=zsh_source positions)"',
    "fish": "_POSITIONS_COMPLETE=fish_source positions | source",
}


def cli_page() -> str:
    """Return the page about the command line."""
    lines = ["# Command line", "", "Made from `positions/cli.py` by `make docs`: what `--help` says.", ""]
    lines += ["Words are completed on TAB once the shell is told how, in its start-up file:", ""]
    lines += ["```sh", *(f"{how}  # {shell}" for shell, how in COMPLETION.items()), "```", ""]
    for words, command in _commands(cli, "positions"):
        # As the command itself is run, below the group with its settings: click keeps the first help it made.
        own = {**cli.context_settings, **command.context_settings}
        context = click.Context(command, info_name=words, terminal_width=100, max_content_width=100, **own)
        lines += [f"## {words}", "", "```", command.get_help(context), "```", ""]
    return "\n".join(lines)


def _commands(command: click.Command, words: str) -> Iterator[tuple[str, click.Command]]:
    yield words, command
    if isinstance(command, click.Group):
        for name, each in sorted(command.commands.items()):
            yield from _commands(each, f"{words} {name}")


def api_page() -> str:
    """Return the page about the API: its addresses, parameters and answers, in short."""
    app = create_app(settings.load({f"{settings.PREFIX}API_KEY": "unused"}))
    document = app.test_client().get("/openapi.json").get_json()
    lines = [
        "# REST API",
        "",
        "Made from `/openapi.json` by `make docs`; that has the shapes of answers too.",
    ]
    lines += ["", document["info"]["description"], ""]
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            lines += [f"## {method.upper()} {path}", "", operation["summary"], ""]
            if operation.get("description"):
                lines += [operation["description"], ""]
            if parameters := operation.get("parameters"):
                also = ", or of a JSON body" if "requestBody" in operation else ""
                lines += [f"| parameter of path, query or header{also} | what |", "|---|---|"]
            for each in parameters or ():
                what = " ".join(filter(None, (each.get("description"), _shape(each["schema"]))))
                lines.append(f"| `{each['name']}` | {_cell(what)} |")
            answers = operation["responses"].items()
            good = [f"{status} ({one['description']})" for status, one in answers if "$ref" not in one]
            bad = [status for status, one in answers if "$ref" in one]
            lines += [*[""] * bool(parameters), f"Answers: {', '.join(good)}. Errors: {', '.join(bad)}.", ""]
    lines += ["## Errors", "", "Problem documents (RFC 9457), as `application/problem+json`.", ""]
    lines += ["| status | what |", "|---|---|"]
    for name, one in document["components"]["responses"].items():
        lines.append(f"| {name.removeprefix('Problem')} | {_cell(one['description'])} |")
    return "\n".join([*lines, ""])


def _shape(schema: dict[str, Any]) -> str:
    """Return in words what a parameter may be."""
    several = schema.get("anyOf", [schema])
    one = next((each for each in several if each.get("type") != "null"), schema)
    words = []
    if "enum" in one:
        words.append("One of " + ", ".join(f"`{each}`" for each in one["enum"]) + ".")
    if "minimum" in one and "maximum" in one:
        words.append(f"{_number(one['minimum'])} to {_number(one['maximum'])}.")
    if (default := schema.get("default", one.get("default"))) is not None:
        words.append(f"Default `{str(default).lower() if isinstance(default, bool) else default}`.")
    return " ".join(words)


PAGES = {
    "docs/reference/api.md": api_page,
    "docs/reference/cli.md": cli_page,
    "docs/reference/metrics.md": metrics_page,
    "docs/reference/settings.md": settings_page,
}

if __name__ == "__main__":
    for path, page in PAGES.items():
        (ROOT / path).write_text(page())
