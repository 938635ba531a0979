"""Writes what of docs/reference/ is made from the code: `make docs`. A test tells when it was forgotten."""

from pathlib import Path

from positions import metrics

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


PAGES = {"docs/reference/metrics.md": metrics_page}

if __name__ == "__main__":
    for path, page in PAGES.items():
        (ROOT / path).write_text(page())
