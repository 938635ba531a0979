"""Which trace ids are taken over from a request."""

from __future__ import annotations

import re

import pytest
from werkzeug.test import EnvironBuilder

from positions.web.tracing import trace_id_of

TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
OURS = re.compile(r"[0-9a-f]{32}")


def environ(headers: dict[str, str]) -> dict[str, object]:
    """Return what a server makes of a request with these headers."""
    return EnvironBuilder(headers=headers.items()).get_environ()


@pytest.mark.parametrize("given", ["test-trace-001", "a", "A.b:c_d-1", "x" * 128, TRACE])
def test_well_formed_trace_id_is_taken_over(given: str) -> None:
    assert trace_id_of(environ({"X-Trace-Id": given})) == given


@pytest.mark.parametrize("given", ["", " ", "a b", "a\tb", "-a", 'a"b', "é", "x" * 129, "{}", "a,b"])
def test_any_other_is_replaced(given: str) -> None:
    made = trace_id_of(environ({"X-Trace-Id": given}))
    assert OURS.fullmatch(made)
    assert made != trace_id_of(environ({"X-Trace-Id": given}))


def test_traceparent_gives_its_trace_id() -> None:
    assert trace_id_of(environ({"traceparent": f"00-{TRACE}-{PARENT}-01"})) == TRACE
    assert trace_id_of(environ({"traceparent": f"cc-{TRACE}-{PARENT}-01-what-comes-next"})) == TRACE


def test_our_own_header_goes_first() -> None:
    headers = environ({"X-Trace-Id": "mine", "traceparent": f"00-{TRACE}-{PARENT}-01"})
    assert trace_id_of(headers) == "mine"


@pytest.mark.parametrize(
    "given",
    [
        f"ff-{TRACE}-{PARENT}-01",
        f"00-{'0' * 32}-{PARENT}-01",
        f"00-{TRACE}-{'0' * 16}-01",
        f"00-{TRACE.upper()}-{PARENT}-01",
        f"00-{TRACE}-{PARENT}",
        f"00-{TRACE}-{PARENT}-01x",
        f"00-{TRACE[1:]}-{PARENT}-01",
    ],
)
def test_malformed_traceparent_is_not(given: str) -> None:
    made = trace_id_of(environ({"traceparent": given}))
    assert OURS.fullmatch(made)
    assert made not in given.lower()
