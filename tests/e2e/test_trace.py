"""One request, wherever it leaves a trace: by its X-Request-ID, and by the traceparent that its client sent."""
from __future__ import annotations

import json
import re
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from conftest import Answer, Emulator, Stack, eventually, refused

MakeStack = Callable[..., Stack]
# the tables that have a RequestID
TABLES = ["TokenUsageLogs", "TokenReservations", "RetryAttempts", "ApplicationLogs", "IdempotencyKeys", "AuditLog"]
SPAN = "00f067aa0ba902b7"
STATE = "rojo=00f067aa0ba902b7,congo=t61rcWkgMzE"


def new_trace() -> str:
    return uuid.uuid4().hex


def parent(trace: str, flags: str = "01") -> dict[str, str]:
    return {"traceparent": f"00-{trace}-{SPAN}-{flags}"}


def request_id(answer: Answer) -> str:
    [found] = answer.headers.get_all("X-Request-ID")
    return found


def access_log(stack: Stack, answer: Answer) -> dict[str, str]:
    """What nginx has logged of it."""
    def find() -> str | None:
        return next((line for line in (stack.dir / "access.log").read_text().splitlines()
                     if f" app_request_id={request_id(answer)} " in line), None)
    return dict(re.findall(r" (\w+)=(\S+)", eventually(find, "nginx has logged the request")))


def end_of(stack: Stack, answer: Answer) -> dict[str, Any]:
    """The entry that ends it."""
    [row] = stack.rows("SELECT * FROM ApplicationLogs WHERE RequestID = ? AND FunctionName = 'log_end'", request_id(answer))
    return row


def usage(stack: Stack, answer: Answer) -> list[dict[str, Any]]:
    return stack.sql("SELECT * FROM TokenUsageLogs WHERE RequestID = ?", request_id(answer))


def passed_on(emulator: Emulator) -> list[tuple[str | None, str | None]]:
    """traceparent and tracestate of each call to Gemini."""
    headers = [call["http_headers"] for call in emulator.log()]
    return [(h.get("traceparent"), h.get("tracestate")) for h in headers]


# ---- by its X-Request-ID ----


def test_one_request_everywhere(stack: Stack, emulator: Emulator, company: str, pdf: bytes) -> None:
    """From nginx's log through every table to the answer; it leaves a row in each that has a RequestID."""
    key = f"key-{company}"
    stack.token(company, key, "--limit", "100")  # it is Exceeded afterwards, which AuditLog says
    emulator.script(key, {"status": 503})
    answer = stack.post(pdf, company, headers={"Idempotency-Key": "the-first"})
    ours = answer.json()["request_id"]
    assert request_id(answer) == ours

    logged = access_log(stack, answer)
    assert re.fullmatch("[0-9a-f]{32}", logged["request_id"])
    assert end_of(stack, answer)["Message"].endswith(f" proxy_request_id={logged['request_id']}")
    for table in TABLES:
        assert stack.rows(f"SELECT * FROM {table} WHERE RequestID = ?", ours), table
    for table in set(stack.tables()) - set(TABLES):
        assert all("RequestID" not in row or table.startswith("vw_") for row in stack.sql(f'SELECT * FROM "{table}"')), table

    for command in (["logs", "--request", ours], ["retries", "--company", company]):
        rows = json.loads(stack.ctl(*command, "--json").stdout)
        assert rows and {row["RequestID"] for row in rows} == {ours}
        assert stack.ctl(*command).stdout.count(ours) == len(rows)


def test_line_of_the_log(make_stack: MakeStack, emulator: Emulator, pdf: bytes) -> None:
    """Where the service logs to standard error, each line about a request has its number, the last also its trace."""
    stack = make_stack(env={"EXTRACT_LOG_SINK": "stderr"})
    stack.allowed_stderr += ["."]
    key, trace = "key-of-a-line", new_trace()
    stack.token("NT047", key, "--limit", "100")
    answer = stack.post(pdf, headers=parent(trace))
    other = stack.post(pdf, "NOBODY")
    of_one, of_other = ([line for line in eventually(lambda: done(stack, a), "it has logged") if request_id(a) in line]
                        for a in (answer, other))
    assert len(of_one) >= 2 and all(f" [{request_id(answer)}] " in line for line in of_one)
    assert of_one[-1].endswith(f" proxy_request_id={access_log(stack, answer)['request_id']} trace_id={trace}")
    assert "trace_id" not in "".join(of_other)


def done(stack: Stack, answer: Answer) -> list[str] | None:
    lines = (stack.dir / "pool.log").read_text().splitlines()
    return lines if any(" log_end " in line and request_id(answer) in line for line in lines) else None


