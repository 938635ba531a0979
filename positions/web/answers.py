"""Answers to what is asked most: with a tag to compare, and given again as long as nothing changed."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from flask import Response, request
from sqlalchemy import Connection

from positions import metrics
from positions.storage import portfolio
from positions.storage.database import transaction
from positions.web.memory import TAG_CHARS, Answer
from positions.web.resources import resources


def kept(
    make: Callable[[Connection], Mapping[str, Any]],
    link: Callable[[Mapping[str, Any]], str | None] = lambda _: None,
) -> Response:
    """Answer the present request with what ``make`` returns, or with the same again if nothing changed.

    The portfolio's version is asked for every time: what was committed before the request is in the answer.

    Args:
        make: makes the answer, JSON-ready.
        link: makes the header that leads from it to its next page.
    """
    answers, question = resources().answers, (request.path, request.query_string)
    asked = resources().version()
    found = answers.get(question, asked)
    if found is None:
        with answers.turn(question):
            found = answers.get(question, asked) or _made(question, make, link)
    return respond(found)


def _made(
    question: object,
    make: Callable[[Connection], Mapping[str, Any]],
    link: Callable[[Mapping[str, Any]], str | None],
) -> Answer:
    with transaction(resources().reads) as connection:
        version = portfolio.version(connection)
        data = make(connection)
    found = replace(Answer.of(data), link=link(data))
    resources().answers.put(question, version, found)
    return found


def respond(answer: Answer) -> Response:
    """Return ``answer``, or 304 to a client that has it."""
    tag = f'W/"{answer.tag}"'
    if "If-None-Match" in request.headers and request.if_none_match.contains_weak(answer.tag):
        return Response(status=304, headers={"ETag": tag})
    headers = {"ETag": tag} if answer.link is None else {"ETag": tag, "Link": answer.link}
    return Response(answer.body, mimetype="application/json", headers=headers)


def kept_by_all(name: str, make: Callable[[Connection], Mapping[str, Mapping[str, Any]]]) -> Response:
    """Answer with ``name`` of what ``make`` returns; all processes share it until something changes.

    Where none of them has it, one computes: what it stores in the cache serves the others.
    """
    own = resources()
    asked = own.version()
    found = own.answers.get(name, asked)
    if found is None:
        with own.answers.turn(name):
            found = own.answers.get(name, asked)
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
        answers = {each: Answer.of(figures) for each, figures in data.items()}
        return made_at, {each: answer.tag.encode() + answer.body for each, answer in answers.items()}

    version, stored, outcome = own.metrics.get(asked, name, made, era=own.version.era)
    metrics.PORTFOLIO_CACHE.inc(outcome)
    found = Answer(stored[TAG_CHARS:], stored[:TAG_CHARS].decode())
    own.answers.put(name, version, found)
    return found
