"""The retry table, row by row: which calls Gemini saw, what became of the token, what was written down."""
from __future__ import annotations

import json
import math
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import datetime, timedelta, timezone
from email.utils import format_datetime
from typing import Any
from zoneinfo import ZoneInfo

import pytest
from broken import padded_pdf, pdf_minimal, sample
from conftest import IS_LIVE, Answer, Emulator, Stack, eventually, free_port, refused

Step = dict[str, Any]
MakeStack = Callable[..., Stack]
# What a test's name says of a step.
names = lambda value: json.dumps(value)[:60] if isinstance(value, dict) else str(value)[:60]  # noqa: E731


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(8) as executor:
        yield executor


@pytest.fixture(autouse=True)
def calm(_stack: Stack) -> None:
    """Faults of the tests before are not of this minute: they would keep the store from disabling more."""
    _stack.sql("UPDATE TokenMaster SET StatusReason = NULL WHERE StatusReason LIKE 'at fault:%'")


class Tokens(dict[str, int]):
    """API key -> TokenID, of one company."""

    def __init__(self, stack: Stack, company: str, count: int = 1, *arguments: str) -> None:
        super().__init__()
        for number in range(count):
            key = f"key-{number}-{uuid.uuid4().hex}"
            self[key] = stack.token(company, key, *arguments)

    @property
    def key(self) -> str:
        return next(iter(self))

    @property
    def id(self) -> int:
        return self[self.key]


def keys(emulator: Emulator) -> list[str]:
    """Which keys Gemini was called with, in order."""
    return [call["key"] for call in emulator.log()]


def request_id(answer: Answer) -> str:
    return answer.headers["X-Request-ID"]


def token_row(stack: Stack, token: int) -> dict[str, Any]:
    return stack.sql("SELECT * FROM TokenMaster WHERE TokenID = ?", token)[0]


def ended(stack: Stack, answer: Answer) -> None:
    """Waits until all of the request's log entries are there: the last one says how it ended."""
    stack.rows("SELECT 1 FROM ApplicationLogs WHERE RequestID = ? AND FunctionName = 'log_end'", request_id(answer))


def attempts(stack: Stack, answer: Answer, count: int) -> list[dict[str, Any]]:
    """The request's failed attempts, which are exactly so many, without what differs from run to run."""
    ended(stack, answer)
    statement = ("SELECT TokenID, CompanyID, Attempt, ErrorMessage, IsRetryable, RequestID, StatusCode, DelayMs"
                 " FROM RetryAttempts WHERE RequestID = ? ORDER BY RetryID")
    rows = stack.rows(statement, request_id(answer), count=count)
    assert len(rows) == count, rows
    assert all(row.pop("RequestID") == request_id(answer) for row in rows)
    return rows


def reservations(stack: Stack, answer: Answer) -> list[tuple[int | None, str, int]]:
    return [(r["TokenID"], r["State"], r["UnknownCalls"]) for r in stack.sql(
        "SELECT TokenID, State, UnknownCalls FROM TokenReservations WHERE RequestID = ? ORDER BY Sequence",
        request_id(answer))]


def usage_rows(stack: Stack, answer: Answer) -> list[dict[str, Any]]:
    return stack.sql("SELECT TokenID, RequestCount, UnknownCalls, TotalTokensUsed FROM TokenUsageLogs"
                     " WHERE RequestID = ? ORDER BY UsageID", request_id(answer))


def moment(text: str) -> datetime:
    return datetime.fromisoformat(text.replace("Z", "+00:00"))


def cooldown_ms(row: dict[str, Any]) -> int:
    """How long the token was told to cool down: both times are of one transaction."""
    return round((moment(row["CooldownUntil"]) - moment(row["UpdatedAt"])) / timedelta(milliseconds=1))