# ---- by the trace of its client ----


def test_taken_over_stored_passed_on(stack: Stack, emulator: Emulator, company: str, pdf: bytes) -> None:
    key, trace = f"key-{company}", new_trace()
    stack.token(company, key)
    emulator.script(key, {"status": 503})
    answer = stack.post(pdf, company, headers=parent(trace) | {"tracestate": STATE})
    assert answer.status == 200 and answer.json()["attempts"] == 2
    assert not {"traceparent", "tracestate", "traceresponse"} & {name.lower() for name in answer.headers}
    assert trace not in answer.body.decode()

    [row] = usage(stack, answer)
    assert row["TraceID"] == trace
    end = end_of(stack, answer)
    assert end["TraceID"] == trace and end["Message"].endswith(f" trace_id={trace}")
    assert access_log(stack, answer)["trace_id"] == trace
    [from_the_trace] = stack.sql("SELECT RequestID FROM ApplicationLogs WHERE TraceID = ?", trace)
    assert from_the_trace["RequestID"] == request_id(answer)
    shown = json.loads(stack.ctl("logs", "--request", request_id(answer), "--json").stdout)
    assert trace in [entry["TraceID"] for entry in shown]
    assert f"trace_id={trace}" in stack.ctl("logs", "--request", request_id(answer)).stdout

    # each call is a span of its own, none the client's
    spans = [re.fullmatch(rf"00-{trace}-([0-9a-f]{{16}})-01", sent or "") for sent, _ in passed_on(emulator)]
    assert len(spans) == 2 and all(spans)
    assert len({SPAN, "0" * 16, *(span[1] for span in spans if span)}) == 4
    assert [state for _, state in passed_on(emulator)] == [STATE, STATE]


def test_none(stack: Stack, emulator: Emulator, company: str, pdf: bytes) -> None:
    """A client of no trace gets none; a tracestate alone is nothing."""
    stack.token(company)
    for headers in ({}, {"tracestate": STATE}, {"traceparent": ""}):
        answer = stack.post(pdf, company, headers=headers)
        assert answer.status == 200
        assert [row["TraceID"] for row in usage(stack, answer)] == [None]
        end = end_of(stack, answer)
        assert end["TraceID"] is None and "trace_id" not in end["Message"]
        assert access_log(stack, answer)["trace_id"] == "-"
    assert passed_on(emulator) == [(None, None)] * 3


ID = "4bf92f3577b34da6a3ce929d0e0e4736"


@pytest.mark.parametrize("sent, flags", [
    (f"00-{ID}-{SPAN}-00", "00"), (f"00-{ID}-{SPAN}-03", "03"), (f"00-{ID}-{SPAN}-ff", "03"), (f"  00-{ID}-{SPAN}-01 ", "01"),
    (f"01-{ID}-{SPAN}-03", "01"), (f"fe-{ID}-{SPAN}-01-what=ever", "01"), (f"01-{ID}-{SPAN}-01-", "01"),
    (f"ff-{ID}-{SPAN}-01", None), (f"00-{ID}-{SPAN}-01-x", None), (f"00-{ID}-{SPAN}-01-", None), (f"01-{ID}-{SPAN}-01.x", None),
    (f"00-{ID}-{SPAN}-1", None), (f"00-{ID}-{SPAN}", None), (f"00-{ID.upper()}-{SPAN}-01", None),
    (f"00-{ID}-{SPAN.upper()}-01", None), (f"00-{'0' * 32}-{SPAN}-01", None), (f"00-{ID}-{'0' * 16}-01", None),
    (f"00-{ID[:-1]}-{SPAN}0-01", None), (f"0-{ID}-{SPAN}-01", None), (f"00-{ID}-{SPAN}-0A", None), ("x", None),
    (f"00-{ID}-{SPAN}-01, 00-{ID}-{SPAN}-01", None), ("00-" + "f" * 4000, None)])
def test_rules(stack: Stack, emulator: Emulator, company: str, pdf: bytes, sent: str, flags: str | None) -> None:
    """What breaks them is no error of the client's. nginx, which logs it, knows them as the application does."""
    stack.token(company)
    answer = stack.post(pdf, company, headers={"traceparent": sent, "tracestate": STATE})
    assert answer.status == 200
    [(parent_sent, state_sent)] = passed_on(emulator)
    [row] = usage(stack, answer)
    if flags is None:
        assert (parent_sent, state_sent, row["TraceID"]) == (None, None, None)
        assert access_log(stack, answer)["trace_id"] == "-"
    else:
        assert re.fullmatch(rf"00-{ID}-(?!{SPAN})[0-9a-f]{{16}}-{flags}", parent_sent or "") and state_sent == STATE
        assert row["TraceID"] == access_log(stack, answer)["trace_id"] == ID


