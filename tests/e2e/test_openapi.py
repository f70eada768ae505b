"""nginx/openapi.yaml itself: its examples, and what it says beside conftest's table of problems, the invoice's schema and the
Makefile. That the service keeps to it is looked at with every answer (openapi.hold, from Stack.request)."""
from __future__ import annotations

import json
import re
from collections.abc import Iterator
from http import HTTPStatus
from typing import Any

import openapi
import pytest
from conftest import PROBLEMS, ROOT, Stack
from openapi import document, faults, followed

GUIDE = (ROOT / "nginx/README.md").read_text()


def table(heading: str) -> set[tuple[int, str]]:
    """Status and code of each row of the guide's table below a heading."""
    section = re.split(r"\n##+ ", GUIDE.partition(f" {heading}\n")[2])[0]
    pairs = set()
    for statuses, codes in re.findall(r"^\| (\d{3}(?:, \d{3})*) \| ([a-z_, ]+?)(?: \(nginx\))? \|", section, re.M):
        numbers, names = [int(n) for n in statuses.split(", ")], codes.split(", ")
        pairs |= set(zip(numbers if len(numbers) > 1 else numbers * len(names), names, strict=True))
    return pairs


def examples(node: Any, where: str = "#") -> Iterator[tuple[str, Any, Any]]:
    """Place, schema and value of each one in the document."""
    if isinstance(node, dict):
        if "schema" in node:
            for name, example in node.get("examples", {}).items():
                yield f"{where}/examples/{name}", node["schema"], followed(example)["value"]
        elif isinstance(node.get("examples"), list):
            for value in node["examples"]:
                yield f"{where}/examples", node, value
        for name, child in node.items():
            yield from examples(child, f"{where}/{name}")
    elif isinstance(node, list):
        for i, child in enumerate(node):
            yield from examples(child, f"{where}/{i}")


def problems() -> Iterator[tuple[str, dict[str, Any]]]:
    for response in document()["components"]["responses"].values():
        for name, example in response["content"]["application/problem+json"]["examples"].items():
            yield name, example["value"]


def test_examples_fit_their_schemas() -> None:
    found = list(examples(document()))
    assert len(found) > 50
    for place, schema, value in found:
        assert faults(schema, value) == [], place


def test_each_answer_has_an_example() -> None:
    for path, method, operation in openapi.operations():
        for status, response in operation["responses"].items():
            for kind, media in followed(response)["content"].items():
                assert media["examples"], (path, method, status, kind)


@pytest.mark.parametrize("code", PROBLEMS)
def test_each_row_of_the_table_of_errors(code: str) -> None:
    status, title, retryable, retry_after, detail = PROBLEMS[code]
    [example] = [value for name, value in problems() if name == code]
    assert (example["code"], example["status"], example["title"], example["retryable"]) == (code, status, title, retryable)
    assert detail is None or example["detail"] == detail
    response = next(r for r in document()["components"]["responses"].values()
                    if code in r["content"]["application/problem+json"]["examples"])
    assert not retry_after or "Retry-After" in response["headers"]


def test_no_other_codes() -> None:
    codes = document()["components"]["schemas"]["Problem"]["properties"]["code"]["enum"]
    assert codes and sorted(codes) == sorted(PROBLEMS)
    assert {value["code"] for _, value in problems()} == set(codes)


def test_tables_of_the_guide() -> None:
    """What nginx answers itself, and what to send again: each row is an example here, and no code is missing there."""
    known = {(value["status"], value["code"]) for _, value in problems()}
    itself, again = table("Errors that nginx answers itself"), table("What to send again, and what was paid for")
    assert len(itself) > 8 and itself <= known
    assert again == known


def test_titles_are_the_statuses_own() -> None:
    renamed = {413: "Content Too Large", 422: "Unprocessable Content"}  # RFC 9110's names
    for _, value in problems():
        assert value["title"] == renamed.get(value["status"], HTTPStatus(value["status"]).phrase)


def shape(schema: Any) -> Any:
    """Names and types, without words."""
    schema = followed(schema)
    kinds = schema["type"]
    return {"type": sorted(kinds) if isinstance(kinds, list) else kinds,
            **({"properties": {n: shape(p) for n, p in schema["properties"].items()}} if "properties" in schema else {}),
            **({"items": shape(schema["items"])} if "items" in schema else {})}


def test_invoice_is_the_one_that_is_compiled_in() -> None:
    assert shape(document()["components"]["schemas"]["Invoice"]) == shape(
        json.loads((ROOT / "fcgi-app/invoice.schema.json").read_text()))


def test_version_is_the_programs() -> None:
    [version] = re.findall(r"^VERSION\s*:=\s*(\S+)$", (ROOT / "Makefile").read_text(), re.M)
    assert document()["info"]["version"] == version


def test_every_path_is_served(stack: Stack) -> None:
    """404 is nobody's answer here; what they answer is held against the document on the way."""
    for path, method, _ in openapi.operations():
        assert stack.request(method, path).status != 404
        assert stack.request("PUT", path).headers["Allow"]
    served = set(re.findall(r'^    \{"(/[^"]+)"', (ROOT / "fcgi-app/route.c").read_text(), re.M))
    assert served == set(document()["paths"])


@pytest.mark.parametrize(("parameter", "value", "fits"), [
    ("Since", "24h", True), ("Since", "2026-01-31T12:00:00.250+02:00", True), ("Since", "2026-01-31 12:00", True),
    ("Since", "yesterday", False), ("Since", "2026-1-31", False), ("Limit", 0, False), ("Limit", 1000, True),
    ("Limit", 1001, False), ("Company", "", False), ("Format", "xml", False)])
def test_parameters_are_the_services(stack: Stack, parameter: str, value: Any, fits: bool) -> None:
    """What the document takes the service takes."""
    described = document()["components"]["parameters"][parameter]
    assert (faults(described["schema"], value) == []) == fits
    if value == "":
        return  # an empty one counts as none, as forms send it
    key = stack.ctl("client-key", "add", "--admin").stdout.strip()
    query = str(value).replace("+", "%2B").replace(" ", "+")
    answer = stack.get(f"/admin/errors?{described['name']}={query}", headers={"Authorization": f"Bearer {key}"})
    assert answer.status == (200 if fits else 400)


@pytest.mark.parametrize("body", [
    {}, {"code": "new_code"}, {"request_id": "x"}, {"more": 1}, {"retryable": "no"}, {"detail": ""}], ids=repr)
def test_what_does_not_fit_is_found(body: dict[str, Any]) -> None:
    """Nothing here passes because it looks at nothing."""
    good = dict(problems())["not_found"]
    headers = {"X-Request-ID": good["request_id"], "Content-Type": "application/problem+json", "Retry-After": None}
    openapi.hold("GET", "/metrics", 404, headers, json.dumps(good).encode())
    wrong = {} if body == {} else good | body
    with pytest.raises(AssertionError):
        openapi.hold("GET", "/metrics", 404, headers, json.dumps(wrong).encode())
