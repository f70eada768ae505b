"""The emulator itself: what it refuses, what a script can make it do, what its log says.

    python3 -m pytest -q tests/emulator
"""

from __future__ import annotations

import gzip
import hashlib
import http.client
import json
import shutil
import signal
import socket
import ssl
import struct
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Iterator

import pytest

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

from gemini_answer import SCENARIOS, STEP_FIELDS, invoice_for, usage_for  # noqa: E402
from gemini_request import MAX_REQUEST_BYTES, InlineFile, encode_file  # noqa: E402

PDF = b"%PDF-1.4\n1 0 obj<</Type /Page>>endobj 2 0 obj<</Type/Page>>endobj <</Type /Pages>>\n%%EOF\n"
PNG = b"\x89PNG\r\n\x1a\n" + b"\0" * 20
FTYP = struct.pack(">I4s4sI4s", 20, b"ftyp", b"mif1", 0, b"heic")
PATH = "/v1beta/models/gemini-3.5-flash:generateContent"
PROMPT = "Read this invoice."


class Client:
    """A client of one emulator: calls on a fresh or a kept connection, and the control interface."""

    def __init__(self, port: int):
        self.port = port

    def connect(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)

    def send(self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None,
             on: http.client.HTTPConnection | None = None) -> tuple[http.client.HTTPResponse, bytes]:
        connection = on or self.connect()
        data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        try:
            connection.request(method, path, data, headers or {})
            response = connection.getresponse()
            return response, response.read()
        finally:
            if on is None:
                connection.close()

    def control(self, name: str, body: Any = None) -> Any:
        response, content = self.send("GET" if body is None else "POST", f"/__emulator/{name}", body)
        assert response.status == 200, content
        return json.loads(content)

    def script(self, *steps: dict[str, Any], key: str = "*", repeat: bool = False) -> None:
        self.control("script", {"key": key, "steps": list(steps), "repeat": repeat})

    def call(self, body: Any = None, key: str | None = "key-1", path: str = PATH,
             on: http.client.HTTPConnection | None = None, **headers: str) -> tuple[http.client.HTTPResponse, bytes]:
        sent = {"Content-Type": "application/json"} | ({"x-goog-api-key": key} if key else {})
        sent |= {name.replace("_", "-"): value for name, value in headers.items()}
        return self.send("POST", path, request() if body is None else body, sent, on)

    def refused(self, body: Any = None, **options: Any) -> dict[str, Any]:
        """The error of a call that must be refused; its form is checked on the way."""
        response, content = self.call(body, **options)
        error = json.loads(content)["error"]
        assert error["code"] == response.status >= 400
        assert isinstance(error["message"], str) and error["status"].isupper()
        return error

    def log(self) -> list[dict[str, Any]]:
        """The log, once nothing is under way any more."""
        calls = self.control("wait?calls=0")["calls"]
        self.control(f"wait?finished={calls}")
        return self.control("log")


def request(mime: str = "application/pdf", data: bytes = PDF, **config: Any) -> dict[str, Any]:
    return {"contents": [{"role": "user", "parts": [encode_file(mime, data), {"text": PROMPT}]}],
            "generationConfig": config}


def with_schema(schema: Any) -> dict[str, Any]:
    return request(responseMimeType="application/json", responseJsonSchema=schema)


def text_of(content: bytes) -> str:
    return json.loads(content)["candidates"][0]["content"]["parts"][0]["text"]


def raw_call(port: int, head: str, body: bytes = b"") -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", port), timeout=20)
    connection.sendall(f"POST {PATH} HTTP/1.1\r\nHost: x\r\nx-goog-api-key: k\r\n"
                       f"Content-Type: application/json\r\n{head}\r\n".encode() + body)
    return connection


def read_all(connection: socket.socket) -> bytes:
    return b"".join(iter(lambda: connection.recv(65536), b""))


@pytest.fixture(scope="module")
def log_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("emulator") / "log.jsonl"


