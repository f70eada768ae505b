"""Limits: descriptors used up; and a pool that is full, which says so at once. Memory: test_memory.py."""
from __future__ import annotations

import os
import resource
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

from e2e.conftest import PATIENCE, Emulator, eventually, refused
from rig import LARGE, Rig

MakeRig = Callable[..., Rig]
KEY = "key-of-the-company"


def descriptors(pid: int) -> set[int]:
    return {int(name) for name in os.listdir(f"/proc/{pid}/fd")}


def test_descriptors_used_up(make_rig: MakeRig, emulator: Emulator, crowd: ThreadPoolExecutor) -> None:
    """Requests that find none are refused or wait; none that was answered is forgotten, and when there are some again all
    is as before."""
    rig = make_rig()
    rig.token(key=KEY)
    [pid] = rig.pids()
    assert rig.send().status == 200
    rig.is_quiet()
    for spare in range(6):  # accept, spool, call, outbox: each is the one that finds none
        rig.limit(resource.RLIMIT_NOFILE, max(descriptors(pid)) + 1 + spare)
        emulator.script(KEY, {"close_connection": True}, repeat=True)  # no worker has one left from before
        answers = [crowd.submit(rig.send, size=(0, LARGE)[n % 2]) for n in range(8)]
        eventually(lambda: sum(answer.done() for answer in answers) >= (1 if spare > 3 else 0))
        rig.limit(resource.RLIMIT_NOFILE, 1024)
        for answer in answers:
            if answer.result(PATIENCE).status != 200:
                refused(answer.result(), answer.result().code, spent=answer.result().json()["spent"])
                assert answer.result().code in ("storage_full", "upstream_unavailable", "store_unavailable")
    emulator.script(KEY)
    assert rig.send().status == 200
    rig.accounted()


def test_no_descriptor_to_accept_with(make_rig: MakeRig, crowd: ThreadPoolExecutor) -> None:
    """Connections wait in the backlog until there is one."""
    rig = make_rig()
    rig.token()
    [pid] = rig.pids()
    rig.limit(resource.RLIMIT_NOFILE, 3)
    answers = [crowd.submit(rig.send) for _ in range(5)]
    rig.rows("SELECT 1 AS x FROM ApplicationLogs WHERE Message LIKE '%no connection can be accepted%'")
    assert not any(answer.done() for answer in answers)
    rig.limit(resource.RLIMIT_NOFILE, 1024)
    assert {answer.result(PATIENCE).status for answer in answers} == {200}
    rig.accounted()


def test_full_pool_refuses_within_100_ms(make_rig: MakeRig, emulator: Emulator, crowd: ThreadPoolExecutor) -> None:
    """Workers and queues of two processes are full. The quickest of some refusals counts: the machine may be busy with
    something else, but a wait that is built in would be in each of them."""
    rig = make_rig(processes=2, env={"EXTRACT_SERVER_THREADS": "2", "EXTRACT_SERVER_QUEUE": "2",
                                     "EXTRACT_SERVER_QUEUE_WAIT": "60s"})
    rig.token(key=KEY)
    emulator.script(KEY, *[{"hold": True}] * 4)
    taken = [crowd.submit(rig.send) for _ in range(8)]
    emulator.wait(held=4)
    eventually(lambda: rig.metric("extract_requests_queued") == 4)
    times = []
    for size in [0] * 20 + [1_000_000] * 10:
        request = rig.upload(size=size)
        begun = time.monotonic()
        answer = rig.send(sent=request)
        times.append(time.monotonic() - begun)
        refused(answer, "overloaded")
    assert min(times[:20]) < 0.1 and min(times[20:]) < 0.1, times
    with closing(rig.begin(rig.upload())) as client:
        assert client.answer().code == "overloaded"
    emulator.release()
    assert {answer.result(PATIENCE).status for answer in taken} == {200}
    rig.accounted()
