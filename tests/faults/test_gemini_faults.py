"""Gemini, and the network before it, in every way in which they fail. What was answered with its usage is settled; what may
have been billed is counted as unknown; the pool is as it was before."""
from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from door import Door
from e2e.conftest import PATIENCE, Emulator, eventually, refused
from rig import Rig

MakeRig = Callable[..., Rig]
KEY = "key-of-the-company"
# Short, so that a call is given up; a test whose calls must succeed does not use them.
SHORT = {"EXTRACT_GEMINI_TIMEOUT": "500ms", "EXTRACT_GEMINI_CONNECT_TIMEOUT": "200ms"}
CALLS = 4  # the first, and three retries

# what Gemini does: for each call, how the request ends, was something (perhaps) spent, after how many calls
FAULTS = [
    ("closes before it has read", {"close": "before_read"}, "upstream_unavailable", None, CALLS),
    ("closes instead of an answer", {"close": "after_read"}, "upstream_unavailable", True, CALLS),
    ("resets before it has read", {"reset": "before_read"}, "upstream_unavailable", None, CALLS),
    ("resets instead of an answer", {"reset": "after_read"}, "upstream_unavailable", True, CALLS),
    ("cuts the body", {"cut": 100}, "upstream_unavailable", True, CALLS),
    ("cuts it before its first byte", {"cut": 0}, "upstream_unavailable", True, CALLS),
    ("answers 200 MB", {"size": 200_000_000}, "upstream_unavailable", True, CALLS),
    ("answers 40 MB that are 40 KB", {"size": 40_000_000, "gzip": True}, "upstream_unavailable", True, CALLS),
    ("sends gzip that is damaged", {"gzip": "bad"}, "upstream_unavailable", True, CALLS),
    ("sends a page with status 200", {"body": "<html>Sign in</html>"}, "upstream_unavailable", True, CALLS),
    ("sends a page with status 502", {"status": 502, "body": "<html>Bad gateway</html>"}, "upstream_unavailable", False,
     CALLS),
    ("sends nothing with status 200", {"body": ""}, "upstream_unavailable", True, CALLS),
    ("sends JSON that is none of its own", {"raw_json": {"result": "ok"}}, "upstream_unavailable", True, CALLS),
    ("sends JSON that is no object", {"raw_json": [1, 2, 3]}, "upstream_unavailable", True, CALLS),
    ("sends an array deeper than anyone reads", {"body": "[" * 100_000}, "upstream_unavailable", True, CALLS),
    ("sends half of its JSON as if it were all", {"body": '{"candidates": [{"content": {"par'}, "upstream_unavailable",
     True, CALLS),
    ("says nothing about the usage", {"usage": None, "text": "no JSON"}, "invalid_answer", True, 2),
    ("sends text that is not the JSON asked for", {"text": "Here it is: {"}, "invalid_answer", True, 2),
    ("refuses with 400", {"status": 400}, "invalid_file", False, 1),
    ("redirects", {"status": 302, "headers": {"Location": "http://127.0.0.1:1/"}}, "upstream_rejected", False, 1),
    ("fails with 500", {"status": 500}, "upstream_unavailable", False, CALLS),
]


@pytest.mark.parametrize("step, code, spent, calls", [fault[1:] for fault in FAULTS], ids=[fault[0] for fault in FAULTS])
def test_gemini(make_rig: MakeRig, emulator: Emulator, step: dict[str, Any], code: str, spent: bool | None,
                calls: int) -> None:
    rig = make_rig()
    rig.token(key=KEY)
    emulator.script(KEY, step, repeat=True)
    answer = rig.send()
    refused(answer, code, spent=answer.json()["spent"] if spent is None else spent)
    assert emulator.wait(finished=calls)["calls"] == calls
    emulator.script(KEY)
    assert rig.send().status == 200
    rig.accounted()


@pytest.mark.parametrize("step", [{"delay": 600}, {"trickle": 1}, {"trickle": 0.05}],
                         ids=["never answers", "sends a byte a second", "sends twenty bytes a second"])
