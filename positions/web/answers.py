"""Answers to what is asked most: with a tag to compare, and given again as long as nothing changed."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from flask import Response, request
from sqlalchemy import Connection
from werkzeug.http import parse_etags

from positions import metrics
from positions.messages.outbound import Json, to_json
from positions.storage import portfolio
from positions.storage.database import transaction
from positions.web.auth import any_key_will_do
from positions.web.memory import TAG_CHARS, Answer, tag_of
from positions.web.resources import resources

# Most of each of the portfolio's figures, and the same in all of them: stored once, and put in where there is
# a character that JSON cannot have.
_BY_ASSET, _HOLE = "by_asset", "\0"


def kept(
    make: Callable[[Connection], Mapping[str, Any]],
    link: Callable[[Mapping[str, Any]], str | None] = lambda _: None,
    *,
    vary: str | None = None,
) -> Response:
    """Answer the present request with what ``make`` returns, or with the same again if nothing changed.

    The portfolio's version is asked for every time: what was committed before the request is in the answer.

    Args:
        make: makes the answer, JSON-ready.
        link: makes the header that leads from it to its next page.
        vary: names the header by which others get another answer.
    """
    answers, question = resources().answers, question_of(request.environ)
    asked = resources().version()
    found = answers.get(question, asked)
    if found is None:
        with answers.turn(question):
            found = answers.get(question, asked)
            if found is None:
                with transaction(resources().reads) as connection:
                    version = portfolio.version(connection)
                    data = make(connection)
                found = _put(question, version, replace(Answer.of(data), link=link(data), vary=vary))
    return respond(found)


def question_of(environ: Mapping[str, Any]) -> tuple[str, str]:
    """Return what a GET asks, by which its answer is kept."""
    return environ["PATH_INFO"], environ["QUERY_STRING"]


def _put(question: object, version: int, answer: Answer) -> Answer:
    rule = request.url_rule
    answer = replace(answer, route=rule.rule if rule and any_key_will_do() else None)
    resources().answers.put(question, version, answer)
    return answer


def respond(answer: Answer) -> Response:
    """Return ``answer``, or 304 to a client that has it."""
    status, headers, body = told(answer, request.environ)
    return Response(body, status, headers)


def told(answer: Answer, environ: Mapping[str, Any]) -> tuple[int, list[tuple[str, str]], bytes]:
    """Return status, headers and body of ``answer`` to a client that may have it."""
    headers = [("ETag", f'W/"{answer.tag}"')]
    if answer.vary:
        headers.append(("Vary", answer.vary))
    if (has := environ.get("HTTP_IF_NONE_MATCH")) and parse_etags(has).contains_weak(answer.tag):
        return 304, headers, b""
    if answer.link:
        headers.append(("Link", answer.link))
    headers += ("Content-Type", "application/json"), ("Content-Length", str(len(answer.body)))
    return 200, headers, answer.body


def kept_by_all(name: str, make: Callable[[Connection], Mapping[str, Mapping[str, Any]]]) -> Response:
    """Answer with ``name`` of what ``make`` returns; all processes share it until something changes.

    Where none of them has it, one computes: what it stores in the cache serves the others.
    """
    own, question = resources(), question_of(request.environ)
    asked = own.version()
    found = own.answers.get(question, asked)
    if found is None:
        with own.answers.turn(name):
            found = own.answers.get(question, asked)
            if found is None:
                return respond(_shared(name, asked, make))
    metrics.PORTFOLIO_CACHE.inc("hit")
    return respond(found)


def _shared(name: str, asked: int, make: Callable[[Connection], Mapping[str, Mapping[str, Any]]]) -> Answer:
    own = resources()

    def made() -> tuple[int, dict[str, bytes]]:
        with transaction(own.reads) as connection:
            made_at = portfolio.version(connection)
            data = make(connection)
        stored = {_BY_ASSET: data[name][_BY_ASSET].text.encode()}
        for each, figures in data.items():
            stored[each] = f"{tag_of(figures)}{to_json({**figures, _BY_ASSET: Json(_HOLE)})}".encode()
        return made_at, stored

    version, (figures, by_asset), outcome = own.metrics.get(
        asked, (name, _BY_ASSET), made, era=own.version.era
    )
    metrics.PORTFOLIO_CACHE.inc(outcome)
    body = figures[TAG_CHARS:].replace(_HOLE.encode(), by_asset, 1)
    found = Answer(body, figures[:TAG_CHARS].decode(), shared=True)
    return _put(question_of(request.environ), version, found)
