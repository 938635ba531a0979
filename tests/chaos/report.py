"""What a chaos run came to, as text and as one HTML file."""

from __future__ import annotations

from collections.abc import Iterator
from html import escape
from statistics import median

from tests.chaos.run import Result, Sample

WIDTH, HEIGHT = 960, 260
SHOWN = 5
"""So many findings of a check are shown."""


def _rates(samples: list[Sample], every_s: float = 1.0) -> list[tuple[float, float]]:
    """Return how many ledger entries a second came in each second of a run."""
    known = [(sample.at_s, sample.applied) for sample in samples if sample.applied is not None]
    rates: list[tuple[float, float]] = []
    if not known:
        return rates
    (start_s, start) = known[0]
    for at_s, applied in known[1:]:
        if at_s - start_s >= every_s:
            rates.append((at_s, (applied - start) / (at_s - start_s)))
            start_s, start = at_s, applied
    return rates


def _verdict(result: Result) -> str:
    if result.control:
        lost = f"{result.lost} of {len(result.market.keys)} events were lost"
        return f"the control fails, as it must: {lost}" if result.lost else "THE CONTROL LOST NOTHING"
    return "every promise was kept" if result.ok else "A PROMISE WAS BROKEN"


def _figures(result: Result) -> Iterator[tuple[str, str]]:
    market, rates = result.market, [rate for _, rate in _rates(result.samples)]
    yield "published", ", ".join(f"{count:,} {name}" for name, count in market.counts.items())
    yield "sent again, unconfirmed", f"{result.republished:,}"
    yield (
        "time",
        f"{result.published_s:.0f} s published, {result.settled_s:.0f} s until all was applied and told",
    )
    if rates:
        mean = len(market.keys) / result.settled_s
        yield "events/s", f"{mean:.0f} on average, {median(rates):.0f} median, {max(rates):.0f} at most"
    yield "position_updated", f"{result.told:,} messages, {result.told_again:,} of them again"
    yield "replies to COMMIT dropped", str(result.swallowed)
    yield "started again", ", ".join(f"{name} {count}x" for name, count in result.restarts.items())


def as_text(result: Result) -> str:
    """Return the report for a terminal."""
    control = ", control: acknowledged at hand-over" if result.control else ""
    lines = [f"Chaos run, seed {result.seed}{control}: {_verdict(result)}", ""]
    lines += [f"{name:30}  {value}" for name, value in _figures(result)]
    lines += ["", "   at s   for s  held up s  fault"]
    lines += [
        f"{fault.at_s:7.1f} {fault.until_s - fault.at_s:7.1f} {fault.held_up_s:10.1f}  {fault.name}"
        + (f" ({fault.detail})" if fault.detail else "")
        for fault in result.faults
    ]
    lines += [
        "",
        "held up: the longest time without a new ledger entry from that fault to the next",
        "",
    ]
    for check in result.checks:
        shown = f" ({check.shown})" if check.shown else ""
        lines.append(f"{'BROKEN' if check.broken else 'kept':6}  {check.promise}{shown}")
        lines += [f"          {each}" for each in check.broken[:SHOWN]]
        if len(check.broken) > SHOWN:
            lines.append(f"          and {len(check.broken) - SHOWN} more")
    return "\n".join(lines) + "\n"


def as_html(result: Result) -> str:
    """Return the report as one file that needs no other."""
    control = " (control)" if result.control else ""
    title = f"Chaos run, seed {result.seed}{control}"
    good = result.ok or (result.control and result.lost)
    figures = "".join(f"<tr><th>{escape(k)}</th><td>{escape(v)}</td></tr>" for k, v in _figures(result))
    faults = "".join(
        f"<tr><td class=n>{fault.at_s:.1f}</td><td class=n>{fault.until_s - fault.at_s:.1f}</td>"
        f"<td class=n>{fault.held_up_s:.1f}</td>"
        f"<td>{escape(fault.name)}</td><td>{escape(fault.detail)}</td></tr>"
        for fault in result.faults
    )
    checks = "".join(
        f"<tr><td class={'bad' if check.broken else 'ok'}>{'broken' if check.broken else 'kept'}</td>"
        f"<td>{escape(check.promise)}</td><td>{escape(check.shown)}</td>"
        f"<td>{'<br>'.join(escape(each) for each in check.broken[:SHOWN])}"
        f"{f'<br>and {len(check.broken) - SHOWN} more' if len(check.broken) > SHOWN else ''}</td></tr>"
        for check in result.checks
    )
    return f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><title>{escape(title)}</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; color: #222 }}
body {{ max-width: 62rem; margin: 2rem auto; padding: 0 1rem }}
table {{ border-collapse: collapse; margin: 1rem 0; width: 100% }}
th, td {{ text-align: left; vertical-align: top }}
th, td {{ padding: .25rem .75rem .25rem 0; border-bottom: 1px solid #ddd }}
.n {{ text-align: right; font-variant-numeric: tabular-nums }}
.ok {{ color: #17692f }} .bad {{ color: #b3261e }}
svg {{ width: 100%; height: auto; font: 11px system-ui, sans-serif }}
</style>
<h1>{escape(title)}</h1>
<p class={"ok" if good else "bad"}><strong>{escape(_verdict(result))}</strong></p>
<table>{figures}</table>
{_chart(result)}
<p>Ledger entries a second; each line is a fault, numbered as below.</p>
<h2>Promises</h2><table>{checks}</table>
<h2>Faults</h2>
<table><tr><th>at s</th><th>for s</th><th>held up s</th><th>fault</th><th></th></tr>{faults}</table>
<p>Held up: the longest time without a new ledger entry from that fault to the next.</p>
</html>
"""


def _chart(result: Result) -> str:
    rates = _rates(result.samples)
    if not rates:
        return ""
    end, top = max(result.settled_s, 1.0), max(*(rate for _, rate in rates), 1.0)
    points = " ".join(
        f"{at_s / end * WIDTH:.1f},{HEIGHT - rate / top * (HEIGHT - 30):.1f}" for at_s, rate in rates
    )
    marks = "".join(
        f'<line x1="{x:.1f}" x2="{x:.1f}" y1="14" y2="{HEIGHT}" stroke="#d98b7f"/>'
        f'<text x="{x:.1f}" y="{11 if number % 2 else 22}" text-anchor="middle" fill="#b3261e">'
        f"{number}</text>"
        for number, x in enumerate((fault.at_s / end * WIDTH for fault in result.faults), 1)
    )
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT + 18}" role="img" aria-label="Ledger entries a second">{marks}'
        f'<polyline points="{points}" fill="none" stroke="#1b5fa7" stroke-width="1.5"/>'
        f'<text x="0" y="{HEIGHT + 14}">0 s</text>'
        f'<text x="{WIDTH}" y="{HEIGHT + 14}" text-anchor="end">{end:.0f} s</text>'
        f'<text x="0" y="40">{top:.0f}/s</text></svg>'
    )
