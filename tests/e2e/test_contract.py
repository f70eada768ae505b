"""What a client is promised (POST /extract and the paths beside it), row by row, through a real nginx."""
from __future__ import annotations

import json
import re
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from broken import DAMAGED, DEEP, FINE, FOREIGN
from conftest import PROBLEMS, ROOT, UUID_V7, Answer, Emulator, Stack, eventually, form, refused
from gemini_answer import invoice_for, usage_for
from gemini_request import InlineFile

USAGE = ["input_tokens", "output_tokens", "text_prompt_tokens", "image_prompt_tokens", "text_candidates_tokens",
         "thoughts_tokens", "cached_tokens", "total_tokens"]


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(4) as executor:
        yield executor


def new_key() -> str:
    return f"key-{uuid.uuid4().hex}"


def multipart(*parts: tuple[str, bytes], boundary: str = "----b7f3") -> tuple[bytes, dict[str, str]]:
    """Parts by the rest of their Content-Disposition and further header lines, in this order."""
    body = b"".join(b"--%s\r\nContent-Disposition: form-data; %s\r\n\r\n%s\r\n"
                    % (boundary.encode(), header.encode(), value) for header, value in parts)
    return (body + b"--%s--\r\n" % boundary.encode(),
            {"Content-Type": f"multipart/form-data; boundary={boundary}"})


def spend(stack: Stack, token: int, tokens: int) -> None:
    """The token has used so many tokens before."""
    stack.sql("INSERT INTO TokenUsageLogs (TokenID, TotalTokensUsed) VALUES (?, ?)", token, tokens)
    stack.sql("UPDATE TokenUsageSummary SET TotalUsedTokens = TotalUsedTokens + ?1,"
              " TotalRemainingTokens = TotalRemainingTokens - ?1 WHERE TokenID = ?2", tokens, token)


# ---- success ----


def test_success_shape(stack: Stack, emulator: Emulator, company: str, pdf: bytes) -> None:
    stack.token(company)
    answer = stack.post(pdf, company)
    assert answer.status == 200
    assert answer.headers["Content-Type"] == "application/json"
    assert answer.headers["Retry-After"] is None
    body = answer.json()
    assert list(body) == ["status", "request_id", "data", "usage", "model", "attempts", "warnings"]
    assert body["status"] == "success"
    assert body["request_id"] == answer.headers["X-Request-ID"]
    assert UUID_V7.fullmatch(body["request_id"])
    assert list(body["usage"]) == USAGE
    assert all(type(n) is int for n in body["usage"].values())
    assert body["data"] == invoice_for(pdf)
    assert list(body["data"]) == list(invoice_for(pdf))
    assert body["model"] == "gemini-3.5-flash"
    assert type(body["attempts"]) is int and body["attempts"] == 1
    assert body["warnings"] == []


def test_request_ids_are_of_now_and_differ(stack: Stack, company: str) -> None:
    before = int(time.time() * 1000)
    ids = [stack.post(b"GIF89a", company).headers["X-Request-ID"] for _ in range(3)]
    stamps = [int(i.replace("-", "")[:12], 16) for i in ids]
    assert before <= stamps[0] <= stamps[1] <= stamps[2] <= int(time.time() * 1000)
    assert len(set(ids)) == 3


@pytest.mark.parametrize("name", ["invoice-two-pages.pdf", "receipt.png"])
def test_usage_is_what_gemini_says(stack: Stack, emulator: Emulator, company: str, name: str) -> None:
    data, mime = FINE[name]
    stack.token(company)
    usage = stack.post(data, company).json()["usage"]
    expected = usage_for(emulator.log()[0]["prompt"], [InlineFile(mime, data)],
                         json.dumps(invoice_for(data), ensure_ascii=False))
    details = {d["modality"]: d["tokenCount"] for d in expected["promptTokensDetails"]}
    assert usage == {
        "input_tokens": expected["promptTokenCount"],
        "output_tokens": expected["candidatesTokenCount"],
        "text_prompt_tokens": details["TEXT"],
        "image_prompt_tokens": details.get("IMAGE", 0) + details.get("DOCUMENT", 0),
        "text_candidates_tokens": expected["candidatesTokenCount"],
        "thoughts_tokens": expected["thoughtsTokenCount"],
        "cached_tokens": expected["cachedContentTokenCount"],
        "total_tokens": expected["totalTokenCount"],
    }


