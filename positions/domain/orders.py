"""From ledger entries to fills: what the cumulative reports of an order imply.

Every function here must run inside :func:`positions.domain.numbers.exact`.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence

from positions.domain.events import Entry, Kind
from positions.domain.leg import Fill, FillOrder
from positions.domain.numbers import ZERO


def order_of(entry: Entry) -> FillOrder:
    """Return where ``entry`` stands among the fills of its position."""
    return FillOrder(entry.executed_at, -1 if entry.venue_seq is None else entry.venue_seq, entry.key)


def fills_of(entries: Iterable[Entry]) -> list[Fill]:
    """Return the fills that ``entries`` of one position stand for, in fill order.

    ``entries`` must hold all entries of an order if they hold one of its reports. An order's executions
    fill its cumulative quantity from below; what its reports, sorted by cumulative quantity, tell beyond
    them is implied: quantity, notional and fee each as the difference to the report before. Nothing
    depends on the order in which entries arrived.
    """
    fills: list[Fill] = []
    reports: defaultdict[str | None, list[Entry]] = defaultdict(list)
    executions: defaultdict[str | None, list[Fill]] = defaultdict(list)
    for entry in entries:
        if entry.kind is Kind.ORDER_REPORT:
            reports[entry.order_id].append(entry)
        elif entry.kind in (Kind.TRADE, Kind.FUNDING):
            fill = _direct(entry)
            fills.append(fill)
            if entry.order_id is not None and fill.quantity:
                executions[entry.order_id].append(fill)
    for order, of_order in reports.items():
        fills.extend(_implied(of_order, executions[order]))
    fills.sort(key=lambda fill: fill.order)
    return fills


def changed_fills(new: Sequence[Entry], of_orders: Sequence[Entry]) -> tuple[list[Fill], list[Fill]]:
    """Return the fills that ``new`` entries add and those they take back, each in fill order.

    An order report takes back what it splits: the fill that a later one of its order had implied.

    Args:
        new: new entries of one position.
        of_orders: all entries, the new ones included, of those of its orders that have order reports.
    """
    if not of_orders:
        return fills_of(new), []
    keys = {entry.key for entry in new}
    reported = {entry.order_id for entry in of_orders}
    before = fills_of(entry for entry in of_orders if entry.key not in keys)
    after = fills_of([*of_orders, *(entry for entry in new if entry.order_id not in reported)])
    known, kept = set(before), set(after)
    return [fill for fill in after if fill not in known], [fill for fill in before if fill not in kept]


def _direct(entry: Entry) -> Fill:
    """Return the fill a trade or a funding payment is."""
    funding = entry.kind is Kind.FUNDING
    fee = entry.fee or ZERO
    return Fill(
        order=order_of(entry),
        leg=entry.leg,
        quantity=ZERO if funding else entry.quantity,
        notional=ZERO if funding else abs(entry.quantity) * entry.price,
        fee=ZERO if funding else fee,
        funding=-fee if funding else ZERO,
    )


def _implied(reports: list[Entry], executions: list[Fill]) -> Iterable[Fill]:
    """Yield the fills that the reports of one order imply beyond its known executions.

    An order works on one leg. A report of a hedge often does not say which, an execution does.
    """
    leg = min(executions, key=lambda fill: fill.order).leg if executions else None
    quantity = sum((abs(fill.quantity) for fill in executions), ZERO)
    notional = sum((fill.notional for fill in executions), ZERO)
    fee = sum((fill.fee for fill in executions), ZERO)
    for report in sorted(reports, key=lambda entry: (abs(entry.quantity), entry.key)):
        cumulative = abs(report.quantity)
        if cumulative <= quantity:
            continue
        total = cumulative * report.price
        paid = fee if report.fee is None else report.fee
        yield Fill(
            order=order_of(report),
            leg=leg or report.leg,
            quantity=(cumulative - quantity).copy_sign(report.quantity),
            notional=total - notional,
            fee=paid - fee,
            funding=ZERO,
            implied=True,
        )
        quantity, notional, fee = cumulative, total, paid
