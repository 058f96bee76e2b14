"""Observe a task's code on a few examples before any client trains: does it do anything other than compute losses?

    seen = observe(program, inputs, targets)       TaskError for code that no run could train correctly
    seen.alone                                     the reason why its step cannot be captured, or None
    expect_means(program, inputs, targets)         TaskError if the mean of several clients' buffers is meaningless

Effects that appear only later, for example at the hundredth step, are detected when they happen: every client begins with
`Program.begin_anew`.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from sumus.errors import TaskError, said
from sumus.training.hidden import HiddenState, generators, put_generators, which
from sumus.training.noise import RandomOperatorWatch
from sumus.training.program import Program, dense, seeded

_NUDGE = 1.0
"""The largest move of a buffer, relative to its size, when checking whether its update is affine."""
_BENT = 1e-3
"""The largest deviation from an affine update that counts as rounding, relative to the move."""


@dataclass(frozen=True)
class Observed:
    """The behaviour of a task's code, as observed.

    Attributes:
        draws: Whether the model draws random numbers, all of which sumus can replace by each client's own numbers
            (`sumus.training.noise`).
        unkeyed: The reason why sumus cannot replace the model's random numbers, so that torch's own generator is used; None if
            there is no such reason.
        alone: The reason why a step cannot be captured as a graph, if the code does more than a graph holds; None if no
            reason was seen.
        generators: Whether the code drew from Python's or numpy's generator.
        acts: Whether a second pass over the same examples gave different losses from the first.
    """

    draws: bool
    unkeyed: str | None
    alone: str | None
    generators: bool
    acts: bool


def observe(program: Program, inputs: Tensor, targets: Tensor) -> Observed:
    """Run the model twice on a client's first examples, as in training, and restore everything.

    Raises:
        TaskError: The code trains tensors that are never sent, changes frozen leaves, or binds leaves to new tensors.
    """
    with seeded(0):
        program.begin_anew(whole=True)
        stood, before = generators(), {name: tensor.detach().clone() for name, tensor in program.tensors.items()}
        memory, few = {name: tensor.data_ptr() for name, tensor in program.trained.items()}, slice(0, 2)
        inputs, targets = (_two_rows(rows[few].clone()) for rows in (inputs, targets))
        program.module.train()
        with seeded(0), RandomOperatorWatch() as forward:
            _, losses = program.losses(inputs.clone(), targets.clone())
        expect_gradient(losses)
        moved_to = [name for name, tensor in program.trained.items() if tensor.data_ptr() != memory[name]]
        with RandomOperatorWatch() as backward:
            gradients_of(losses.sum(), list(program.trained.values()))
        own = list(program.tensors.values())
        first = list(_leaves_under(losses, own))
        program.expect_own_tensors()
        program.expect_frozen(before)
        with seeded(0):
            program.load(before)
            _, again = program.losses(inputs, targets)  # a second pass may train a tensor that the first one made
        acts = not torch.equal(losses.detach(), again.detach())
        _expect_known(program, first, list(_leaves_under(again, own)))
        moved = program.hidden.changed()
        drawn = generators() != stood
        put_generators(stood)
        program.expect_frozen(before)
        program.load(before)
        program.expect_own_tensors()
        program.begin_anew()
    unkeyed = alone = None
    if forward.unkeyed:
        unkeyed = (
            f"it calls the random operator `{forward.unkeyed[0]}`, for which sumus cannot draw separate numbers for each "
            "client and step"
        )
    elif backward.seen:
        unkeyed = "it draws random numbers in its backward pass (activation checkpointing)"
    if moved:
        alone = which(moved[0])
    elif drawn:
        alone = "it draws random numbers from Python's or numpy's generator: use torch's"
    elif moved_to:
        alone = f"its forward puts `{moved_to[0]}` into other memory: write into the existing memory, as in .data.copy_(...)"
    elif hooked := next((name for name, tensor in program.trained.items() if tensor._backward_hooks), None):
        alone = f"`{hooked}` has a hook on its gradient"
    return Observed(bool(forward.seen) and unkeyed is None, unkeyed, alone, drawn, acts)


def note_of(path: str) -> str:
    """Return what a user should know about a path in `Program.moved`."""
    if path.partition(".")[0].partition("[")[0] in ("work", "update", "aggregator", "server"):
        return (
            f"`{path}` changes while the code runs, but sumus neither sends nor saves it: each process has its own value, "
            "and a run that continues from a folder begins with a new one. Keep it in the state of this part of the "
            "algorithm (init=)"
        )
    return (
        f"`{path}` changes while the code runs, but sumus neither sends nor saves it: every client, and every evaluation, "
        "begins with its value from before the run, and a step that changes it is not captured as a graph. Keep state that "
        "must continue in a float buffer of the model: a shared buffer is averaged, and a personal buffer is kept at each "
        "client"
    )


def expect_gradient(losses: Tensor) -> None:
    """Refuse losses from which nothing can be learned."""
    if not torch.is_grad_enabled():
        raise TaskError("gradients are off in this thread: train outside torch.no_grad() and torch.inference_mode()")
    if not losses.requires_grad:
        raise TaskError("the loss does not depend on the model's parameters: remove .detach() and argmax from it")


def gradients_of(loss: Tensor, params: Sequence[Tensor]) -> list[Tensor]:
    """Return the dense gradient of a loss for each of these tensors. Sparse gradients (of embeddings) are made dense.

    Raises:
        TaskError: The backward pass failed.
    """
    try:
        found = torch.autograd.grad(loss, params, allow_unused=True, materialize_grads=True)
    except Exception as error:
        raise TaskError(
            f"the backward pass of the model or its loss failed: {said(error)}; try loss(...).sum().backward() on one batch alone"
        ) from error
    return [dense(grad) for grad in found]


def _two_rows(rows: Tensor) -> Tensor:
    """Return a batch of at least two rows, since the model may compute statistics over it."""
    return rows if len(rows) > 1 else rows.repeat(2, *[1] * (rows.dim() - 1))


# ── tensors that are never sent ──────────────────────────────────────────────────────────────────────────────────────


def _leaves_under(losses: Tensor, own: Iterable[Tensor]) -> Iterator[Tensor]:
    """Yield every tensor into which a gradient of these losses would flow.

    Args:
        losses: The losses.
        own: The model's tensors. The search stops at them, because the tensors of a copied scripted module refer to their
            originals.
    """
    waiting, seen = [losses.grad_fn], {tensor.grad_fn for tensor in own}
    while waiting:
        node: Any = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if isinstance(variable := getattr(node, "variable", None), Tensor):
            yield variable
        waiting += [before for before, _ in node.next_functions]


def _expect_known(program: Program, first: Sequence[Tensor], second: Sequence[Tensor]) -> None:
    """Refuse gradients into tensors that are not leaves: tensors that both passes share, and parameters of the second
    pass. A pass may make other tensors, such as inputs with a gradient."""
    known = {id(tensor) for tensor in program.tensors.values()}
    again = {id(tensor) for tensor in first}
    for tensor in second:
        if id(tensor) in known or not (id(tensor) in again or isinstance(tensor, nn.Parameter)):
            continue
        roots = {"model": program.module, "loss": program.task.loss}
        name = next((path for path, met in HiddenState(roots).tensors if met is tensor), None)
        where = (
            f"`{name}`"
            if name
            else f"a tensor of shape {tuple(tensor.shape)} that the model or the loss takes from elsewhere"
        )
        raise TaskError(
            f"{where} has requires_grad=True but is not a leaf of the model: no step trains it, and it is not sent. Make it a "
            "parameter of the model, in the model's __init__ (put a list of layers into an nn.ModuleList; make no layers in "
            "forward; let forward return a loss's own parameter); or set requires_grad_(False) if it must not be trained"
        )


# ── buffers without a mean ───────────────────────────────────────────────────────────────────────────────────────────


def expect_means(program: Program, inputs: Tensor, targets: Tensor) -> None:
    """Refuse averaged buffers if a mean of several clients' buffers is a value that training never gives.

    For running statistics the mean is correct. Their update is affine, so a step from the mean gives the mean of the
    steps. For a vector of unit length, a flag, a queue or a codebook the mean is meaningless.
    """
    _expect_exact_norms(program)
    asked = {name for name in program.buffers if program.task.pattern_of(program.leaves[name]) not in (None, "*")}
    statistics = _statistics(program.module)
    unknown = {name: tensor for name, tensor in program.buffers.items() if name not in statistics | asked}
    if not unknown:
        return
    before = {name: tensor.detach().clone() for name, tensor in program.tensors.items()}
    inputs, targets = (_two_rows(rows[:8].clone()) for rows in (inputs, targets))
    nudge = torch.Generator().manual_seed(0)
    moves = {
        name: _NUDGE * torch.rand(tensor.shape, generator=nudge, dtype=torch.float64).to(tensor) * _size(tensor)
        for name, tensor in unknown.items()
    }

    def after(times: int) -> dict[str, Tensor]:
        """Return the buffers after a forward pass that starts from buffers moved `times` times."""
        program.begin_anew()
        program.load(before)
        with torch.no_grad(), seeded(0):
            for name, move in moves.items():
                program.tensors[name].add_(move, alpha=times)
            program.module.train()
            program.losses(inputs.clone(), targets.clone())
        return {name: tensor.detach().double().clone() for name, tensor in unknown.items()}

    stood = generators()
    try:
        still, once, twice = after(0), after(1), after(2)
    finally:
        put_generators(stood)
        program.load(before)
        program.begin_anew()
    for name in unknown:
        start = before[name].double()
        if torch.equal(still[name], start):
            continue
        if (why := _unaveraged(start, (still[name], once[name], twice[name]), moves[name].double())) is not None:
            raise TaskError(
                f"the buffer `{name}` {why}, so a mean of several clients' buffers is a value that training never gives, but "
                "shared buffers are averaged: keep a separate buffer at each client, with "
                f'leaves={{"{name}": "personal"}}; or, if the mean is correct anyway, request it with '
                f'leaves={{"{name}": "shared"}}'
            )


def _unaveraged(start: Tensor, after: tuple[Tensor, Tensor, Tensor], move: Tensor) -> str | None:
    """Return why the mean of a buffer is meaningless; None if it is meaningful.

    Args:
        start: The buffer before a forward pass.
        after: The buffers after a pass that started from the buffer moved 0, 1 and 2 times.
        move: The value that was added to the buffer 0, 1 or 2 times.
    """
    still, once, twice = after
    rounding = 1e-5 * float(max(still.abs().max(), start.abs().max(), torch.tensor(1e-6)))
    if float((once - (still + twice) / 2).abs().max()) > _BENT * float(move.abs().max()) + rounding:
        return "is updated by a nonlinear rule (it is scaled to a norm, divided, rounded or chosen by value)"
    taken, kept = (still - start).abs() > rounding, still == start
    if bool(taken.any()) and bool(kept.any()) and float((twice - still)[taken].abs().max()) <= rounding:
        return "is partly overwritten by each step, like a queue"
    for axis in (None, *range(start.dim())):
        if start.dim() and _keeps_length(start, still, axis):
            return "keeps its norm in training, which a mean of buffers does not"
    return None


def _keeps_length(start: Tensor, still: Tensor, axis: int | None) -> bool:
    """Return whether a pass changed a buffer but kept its L2 norms along an axis (None: the norm of the whole buffer)."""
    if (start.shape[axis] if axis is not None else start.numel()) < 2 or float((still - start).norm()) <= 1e-4 * float(
        start.norm()
    ):
        return False
    lengths, others = (tensor.norm(dim=axis) if axis is not None else tensor.norm() for tensor in (start, still))
    return bool(lengths.abs().min() > 0) and bool(torch.allclose(lengths, others, rtol=1e-5, atol=0.0))


def _size(tensor: Tensor) -> float:
    """Return the root mean square of a buffer; 1 for a buffer of zeros."""
    return float(tensor.detach().double().square().mean().sqrt()) or 1.0


def _statistics(module: nn.Module) -> set[str]:
    """Return the names of the running means and variances of torch's own layers."""
    return {
        f"{path}.{name}".lstrip(".")
        for path, layer in module.named_modules()
        if isinstance(layer, nn.modules.batchnorm._NormBase)
        for name in ("running_mean", "running_var")
    }