@pytest.fixture(scope="module")
def port(log_file: Path) -> Iterator[int]:
    program = [sys.executable, str(HERE / "gemini_emulator.py"), "--listen", "127.0.0.1:0", "--log", str(log_file)]
    with subprocess.Popen(program, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield int(process.stdout.readline().rpartition(":")[2])
        finally:
            process.send_signal(signal.SIGTERM)
            assert process.wait(timeout=5) == 0


@pytest.fixture
def emulator(port: int) -> Client:
    client = Client(port)
    client.control("reset", {})
    return client


# --- the default answer ----------------------------------------------------------------------------------------------

def test_default_answer_is_the_invoice_and_its_usage(emulator: Client) -> None:
    response, content = emulator.call()
    answer = json.loads(content)
    assert response.status == 200 and response.getheader("Content-Type") == "application/json; charset=UTF-8"
    assert answer["candidates"][0]["finishReason"] == "STOP"
    assert answer["modelVersion"] == "gemini-3.5-flash" and answer["responseId"]
    invoice = json.loads(text_of(content))
    assert invoice == invoice_for(PDF)
    usage = answer["usageMetadata"]
    assert usage == usage_for(PROMPT, [InlineFile("application/pdf", PDF)], text_of(content))
    assert usage["promptTokensDetails"] == [{"modality": "TEXT", "tokenCount": 5},
                                            {"modality": "DOCUMENT", "tokenCount": 1120}]
    assert usage["totalTokenCount"] == (usage["promptTokenCount"] + usage["candidatesTokenCount"]
                                        + usage["thoughtsTokenCount"])


def test_invoice_adds_up() -> None:
    invoice = invoice_for(b"")
    cents = lambda text: round(float(text) * 100)  # noqa: E731
    totals = {name: cents(text) for name, text in invoice["totals"].items()}
    assert sum(cents(line["amount"]) for line in invoice["line_items"]) == totals["subtotal"]
    assert sum(cents(line["tax_amount"]) for line in invoice["line_items"]) == totals["tax"]
    assert totals["subtotal"] - totals["discount"] + totals["tax"] == totals["total"]
    assert totals["total"] - totals["amount_paid"] == totals["amount_due"]
    iban = invoice["vendor"]["iban"]
    assert int("".join(str(int(c, 36)) for c in iban[4:] + iban[:4])) % 97 == 1


@pytest.mark.parametrize("mime, data", [
    ("image/png", PNG), ("image/jpeg", b"\xff\xd8\xff\xe0"), ("image/webp", b"RIFF\0\0\0\0WEBPVP8 "),
    ("image/heic", FTYP), ("image/heif", FTYP)])
def test_pictures_are_counted_as_images(emulator: Client, mime: str, data: bytes) -> None:
    _, content = emulator.call(request(mime, data, mediaResolution="MEDIA_RESOLUTION_LOW"))
    assert json.loads(content)["usageMetadata"]["promptTokensDetails"][1] == {"modality": "IMAGE", "tokenCount": 280}


@pytest.mark.parametrize("config", [
    {"responseMimeType": "application/json", "responseSchema": {
        "type": "OBJECT", "properties": {"a": {"type": "STRING", "nullable": True}}, "required": ["a"]}},
    {"response_mime_type": "application/json", "response_json_schema": {"type": "object"}},
    {"responseFormat": {"text": {"mimeType": "APPLICATION_JSON", "schema": {"type": "object"}}}},
    {"response_format": {"text": {"mime_type": "APPLICATION_JSON", "schema": {"type": "object"}}}},
    {"responseMimeType": "application/json", "responseJsonSchema": {
        "$id": "i", "$defs": {"x": {"type": ["string", "null"], "format": "date", "title": "t", "description": "d"}},
        "type": "object", "required": ["a"], "propertyOrdering": ["a", "b"], "additionalProperties": False,
        "properties": {"a": {"$ref": "#/$defs/x"}, "b": {
            "type": "array", "minItems": 0, "maxItems": 9, "prefixItems": [{"type": "null"}],
            "items": {"anyOf": [{"type": "number", "minimum": 0, "maximum": 1}, {"oneOf": [{"enum": ["x", 1]}]}]}}}}},
])
def test_schemas_are_accepted_and_logged(emulator: Client, config: dict[str, Any]) -> None:
    response, content = emulator.call(request(**config))
    assert response.status == 200, content
    assert emulator.log()[0]["has_schema"] and emulator.log()[0]["generationConfig"] == config


def test_other_fields_are_accepted(emulator: Client) -> None:
    body = request(maxOutputTokens=65536, thinkingConfig={"thinkingBudget": 0, "includeThoughts": False}, seed="7",
                   temperature=0.5, stopSequences=["x"], mediaResolution="MEDIA_RESOLUTION_HIGH")
    body |= {"systemInstruction": {"role": "system", "parts": [{"text": "Be exact."}]}, "safetySettings": [
        {"category": "HARM_CATEGORY_HARASSMENT", "threshold": "BLOCK_NONE"}], "cachedContent": None}
    response, content = emulator.call(body)
    assert response.status == 200, content
    assert json.loads(content)["usageMetadata"]["thoughtsTokenCount"] == 0
    assert emulator.log()[0]["prompt"] == "Be exact.\n" + PROMPT


def test_max_output_tokens_cut_the_answer(emulator: Client) -> None:
    candidate = json.loads(emulator.call(request(maxOutputTokens=100))[1])["candidates"][0]
    assert candidate["finishReason"] == "MAX_TOKENS" and len(candidate["content"]["parts"][0]["text"]) == 16


# --- what is refused -------------------------------------------------------------------------------------------------

def changed(path: list[Any], value: Any) -> dict[str, Any]:
    body = request()
    at: Any = body
    for name in path[:-1]:
        at = at[name]
    at[path[-1]] = value
    return body


PART = ["contents", 0, "parts", 0]


@pytest.mark.parametrize("body, message", [
    (b"{", "Invalid JSON payload received."),
    (b'{"a": NaN}', "Invalid JSON payload received."),
    (b'{"contents": "\xff"}', "Invalid JSON payload received."),
    (b"", "Invalid JSON payload received."),
    (b"[]", "Root element must be a message"),
    (b'{"contents":' * 900 + b"1" + b"}" * 900, "Invalid"),
    (b"[" * 100_000, "Nesting is too deep"),
    ({}, "contents is not specified"),
    (changed(["x"], 1), "Invalid JSON payload received. Unknown name \"x\": Cannot find field."),
    (changed(["contents", 0, "x"], 1),
     "Invalid JSON payload received. Unknown name \"x\" at 'contents[0]': Cannot find field."),
    (changed(PART + ["x"], 1), "Unknown name \"x\" at 'contents[0].parts[0]'"),
    (changed(PART + ["inlineData", "x"], 1), "Unknown name \"x\" at 'contents[0].parts[0].inline_data'"),
    (request(maxTokens=1), "Unknown name \"maxTokens\" at 'generation_config'"),
    (request(thinkingConfig={"x": 1}), "Unknown name \"x\" at 'generation_config.thinking_config'"),
    (request(maxOutputTokens=1, max_output_tokens=1), "already set"),
    (request(responseSchema={"properties": {"a": {"pattern": "x", "const": 1}}}),
     "Unknown name \"const\" at 'generation_config.response_schema.properties[0].value'"),
    (changed(["contents"], {}), "Invalid value at 'contents' (TYPE_LIST)"),
    (changed(["contents", 0], "x"), "Invalid value at 'contents[0]'"),
    (changed(["contents", 0], None), "Invalid value at 'contents[0]'"),
    (changed(["contents", 0, "parts", 1, "text"], 1), "Invalid value at 'contents[0].parts[1].text' (TYPE_STRING), 1"),
    (request(maxOutputTokens=1.5), "(TYPE_INT32), 1.5"),
    (request(maxOutputTokens=True), "(TYPE_INT32), true"),
    (request(temperature="warm"), "(TYPE_FLOAT)"),
    (request(responseLogprobs=1), "(TYPE_BOOL)"),
    (request(mediaResolution="HIGH"), "'generation_config.media_resolution'"),
    (request(maxOutputTokens=0), "must be positive"),
    (changed(["contents", 0, "role"], "assistant"), "Please use a valid role: user, model."),
    (changed(["contents", 0, "parts"], []), "parts must not be empty"),
    (changed(PART, {"thought": True}), "required oneof field 'data'"),
    (changed(PART + ["text"], "x"), "oneof field 'data' is already set"),
    (changed(["systemInstruction"], {"parts": [encode_file("image/png", PNG)]}), "takes text only"),
    (request("image/gif", b"GIF89a"), "Unsupported MIME type: image/gif"),
    (request("", PDF), "Unsupported MIME type"),
    (request("image/png", PDF), "Unable to process input image"),
    (request("image/webp", PNG), "Unable to process input image"),
    (request("image/heic", FTYP.replace(b"heic", b"avif")), "Unable to process input image"),
    (request("application/pdf", PNG), "The document has no pages."),
    (request("application/pdf", b""), "The document has no pages."),
    (request("application/pdf", PDF + b"<</Type /Page>>" * 1000), "1002 pages"),
    (request(responseJsonSchema={"type": "object"}), "only allowed when response_mime_type is 'application/json'"),
    (request(responseSchema={"type": "OBJECT"}), "only allowed when response_mime_type is 'application/json'"),
    (request(responseFormat={"text": {"schema": {}}}), "only allowed when mime_type is APPLICATION_JSON"),
    (request(responseMimeType="application/json", responseSchema={}, responseJsonSchema={}), "only one of"),
    (request(responseMimeType="application/xml"), "allowed mimetypes"),
    (with_schema([]), "must be an object"),
    (with_schema({"properties": {"a": {"pattern": "x"}}}),
     "generation_config.response_json_schema.properties[a]: keyword \"pattern\" is not supported"),
    (with_schema({"items": {"anyOf": [{"const": 1}]}}), "keyword \"const\" is not supported"),
    (with_schema({"type": "text"}), "type: invalid value"),
    (with_schema({"type": ["string", "nil"]}), "type: invalid value"),
    (with_schema({"minItems": "1"}), "minItems: invalid value"),
    (with_schema({"properties": {"a": True}}), "properties: invalid value"),
    (with_schema({"$ref": "#/$defs/x"}), "is not defined"),
    (with_schema({"$defs": {"x": {}}, "items": {"$ref": "#/$defs/x", "type": "object"}}), "beside $ref"),
    (with_schema({"properties": {}, "required": ["x"]}), "property \"x\" is not defined"),
], ids=lambda value: value if isinstance(value, str) else "")
def test_bad_requests_are_refused(emulator: Client, body: Any, message: str) -> None:
    error = emulator.refused(body)
    assert (error["code"], error["status"]) == (400, "INVALID_ARGUMENT")
    assert message in error["message"]


@pytest.mark.parametrize("data", ["eA", "eA=", "eA==\n", "e A==", "eA==eA==", "-_8=", "é", "="])
def test_base64_is_strict(emulator: Client, data: str) -> None:
    error = emulator.refused(changed(PART + ["inlineData", "data"], data))
    assert "'contents[0].parts[0].inline_data.data' (TYPE_BYTES), Base64 decoding failed" in error["message"]


def test_every_structural_fault_is_reported(emulator: Client) -> None:
    error = emulator.refused({"a": 1, "contents": [{"b": 2}]})
    violations = error["details"][0]["fieldViolations"]
    assert [violation.get("field") for violation in violations] == [None, "contents[0]"]
    assert error["message"] == "\n".join(violation["description"] for violation in violations)


def test_key_belongs_into_the_header(emulator: Client) -> None:
    missing = emulator.refused(key=None)
    assert missing["code"] == 403 and missing["status"] == "PERMISSION_DENIED"
    assert "unregistered callers" in missing["message"]
    assert emulator.refused(path=PATH + "?key=secret")["code"] == 400
    assert "secret" not in json.dumps(emulator.log())
    assert "Cannot bind query parameter" in emulator.refused(path=PATH + "?x=1")["message"]
    assert emulator.call(path=PATH + "?alt=json")[0].status == 200


def test_models(emulator: Client) -> None:
    key = {"x-goog-api-key": "k"}
    listed = json.loads(emulator.send("GET", "/v1beta/models", headers=key)[1])["models"]
    assert "models/gemini-3.5-flash" in [model["name"] for model in listed]
    assert json.loads(emulator.send("GET", "/v1beta/models/gemini-9", headers=key)[1])["name"] == "models/gemini-9"
    assert emulator.send("GET", "/v1beta/models")[0].status == 403
    assert emulator.send("GET", "/v1beta/models/gpt-5", headers=key)[0].status == 404
    assert emulator.send("GET", "/v1/models", headers=key)[0].status == 404
    unknown = emulator.refused(path="/v1beta/models/Gemini:generateContent")
    assert unknown["code"] == 404 and unknown["status"] == "NOT_FOUND"


def test_content_type_must_be_json(emulator: Client) -> None:
    assert emulator.refused(Content_Type="text/plain")["code"] == 400
    assert emulator.call(Content_Type="application/json; charset=UTF-8")[0].status == 200


# --- HTTP ------------------------------------------------------------------------------------------------------------

def test_connections_are_kept_and_numbered(emulator: Client) -> None:
    kept = emulator.connect()
    for _ in range(3):
        assert emulator.call(on=kept)[0].status == 200
    kept.close()
    emulator.call()
    numbers = [call["connection"] for call in emulator.log()]
    assert numbers[0] == numbers[1] == numbers[2] != numbers[3]


def test_chunked_body(emulator: Client) -> None:
    body = json.dumps(request()).encode()
    chunks = b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in (body[:10], body[10:])) + b"0\r\n\r\n"
    with raw_call(emulator.port, "Transfer-Encoding: chunked\r\nConnection: close\r\n", chunks) as connection:
        assert read_all(connection).startswith(b"HTTP/1.1 200 OK\r\n")
    assert emulator.log()[0]["request_bytes"] == len(body)


