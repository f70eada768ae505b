"""What Google's generateContent accepts, as a table, and the checks that go with it.

check_request() takes the raw body of a POST …:generateContent and returns a Request, or raises GoogleError with
the code, the status and, where it is known, the wording with which Google refuses.

The rules come from the public reference (https://ai.google.dev/api/generate-content, proto3's JSON mapping) and from
error messages that people report:

* Names are known or refused, at every depth; camelCase and snake_case are the same name, as in every proto3 API.
* Values have their proto type. null is the same as absent. An enum is one of its names.
* Every structural fault is reported at once, one line each in the message, one fieldViolation each in the details.
* Then come the rules between fields: roles, one kind of data in a part, a MIME type that the model reads and that is
  what the bytes are, strict base64, the schema keywords that are documented as supported.

Two places are stricter than Google on purpose, so that a client that passes here passes there: a repeated field must
be a JSON list, and base64 must be of the standard alphabet, padded, without white space.
"""

from __future__ import annotations

import base64
import binascii
import json
import math
import re
from dataclasses import dataclass, field
from typing import Any, Iterator

MAX_REQUEST_BYTES = 100 * 1024 * 1024
MAX_PDF_BYTES = 50 * 1024 * 1024
MAX_PDF_PAGES = 1000

STATUS_NAMES = {
    400: "INVALID_ARGUMENT", 401: "UNAUTHENTICATED", 402: "RESOURCE_EXHAUSTED", 403: "PERMISSION_DENIED",
    404: "NOT_FOUND", 408: "DEADLINE_EXCEEDED", 409: "ABORTED", 413: "INVALID_ARGUMENT", 429: "RESOURCE_EXHAUSTED",
    499: "CANCELLED", 500: "INTERNAL", 501: "UNIMPLEMENTED", 502: "UNAVAILABLE", 503: "UNAVAILABLE",
    504: "DEADLINE_EXCEEDED",
}


class GoogleError(Exception):
    """A refusal in google.rpc.Status form."""

    def __init__(self, code: int, message: str, status: str | None = None, details: list[Any] | None = None):
        super().__init__(message)
        self.code = code
        self.message = message
        self.status = status or STATUS_NAMES.get(code, "UNKNOWN")
        self.details = details or []

    def to_json(self) -> dict[str, Any]:
        error: dict[str, Any] = {"code": self.code, "message": self.message, "status": self.status}
        if self.details:
            error["details"] = self.details
        return {"error": error}


@dataclass
class InlineFile:
    """A file sent inside the request."""
    mime: str
    data: bytes


@dataclass
class Request:
    """A request that passed: what the answer and the log need of it."""
    texts: list[str] = field(default_factory=list)      # system instruction first, then the parts in their order
    files: list[InlineFile] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)  # generationConfig as sent

    @property
    def prompt(self) -> str:
        return "\n".join(self.texts)

    def option(self, *path: str) -> Any:
        """A field of generationConfig, or of a message in it, by camelCase names, whichever spelling was sent."""
        value: Any = self.config
        for name in path:
            value = fields_of(value or {}).get(name)
        return value

    @property
    def has_schema(self) -> bool:
        return any(self.option(*path) for path in (
            ("responseJsonSchema",), ("responseSchema",), ("responseFormat", "text", "schema")))


# --- the structure ---------------------------------------------------------------------------------------------------
#
# Types: string, bytes, bool, int, float, json (any value); an enum by its name in ENUMS; a message by its name in
# MESSAGES. [] in front: a list of them. {} in front: a map from strings to them.

