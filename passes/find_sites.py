"""Find every attention of a normalised graph: from each softmax or SDPA call outward, by role, with the axes proven."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import cached_property

import torch
from torch.fx import Node

from dilcompile.passes.axes import Atom, Axes, Leaves, is_tensor, op_name, shape_of
from dilcompile.passes.masks.read import ReadMask
from dilcompile.passes.masks.reader import MaskReader
from dilcompile.passes.provenance import layer_index, module_path, source_line
from dilcompile.passes.read_operands import read_site_mask
from dilcompile.passes.regions import Graph
from dilcompile.passes.roles import Operand, Roles, roles_of_products, roles_of_sdpa, strip
from dilcompile.passes.score_path import SOFTMAX, MaskOperand, ScoreWalk, Unproven, labels, scalar_or_none, walk_values
from dilcompile.site import AttentionSite, Kind, Length, Miss, Phase

log = logging.getLogger(__name__)

SDPA = "scaled_dot_product_attention"


@dataclass(frozen=True)
class Match:
    """One proven attention: its description, and the nodes that a rewrite needs."""

    site: AttentionSite
    roles: Roles
    q: Operand
    k: Operand
    v: Operand
    mask: ReadMask
    bias: tuple[MaskOperand, ...]
    tables: frozenset[Node]


@dataclass(frozen=True)
class Findings:
    matches: tuple[Match, ...]
    misses: tuple[Miss, ...]
    axes: Axes


def find_sites(graph: Graph) -> Findings:
    """All attention of the graph, and everything that looks like it and could not be proven, in graph order."""
    nodes = list(graph.gm.graph.nodes)
    axes = Axes(nodes, _weight_like(nodes, graph.weights))
    finder = _Finder(graph, nodes, axes)
    matches: list[Match] = []
    misses: list[Miss] = []
    for node in nodes:
        if node.op != "call_function":
            continue
        name = op_name(node)
        if name not in SOFTMAX and name != SDPA:
            continue
        try:
            match = finder.sdpa(node, len(matches)) if name == SDPA else finder.softmax(node, len(matches))
        except Unproven as end:
            misses.append(Miss(module_path(node), source_line(node), end.node.name, end.reason, end.cure))
            continue
        except Exception as error:
            # A site that the finder stumbles over is a site left alone, never a model that does not run.
            log.warning("dilcompile: the finder failed at %s", node.name, exc_info=True)
            reason = f"the finder failed on it ({type(error).__name__}: {error})"
            misses.append(Miss(module_path(node), source_line(node), node.name, reason, "please report it"))
            continue
        if match is not None:
            matches.append(match)
    return Findings(tuple(matches), tuple(misses), axes)


def _weight_like(nodes: list[Node], parameters: frozenset[Node]) -> frozenset[Node]:
    """Parameters, and whatever is made of parameters by views and elementwise operators only."""
    found = set(parameters)
    for node in nodes:
        if node.op == "call_function" and is_tensor(node):
            inputs = [arg for arg in node.all_input_nodes if is_tensor(arg)]
            moved = op_name(node) in (
                "t",
                "transpose",
                "permute",
                "view",
                "reshape",
                "to",
                "expand",
                "unsqueeze",
                "mul",
                "select",
            )
            if moved and inputs and all(arg in found for arg in inputs):
                found.add(node)
    return frozenset(found)


def _known(graph: Graph | None) -> dict[Node, torch.Tensor]:
    """Buffers, and tensors that the retrace folded into the graph (``torch.tensor(8.0)`` in the model's code)."""
    if graph is None:
        return {}
    found = {**_known(graph.parent), **graph.tables}
    for node in graph.gm.graph.find_nodes(op="get_attr"):
        held = getattr(graph.gm, str(node.target), None)
        if type(held) is torch.Tensor:
            found[node] = held
    return found


def _wants_gradient(node: Node) -> bool:
    """Retracing detaches ``val``; Dynamo's own record has the flag."""
    return any(getattr(node.meta.get(key), "requires_grad", False) for key in ("val", "example_value"))


def _learned(graph: Graph) -> set[Node]:
    found = set(graph.weights)
    for node in graph.gm.graph.nodes:
        if not is_tensor(node) or not node.meta["val"].dtype.is_floating_point or op_name(node) == "detach":
            continue
        asked = node.op == "placeholder" and (_wants_gradient(node) or graph.parent is not None)
        if asked or any(source in found for source in node.all_input_nodes):
            found.add(node)
    return found


class _Finder:
    def __init__(self, graph: Graph, nodes: list[Node], axes: Axes) -> None:
        self.graph, self.axes = graph, axes
        self.mutations = graph.mutations
        self.reader = MaskReader(_known(graph), graph.stale, graph.outside, lambda node: node in self.learned)
        self.scores = labels(nodes, lambda node: node in axes.products)
        self.probabilities = labels(nodes, lambda node: node.op == "call_function" and op_name(node) in SOFTMAX)

    @cached_property
    def learned(self) -> frozenset[Node]:
        """Tensors that gradients flow through."""
        found: set[Node] = set()
        graph: Graph | None = self.graph if self.graph.training else None
        while graph is not None:
            found |= _learned(graph)
            graph = graph.parent
        return frozenset(found)

    def sdpa(self, node: Node, index: int) -> Match | None:
        """A call of the operator: the roles are given, the mask is read."""
        attn_mask = _argument(node, 3, "attn_mask", None)
        dropout_p = float(_argument(node, 4, "dropout_p", 0.0))  # type: ignore[arg-type]
        is_causal = bool(_argument(node, 5, "is_causal", False))
        asked = _argument(node, 6, "scale", None)
        roles = roles_of_sdpa(node, self.axes)
        head_dim = int(shape_of(roles.q)[-1])
        scale = head_dim**-0.5 if asked is None else scalar_or_none(asked, self.reader, node)
        if scale is None:
            raise Unproven(node, "the scale is computed in the graph", "give it as a number")
        masks = []
        if isinstance(attn_mask, Node):
            boolean = attn_mask.meta["val"].dtype is torch.bool
            masks.append(MaskOperand(attn_mask, node, "keep" if boolean else "add"))
        return self._match(node, index, "sdpa", roles, scale, None, dropout_p, tuple(masks), is_causal, torch.float32)

    def softmax(self, node: Node, index: int) -> Match | None:
        """A written-out attention, if the softmax stands between two products of activations."""
        source = node.args[0]
        if not isinstance(source, Node) or source not in self.scores or not self._reaches_values(node):
            return None  # a router, a gate, a classifier: nothing like attention
        rank = len(shape_of(node))
        dim = int(node.args[1]) % rank  # type: ignore[arg-type]
        path = ScoreWalk(self.axes, self.scores, self.reader, self.mutations).path(node, dim)
        values = walk_values(node, self.axes)
        roles = roles_of_products(path.product, node, dim, values.product, self.axes)
        spelling = f"{op_name(path.product.node)}-softmax"
        return self._match(
            node, index, spelling, roles, path.scale, path.softcap, values.dropout_p, path.masks, False,
            node.meta["val"].dtype,
        )  # fmt: skip

    def _reaches_values(self, softmax: Node) -> bool:
        return any(
            softmax in self.probabilities.get(operand, frozenset())
            for product in self.axes.products.values()
            for operand in (product.lhs, product.rhs)
        )

    def _match(
        self,
        anchor: Node,
        index: int,
        spelling: str,
        roles: Roles,
        scale: float,
        softcap: float | None,
        dropout_p: float,
        masks: tuple[MaskOperand, ...],
        is_causal: bool,
        softmax_dtype: torch.dtype,
    ) -> Match:
        axes, at = self.axes, roles.output
        q = strip(roles.q, _needed(roles, "q", axes), axes, self.reader, at, scaled=True)
        k = strip(roles.k, _needed(roles, "k", axes), axes, self.reader, at, scaled=True)
        v = strip(roles.v, _needed(roles, "v", axes), axes, self.reader, at, scaled=False)
        for operand in (q, k, v):
            if self.mutations.stale(operand.source, at):
                raise Unproven(operand.source, "it is written in place before the attention ends", "write it out of place")
        batch, heads, kv_heads = _count(roles)
        q_len, k_len = _size(roles.q_rows), _size(roles.k_columns)
        sizes, capped = (batch, heads, q_len, k_len), softcap is not None
        mask, bias = read_site_mask(masks, is_causal, roles, axes, self.reader, sizes, capped, self.graph.training)
        self._readable_at(at, mask, bias)
        module = module_path(anchor)
        spec = mask.spec
        site = AttentionSite(
            index=index,
            module=module,
            source=source_line(anchor),
            spelling=spelling,
            kind=_kind(roles, spec.causal),
            batch=batch,
            heads=heads,
            kv_heads=kv_heads,
            q_len=q_len,
            k_len=k_len,
            head_dim=int(_size(roles.q_features)),
            v_dim=int(_size(roles.v_features)),
            dtype=at.meta["val"].dtype,
            softmax_dtype=softmax_dtype,
            device=at.meta["val"].device,
            scale=scale * q.factor * k.factor,
            mask=spec,
            softcap=softcap,
            dropout_p=dropout_p,
            bias=_describe_bias(bias),
            phase=_phase(self.graph.training, q_len),
            layer=layer_index(module),
            layer_type="sliding_attention" if "window" in spec.words else "full_attention",
        )
        tables = frozenset(self.reader.used_tables & self.graph.tables.keys())
        return Match(site, roles, q, k, v, mask, bias, tables)

    def _readable_at(self, output: Node, mask: ReadMask, bias: tuple[MaskOperand, ...]) -> None:
        """Masks are read again where the output is made: they must still hold what they held."""
        writes = self.graph.mutations.writes
        for operand in bias:
            if writes(operand.node, operand.on, output):
                raise Unproven(operand.node, "it is written in place before the attention ends", "write it out of place")
        for source in mask.sources:
            local = source.graph is self.graph.gm.graph
            if local and self.mutations.stale(source, output):
                raise Unproven(source, "a mask is written in place before the attention ends", "write it out of place")


def _argument(node: Node, position: int, name: str, default: object) -> object:
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)