@pytest.mark.parametrize("said, expected", [
    # IMAGE and DOCUMENT together; TEXT of the candidates' details alone; AUDIO nowhere
    ({"promptTokenCount": 100, "candidatesTokenCount": 50, "totalTokenCount": 167, "thoughtsTokenCount": 7,
      "cachedContentTokenCount": 20, "toolUsePromptTokenCount": 10,
      "promptTokensDetails": [{"modality": "TEXT", "tokenCount": 30}, {"modality": "IMAGE", "tokenCount": 40},
                              {"modality": "DOCUMENT", "tokenCount": 25}, {"modality": "AUDIO", "tokenCount": 5}],
      "candidatesTokensDetails": [{"modality": "TEXT", "tokenCount": 45}, {"modality": "IMAGE", "tokenCount": 5}]},
     [100, 50, 30, 65, 45, 7, 20, 167]),
    # without details
    ({"promptTokenCount": 11, "candidatesTokenCount": 13, "totalTokenCount": 24}, [11, 13, 0, 0, 13, 0, 0, 24]),
    # empty lists are no details; a modality without a count is none
    ({"promptTokenCount": 5, "candidatesTokenCount": 6, "totalTokenCount": 11, "candidatesTokensDetails": [],
      "promptTokensDetails": [{"modality": "TEXT"}]}, [5, 6, 0, 0, 6, 0, 0, 11]),
    # nothing but a total, and a field that nobody knows
    ({"totalTokenCount": 9, "trafficType": "ON_DEMAND"}, [0, 0, 0, 0, 0, 0, 0, 9]),
    ({}, [0, 0, 0, 0, 0, 0, 0, 0]),
], ids=["all modalities", "no details", "empty details", "total only", "empty"])
def test_usage_mapping(stack: Stack, emulator: Emulator, company: str, pdf: bytes, said: dict[str, Any],
                       expected: list[int]) -> None:
    key = new_key()
    stack.token(company, key)
    emulator.script(key, {"raw_json": {
        "candidates": [{"content": {"parts": [{"text": "{}"}], "role": "model"}, "finishReason": "STOP"}],
        "usageMetadata": said, "modelVersion": "gemini-9.9-flash-007"}})
    body = stack.post(pdf, company).json()
    assert body["usage"] == dict(zip(USAGE, expected, strict=True))
    assert body["model"] == "gemini-9.9-flash-007"
    assert body["data"] == {}
    [row] = stack.sql("SELECT * FROM TokenUsageLogs WHERE RequestID = ?", body["request_id"])
    assert [row[c] for c in ("InputTokens", "OutputTokens", "TextPromptTokens", "ImagePromptTokens",
                             "TextCandidatesTokens", "ThoughtsTokens", "CachedTokens", "TotalTokensUsed")] == expected
    assert row["Model"] == "gemini-9.9-flash-007"


def test_attempts_and_usage_of_several_calls(stack: Stack, emulator: Emulator, company: str, pdf: bytes) -> None:
    key = new_key()
    stack.token(company, key)
    emulator.script(key, {"status": 503}, {"status": 500})
    body = stack.post(pdf, company).json()
    assert body["attempts"] == 3
    assert body["usage"]["total_tokens"] == emulator.log()[2]["usage"]["totalTokenCount"]


# ---- which file ----


@pytest.mark.parametrize("name", FINE)
def test_fine_files(stack: Stack, emulator: Emulator, company: str, name: str) -> None:
    data, mime = FINE[name]
    stack.token(company)
    answer = stack.post(data, company)
    assert answer.status == 200, answer.body
    [call] = emulator.log()
    assert (call["mime"], call["file_bytes"]) == (mime, len(data))
    assert answer.json()["data"] == invoice_for(data)


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_files(stack: Stack, emulator: Emulator, company: str, name: str) -> None:
    stack.token(company)
    refused(stack.post(DAMAGED[name], company), "invalid_file")
    assert emulator.log() == []
    assert stack.sql("SELECT * FROM TokenReservations WHERE CompanyID = ?", company) == []


@pytest.mark.parametrize("name", DEEP)
def test_deeply_damaged_files(stack: Stack, emulator: Emulator, company: str, name: str) -> None:
    key = new_key()
    stack.token(company, key)
    emulator.script(key, {"status": 400, "message": "Unable to process input image."})
    refused(stack.post(DEEP[name], company), "invalid_file")


@pytest.mark.parametrize("name", FOREIGN)
def test_foreign_files(stack: Stack, emulator: Emulator, company: str, name: str) -> None:
    stack.token(company)
    refused(stack.post(FOREIGN[name], company), "unsupported_media_type")
    assert emulator.log() == []
    assert stack.sql("SELECT * FROM TokenReservations WHERE CompanyID = ?", company) == []


@pytest.mark.parametrize("header", [
    'name="file"; filename="invoice.docx"\r\nContent-Type: application/msword',
    'name="file"; filename="a/../b\\c.png"\r\nContent-Type: image/gif; x=y',
    'name="file"; filename=""',
    'name="file"',
    "name=file; filename*=UTF-8''R%C3%A9sum%C3%A9.exe",
    'filename="x.txt"; name="file"\r\nX-Other: 1\r\nContent-Transfer-Encoding: binary',
])
def test_file_is_known_by_its_bytes(stack: Stack, emulator: Emulator, company: str, pdf: bytes, header: str) -> None:
    stack.token(company)
    body, headers = multipart(('name="companyID"', company.encode()), ('name="username"', b"anna"), (header, pdf))
    assert stack.request("POST", "/extract", body, headers).status == 200
    assert emulator.log()[0]["mime"] == "application/pdf"


# ---- the form ----