MESSAGES: dict[str, dict[str, str]] = {
    "GenerateContentRequest": {
        "model": "string", "contents": "[]Content", "systemInstruction": "Content", "tools": "[]json",
        "toolConfig": "json", "safetySettings": "[]SafetySetting", "generationConfig": "GenerationConfig",
        "cachedContent": "string", "serviceTier": "ServiceTier", "store": "bool",
    },
    "Content": {"role": "string", "parts": "[]Part"},
    "Part": {
        "text": "string", "inlineData": "Blob", "fileData": "FileData", "functionCall": "json",
        "functionResponse": "json", "executableCode": "json", "codeExecutionResult": "json",
        "thought": "bool", "thoughtSignature": "bytes", "partMetadata": "json", "videoMetadata": "json",
        "mediaResolution": "PartMediaResolution",
    },
    "Blob": {"mimeType": "string", "data": "bytes"},
    "FileData": {"mimeType": "string", "fileUri": "string"},
    "PartMediaResolution": {"level": "MediaResolution"},
    "SafetySetting": {"category": "HarmCategory", "threshold": "HarmBlockThreshold"},
    "GenerationConfig": {
        "stopSequences": "[]string", "responseMimeType": "string", "responseSchema": "Schema",
        "responseJsonSchema": "json", "responseFormat": "ResponseFormat",
        "responseModalities": "[]Modality", "candidateCount": "int", "maxOutputTokens": "int",
        "temperature": "float", "topP": "float", "topK": "int", "seed": "int", "presencePenalty": "float",
        "frequencyPenalty": "float", "responseLogprobs": "bool", "logprobs": "int",
        "enableEnhancedCivicAnswers": "bool", "speechConfig": "json", "imageConfig": "json",
        "thinkingConfig": "ThinkingConfig", "mediaResolution": "MediaResolution",
    },
    "ResponseFormat": {"text": "TextResponseFormat"},
    "TextResponseFormat": {"mimeType": "TextMimeType", "schema": "json"},
    "ThinkingConfig": {"includeThoughts": "bool", "thinkingBudget": "int", "thinkingLevel": "ThinkingLevel"},
    "Schema": {
        "type": "SchemaType", "format": "string", "title": "string", "description": "string", "nullable": "bool",
        "enum": "[]string", "maxItems": "int", "minItems": "int", "properties": "{}Schema", "required": "[]string",
        "minProperties": "int", "maxProperties": "int", "minLength": "int", "maxLength": "int",
        "pattern": "string", "example": "json", "anyOf": "[]Schema", "propertyOrdering": "[]string",
        "default": "json", "items": "Schema", "minimum": "float", "maximum": "float",
    },
}

ENUMS: dict[str, set[str]] = {
    "ServiceTier": {"UNSPECIFIED", "STANDARD", "FLEX", "PRIORITY"},
    "MediaResolution": {"MEDIA_RESOLUTION_" + level for level in (
        "UNSPECIFIED", "LOW", "MEDIUM", "HIGH", "ULTRA_HIGH")},
    "Modality": {"MODALITY_UNSPECIFIED", "TEXT", "IMAGE", "AUDIO", "VIDEO"},
    "ThinkingLevel": {"THINKING_LEVEL_UNSPECIFIED", "MINIMAL", "LOW", "MEDIUM", "HIGH"},
    "TextMimeType": {"MIME_TYPE_UNSPECIFIED", "TEXT_PLAIN", "APPLICATION_JSON"},
    "SchemaType": {"TYPE_UNSPECIFIED", "STRING", "NUMBER", "INTEGER", "BOOLEAN", "ARRAY", "OBJECT", "NULL"},
    "HarmCategory": {"HARM_CATEGORY_" + name for name in (
        "UNSPECIFIED", "HARASSMENT", "HATE_SPEECH", "SEXUALLY_EXPLICIT", "DANGEROUS_CONTENT", "CIVIC_INTEGRITY")},
    "HarmBlockThreshold": {"HARM_BLOCK_THRESHOLD_UNSPECIFIED", "BLOCK_LOW_AND_ABOVE", "BLOCK_MEDIUM_AND_ABOVE",
                           "BLOCK_ONLY_HIGH", "BLOCK_NONE", "OFF"},
}

PART_DATA = ("text", "inlineData", "fileData", "functionCall", "functionResponse", "executableCode",
             "codeExecutionResult")

GOOGLE_TYPE = {"string": "TYPE_STRING", "bytes": "TYPE_BYTES", "bool": "TYPE_BOOL", "int": "TYPE_INT32",
               "float": "TYPE_FLOAT"}
PACKAGE = "type.googleapis.com/google.ai.generativelanguage.v1beta."


def camel(name: str) -> str:
    """max_output_tokens and maxOutputTokens are the same field."""
    return re.sub(r"(?<=[a-z0-9])_([a-z])", lambda match: match[1].upper(), name)


def fields_of(message: dict[str, Any]) -> dict[str, Any]:
    """The fields that are set, by their camelCase names."""
    return {camel(name): value for name, value in message.items() if value is not None}


def snake(name: str) -> str:
    """Google names fields so in its messages."""
    return re.sub(r"([A-Z])", lambda match: "_" + match[1].lower(), name)


