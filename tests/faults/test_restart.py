"""Ends and restarts of processes under load: no request is lost, and none is paid for twice."""
from __future__ import annotations

import fcntl
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
from e2e.conftest import PATIENCE, Answer, Emulator, eventually
from rig import Rig

MakeRig = Callable[..., Rig]


@contextmanager
def load(rig: Rig, crowd: ThreadPoolExecutor, clients: int, companies: list[str]) -> Iterator[list[Answer]]:
    """So many clients, each with one request after the other; their answers so far."""
    answers: list[Answer] = []
    stop = threading.Event()

    def client(number: int) -> None:
        while not stop.is_set():
            size = 1_500_000 if len(answers) % 7 == 0 else 0
            answers.append(rig.send(companies[number % len(companies)], size))

    running = [crowd.submit(client, number) for number in range(clients)]
    try:
        yield answers
    finally:
        stop.set()
    for one in running:
        one.result(2 * PATIENCE)


@pytest.mark.parametrize("store", ["sqlite", "mssql"])
def test_rolling_restart(make_rig: MakeRig, emulator: Emulator, crowd: ThreadPoolExecutor, store: str) -> None:
    """Each of three processes on one socket is ended and replaced, twice."""
    rig = make_rig(store, processes=3, env={"EXTRACT_SERVER_THREADS": "2"})
    companies = ["A", "B", "C"]
    for company in companies:
        rig.token(company)
    emulator.script("*", {"delay": 0.01}, repeat=True)
    with load(rig, crowd, 12, companies) as answers:
        for pid in rig.pids() + [0, 0, 0]:
            so_far = len(answers)
            eventually(lambda: len(answers) >= so_far + 12, "the load goes on")
            rig.replace(pid or min(rig.running))
    assert {answer.status for answer in answers} == {200}
    rig.accounted()


def test_all_at_once(make_rig: MakeRig, emulator: Emulator, crowd: ThreadPoolExecutor) -> None:
    """SIGTERM to all under load: what they have taken they finish; what they have not waits for the next ones."""
    rig = make_rig(processes=2, env={"EXTRACT_SERVER_THREADS": "2"})
    rig.token("A")
    emulator.script("*", {"delay": 0.02}, repeat=True)
    with load(rig, crowd, 12, ["A"]) as answers:
        eventually(lambda: len(answers) >= 12)
        rig.stop_pool()
        so_far = len(answers)
        rig.start_pool(2)
        eventually(lambda: len(answers) >= so_far + 24, "the next ones take what waits")
    assert {answer.status for answer in answers} == {200}
    rig.accounted()


def test_signal_while_it_replays(make_rig: MakeRig, emulator: Emulator, crowd: ThreadPoolExecutor) -> None:
    """It ends after the entry that it has in hand; the next start goes on with the others."""
    rig = make_rig(env={"EXTRACT_STORE_QUERY_TIMEOUT": "1s"})
    rig.token(key="key-of-the-test")
    emulator.script("key-of-the-test", *[{"hold": True}] * 3)
    answers = [crowd.submit(rig.send) for _ in range(3)]
    emulator.wait(held=3)

    def replays() -> bool:
        with (rig.dir / "outbox.lock").open() as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return False
            except BlockingIOError:
                return True

    with rig.store_away():
        emulator.release()
        assert {answer.result(PATIENCE).status for answer in answers} == {200}
        eventually(lambda: rig.outbox_rows() == 3 and replays(), "it waits for the store")
        [process] = rig.running.values()
        process.terminate()
    rig.stop_pool()
    rig.start_pool()
    rig.accounted()


def test_second_signal_changes_nothing(make_rig: MakeRig, emulator: Emulator, crowd: ThreadPoolExecutor) -> None:
    rig = make_rig()
    rig.token(key="key-of-the-test")
    emulator.script("key-of-the-test", *[{"hold": True}] * 4)
    answers = [crowd.submit(rig.send) for _ in range(4)]
    emulator.wait(held=4)
    [process] = rig.running.values()
    for _ in range(5):
        process.terminate()
    emulator.release()
    assert {answer.result(PATIENCE).status for answer in answers} == {200}
    rig.stop_pool()
    rig.start_pool()
    rig.accounted()
