"""GET /metrics: what is counted, over all processes of the pool, and that it stays counted."""
from __future__ import annotations

import json
import os
import re
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from conftest import PATIENCE, Emulator, Stack, eventually, form

SAMPLE = re.compile(r'([a-z_]+)(\{[a-z]+="[A-Za-z0-9_.+]+"\})? (-?\d+(\.\d+)?)')
OF_THE_STORE = re.compile("extract_(store_up|api_tokens|reservations)")  # read at most every few seconds


def samples(stack: Stack) -> dict[str, float]:
    """All samples of /metrics. The text must be as Prometheus reads it: HELP and TYPE first, samples of one metric
    together, no sample twice, names of counters and only those with _total, of a histogram three names."""
    answer = stack.get("/metrics")
    assert answer.headers["Content-Type"] == "text/plain; version=0.0.4; charset=utf-8"
    text = answer.body.decode()
    assert text.endswith("\n")
    found: dict[str, float] = {}
    kinds: dict[str, str] = {}
    helped = current = ""
    for line in text.splitlines():
        if line.startswith("# HELP "):
            _, _, helped, words = line.split(" ", 3)
            assert helped not in kinds and words.endswith(".")
        elif line.startswith("# TYPE "):
            _, _, current, kinds[helped] = line.split(" ")
            assert current == helped and kinds[current] in ("counter", "gauge", "histogram")
            assert current.endswith("_total") == (kinds[current] == "counter")
        else:
            match = SAMPLE.fullmatch(line)
            assert match, line
            assert (re.sub("_(bucket|sum|count)$", "", match[1]) if kinds[current] == "histogram" else match[1]) == current
            assert match[1] + (match[2] or "") not in found
            found[match[1] + (match[2] or "")] = float(match[3])
    names = {name.partition("{")[0] for name in found}
    assert names == {name + part for name, kind in kinds.items()
                     for part in (("_bucket", "_sum", "_count") if kind == "histogram" else ("",))}
    for name in (name for name, kind in kinds.items() if kind == "histogram"):
        buckets = [value for sample, value in found.items() if sample.startswith(f"{name}_bucket")]
        assert buckets == sorted(buckets) and buckets[-1] == found[f'{name}_bucket{{le="+Inf"}}'] == found[f"{name}_count"]
    return found


def gained(before: dict[str, float], after: dict[str, float]) -> dict[str, float]:
    """What has changed, but for what depends on time or on who else asks."""
    before, after = ({name: value for name, value in found.items() if not OF_THE_STORE.match(name)}
                     for found in (before, after))
    assert before.keys() == after.keys()
    return {name: after[name] - before[name] for name in after if after[name] != before[name]
            and not re.search("seconds|batch|log_entries", name)}


def lasted(before: dict[str, float], after: dict[str, float], what: str) -> float:
    """How many more a histogram has counted."""
    return after[f"extract_{what}_duration_seconds_count"] - before[f"extract_{what}_duration_seconds_count"]


@pytest.fixture(scope="module")
def _pool(_emulator: Emulator, certificate: object) -> Iterator[Stack]:
    stack = Stack(_emulator, certificate, processes=3, env={"EXTRACT_SERVER_THREADS": "2"})  # type: ignore[arg-type]
    eventually(lambda: stack.metric("extract_workers") == 6)
    yield stack
    stack.close()


@pytest.fixture
def pool(_pool: Stack, emulator: Emulator) -> Stack:
    """Three processes with two workers each."""
    return _pool


def test_names_and_gauges_of_an_idle_pool(pool: Stack) -> None:
    found = samples(pool)
    assert found["extract_processes"] == 3 and found["extract_workers"] == 6
    assert found["extract_requests_in_flight"] == found["extract_requests_queued"] == found["extract_hint_waiters"] == 0
    codes = {name for name in found if name.startswith("extract_requests_total{")}
    assert {f'extract_requests_total{{code="{code}"}}' for code in (
        "success", "token_expired", "token_unavailable", "no_active_token", "invalid_file", "unsupported_media_type",
        "bad_request", "file_too_large", "unauthenticated", "forbidden", "request_in_progress", "already_processed",
        "rate_limited", "upstream_unavailable", "upstream_rejected", "invalid_answer",
        "upstream_rate_limited", "token_busy", "deadline_exceeded", "store_unavailable", "storage_full", "overloaded",
        "internal_error", "not_found", "method_not_allowed")} == codes
    assert sum(name.startswith("extract_build_info{version=") and value == 1 for name, value in found.items()) == 1