def test_expect_is_answered_before_the_body(emulator: Client) -> None:
    body = json.dumps(request()).encode()
    head = f"Content-Length: {len(body)}\r\nExpect: 100-continue\r\nConnection: close\r\n"
    with raw_call(emulator.port, head) as connection:
        assert connection.recv(65536) == b"HTTP/1.1 100 Continue\r\n\r\n"
        connection.sendall(body)
        assert read_all(connection).startswith(b"HTTP/1.1 200 OK\r\n")
    assert emulator.log()[0]["http_headers"]["expect"] == "100-continue"


@pytest.mark.parametrize("head, body", [
    (f"Content-Length: {MAX_REQUEST_BYTES + 1}\r\nExpect: 100-continue\r\n", b""),
    ("Transfer-Encoding: chunked\r\n", b"%x\r\n" % (MAX_REQUEST_BYTES + 1))])
def test_too_large_a_request_is_refused_unread(emulator: Client, head: str, body: bytes) -> None:
    with raw_call(emulator.port, head, body) as connection:
        answer = read_all(connection)
    assert answer.partition(b"HTTP/1.1 413")[0] in (b"", b"HTTP/1.1 100 Continue\r\n\r\n")
    assert b"Request payload size exceeds the limit" in answer
    assert emulator.log()[0]["status"] == 413 and not emulator.log()[0]["complete"]


