"""The forms: which pairs attend. Each is a frozen set of options; its text parses back with ``parse_form``."""

from __future__ import annotations

from dilcompile.errors import FormError
from dilcompile.forms.base import Form, parse_options
from dilcompile.forms.dense import Dense
from dilcompile.forms.dilated import Dilated
from dilcompile.forms.sliding_window import SlidingWindow

FORMS: dict[str, type[Form]] = {
    Dense.name: Dense,
    SlidingWindow.name: SlidingWindow,
    Dilated.name: Dilated,
}


def make_form(name: str, options: dict[str, object]) -> Form:
    """The form ``name`` with these options.

    Raises:
        FormError: for an unknown name, an unknown or missing option, or options that don't fit together.
    """
    kind = FORMS.get(name)
    if kind is None:
        raise FormError(f"form {name!r} is unknown; the forms are {', '.join(FORMS)}")
    try:
        return kind(**options)
    except TypeError as error:
        raise FormError(f"form {name}: {str(error).split('__init__() ')[-1]}") from None


def parse_form(text: str) -> Form:
    """The form that ``str(form)`` gave ``text``; a bare name is accepted for a form without options.

    Raises:
        FormError: if the text is not that of a form.
    """
    try:
        name, options = parse_options(text if "(" in text else f"{text}()")
    except (SyntaxError, ValueError) as error:
        raise FormError(f"{text!r} is not the text of a form, such as 'dense()' or 'sliding_window(window=512)'") from error
    return make_form(name, options)


__all__ = ["FORMS", "Dense", "Dilated", "Form", "SlidingWindow", "make_form", "parse_form"]