def test_one_extraction(pool: Stack, company: str, pdf: bytes) -> None:
    pool.token(company)
    before = samples(pool)
    answer = pool.post(pdf, company)
    after = samples(pool)
    usage = answer.json()["usage"]
    assert gained(before, after) == {
        'extract_requests_total{code="success"}': 1, 'extract_attempts_total{class="success"}': 1,
        "extract_upload_bytes_total": len(form(pdf, company)[0]),
        **{f'extract_tokens_total{{kind="{kind}"}}': usage[f"{kind}_tokens"]
           for kind in ("input", "output", "thoughts", "cached", "total")}}
    for name in ("extract_gemini_seconds_total", "extract_store_batches_total", "extract_store_batch_items_total"):
        assert after[name] > before[name]
    assert lasted(before, after, "gemini") == 1 and lasted(before, after, "store") >= 2
    eventually(lambda: samples(pool)["extract_log_entries_total"] > before["extract_log_entries_total"])


@pytest.mark.parametrize("steps, code, attempts, retries", [
    ([{"status": 503}, {}], "success", {"transient": 1, "success": 1}, {"transient": 1}),
    ([{"status": 503}, {"text": "no"}, {}], "success", {"transient": 1, "bad_text": 1, "success": 1},
     {"transient": 1, "bad_text": 1}),
    ([{"status": 503}] * 4, "upstream_unavailable", {"transient": 4}, {"transient": 3}),
    ([{"status": 404}], "upstream_rejected", {"rejected": 1}, {}),
    ([{"status": 400}], "invalid_file", {"invalid_input": 1}, {}),
    ([{"status": 403}], "upstream_rate_limited", {"key_doubtful": 1}, {}),
    ([{"text": "no"}] * 2, "invalid_answer", {"bad_text": 2}, {"bad_text": 1}),
    ([{"block_reason": "SAFETY"}], "invalid_file", {"no_answer": 1}, {}),
    ([{"status": 429, "quota_id": "PerDay"}], "upstream_rate_limited", {"daily_quota": 1}, {}),
    ([{"status": 400, "reason": "API_KEY_INVALID"}], "token_unavailable", {"key_invalid": 1}, {}),
    ([{"status": 402}], "token_unavailable", {"key_used_up": 1}, {}),
], ids=lambda value: value if isinstance(value, str) else "")
def test_outcomes_and_attempts(pool: Stack, emulator: Emulator, company: str, pdf: bytes,
                               steps: list[dict[str, object]], code: str, attempts: dict[str, int],
                               retries: dict[str, int]) -> None:
    pool.token(company, f"key-{company}")
    emulator.script(f"key-{company}", *steps)
    before = samples(pool)
    answer = pool.post(pdf, company)
    assert answer.json().get("code", "success") == code
    after = samples(pool)
    changed = gained(before, after)
    assert {name: count for name, count in changed.items() if re.search("requests|attempts|retries", name)} == {
        f'extract_requests_total{{code="{code}"}}': 1,
        **{f'extract_attempts_total{{class="{name}"}}': count for name, count in attempts.items()},
        **{f'extract_retries_total{{class="{name}"}}': count for name, count in retries.items()}}
    assert lasted(before, after, "gemini") == sum(attempts.values())


def test_requests_that_call_nobody(pool: Stack, company: str, pdf: bytes) -> None:
    before = samples(pool)
    pool.post(pdf, company)
    pool.post(b"GIF89a", company)
    pool.post(None, company)
    pool.request("PUT", "/extract")
    pool.get("/readyz")
    changed = gained(before, samples(pool))
    assert {name: count for name, count in changed.items() if "bytes" not in name} == {
        f'extract_requests_total{{code="{code}"}}': 1
        for code in ("no_active_token", "unsupported_media_type", "bad_request", "method_not_allowed")}


def test_unknown_calls(pool: Stack, emulator: Emulator, company: str, pdf: bytes) -> None:
    """Sent whole, and nobody knows what it cost."""
    pool.token(company, f"key-{company}")
    emulator.script(f"key-{company}", {"close": "after_read"})
    before = samples(pool)
    assert pool.post(pdf, company).json()["attempts"] == 2
    assert samples(pool)["extract_unknown_calls_total"] == before["extract_unknown_calls_total"] + 1


