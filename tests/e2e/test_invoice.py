"""The invoice: what is sent for it, what is made of the answer, and what is only warned of."""
from __future__ import annotations

import hashlib
import json
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from broken import SAMPLES, sample
from conftest import ROOT, Emulator, Stack, refused, start_refused
from gemini_answer import invoice_for

MakeStack = Callable[..., Stack]
SCHEMA = json.loads((ROOT / "fcgi-app/invoice.schema.json").read_text())
PROMPT = (ROOT / "fcgi-app/prompt.txt").read_text()
EXPECTED = json.loads((ROOT / "tests/samples/expected.json").read_text())


def extract(stack: Stack, emulator: Emulator, company: str, pdf: bytes, said: Any) -> dict[str, Any]:
    """The answer to a request for which Gemini says this (JSON, or text as it is)."""
    key = f"key-{uuid.uuid4().hex}"
    stack.token(company, key)
    emulator.script(key, {"text": said if isinstance(said, str) else json.dumps(said, ensure_ascii=False)})
    answer = stack.post(pdf, company)
    assert answer.status == 200, answer.body
    return answer.json()


def warned(body: dict[str, Any]) -> list[tuple[str, str]]:
    """(code, field) of each warning."""
    for warning in body["warnings"]:
        assert list(warning) == ["code", "field", "detail"]
        assert len(warning["detail"]) > 5
    return [(warning["code"], warning["field"]) for warning in body["warnings"]]


# ---- the samples ----


@pytest.mark.parametrize("name", SAMPLES)
def test_samples(stack: Stack, emulator: Emulator, company: str, name: str) -> None:
    data = sample(name)
    body = extract(stack, emulator, company, data, EXPECTED[name])
    assert body["data"] == EXPECTED[name]
    assert list(body["data"]) == list(EXPECTED[name])
    assert body["warnings"] == [], "their sums add up, their IBANs are real"
    [call] = emulator.log()
    assert call["file_sha256"] == hashlib.sha256(data).hexdigest()
    assert call["mime"] == SAMPLES[name]


# ---- what is sent ----


def test_request_to_gemini(stack: Stack, emulator: Emulator, company: str, pdf: bytes) -> None:
    extract(stack, emulator, company, pdf, {})
    [call] = emulator.log()
    assert call["path"] == "/v1beta/models/gemini-3.5-flash:generateContent"
    assert call["prompt"] == PROMPT
    assert call["has_schema"]
    assert call["generationConfig"] == {"responseMimeType": "application/json", "responseJsonSchema": SCHEMA}
    assert list(call["generationConfig"]["responseJsonSchema"]["properties"]) == list(SCHEMA["properties"])
    headers = call["http_headers"]
    assert headers["content-type"] == "application/json"
    assert headers["content-length"] == str(call["request_bytes"])
    assert "expect" not in headers and "transfer-encoding" not in headers


def test_schema_has_the_fields_of_the_contract() -> None:
    def fields(schema: dict[str, Any]) -> Any:
        if "items" in schema:
            return [fields(schema["items"])]
        if "properties" in schema:
            assert schema["propertyOrdering"] == list(schema["properties"])
            return {name: fields(value) for name, value in schema["properties"].items()}
        assert "string" in schema["type"] and "null" in schema["type"]
        return None

    def names(text: str) -> dict[str, None]:
        return dict.fromkeys(text.split())

    assert fields(SCHEMA) == names("document_type invoice_number issue_date due_date currency purchase_order"
                                   " payment_terms") | {
        "vendor": names("name tax_id registration_id address email iban bic"),
        "customer": names("name tax_id address"),
        "line_items": [names("description product_code quantity unit unit_price tax_rate tax_amount amount")],
        "taxes": [names("rate base amount")],
        "totals": names("subtotal discount tax total amount_paid amount_due")}


def test_own_prompt_schema_model_and_limit(make_stack: MakeStack, emulator: Emulator, pdf: bytes,
                                           tmp_path: Path) -> None:
    schema = {"type": "object", "properties": {"number": {"type": "string"}, "count": {"type": "number"},
                                               "nested": {"type": "object", "properties": {"a": {"type": "integer"}}}}}
    prompt = 'Lies "das" \\ hier:\n\tÄöü 請求書\n'
    (tmp_path / "prompt.txt").write_text(prompt)
    (tmp_path / "schema.json").write_text(json.dumps(schema, indent=3))
    stack = make_stack(env={
        "EXTRACT_GEMINI_PROMPT_FILE": str(tmp_path / "prompt.txt"),
        "EXTRACT_GEMINI_SCHEMA_FILE": str(tmp_path / "schema.json"),
        "EXTRACT_GEMINI_MAX_OUTPUT_TOKENS": "4321", "EXTRACT_GEMINI_MODEL": "gemini-3.6-flash"})
    said = {"number": "4", "count": 1.5, "nested": {"a": 7, "b": 8}, "invoice_number": "5"}
    body = extract(stack, emulator, "NT047", pdf, said)
    assert body["data"] == {"number": "4", "count": 1.5, "nested": {"a": 7}}
    assert body["model"] == "gemini-3.6-flash"
    assert warned(body) == [("unknown_field", "/nested/b"), ("unknown_field", "/invoice_number")]
    call = emulator.log()[0]
    assert call["path"] == "/v1beta/models/gemini-3.6-flash:generateContent"
    assert call["prompt"] == prompt
    assert call["generationConfig"] == {"responseMimeType": "application/json", "responseJsonSchema": schema,
                                        "maxOutputTokens": 4321}
    assert stack.sql("SELECT DISTINCT Model FROM TokenUsageLogs") == [{"Model": "gemini-3.6-flash"}]


