"""Retrace a Dynamo graph into pre-dispatch ATen, where one spelling of an operator stands for many in Python.

The result is above autograd and keeps softmax, matmul and scaled_dot_product_attention whole, so that one finder serves
``torch.compile`` and ``torch.export`` (which gives this dialect by itself). Module paths and source lines survive.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch._functorch import predispatch
from torch._guards import TracingContext
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx import GraphModule, Interpreter, Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from dilcompile.passes.dialect import custom_gradients
from dilcompile.passes.dialect.fused_layers import EXPANSIONS
from dilcompile.passes.dialect.recording import WHOLE, differentiates, reshapes_in_place, whole

CHECKPOINT = torch.ops.higher_order.tag_activation_checkpoint
_CONTEXT_FN = "_checkpoint_context_fn"


class NormalizeError(RuntimeError):
    """The graph holds something that can't be retraced; the message names it."""


def normalize(gm: GraphModule, example_inputs: Sequence[Any]) -> GraphModule:
    """A graph module with the same inputs, outputs and results as ``gm``, in pre-dispatch ATen.

    Args:
        gm: a Dynamo graph. It is not changed.
        example_inputs: its inputs: real tensors, fake tensors, or (symbolic) integers.

    Raises:
        NormalizeError: if the graph can't be retraced (an unknown higher-order operator, a tensor subclass ...).
    """
    fake_mode = _fake_mode(example_inputs)
    fakes = [_fakify(value, fake_mode) for value in example_inputs]
    try:
        with fake_mode, torch.fx.traceback.preserve_node_meta(), _kept_vmaps(gm), _vanilla_checkpoints(gm) as clean:
            traced: GraphModule = make_fx(_Retrace(gm).run, tracing_mode="real", pre_dispatch=True, _allow_non_fake_inputs=True)(
                *fakes
            )
            clean(traced)
    except Exception as error:
        raise NormalizeError(f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}") from error
    traced.meta = dict(gm.meta)
    _keep_inputs(gm, traced)
    _check_constants(traced)
    _drop_unused(traced)
    return traced


def _drop_unused(traced: GraphModule) -> None:
    """Erase what nobody reads. ``Graph.eliminate_dead_code`` would do so in bodies that were not retraced too, where writing in
    place by a method looks as if it did nothing.
    """
    own = custom_gradients.bodies(traced)
    for part in traced.modules():
        if isinstance(part, GraphModule) and part.graph not in own:
            for node in reversed(part.graph.nodes):
                if not node.users and not node.is_impure() and not bounds_vmap(node):
                    part.graph.erase_node(node)
            part.recompile()


def vmap_depth(node: Node) -> int:
    """1 where a ``vmap`` begins, -1 where it ends, else 0."""
    if node.target is predispatch._vmap_increment_nesting:
        return 1
    return -1 if node.target is predispatch._vmap_decrement_nesting else 0


def bounds_vmap(node: Node) -> bool:
    """Does it begin or end a ``vmap``? Its place in the graph is its effect, though nobody uses its result."""
    return vmap_depth(node) != 0


def fake_mode_of(gm: GraphModule) -> FakeTensorMode:
    """The fake mode that the values in ``node.meta['val']`` belong to."""
    for node in gm.graph.nodes:
        value = node.meta.get("val")
        if isinstance(value, FakeTensor):
            return value.fake_mode
    return FakeTensorMode(shape_env=ShapeEnv())


class _Retrace(Interpreter):
    """Runs the Dynamo graph; ops that hide an attention inside are run as their expansion."""

    def __init__(self, gm: GraphModule) -> None:
        super().__init__(gm)
        self._takes_known = not differentiates(gm) and not reshapes_in_place(gm)

    def run_node(self, n: Node) -> Any:
        if self._takes_known and n.op == "call_function" and n.target in WHOLE and not n.kwargs:
            with self._set_current_node(n):
                result = whole(WHOLE[n.target], self.fetch_args_kwargs_from_env(n)[0], n.meta.get("example_value"))
            if result is not None:
                return result
        return super().run_node(n)

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if target is torch.amp.autocast_mode._enter_autocast:
            # Entering it for real gives the values below the dtypes they will have; it records itself.
            return torch.amp.autocast(*args, **kwargs).__enter__()  # type: ignore[no-untyped-call]
        if target is torch.amp.autocast_mode._exit_autocast:
            args[0].__exit__(None, None, None)
            return None
        if target is custom_gradients.CUSTOM:
            return custom_gradients.keep(args, kwargs)
        return super().call_function(EXPANSIONS.get(target, target), args, kwargs)