def backoff(retries_done: int, extra: float = 1.0) -> range:
    """The bounds of a wait with QUICK's settings: 20 ms, doubled, +-50 %, never more than 200 ms."""
    delay = min(20 * 2**retries_done, 200)
    return range(delay // 2, math.ceil(min(delay * 1.5, 200) * extra) + 1)


# ---- retryable: the same token, after a backoff ----

TRANSIENT: list[tuple[Step, int | None, int]] = [  # what comes back, StatusCode, unknown calls
    *(({"status": status}, status, 0) for status in (408, 500, 502, 503, 504)),
    ({"status": 502, "body": "<html>Error 502</html>"}, 502, 0),
    ({"status": 503, "body": ""}, 503, 0),
    ({"status": 503, "reason": "API_KEY_INVALID"}, 503, 0),  # the HTTP code decides before a field
    ({"status": 500, "message": "Your API key was reported as leaked."}, 500, 0),
    ({"status": 503, "retry_delay": "3600s", "quota_id": "RequestsPerDay"}, 503, 0),
    ({"status": 503, "cut": 20}, None, 1),
    ({"close": "after_read"}, None, 1),
    ({"reset": "after_read"}, None, 1),
    ({"cut": 0}, None, 1),
    ({"cut": 200}, None, 1),
    ({"gzip": "bad"}, None, 1),
    ({"size": 17 * 1024 * 1024}, None, 1),
    ({"body": "<html>Please log in</html>"}, 200, 1),
    ({"body": ""}, 200, 1),
    ({"body": '{"candidates": [{"content": {"par', "content_type": "application/json"}, 200, 1),
    ({"raw_json": {}}, 200, 1),
    ({"raw_json": []}, 200, 1),
    ({"raw_json": {"error": {"code": 500, "status": "INTERNAL"}}}, 200, 1),
]


@pytest.mark.parametrize("step, status, unknown", TRANSIENT, ids=names)
def test_transient(stack: Stack, emulator: Emulator, company: str, pdf: bytes, step: Step, status: int | None,
                   unknown: int) -> None:
    tokens = Tokens(stack, company, 1)
    emulator.script(tokens.key, step)
    answer = stack.post(pdf, company)
    assert answer.status == 200, answer.body
    assert answer.json()["attempts"] == 2
    assert keys(emulator) == [tokens.key] * 2
    [row] = attempts(stack, answer, 1)
    assert row.pop("DelayMs") in backoff(0)
    message = row.pop("ErrorMessage")
    assert message.startswith(f"HTTP {status}") if status else len(message) > 5 and "HTTP 200" not in message
    assert row == {"TokenID": tokens.id, "CompanyID": company, "Attempt": 1, "IsRetryable": 1, "StatusCode": status}
    total = answer.json()["usage"]["total_tokens"]
    assert usage_rows(stack, answer) == [{"TokenID": tokens.id, "RequestCount": 1, "UnknownCalls": unknown,
                                          "TotalTokensUsed": total}]
    assert reservations(stack, answer) == [(tokens.id, "settled", unknown)]
    token = token_row(stack, tokens.id)
    assert (token["Status"], token["StatusReason"], token["CooldownUntil"]) == ("Active", None, None)


@pytest.mark.parametrize("step, unknown", [
    ({"status": 503}, 0), ({"status": 502, "body": "<html>"}, 0), ({"reset": "after_read"}, 1), ({"cut": 9}, 1),
    ({"body": "<html>"}, 1)], ids=names)
def test_retries_used_up(stack: Stack, emulator: Emulator, company: str, pdf: bytes, step: Step, unknown: int) -> None:
    tokens = Tokens(stack, company, 2)  # another token would not help
    emulator.script("*", step, repeat=True)
    answer = stack.post(pdf, company)
    refused(answer, "upstream_unavailable", spent=unknown > 0)
    assert len(emulator.log()) == 4
    [key] = set(keys(emulator))
    rows = attempts(stack, answer, 4)
    assert [row["Attempt"] for row in rows] == [1, 2, 3, 4]
    assert all(row["IsRetryable"] == 1 and row["TokenID"] == tokens[key] for row in rows)
    assert all(row["DelayMs"] in backoff(n) for n, row in enumerate(rows[:3]))
    assert rows[3]["DelayMs"] == 0
    assert usage_rows(stack, answer) == []
    assert reservations(stack, answer) == [(tokens[key], "unsettled" if unknown else "released", 4 * unknown)]
    unsettled = stack.sql("SELECT UnknownCalls FROM vw_UnsettledRequests WHERE RequestID = ?", request_id(answer))
    assert unsettled == ([{"UnknownCalls": 4}] if unknown else [])


def test_backoff_grows_without_jitter(make_stack: MakeStack, emulator: Emulator, pdf: bytes) -> None:
    stack = make_stack(env={"EXTRACT_RETRY_JITTER": "no", "EXTRACT_RETRY_INITIAL_DELAY": "20ms",
                            "EXTRACT_RETRY_BACKOFF_MULTIPLIER": "3", "EXTRACT_RETRY_MAX_DELAY": "100ms",
                            "EXTRACT_RETRY_MAX_RETRIES": "4"})
    Tokens(stack, "NT047")
    emulator.script("*", {"status": 503}, repeat=True)
    answer = stack.post(pdf)
    refused(answer, "upstream_unavailable")
    delays = [row["DelayMs"] for row in attempts(stack, answer, 5)]
    assert delays == [20, 60, 100, 100, 0]
    calls = emulator.log()
    for delay, call, following in zip(delays, calls, calls[1:]):
        assert following["time"] - call["time"] >= delay / 1000  # never sooner ("ended" is noted after the answer is away)


def test_no_retries(make_stack: MakeStack, emulator: Emulator, pdf: bytes) -> None:
    stack = make_stack(env={"EXTRACT_RETRY_MAX_RETRIES": "0"})
    Tokens(stack, "NT047", 2)
    emulator.script("*", {"status": 503})
    refused(stack.post(pdf), "upstream_unavailable")
    assert len(emulator.log()) == 1
    # another token at once uses up no retry, so it needs none
    emulator.script("*", {"status": 429, "retry_delay": "3600s"})
    assert stack.post(pdf).json()["attempts"] == 2
    # nor does a wait for the first token
    stack.sql("UPDATE TokenMaster SET CooldownUntil = STRFTIME('%Y-%m-%dT%H:%M:%fZ', 'now', '+0.5 seconds')")
    assert stack.post(pdf).json()["attempts"] == 1


@pytest.mark.parametrize("step, calls", [({"hold": True}, 2), ({"trickle": 0.2}, 2)], ids=names)
def test_timeout_of_an_attempt(make_stack: MakeStack, emulator: Emulator, pdf: bytes, step: Step, calls: int) -> None:
    stack = make_stack(env={"EXTRACT_GEMINI_TIMEOUT": "300ms", "EXTRACT_RETRY_MAX_RETRIES": "1"})
    tokens = Tokens(stack, "NT047")
    emulator.script(tokens.key, step, repeat=True)
    answer = stack.post(pdf)
    refused(answer, "upstream_unavailable", spent=True)
    assert len(emulator.log()) == calls
    rows = attempts(stack, answer, calls)
    assert [(row["StatusCode"], row["IsRetryable"]) for row in rows] == [(None, 1)] * calls
    assert all("timed out" in row["ErrorMessage"] for row in rows)
    assert reservations(stack, answer) == [(tokens.id, "unsettled", calls)]
    emulator.script(tokens.key, step)
    answer = stack.post(pdf)
    assert answer.json()["attempts"] == 2
    assert [(r["RequestCount"], r["UnknownCalls"]) for r in usage_rows(stack, answer)] == [(1, 1)]
    stack.balanced()


@pytest.mark.parametrize("where", ["nobody listens", "no TLS there"])
def test_not_reached(make_stack: MakeStack, emulator: Emulator, pdf: bytes, where: str) -> None:
    base = f"http://127.0.0.1:{free_port()}" if where == "nobody listens" else f"https://127.0.0.1:{emulator.port}"
    stack = make_stack(base_url=base)
    tokens = Tokens(stack, "NT047")
    answer = stack.post(pdf)
    refused(answer, "upstream_unavailable")
    rows = attempts(stack, answer, 4)
    assert {(row["StatusCode"], row["IsRetryable"]) for row in rows} == {(None, 1)}
    assert reservations(stack, answer) == [(tokens.id, "released", 0)]
    assert token_row(stack, tokens.id)["Status"] == "Active"


def test_broken_before_all_was_sent(make_stack: MakeStack, emulator: Emulator) -> None:
    """More than the sockets' buffers hold, and the reader is gone: what was not sent whole was not billed."""
    stack = make_stack(env={"EXTRACT_RETRY_MAX_RETRIES": "0"})
    tokens = Tokens(stack, "NT047")
    emulator.script(tokens.key, {"reset": "before_read"})
    answer = stack.post(padded_pdf(12_000_000))
    refused(answer, "upstream_unavailable")
    assert reservations(stack, answer) == [(tokens.id, "released", 0)]
    assert len(emulator.log()) == 1


# ---- what is sent twice is counted twice ----


@pytest.mark.parametrize("ending", ["close", "reset"])
def test_kept_connection_dies_under_a_call(make_stack: MakeStack, emulator: Emulator, pdf: bytes, ending: str) -> None:
    stack = make_stack(env={"EXTRACT_SERVER_THREADS": "1"})
    tokens = Tokens(stack, "NT047")
    emulator.script(tokens.key, {}, {ending: "after_read"})
    assert stack.post(pdf).json()["attempts"] == 1
    answer = stack.post(pdf)
    calls = emulator.log()
    assert calls[0]["connection"] == calls[1]["connection"], "the second call went out on the kept connection"
    assert answer.json()["attempts"] == 2
    assert len(calls) == 3, "one call each attempt: nothing is sent again behind our back"
    [row] = attempts(stack, answer, 1)
    assert (row["StatusCode"], row["IsRetryable"]) == (None, 1)
    assert [(r["RequestCount"], r["UnknownCalls"]) for r in usage_rows(stack, answer)] == [(1, 1)]


def test_kept_connection_dies_while_idle(make_stack: MakeStack, emulator: Emulator, pdf: bytes) -> None:
    stack = make_stack(env={"EXTRACT_SERVER_THREADS": "1"})
    tokens = Tokens(stack, "NT047")
    emulator.script(tokens.key, {"die_idle": True}, repeat=True)
    made = sum(stack.post(pdf).json()["attempts"] for _ in range(5))
    assert len(emulator.log()) == made
    rows = stack.sql("SELECT RequestCount FROM TokenUsageLogs")
    assert rows == [{"RequestCount": 1}] * 5


# ---- another token at once ----

LEAKED = "Your API key was reported as leaked. Please use another API key."
SUSPENDED = "Permission denied: Consumer has been suspended."
# What comes back, Status then, cooldown in ms (None: none), IsRetryable.
OTHER_TOKEN: list[tuple[Step, str, int | range | None, int]] = [
    ({"status": 429, "retry_delay": "45.837906927s"}, "Active", 45838, 1),
    ({"status": 429, "retry_delay": "45s"}, "Active", 45000, 1),
    ({"status": 429, "retry_delay": "0.9999s"}, "Active", 1000, 1),
    ({"status": 429, "retry_delay": "7s", "retry_after": 9}, "Active", 9000, 1),
    ({"status": 429, "retry_delay": "9s", "retry_after": 7}, "Active", 9000, 1),
    ({"status": 429, "retry_after": 30}, "Active", 30000, 1),
    ({"status": 429, "body": "<html>slow down</html>", "retry_after": 30}, "Active", 30000, 1),
    ({"status": 429, "retry_delay": "30s", "quota_id": "GenerateRequestsPerMinutePerProjectPerModel"},
     "Active", 30000, 1),
    ({"status": 429, "retry_delay": "30s", "reason": "API_KEY_INVALID"}, "Active", 30000, 1),
    ({"status": 429, "retry_delay": "999999999s"}, "Active", 86_400_000, 1),
    ({"status": 429}, "Active", backoff(0), 1),
    ({"status": 429, "retry_delay": "soon"}, "Active", backoff(0), 1),
    ({"status": 429, "retry_delay": "-5s"}, "Active", backoff(0), 1),
    ({"status": 429, "body": "<html>slow down</html>"}, "Active", backoff(0), 1),
    ({"status": 401}, "Active", 600_000, 0),
    ({"status": 403}, "Active", 600_000, 0),
    ({"status": 403, "reason": "SERVICE_DISABLED"}, "Active", 600_000, 0),
    ({"status": 403, "body": "<html>Forbidden by proxy</html>"}, "Active", 600_000, 0),
    ({"status": 403, "body": f"<html>{LEAKED}</html>"}, "Active", 600_000, 0),  # not Google's JSON
    ({"status": 401, "body": '{"reason": "API_KEY_INVALID"}'}, "Active", 600_000, 0),
    ({"status": 402}, "Exceeded", None, 0),
    ({"status": 402, "body": "<html>"}, "Exceeded", None, 0),
    ({"status": 402, "retry_delay": "30s", "reason": "API_KEY_INVALID"}, "Exceeded", None, 0),
    ({"status": 400, "reason": "API_KEY_INVALID"}, "Disabled", None, 0),
    ({"status": 401, "reason": "API_KEY_EXPIRED"}, "Disabled", None, 0),
    ({"status": 403, "reason": "API_KEY_SERVICE_BLOCKED"}, "Disabled", None, 0),
    ({"status": 403, "reason": "CONSUMER_SUSPENDED", "message": SUSPENDED}, "Disabled", None, 0),
    ({"status": 403, "message": LEAKED}, "Disabled", None, 0),
    ({"status": 400, "message": LEAKED.upper()}, "Disabled", None, 0),
    ({"status": 403, "raw_json": [{"error": {"code": 403, "message": LEAKED, "status": "PERMISSION_DENIED"}}]},
     "Disabled", None, 0),
]


@pytest.mark.parametrize("step, status, cooldown, retryable", OTHER_TOKEN, ids=names)
def test_another_token_at_once(stack: Stack, emulator: Emulator, company: str, pdf: bytes, step: Step, status: str,
                               cooldown: int | range | None, retryable: int) -> None:
    tokens = Tokens(stack, company, 2)
    emulator.script("*", step)
    answer = stack.post(pdf, company)
    assert answer.status == 200, answer.body
    assert answer.json()["attempts"] == 2
    first, second = keys(emulator)
    assert {first, second} == set(tokens)
    [row] = attempts(stack, answer, 1)
    message = row.pop("ErrorMessage")
    assert message.startswith(f"HTTP {step['status']}")
    assert row == {"TokenID": tokens[first], "CompanyID": company, "Attempt": 1, "IsRetryable": retryable,
                   "StatusCode": step["status"], "DelayMs": 0}
    token = token_row(stack, tokens[first])
    assert token["Status"] == status
    if cooldown is None:
        assert token["CooldownUntil"] is None
        [audit] = stack.sql("SELECT * FROM AuditLog WHERE ObjectID = ? AND Actor = 'extract-fcgi'", str(tokens[first]))
        assert (audit["Action"], audit["CompanyID"], audit["RequestID"]) \
            == ("token status changed", company, request_id(answer))
        assert audit["Detail"].startswith(f"Active to {status}: ")
    elif isinstance(cooldown, int):
        assert cooldown_ms(token) == cooldown
    else:
        assert cooldown_ms(token) in cooldown
    assert message in token["StatusReason"]
    other = token_row(stack, tokens[second])
    assert (other["Status"], other["CooldownUntil"], other["StatusReason"]) == ("Active", None, None)
    assert reservations(stack, answer) == [(tokens[first], "released", 0), (tokens[second], "settled", 0)]
    assert [(r["TokenID"], r["RequestCount"]) for r in usage_rows(stack, answer)] == [(tokens[second], 1)]


def test_retry_after_as_a_date(stack: Stack, emulator: Emulator, company: str, pdf: bytes) -> None:
    tokens = Tokens(stack, company, 2)
    until = datetime.now(timezone.utc).replace(microsecond=0) + timedelta(hours=1)
    emulator.script("*", {"status": 429, "retry_after": format_datetime(until, usegmt=True)})
    assert stack.post(pdf, company).status == 200
    cooled = moment(token_row(stack, tokens[keys(emulator)[0]])["CooldownUntil"])
    assert abs(cooled - until) < timedelta(seconds=2)


def test_another_token_uses_up_no_retry(stack: Stack, emulator: Emulator, company: str, pdf: bytes) -> None:
    """Five are at their limit, with three retries; the sixth serves."""
    tokens = Tokens(stack, company, 6)
    emulator.script("*", *[{"status": 429, "retry_delay": "3600s"}] * 5)
    answer = stack.post(pdf, company)
    assert answer.status == 200
    assert answer.json()["attempts"] == 6
    assert sorted(keys(emulator)) == sorted(tokens), "each token once"
    rows = attempts(stack, answer, 5)
    assert [(row["TokenID"], row["Attempt"], row["DelayMs"]) for row in rows] \
        == [(tokens[key], number, 0) for number, key in enumerate(keys(emulator)[:5], 1)]
    # and all retries are still there after five others
    emulator.reset()
    emulator.script("*", {"status": 503}, {"status": 503}, {"status": 503})
    assert stack.post(pdf, company).json()["attempts"] == 4


def test_failover_then_transient(stack: Stack, emulator: Emulator, company: str, pdf: bytes) -> None:
    tokens = Tokens(stack, company, 3)
    emulator.script("*", {"status": 503}, {"status": 429, "retry_delay": "3600s"}, {"status": 503}, {"status": 402},
                    {"status": 503})
    answer = stack.post(pdf, company)
    assert answer.json()["attempts"] == 6
    called = [tokens[key] for key in keys(emulator)]
    assert called[0] == called[1] != called[2] == called[3] != called[4] == called[5] != called[0]
    rows = attempts(stack, answer, 5)
    assert [row["StatusCode"] for row in rows] == [503, 429, 503, 402, 503]
    assert [row["TokenID"] for row in rows] == called[:5]
    assert [row["DelayMs"] > 0 for row in rows] == [True, False, True, False, True]
    assert rows[4]["DelayMs"] in backoff(2)


def test_all_tokens_at_their_limit(stack: Stack, emulator: Emulator, company: str, pdf: bytes) -> None:
    """Longer than the deadline allows: 503, until the first is usable again, rounded up."""
    tokens = Tokens(stack, company, 3)
    for key, hint in zip(tokens, ("4000s", "200.9s", "5000s")):
        emulator.script(key, {"status": 429, "retry_delay": hint})
    answer = stack.post(pdf, company)
    refused(answer, "upstream_rate_limited", retry_after=201)
    assert sorted(keys(emulator)) == sorted(tokens)
    assert len(attempts(stack, answer, 3)) == 3
    assert {state for _, state, _ in reservations(stack, answer)} == {"released"}
    # the next request asks none of them
    later = stack.post(pdf, company)
    refused(later, "upstream_rate_limited")
    assert 195 <= int(later.headers["Retry-After"]) <= 201
    assert len(emulator.log()) == 3
    assert reservations(stack, later) == []


@pytest.mark.parametrize("hint, seconds", [("200.2s", 201), ("200s", 200), ("3600.001s", 3601)])
def test_hint_longer_than_the_deadline(stack: Stack, emulator: Emulator, company: str, pdf: bytes, hint: str,
                                       seconds: int) -> None:
    tokens = Tokens(stack, company)
    emulator.script(tokens.key, {"status": 429, "retry_delay": hint})
    answer = stack.post(pdf, company)
    refused(answer, "upstream_rate_limited", retry_after=seconds)
    [row] = attempts(stack, answer, 1)
    assert (row["StatusCode"], row["IsRetryable"], row["DelayMs"]) == (429, 1, 0)
    assert len(emulator.log()) == 1


def test_waits_for_a_short_hint(stack: Stack, emulator: Emulator, company: str, pdf: bytes) -> None:
    tokens = Tokens(stack, company)
    emulator.script(tokens.key, {"status": 429, "retry_delay": "0.0501s"})
    answer = stack.post(pdf, company)
    assert answer.json()["attempts"] == 2
    [row] = attempts(stack, answer, 1)
    assert row["DelayMs"] in range(0 if IS_LIVE else 51, 58)  # 0 to 10 % more, less what a slow server's own calls take
    assert cooldown_ms(token_row(stack, tokens.id)) == 51
    first, second = emulator.log()
    assert second["time"] - first["time"] >= 0.050
    assert reservations(stack, answer)[0] == (tokens.id, "released", 0)
    assert reservations(stack, answer)[-1] == (tokens.id, "settled", 0)


def test_waits_for_the_first_that_is_usable(stack: Stack, emulator: Emulator, company: str, pdf: bytes) -> None:
    tokens = Tokens(stack, company, 2)
    slow, quick = tokens
    emulator.script(slow, {"status": 429, "retry_delay": "3600s"}, repeat=True)
    emulator.script(quick, {"status": 429, "retry_delay": "0.05s"})
    answer = stack.post(pdf, company)
    assert answer.json()["attempts"] in (2, 3)
    assert keys(emulator)[-2:] in ([quick, quick], [slow, quick])
    assert keys(emulator).count(slow) <= 1


def test_no_hint_waits_as_long_as_the_backoff(stack: Stack, emulator: Emulator, company: str, pdf: bytes) -> None:
    tokens = Tokens(stack, company)
    emulator.script(tokens.key, {"status": 429}, {"status": 429})
    answer = stack.post(pdf, company)
    assert answer.json()["attempts"] == 3
    rows = attempts(stack, answer, 2)
    assert rows[0]["DelayMs"] in backoff(0, 1.1) and rows[1]["DelayMs"] in backoff(1, 1.1)


def test_waits_use_up_retries(stack: Stack, emulator: Emulator, company: str, pdf: bytes) -> None:
    tokens = Tokens(stack, company)
    emulator.script(tokens.key, {"status": 429, "retry_delay": "0.01s"}, repeat=True)
    answer = stack.post(pdf, company)
    refused(answer, "upstream_rate_limited", retry_after=1)
    assert len(emulator.log()) == 4
    assert [row["DelayMs"] > 0 for row in attempts(stack, answer, 4)] == [True, True, True, False]


def test_cooldown_is_shared(stack: Stack, emulator: Emulator, company: str, pdf: bytes) -> None:
    tokens = Tokens(stack, company, 2)
    emulator.script("*", {"status": 429, "retry_delay": "3600s"})
    assert stack.post(pdf, company).json()["attempts"] == 2
    cooling, other = keys(emulator)
    for _ in range(10):
        assert stack.post(pdf, company).json()["attempts"] == 1
    assert keys(emulator).count(cooling) == 1
    assert token_row(stack, tokens[other])["CooldownUntil"] is None


def test_cooldown_never_gets_shorter(stack: Stack, emulator: Emulator, company: str, pdf: bytes,
                                     pool: ThreadPoolExecutor) -> None:
    tokens = Tokens(stack, company)
    emulator.script(tokens.key, {"hold": True, "status": 429, "retry_delay": "300s"},
                    {"hold": True, "status": 429, "retry_delay": "4000s"})
    futures = [pool.submit(stack.post, pdf, company)]
    emulator.wait(held=1)
    futures.append(pool.submit(stack.post, pdf, company))
    emulator.wait(held=2)
    emulator.release(1)
    refused(futures[0].result(), "upstream_rate_limited")
    emulator.release()
    refused(futures[1].result(), "upstream_rate_limited", retry_after=4000)
    until = token_row(stack, tokens.id)["CooldownUntil"]
    # somebody whose call was under way comes back with less
    emulator.script(tokens.key, {"hold": True, "status": 429, "retry_delay": "200s"})
    stack.sql("UPDATE TokenMaster SET CooldownUntil = NULL WHERE TokenID = ?", tokens.id)
    future = pool.submit(stack.post, pdf, company)
    emulator.wait(held=1)
    stack.sql("UPDATE TokenMaster SET CooldownUntil = ? WHERE TokenID = ?", until, tokens.id)
    emulator.release()
    answer = future.result()
    refused(answer, "upstream_rate_limited")
    assert int(answer.headers["Retry-After"]) > 3900
    assert token_row(stack, tokens.id)["CooldownUntil"] == until


def test_set_status_active_ends_a_cooldown(stack: Stack, emulator: Emulator, company: str, pdf: bytes) -> None:
    tokens = Tokens(stack, company)
    emulator.script(tokens.key, {"status": 429, "retry_delay": "3600s"})
    refused(stack.post(pdf, company), "upstream_rate_limited")
    stack.ctl("token", "set-status", str(tokens.id), "Active")
    assert stack.post(pdf, company).status == 200


# ---- a quota per day ----


def quota_day_ends() -> datetime:
    now = datetime.now(ZoneInfo("America/Los_Angeles"))
    return datetime.combine(now.date() + timedelta(days=1), datetime.min.time(), ZoneInfo("America/Los_Angeles"))


def until_quota_day(token: dict[str, Any]) -> timedelta:
    """How far the end of the cooldown is from the midnight that follows, or has just been."""
    return min(abs(moment(token["CooldownUntil"]) - quota_day_ends() + timedelta(days=n)) for n in (0, 1))


@pytest.mark.parametrize("step", [
    {"status": 429, "retry_delay": "45.8s", "quota_id": "GenerateRequestsPerDayPerProjectPerModel-FreeTier"},
    {"status": 429, "quota_id": "GenerateContentInputTokensPerModelPerDay"},
], ids=names)
def test_daily_quota(stack: Stack, emulator: Emulator, company: str, pdf: bytes, step: Step) -> None:
    tokens = Tokens(stack, company, 2)
    emulator.script("*", step)
    answer = stack.post(pdf, company)
    assert answer.json()["attempts"] == 2
    [row] = attempts(stack, answer, 1)
    assert (row["StatusCode"], row["IsRetryable"], row["DelayMs"]) == (429, 0, 0)
    token = token_row(stack, tokens[keys(emulator)[0]])
    assert token["Status"] == "Active"
    assert until_quota_day(token) < timedelta(seconds=2)


def test_daily_quota_of_all_tokens(stack: Stack, emulator: Emulator, company: str, pdf: bytes) -> None:
    Tokens(stack, company, 2)
    emulator.scenario("*", "daily_quota", repeat=True)
    answer = stack.post(pdf, company, timeout=150)
    refused(answer, "upstream_rate_limited")
    left = (quota_day_ends() - datetime.now(timezone.utc)).total_seconds()
    assert abs(int(answer.headers["Retry-After"]) - left) <= 3


def test_one_violation_of_several_is_per_day(stack: Stack, emulator: Emulator, company: str, pdf: bytes) -> None:
    tokens = Tokens(stack, company, 2)
    emulator.script("*", {"status": 429, "retry_delay": "5s", "details": [
        {"@type": "type.googleapis.com/google.rpc.QuotaFailure",
         "violations": [{"quotaId": "RequestsPerMinute"}, {"quotaId": "RequestsPerDay"}]}]})
    assert stack.post(pdf, company).status == 200
    assert until_quota_day(token_row(stack, tokens[keys(emulator)[0]])) < timedelta(seconds=2)
    assert stack.rows("SELECT IsRetryable FROM RetryAttempts WHERE CompanyID = ?", company) == [{"IsRetryable": 0}]


# ---- tokens at fault ----


@pytest.mark.parametrize("step, status", [
    ({"status": 402}, "Exceeded"), ({"status": 400, "reason": "API_KEY_INVALID"}, "Disabled"),
    ({"status": 403, "message": LEAKED}, "Disabled")], ids=names)
def test_only_token_at_fault(stack: Stack, emulator: Emulator, company: str, pdf: bytes, step: Step,
                             status: str) -> None:
    tokens = Tokens(stack, company)
    emulator.script(tokens.key, step, repeat=True)
    answer = stack.post(pdf, company)
    refused(answer, "token_unavailable")
    assert token_row(stack, tokens.id)["Status"] == status
    [row] = attempts(stack, answer, 1)
    assert (row["IsRetryable"], row["DelayMs"], row["Attempt"]) == (0, 0, 1)
    refused(stack.post(pdf, company), "token_unavailable")
    assert len(emulator.log()) == 1
    assert reservations(stack, answer) == [(tokens.id, "released", 0)]


def test_doubtful_token_alone(stack: Stack, emulator: Emulator, company: str, pdf: bytes) -> None:
    tokens = Tokens(stack, company)
    emulator.script(tokens.key, {"status": 403}, repeat=True)
    refused(stack.post(pdf, company), "upstream_rate_limited", retry_after=600)
    assert token_row(stack, tokens.id)["Status"] == "Active"
    assert len(emulator.log()) == 1


def test_one_at_fault_one_cooling(stack: Stack, emulator: Emulator, company: str, pdf: bytes) -> None:
    tokens = Tokens(stack, company, 2)
    bad, limited = tokens
    emulator.script(bad, {"status": 400, "reason": "API_KEY_INVALID"}, repeat=True)
    emulator.script(limited, {"status": 429, "retry_delay": "0.05s"})
    answer = stack.post(pdf, company)
    assert answer.status == 200
    assert keys(emulator)[-1] == limited
    assert keys(emulator).count(bad) <= 1


def test_auto_disable_off(make_stack: MakeStack, emulator: Emulator, pdf: bytes) -> None:
    stack = make_stack(env={"EXTRACT_RETRY_AUTO_DISABLE": "no"})
    tokens = Tokens(stack, "NT047", 2)
    emulator.script("*", {"status": 400, "reason": "API_KEY_INVALID"}, {}, {"status": 403, "message": LEAKED})
    answer = stack.post(pdf)
    assert answer.json()["attempts"] == 2
    first, second = keys(emulator)
    token = token_row(stack, tokens[first])
    assert (token["Status"], cooldown_ms(token)) == ("Active", 600_000)
    refused(stack.post(pdf), "upstream_rate_limited")  # both cool down now
    assert keys(emulator)[2:] == [second]
    assert cooldown_ms(token_row(stack, tokens[second])) == 600_000
    emulator.script("*", {"status": 402})
    stack.ctl("token", "set-status", str(tokens[first]), "Active")
    refused(stack.post(pdf), "upstream_rate_limited")  # 402 takes the status all the same; the other cools down
    assert token_row(stack, tokens[first])["Status"] == "Exceeded"


def test_three_companies_at_fault_within_a_minute(make_stack: MakeStack, emulator: Emulator, pdf: bytes) -> None:
    stack = make_stack()
    tokens = {name: Tokens(stack, name) for name in ("One", "Two", "Three", "Four")}
    emulator.scenario("*", "invalid_key", repeat=True)
    for name in ("One", "Two"):
        refused(stack.post(pdf, name), "token_unavailable")
        assert token_row(stack, tokens[name].id)["Status"] == "Disabled"
    for name in ("Three", "Four"):
        answer = stack.post(pdf, name)
        assert answer.status == 403
        refused(answer, "token_unavailable")
        token = token_row(stack, tokens[name].id)
        assert (token["Status"], cooldown_ms(token)) == ("Active", 600_000)
        refused(stack.post(pdf, name), "upstream_rate_limited")
    assert len(emulator.log()) == 4
    stack.rows("SELECT 1 FROM ApplicationLogs WHERE Message LIKE 'upstream_rate_limited%'", count=2)
    [entry] = stack.sql("SELECT * FROM ApplicationLogs WHERE LogLevel = 'CRITICAL'")
    assert "three companies" in entry["Message"]


def test_one_company_may_lose_all_its_tokens(make_stack: MakeStack, emulator: Emulator, pdf: bytes) -> None:
    stack = make_stack()
    tokens = Tokens(stack, "NT047", 4)
    emulator.scenario("*", "invalid_key", repeat=True)
    refused(stack.post(pdf), "token_unavailable")
    assert {token_row(stack, token)["Status"] for token in tokens.values()} == {"Disabled"}
    assert stack.sql("SELECT * FROM ApplicationLogs WHERE LogLevel = 'CRITICAL'") == []


# ---- not retryable ----


@pytest.mark.parametrize("step, code", [
    ({"status": 400}, "invalid_file"),
    ({"status": 400, "error_status": "FAILED_PRECONDITION", "message": "User location is not supported."},
     "invalid_file"),
    ({"status": 400, "reason": "SOMETHING_ELSE"}, "invalid_file"),
    ({"status": 400, "body": "<html>API_KEY_INVALID</html>"}, "invalid_file"),
    ({"status": 404}, "upstream_rejected"),
    ({"status": 404, "body": "<html>"}, "upstream_rejected"),
    ({"status": 413}, "upstream_rejected"),
    ({"status": 405}, "upstream_rejected"),
    ({"status": 302, "headers": {"Location": "http://127.0.0.1:1/"}}, "upstream_rejected"),
    ({"status": 307, "headers": {"Location": "/v1beta/models/gemini-3.5-flash:generateContent"}}, "upstream_rejected"),
], ids=names)
def test_not_retryable(stack: Stack, emulator: Emulator, company: str, pdf: bytes, step: Step, code: str) -> None:
    tokens = Tokens(stack, company, 2)
    emulator.script("*", step)
    answer = stack.post(pdf, company)
    refused(answer, code)
    [key] = keys(emulator)
    [row] = attempts(stack, answer, 1)
    assert row.pop("ErrorMessage").startswith(f"HTTP {step['status']}")
    assert row == {"TokenID": tokens[key], "CompanyID": company, "Attempt": 1, "IsRetryable": 0,
                   "StatusCode": step["status"], "DelayMs": 0}
    token = token_row(stack, tokens[key])
    assert (token["Status"], token["CooldownUntil"], token["StatusReason"]) == ("Active", None, None)
    assert reservations(stack, answer) == [(tokens[key], "released", 0)]
    assert usage_rows(stack, answer) == []


@pytest.mark.parametrize("step", [
    {"finish_reason": "SAFETY"}, {"finish_reason": "MAX_TOKENS"}, {"finish_reason": "RECITATION"},
    {"finish_reason": "SAFETY", "parts": []}, {"finish_reason": "MAX_TOKENS", "parts": []},
    {"block_reason": "PROHIBITED_CONTENT"}, {"no_candidates": True}, {"parts": []}, {"text": ""},
    {"parts": [{"text": "thinking about it", "thought": True}]},
    {"parts": [{"inlineData": {"mimeType": "image/png", "data": ""}}]},
], ids=names)
def test_blocked_cut_or_empty(stack: Stack, emulator: Emulator, company: str, pdf: bytes, step: Step) -> None:
    tokens = Tokens(stack, company, 2)
    emulator.script("*", step)
    answer = stack.post(pdf, company)
    refused(answer, "invalid_file", spent=True)
    [key] = keys(emulator)
    used = emulator.log()[0]["usage"]["totalTokenCount"]
    assert used > 0
    assert usage_rows(stack, answer) == [{"TokenID": tokens[key], "RequestCount": 1, "UnknownCalls": 0,
                                          "TotalTokensUsed": used}]
    assert reservations(stack, answer) == [(tokens[key], "settled", 0)]
    [row] = attempts(stack, answer, 1)
    assert (row["StatusCode"], row["IsRetryable"], row["DelayMs"]) == (200, 0, 0)
    reason = step.get("finish_reason") or step.get("block_reason")
    assert reason is None or reason in row["ErrorMessage"]


# ---- text that is not the JSON asked for ----

BAD_TEXTS = ["Sorry, I cannot.", '{"invoice_number": "1"', '"a string"', "[1]", "null", '{"a": 1} and more',
             "```json\n{}\n```", "{'a': 1}", '{"a": 1}{"b": 2}', '{"a": NaN}', "[" * 100]


@pytest.mark.parametrize("text", BAD_TEXTS)
def test_bad_text_once(stack: Stack, emulator: Emulator, company: str, pdf: bytes, text: str) -> None:
    tokens = Tokens(stack, company, 2)
    emulator.script("*", {"text": text})
    answer = stack.post(pdf, company)
    assert answer.status == 200, answer.body
    assert answer.json()["attempts"] == 2
    first, second = keys(emulator)
    assert first == second
    used = [call["usage"]["totalTokenCount"] for call in emulator.log()]
    assert usage_rows(stack, answer) == [{"TokenID": tokens[first], "RequestCount": 2, "UnknownCalls": 0,
                                          "TotalTokensUsed": sum(used)}]
    assert answer.json()["usage"]["total_tokens"] == sum(used)
    [row] = attempts(stack, answer, 1)
    assert (row["StatusCode"], row["IsRetryable"]) == (200, 1)
    assert row["DelayMs"] in backoff(0)
    assert text not in row["ErrorMessage"]


def test_bad_text_twice(stack: Stack, emulator: Emulator, company: str, pdf: bytes) -> None:
    tokens = Tokens(stack, company)
    emulator.scenario(tokens.key, "bad_json", repeat=True)
    answer = stack.post(pdf, company)
    refused(answer, "invalid_answer", spent=True)
    assert len(emulator.log()) == 2
    used = [call["usage"]["totalTokenCount"] for call in emulator.log()]
    assert usage_rows(stack, answer) == [{"TokenID": tokens.id, "RequestCount": 2, "UnknownCalls": 0,
                                          "TotalTokensUsed": sum(used)}]
    assert [row["IsRetryable"] for row in attempts(stack, answer, 2)] == [1, 1]


def test_bad_text_then_other_failures(stack: Stack, emulator: Emulator, company: str, pdf: bytes) -> None:
    """What was used before the failures is spent, and said so."""
    tokens = Tokens(stack, company)
    emulator.script(tokens.key, {"text": "no"}, *[{"status": 503}] * 9)
    answer = stack.post(pdf, company)
    refused(answer, "upstream_unavailable", spent=True)
    assert len(emulator.log()) == 4
    assert [r["RequestCount"] for r in usage_rows(stack, answer)] == [1]
    assert reservations(stack, answer) == [(tokens.id, "settled", 0)]


# ---- several tokens of one request ----


def test_spent_on_two_tokens(stack: Stack, emulator: Emulator, company: str, pdf: bytes) -> None:
    tokens = Tokens(stack, company, 2)
    emulator.script("*", {"text": "no"}, {"status": 429, "retry_delay": "3600s"})
    answer = stack.post(pdf, company)
    assert answer.json()["attempts"] == 3
    first, again, second = keys(emulator)
    assert first == again != second
    calls = emulator.log()
    used = {first: calls[0]["usage"]["totalTokenCount"], second: calls[2]["usage"]["totalTokenCount"]}
    rows = {row["TokenID"]: (row["RequestCount"], row["TotalTokensUsed"]) for row in usage_rows(stack, answer)}
    assert rows == {tokens[first]: (1, used[first]), tokens[second]: (1, used[second])}
    assert answer.json()["usage"]["total_tokens"] == sum(used.values())
    assert reservations(stack, answer) == [(tokens[first], "settled", 0), (tokens[second], "settled", 0)]


def test_unknown_on_one_token_settled_on_another(stack: Stack, emulator: Emulator, company: str, pdf: bytes) -> None:
    tokens = Tokens(stack, company, 2)
    emulator.script("*", {"reset": "after_read"}, {"status": 402})
    answer = stack.post(pdf, company)
    assert answer.json()["attempts"] == 3
    first, _, second = keys(emulator)
    assert reservations(stack, answer) == [(tokens[first], "unsettled", 1), (tokens[second], "settled", 0)]
    assert [r["TokenID"] for r in usage_rows(stack, answer)] == [tokens[second]]
    assert token_row(stack, tokens[first])["Status"] == "Exceeded"
    assert answer.json()["usage"]["total_tokens"] == emulator.log()[2]["usage"]["totalTokenCount"]


def test_the_same_token_after_a_wait(stack: Stack, emulator: Emulator, company: str, pdf: bytes) -> None:
    """Its usage before and after the wait is one row."""
    tokens = Tokens(stack, company)
    emulator.script(tokens.key, {"text": "no"}, {"status": 429, "retry_delay": "0.03s"})
    answer = stack.post(pdf, company)
    assert answer.json()["attempts"] == 3
    used = [call["usage"]["totalTokenCount"] for call in emulator.log() if call["usage"]]
    assert usage_rows(stack, answer) == [{"TokenID": tokens.id, "RequestCount": 2, "UnknownCalls": 0,
                                          "TotalTokensUsed": sum(used)}]
    assert {state for _, state, _ in reservations(stack, answer)} <= {"settled", "released"}


# ---- the deadline ----


def test_deadline(make_stack: MakeStack, emulator: Emulator, pdf: bytes, pool: ThreadPoolExecutor) -> None:
    # Seconds: an attempt starts before the first, none after the second, and nobody waits for the third.
    early, late, hint = (5.0, 5.2, 6) if IS_LIVE else (0.5, 0.7, 2)
    stack = make_stack(env={"EXTRACT_SERVER_DEADLINE": f"{5 + early}s", "EXTRACT_GEMINI_TIMEOUT": "10m", "EXTRACT_STORE_POOL_SIZE": "1"})
    stack.token("first")  # who meets a session whose plans are not made yet
    eventually(lambda: stack.post(pdf, "first").status == 200)
    emulator.reset()
    tokens = {name: Tokens(stack, name, count) for name, count in
              (("late", 1), ("slow", 1), ("hint", 1), ("texts", 1), ("others", 2))}
    emulator.script(tokens["late"].key, {"hold": True}, repeat=True)
    # less than 5 s are left then: no attempt starts, whatever it would be for
    emulator.script(tokens["slow"].key, {"delay": late, "status": 503}, repeat=True)
    emulator.script(tokens["texts"].key, {"delay": late, "text": "no"}, repeat=True)
    for key in tokens["others"]:
        emulator.script(key, {"delay": late, "status": 429, "retry_delay": "600s"})
    # so long can nobody wait
    emulator.script(tokens["hint"].key, {"status": 429, "retry_delay": f"{hint}s"}, repeat=True)
    futures: dict[str, Future[Answer]] = {name: pool.submit(stack.post, pdf, name) for name in tokens}
    answers = {name: future.result() for name, future in futures.items()}

    refused(answers["late"], "deadline_exceeded", spent=True)
    assert reservations(stack, answers["late"]) == [(tokens["late"].id, "unsettled", 1)]
    [row] = attempts(stack, answers["late"], 1)
    assert (row["StatusCode"], row["IsRetryable"], row["DelayMs"]) == (None, 1, 0)

    refused(answers["slow"], "upstream_unavailable")
    [row] = attempts(stack, answers["slow"], 1)
    assert (row["StatusCode"], row["DelayMs"]) == (503, 0)
    refused(answers["hint"], "upstream_rate_limited", retry_after=hint)
    refused(answers["texts"], "invalid_answer", spent=True)
    refused(answers["others"], "upstream_rate_limited")
    called = keys(emulator)
    assert len(called) == 5 and len(set(called)) == 5, "one attempt each"
    assert {state for _, state, _ in reservations(stack, answers["others"])} == {"released"}
    stack.balanced()


def test_deadline_shorter_than_any_attempt(make_stack: MakeStack, emulator: Emulator, pdf: bytes) -> None:
    stack = make_stack(env={"EXTRACT_SERVER_DEADLINE": "4s"})
    tokens = Tokens(stack, "NT047")
    answer = stack.post(pdf)
    refused(answer, "deadline_exceeded")
    assert emulator.log() == []
    assert reservations(stack, answer) == [(tokens.id, "released", 0)]


# ---- limits ----


def summary(stack: Stack, token: int) -> dict[str, Any]:
    return stack.sql("SELECT * FROM TokenUsageSummary WHERE TokenID = ?", token)[0]


def test_limit_reached(stack: Stack, emulator: Emulator, company: str, pdf: bytes) -> None:
    """The last request is served whole; the settlement that reaches the limit takes the status."""
    tokens = Tokens(stack, company, 1, "--limit", "100")
    answer = stack.post(pdf, company)
    assert answer.status == 200
    used = answer.json()["usage"]["total_tokens"]
    token = token_row(stack, tokens.id)
    assert (token["Status"], token["StatusReason"]) == ("Exceeded", "limit of 100 tokens reached")
    assert (summary(stack, tokens.id)["TotalUsedTokens"], summary(stack, tokens.id)["TotalRemainingTokens"]) \
        == (used, 100 - used)
    [audit] = stack.sql("SELECT * FROM AuditLog WHERE ObjectID = ? AND Actor = 'extract-fcgi'", str(tokens.id))
    assert (audit["RequestID"], audit["Detail"]) == (request_id(answer), "Active to Exceeded: limit reached")
    [entry] = stack.rows("SELECT * FROM ApplicationLogs WHERE RequestID = ? AND Message LIKE '%reached its limit%'",
                         request_id(answer))
    assert entry["LogLevel"] == "WARNING"
    refused(stack.post(pdf, company), "token_unavailable")
    stack.ctl("token", "set-limit", str(tokens.id), "100000")
    token = token_row(stack, tokens.id)
    assert (token["Status"], token["StatusReason"]) == ("Active", None)
    assert stack.post(pdf, company).status == 200
    stack.ctl("token", "set-limit", str(tokens.id), str(2 * used))
    refused(stack.post(pdf, company), "token_unavailable")
    stack.ctl("token", "set-limit", str(tokens.id), "none")
    assert stack.post(pdf, company).status == 200
    assert len(emulator.log()) == 3


def test_limit_exactly_reached(stack: Stack, emulator: Emulator, company: str, pdf: bytes) -> None:
    tokens = Tokens(stack, company, 1, "--limit", "1000")
    usage = {"promptTokenCount": 0, "candidatesTokenCount": 0, "thoughtsTokenCount": 0}
    emulator.script(tokens.key, {"usage": usage | {"totalTokenCount": 999}}, {"usage": usage | {"totalTokenCount": 1}})
    assert stack.post(pdf, company).status == 200
    assert token_row(stack, tokens.id)["Status"] == "Active"
    assert stack.post(pdf, company).status == 200, "one token is left, and nothing reserved"
    assert token_row(stack, tokens.id)["Status"] == "Exceeded"


@pytest.mark.parametrize("limit, fits", [(16000, True), (15999, False)])
def test_room_for_reservations(stack: Stack, emulator: Emulator, company: str, pdf: bytes, pool: ThreadPoolExecutor,
                               limit: int, fits: bool) -> None:
    """Two requests reserve 8,000 each."""
    tokens = Tokens(stack, company, 1, "--limit", str(limit))
    emulator.script(tokens.key, {"hold": True}, repeat=True)
    first = pool.submit(stack.post, pdf, company)
    emulator.wait(held=1)
    assert summary(stack, tokens.id)["ReservedTokens"] == 8000
    if fits:
        second = pool.submit(stack.post, pdf, company)
        emulator.wait(held=2)
        assert summary(stack, tokens.id)["ReservedTokens"] == 16000
        emulator.release()
        assert second.result().status == 200
    else:
        answer = stack.post(pdf, company)
        refused(answer, "token_busy")
        assert reservations(stack, answer) == []
        emulator.release()
    assert first.result().status == 200
    assert summary(stack, tokens.id)["ReservedTokens"] == 0
    emulator.script(tokens.key)
    assert stack.post(pdf, company).status == 200


def test_what_was_used_takes_room(stack: Stack, emulator: Emulator, company: str, pdf: bytes,
                                  pool: ThreadPoolExecutor) -> None:
    tokens = Tokens(stack, company, 1, "--limit", "17000")
    assert 1000 < stack.post(pdf, company).json()["usage"]["total_tokens"]
    emulator.script(tokens.key, {"hold": True})
    first = pool.submit(stack.post, pdf, company)
    emulator.wait(held=1)
    refused(stack.post(pdf, company), "token_busy")
    emulator.release()
    assert first.result().status == 200


def test_another_token_has_room(stack: Stack, emulator: Emulator, company: str, pdf: bytes,
                                pool: ThreadPoolExecutor) -> None:
    tokens = Tokens(stack, company, 1, "--limit", "9000")
    emulator.script(tokens.key, {"hold": True})
    first = pool.submit(stack.post, pdf, company)
    emulator.wait(held=1)
    other = Tokens(stack, company, 1, "--limit", "9000")
    answer = stack.post(pdf, company)
    assert answer.status == 200
    assert reservations(stack, answer) == [(other.id, "settled", 0)]
    # one is busy, the other cools down: room is what comes first
    stack.sql("UPDATE TokenMaster SET CooldownUntil = '2999-01-01T00:00:00.000Z' WHERE TokenID = ?", other.id)
    refused(stack.post(pdf, company), "token_busy")
    emulator.release()
    assert first.result().status == 200
    # with the busy one used up, the other cools down
    stack.ctl("token", "set-limit", str(tokens.id), "1")
    refused(stack.post(pdf, company), "upstream_rate_limited")


def test_busy_ends_when_the_call_fails(stack: Stack, emulator: Emulator, company: str, pdf: bytes,
                                       pool: ThreadPoolExecutor) -> None:
    """A reservation that was not used gives its room back."""
    tokens = Tokens(stack, company, 1, "--limit", "9000")
    emulator.script(tokens.key, {"hold": True, "status": 404})
    first = pool.submit(stack.post, pdf, company)
    emulator.wait(held=1)
    refused(stack.post(pdf, company), "token_busy")
    emulator.release()
    refused(first.result(), "upstream_rejected")
    assert stack.post(pdf, company).status == 200


def test_threshold_is_said_once(stack: Stack, company: str, pdf: bytes) -> None:
    tokens = Tokens(stack, company, 1, "--limit", "20000", "--threshold", "0.1")
    answers = [stack.post(pdf, company) for _ in range(3)]
    used = answers[0].json()["usage"]["total_tokens"]
    assert used < 2000 <= 2 * used
    for answer in answers:
        ended(stack, answer)
    warnings = [stack.sql("SELECT * FROM ApplicationLogs WHERE RequestID = ? AND LogLevel = 'WARNING'",
                          request_id(answer)) for answer in answers]
    assert [len(w) for w in warnings] == [0, 1, 0]
    assert "threshold" in warnings[1][0]["Message"] and company in warnings[1][0]["Message"]
    crossed = summary(stack, tokens.id)["ThresholdCrossedAt"]
    assert moment(crossed) < moment(summary(stack, tokens.id)["LastUpdated"])
    assert token_row(stack, tokens.id)["Status"] == "Active"


def pages(count: int) -> bytes:
    """A PDF in which so many page objects stand."""
    data = pdf_minimal()
    return data + b"%" + b"/Type /Page\n%" * (count - 1) + b"\n%%EOF\n"


def test_estimate_grows_with_the_pages(stack: Stack, company: str) -> None:
    """The larger of reserve_tokens (8,000) and a guess, which is never below what was used then."""
    Tokens(stack, company)
    found: dict[int, int] = {}
    for count in (1, 4, 10, 50):
        answer = stack.post(pages(count), company)
        assert answer.status == 200
        [row] = stack.sql("SELECT EstimatedTokens FROM TokenReservations WHERE RequestID = ?", request_id(answer))
        found[count] = row["EstimatedTokens"]
        assert row["EstimatedTokens"] >= answer.json()["usage"]["total_tokens"]
    assert found[1] == found[4] == 8000
    assert 8000 < found[10] < found[50]


def test_reserve_tokens(make_stack: MakeStack) -> None:
    stack = make_stack(env={"EXTRACT_GEMINI_RESERVE_TOKENS": "100000"})
    Tokens(stack, "NT047")
    assert stack.post(pages(2)).status == 200
    assert stack.sql("SELECT EstimatedTokens FROM TokenReservations") == [{"EstimatedTokens": 100000}]


def test_reserve_tokens_smaller_than_the_guess(make_stack: MakeStack) -> None:
    stack = make_stack(env={"EXTRACT_GEMINI_RESERVE_TOKENS": "1"})
    Tokens(stack, "NT047")
    used = stack.post(sample("invoice-two-pages.pdf")).json()["usage"]["total_tokens"]
    [row] = stack.sql("SELECT EstimatedTokens FROM TokenReservations")
    assert row["EstimatedTokens"] >= used


# ---- which token ----


@pytest.mark.parametrize("provider", [None, "", "Google", "gemini", "GEMINI", "GOOGLE"])
def test_providers_of_ours(stack: Stack, company: str, pdf: bytes, provider: str | None) -> None:
    tokens = Tokens(stack, company)
    stack.sql("UPDATE TokenMaster SET Provider = ? WHERE TokenID = ?", provider, tokens.id)
    assert stack.post(pdf, company).status == 200


@pytest.mark.parametrize("provider", ["OpenAI", "Anthropic", " Gemini", "Gemini2"])
def test_other_providers(stack: Stack, emulator: Emulator, company: str, pdf: bytes, provider: str) -> None:
    foreign = Tokens(stack, company)
    stack.sql("UPDATE TokenMaster SET Provider = ? WHERE TokenID = ?", provider, foreign.id)
    refused(stack.post(pdf, company), "no_active_token")
    ours = Tokens(stack, company)
    for _ in range(5):
        assert stack.post(pdf, company).status == 200
    assert set(keys(emulator)) == {ours.key}
    stack.ctl("token", "set-status", str(ours.id), "Expired")
    stack.sql("UPDATE TokenMaster SET CreatedAt = '2999-01-01', Status = 'Disabled' WHERE TokenID = ?", foreign.id)
    refused(stack.post(pdf, company), "token_expired")


def test_choice_is_random(stack: Stack, emulator: Emulator, company: str, pdf: bytes) -> None:
    tokens = Tokens(stack, company, 3)
    for _ in range(48):
        assert stack.post(pdf, company).status == 200
    called = keys(emulator)
    assert set(called) == set(tokens)
    assert any(a == b for a, b in zip(called, called[1:])), "and not in turns"


def test_only_tokens_of_the_company(stack: Stack, emulator: Emulator, company: str, pdf: bytes) -> None:
    Tokens(stack, company + "-other", 3)
    Tokens(stack, company[:-1], 3)
    own = Tokens(stack, company)
    for _ in range(5):
        assert stack.post(pdf, company).status == 200
    assert set(keys(emulator)) == {own.key}


def test_a_token_is_never_tried_twice_at_once(stack: Stack, emulator: Emulator, company: str, pdf: bytes) -> None:
    """Not even one whose cooldown is over before the others were tried."""
    tokens = Tokens(stack, company, 4)
    limited = {"status": 429, "retry_delay": "0.001s"}
    emulator.script("*", limited, *[limited | {"delay": 0.05}] * 2)
    assert stack.post(pdf, company).json()["attempts"] == 4
    assert sorted(keys(emulator)) == sorted(tokens)