@pytest.mark.parametrize("head", [
    "Content-Length: x\r\n", "Content-Length: 1\r\nTransfer-Encoding: chunked\r\n", "Transfer-Encoding: gzip\r\n",
    "No colon\r\n"])
def test_malformed_http_is_refused(emulator: Client, head: str) -> None:
    with raw_call(emulator.port, head) as connection:
        assert read_all(connection).startswith(b"HTTP/1.1 400 ")


def test_body_that_stops_is_seen(emulator: Client) -> None:
    with raw_call(emulator.port, "Content-Length: 1000\r\n", b"{"):
        emulator.control("wait?calls=1")
    call = emulator.log()[0]
    assert (call["complete"], call["answered"], call["status"]) == (False, False, None)


def test_two_hundred_at_once(emulator: Client) -> None:
    emulator.script({"hold": True}, repeat=True)
    with ThreadPoolExecutor(200) as pool:
        files = [PDF + str(n).encode() for n in range(200)]
        answers = [pool.submit(emulator.call, request("application/pdf", data)) for data in files]
        assert emulator.control("wait?held=200&timeout=20")["held"] == 200
        assert emulator.control("release", {"count": 50}) == {"released": 50}
        assert emulator.control("wait?answered=50")["held"] == 150
        assert emulator.control("release", {"count": None}) == {"released": 150}
        invoices = [json.loads(text_of(answer.result()[1])) for answer in answers]
    assert invoices == [invoice_for(data) for data in files]