def _needed(roles: Roles, operand: str, axes: Axes) -> Leaves:
    """The atoms along which an operand varies."""
    shared = tuple(atom for axis in roles.shared if (atom := getattr(axis, operand)) is not None)
    if operand == "q":
        return shared + roles.q_rows + roles.q_features
    if operand == "k":
        return shared + roles.k_columns + roles.k_features
    return shared + roles.v_columns + roles.v_features


def _size(atoms: Leaves) -> Length:
    size: Length = 1
    for atom in atoms:
        size = size * atom.size
    return size


def _count(roles: Roles) -> tuple[Length, int, int]:
    batch = _size(tuple(axis.out for axis in roles.batch))
    heads = int(_size(tuple(axis.out for axis in roles.heads)))
    own: list[Atom] = [axis.out for axis in roles.heads if axis.k is not None or axis.v is not None]
    return batch, heads, int(_size(tuple(own)))


def _kind(roles: Roles, causal: bool) -> Kind:
    if causal:
        return "self"
    rows, columns = roles.q_rows, roles.k_columns
    if len(rows) == len(columns) and all(a.root is b.root for a, b in zip(rows, columns, strict=True)):
        return "self"
    return "cross" if rows or columns else "self"


def _phase(training: bool, q_len: Length) -> Phase:
    if training:
        return "train"
    return "decode" if isinstance(q_len, int) and q_len == 1 else "prefill"


def _describe_bias(bias: tuple[MaskOperand, ...]) -> str | None:
    return " + ".join(operand.node.name for operand in bias) or None
