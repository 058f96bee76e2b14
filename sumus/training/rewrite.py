"""Rewrites of a captured step: the same arithmetic in fewer and faster operators.

Each function takes a graph of aten operators and changes it in place. None changes the result beyond rounding. A
captured graph is compared with autograd before it is used (`sumus.training.graph`).
"""

import operator
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch.fx import Graph, Node

from sumus.training.noise import KEYED, NoiseShape, is_random

_aten = torch.ops.aten
_RESHAPES = (_aten.view.default, _aten._unsafe_view.default, _aten.reshape.default)
_TRANSPOSES = (_aten.t.default, _aten.transpose.int)
_VIEWS = (*_RESHAPES, *_TRANSPOSES, _aten.expand.default, _aten.permute.default, _aten.unsqueeze.default)
"""View operators. Two views with the same arguments are merged."""
_STATISTICS = (_aten.native_batch_norm.default, _aten.cudnn_batch_norm.default, _aten.miopen_batch_norm.default)


OWN_TENSORS = "it changes, in place, tensors that it did not make, such as batch statistics"


class NotCapturable(Exception):
    """A step cannot be captured. The message gives the reason in half a sentence."""


def expect_capturable(graph: Graph, fixed: Sequence[Node]) -> None:
    """Refuse a graph if its shapes depend on values, or if it changes arguments that all clients share (`fixed`)."""
    for node in graph.nodes:
        tags = getattr(node.target, "tags", ())
        masks = [index for index in node.args[1] if index is not None] if node.target is _aten.index.Tensor else []
        if torch.Tag.dynamic_output_shape in tags and (
            node.target is not _aten.index.Tensor or any(_form(mask)[1] in (torch.bool, torch.uint8) for mask in masks)
        ):
            raise NotCapturable(f"its forward depends on the values of tensors (`{node.target}`)")
    for argument in fixed:
        copies = [user for user in argument.users if _is_copy_of(argument, user)]
        if _is_changed(argument) or any(_is_changed(copy) for copy in copies):
            raise NotCapturable(OWN_TENSORS)


def simplify(graph: Graph) -> None:
    """Remove operators that change nothing: views to the same shape, double transposes, multiplications by one, and
    repeated views."""
    while _simplified(graph):
        graph.eliminate_dead_code()


def _simplified(graph: Graph) -> bool:
    changed = False
    seen: dict[Any, Node] = {}
    for node in list(graph.nodes):
        source = node.args[0] if node.op == "call_function" and node.args else None
        if not isinstance(source, Node) or not node.users:
            continue
        equal = _unchanged(node, source)
        if equal is None and node.target in _VIEWS:
            equal = seen.setdefault((node.target, repr(node.args), repr(node.kwargs)), node)
        if equal is not None and equal is not node:
            node.replace_all_uses_with(equal)
            changed = True
    return changed


def _unchanged(node: Node, source: Node) -> Node | None:
    """Return the earlier node that this node is equal to; None if there is none."""
    if node.target is _aten.detach.default:
        return source
    if node.target in (*_RESHAPES, _aten.expand.default) and _form(node) == _form(source):
        return source
    if node.target in (_aten.mul.Scalar, _aten.div.Scalar) and node.args[1] == 1 and _form(node) == _form(source):
        return None if _is_changed(node) or _is_changed(_root(source)) else source
    if node.target in _TRANSPOSES and source.target is node.target and set(node.args[1:]) == set(source.args[1:]):
        return cast(Node, source.args[0])
    return None