TEXT_FIELDS = ["companyID", "username", "branch"]
BAD_TEXTS = {
    "257 bytes": b"x" * 257, "257 bytes of UTF-8": "ü".encode() * 128 + b"x",
    "not UTF-8": b"caf\xe9", "overlong UTF-8": b"a\xc0\xafb", "surrogate": b"a\xed\xa0\x80b", "cut UTF-8": b"a\xe2\x82",
    "newline": b"a\nb", "CRLF": b"a\r\nb", "tab": b"a\tb", "NUL": b"a\0b", "escape": b"a\x1b[31mb", "DEL": b"a\x7fb",
    "C1 control": "a\u0085b".encode(), "leading space": b" a", "trailing space": b"a ", "only a space": b" ",
    "leading no-break space": "\u00a0a".encode(), "trailing ideographic space": "a\u3000".encode(),
}


@pytest.mark.parametrize("fault", BAD_TEXTS)
@pytest.mark.parametrize("field", TEXT_FIELDS)
def test_bad_text(stack: Stack, emulator: Emulator, pdf: bytes, field: str, fault: str) -> None:
    fields = {"companyID": b"NT047", "username": b"anna", "branch": b"Berlin"} | {field: BAD_TEXTS[fault]}
    body, headers = multipart(*((f'name="{n}"', v) for n, v in fields.items()), ('name="file"', pdf))
    problem = refused(stack.request("POST", "/extract", body, headers), "bad_request")
    assert problem["detail"].startswith(f"{field} "), problem
    assert emulator.log() == []


@pytest.mark.parametrize("field", ["companyID", "username"])
def test_required_text(stack: Stack, pdf: bytes, field: str) -> None:
    fields = {"companyID": b"NT047", "username": b"anna"}
    empty, headers = multipart(*((f'name="{n}"', v) for n, v in (fields | {field: b""}).items()), ('name="file"', pdf))
    assert refused(stack.request("POST", "/extract", empty, headers), "bad_request")["detail"] \
        == f"{field} must not be empty."
    del fields[field]
    missing, headers = multipart(*((f'name="{n}"', v) for n, v in fields.items()), ('name="file"', pdf))
    assert refused(stack.request("POST", "/extract", missing, headers), "bad_request")["detail"] \
        == f"{field} is missing."


def test_file_is_required(stack: Stack, company: str) -> None:
    assert refused(stack.post(None, company), "bad_request")["detail"] == "file is missing."


@pytest.mark.parametrize("field", ["companyID", "username", "branch", "file"])
@pytest.mark.parametrize("again", ["the same", "another"])
def test_field_twice(stack: Stack, emulator: Emulator, company: str, pdf: bytes, field: str, again: str) -> None:
    stack.token(company)
    value = {"companyID": company, "username": "anna", "branch": "Berlin"}.get(field, "").encode()
    value = b"other" if again == "another" else pdf if field == "file" else value
    answer = stack.post(pdf, company, more=[(field, value)])
    assert refused(answer, "bad_request")["detail"] == f"{field} is given twice."
    assert emulator.log() == []


def test_an_empty_first_value_counts(stack: Stack, company: str, pdf: bytes) -> None:
    body, headers = multipart(('name="branch"', b""), ('name="branch"', b"x"), ('name="companyID"', company.encode()),
                              ('name="username"', b"a"), ('name="file"', pdf))
    assert refused(stack.request("POST", "/extract", body, headers), "bad_request")["detail"] \
        == "branch is given twice."


@pytest.mark.parametrize("branch", [None, ""])
def test_branch_is_optional(stack: Stack, company: str, pdf: bytes, branch: str | None) -> None:
    stack.token(company)
    answer = stack.post(pdf, company, branch=branch)
    assert answer.status == 200
    [row] = stack.sql("SELECT Branch FROM TokenUsageLogs WHERE CompanyID = ?", company)
    assert row["Branch"] == ""


@pytest.mark.parametrize("text", [
    "x", "x" * 256, "ü" * 128, "Công ty TNHH Ánh Dương", "東京支店", "O'Brien; DROP TABLE TokenMaster;--", 'a"b\\c%s%n',
    "a  b", "😀👩‍👩‍👧", "<script>alert(1)</script>", "cafe\u0301", "%41%zz", "null",
])
def test_texts_are_kept_as_they_are(stack: Stack, company: str, pdf: bytes, text: str) -> None:
    stack.token(company)
    answer = stack.post(pdf, company, user=text, branch=text)
    assert answer.status == 200
    [row] = stack.sql("SELECT RequestedBy, Branch FROM TokenUsageLogs WHERE RequestID = ?", answer.json()["request_id"])
    assert row == {"RequestedBy": text, "Branch": text}


@pytest.mark.parametrize("order", ["file companyID username branch", "branch username companyID file",
                                   "username file branch companyID", "companyID file other username note branch"])
def test_any_order_and_unknown_fields(stack: Stack, company: str, pdf: bytes, order: str) -> None:
    stack.token(company)
    values = {"file": pdf, "companyID": company.encode(), "username": b"anna", "branch": b"Berlin", "other": b"\xff\0",
              "note": b""}
    body, headers = multipart(*((f'name="{name}"', values[name]) for name in order.split()))
    answer = stack.request("POST", "/extract", body, headers)
    assert answer.status == 200, answer.body
    [row] = stack.sql("SELECT RequestedBy, Branch FROM TokenUsageLogs WHERE CompanyID = ?", company)
    assert row == {"RequestedBy": "anna", "Branch": "Berlin"}