def test_counts_of_all_processes_are_summed(pool: Stack, emulator: Emulator, crowd: ThreadPoolExecutor, company: str,
                                            pdf: bytes) -> None:
    """Six calls at a time are two in each process; whichever answers knows of all. Gauges go back to 0."""
    pool.token(company, f"key-{company}")
    before = samples(pool)
    emulator.script(f"key-{company}", *[{"hold": True}] * 6)
    answers = [crowd.submit(pool.post, pdf, company) for _ in range(6)]
    emulator.wait(held=6)
    assert len({row["ProcessID"] for row in pool.sql(
        "SELECT ProcessID FROM TokenReservations WHERE CompanyID = ? AND State = 'open'", company)}) == 3
    answers += [crowd.submit(pool.post, pdf, company) for _ in range(3)]
    eventually(lambda: samples(pool)["extract_requests_queued"] == 3)
    for _ in range(10):
        assert samples(pool)["extract_requests_in_flight"] == 6
    emulator.release()
    assert {answer.result(PATIENCE).status for answer in answers} == {200}
    after = eventually(lambda: s if (s := samples(pool))["extract_requests_in_flight"] == 0 else None)
    assert after["extract_requests_queued"] == 0
    for _ in range(10):
        changed = gained(before, samples(pool))
        assert changed['extract_requests_total{code="success"}'] == 9
        assert changed['extract_attempts_total{class="success"}'] == 9
        assert lasted(before, samples(pool), "gemini") == 9
        assert "extract_requests_in_flight" not in changed


def test_hint_waiters(pool: Stack, emulator: Emulator, company: str, crowd: ThreadPoolExecutor, pdf: bytes) -> None:
    pool.token(company, f"key-{company}")
    emulator.script(f"key-{company}", {"status": 429, "retry_delay": "1s"})
    answer = crowd.submit(pool.post, pdf, company)
    eventually(lambda: samples(pool)["extract_hint_waiters"] == 1)
    assert answer.result(PATIENCE).status == 200
    assert samples(pool)["extract_hint_waiters"] == 0


def counters(found: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in found.items()
            if re.search("_total|_duration_seconds_", name) and "log_entries" not in name}


def test_counts_outlive_the_processes(make_stack: Callable[..., Stack], crowd: ThreadPoolExecutor, emulator: Emulator,
                                      pdf: bytes) -> None:
    """A process killed in a call takes its gauges with it, not its counts, and so does a whole pool; a restarted one
    goes on counting, also with fewer processes than before."""
    pool = make_stack(processes=3, env={"EXTRACT_SERVER_THREADS": "2"})
    pool.allowed_stderr.append(r"^(Child|Spawning child)\[")
    eventually(lambda: pool.metric("extract_workers") == 6)
    pool.token("NT047", "key")
    assert {answer.result(PATIENCE).status for answer in [crowd.submit(pool.post, pdf) for _ in range(30)]} == {200}
    emulator.script("key", {"hold": True})
    doomed = crowd.submit(pool.post, pdf)
    emulator.wait(held=1)
    before = samples(pool)
    assert before['extract_requests_total{code="success"}'] == 30 and before["extract_requests_in_flight"] == 1
    assert before["extract_gemini_duration_seconds_count"] == 30
    victim = pool.sql("SELECT ProcessID FROM TokenReservations WHERE State = 'open'")[0]["ProcessID"]
    os.kill(victim, signal.SIGKILL)
    assert doomed.result(PATIENCE).status == 502
    eventually(lambda: victim not in pool.pids() and samples(pool)["extract_workers"] == 6)
    after = samples(pool)
    assert counters(after) == counters(before)
    assert after["extract_requests_in_flight"] == 0 and after["extract_processes"] == 3

    emulator.script("key", {"hold": True})
    doomed = crowd.submit(pool.post, pdf)
    emulator.wait(held=1)
    before = samples(pool)
    assert pool.pool is not None
    os.killpg(pool.pool.pid, signal.SIGKILL)
    assert doomed.result(PATIENCE).status == 502
    eventually(lambda: pool.get("/healthz").status == 503, "nobody listens any more")
    for processes in (1, 2):
        pool.stop_pool()
        pool.start_pool(processes)
        eventually(lambda: pool.get("/healthz").status == 200)
        eventually(lambda: samples(pool)["extract_workers"] == 2 * processes)
        assert counters(samples(pool)) == counters(before)
        assert samples(pool)["extract_processes"] == processes
        assert samples(pool)["extract_requests_in_flight"] == 0
    assert pool.post(pdf).status == 200
    assert samples(pool)['extract_requests_total{code="success"}'] == 31