# --- steps -----------------------------------------------------------------------------------------------------------

def test_script_order_repeat_and_keys(emulator: Client) -> None:
    emulator.script({"status": 500}, {"status": 503}, key="a")
    emulator.script({"status": 429}, {"status": 504}, repeat=True)
    statuses = [emulator.call(key=key)[0].status for key in "aaabbb"]
    assert statuses == [500, 503, 200, 429, 504, 504]
    emulator.script(key="*")
    assert emulator.call(key="b")[0].status == 200
    assert [call["step"] for call in emulator.log()[-2:]] == [{"status": 504}, None]


def test_error_step_in_googles_form(emulator: Client) -> None:
    emulator.script({"status": 429, "message": "slow down", "reason": "RATE_LIMIT_EXCEEDED", "retry_delay": "45.8s",
                     "quota_id": "GenerateRequestsPerDay", "retry_after": 7, "headers": {"X-A": "b"},
                     "details": [{"@type": "x"}]}, {"status": 418, "error_status": "TEAPOT"})
    response, content = emulator.call()
    error = json.loads(content)["error"]
    assert (error["code"], error["message"], error["status"]) == (429, "slow down", "RESOURCE_EXHAUSTED")
    kinds = {detail["@type"].rpartition(".")[2]: detail for detail in error["details"]}
    assert kinds["ErrorInfo"]["reason"] == "RATE_LIMIT_EXCEEDED" and kinds["ErrorInfo"]["domain"] == "googleapis.com"
    assert kinds["RetryInfo"]["retryDelay"] == "45.8s" and "x" in kinds
    assert kinds["QuotaFailure"]["violations"][0]["quotaId"] == "GenerateRequestsPerDay"
    assert response.getheader("Retry-After") == "7" and response.getheader("X-A") == "b"
    assert emulator.refused()["status"] == "TEAPOT"