def stand_in_noise(graph: Graph, stack: int | None) -> list[NoiseShape]:
    """Give every random operator a placeholder for noise. Return each placeholder's noise for one client, in order."""
    draws: list[NoiseShape] = []
    last = [node for node in graph.nodes if node.op == "placeholder"][-1]
    for node in list(graph.nodes):
        if node.op != "call_function" or not is_random(node.target, node.args, node.kwargs):
            continue
        random = KEYED.get(node.target)
        if random is None:
            raise NotCapturable(
                f"it calls the random operator `{node.target}`, for which sumus cannot draw separate numbers for each client "
                "and step"
            )
        first = node.args[0]
        shape = _form(first)[0] if isinstance(first, Node) else tuple(cast(Sequence[int], first))
        if stack is not None and (not shape or shape[0] != stack):
            raise NotCapturable(f"`{node.target}` draws random numbers for several clients together")
        draws.append(NoiseShape(random.normal, shape if stack is None else shape[1:]))
        with graph.inserting_after(last):
            last = graph.placeholder(f"noise_{len(draws) - 1}")
        with graph.inserting_before(node):
            made = graph.call_function(random.make, (last, *node.args), dict(node.kwargs))
            if _writes(node.target):
                made = graph.call_function(_aten.copy_.default, (first, made))
        made.meta = dict(node.meta)
        node.replace_all_uses_with(made)
        graph.erase_node(node)
    return draws


def fuse_bias(graph: Graph) -> None:
    """Replace x·W followed by + b with one product that begins with b."""
    for node in list(graph.nodes):
        if node.target is not _aten.add.Tensor or node.kwargs:
            continue
        for product, bias in (node.args, node.args[::-1]):
            if not (isinstance(product, Node) and isinstance(bias, Node) and len(product.users) == 1):
                continue
            inner = cast(Node, product.args[0]) if product.target in _RESHAPES else product
            if inner.target not in (_aten.mm.default, _aten.bmm.default) or len(inner.users) != 1:
                continue
            shape, wanted = _form(inner)[0], _form(bias)[0]
            stacked = inner.target is _aten.bmm.default
            fits = wanted == (shape[0], 1, shape[2]) and product is inner if stacked else wanted == shape[-1:]
            if not fits or _form(product)[0][-1] != shape[-1] or _form(bias)[1] != _form(inner)[1]:
                continue
            if any(_is_changed(_root(factor)) for factor in cast(Sequence[Node], inner.args)):
                continue  # the fused product runs where the bias was added, and its factor may have changed by then
            with graph.inserting_before(node):
                whole = graph.call_function(
                    _aten.baddbmm.default if stacked else _aten.addmm.default, (bias, *inner.args)
                )
                whole.meta = dict(inner.meta)
                if product is not inner:
                    whole = graph.call_function(cast(Any, product.target), (whole, *product.args[1:]))
                    whole.meta = dict(node.meta)
            node.replace_all_uses_with(whole)
            break
    graph.eliminate_dead_code()


def fuse_cross_entropy(graph: Graph) -> None:
    """Replace log-softmax, its loss and their gradients with one exponential: −log softmax(z)[y] has the gradient
    softmax(z) − onehot(y)."""
    for logs in list(graph.nodes):
        if logs.target is not _aten._log_softmax.default or len(_form(logs)[0]) != 2 or logs.args[1] not in (1, -1):
            continue
        users = {user.target: user for user in logs.users}
        loss = users.get(_aten.nll_loss_forward.default)
        loss_back = users.get(_aten.nll_loss_backward.default)
        back = users.get(_aten._log_softmax_backward_data.default)
        if loss is None or loss_back is None or back is None or len(logs.users) != 3 or back.args[0] is not loss_back:
            continue
        _, targets, weight, reduction, ignored = loss.args
        values = [user for user in loss.users if user.args[1] == 0]
        if weight is not None or reduction != 0 or len(values) != 1:
            continue
        with graph.inserting_before(logs):
            scores = logs.args[0]
            top = graph.call_function(_aten.amax.default, (scores, [1], True))
            raised = graph.call_function(_aten.sub.Tensor, (scores, top))
        with graph.inserting_before(loss):
            known = graph.call_function(_aten.ne.Scalar, (targets, ignored))
            column = graph.call_function(_aten.mul.Tensor, (targets, known))
            column = graph.call_function(_aten.unsqueeze.default, (column, 1))
            own = graph.call_function(_aten.gather.default, (raised, 1, column))
            powers = graph.call_function(_aten.exp_.default, (raised,))
            total = graph.call_function(_aten.sum.dim_IntList, (powers, [1], True))
            each = graph.call_function(_aten.log.default, (total,))
            each = graph.call_function(_aten.sub.Tensor, (each, own))
            each = graph.call_function(_aten.squeeze.dim, (each, 1))
            each = graph.call_function(_aten.where.ScalarOther, (known, each, 0))
        values[0].replace_all_uses_with(each)
        with graph.inserting_before(back):
            scale = graph.call_function(_aten.mul.Tensor, (loss_back.args[0], known))
            scale = graph.call_function(_aten.unsqueeze.default, (scale, 1))
            over = graph.call_function(_aten.div.Tensor, (scale, total))
            part = graph.call_function(_aten.mul_.Tensor, (powers, over))
            minus = graph.call_function(_aten.neg.default, (scale,))
            gradient = graph.call_function(_aten.scatter_add_.default, (part, 1, column, minus))
        gradient.meta = dict(back.meta)
        each.meta = dict(values[0].meta)
        back.replace_all_uses_with(gradient)
        for old in (back, loss_back, *loss.users, loss, logs):
            if not old.users:
                graph.erase_node(old)
    graph.eliminate_dead_code()


