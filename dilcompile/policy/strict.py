"""What holds for every value of a policy, said in its JSON schema: nothing is null, no list and no text is empty."""

from __future__ import annotations

from typing import Any

NULL = {"type": "null"}


def strict(schema: Any) -> Any:
    """The schema with these rules at every place; ``schema`` itself is not changed."""
    if isinstance(schema, list):
        return [strict(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    found = {key: strict(value) for key, value in schema.items() if not (key == "default" and value is None)}
    members = [member for member in found.get("anyOf", []) if member != NULL]
    if len(members) == 1:
        del found["anyOf"]
        found = {**members[0], **found}
    elif members:
        found["anyOf"] = members
    if found.get("type") == "array":
        found.setdefault("minItems", 1)
    if found.get("type") == "string" and not {"const", "enum", "pattern"} & set(found):
        found.setdefault("minLength", 1)
    return found