def is_string(value: Any) -> bool:
    return isinstance(value, str)


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def is_int(value: Any) -> bool:
    """proto3 JSON: 5, 5.0 and "5" are the same integer."""
    if isinstance(value, str):
        return re.fullmatch(r"-?[0-9]{1,19}", value) is not None
    return is_number(value) and math.isfinite(value) and value == int(value)


def is_float(value: Any) -> bool:
    if isinstance(value, str):
        return re.fullmatch(r"-?[0-9]+(\.[0-9]+)?([eE][-+]?[0-9]+)?", value) is not None
    return is_number(value)


SCALARS = {
    "string": is_string,
    "bytes": is_string,
    "bool": lambda value: isinstance(value, bool),
    "int": is_int,
    "float": is_float,
    "json": lambda value: True,
}


def quoted(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 120 else text[:117] + "..."


def faults(kind: str, value: Any, path: str) -> Iterator[tuple[str, str]]:
    """The structural faults of value, which should be a `kind`: pairs of the place and Google's description."""
    if value is None:
        return
    if kind.startswith("[]"):
        if not isinstance(value, list):
            yield path, f"Invalid value at '{path}' (TYPE_LIST), {quoted(value)}"
            return
        for index, item in enumerate(value):
            if item is None:
                yield f"{path}[{index}]", f"Invalid value at '{path}[{index}]' ({kind[2:]}), null"
            yield from faults(kind[2:], item, f"{path}[{index}]")
    elif kind.startswith("{}"):
        if not isinstance(value, dict):
            yield path, f"Invalid value at '{path}' (TYPE_MAP), {quoted(value)}"
            return
        for index, item in enumerate(value.values()):
            yield from faults(kind[2:], item, f"{path}[{index}].value")
    elif kind in MESSAGES:
        yield from message_faults(kind, value, path)
    elif kind in ENUMS:
        name = value.upper() if kind == "SchemaType" and is_string(value) else value
        if not is_string(name) or name not in ENUMS[kind]:
            yield path, f"Invalid value at '{path}' ({PACKAGE}{kind}), {quoted(value)}"
    elif not SCALARS[kind](value):
        yield path, f"Invalid value at '{path}' ({GOOGLE_TYPE[kind]}), {quoted(value)}"


def message_faults(kind: str, value: Any, path: str) -> Iterator[tuple[str, str]]:
    if not isinstance(value, dict):
        yield path, f"Invalid value at '{path}' ({PACKAGE}{kind}), {quoted(value)}"
        return
    fields = MESSAGES[kind]
    seen: set[str] = set()
    for name, item in value.items():
        known = camel(name)
        if known not in fields:
            place = f" at '{path}'" if path else ""
            yield path, f"Invalid JSON payload received. Unknown name {quoted(name)}{place}: Cannot find field."
            continue
        if known in seen:
            yield path, f"Invalid value at '{path}' (oneof), field '{known}' is already set."
        seen.add(known)
        yield from faults(fields[known], item, f"{path}.{snake(known)}" if path else snake(known))
    if kind == "Part":
        for extra in [name for name in PART_DATA if name in fields_of(value)][1:]:
            yield path, (f"Invalid value at '{path}' (oneof), oneof field 'data' is already set. "
                         f"Cannot set '{extra}'")


# --- responseJsonSchema ----------------------------------------------------------------------------------------------

def is_schema_list(value: Any) -> bool:
    return isinstance(value, list) and value != [] and all(isinstance(item, dict) for item in value)


def is_string_list(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def is_schema_map(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(item, dict) for item in value.values())


def is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def is_type(value: Any) -> bool:
    types = {"string", "number", "integer", "boolean", "object", "array", "null"}
    names = value if isinstance(value, list) and value else [value]
    return all(isinstance(name, str) and name in types for name in names)


SCHEMA_KEYWORDS = {
    "$id": is_string, "$anchor": is_string, "$ref": is_string, "$defs": is_schema_map,
    "type": is_type, "format": is_string, "title": is_string, "description": is_string,
    "enum": lambda value: (isinstance(value, list) and value != []
                           and all(item is None or is_string(item) or is_number(item) for item in value)),
    "items": lambda value: isinstance(value, dict), "prefixItems": is_schema_list,
    "minItems": is_size, "maxItems": is_size, "minimum": is_number, "maximum": is_number,
    "anyOf": is_schema_list, "oneOf": is_schema_list, "properties": is_schema_map,
    "additionalProperties": lambda value: isinstance(value, (bool, dict)),
    "required": is_string_list, "propertyOrdering": is_string_list,
}


def json_schema_faults(schema: Any, path: str, root: Any = None) -> Iterator[str]:
    """What is not among the keywords that Google documents as supported, or has a value of the wrong kind."""
    if not isinstance(schema, dict):
        yield f"{path}: must be an object"
        return
    root = schema if root is None else root
    for name, value in schema.items():
        check = SCHEMA_KEYWORDS.get(name)
        if check is None:
            yield f"{path}: keyword {quoted(name)} is not supported"
            continue
        if not check(value):
            yield f"{path}.{name}: invalid value {quoted(value)}"
            continue
        if name in ("properties", "$defs"):
            for key, item in value.items():
                yield from json_schema_faults(item, f"{path}.{name}[{key}]", root)
        elif name in ("anyOf", "oneOf", "prefixItems"):
            for index, item in enumerate(value):
                yield from json_schema_faults(item, f"{path}.{name}[{index}]", root)
        elif isinstance(value, dict):
            yield from json_schema_faults(value, f"{path}.{name}", root)
    reference = schema.get("$ref")
    if isinstance(reference, str):
        if any(not name.startswith("$") for name in schema):
            yield f"{path}: beside $ref only properties that start with $ may be set"
        definition = reference.removeprefix("#/$defs/")
        if reference != "#" and (definition == reference or definition not in root.get("$defs", {})):
            yield f"{path}.$ref: {quoted(reference)} is not defined"
    properties = schema.get("properties")
    if isinstance(properties, dict):
        for keyword in ("required", "propertyOrdering"):
            names = schema.get(keyword, [])
            for name in names if is_string_list(names) else []:
                if name not in properties:
                    yield f"{path}.{keyword}: property {quoted(name)} is not defined"


# --- files -----------------------------------------------------------------------------------------------------------

HEIC_BRANDS = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs"}
HEIF_BRANDS = HEIC_BRANDS | {b"mif1", b"msf1", b"mif2"}


def brands(data: bytes) -> set[bytes]:
    """Major and compatible brands of an ISO base media file (ISO/IEC 14496-12, box ftyp)."""
    if data[4:8] != b"ftyp":
        return set()
    box = data[8:min(int.from_bytes(data[:4], "big"), 256)]
    return {box[:4]} | {box[at:at + 4] for at in range(8, len(box) - 3, 4)}


MAGIC = {
    "application/pdf": lambda data: b"%PDF-" in data[:1024],
    "image/png": lambda data: data.startswith(b"\x89PNG\r\n\x1a\n"),
    "image/jpeg": lambda data: data.startswith(b"\xff\xd8\xff"),
    "image/webp": lambda data: data[:4] == b"RIFF" and data[8:12] == b"WEBP",
    "image/heic": lambda data: bool(brands(data) & HEIC_BRANDS),
    "image/heif": lambda data: bool(brands(data) & HEIF_BRANDS),
}


def pdf_pages(data: bytes) -> int:
    """Page objects that can be seen without decompressing anything; at least one."""
    return max(1, len(re.findall(rb"/Type\s*/Page(?![A-Za-z])", data)))


def decode_blob(blob: dict[str, Any], path: str) -> InlineFile:
    fields = fields_of(blob)
    mime, text = fields.get("mimeType", ""), fields.get("data", "")
    try:
        data = binascii.a2b_base64(text, strict_mode=True)
    except (binascii.Error, ValueError):
        message = f"Invalid value at '{path}.data' (TYPE_BYTES), Base64 decoding failed for {quoted(text[:40])}"
        raise GoogleError(400, message, details=bad_request([(f"{path}.data", message)])) from None
    if mime not in MAGIC:
        raise GoogleError(400, f"Unsupported MIME type: {mime}")
    if mime == "application/pdf":
        if not data or not MAGIC[mime](data):
            raise GoogleError(400, "The document has no pages.")
        if len(data) > MAX_PDF_BYTES:
            raise GoogleError(400, f"The document size exceeds the limit: {MAX_PDF_BYTES} bytes.")
        if pdf_pages(data) > MAX_PDF_PAGES:
            raise GoogleError(400, f"The document contains {pdf_pages(data)} pages, "
                                   f"which exceeds the supported page limit of {MAX_PDF_PAGES}.")
    elif not MAGIC[mime](data):
        raise GoogleError(400, "Unable to process input image. Please retry or report in "
                               "https://developers.generativeai.google/guide/troubleshooting")
    return InlineFile(mime, data)


# --- all of it -------------------------------------------------------------------------------------------------------

def bad_request(violations: list[tuple[str, str]]) -> list[Any]:
    listed = [{"field": place, "description": text} if place else {"description": text} for place, text in violations]
    return [{"@type": "type.googleapis.com/google.rpc.BadRequest", "fieldViolations": listed}]


def refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def parse_json(body: bytes) -> Any:
    try:
        return json.loads(body.decode("utf-8"), parse_constant=refuse_constant)
    except ValueError as error:
        raise GoogleError(400, f"Invalid JSON payload received. {error}") from None


def check_config(request: Request) -> None:
    where = "* GenerateContentRequest.generation_config"
    schemas = [name for name in ("responseSchema", "responseJsonSchema") if request.option(name) is not None]
    text_schema = request.option("responseFormat", "text", "schema")
    if len(schemas) == 2 or (schemas and text_schema is not None):
        raise GoogleError(400, f"{where}: only one of response_schema, response_json_schema and "
                               f"response_format.text.schema can be set.")
    if schemas and request.option("responseMimeType") != "application/json":
        raise GoogleError(400, f"{where}.{snake(schemas[0])}: only allowed when response_mime_type is "
                               f"'application/json'.")
    if text_schema is not None and request.option("responseFormat", "text", "mimeType") != "APPLICATION_JSON":
        raise GoogleError(400, f"{where}.response_format.text.schema: only allowed when mime_type is "
                               f"APPLICATION_JSON.")
    mime = request.option("responseMimeType")
    if mime not in (None, "", "text/plain", "application/json", "text/x.enum"):
        raise GoogleError(400, f"{where}.response_mime_type: allowed mimetypes are `text/plain`, "
                               f"`application/json`, and `text/x.enum`.")
    for schema, path in ((request.option("responseJsonSchema"), "response_json_schema"),
                         (text_schema, "response_format.text.schema")):
        found = [] if schema is None else list(json_schema_faults(schema, f"generation_config.{path}"))
        if found:
            raise GoogleError(400, "\n".join(f"* GenerateContentRequest.{text}" for text in found))
    limit = request.option("maxOutputTokens")
    if limit is not None and int(limit) < 1:
        raise GoogleError(400, f"{where}.max_output_tokens: max_output_tokens must be positive.")


def check_content(content: dict[str, Any], path: str, request: Request, system: bool) -> None:
    if not system and content.get("role") not in (None, "", "user", "model"):
        raise GoogleError(400, "Please use a valid role: user, model.")
    parts = content.get("parts") or []
    if not parts:
        raise GoogleError(400, f"* GenerateContentRequest.{path}.parts: contents.parts must not be empty.")
    for index, part in enumerate(parts):
        data = fields_of(part)
        place = f"{path}.parts[{index}]"
        if not any(name in data for name in PART_DATA):
            raise GoogleError(400, f"* GenerateContentRequest.{place}.data: required oneof field 'data' must have "
                                   f"one initialized field")
        if system and "text" not in data:
            raise GoogleError(400, f"* GenerateContentRequest.{place}: system_instruction takes text only.")
        if "text" in data:
            request.texts.append(data["text"])
        if "inlineData" in data:
            request.files.append(decode_blob(data["inlineData"], f"{place}.inline_data"))


def check_request(body: bytes) -> Request:
    """The request in `body`, or GoogleError."""
    try:
        return check_message(parse_json(body))
    except RecursionError:
        raise GoogleError(400, "Invalid JSON payload received. Nesting is too deep.") from None


def check_message(message: Any) -> Request:
    if not isinstance(message, dict):
        raise GoogleError(400, 'Invalid JSON payload received. Unknown name "": Root element must be a message.')
    violations = list(faults("GenerateContentRequest", message, ""))
    if violations:
        raise GoogleError(400, "\n".join(text for _, text in violations), details=bad_request(violations))
    fields = fields_of(message)
    contents = fields.get("contents") or []
    if not contents:
        raise GoogleError(400, "* GenerateContentRequest.contents: contents is not specified\n")
    request = Request(config=fields.get("generationConfig") or {})
    check_config(request)
    if "systemInstruction" in fields:
        check_content(fields["systemInstruction"], "system_instruction", request, system=True)
    for index, content in enumerate(contents):
        check_content(content, f"contents[{index}]", request, system=False)
    return request


def encode_file(mime: str, data: bytes) -> dict[str, Any]:
    """An inlineData part, as a client sends it."""
    return {"inlineData": {"mimeType": mime, "data": base64.b64encode(data).decode("ascii")}}