def pool_channels_last(graph: Graph) -> None:
    """Max-pool in the channels-last layout, which the CPU's kernel vectorizes. Later operators stay in this layout."""
    pools = [
        node
        for node in graph.nodes
        if node.target is _aten.max_pool2d_with_indices.default and len(_form(node.args[0])[0]) == 4
    ]
    reshaped = [node for node in graph.nodes if node.target in _RESHAPES]
    if not pools or any(_is_changed(node) for node in reshaped):
        return
    if any(node.target is _aten.as_strided.default for node in graph.nodes):
        return
    written = {_root(cast(Node, node.args[0])): place for place, node in enumerate(graph.nodes) if _writes(node.target)}
    order = {node: place for place, node in enumerate(graph.nodes)}
    for pool in pools:
        source = cast(Node, pool.args[0])
        if written.get(_root(source), -1) > order[source]:
            continue
        with graph.inserting_after(source):
            turned = graph.call_function(_aten.clone.default, (source,), {"memory_format": torch.channels_last})
        turned.meta = dict(source.meta)
        source.replace_all_uses_with(turned, delete_user_cb=lambda user, turned=turned: user is not turned)
    for node in reshaped:
        node.target = _aten.reshape.default


def multiply_by_onednn(graph: Graph) -> None:
    """Compute x·Wᵀ + b with oneDNN's inner product, which on some CPUs is twice as fast as the default."""
    linear = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
    if linear is None:
        raise NotCapturable("this version of torch has no linear operator of oneDNN")
    for node in list(graph.nodes):
        if node.target not in (_aten.addmm.default, _aten.mm.default) or node.kwargs or _form(node)[1] != torch.float32:
            continue
        *bias, left, right = cast(tuple[Node, ...], node.args)
        if bias and len(_form(bias[0])[0]) != 1:
            continue
        with graph.inserting_before(node):
            if right.target is _aten.t.default:
                weight = cast(Node, right.args[0])
            else:
                weight = graph.call_function(_aten.t.default, (right,))
            new = graph.call_function(linear, (left, weight, bias[0] if bias else None, "none", [], ""))
        new.meta = dict(node.meta)
        node.replace_all_uses_with(new)
        graph.erase_node(node)


def update_in_place(graph: Graph, state: Mapping[Node, int], lr: Node, negative_lr: Node) -> None:
    """Write results into the state that they replace, and fold p − lr·(A·B) into the product that makes the gradient.

    Only the other results are still returned.

    Args:
        graph: The graph.
        state: For each placeholder, the index of its next value among the graph's results.
        lr: The learning rate as a tensor.
        negative_lr: The negative learning rate as a number.
    """
    output = next(node for node in graph.nodes if node.op == "output")
    results = list(cast(Sequence[Node], output.args[0]))
    folded: list[tuple[Node, Node]] = []
    copied: list[tuple[Node, Node]] = []
    for old, place in state.items():
        new = results[place]
        if new is old or (_is_copy_of(old, new) and not _is_changed(new)):
            continue
        gradient = _descended(old, new, lr)
        (copied if gradient is None else folded).append((old, new if gradient is None else gradient))
    written = {old for old, _ in (*folded, *copied)}
    for node in list(graph.nodes):  # copies of state that nothing changes, such as frozen leaves
        if node.target is not _aten.clone.default or node.kwargs or _is_changed(node):
            continue
        if (source := cast(Node, node.args[0])) in state and source not in written:
            node.replace_all_uses_with(source)
    output.args = (tuple(node for place, node in enumerate(results) if place not in set(state.values())),)
    with graph.inserting_before(output):
        folded = [(old, _apart(graph, gradient, state)) for old, gradient in folded]
        copied = [(old, _apart(graph, new, state)) for old, new in copied]
        for old, gradient in folded:
            _fold(graph, old, gradient, negative_lr, set(state))
        for old, new in copied:
            graph.call_function(_aten.copy_.default, (old, new))
    graph.eliminate_dead_code()


