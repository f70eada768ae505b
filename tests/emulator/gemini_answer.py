"""What the emulator answers: the invoice, the token counts, and the steps that a script is made of.

Token counts are a function of the request and the answer, so that a test can say beforehand what must be charged
(usage_for() computes them):

    TEXT in the prompt      one token for each 4 characters, begun ones counting, of the system instruction and all
                            text parts, joined by line feeds
    IMAGE                   1120 for each picture, DOCUMENT 560 for each page of a PDF; by mediaResolution: LOW 280
                            and 280, MEDIUM 560 and 560, HIGH 1120 and 1120, ULTRA_HIGH 2240 and 1120
    candidates              one token for each 4 characters, begun ones counting, of the answer's text (no thoughts)
    thoughts                96; 0 where thinkingBudget is 0
    cached                  half of the prompt's TEXT tokens, rounded down; they are inside the prompt
    total                   prompt + candidates + thoughts

The default answer is one invoice, whose invoice_number is "INV-" and the first eight hex digits of the file's SHA-256:
an answer can be told from another request's.
"""

from __future__ import annotations

import gzip
import hashlib
import json
from dataclasses import dataclass, field
from typing import Any

from gemini_request import GoogleError, InlineFile, Request, pdf_pages

THOUGHTS_TOKENS = 96
TOKENS_PER_FILE = {  # mediaResolution: (a picture, a page)
    None: (1120, 560), "MEDIA_RESOLUTION_UNSPECIFIED": (1120, 560), "MEDIA_RESOLUTION_LOW": (280, 280),
    "MEDIA_RESOLUTION_MEDIUM": (560, 560), "MEDIA_RESOLUTION_HIGH": (1120, 1120),
    "MEDIA_RESOLUTION_ULTRA_HIGH": (2240, 1120),
}


# --- the default answer ----------------------------------------------------------------------------------------------

def text_tokens(text: str) -> int:
    return (len(text) + 3) // 4


def usage_for(prompt: str, files: list[InlineFile], answer: str, *, resolution: str | None = None,
              thoughts: int = THOUGHTS_TOKENS) -> dict[str, Any]:
    """usageMetadata for a prompt (Request.prompt), its files and the answer's text."""
    picture, page = TOKENS_PER_FILE[resolution]
    counts = {
        "TEXT": text_tokens(prompt),
        "IMAGE": sum(picture for file in files if file.mime != "application/pdf"),
        "DOCUMENT": sum(page * pdf_pages(file.data) for file in files if file.mime == "application/pdf"),
    }
    prompt_tokens = sum(counts.values())
    candidates = text_tokens(answer)
    return {
        "promptTokenCount": prompt_tokens,
        "candidatesTokenCount": candidates,
        "totalTokenCount": prompt_tokens + candidates + thoughts,
        "cachedContentTokenCount": counts["TEXT"] // 2,
        "promptTokensDetails": [{"modality": name, "tokenCount": count} for name, count in counts.items() if count],
        "candidatesTokensDetails": [{"modality": "TEXT", "tokenCount": candidates}],
        "thoughtsTokenCount": thoughts,
    }


def invoice_for(data: bytes) -> dict[str, Any]:
    """The invoice that is read from a file: complete, and its sums add up."""
    return {
        "document_type": "invoice",
        "invoice_number": "INV-" + hashlib.sha256(data).hexdigest()[:8].upper(),
        "issue_date": "2026-10-01",
        "due_date": "2026-10-31",
        "currency": "EUR",
        "purchase_order": "PO-4711",
        "payment_terms": "30 days net",
        "vendor": {
            "name": "Müller & Söhne GmbH", "tax_id": "DE136695976", "registration_id": "HRB 86891",
            "address": "Lindenstraße 12, 10969 Berlin", "email": "rechnung@mueller-soehne.example",
            "iban": "DE89370400440532013000", "bic": "COBADEFFXXX",
        },
        "customer": {"name": "Công ty TNHH Ánh Dương", "tax_id": "0312345678", "address": "Quận 1, TP. Hồ Chí Minh"},
        "line_items": [
            {"description": "Kugellager 6204", "product_code": "KL-6204", "quantity": "10", "unit": "pcs",
             "unit_price": "95.00", "tax_rate": "19", "tax_amount": "180.50", "amount": "950.00"},
            {"description": "Versand", "product_code": None, "quantity": "1", "unit": "pcs",
             "unit_price": "100.00", "tax_rate": "19", "tax_amount": "19.00", "amount": "100.00"},
        ],
        "taxes": [{"rate": "19", "base": "1050.00", "amount": "199.50"}],
        "totals": {"subtotal": "1050.00", "discount": "0.00", "tax": "199.50", "total": "1249.50",
                   "amount_paid": "0.00", "amount_due": "1249.50"},
    }