def test_names_are_exact(stack: Stack, company: str, pdf: bytes) -> None:
    body, headers = multipart(('name="companyid"', company.encode()), ('name="username"', b"a"), ('name="file"', pdf))
    assert refused(stack.request("POST", "/extract", body, headers), "bad_request")["detail"] == "companyID is missing."


def malformed() -> dict[str, tuple[bytes, str]]:
    """(body, Content-Type) by name."""
    good, content_type = form(b"%PDF-1.4 %%EOF")
    boundary = content_type.split("boundary=")[1].encode()
    line = b"--" + boundary
    return {
        "JSON": (b"{}", "application/json"),
        "urlencoded": (b"companyID=NT047", "application/x-www-form-urlencoded"),
        "another multipart": (good, content_type.replace("form-data", "mixed")),
        "a longer type": (good, content_type.replace("form-data", "form-data-x")),
        "no boundary": (good, "multipart/form-data"),
        "an empty boundary": (good, 'multipart/form-data; boundary=""'),
        "a boundary of 71 characters": (good, "multipart/form-data; boundary=" + "b" * 71),
        "another boundary": (good, "multipart/form-data; boundary=other"),
        "two boundaries": (good, content_type + "; boundary=other"),
        "no end": (good[: good.rindex(line)], content_type),
        "cut in the file": (good[:-len(line) - 12], content_type),
        "cut in a header": (good[: len(line) + 20], content_type),
        "only the first delimiter": (line + b"\r\n", content_type),
        "bytes after a boundary": (good.replace(line + b"\r\n", line + b"x\r\n", 1), content_type),
        "no name": (good.replace(b'name="branch"', b'nam="branch"'), content_type),
        "no disposition": (good.replace(b"Content-Disposition", b"Content-Dispositio", 1), content_type),
        "not form-data": (good.replace(b"form-data;", b"attachment;", 1), content_type),
        "an open quote": (good.replace(b'name="branch"', b'name="branch'), content_type),
        "base64": (good.replace(b"Content-Type: application/octet-stream", b"Content-Transfer-Encoding: base64"),
                   content_type),
        "33 parts": form(b"%PDF-1.4 %%EOF", more=[(f"n{i}", b"") for i in range(29)]),
        "an endless header": (good.replace(b"Content-Type: app", b"X: " + b"x" * 9000 + b"\r\nContent-Type: app"),
                              content_type),
    }


@pytest.mark.parametrize("fault", malformed())
def test_malformed(stack: Stack, emulator: Emulator, fault: str) -> None:
    body, content_type = malformed()[fault]
    refused(stack.request("POST", "/extract", body, {"Content-Type": content_type}), "bad_request")
    assert emulator.log() == []


def test_32_parts_are_fine(stack: Stack, company: str, pdf: bytes) -> None:
    stack.token(company)
    assert stack.post(pdf, company, more=[(f"n{i}", b"") for i in range(28)]).status == 200


def test_empty_form(stack: Stack) -> None:
    answer = stack.request("POST", "/extract", b"--b--\r\n", {"Content-Type": "multipart/form-data; boundary=b"})
    assert refused(answer, "bad_request")["detail"] == "file is missing."


@pytest.mark.parametrize("headers", [{"Content-Type": "multipart/form-data; boundary=b"}, {}])
def test_no_body(stack: Stack, headers: dict[str, str]) -> None:
    refused(stack.request("POST", "/extract", b"", headers), "bad_request")


def test_chunked_upload(stack: Stack, company: str, pdf: bytes) -> None:
    stack.token(company)
    body, content_type = form(pdf, company)
    pieces = [body[i : i + 10_000] for i in range(0, len(body), 10_000)]
    raw = b"".join(b"%x\r\n%s\r\n" % (len(p), p) for p in pieces) + b"0\r\n\r\n"
    answer = stack.request("POST", "/extract", raw, {"Content-Type": content_type, "Transfer-Encoding": "chunked"})
    assert answer.status == 200, answer.body


# ---- 413 ----


@pytest.mark.parametrize("setting, limit, words", [
    ("1M", 1 << 20, "The upload is larger than the limit of 1 MB (1048576 bytes)."),
    ("100K", 102_400, "The upload is larger than the limit of 102400 bytes."),
])
def test_too_large(make_stack: Callable[..., Stack], emulator: Emulator, setting: str, limit: int, words: str) -> None:
    stack = make_stack(env={"EXTRACT_SERVER_MAX_UPLOAD": setting})
    stack.token()
    frame = len(form(b"")[0])
    file = b"%PDF-1.4\n" + b"%" * (limit - frame - 15) + b"\n%%EOF"
    assert stack.post(file).status == 200, "exactly the limit"
    problem = refused(stack.post(file + b"\n"), "file_too_large")
    assert problem["detail"] == words
    assert len(emulator.log()) == 1
    assert stack.post(file).status == 200, "and the pool is as it was"


# ---- paths and methods ----