def _apart(graph: Graph, node: Node, state: Mapping[Node, int]) -> Node:
    """Return a value that does not change while the state is written: a copy, if it lies in the state's memory."""
    return graph.call_function(_aten.clone.default, (node,)) if _root(node) in state else node


def _descended(old: Node, new: Node, lr: Node) -> Node | None:
    """Return the gradient if `new` is old − lr · gradient; else None."""
    if new.target is not _aten.sub.Tensor or new.args[0] is not old or new.kwargs or len(new.users) != 1:
        return None
    move = new.args[1]
    if not isinstance(move, Node) or move.target is not _aten.mul.Tensor or lr not in move.args:
        return None
    other = move.args[0] if move.args[1] is lr else move.args[1]
    return other if isinstance(other, Node) and other is not lr else None


def _fold(graph: Graph, old: Node, gradient: Node, negative_lr: Node, state: set[Node]) -> None:
    product, turned = gradient, False
    while product.target in _TRANSPOSES and len(product.users) == 1:
        product, turned = cast(Node, product.args[0]), not turned
    factors = cast(Sequence[Node], product.args)
    alone = len(gradient.users) == 1 and len(product.users) == 1
    if (
        product.target not in (_aten.mm.default, _aten.bmm.default)
        or not alone
        or any(_root(factor) in state for factor in factors)
    ):
        graph.call_function(_aten.add_.Tensor, (old, gradient), {"alpha": negative_lr})
        return
    left, right = factors
    stacked = product.target is _aten.bmm.default
    if turned:
        left, right = (
            graph.call_function(_aten.transpose.int, (factor, 1, 2))
            if stacked
            else graph.call_function(_aten.t.default, (factor,))
            for factor in (right, left)
        )
    added = _aten.baddbmm_.default if stacked else _aten.addmm_.default
    graph.call_function(added, (old, left, right), {"alpha": negative_lr})


def _root(node: Node) -> Node:
    """Return the node in whose memory a node's value lies. Views and results of in-place operators lie in the memory of
    another node."""
    while node.op == "call_function" and node.args and isinstance(node.args[0], Node) and _aliases(node):
        node = node.args[0]
    return node


def _aliases(node: Node) -> bool:
    """Return whether a node's value may lie in the memory of its first argument."""
    if node.target is operator.getitem:
        return _aliases(cast(Node, node.args[0]))
    if node.target is _aten._unsafe_view.default:
        return True
    schema = getattr(node.target, "_schema", None)
    return schema is not None and any(result.alias_info is not None for result in schema.returns)


def _is_copy_of(old: Node, new: Node) -> bool:
    return new.target is _aten.clone.default and new.args[0] is old


def _is_changed(node: Node) -> bool:
    """Return whether an operator writes into a node's value, or into a view of it."""
    return any(
        user.target in _STATISTICS
        or (user.args[:1] == (node,) and (_writes(user.target) or (_aliases(user) and _is_changed(user))))
        for user in node.users
    )


def _writes(target: Any) -> bool:
    return hasattr(target, "_schema") and target._schema.is_mutable


def _form(node: Any) -> tuple[tuple[int, ...], torch.dtype]:
    """Return the shape and dtype of a node's value."""
    meta = node.meta.get("tensor_meta") or node.meta.get("val")
    return tuple(meta.shape), meta.dtype