# --- steps -----------------------------------------------------------------------------------------------------------

NUMBER = (int, float)
STEP_FIELDS: dict[str, Any] = {  # name: the types that it takes; README.md says what each does
    "status": int, "message": str, "error_status": str, "details": list, "reason": str, "retry_delay": str,
    "quota_id": str, "retry_after": (str, int), "headers": dict,
    "delay": NUMBER, "hold": bool,
    "text": str, "parts": list, "finish_reason": str, "block_reason": str, "no_candidates": bool,
    "usage": (dict, type(None)), "body": str, "content_type": str, "raw_json": object,
    "close": ("before_read", "after_read"), "reset": ("before_read", "after_read", True),
    "cut": int, "trickle": NUMBER, "size": int, "gzip": (True, False, "bad"),
    "close_connection": bool, "die_idle": bool,
}

SCENARIOS: dict[str, dict[str, Any]] = {
    "overloaded": {"status": 503, "message": "The model is overloaded. Please try again later."},
    "rate_limited": {
        "status": 429, "message": "You exceeded your current quota. Please retry in 1.837906927s.",
        "quota_id": "GenerateRequestsPerMinutePerProjectPerModel", "retry_delay": "1.837906927s"},
    "daily_quota": {
        "status": 429, "message": "You exceeded your current quota, please check your plan and billing details.",
        "quota_id": "GenerateRequestsPerDayPerProjectPerModel-FreeTier", "retry_delay": "45.837906927s"},
    "invalid_key": {
        "status": 400, "message": "API key not valid. Please pass a valid API key.", "reason": "API_KEY_INVALID"},
    "leaked_key": {
        "status": 403, "message": "Your API key was reported as leaked. Please use another API key."},
    "suspended": {
        "status": 403, "message": "Permission denied: Consumer 'projects/1' has been suspended.",
        "reason": "CONSUMER_SUSPENDED"},
    "forbidden": {"status": 403, "message": "The caller does not have permission"},
    "payment_required": {"status": 402, "message": "Your prepayment credits are depleted. Please add credits."},
    "safety": {"finish_reason": "SAFETY", "parts": []},
    "max_tokens": {"finish_reason": "MAX_TOKENS", "parts": []},
    "blocked": {"block_reason": "PROHIBITED_CONTENT"},
    "empty": {"parts": []},
    "bad_json": {"text": "Here is the invoice you asked for: {\"invoice_number\": \"INV-"},
    "timeout": {"delay": 600},
    "model_not_found": {
        "status": 404, "message": "models/gemini-0.0-flash is not found for API version v1beta, or is not supported "
                                  "for generateContent."},
    "too_large": {"status": 413, "message": "Request payload size exceeds the limit: 104857600 bytes."},
    "html": {
        "status": 502, "content_type": "text/html; charset=UTF-8",
        "body": "<!DOCTYPE html>\n<html lang=en>\n<title>Error 502 (Server Error)!!1</title>\n"
                "<p><b>502.</b> <ins>That's an error.</ins>\n"},
}

DEFAULT_MESSAGES = {
    400: "Request contains an invalid argument.", 429: "Resource has been exhausted (e.g. check quota).",
    500: "An internal error has occurred. Please retry.", 503: "The service is currently unavailable.",
    504: "Deadline expired before operation could complete.",
}


def check_step(step: Any) -> dict[str, Any]:
    """The step, or ValueError: a misspelt field must not pass for the default."""
    if not isinstance(step, dict):
        raise ValueError(f"a step is an object, not {step!r}")
    for name, value in step.items():
        if name not in STEP_FIELDS:
            raise ValueError(f"unknown step field {name!r}")
        allowed = STEP_FIELDS[name]
        choices = isinstance(allowed, tuple) and not isinstance(allowed[0], type)
        fits = any(value is choice or value == choice and isinstance(value, str) for choice in allowed) if choices \
            else isinstance(value, allowed) and (allowed is object or not isinstance(value, bool) or allowed is bool)
        if not fits:
            raise ValueError(f"step field {name!r} does not take {value!r}")
    return step


@dataclass
class Answer:
    """An HTTP answer before it is sent."""
    status: int
    body: bytes
    padding: int = 0  # spaces after the body, not kept in memory
    headers: dict[str, str] = field(default_factory=dict)
    usage: dict[str, Any] | None = None


def json_answer(status: int, value: Any) -> Answer:
    """JSON in UTF-8; an error is indented for whoever reads it in a terminal."""
    body = json.dumps(value, indent=None if status == 200 else 2, ensure_ascii=False).encode() + b"\n"
    return Answer(status, body, headers={"Content-Type": "application/json; charset=UTF-8"})


