"""PostgreSQL reads the literals of a batch's columns as the values they were made of."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from decimal import Decimal

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import Engine

from positions.storage import arrays

KINDS = {"text": "text", "amount": "numeric", "whole": "bigint", "at": "timestamptz"}
# PostgreSQL knows no NUL and no lone surrogates in text; messages with such are refused before.
texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"))
rows = st.tuples(
    st.none() | texts | st.sampled_from(['"', "\\", '\\"', "{}", "NULL", "", " ", "'", "%s", "a,b", "\n"]),
    st.none() | st.decimals(allow_nan=False, allow_infinity=False, places=18, min_value=-(10**20)),
    st.none() | st.integers(-(2**63), 2**63 - 1),
    st.none() | st.datetimes(timezones=st.just(UTC)),
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.lists(rows, min_size=1))
def test_every_value_comes_back_as_it_went(
    engine: Engine, given_: list[tuple[str | None, Decimal | None, int | None, datetime | None]]
) -> None:
    columns = dict(zip(KINDS, zip(*given_, strict=True), strict=True))
    with engine.connect() as connection:
        found = connection.exec_driver_sql(
            f"SELECT * FROM {arrays.unnest(KINDS)}", arrays.literals(KINDS, columns)
        ).all()
    assert [tuple(row) for row in found] == given_


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.lists(st.dictionaries(texts, texts | st.integers() | st.none()) | texts | st.just("\x1e")))
def test_every_json_document_comes_back_as_it_went(engine: Engine, given_: list[object]) -> None:
    kinds = {"body": "json", "state": "jsonb"}
    written = [json.dumps(each) for each in given_]
    parameters = arrays.literals(kinds, {"body": written, "state": written})
    with engine.connect() as connection:
        found = connection.exec_driver_sql(f"SELECT * FROM {arrays.unnest(kinds)}", parameters).all()
    assert [row[0] for row in found] == written
    assert [row[1] for row in found] == given_


@pytest.mark.parametrize("text", ["1E+3", "-0.000000000000000001", "1E-18"])
def test_a_number_keeps_its_digits_however_it_is_written(engine: Engine, text: str) -> None:
    kinds = {"amount": "numeric"}
    with engine.connect() as connection:
        parameters = arrays.literals(kinds, {"amount": [Decimal(text)]})
        found = connection.exec_driver_sql(f"SELECT * FROM {arrays.unnest(kinds)}", parameters).scalar_one()
    assert found == Decimal(text)
