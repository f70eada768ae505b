"""nginx/openapi.yaml, and whether an answer is what it promises. Every answer that a Stack's `request` gets is held against it."""
from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from jsonschema import Draft202012Validator, RefResolver

FILE = Path(__file__).resolve().parents[2] / "nginx/openapi.yaml"
ERRORS = range(400, 600)


@functools.cache
def document() -> dict[str, Any]:
    return yaml.safe_load(FILE.read_text())


def followed(node: Any) -> Any:
    """The node, or what its $ref names."""
    while isinstance(node, dict) and "$ref" in node:
        node = functools.reduce(lambda at, name: at[name], node["$ref"].removeprefix("#/").split("/"), document())
    return node


def faults(schema: Any, value: Any) -> list[str]:
    """What is wrong with the value; nothing, where it fits."""
    validator = Draft202012Validator(schema, resolver=RefResolver("", document()))
    return [f"{error.json_path}: {error.message:.300}" for error in validator.iter_errors(value)]


def operations() -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Path, method, operation."""
    for path, item in document()["paths"].items():
        for method, operation in item.items():
            yield path, method.upper(), operation


@functools.cache
def response(method: str, path: str, status: int) -> dict[str, Any] | None:
    """What is promised. HEAD is GET without the body; other methods and paths are answered with errors of these forms."""
    item = document()["paths"].get(path, {})
    operation = item.get("get" if method == "HEAD" else method.lower())
    if operation is not None:
        return followed(operation["responses"].get(str(status)))
    forms = {int(code): answer for _, _, o in operations() for code, answer in o["responses"].items()}
    forms[405] = document()["components"]["responses"]["MethodNotAllowed"]
    return followed(forms.get(status)) if status in ERRORS else None


def row_forms(path: str) -> list[list[str]]:
    """The columns of each kind of row that the path shows, in their order."""
    page = document()["paths"][path]["get"]["responses"]["200"]["content"]["application/json"]["schema"]
    items = page["allOf"][1]["properties"]["rows"]["items"]
    return [followed(kind)["required"] for kind in items.get("oneOf", [items])]


def hold(method: str, target: str, status: int, headers: Mapping[str, str], body: bytes) -> None:
    """Fails where the answer is none that the document promises."""
    path = re.sub(r"^https?://[^/]*|[?#].*", "", target)
    if method == "OPTIONS" and status == 204:
        return  # a preflight, which is between browser and nginx
    promised = response(method, path, status)
    assert promised is not None, f"{method} {target}: {status} is not in openapi.yaml"
    for name, header in promised.get("headers", {}).items():
        header, value = followed(header), headers[name]
        assert value is not None or not header.get("required"), f"{method} {target}: no {name}"
        if value is not None:
            is_number = followed(header["schema"])["type"] == "integer"
            assert faults(header["schema"], int(value) if is_number else value) == [], (name, value)
    if method == "HEAD":
        return
    kind = headers["Content-Type"].split(";")[0]
    assert kind in promised["content"], f"{method} {target}: {kind}"
    if kind == "text/csv":
        assert body.decode().split("\r\n")[0].split(",") in row_forms(path)
    if kind.endswith("json"):
        value = json.loads(body)
        assert faults(promised["content"][kind]["schema"], value) == [], (method, target, value)
        assert value.get("request_id", headers["X-Request-ID"]) == headers["X-Request-ID"]
        if status in ERRORS:
            assert value["status"] == status
        elif path.startswith("/admin/"):
            assert all(list(row) in row_forms(path) for row in value["rows"])
