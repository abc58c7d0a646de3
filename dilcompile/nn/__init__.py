"""Modules for models that are built with sparse attention, rather than given it by a policy."""

from dilcompile.nn.block_gate import BlockGate, Gated

__all__ = ["BlockGate", "Gated"]
