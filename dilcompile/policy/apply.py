"""What a rule makes of a site: ``keep``, or a form with its options, derived from the form's own fields."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Union, get_type_hints

from pydantic import BeforeValidator, Discriminator, GetJsonSchemaHandler, Tag, create_model, model_validator
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema

from dilcompile.decision import KernelName
from dilcompile.forms import FORMS, Form
from dilcompile.near import hint
from dilcompile.policy.problems import Misfit, Path, raise_all
from dilcompile.policy.section import Section
from dilcompile.policy.values import conform, shown

# What the model computes anyway, and the same with its keys sent around a ring of ranks.
KEEPING = ("keep", "ring")
FORM_NAMES = (*KEEPING, *FORMS)
# Named in the policy language, built in a later version.
RESERVED = ("per_head",)


class Apply(Section):
    """The base of ``apply``: one subclass a form, with the form's options as keys."""

    form_class: ClassVar[type[Form] | None] = None
    form: str
    kernel: KernelName | None = None

    @property
    def options(self) -> dict[str, Any]:
        """The form's options as given."""
        return {name: value for name, value in self.given().items() if name not in ("form", "kernel")}

    def build(self, merge_grad: str | None = None) -> Form | None:
        """The form, or None for ``keep`` and ``ring``.

        Args:
            merge_grad: the policy's ``numerics.merge_grad``, for a rule that doesn't give the option itself.
        """
        if self.form_class is None:
            return None
        options = self.options
        if merge_grad is not None and "merge_grad" in {option.name for option in dataclasses.fields(self.form_class)}:
            options.setdefault("merge_grad", merge_grad)
        return self.form_class(**options)

    @classmethod
    def __get_pydantic_json_schema__(cls, core: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        described = handler(core)
        paired = cls.form_class.paired if cls.form_class is not None else ()
        if paired:
            lists = {"properties": {name: {"type": "array"} for name in paired}, "required": list(paired)}
            words = {"properties": {name: {"type": "string"} for name in paired}}
            handler.resolve_ref_schema(described)["anyOf"] = [lists, words]
        return described

    @model_validator(mode="after")
    def _options_fit(self) -> Apply:
        raise_all(_unfit(type(self), self.options))
        return self


def _unfit(model: type[Apply], options: Mapping[str, Any], bad: Sequence[Path] = ()) -> list[Misfit]:
    """What is wrong with these options in their ranges and together.

    Args:
        bad: places of which nothing more is said, because what stands there is of the wrong type.
    """
    if model.form_class is None:
        return []
    # Not built, since it would raise; the form's own checks are asked of what would stand in its fields.
    form, unknown = object.__new__(model.form_class), list(bad)
    for option in dataclasses.fields(model.form_class):
        required = option.default is dataclasses.MISSING
        object.__setattr__(form, option.name, options.get(option.name, None if required else option.default))
        if required and option.name not in options:
            unknown.append((option.name,))
    return [
        Misfit(f"{problem.held} {problem.message}".strip(), problem.at)
        for problem in form.problems()
        if not any(place[: len(start)] == start for place in (problem.at, *problem.about) for start in unknown)
    ]


def also_unfit(apply: object) -> list[Misfit]:
    """What else is wrong with the options of an ``apply`` in which some are of the wrong type."""
    name = apply.get("form") if isinstance(apply, dict) else None
    model = APPLY.get(name) if isinstance(name, str) else None
    if model is None or model.form_class is None:
        return []
    assert isinstance(apply, dict)
    options: dict[str, Any] = {}
    bad: list[Path] = []
    for option in policy_options(model.form_class):
        if option.name not in apply:
            continue
        value = apply[option.name]
        try:
            options[option.name] = conform(model.annotation(option.name), value)
        except Misfit as misfit:
            bad += [(option.name, *part.path) for part in misfit.parts]
            # Of a list the entries that are right are still looked at.
            entries = {part.path[0] for part in misfit.parts if part.path}
            if entries:
                options[option.name] = tuple(None if index in entries else entry for index, entry in enumerate(value))
    return _unfit(model, options, bad)


def policy_options(form: type[Form]) -> list[dataclasses.Field[Any]]:
    """The options of a form that are keys of a policy."""
    return [option for option in dataclasses.fields(form) if option.name not in form.from_site]


def _model(name: str, form: type[Form] | None) -> type[Apply]:
    fields: dict[str, Any] = {"form": (Literal[name], ...)}
    for option in policy_options(form) if form is not None else ():
        kind = get_type_hints(form, include_extras=True)[option.name]
        required = option.default is dataclasses.MISSING
        fields[option.name] = (kind, ... if required else option.default)
    title = "Apply" + "".join(part.title() for part in name.split("_"))
    model = create_model(title, __base__=Apply, **fields)
    model.form_class = form
    model.__doc__ = form.__doc__ if form is not None else _KEEPS[name]
    return model


_KEEPS = {
    "keep": "The site stays exactly as the model computes it. With `shard` it is computed over ranks, with the same numbers.",
    "ring": "Short for `form: keep` with `shard: {method: ring}`; `shard` names the mesh axis.",
}
APPLY: dict[str, type[Apply]] = {**{n: _model(n, None) for n in KEEPING}, **{n: _model(n, f) for n, f in FORMS.items()}}


def _known_form(value: Any) -> Any:
    """Refuse a missing, unknown or not yet built form, before pydantic picks the model by it."""
    if isinstance(value, Form):
        return {"form": value.name, **value.plain()}
    if not isinstance(value, dict):
        return value
    has = f"this version has {', '.join(FORM_NAMES)}"
    if "form" not in value:
        raise Misfit(f"key 'form' is missing: {has}")
    name = value["form"]
    if not isinstance(name, str):
        raise Misfit(f"expected the name of a form, got {shown(name)}: {has}", ("form",))
    if name in RESERVED:
        raise Misfit(f"form {name!r} is not built yet: {has}", ("form",))
    if name not in APPLY:
        raise Misfit(f"unknown form {name!r}: {has}{hint(name, FORM_NAMES)}", ("form",))
    return value


def _form_of(value: Any) -> str:
    name: str = value["form"] if isinstance(value, dict) else value.form
    return name


if TYPE_CHECKING:
    AnyApply = Apply
else:
    AnyApply = Annotated[
        Union[tuple(Annotated[model, Tag(name)] for name, model in APPLY.items())],  # noqa: UP007  made at run time
        Discriminator(_form_of),
        BeforeValidator(_known_form),
    ]
