"""What each operator that masks are built with does to one element: a rule by the operator's name."""

from __future__ import annotations

from dilcompile.passes.masks.rules.indexing import INDEXING
from dilcompile.passes.masks.rules.making import MAKING
from dilcompile.passes.masks.rules.moving import MOVING
from dilcompile.passes.masks.rules.rule import WRAPPING, Rule
from dilcompile.passes.masks.rules.values import VALUES

__all__ = ["READ", "WRAPPING", "Rule"]

READ: dict[str, Rule] = {**MAKING, **MOVING, **INDEXING, **VALUES}
