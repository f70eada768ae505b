"""A live server that ends in the middle and comes back. Commands of the environment do that: MSSQL_STOP (docker kill …,
systemctl stop) and MSSQL_START, which returns when the server takes logins again."""
from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from conftest import Emulator, SqlServer, Stack, eventually, refused
from test_mssql import LOG_LINES, settled


def test_server_stopped_and_started(live: SqlServer, make_stack: Callable[..., Stack], emulator: Emulator,
                                    crowd: ThreadPoolExecutor, pdf: bytes) -> None:
    """In the middle of extractions. What was answered is settled, once; who was refused was told why."""
    stack = make_stack(processes=2, sql_server=live, env={
        "EXTRACT_SERVER_QUEUE": "256", "EXTRACT_SERVER_QUEUE_WAIT": "100s", "EXTRACT_STORE_POOL_SIZE": "2"})
    stack.allowed_stderr = [LOG_LINES]
    for _ in range(4):
        stack.token()
    answers = list(crowd.map(lambda _: stack.post(pdf), range(20)))
    assert {a.status for a in answers} == {200}
    first = [crowd.submit(stack.post, pdf) for _ in range(150)]
    eventually(lambda: len(stack.sql("SELECT 1 AS x FROM TokenUsageLogs")) > 40)
    subprocess.run(os.environ["MSSQL_STOP"], shell=True, check=True)
    second = [crowd.submit(stack.post, pdf) for _ in range(50)]
    eventually(lambda: any(f.done() and f.result().status == 503 for f in second), "the outage is met by some")
    subprocess.run(os.environ["MSSQL_START"], shell=True, check=True, stdout=subprocess.DEVNULL)
    answers += [f.result() for f in first + second]

    def served() -> bool:
        answers.append(stack.post(pdf))
        return answers[-1].status == 200

    for _ in range(10):
        eventually(served, "the store is found again")
    for answer in answers:
        if answer.status != 200:
            refused(answer, answer.code)
            assert answer.code in ("store_unavailable", "overloaded")
    settled(stack, answers, unserved={a.headers["X-Request-ID"] for a in answers if a.status != 200})
