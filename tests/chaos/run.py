"""A chaos run: the service at work on servers of its own, while parts are killed, cut off and frozen."""

from __future__ import annotations

import os
import queue
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

import amqp
from sqlalchemy import Engine, func, select
from sqlalchemy.engine import make_url
from sqlalchemy.exc import DBAPIError

from beat_schedule import TASK_QUEUE
from positions.storage import migrate, tables
from positions.storage.database import connect
from tests.chaos.market import Market, Message, make
from tests.chaos.oracle import Check, checks, published
from tests.chaos.proxy import Proxy
from tests.integration.processes import Process, environment
from tests.integration.support import EXECUTION_QUEUE, ORDER_QUEUE, POSITION_QUEUE, channel_of
from tests.services import PostgreSQL, RabbitMQ, Redis, Server, wait_until

QUEUES = (POSITION_QUEUE, EXECUTION_QUEUE, ORDER_QUEUE)
CHUNK = 40
"""Messages published before their confirmations are waited for."""
STILL_S = 90.0
"""A run that makes no progress for so long after its last fault has come to its end."""
BURST = 0.6
"""Share of the messages that is published in bursts, one around each fault."""


@dataclass
class Fault:
    """One fault: what was done, when (seconds from the start), and what it held up."""

    name: str
    at_s: float
    until_s: float = 0.0
    detail: str = ""
    held_up_s: float = 0.0
    """Longest time without a new ledger entry from this fault to the next."""


@dataclass
class Sample:
    """How far everything was at a moment; None while the database was away."""

    at_s: float
    applied: int | None


@dataclass
class Result:
    """What a run came to."""

    seed: int
    control: bool
    market: Market
    faults: list[Fault] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    checks: list[Check] = field(default_factory=list)
    published_s: float = 0.0
    """When the last message was confirmed."""
    settled_s: float = 0.0
    """When all was applied and told."""
    republished: int = 0
    """Messages that were sent again since their confirmation did not come."""
    restarts: dict[str, int] = field(default_factory=dict)
    told: int = 0
    told_again: int = 0
    swallowed: int = 0
    unclean: list[str] = field(default_factory=list)
    """What a worker that was restarted cleanly did otherwise."""

    @property
    def lost(self) -> int:
        return len(self.checks[0].broken)

    @property
    def ok(self) -> bool:
        return not any(check.broken for check in self.checks)


class _Supervised:
    """The service's processes, each started again when it has ended, as a supervisor does."""

    def __init__(self, env: dict[str, str], folder: Path, app: str) -> None:
        def worker(name: str) -> list[str]:
            # No jobs, which ask other hosts.
            return ["celery", "-A", app, "worker", "-n", f"{name}@chaos", "-Q", TASK_QUEUE]

        beat = ["celery", "-A", app, "beat", "-s", str(folder / "schedule")]
        commands = {
            "worker 1": worker("one"),
            "worker 2": worker("two"),
            "relay 1": ["positions.cli", "relay"],
            "relay 2": ["positions.cli", "relay"],
            "beat": [*beat, "--pidfile="],
        }
        self.groups: list[int] = []
        """Process groups that were ever started: a killed main process leaves children behind."""
        self.restarts = dict.fromkeys(commands, 0)
        self.codes: dict[str, int] = {}
        """What each ended with the last time."""
        self._read = dict.fromkeys(commands, 0)
        self.processes: dict[str, Process] = {}
        self._stopping = threading.Event()
        for name, command in commands.items():
            self.processes[name] = Process(command, env, folder / f"{name.replace(' ', '-')}.log")
            self.groups.append(self.processes[name].pid)
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()

    def _watch(self) -> None:
        while not self._stopping.wait(0.3):
            for name, process in self.processes.items():
                if process.ended:
                    self.codes[name] = process.wait()
                    self._read[name] = process.log.stat().st_size
                    process.start()
                    self.groups.append(process.pid)
                    self.restarts[name] += 1

    def consumes(self, name: str) -> bool:
        """Tell whether a worker has begun to consume since it was started last."""
        process = self.processes[name]
        return not process.ended and b"intake_started" in process.log.read_bytes()[self._read[name] :]

    def stop(self, published: Callable[[], bool]) -> None:
        """End all as an operator does: what is in hand is finished, and what it wrote is ``published``."""
        self._stopping.set()
        self._thread.join()
        for name in ("beat", "worker 1", "worker 2"):
            self.processes[name].terminate(limit_s=90)
        wait_until(published, limit_s=60)
        for name in ("relay 1", "relay 2"):
            self.processes[name].terminate(limit_s=30)

    def kill(self) -> None:
        self._stopping.set()
        self._thread.join()
        for group in self.groups:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(group, signal.SIGKILL)
        for process in self.processes.values():
            process.kill()


