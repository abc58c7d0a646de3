"""What a rule makes of a site: ``keep``, or a form with its options, derived from the form's own fields."""

from __future__ import annotations

import dataclasses
import re
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Union, get_type_hints

from pydantic import BeforeValidator, Discriminator, Tag, create_model, model_validator

from dilcompile.decision import KernelName
from dilcompile.errors import FormError
from dilcompile.forms import FORMS, Form
from dilcompile.policy.problems import Misfit, hint
from dilcompile.policy.section import Section
from dilcompile.policy.values import shown

FORM_NAMES = ("keep", *FORMS)
# Named in the policy language, built in a later version.
RESERVED = ("block_sparse", "union", "per_head", "ring")
# Options that are lists of one entry a branch.
PAIRED = ("segments", "rates")


class Apply(Section):
    """The base of ``apply``: one subclass a form, with the form's options as keys."""

    of: ClassVar[type[Form] | None] = None
    form: str
    kernel: KernelName | None = None

    @property
    def options(self) -> dict[str, Any]:
        """The form's options as given."""
        return {name: value for name, value in self.given().items() if name not in ("form", "kernel")}

    def build(self, merge_grad: str | None = None) -> Form | None:
        """The form, or None for ``keep``.

        Args:
            merge_grad: the policy's ``numerics.merge_grad``, for a rule that doesn't give the option itself.

        Raises:
            FormError: if the options don't fit together.
        """
        if self.of is None:
            return None
        options = self.options
        if merge_grad is not None and "merge_grad" in {option.name for option in dataclasses.fields(self.of)}:
            options.setdefault("merge_grad", merge_grad)
        return self.of(**options)

    @model_validator(mode="after")
    def _options_fit(self) -> Apply:
        lengths = {name: len(held) for name in PAIRED if isinstance(held := getattr(self, name, None), tuple)}
        if len(set(lengths.values())) > 1:
            first, second = PAIRED
            raise Misfit(f"{first} has {lengths[first]} entries but {second} has {lengths[second]}")
        try:
            self.build()
        except FormError as error:
            raise _misfit(str(error).removeprefix(f"form {self.form}: "), set(self.options)) from None
        return self


def _misfit(message: str, options: set[str]) -> Misfit:
    """A form's message, at the option that it is about."""
    about = re.match(r"(\w+)(?:\[(\d+)\])? (?=must )", message)
    if about is None or about[1] not in options:
        return Misfit(message)
    return Misfit(message[about.end() :], (about[1], int(about[2])) if about[2] else (about[1],))


def _model(name: str, form: type[Form] | None) -> type[Apply]:
    fields: dict[str, Any] = {"form": (Literal[name], ...)}
    for option in dataclasses.fields(form) if form is not None else ():
        kind = get_type_hints(form, include_extras=True)[option.name]
        required = option.default is dataclasses.MISSING
        fields[option.name] = (kind, ... if required else option.default)
    title = "Apply" + "".join(part.title() for part in name.split("_"))
    model = create_model(title, __base__=Apply, **fields)
    model.of = form
    model.__doc__ = form.__doc__ if form is not None else "The site stays exactly as the model computes it."
    return model


APPLY: dict[str, type[Apply]] = {"keep": _model("keep", None), **{n: _model(n, f) for n, f in FORMS.items()}}


def _known_form(value: Any) -> Any:
    """Refuse a missing, unknown or not yet built form, before pydantic picks the model by it."""
    if isinstance(value, Form):
        return {"form": value.name, **dataclasses.asdict(value)}
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
