"""The base of every mapping in a policy: no unknown keys, strict values, and a memory of what was given."""

from __future__ import annotations

import dataclasses
import types
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, ValidatorFunctionWrapHandler, field_validator
from pydantic_core.core_schema import ValidationInfo

from dilcompile.policy.problems import Misfit
from dilcompile.policy.values import conform, shown


class Section(BaseModel):
    """A frozen mapping of a policy.

    Direct construction raises pydantic's ValidationError; ``Policy.load`` raises PolicyError with places.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    @field_validator("*", mode="wrap")
    @classmethod
    def _conform(cls, value: Any, handler: ValidatorFunctionWrapHandler, info: ValidationInfo) -> Any:
        kind = cls.annotation(str(info.field_name))
        if not _holds_sections(kind):
            return conform(kind, value)
        if get_origin(kind) is tuple:
            if not isinstance(value, (list, tuple)):
                raise Misfit(f"expected a list, got {shown(value)}")
            if not value:
                raise Misfit("expected at least one entry, got an empty list")
        # A form is a dataclass and may stand for its options.
        elif not isinstance(value, (dict, BaseModel)) and not dataclasses.is_dataclass(value):
            raise Misfit(f"expected a mapping, got {shown(value)}")
        return handler(value)

    @classmethod
    def annotation(cls, name: str) -> Any:
        """What the key takes, as ``conform`` wants it."""
        field = cls.model_fields[name]
        kind = _without_none(field.annotation)
        if not field.metadata:
            return kind
        parts: Any = (kind, *field.metadata)
        return Annotated[parts]

    def given(self) -> dict[str, Any]:
        """The keys that were written, and their values; defaults are left out."""
        written = self.model_fields_set
        return {name: getattr(self, name) for name in type(self).model_fields if name in written}

    def plain(self) -> dict[str, Any]:
        """``given`` all the way down, as dicts and lists: what YAML and JSON hold."""
        return {name: _plain(value) for name, value in self.given().items()}


def _plain(value: Any) -> Any:
    if isinstance(value, Section):
        return value.plain()
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    return value


def _without_none(kind: Any) -> Any:
    if get_origin(kind) not in (Union, types.UnionType):
        return kind
    members = tuple(member for member in get_args(kind) if member is not types.NoneType)
    return Union[members]  # noqa: UP007  a union made at run time


def _holds_sections(kind: Any) -> bool:
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        return True
    return any(_holds_sections(part) for part in get_args(kind))