def test_answer_longer_than_the_limit(make_stack: MakeStack, emulator: Emulator, pdf: bytes) -> None:
    stack = make_stack(env={"EXTRACT_GEMINI_MAX_OUTPUT_TOKENS": "120"})
    stack.token()
    refused(stack.post(pdf), "invalid_file", spent=True)


@pytest.mark.parametrize("content", ["", "[]", "{", '{"type": "object"}', '{"properties": []}'])
def test_bad_schema_file_is_refused_at_start(tmp_path: Path, content: str) -> None:
    (tmp_path / "schema.json").write_text(content)
    said = start_refused(tmp_path, EXTRACT_GEMINI_SCHEMA_FILE=str(tmp_path / "schema.json"))
    assert "gemini.schema_file" in said


# ---- shape ----


def test_unknown_fields_are_dropped(stack: Stack, emulator: Emulator, company: str, pdf: bytes) -> None:
    body = extract(stack, emulator, company, pdf, {
        "invoice_number": "1", "secret": {"a": [1]}, "a/b~c": "x", "vendor": {"name": "A", "phone": "1"},
        "line_items": [{"description": "x", "colour": "red"}, {"amount": "1.00", "colour": "blue"}]})
    assert body["data"] == {"invoice_number": "1", "vendor": {"name": "A"},
                            "line_items": [{"description": "x"}, {"amount": "1.00"}]}
    assert warned(body) == [("unknown_field", "/secret"), ("unknown_field", "/a~1b~0c"),
                            ("unknown_field", "/vendor/phone"), ("unknown_field", "/line_items/0/colour"),
                            ("unknown_field", "/line_items/1/colour")]


def test_everything_may_be_null_or_absent(stack: Stack, emulator: Emulator, company: str, pdf: bytes) -> None:
    nothing = dict.fromkeys(SCHEMA["properties"])
    assert extract(stack, emulator, company, pdf, nothing)["data"] == nothing
    empty = extract(stack, emulator, company + "-2", pdf, {"vendor": {}, "line_items": [], "totals": {"total": None}})
    assert empty["data"] == {"vendor": {}, "line_items": [], "totals": {"total": None}}
    assert empty["warnings"] == []


def test_amounts_are_strings(stack: Stack, emulator: Emulator, company: str, pdf: bytes) -> None:
    """Numbers become what was written, digit by digit."""
    body = extract(stack, emulator, company, pdf,
                   '{"totals": {"total": 1234.50, "tax": -0.10, "subtotal": 123456789012345678901.10, "discount": true,'
                   ' "amount_due": 7}}')
    assert body["data"]["totals"] == {"total": "1234.50", "tax": "-0.10", "subtotal": "123456789012345678901.10",
                                      "discount": "true", "amount_due": "7"}
    assert {code for code, _ in warned(body)} == {"wrong_type"}
    assert sorted(field for _, field in warned(body)) == sorted(
        f"/totals/{name}" for name in ("total", "tax", "subtotal", "discount", "amount_due"))


def test_values_of_another_type_are_dropped(stack: Stack, emulator: Emulator, company: str, pdf: bytes) -> None:
    body = extract(stack, emulator, company, pdf, {"vendor": "A GmbH", "invoice_number": ["1"], "line_items": {"a": 1},
                                                   "taxes": [{"rate": {"x": 1}}]})
    assert body["data"] == {"vendor": None, "invoice_number": None, "line_items": None, "taxes": [{"rate": None}]}
    assert warned(body) == [("wrong_type", "/vendor"), ("wrong_type", "/invoice_number"),
                            ("wrong_type", "/line_items"), ("wrong_type", "/taxes/0/rate")]


def test_text_arrives_as_it_was(stack: Stack, emulator: Emulator, company: str, pdf: bytes) -> None:
    said = {"invoice_number": 'a"b\\c/d\n\t\u0001 <b>&amp;</b>', "purchase_order": "請求書 😀 e\u0301 \u2028",
            "currency": "", "payment_terms": "x" * 20_000}
    body = extract(stack, emulator, company, pdf, said)
    assert body["data"] == said
    assert body["warnings"] == []


def test_text_in_several_parts(stack: Stack, emulator: Emulator, company: str, pdf: bytes) -> None:
    key = f"key-{uuid.uuid4().hex}"
    stack.token(company, key)
    emulator.script(key, {"parts": [{"text": "Let me see.", "thought": True}, {"text": '{"invoice_nu'},
                                    {"text": 'mber": "7"}'}]})
    assert stack.post(pdf, company).json()["data"] == {"invoice_number": "7"}