@pytest.mark.parametrize("method, path, allow", [
    ("GET", "/extract", "POST"), ("HEAD", "/extract", "POST"), ("PUT", "/extract", "POST"),
    ("DELETE", "/extract", "POST"), ("PATCH", "/extract", "POST"), ("OPTIONS", "/extract", "POST"),
    ("GET", "/extract?companyID=NT047", "POST"),
    ("POST", "/healthz", "GET, HEAD"), ("DELETE", "/readyz", "GET, HEAD"), ("PUT", "/metrics", "GET, HEAD"),
])
def test_method_not_allowed(stack: Stack, method: str, path: str, allow: str) -> None:
    answer = stack.request(method, path)
    assert answer.status == 405
    assert answer.headers["Allow"] == allow
    if method != "HEAD":
        refused(answer, "method_not_allowed")


def test_method_not_allowed_with_a_body(stack: Stack, pdf: bytes) -> None:
    answer = stack.request("PUT", "/extract", pdf * 20)
    refused(answer, "method_not_allowed")
    assert answer.headers["Allow"] == "POST"


@pytest.mark.parametrize("method", ["GET", "POST", "DELETE"])
@pytest.mark.parametrize("path", ["/admin/nothing", "/admin/"])
def test_not_found(stack: Stack, method: str, path: str) -> None:
    answer = stack.request(method, path)
    refused(answer, "not_found")
    assert answer.headers["Allow"] is None


# ---- tokens ----


@pytest.mark.parametrize("statuses, code", [
    ("", "no_active_token"),
    ("Expired", "token_expired"),
    ("Exceeded", "token_unavailable"),
    ("Disabled", "token_unavailable"),
    ("Disabled Expired", "token_expired"),
    ("Exceeded Expired", "token_expired"),
    ("Expired Disabled", "token_unavailable"),
    ("Expired Exceeded", "token_unavailable"),
    ("Active Expired", None),
    ("Active Disabled", None),
])
def test_status_of_tokens(stack: Stack, emulator: Emulator, company: str, pdf: bytes, statuses: str,
                          code: str | None) -> None:
    """The statuses of the company's tokens, the newest last."""
    for day, status in enumerate(statuses.split(), 1):
        token = stack.token(company)
        stack.ctl("token", "set-status", str(token), status)
        stack.sql("UPDATE TokenMaster SET CreatedAt = ? WHERE TokenID = ?", f"2026-01-0{day} 00:00:00", token)
    answer = stack.post(pdf, company)
    if code is None:
        assert answer.status == 200
    else:
        refused(answer, code)
        assert emulator.log() == []


@pytest.mark.parametrize("created, code", [
    (["2026-02-01T00:00:00.000Z", "2026-01-01 00:00:00"], "token_expired"),  # by time, not by number
    (["2026-01-01T00:00:00.000Z", "2026-01-01 00:00:00"], "token_unavailable"),  # the same time: by number
    (["2026-01-01T00:00:00.000Z", "2026-01-01T00:00:00.001Z"], "token_unavailable"),
])
def test_newest_token_decides(stack: Stack, company: str, pdf: bytes, created: list[str], code: str) -> None:
    for when, status in zip(created, ["Expired", "Disabled"], strict=True):
        stack.sql("UPDATE TokenMaster SET CreatedAt = ?, Status = ? WHERE TokenID = ?", when, status,
                  stack.token(company))
    refused(stack.post(pdf, company), code)


@pytest.mark.parametrize("status", ["active", "ACTIVE"])
def test_status_without_case(stack: Stack, company: str, pdf: bytes, status: str) -> None:
    stack.sql("UPDATE TokenMaster SET Status = ? WHERE TokenID = ?", status, stack.token(company))
    assert stack.post(pdf, company).status == 200


def test_unknown_status_counts_as_disabled(stack: Stack, company: str, pdf: bytes) -> None:
    stack.sql("UPDATE TokenMaster SET Status = 'Paused' WHERE TokenID = ?", stack.token(company))
    refused(stack.post(pdf, company), "token_unavailable")


def test_used_up(stack: Stack, emulator: Emulator, company: str, pdf: bytes) -> None:
    token = stack.token(company, None, "--limit", "500")
    spend(stack, token, 500)
    refused(stack.post(pdf, company), "token_unavailable")
    assert emulator.log() == []


def test_every_token_at_fault(stack: Stack, emulator: Emulator, company: str, pdf: bytes) -> None:
    emulator.script("*", {"status": 402}, repeat=True)
    for _ in range(2):
        stack.token(company)
    refused(stack.post(pdf, company), "token_unavailable")
    assert len(emulator.log()) == 2


@pytest.mark.parametrize("stored, asked", [("NT-Ab3", "nt-aB3"), ("MÜLLER-Ø", "müller-ø"), ("Công-Ty", "CÔNG-TY")])
def test_company_without_case(stack: Stack, pdf: bytes, stored: str, asked: str) -> None:
    tail = uuid.uuid4().hex[:8]
    stack.token(stored + tail)
    answer = stack.post(pdf, asked + tail.upper())
    assert answer.status == 200, answer.body
    request = answer.json()["request_id"]
    for table in ("TokenUsageLogs", "TokenReservations"):
        [row] = stack.sql(f"SELECT CompanyID FROM {table} WHERE RequestID = ?", request)
        assert row["CompanyID"] == stored + tail
    [entry] = stack.rows("SELECT Message FROM ApplicationLogs WHERE RequestID = ?", request)
    assert f"company={stored + tail} " in entry["Message"]