def test_candidate_steps(emulator: Client) -> None:
    thought = [{"text": "hm", "thought": True}, {"text": "ab"}, {"text": "cd"}]
    emulator.script({"text": "12345"}, {"parts": thought, "finish_reason": "SAFETY"}, {"parts": []},
                    {"block_reason": "SAFETY"}, {"no_candidates": True}, {"usage": None},
                    {"usage": {"promptTokenCount": 7}}, {"raw_json": []}, {"body": "<p>", "status": 502})
    answers = [emulator.call() for _ in range(9)]
    parsed = [json.loads(content) for _, content in answers[:8]]
    assert text_of(answers[0][1]) == "12345" and parsed[0]["usageMetadata"]["candidatesTokenCount"] == 2
    assert parsed[1]["candidates"][0]["content"]["parts"] == thought
    assert parsed[1]["candidates"][0]["finishReason"] == "SAFETY"
    assert parsed[1]["usageMetadata"]["candidatesTokenCount"] == 1
    assert "parts" not in parsed[2]["candidates"][0]["content"]
    assert parsed[3]["promptFeedback"] == {"blockReason": "SAFETY"} and "candidates" not in parsed[3]
    assert "candidates" not in parsed[4] and parsed[4]["usageMetadata"]["candidatesTokenCount"] == 0
    assert "usageMetadata" not in parsed[5] and parsed[6]["usageMetadata"]["promptTokenCount"] == 7
    assert parsed[7] == [] and answers[8][1] == b"<p>"
    assert answers[8][0].getheader("Content-Type").startswith("text/html")
    assert [call["usage"] for call in emulator.log()[4:9]] == [
        parsed[4]["usageMetadata"], None, parsed[6]["usageMetadata"], None, None]


