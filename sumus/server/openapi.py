"""Makes the OpenAPI document of the device plane from the table of endpoints and the classes of the messages."""

import json
import re
from functools import cache
from typing import Any, cast

import msgspec

from sumus.wire.messages import ENDPOINTS, EVERYWHERE, MAX_UNDIGESTED, PROTOCOL, STATUS, Endpoint, Problem

_HEADERS = {
    "Sumus-Protocol": ("the version of the protocol that the device uses", True, "^[0-9]{1,4}$"),
    "Sumus-Device": ("the device's id", False, "^[0-9a-f]{64}$"),
    "Sumus-Signature": ("the signature over the request, in base64url", False, "^[A-Za-z0-9_-]{86}$"),
}
_DIGEST = {
    "name": "Sumus-Digest",
    "in": "header",
    "required": False,
    "description": f"SHA-256 of the body, in hexadecimal; required beyond {MAX_UNDIGESTED} bytes",
    "schema": {"type": "string", "pattern": "^[0-9a-f]{64}$"},
}


@cache
def document() -> bytes:
    """Return `openapi()` as JSON. It is made once per process, since this takes milliseconds and anybody may request it."""
    return json.dumps(openapi()).encode()


def openapi() -> dict[str, Any]:
    """Return the device plane as an OpenAPI 3.1 document."""
    forms = {form for each in ENDPOINTS for form in (each.body, each.answer) if form not in (None, bytes)} | {Problem}
    ordered = sorted(forms, key=lambda form: form.__name__)
    _, components = msgspec.json.schema_components(ordered, ref_template="#/components/schemas/{name}")
    paths: dict[str, dict[str, Any]] = {}
    for each in ENDPOINTS:
        paths.setdefault(each.path, {})[each.method.lower()] = _operation(each)
    return {
        "openapi": "3.1.0",
        "info": {"title": "sumus, the device plane", "version": str(PROTOCOL)},
        "paths": paths,
        "components": {"schemas": _plain(components)},
    }


def _plain(schema: Any) -> Any:
    """Return a schema with fixed-length arrays in place of tuples of equal members, since more programs support arrays."""
    if isinstance(schema, list):
        return [_plain(each) for each in cast(list[Any], schema)]
    if not isinstance(schema, dict):
        return schema
    plain = {name: _plain(each) for name, each in cast(dict[str, Any], schema).items()}
    members = plain.get("prefixItems", [])
    if members and all(each == members[0] for each in members):
        del plain["prefixItems"]
        plain["items"] = members[0]
    return plain


def _operation(each: Endpoint) -> dict[str, Any]:
    codes: dict[int, list[str]] = {}
    for code in (*EVERYWHERE, *each.codes):
        codes.setdefault(STATUS[code], []).append(code)
    answers: dict[str, Any] = {str(each.status): {"description": "as asked", "content": _content(each.answer)}}
    for status, those in sorted(codes.items()):
        answers[str(status)] = {
            "description": ", ".join(those),
            "content": {"application/problem+json": {"schema": {"$ref": "#/components/schemas/Problem"}}},
        }
    operation: dict[str, Any] = {"operationId": each.name, "parameters": _parameters(each), "responses": answers}
    if each.body is not None:
        operation["requestBody"] = {"required": True, "content": _content(each.body)}
    return operation


def _content(form: type) -> dict[str, Any]:
    if form is bytes:
        return {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}
    return {"application/json": {"schema": {"$ref": f"#/components/schemas/{form.__name__}"}}}


def _parameters(each: Endpoint) -> list[dict[str, Any]]:
    in_path = re.findall(r"{(\w+)}", each.path)
    found = [{"name": name, "in": "path", "required": True, "schema": {"type": "string"}} for name in in_path]
    for name, (what, always, pattern) in _HEADERS.items():
        if each.method != "GET" and (always or each.signed):
            schema = {"type": "string", "pattern": pattern}
            found.append({"name": name, "in": "header", "required": True, "description": what, "schema": schema})
    return [*found, _DIGEST] if each.signed and each.body is not None else found