def test_stored_spelling_in_retries_and_refusals(stack: Stack, emulator: Emulator, pdf: bytes) -> None:
    company, key = f"Acme-{uuid.uuid4().hex[:8]}", new_key()
    token = stack.token(company, key)
    emulator.script(key, {"status": 404})
    answer = stack.post(pdf, company.upper())
    refused(answer, "upstream_rejected")
    request = answer.headers["X-Request-ID"]
    [row] = stack.rows("SELECT CompanyID FROM RetryAttempts WHERE RequestID = ?", request)
    assert row["CompanyID"] == company
    [entry] = stack.rows("SELECT Message FROM ApplicationLogs WHERE RequestID = ?", request)
    assert f"company={company} " in entry["Message"]
    stack.ctl("token", "set-status", str(token), "Disabled")
    refused(stack.post(pdf, company.lower()), "token_unavailable")


def test_two_spellings_are_one_company(stack: Stack, emulator: Emulator, pdf: bytes) -> None:
    name = f"twin-{uuid.uuid4().hex[:8]}"
    first, second = stack.token(name.upper()), stack.token(name)
    stack.ctl("token", "set-status", str(second), "Disabled")
    assert stack.post(pdf, name).status == 200
    assert stack.sql("SELECT TokenID FROM TokenUsageLogs WHERE CompanyID = ?", name) == [{"TokenID": first}]


# ---- Gemini's failures, as a client sees them (test_retry.py looks at the rest) ----


@pytest.mark.parametrize("step, code, spent, calls", [
    ({"status": 400}, "invalid_file", False, 1),
    ({"block_reason": "SAFETY"}, "invalid_file", True, 1),
    ({"finish_reason": "MAX_TOKENS"}, "invalid_file", True, 1),
    ({"parts": []}, "invalid_file", True, 1),
    ({"status": 404}, "upstream_rejected", False, 1),
    ({"status": 413}, "upstream_rejected", False, 1),
    ({"status": 503}, "upstream_unavailable", False, 4),
    ({"reset": "after_read"}, "upstream_unavailable", True, 4),
    ({"text": "Sorry."}, "invalid_answer", True, 2),
    ({"status": 429, "retry_delay": "3600s"}, "upstream_rate_limited", False, 1),
    ({"status": 402}, "token_unavailable", False, 1),
    ({"status": 403}, "upstream_rate_limited", False, 1),
], ids=lambda value: json.dumps(value) if isinstance(value, dict) else str(value))
def test_gemini_fails(stack: Stack, emulator: Emulator, company: str, pdf: bytes, step: dict[str, Any], code: str,
                      spent: bool, calls: int) -> None:
    key = new_key()
    stack.token(company, key)
    emulator.script(key, step, repeat=True)
    refused(stack.post(pdf, company), code, spent=spent)
    assert len(emulator.log()) == calls


# ---- the service's own limits ----


def held(stack: Stack, emulator: Emulator, pool: ThreadPoolExecutor, pdf: bytes, company: str) -> Future[Answer]:
    """A request that is at Gemini until emulator.release()."""
    before = emulator.wait(held=0)["held"]
    future = pool.submit(stack.post, pdf, company)
    emulator.wait(held=before + 1)
    return future


def metric(stack: Stack, name: str) -> float:
    [value] = re.findall(rf"^{re.escape(name)} (\S+)$", stack.get("/metrics").body.decode(), re.M)
    return float(value)


def test_company_past_its_share(make_stack: Callable[..., Stack], emulator: Emulator, pool: ThreadPoolExecutor,
                                pdf: bytes) -> None:
    stack = make_stack(env={"EXTRACT_SERVER_COMPANY_SHARE": "0.25"})  # 2 of 8
    for name in ("Acme", "Other"):
        stack.token(name)
    emulator.script("*", {"hold": True}, {"hold": True})
    first = held(stack, emulator, pool, pdf, "Acme")
    second = held(stack, emulator, pool, pdf, "ACME")
    refused(stack.post(pdf, "acme"), "rate_limited")
    assert stack.post(pdf, "Other").status == 200
    emulator.release()
    assert (first.result().status, second.result().status) == (200, 200)
    assert stack.post(pdf, "acme").status == 200


def test_queue_is_full(make_stack: Callable[..., Stack], emulator: Emulator, pool: ThreadPoolExecutor,
                       pdf: bytes) -> None:
    stack = make_stack(env={"EXTRACT_SERVER_THREADS": "1", "EXTRACT_SERVER_QUEUE": "1"})
    stack.token()
    emulator.script("*", {"hold": True})
    first = held(stack, emulator, pool, pdf, "NT047")
    second = pool.submit(stack.post, pdf)
    eventually(lambda: metric(stack, "extract_requests_queued") == 1)
    refused(stack.post(pdf), "overloaded")
    emulator.release()
    assert (first.result().status, second.result().status) == (200, 200)