@pytest.mark.parametrize("step, failure, complete", [
    ({"close": "before_read"}, http.client.RemoteDisconnected, False),
    ({"close": "after_read"}, http.client.RemoteDisconnected, True),
    ({"reset": "before_read"}, ConnectionResetError, False),
    ({"reset": True}, ConnectionResetError, True),
    ({"cut": 10}, http.client.IncompleteRead, True)])
def test_connections_that_break(emulator: Client, step: dict[str, Any], failure: type[Exception],
                                complete: bool) -> None:
    emulator.script(step)
    with pytest.raises(failure):
        emulator.call()
    call = emulator.log()[0]
    assert (call["complete"], call["answered"]) == (complete, False)
    assert call["status"] == (200 if "cut" in step else None)


def test_early_close_is_a_fin_even_during_an_upload(emulator: Client) -> None:
    emulator.script({"close": "before_read"})
    with raw_call(emulator.port, "Content-Length: 10000000\r\n", b" " * 1_000_000) as connection:
        assert connection.recv(1) == b""


def test_gzip(emulator: Client) -> None:
    emulator.script({"gzip": True}, {"gzip": "bad"})
    response, content = emulator.call()
    assert response.getheader("Content-Encoding") == "gzip"
    assert json.loads(text_of(gzip.decompress(content)))["currency"] == "EUR"
    with pytest.raises(Exception):
        gzip.decompress(emulator.call()[1])


def test_size_and_trickle(emulator: Client) -> None:
    emulator.script({"size": 3_000_000}, {"raw_json": 1, "trickle": 0.01})
    _, content = emulator.call()
    assert len(content) == 3_000_000 and text_of(content)
    start = time.monotonic()
    assert emulator.call()[1] == b"1\n" and time.monotonic() - start >= 0.02


def test_connection_endings_after_an_answer(emulator: Client) -> None:
    emulator.script({"close_connection": True}, {"die_idle": True})
    assert emulator.call()[0].getheader("Connection") == "close"
    kept = emulator.connect()
    response, _ = emulator.call(on=kept)
    assert response.status == 200 and response.getheader("Connection") is None
    assert kept.sock.recv(1) == b""
    kept.close()
    assert all(call["answered"] for call in emulator.log())


def test_delay_hold_and_clients_that_leave(emulator: Client) -> None:
    emulator.script({"delay": 0.2}, {"delay": 600}, {"hold": True})
    start = time.monotonic()
    assert emulator.call()[0].status == 200 and time.monotonic() - start >= 0.2
    body = json.dumps(request()).encode()
    for sent in (2, 3):
        with raw_call(emulator.port, f"Content-Length: {len(body)}\r\n", body):
            emulator.control(f"wait?complete={sent}")
    emulator.control("wait?gone=2&finished=3&held=0")
    assert [call["gone"] for call in emulator.log()] == [False, True, True]


def test_reset_lets_held_calls_go_and_forgets_them(emulator: Client) -> None:
    emulator.script({"hold": True})
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(emulator.call)
        emulator.control("wait?held=1")
        assert emulator.control("held") == {"held": 1}
        emulator.control("reset", {})
        assert answer.result()[0].status == 200
    assert emulator.control("log") == []


# --- the control interface -------------------------------------------------------------------------------------------

