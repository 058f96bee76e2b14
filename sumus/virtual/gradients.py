"""Gradients of a caller's tensors at a worker. Autograd runs at the worker; a pointer records only whether its tensor
requires a gradient."""

from typing import cast

from sumus.virtual.graph import survey
from sumus.virtual.held import HeldTensors, made_of
from sumus.virtual.messages import Backward, EmptyAnswer, Gradient, SetGradient, SetRequiresGrad, TensorMade
from sumus.virtual.refusal import RequestRefused, first_line


def backward(held: HeldTensors, ask: Backward) -> EmptyAnswer:
    """Compute the gradients of all leaves from which a tensor was computed."""
    root = held.of(ask.id).tensor
    gradient = None if ask.gradient is None else held.of(ask.gradient).tensor
    found = survey(root)
    held.check_memory(found.bytes)
    held.check_time(found.steps)
    private = held.is_private(root) or (gradient is not None and held.is_private(gradient))
    before = [leaf.grad is not None and held.is_private(leaf.grad) for leaf in found.leaves]
    try:
        # A copy, since torch may make this tensor the gradient of a leaf, to which later gradients are added in place.
        root.backward(None if gradient is None else gradient.clone(), retain_graph=ask.keep)
    except Exception as error:  # torch raises many kinds of errors
        raise RequestRefused("impossible", f"backward: {first_line(error)}") from error
    finally:
        for leaf, was_private in zip(found.leaves, before, strict=True):
            if leaf.grad is not None:
                memory = held.memories.note(leaf.grad)
                memory.private = memory.private or private or was_private
    return EmptyAnswer()


def gradient_of(held: HeldTensors, ask: Gradient) -> TensorMade | EmptyAnswer:
    """Return a leaf's gradient, if it has one. The same tensor is returned until the gradient is replaced."""
    kept = held.of(ask.id)
    if not kept.tensor.is_leaf or kept.tensor.grad is None:
        return EmptyAnswer()
    known = None if kept.gradient is None else held.tensors.get(kept.gradient)
    if known is not None and known.tensor.is_set_to(kept.tensor.grad):
        return made_of(cast(int, kept.gradient), known.tensor)
    # An alias, so that operations of the caller on it do not give the gradient itself a history or a gradient.
    made = held.keep(kept.tensor.grad.detach())
    kept.gradient = made.id
    return made


def set_gradient(held: HeldTensors, ask: SetGradient) -> EmptyAnswer:
    """Set or remove the gradient of a tensor."""
    kept = held.of(ask.id)
    to = None if ask.to is None else held.of(ask.to).tensor
    if to is not None and held.memories.is_owned(to):
        raise RequestRefused("not_yours", "backward() would add to one of the owner's tensors: clone() it first")
    try:
        kept.tensor.grad = None if to is None else to.detach()
    except RuntimeError as error:
        raise RequestRefused("impossible", f"grad: {first_line(error)}") from error
    kept.gradient = ask.to
    return EmptyAnswer()


def set_requires_grad(held: HeldTensors, ask: SetRequiresGrad) -> TensorMade:
    """Set whether a tensor requires a gradient."""
    kept = held.of(ask.id)
    try:
        kept.tensor.requires_grad_(ask.learns)
    except RuntimeError as error:
        raise RequestRefused("impossible", f"requires_grad: {first_line(error)}") from error
    memory = held.memories.note(kept.tensor)
    memory.learned = memory.learned or ask.learns
    return made_of(ask.id, kept.tensor)