def test_gemini_without_an_end(make_rig: MakeRig, emulator: Emulator, step: dict[str, Any]) -> None:
    """The attempt ends with gemini.timeout, whatever came by then."""
    rig = make_rig(env=SHORT)
    rig.token(key=KEY)
    emulator.script(KEY, step, repeat=True)
    refused(rig.send(), "upstream_unavailable", spent=True)
    assert emulator.wait(gone=0, calls=CALLS)["calls"] == CALLS
    rig.accounted()


def test_gemini_fails_once(make_rig: MakeRig, emulator: Emulator, crowd: ThreadPoolExecutor) -> None:
    """Each of the faults before an answer: all are served, what was lost on the way is in the same row."""
    rig = make_rig(processes=2)
    for n, fault in enumerate(FAULTS):
        rig.token(f"C{n}", f"key-of-company-{n}")
        emulator.script(f"key-of-company-{n}", fault[1], {})
    answers = [crowd.submit(rig.send, f"C{n}") for n in range(len(FAULTS))]
    codes = [answer.result(PATIENCE).status for answer in answers]
    assert codes == [200 if fault[4] > 1 else {"invalid_file": 422}.get(fault[2], 502) for fault in FAULTS]
    rig.accounted()


def test_kept_connection_that_dies(make_rig: MakeRig, emulator: Emulator) -> None:
    """The second request finds it dead, after its body was sent: it is an attempt of its own, and never sent by stealth."""
    rig = make_rig(env={"EXTRACT_SERVER_THREADS": "1"})
    rig.token(key=KEY)
    emulator.script(KEY, {}, {"close": "after_read"}, {}, {"die_idle": True}, {})
    answers = [rig.send() for _ in range(4)]
    assert [(answer.status, answer.json()["attempts"]) for answer in answers] == [(200, 1), (200, 2), (200, 1), (200, 1)]
    assert emulator.wait(finished=5)["calls"] == 5
    rig.accounted()


@pytest.mark.parametrize("way", ["refuse", "full", "reset", "black_hole"])
def test_network(make_rig: MakeRig, emulator: Emulator, door: Door, way: str) -> None:
    """Nothing reaches Gemini; what was sent whole to whom it may concern counts as unknown."""
    rig = make_rig(base_url=door.url, env=SHORT)
    token = rig.token(key=KEY)
    assert rig.send().status == 200
    door.turn(way)
    taken = door.taken
    answer = rig.send()
    rig.astray[token] = CALLS if way in ("reset", "black_hole") else 0
    refused(answer, "upstream_unavailable", spent=answer.json()["spent"])
    assert answer.json()["spent"] == (way == "black_hole") or way == "reset"
    assert door.taken - taken == (CALLS if way in ("reset", "black_hole") else 0)
    door.turn("open")
    assert rig.send().status == 200
    assert emulator.wait(finished=2)["calls"] == 2
    rig.accounted()


def test_network_is_cut_in_the_middle(make_rig: MakeRig, emulator: Emulator, door: Door,
                                      crowd: ThreadPoolExecutor) -> None:
    """All connections are reset while calls are held; each is called once more, and both are counted."""
    rig = make_rig(base_url=door.url)
    rig.token(key=KEY)
    emulator.script(KEY, *[{"hold": True}] * 6)
    answers = [crowd.submit(rig.send) for _ in range(6)]
    emulator.wait(held=6)
    door.turn("open")
    eventually(lambda: emulator.wait(calls=0)["gone"] == 6)
    answers = [answer.result(PATIENCE) for answer in answers]
    assert [(answer.status, answer.json()["attempts"]) for answer in answers] == [(200, 2)] * 6
    rig.accounted()


def test_large_uploads_into_a_hole(make_rig: MakeRig, emulator: Emulator, door: Door, crowd: ThreadPoolExecutor) -> None:
    """More than sockets hold: they never left whole, so nothing can have been billed."""
    rig = make_rig(base_url=door.url, env=SHORT)
    rig.token(key=KEY)
    door.turn("black_hole")
    answers = [crowd.submit(rig.send, size=12_000_000) for _ in range(4)]
    for answer in answers:
        refused(answer.result(PATIENCE), "upstream_unavailable", spent=False)
    door.turn("open")
    rig.accounted()