def _expect_exact_norms(program: Program) -> None:
    """Refuse torch's spectral norm on shared weights: its two vectors fit one client's weights, but not a mean of
    weights."""
    for path, layer in program.module.named_modules():
        if hasattr(layer, "_power_method"):  # the parametrization
            own, names = path, ("_u", "_v")
        else:
            hook = next((h for h in layer._forward_pre_hooks.values() if type(h).__name__ == "SpectralNorm"), None)
            if hook is None:
                continue
            own, names = path, (f"{cast(Any, hook).name}_u",)
        for name in (f"{own}.{name}".lstrip(".") for name in names):
            if name in program.leaves and not _is_one_clients(program, name):
                raise TaskError(
                    f"the buffer `{name}` of torch's spectral norm fits only the weights of one client, but the model is "
                    "a mean of clients' weights: it would be measured and published with a wrong norm. Divide by the exact "
                    "norm, which needs no buffer: register_parametrization(layer, 'weight', Spectral()), where "
                    "Spectral.forward returns weight / torch.linalg.matrix_norm(weight.flatten(1), 2)"
                )


def _is_one_clients(program: Program, name: str) -> bool:
    """Return whether a spectral norm's vector and its layer's weights all belong to one client, or never change."""
    layer = name.partition(".parametrizations")[0] if ".parametrizations" in name else name.rpartition(".")[0]
    roles = {
        leaf.role
        for leaf in program.leaves.values()
        if not layer or (leaf.name.startswith(f"{layer}.") and "bias" not in leaf.name)
    }
    return len(roles) == 1 and "shared" not in roles