# ---- sums and IBAN: warnings, never errors ----

TOTALS = {"subtotal": "1050.00", "discount": "0.00", "tax": "199.50", "total": "1249.50"}


@pytest.mark.parametrize("change, expected", [
    ({}, []),
    ({"totals": {"total": "1249.51"}}, []),  # a cent is rounding
    ({"totals": {"total": "1249.49"}}, []),
    ({"totals": {"total": "1249.52"}}, [("sum_mismatch", "/totals/total")]),
    ({"totals": {"total": "1249.48"}}, [("sum_mismatch", "/totals/total")]),
    ({"totals": {"subtotal": "1050.02", "total": "1249.52"}}, [("sum_mismatch", "/totals/subtotal")]),
    ({"totals": {"subtotal": "2000"}}, [("sum_mismatch", "/totals/subtotal"), ("sum_mismatch", "/totals/total")]),
    ({"totals": {"discount": "50.00", "total": "1199.50"}}, []),
    ({"totals": {"discount": "-50.00", "total": "1199.50"}}, []),  # printed with its sign
    ({"totals": {"discount": None}}, []),
    ({"totals": {"discount": "50.00"}}, [("sum_mismatch", "/totals/total")]),
    ({"totals": {"total": None}}, []),
    ({"totals": {"tax": None, "total": "9"}}, []),
    ({"totals": {"subtotal": None, "total": "9"}}, []),
    ({"totals": {"total": "n/a"}}, []),
    ({"totals": None}, []),
    ({"line_items": None}, []),
    ({"line_items": []}, []),
    ({"line_items": [{"amount": "1.00"}, {"amount": None}]}, []),  # not all are known
    ({"line_items": [{"amount": "1.00"}]}, [("sum_mismatch", "/totals/subtotal")]),
    ({"line_items": [{"amount": "1050.0000"}]}, []),
    ({"vendor": {"iban": "DE89370400440532013000"}}, []),
    ({"vendor": {"iban": "de89 3704 0044 0532 0130 00"}}, []),
    ({"vendor": {"iban": "GB82WEST12345698765432"}}, []),
    ({"vendor": {"iban": "DE89370400440532013001"}}, [("iban_invalid", "/vendor/iban")]),
    ({"vendor": {"iban": "DE98370400440532013000"}}, [("iban_invalid", "/vendor/iban")]),
    ({"vendor": {"iban": "hello"}}, [("iban_invalid", "/vendor/iban")]),
    ({"vendor": {"iban": "DE89370400440532013000" + "0" * 40}}, [("iban_invalid", "/vendor/iban")]),
    ({"vendor": {"iban": ""}}, []),
    ({"vendor": {"iban": None}}, []),
    ({"vendor": None}, []),
], ids=lambda value: json.dumps(value)[:60])
def test_sums_and_iban(stack: Stack, emulator: Emulator, company: str, pdf: bytes, change: dict[str, Any],
                       expected: list[tuple[str, str]]) -> None:
    invoice = invoice_for(pdf)
    for name, value in change.items():
        invoice[name] = invoice[name] | value if isinstance(value, dict) else value
    body = extract(stack, emulator, company, pdf, invoice)
    assert warned(body) == expected
    assert body["data"] == invoice, "nothing is corrected"


def test_sums_without_cents(stack: Stack, emulator: Emulator, company: str, pdf: bytes) -> None:
    body = extract(stack, emulator, company, pdf, {
        "line_items": [{"amount": "98000"}, {"amount": "-1000"}],
        "totals": {"subtotal": "97000", "tax": "9700", "total": "106,700"}})
    assert body["warnings"] == []
    assert body["data"]["totals"]["total"] == "106,700"


def test_detail_of_a_sum(stack: Stack, emulator: Emulator, company: str, pdf: bytes) -> None:
    body = extract(stack, emulator, company, pdf, {"totals": TOTALS | {"total": "1300"}})
    assert body["warnings"] == [{"code": "sum_mismatch", "field": "/totals/total",
                                 "detail": "Subtotal - discount + tax is 1249.50, the document says 1300.00."}]


def test_warnings_are_bounded(stack: Stack, emulator: Emulator, company: str, pdf: bytes) -> None:
    body = extract(stack, emulator, company, pdf, {f"field{n}": n for n in range(5000)} | {"currency": "EUR"})
    assert body["data"] == {"currency": "EUR"}
    assert 1 <= len(body["warnings"]) <= 100


def test_large_answer(stack: Stack, emulator: Emulator, company: str, pdf: bytes) -> None:
    lines = [{"description": f"Position {n} – Größe L", "amount": "0.01"} for n in range(20_000)]
    body = extract(stack, emulator, company, pdf, {"line_items": lines, "totals": {"subtotal": "200.00"}})
    assert body["data"]["line_items"] == lines
    assert body["warnings"] == []
