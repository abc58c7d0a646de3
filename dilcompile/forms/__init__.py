"""The forms: which pairs attend. Each is a frozen set of options; its text parses back with ``parse_form``."""

from __future__ import annotations

from dataclasses import MISSING, fields

from dilcompile.errors import FormError
from dilcompile.forms.base import Form, parse_options
from dilcompile.forms.block_sparse import BlockSparse
from dilcompile.forms.dense import Dense
from dilcompile.forms.dilated import Dilated
from dilcompile.forms.keep_structure import KeepStructure
from dilcompile.forms.sliding_window import SlidingWindow
from dilcompile.forms.union import Union
from dilcompile.near import hint

FORMS: dict[str, type[Form]] = {
    Dense.name: Dense,
    SlidingWindow.name: SlidingWindow,
    Dilated.name: Dilated,
    BlockSparse.name: BlockSparse,
    KeepStructure.name: KeepStructure,
    Union.name: Union,
}


def make_form(name: str, options: dict[str, object]) -> Form:
    """The form ``name`` with these options.

    Raises:
        FormError: for an unknown name, an unknown or missing option, or options that don't fit together.
    """
    kind = FORMS.get(name)
    if kind is None:
        raise FormError(f"form {name!r} is unknown{hint(name, FORMS)}; the forms are {', '.join(FORMS)}")
    known = {option.name: option for option in fields(kind)}
    for option in options:
        if option not in known:
            takes = f"the options are {', '.join(known)}" if known else "it has no options"
            raise FormError(f"form {name}: unknown option {option!r}{hint(option, known)}; {takes}")
    for option, field in known.items():
        if field.default is MISSING and option not in options:
            raise FormError(f"form {name}: the option {option!r} is missing; give it, as in {name}({option}=...)")
    return kind(**options)


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


__all__ = [
    "FORMS",
    "BlockSparse",
    "Dense",
    "Dilated",
    "Form",
    "KeepStructure",
    "SlidingWindow",
    "Union",
    "make_form",
    "parse_form",
]