def _fake_mode(example_inputs: Sequence[Any]) -> FakeTensorMode:
    context = TracingContext.try_get()
    if context is not None and context.fake_mode is not None:
        return context.fake_mode
    for value in example_inputs:
        if isinstance(value, FakeTensor):
            return value.fake_mode
    return FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)


def _fakify(value: Any, fake_mode: FakeTensorMode) -> Any:
    if not isinstance(value, torch.Tensor) or isinstance(value, FakeTensor):
        return value
    context = TracingContext.try_get()
    # Dynamo's own symbols for this input, so that its guards and ours speak of the same lengths.
    symbolic: Any = None if context is None else context.tensor_to_context.get(value)  # type: ignore[no-untyped-call]
    if symbolic is None:
        return fake_mode.from_tensor(value, static_shapes=True)
    return fake_mode.from_tensor(value, symbolic_context=symbolic, source=symbolic.tensor_source)


class _BodyMeta(dict[str, Any]):
    """A checkpoint body's meta that answers for the context function a plain checkpoint has.

    The pre-dispatch rule reads it unasked, while the operator itself takes its presence for a selective checkpoint.
    """

    def __missing__(self, key: str) -> Any:
        if key == _CONTEXT_FN:
            return _plain_context
        raise KeyError(key)


def _plain_context() -> Any:
    from torch._higher_order_ops import wrap
    from torch.utils.checkpoint import create_selective_checkpoint_contexts

    return create_selective_checkpoint_contexts(wrap._always_prefer_recompute)  # type: ignore[no-untyped-call]


@contextlib.contextmanager
def _kept_vmaps(gm: GraphModule) -> Iterator[None]:
    """Let the calls that make up a ``vmap`` be recorded, as they are for an export, not run."""
    if not any(bounds_vmap(node) for node in gm.graph.nodes):
        yield
        return
    before = torch.compiler._is_exporting_flag
    torch.compiler._is_exporting_flag = True
    try:
        yield
    finally:
        torch.compiler._is_exporting_flag = before


def _check_constants(traced: GraphModule) -> None:
    """A value that the retrace could not follow is left in the graph as a constant without data.

    Raises:
        NormalizeError: if there is one.
    """
    for node in traced.graph.find_nodes(op="get_attr"):
        if isinstance(getattr(traced, str(node.target), None), FakeTensor):
            raise NormalizeError("a value was lost in a function transform (vmap, grad ...)")


@contextlib.contextmanager
def _vanilla_checkpoints(gm: GraphModule) -> Iterator[Callable[[GraphModule], None]]:
    """Let plain checkpoints be retraced; yields what takes the stand-in off the result."""
    bodies = {body: body.meta for body in gm.modules() if isinstance(body, GraphModule)}
    for body, meta in bodies.items():
        body.meta = _BodyMeta(meta)

    def clean(root: GraphModule) -> None:
        for body in root.modules():
            if isinstance(body, GraphModule) and body.meta.get(_CONTEXT_FN) is _plain_context:
                del body.meta[_CONTEXT_FN]

    try:
        yield clean
    finally:
        for body, meta in bodies.items():
            body.meta = meta


def _keep_inputs(before: GraphModule, after: GraphModule) -> None:
    """Carry over what AOTAutograd reads off the inputs: names, sources, which addresses are static."""
    for old, new in zip(_placeholders(before), _placeholders(after), strict=True):
        value = new.meta.get("val")
        new.meta = dict(old.meta)
        if value is not None:
            new.meta["val"] = value
        new.target = old.target
        new._rename(old.name)
        if hasattr(old, "_dynamo_source"):
            new._dynamo_source = old._dynamo_source


def _placeholders(gm: GraphModule) -> list[Node]:
    return list(gm.graph.find_nodes(op="placeholder"))