def test_queue_wait_passed(make_stack: Callable[..., Stack], emulator: Emulator, pool: ThreadPoolExecutor,
                           pdf: bytes) -> None:
    stack = make_stack(env={"EXTRACT_SERVER_THREADS": "1", "EXTRACT_SERVER_QUEUE_WAIT": "50ms"})
    stack.token()
    emulator.script("*", {"hold": True})
    first = held(stack, emulator, pool, pdf, "NT047")
    refused(stack.post(pdf), "overloaded")
    emulator.release()
    assert first.result().status == 200
    assert len(emulator.log()) == 1


@pytest.fixture
def directory() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="extract-stack-") as name:
        yield Path(name)


def test_fault_of_ours(directory: Path, make_stack: Callable[..., Stack], emulator: Emulator, pdf: bytes) -> None:
    """nginx names a file, and the service does not know where such files are."""
    (directory / "server.d").mkdir()
    (directory / "server.d" / "transport.conf").symlink_to(ROOT / "nginx/extract-fcgi-body-file.conf")
    stack = make_stack(directory=directory)
    stack.token()
    answer = stack.post(pdf)
    refused(answer, "internal_error")
    assert str(directory) not in answer.body.decode()
    [entry] = stack.rows("SELECT * FROM ApplicationLogs WHERE LogLevel = 'ERROR'")
    assert entry["RequestID"] == answer.headers["X-Request-ID"]
    assert "server.body_file_dir" in entry["Exception"]


# ---- health, readiness, metrics ----


@pytest.mark.parametrize("path, content_type", [
    ("/healthz", "application/json"), ("/readyz", "application/json"),
    ("/metrics", "text/plain; version=0.0.4; charset=utf-8")])
def test_pages(stack: Stack, path: str, content_type: str) -> None:
    answer = stack.get(path)
    assert (answer.status, answer.headers["Content-Type"]) == (200, content_type)
    assert UUID_V7.fullmatch(answer.headers["X-Request-ID"])
    head = stack.request("HEAD", path)
    assert (head.status, head.headers["Content-Type"], head.body) == (200, content_type, b"")


def test_healthz(stack: Stack) -> None:
    assert stack.get("/healthz").json() == {"status": "ok"}


def test_readyz(stack: Stack) -> None:
    assert stack.get("/readyz").json() == {
        "status": "ok", "store": "reachable", "fallback": False,
        "outbox": {"usable": True, "waiting": 0, "records": 0, "dead": 0, "oldest_seconds": 0}}


def test_store_is_gone(make_stack: Callable[..., Stack], emulator: Emulator, pdf: bytes) -> None:
    """One that can be read but not written, too, serves nobody."""
    stack = make_stack(env={"EXTRACT_STORE_QUERY_TIMEOUT": "200ms"})
    stack.allowed_stderr = [r" (INFO|WARNING|ERROR) "]
    stack.token()
    with stack.store_away():
        refused(stack.post(pdf), "store_unavailable")
        eventually(lambda: stack.get("/readyz").status == 503, "what was written in the last second counts no more")
        refused(stack.get("/readyz"), "store_unavailable")
        assert stack.get("/healthz").status == 200
        assert stack.get("/metrics").status == 200
    assert stack.get("/readyz").json()["store"] == "reachable"
    assert stack.post(pdf).status == 200
    assert len(emulator.log()) == 1


def test_store_without_schema(make_stack: Callable[..., Stack]) -> None:
    stack = make_stack()
    stack.sql("ALTER TABLE SchemaVersion RENAME TO Hidden")
    refused(stack.get("/readyz"), "store_unavailable")
    stack.sql("ALTER TABLE Hidden RENAME TO SchemaVersion")
    assert stack.get("/readyz").status == 200


def test_metrics_are_prometheus_text(stack: Stack) -> None:
    text = stack.get("/metrics").body.decode()
    described: dict[str, str] = {}
    helped: set[str] = set()
    for line in text.splitlines():
        if match := re.fullmatch(r"# HELP (\w+) \S.*", line):
            helped.add(match[1])
        elif match := re.fullmatch(r"# TYPE (\w+) (counter|gauge|histogram)", line):
            described[match[1]] = match[2]
        elif line:
            match = re.fullmatch(r'(\w+)(\{\w+="[^"\\]*"\})? (\d+(\.\d+)?)', line)
            assert match, line
            family = match[1] if match[1] in described else re.sub("_(bucket|sum|count)$", "", match[1])
            assert family in described and family in helped, line
            assert (family != match[1]) == (described[family] == "histogram"), line
            assert family.endswith("_total") == (described[family] == "counter"), line
    codes = set(re.findall(r'extract_requests_total\{code="(\w+)"\}', text))
    assert codes >= set(PROBLEMS) | {"success"}