def error_for(step: dict[str, Any]) -> GoogleError:
    """The refusal that a step of another status than 200 asks for."""
    status = step["status"]
    details = list(step.get("details", []))
    google = "type.googleapis.com/google.rpc."
    if "reason" in step:
        details.append({"@type": google + "ErrorInfo", "reason": step["reason"], "domain": "googleapis.com",
                        "metadata": {"service": "generativelanguage.googleapis.com"}})
    if "quota_id" in step:
        details.append({"@type": google + "QuotaFailure", "violations": [{
            "quotaMetric": "generativelanguage.googleapis.com/generate_content_requests",
            "quotaId": step["quota_id"], "quotaDimensions": {"location": "global"}, "quotaValue": "20"}]})
    if "retry_delay" in step:
        details.append({"@type": google + "RetryInfo", "retryDelay": step["retry_delay"]})
    message = step.get("message", DEFAULT_MESSAGES.get(status, f"Error {status}"))
    return GoogleError(status, message, step.get("error_status"), details)


def candidate_answer(step: dict[str, Any], request: Request, model: str, response_id: str) -> Answer:
    """A 200 with a candidate, or without where the step says so."""
    thoughts = 0 if request.option("thinkingConfig", "thinkingBudget") in (0, "0") else THOUGHTS_TOKENS
    finish = "STOP"
    if "parts" in step:
        parts = step["parts"]
    else:
        data = request.files[0].data if request.files else b""
        text = step.get("text", json.dumps(invoice_for(data), ensure_ascii=False))
        limit = request.option("maxOutputTokens")
        if limit is not None and thoughts + text_tokens(text) > int(limit):
            text, finish = text[:4 * max(0, int(limit) - thoughts)], "MAX_TOKENS"
        parts = [{"text": text}] if text or "text" in step else []
    blocked = "block_reason" in step or step.get("no_candidates", False)
    said = "" if blocked else "".join(
        part["text"] for part in parts
        if isinstance(part, dict) and isinstance(part.get("text"), str) and not part.get("thought"))

    value: dict[str, Any] = {}
    if "block_reason" in step:
        value["promptFeedback"] = {"blockReason": step["block_reason"]}
    if not blocked:
        content: dict[str, Any] = {"parts": parts, "role": "model"} if parts else {"role": "model"}
        value["candidates"] = [{"content": content, "finishReason": step.get("finish_reason", finish), "index": 0}]
    usage: dict[str, Any] | None = step.get("usage", {})
    if usage is not None:
        usage = usage_for(request.prompt, request.files, said, resolution=request.option("mediaResolution"),
                          thoughts=0 if blocked else thoughts) | usage
        value["usageMetadata"] = usage
    value["modelVersion"] = model
    value["responseId"] = response_id
    answer = json_answer(200, value)
    answer.usage = usage
    return answer


def answer_for(step: dict[str, Any], request: Request, model: str, response_id: str) -> Answer:
    """The answer that a step asks for; the empty step is the default. What touches the connection is not here."""
    status = step.get("status", 200)
    if "body" in step:
        answer = Answer(status, step["body"].encode(), headers={"Content-Type": "text/html; charset=UTF-8"})
    elif "raw_json" in step:
        answer = json_answer(status, step["raw_json"])
        usage = step["raw_json"].get("usageMetadata") if isinstance(step["raw_json"], dict) else None
        answer.usage = usage if isinstance(usage, dict) else None
    elif status != 200:
        answer = json_answer(status, error_for(step).to_json())
    else:
        answer = candidate_answer(step, request, model, response_id)
    answer.padding = max(0, step.get("size", 0) - len(answer.body))
    if step.get("gzip"):
        answer.body = gzip.compress(answer.body + b" " * answer.padding, mtime=0)
        answer.padding = 0
        answer.headers["Content-Encoding"] = "gzip"
        if step["gzip"] == "bad":
            middle = len(answer.body) // 2
            answer.body = answer.body[:middle] + bytes(byte ^ 0x55 for byte in answer.body[middle:])
    if "content_type" in step:
        answer.headers["Content-Type"] = step["content_type"]
    if "retry_after" in step:
        answer.headers["Retry-After"] = str(step["retry_after"])
    answer.headers.update({name: str(value) for name, value in step.get("headers", {}).items()})
    return answer


def script_steps(scenario: str) -> list[dict[str, Any]]:
    """The steps of a named scenario, or ValueError."""
    if scenario not in SCENARIOS:
        raise ValueError(f"unknown scenario {scenario!r}; there are: {', '.join(SCENARIOS)}")
    return [SCENARIOS[scenario]]