def test_depth_of_the_outbox(make_stack: Callable[..., Stack], tmp_path: Path, company: str, pdf: bytes) -> None:
    (tmp_path / "appSetting.txt").write_text("key-fallback\n")
    stack = make_stack(env={"EXTRACT_FALLBACK_KEY_FILE": str(tmp_path / "appSetting.txt"),
                            "EXTRACT_STORE_QUERY_TIMEOUT": "300ms"})
    stack.allowed_stderr += [r" (INFO|WARNING|ERROR) "]

    def depth() -> list[float]:
        return [stack.metric(f'extract_outbox_entries{{state="{state}"}}') for state in ("waiting", "records", "dead")]

    assert depth() == [0, 0, 0]
    with stack.store_away():
        assert stack.post(pdf, company).status == 200
        # reservation and settlement; on SQL Server the release of an acquire too, whose answer nobody heard
        eventually(lambda: depth()[0] in (2, 3) and depth()[1] > 0, "both wait, and log entries do")
        eventually(lambda: stack.metric("extract_outbox_oldest_seconds") >= 1, "they get older")
        shown = json.loads(stack.ctl("outbox", "status", "--json").stdout)[0]  # though the store is away
        assert shown["Waiting"] in (2, 3) and shown["Records"] > 0 and shown["Dead"] == 0 and shown["OldestSeconds"] >= 1
    eventually(lambda: depth() == [0, 0, 0], "all has reached the store")
    assert stack.metric("extract_outbox_oldest_seconds") == 0
    [entry] = stack.rows("SELECT COUNT(*) AS n FROM ApplicationLogs WHERE Message LIKE 'extracted: company=' || ? || ' %'",
                         company)
    assert entry["n"] == 1


def test_tokens_and_reservations(make_stack: Callable[..., Stack], crowd: ThreadPoolExecutor, emulator: Emulator,
                                 pdf: bytes) -> None:
    """What the store says of them, whichever process is asked."""
    pool = make_stack(processes=2, env={"EXTRACT_RETRY_MAX_RETRIES": "0"})

    def says(**wanted: float) -> None:
        names = {"up": "extract_store_up", "near": 'extract_api_tokens_over_threshold{status="Active"}',
                 "open": 'extract_reservations{state="open"}', "unsettled": 'extract_reservations{state="unsettled"}',
                 **{status: f'extract_api_tokens{{status="{status}"}}'
                    for status in ("Active", "Expired", "Exceeded", "Disabled", "other")}}
        for _ in range(10):  # either process
            eventually(lambda: (found := samples(pool)) and {name: found.get(names[name]) for name in wanted} == wanted)

    says(up=1, Active=0, Expired=0, Exceeded=0, Disabled=0, other=0, near=0, open=0, unsettled=0)
    pool.token("NT047", "key", "--limit", "10000000")
    pool.token("NT048", None, "--limit", "1000")
    pool.ctl("token", "set-status", str(pool.token("NT049")), "Expired")
    pool.ctl("token", "set-status", str(pool.token("NT049")), "Disabled")
    pool.sql("UPDATE TokenUsageSummary SET TotalUsedTokens = 900, TotalRemainingTokens = 100 WHERE TokenID = 2")
    emulator.script("key", {"hold": True}, {"hold": True})
    held = [crowd.submit(pool.post, pdf) for _ in range(2)]
    emulator.wait(held=2)
    says(up=1, Active=2, Expired=1, Exceeded=0, Disabled=1, near=1, open=2, unsettled=0)
    emulator.release()
    assert {answer.result(PATIENCE).status for answer in held} == {200}
    emulator.script("key", {"close": "after_read"})
    assert pool.post(pdf).status == 502  # nobody knows what it cost
    says(open=0, unsettled=1)


def test_store_away(make_stack: Callable[..., Stack]) -> None:
    """Then nothing is said of what it holds; all else is, and of no use is a scrape that waits for it."""
    stack = make_stack(env={"EXTRACT_STORE_QUERY_TIMEOUT": "5s"})
    stack.allowed_stderr += [r" (INFO|WARNING|ERROR) "]
    eventually(lambda: samples(stack).get("extract_store_up") == 1)
    with stack.store_away():
        away = eventually(lambda: found if (found := samples(stack))["extract_store_up"] == 0 else None)
        assert not [name for name in away if re.match("extract_(api_tokens|reservations)", name)]
        assert away["extract_processes"] == 1 and away['extract_outbox_entries{state="dead"}'] == 0
    eventually(lambda: samples(stack).get('extract_reservations{state="open"}') == 0)