def test_metrics_count(stack: Stack, emulator: Emulator, company: str, pdf: bytes) -> None:
    def values() -> dict[str, float]:
        lines = stack.get("/metrics").body.decode().splitlines()
        return {name: float(number) for name, number in
                (line.rsplit(" ", 1) for line in lines if line and not line.startswith("#"))}

    key = new_key()
    stack.token(company, key)
    emulator.script(key, {"status": 503}, {}, {"status": 404}, {"cut": 50}, {"status": 404})
    before = values()
    usage = stack.post(pdf, company).json()["usage"]
    refused(stack.post(pdf, company), "upstream_rejected")
    refused(stack.post(pdf, company), "upstream_rejected", spent=True)
    refused(stack.post(b"GIF89a", company), "unsupported_media_type")
    stack.request("GET", "/extract")
    after = values()
    grown = {name: after[name] - before[name] for name in after if after[name] != before[name]}
    expected = {
        'extract_requests_total{code="success"}': 1, 'extract_requests_total{code="upstream_rejected"}': 2,
        'extract_requests_total{code="unsupported_media_type"}': 1,
        'extract_requests_total{code="method_not_allowed"}': 1,
        'extract_attempts_total{class="success"}': 1, 'extract_attempts_total{class="transient"}': 2,
        'extract_attempts_total{class="rejected"}': 2,
        'extract_tokens_total{kind="input"}': usage["input_tokens"],
        'extract_tokens_total{kind="output"}': usage["output_tokens"],
        'extract_tokens_total{kind="thoughts"}': usage["thoughts_tokens"],
        'extract_tokens_total{kind="cached"}': usage["cached_tokens"],
        'extract_tokens_total{kind="total"}': usage["total_tokens"],
        "extract_unknown_calls_total": 1,
    }
    assert {name: grown.get(name) for name in expected} == expected
    assert after["extract_requests_in_flight"] == after["extract_requests_queued"] == 0
    assert after["extract_workers"] == 8 and after["extract_processes"] == 1
    assert company not in stack.get("/metrics").body.decode()


# ---- what no answer holds ----


def test_no_secrets_in_answers(stack: Stack, emulator: Emulator, company: str, pdf: bytes) -> None:
    key = "AIzaSy" + uuid.uuid4().hex
    gossip = f"key {key} SELECT * FROM TokenMaster /etc/passwd {stack.dir} at extract.c:12"
    token = stack.token(company, key)
    answers: list[Answer] = []
    for step in ({"status": 400}, {"status": 404}, {"status": 500}, {"status": 403}, {"status": 402},
                 {"status": 429, "retry_delay": "3600s"}, {"status": 403, "reason": "CONSUMER_SUSPENDED"}):
        emulator.script(key, step | {"message": gossip}, repeat=True)
        stack.ctl("token", "set-status", str(token), "Active")
        answers.append(stack.post(pdf, company))
        assert answers[-1].status != 200
    stack.ctl("token", "set-status", str(token), "Active")
    for step in ({"text": gossip}, {"finish_reason": gossip}, {"block_reason": gossip}, {"body": gossip, "status": 502},
                 {"reset": "after_read"}):
        emulator.script(key, step, repeat=True)
        answers.append(stack.post(pdf, company))
        assert answers[-1].status != 200
    answers += [stack.post(pdf, company, user="a\nb"), stack.post(b"", company), stack.get("/extract"),
                stack.get("/readyz"), stack.get("/metrics"), stack.get("/healthz"), stack.get("/admin/tokens")]
    for answer in answers:
        text = str(answer.headers) + answer.body.decode()
        for secret in (key, key[6:20], str(stack.dir), "SELECT", "TokenMaster", "/etc", ".c:", "sqlite", "store.db"):
            assert secret not in text, text


# ---- what a DBA does by hand ----


@pytest.mark.parametrize("around", ["{}\n", "{}\r\n", " \t{} \r\n\x01"], ids=ascii)
def test_pasted_key(stack: Stack, emulator: Emulator, company: str, pdf: bytes, around: str) -> None:
    """What clings to a key that was pasted into an INSERT does not go to Gemini."""
    key = new_key()
    stack.sql("INSERT INTO TokenMaster (CompanyID, ApiKey) VALUES (?, ?)", company, around.format(key))
    assert stack.post(pdf, company).status == 200
    assert [call["key"] for call in emulator.log()] == [key]


@pytest.mark.parametrize("key", ["", "\r\n", "two words", "schlüssel", "first\nsecond"], ids=ascii)
def test_unusable_key(stack: Stack, emulator: Emulator, company: str, pdf: bytes, key: str) -> None:
    stack.sql("INSERT INTO TokenMaster (CompanyID, ApiKey) VALUES (?, ?)", company, key)
    refused(stack.post(pdf, company), "token_unavailable")
    assert emulator.log() == []


def test_limit_raised_by_hand(stack: Stack, company: str, pdf: bytes) -> None:
    token = stack.token(company, new_key(), "--limit", "10")
    assert stack.post(pdf, company).status == 200
    refused(stack.post(pdf, company), "token_unavailable")
    stack.sql("UPDATE TokenMaster SET TotalTokenLimit = 1000000 WHERE TokenID = ?", token)
    assert stack.sql("SELECT Status, StatusReason FROM TokenMaster WHERE TokenID = ?", token) == [
        {"Status": "Active", "StatusReason": None}]
    stack.balanced()
    assert stack.post(pdf, company).status == 200
