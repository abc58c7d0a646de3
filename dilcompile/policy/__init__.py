"""The policy: ordered rules that say what each attention becomes."""

from __future__ import annotations

from dilcompile.policy.resolve import memory_use, resolve, rule_of, tell_again, unused_rules
from dilcompile.policy.schema import Policy

__all__ = ["Policy", "memory_use", "resolve", "rule_of", "tell_again", "unused_rules"]
