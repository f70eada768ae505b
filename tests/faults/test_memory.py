"""A limit of the memory (RLIMIT_AS, as systemd's LimitAS=). A module of its own: a sanitizer reserves more than any limit
leaves, and ends the process where there is none, so it is not collected then (conftest.py)."""
from __future__ import annotations

import resource
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from e2e.conftest import PATIENCE, Emulator, refused
from rig import Rig

MakeRig = Callable[..., Rig]
KEY = "key-of-the-company"


def test_memory_limit(make_rig: MakeRig, emulator: Emulator, crowd: ThreadPoolExecutor) -> None:
    """Large uploads and large answers find no room: each such request is refused by itself; small ones are served."""
    rig = make_rig()
    rig.token(key=KEY)
    assert {answer.result().status for answer in [crowd.submit(rig.send) for _ in range(16)]} == {200}
    [pid] = rig.pids()
    size = next(int(line.split()[1]) << 10 for line in Path(f"/proc/{pid}/status").read_text().splitlines()
                if line.startswith("VmSize"))
    rig.limit(resource.RLIMIT_AS, size + (12 << 20))
    for _ in range(3):
        answers = [crowd.submit(rig.send, size=16_000_000) for _ in range(4)] + [crowd.submit(rig.send) for _ in range(6)]
        for answer in answers[:4]:
            refused(answer.result(PATIENCE), "storage_full")
        assert {answer.result(PATIENCE).status for answer in answers[4:]} == {200}
    emulator.script(KEY, {"size": 15_000_000}, repeat=True)
    answers = [crowd.submit(rig.send) for _ in range(4)]
    for answer in answers:
        if answer.result(PATIENCE).status != 200:
            refused(answer.result(), answer.result().code, spent=answer.result().json()["spent"])
    emulator.script(KEY)
    rig.limit(resource.RLIMIT_AS, resource.RLIM_INFINITY)
    assert {answer.result().status for answer in [crowd.submit(rig.send, size=16_000_000) for _ in range(4)]} == {200}
    rig.accounted()