@pytest.mark.parametrize("length, kept", [(512, True), (513, False)])
def test_length_of_tracestate(stack: Stack, emulator: Emulator, company: str, pdf: bytes, length: int, kept: bool) -> None:
    stack.token(company)
    state = "a=" + "x" * (length - 2)
    assert stack.post(pdf, company, headers=parent(new_trace()) | {"tracestate": state}).status == 200
    [(sent, state_sent)] = passed_on(emulator)
    assert sent is not None and state_sent == (state if kept else None)


def test_failure(stack: Stack, emulator: Emulator, company: str, pdf: bytes) -> None:
    """Without a usage row the entry that ends the request is what leads from the trace to it."""
    key, trace, other = f"key-{company}", new_trace(), new_trace()
    stack.token(company, key)
    emulator.scenario(key, "model_not_found")
    answer = stack.post(pdf, company, headers=parent(trace))
    refused(answer, "upstream_rejected")
    assert usage(stack, answer) == []
    assert end_of(stack, answer)["TraceID"] == trace
    [error] = stack.rows("SELECT TraceID FROM vw_RecentErrors WHERE RequestID = ?", request_id(answer))
    assert error["TraceID"] == trace
    unknown = stack.post(pdf, f"{company}-unknown", headers=parent(other))
    refused(unknown, "no_active_token")
    assert end_of(stack, unknown)["TraceID"] == other
    assert trace not in answer.body.decode()


def test_through_the_outbox(stack: Stack, emulator: Emulator, company: str, pdf: bytes) -> None:
    """A settlement that has to wait for the store keeps it."""
    key, trace = f"key-{company}", new_trace()
    stack.token(company, key)
    emulator.script(key, {"hold": True})
    with ThreadPoolExecutor() as pool:
        coming = pool.submit(stack.post, pdf, company, headers=parent(trace))
        emulator.wait(held=1)
        with stack.store_away():
            emulator.release()
            answer = coming.result()
            assert answer.status == 200
            [outbox] = json.loads(stack.ctl("outbox", "status", "--json").stdout)
            assert outbox["Waiting"] >= 1
    [row] = stack.rows("SELECT TraceID FROM TokenUsageLogs WHERE RequestID = ?", request_id(answer))
    assert row["TraceID"] == trace
    assert end_of(stack, answer)["TraceID"] == trace


def test_administrators_read_it(stack: Stack, emulator: Emulator, company: str, pdf: bytes) -> None:
    key, trace = f"key-{company}", new_trace()
    stack.token(company, key)
    emulator.scenario(key, "model_not_found")
    answer = stack.post(pdf, company, headers=parent(trace))
    administrator = {"Authorization": f"Bearer {stack.ctl('client-key', 'add', '--admin').stdout.strip()}"}
    path = f"/admin/errors?request_id={request_id(answer)}"
    [row] = eventually(lambda: stack.get(path, headers=administrator).json()["rows"], "the entry is written")
    assert row["TraceID"] == trace
    head, line = stack.get(f"{path}&format=csv", headers=administrator).body.decode().splitlines()
    assert head.endswith(",TraceID") and line.endswith(f",{trace}")

    # their own requests too
    denied = stack.get("/admin/errors", headers=parent(new := new_trace()))
    assert denied.status == 401
    [row] = stack.rows("SELECT TraceID, Message FROM ApplicationLogs WHERE RequestID = ?", request_id(denied))
    assert row["TraceID"] == new and row["Message"].endswith(f" trace_id={new}")


def test_refused_at_the_door(make_stack: MakeStack, emulator: Emulator, crowd: ThreadPoolExecutor, pdf: bytes) -> None:
    """A full pool says so of a request's trace, too."""
    stack, trace = make_stack(env={"EXTRACT_SERVER_THREADS": "1", "EXTRACT_SERVER_QUEUE_WAIT": "50ms"}), new_trace()
    stack.token(key="key-of-the-first")
    emulator.script("key-of-the-first", {"hold": True})
    first = crowd.submit(stack.post, pdf)
    emulator.wait(held=1)
    answer = stack.post(pdf, headers=parent(trace))
    refused(answer, "overloaded")
    [row] = stack.rows("SELECT * FROM ApplicationLogs WHERE RequestID = ?", request_id(answer))
    assert row["TraceID"] == trace
    assert row["Message"].endswith(f"; proxy_request_id={access_log(stack, answer)['request_id']} trace_id={trace}")
    emulator.release()
    assert first.result().status == 200