def test_log_says_what_was_sent(emulator: Client, log_file: Path) -> None:
    emulator.call(request("image/png", PNG, maxOutputTokens=4096), key="key-9", User_Agent="test")
    call = emulator.log()[0]
    assert call | {
        "n": 1, "key": "key-9", "model": "gemini-3.5-flash", "path": PATH, "mime": "image/png", "step": None,
        "file_sha256": hashlib.sha256(PNG).hexdigest(), "file_bytes": len(PNG), "prompt": PROMPT,
        "has_schema": False, "generationConfig": {"maxOutputTokens": 4096}, "status": 200, "complete": True,
        "answered": True, "finished": True, "gone": False} == call
    assert call["http_headers"]["user-agent"] == "test" and "x-goog-api-key" not in call["http_headers"]
    assert call["usage"]["promptTokenCount"] == 1125 and call["time"] <= call["ended"]
    assert json.loads(log_file.read_bytes().splitlines()[-1])["key"] == "key-9"


def test_wait_gives_up(emulator: Client) -> None:
    response, content = emulator.send("GET", "/__emulator/wait?calls=1&timeout=0.05")
    assert response.status == 408 and json.loads(content)["calls"] == 0


@pytest.mark.parametrize("name, body", [
    ("script", {"steps": [{"statu": 500}]}), ("script", {"steps": [{"status": "500"}]}),
    ("script", {"steps": [{"close": "now"}]}), ("script", {"steps": [{"status": True}]}), ("script", {}),
    ("script", {"steps": [], "scenario": "html"}), ("script", {"scenario": "sunny"}), ("script", {"step": []}),
    ("script", b"{"), ("release", {"count": -1}), ("wait?call=1", None), ("wait?calls=x", None)])
def test_mistakes_in_control_requests_are_refused(emulator: Client, name: str, body: Any) -> None:
    response, content = emulator.send("GET" if body is None else "POST", f"/__emulator/{name}", body)
    assert response.status == 400 and json.loads(content)["error"]


@pytest.mark.parametrize("scenario", [name for name in SCENARIOS if name != "timeout"])
def test_scenarios(emulator: Client, scenario: str) -> None:
    emulator.control("script", {"key": "key-1", "scenario": scenario})
    response, content = emulator.call()
    assert response.status == SCENARIOS[scenario].get("status", 200)
    assert emulator.call()[0].status == 200


def test_readme_names_every_step_field_and_scenario() -> None:
    readme = (HERE / "README.md").read_text()
    assert [name for name in [*STEP_FIELDS, *SCENARIOS] if f"`{name}`" not in readme] == []


# --- the TLS front ---------------------------------------------------------------------------------------------------

def test_tls_front_ends_connections_after_three_requests(emulator: Client, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        front = free.getsockname()[1]
    subprocess.run(["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes",
                    "-days", "2", "-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost",
                    "-keyout", tmp_path / "key.pem", "-out", tmp_path / "cert.pem"], check=True, capture_output=True)
    text = (HERE / "tls_front.conf.in").read_text()
    for name, value in (("@DIR@", tmp_path), ("@PORT@", front), ("@UPSTREAM@", f"127.0.0.1:{emulator.port}")):
        text = text.replace(name, str(value))
    (tmp_path / "tls_front.conf").write_text(text)
    nginx = subprocess.Popen(["nginx", "-e", tmp_path / "error.log", "-p", tmp_path, "-c", tmp_path / "tls_front.conf"])
    try:
        context = ssl.create_default_context(cafile=str(tmp_path / "cert.pem"))
        connection = http.client.HTTPSConnection("localhost", front, context=context, timeout=20)
        deadline = time.monotonic() + 10
        while True:  # nginx does not say when it is ready
            try:
                connection.connect()
                break
            except ConnectionRefusedError:
                assert nginx.poll() is None and time.monotonic() < deadline
                threading.Event().wait(0.02)
        endings = []
        for _ in range(3):
            response, content = emulator.call(on=connection)
            assert json.loads(text_of(content)) == invoice_for(PDF)
            endings.append(response.getheader("Connection"))
        connection.close()
        assert endings == ["keep-alive", "keep-alive", "close"]
        calls = emulator.log()
        assert len({call["http_headers"]["x-front-connection"] for call in calls}) == 1
        assert {call["http_headers"]["x-front-protocol"] for call in calls} == {"HTTP/1.1"}
    finally:
        nginx.terminate()
        nginx.wait(timeout=10)
