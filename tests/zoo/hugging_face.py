"""How an entry from transformers is written down: names and options only, so that nothing is imported before it is built."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from zoo.calls import Call
from zoo.model import Model
from zoo.sizes import Options

BOTH, WRITTEN = ("eager", "sdpa"), ("eager",)


class Family:
    """Entries of one family, made by calling it."""

    def __init__(self, name: str, inputs: Call) -> None:
        self.name, self.inputs = name, inputs

    def __call__(
        self,
        name: str,
        prefix: str,
        options: Options | Callable[[], Options],
        *,
        kind: str = "Model",
        inputs: Call | None = None,
        ways: tuple[str, ...] = BOTH,
        note: str = "",
        attention: bool = True,
    ) -> Model:
        """One entry.

        Args:
            prefix: of configuration and class: ``Bert`` for ``BertConfig`` and ``BertModel``.
            kind: the rest of the class's name; a whole name if it starts otherwise than ``prefix``, after a dot.
            options: of the configuration; a function where they need transformers themselves.
        """

        def make() -> tuple[Any, str]:
            import transformers

            given = options() if callable(options) else dict(options)
            config = getattr(transformers, f"{prefix}Config")(**given)
            return config, kind.removeprefix(".") if kind.startswith(".") else prefix + kind

        return Model(name, self.name, make, inputs or self.inputs, ways, attention, note)
