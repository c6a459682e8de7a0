"""Finds softmax attention that is left in a traced program."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind
from torch.fx import Node

__all__ = ["SoftmaxUse", "check_linear_only", "softmax_uses"]

_SOFTMAX = ("softmax", "scaled_dot_product", "_native_multi_head_attention", "flash_attention", "efficient_attention")
_PRODUCTS = ("matmul", "bmm", "mm", "einsum", "linear", "baddbmm", "addmm", "mv", "dot")
# What only moves, scales or masks the weights of an attention on their way to the values.
_TRANSPARENT = (
    "view", "reshape", "_unsafe_view", "flatten", "unflatten", "permute", "transpose", "t", "to", "_to_copy", "clone",
    "contiguous", "expand", "unsqueeze", "squeeze", "slice", "select", "dropout", "mul", "div", "add", "where",
    "masked_fill", "nan_to_num", "cat", "stack", "getitem", "detach", "alias", "type_as",
)  # fmt: skip


@dataclass(frozen=True)
class SoftmaxUse:
    """One softmax of a program."""

    operator: str
    path: str
    """Of the innermost module it was computed in, such as `detector.backbone.blocks.0.attn`."""
    owner: str
    """That module's class."""
    is_attention: bool
    """It weights values that depend on the image by a matrix product, or lies in the backbone."""


def softmax_uses(program: ExportedProgram) -> tuple[SoftmaxUse, ...]:
    """Every softmax of the program, told apart by where it comes from and by what its result is multiplied with.

    The distributions of GFL's and PicoDet's boxes are multiplied with the constant numbers of their bins, class scores
    with nothing: these are no attention. Products of a softmax with values of the image are.
    """
    data = _depending_on_image(program)
    uses = []
    for node in program.graph.nodes:
        name = _name(node)
        if node.op != "call_function" or not (any(part in name for part in _SOFTMAX) or _is_own_softmax(name)):
            continue
        path, owner = _provenance(node)
        fused = "attention" in name or _is_own_softmax(name)
        in_backbone = ".backbone" in f".{path}"
        uses.append(SoftmaxUse(name, path, owner, fused or in_backbone or _weights_values(node, data)))
    return tuple(uses)


def check_linear_only(program: ExportedProgram, *, allow_in: tuple[str, ...] = ()) -> tuple[SoftmaxUse, ...]:
    """All softmax of the program.

    Args:
        program: of torch.export.
        allow_in: paths of modules whose own attention is accepted, such as a transformer head's.

    Raises:
        ValueError: softmax attention elsewhere; the first layers are named.
    """
    uses = softmax_uses(program)
    left = [use for use in uses if use.is_attention and not _within(use.path, allow_in)]
    if left:
        named = ", ".join(f"{use.path} ({use.owner})" for use in left[:3])
        raise ValueError(
            f"{len(left)} softmax attentions are left in the graph, in {named}{', ...' if len(left) > 3 else ''}: "
            "only linear attention is deployed; convert the checkpoint with tools/convert.py and give its deploy config"
        )
    return uses


def _within(path: str, allowed: tuple[str, ...]) -> bool:
    return any(path == prefix or path.startswith(f"{prefix}.") for prefix in allowed)


def _name(node: Node) -> str:
    target = node.target
    if isinstance(target, str):
        return target
    overload = getattr(target, "_overloadpacket", target)
    return str(getattr(overload, "_qualified_op_name", getattr(target, "__name__", target))).rpartition("::")[2]


def _is_own_softmax(name: str) -> bool:
    return "masked_softmax" in name


def _depending_on_image(program: ExportedProgram) -> set[Node]:
    """Nodes that hold values of the image; sizes of tensors are not values."""
    users = {spec.arg.name for spec in program.graph_signature.input_specs if spec.kind is InputKind.USER_INPUT}
    found: set[Node] = set()
    for node in program.graph.nodes:
        is_image = node.op == "placeholder" and node.name in users
        depends = any(argument in found for argument in node.all_input_nodes) and not _name(node).startswith("sym_")
        if is_image or depends:
            found.add(node)
    return found


def _weights_values(softmax: Node, data: set[Node]) -> bool:
    return any(
        any(other in data for other in product.all_input_nodes if other is not weights)
        for product, weights in _products(softmax)
    )


def _products(softmax: Node) -> Iterator[tuple[Node, Node]]:
    """Matrix products that the softmax's result goes into, and the node through which it does."""
    pending, seen = [softmax], {softmax}
    while pending:
        node = pending.pop()
        for user in node.users:
            name = _name(user)
            if name in _PRODUCTS:
                yield user, node
            elif name in _TRANSPARENT and user not in seen:
                seen.add(user)
                pending.append(user)


def _provenance(node: Node) -> tuple[str, str]:
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    if not stack:
        return "", ""
    path, owner = stack[-1]
    return str(path).removeprefix("L['self'].").removeprefix("L__self___"), str(owner).rpartition(".")[2].strip("'>")