class _Publishers:
    """Neighbours: they publish with confirmations, and again what was not confirmed."""

    def __init__(self, messages: list[Message], urls: list[str], over_s: float, bursts: int) -> None:
        self._chunks: queue.SimpleQueue[list[Message]] = queue.SimpleQueue()
        for start in range(0, len(messages), CHUNK):
            self._chunks.put(messages[start : start + CHUNK])
        chunks = -(-len(messages) // CHUNK)
        self._burst = int(chunks * BURST / max(1, bursts))
        trickle = max(1, chunks - self._burst * bursts)
        self._interval_s = over_s / trickle
        self._tickets = threading.Semaphore(0)
        self._lock = threading.Lock()
        self.republished = 0
        self._hurry = threading.Event()
        self._threads = [threading.Thread(target=self._work, args=(url,)) for url in urls]
        self._threads.append(threading.Thread(target=self._pace))
        for thread in self._threads:
            thread.start()

    @property
    def done(self) -> bool:
        return not any(thread.is_alive() for thread in self._threads[:-1])

    def burst(self) -> None:
        self._tickets.release(max(1, self._burst))

    def finish(self) -> None:
        """Publish what is left as fast as it goes, and return when all of it is confirmed."""
        self._hurry.set()
        for thread in self._threads:
            thread.join()

    def _pace(self) -> None:
        while not self._chunks.empty():
            self._tickets.release(100 if self._hurry.is_set() else 1)
            self._hurry.wait(0.01 if self._hurry.is_set() else self._interval_s)
        self._tickets.release(1000)

    def _work(self, url: str) -> None:
        while True:
            self._tickets.acquire()
            try:
                open_ = dict(enumerate(self._chunks.get_nowait()))
            except queue.Empty:
                return
            sent: set[int] = set()
            self._publish(url, open_, sent)
            while open_:
                time.sleep(0.3)
                self._publish(url, open_, sent)

    def _publish(self, url: str, open_: dict[int, Message], sent: set[int]) -> None:
        """Publish on a connection of its own; what is confirmed is no longer ``open_``."""
        numbers = dict(enumerate(open_, 1))  # by delivery tag

        def confirmed(tag: int, multiple: bool) -> None:
            for each in [known for known in numbers if known == tag or (multiple and known <= tag)]:
                del open_[numbers.pop(each)]

        with suppress(OSError, amqp.AMQPError):
            connection = channel_of(url)
            try:
                channel = connection.channel()
                channel.confirm_select()
                channel.events["basic_ack"].add(confirmed)
                for number, message in tuple(open_.items()):
                    channel.basic_publish(
                        amqp.Message(message.body, content_type="application/json", delivery_mode=2),
                        exchange="",
                        routing_key=message.queue,
                        mandatory=True,
                    )
                    with self._lock:
                        self.republished += number in sent
                    sent.add(number)
                deadline = time.monotonic() + 15
                while open_ and time.monotonic() < deadline:
                    connection.drain_events(timeout=5)
            finally:
                with suppress(OSError, amqp.AMQPError):
                    connection.close()


class Run:
    """A run from its start to its verdict."""

    def __init__(self, *, seed: int, executions: int, seconds: float, control: bool, folder: Path) -> None:
        self.random = Random(f"faults {seed}")
        self.seconds, self.folder = seconds, folder
        self.result = Result(seed=seed, control=control, market=make(seed, executions))
        self._clock = time.monotonic()

    @property
    def now_s(self) -> float:
        return time.monotonic() - self._clock

    def __call__(self) -> Result:
        with ExitStack() as stack:
            self.postgres = stack.enter_context(PostgreSQL())
            self.rabbitmq = stack.enter_context(RabbitMQ())
            self.redis = stack.enter_context(Redis())
            self.to_postgres, self.to_rabbitmq = Proxy(self.postgres.port), Proxy(self.rabbitmq.port)
            stack.callback(self.to_postgres.close)
            stack.callback(self.to_rabbitmq.close)
            migrate.upgrade(self.postgres.url)
            self._declare()
            self.engine: Engine = connect(self.postgres.url, pool_size=3)
            stack.callback(self.engine.dispose)
            through = make_url(self.postgres.url).set(port=self.to_postgres.port)
            broker = self.rabbitmq.url.replace(f":{self.rabbitmq.port}", f":{self.to_rabbitmq.port}")
            env = environment(through.render_as_string(hide_password=False), broker, self.redis.url)
            app = "tests.chaos.control_app" if self.result.control else "tests.integration.poisoned_app"
            self.service = _Supervised(env, self.folder, app)
            stack.callback(self.service.kill)
            for name in ("worker 1", "worker 2"):
                self.service.processes[name].await_log("intake_started")
            plan = self._plan()
            self._clock = time.monotonic()
            self.publishers = _Publishers(
                self.result.market.messages,
                [self.rabbitmq.url, self.rabbitmq.url, broker],
                self.seconds,
                len(plan),
            )
            stack.callback(self.publishers.finish)
            with self._sampled():
                self._disturb(plan)
                self.publishers.finish()
                self.result.published_s = self.now_s
                self._settle()
                self.result.settled_s = self.now_s
            self._judge()
        return self.result

    def _declare(self) -> None:
        with closing(channel_of(self.rabbitmq.url)) as connection, closing(connection.channel()) as channel:
            for each in QUEUES:
                channel.queue_declare(each, durable=True, auto_delete=False)
        self.rabbitmq.sync_definitions()

    def _plan(self) -> list[Callable[[], str]]:
        """Return the faults in their order: every kind once, then as many more as there is time for."""
        kinds = list(self._kinds())
        each_s = 7.0
        wanted = max(len(kinds), int(self.seconds / each_s))
        plan: list[Callable[[], str]] = []
        while len(plan) < wanted:
            plan += self.random.sample(kinds, len(kinds))
        return plan[:wanted]

    def _kinds(self) -> Iterator[Callable[[], str]]:
        yield self.kill_a_pool_process
        yield self.kill_a_pool_process
        yield self.kill_a_worker
        yield self.kill_a_worker_and_leave_its_children
        yield self.kill_the_relay
        yield self.kill_beat
        yield self.kill_rabbitmq
        yield self.stop_postgresql_immediately
        yield self.cut_connections_to_rabbitmq
        yield self.cut_connections_to_postgresql
        yield self.drop_replies_to_commits
        yield self.freeze_redis
        yield self.freeze_postgresql
        yield self.restart_a_worker_cleanly

    def _disturb(self, plan: list[Callable[[], str]]) -> None:
        for number, fault in enumerate(plan):
            due_s = (number + 0.5) * self.seconds / len(plan)
            time.sleep(max(0.0, due_s - self.now_s))
            before = self._applied() or 0
            self.publishers.burst()
            # It strikes while there is work in hand.
            wait_until(lambda: (self._applied() or 0) > before, limit_s=3)  # noqa: B023
            record = Fault(fault.__name__.replace("_", " "), self.now_s)
            self.result.faults.append(record)
            record.detail = fault()
            record.until_s = self.now_s

    def kill_a_pool_process(self) -> str:
        name = self._a_worker()
        with suppress(OSError):
            for child in self.service.processes[name].children[:1]:
                os.kill(child, signal.SIGKILL)
        return name

    def kill_a_worker(self) -> str:
        name = self._a_worker()
        with suppress(ProcessLookupError):
            os.killpg(self.service.processes[name].pid, signal.SIGKILL)
        return name

    def kill_a_worker_and_leave_its_children(self) -> str:
        name = self._a_worker()
        os.kill(self.service.processes[name].pid, signal.SIGKILL)
        return name

    def restart_a_worker_cleanly(self) -> str:
        name = self._a_worker()
        # One that was killed just before does not listen yet.
        if not wait_until(lambda: self.service.consumes(name), limit_s=60):
            self.result.unclean.append(f"{name} did not begin to consume")
        process, restarts = self.service.processes[name], self.service.restarts[name]
        os.kill(process.pid, signal.SIGTERM)
        if not wait_until(lambda: self.service.restarts[name] > restarts, limit_s=45):
            self.result.unclean.append(f"{name} did not end within 45 s")
        elif code := self.service.codes[name]:
            self.result.unclean.append(f"{name} ended with {code}")
        return name

    def kill_the_relay(self) -> str:
        name = self.random.choice(("relay 1", "relay 2"))
        os.kill(self.service.processes[name].pid, signal.SIGKILL)
        return name

    def kill_beat(self) -> str:
        os.kill(self.service.processes["beat"].pid, signal.SIGKILL)
        return ""

    def kill_rabbitmq(self) -> str:
        self.rabbitmq.sync_definitions()
        self.rabbitmq.kill()
        self.rabbitmq.start()
        return ""

    def stop_postgresql_immediately(self) -> str:
        # No checkpoint, sessions are dropped: it recovers from its log when it starts.
        os.kill(self.postgres.pid, signal.SIGQUIT)
        wait_until(lambda: not self.postgres.running, limit_s=20)
        self.postgres.stop()
        away_s = self.random.uniform(0.2, 3)
        time.sleep(away_s)
        self.postgres.start()
        return f"away for {away_s:.1f} s"

    def cut_connections_to_rabbitmq(self) -> str:
        return f"{self.to_rabbitmq.cut()} connections"

    def cut_connections_to_postgresql(self) -> str:
        return f"{self.to_postgres.cut()} connections"

    def drop_replies_to_commits(self) -> str:
        before, number = self.to_postgres.swallowed, self.random.randint(3, 8)
        self.to_postgres.swallow_commits(number)
        wait_until(lambda: self.to_postgres.swallowed >= before + number, limit_s=3)
        self.to_postgres.swallow_commits(0)
        return f"{self.to_postgres.swallowed - before} replies"

    def freeze_redis(self) -> str:
        return self._frozen(self.redis)

    def freeze_postgresql(self) -> str:
        return self._frozen(self.postgres)

    def _frozen(self, server: Server) -> str:
        seconds = self.random.uniform(1, 4)
        with server.frozen():
            time.sleep(seconds)
        return f"for {seconds:.1f} s"

    def _a_worker(self) -> str:
        return self.random.choice(("worker 1", "worker 2"))

    def _applied(self) -> int | None:
        return self._counts()[0]

    def _counts(self) -> tuple[int | None, int | None]:
        """Return how many entries the ledger and the outbox have; None where nobody can tell."""
        try:
            with self.engine.connect() as connection:
                applied = connection.execute(select(func.count()).select_from(tables.ledger)).scalar_one()
                outbox = connection.execute(select(func.count()).select_from(tables.outbox)).scalar_one()
        except DBAPIError:
            return None, None
        return applied, outbox

    @contextmanager
    def _sampled(self) -> Iterator[None]:
        stopping = threading.Event()

        def sample() -> None:
            while not stopping.wait(0.25):
                applied = self._applied()
                self.result.samples.append(Sample(self.now_s, applied))

        thread = threading.Thread(target=sample)
        thread.start()
        try:
            yield
        finally:
            stopping.set()
            thread.join()

    def _waiting(self) -> dict[str, int]:
        with closing(channel_of(self.rabbitmq.url)) as connection, closing(connection.channel()) as channel:
            return {each: channel.queue_declare(each, passive=True).message_count for each in QUEUES}

    def _settle(self) -> None:
        """Return when nothing is left to do, or no more is done."""

        def rests() -> bool:
            if sum(self._waiting().values()):
                return False
            with self.engine.connect() as connection:
                kept = connection.execute(select(func.count()).select_from(tables.quarantine)).scalar_one()
                keys = connection.execute(
                    select(func.count())
                    .select_from(tables.ledger)
                    .where(tables.ledger.c.kind.in_(("trade", "funding", "order_report")))
                ).scalar_one()
                outbox = connection.execute(select(func.count()).select_from(tables.outbox)).scalar_one()
                tried = connection.execute(select(func.count()).select_from(tables.attempts)).scalar_one()
            market = self.result.market
            return bool(keys >= len(market.keys) and kept >= len(market.poison) and not outbox and not tried)

        def quiet() -> bool:
            """Tell whether nothing happens any more; for a control, which never comes to its goal."""
            before, waiting = self._counts(), sum(self._waiting().values())
            time.sleep(8)
            return not waiting and not before[1] and self._counts() == before

        ended, last, since = quiet if self.result.control else rests, self._counts(), time.monotonic()
        while not ended() and time.monotonic() - since < STILL_S:
            time.sleep(0.3)
            if (now := self._counts()) != last:
                last, since = now, time.monotonic()

    def _judge(self) -> None:
        result = self.result
        self.service.stop(lambda: self._counts()[1] == 0)
        result.restarts = dict(self.service.restarts)
        result.republished = self.publishers.republished
        result.swallowed = self.to_postgres.swallowed
        events = published(self.rabbitmq.url)
        left = {**self._waiting(), "outbox": self._counts()[1] or 0}
        result.checks = checks(self.engine, result.market, events, left)
        result.checks.append(Check("a worker that is stopped cleanly ends in time, with 0", result.unclean))
        result.told = len(events)
        result.told_again = len(events) - len({(each["position_id"], each["version"]) for each in events})
        _time_held_up(result)


def _time_held_up(result: Result) -> None:
    ends = [fault.at_s for fault in result.faults[1:]] + [result.settled_s]
    for fault, end_s in zip(result.faults, ends, strict=True):
        still_s = fault.at_s
        applied = 0
        for sample in result.samples:
            if sample.at_s < fault.at_s:
                applied = sample.applied or applied
            elif sample.at_s <= end_s:
                if sample.applied is None or sample.applied == applied:
                    fault.held_up_s = max(fault.held_up_s, sample.at_s - still_s)
                    continue
                applied, still_s = sample.applied, sample.at_s


def run(*, seed: int, executions: int, seconds: float, control: bool = False, folder: Path) -> Result:
    """Run once and return what it came to.

    Args:
        seed: of the market and of the faults; what the machine makes of the moments is its own.
        executions: how many, beside which there are reports, duplicates and poison.
        seconds: how long messages are published and faults injected; some longer where each kind of fault
            would not find its time.
        control: acknowledge at hand-over, as Celery does by default: events must be lost.
        folder: for the logs of the processes.
    """
    return Run(seed=seed, executions=executions, seconds=seconds, control=control, folder=folder)()
