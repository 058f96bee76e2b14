"""What a client does with the model it is sent: data about local training, and three small pure rules.

    work = sgd(lr=0.1, epochs=1, batch_size=20)

`ClientWork` holds no model and no loop. An executor (`sumus.training`) owns the gradient; for every batch it calls

    grads = work.rules.correct(grads, params, broadcast, client_state)            FedProx and SCAFFOLD live here
    param, leaf_state = work.optimizer.update(grad, leaf_state, param, lr, step)    leaf by leaf: SGD, Adam

and at the end `work.rules.finish(broadcast, params, client_state, done)` says what is sent, part by part, and the client's
next state, pending until its update is counted; `work.rules.init` says its first. Rules see leaves that have a gradient:
`params` of `correct` are the shared and the personal ones, those of `finish` the shared ones. Running statistics are the
executor's.

The rules use only operators that numpy and torch share, so that one definition is looped over clients, vectorized, and
traced into the graph that a phone runs. An executor may fuse a rule that it recognises by its spec.
"""

import fnmatch
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, TypeAlias, cast

import numpy as np

from sumus.errors import PlanError, UsageError, expect, expect_number, own_code
from sumus.schedules import Schedule, as_schedule
from sumus.spec import Value, registered
from sumus.tree import tree_map
from sumus.types import Tensors, hold_plain_numbers, plain_number

_BELOW_ONE = math.nextafter(1.0, 0.0)

LeafState: TypeAlias = tuple[Any, ...]
ClientState: TypeAlias = Mapping[str, Tensors]
"""What a client keeps between rounds: trees by names of the algorithm's own, and its personal leaves under `personal`."""
PERSONAL = "personal"
Parts: TypeAlias = Mapping[str, Tensors]


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class LeafRule(Value):
    """An optimizer for one leaf. Arrays are numpy's or torch's, all of one shape.

    Attributes:
        init: (param) → state.
        update: (grad, state, param, lr, step) → (param, state), where `step` counts from 1 within the client's round.
    """

    init: Callable[[Any], LeafState]
    update: Callable[[Any, LeafState, Any, Any, Any], tuple[Any, LeafState]]


@dataclass(frozen=True)
class LeafGroup:
    """Leaves that are optimized in their own way.

    Attributes:
        pattern: Of the leaves' names, shell-style.
        optimizer: The leaves' rule.
        lr_factor: What the rate is multiplied by for these leaves.
    """

    pattern: str
    optimizer: LeafRule
    lr_factor: float = 1.0


def no_state(params: Tensors) -> ClientState:
    """Nothing is kept between rounds."""
    return {}


def zeros_as(name: str) -> Callable[[Tensors], ClientState]:
    """A first state of zeros like the params, under this name."""

    def init(params: Tensors) -> ClientState:
        return {name: tree_map(lambda leaf: leaf * 0, params)}

    return init


def no_correction(grads: Tensors, params: Tensors, broadcast: Parts, state: ClientState) -> Tensors:
    """Gradients as they are."""
    return grads


@dataclass(frozen=True)
class LocalRun:
    """What a client's round was.

    Attributes:
        steps: The local steps.
        lr: Their learning rate; the mean of them if it changes within the round.
        examples: How many examples the client holds.
        gradient: The gradient at the broadcast model of the mean loss over all examples, if the rules ask for it.
    """

    steps: int
    lr: float
    examples: int
    gradient: Tensors | None = None


def send_difference(broadcast: Parts, params: Tensors, state: ClientState, done: LocalRun) -> tuple[Parts, ClientState]:
    """Send `params` = broadcast − trained: what the server subtracts, like a gradient. Keep no state."""
    return {"params": tree_map(lambda base, trained: base - trained, broadcast["params"], params)}, {}


@dataclass(frozen=True)
class ClientRules:
    """What an algorithm makes of local training: three pure rules, and the parts that they send and need.

    The rules see leaves with a gradient, as torch tensors.

    Attributes:
        correct: (grads, params, broadcast, client state) → grads, for every batch.
        finish: (broadcast, params, client state, run) → (parts, client state), at the end, where `run` is a `LocalRun`.
        init: A client's first state, from the shared params of its first broadcast. No state is kept if it is `no_state`.
        needs_gradient: Whether `finish` is given the gradient at the broadcast model, which costs one more pass over the
            examples.
        sends: The names of the parts that `finish` gives.
        receives: The names of the parts that the rules need in the broadcast.
    """

    correct: Callable[[Tensors, Tensors, Parts, ClientState], Tensors] = no_correction
    finish: Callable[[Parts, Tensors, ClientState, LocalRun], tuple[Parts, ClientState]] = send_difference
    init: Callable[[Tensors], ClientState] = no_state
    needs_gradient: bool = False
    sends: tuple[str, ...] = ("params",)
    receives: tuple[str, ...] = ("params",)

    @property
    def are_plain(self) -> bool:
        """Whether gradients are used as they are, and the difference is sent."""
        return self.correct is no_correction and self.finish is send_difference


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class ClientWork(Value):
    """How a client learns in one round.

    Attributes:
        optimizer: A rule per leaf.
        lr: The rate of each round (`Schedule`).
        epochs: Passes over the client's examples; one if neither `epochs` nor `steps` is given.
        steps: A number of batches, in place of `epochs`; the examples are shuffled anew at each pass.
        batch_size: Examples a batch; the last may be smaller. None: all of the client's examples are one batch.
        clip_norm: Each step's gradient is scaled to at most this L2 norm over all trained leaves.
        drop_last: Whether a pass leaves out the examples that do not fill its last batch. A client that holds less than one
            batch takes all of its examples as one.
        groups: Leaves that are optimized in their own way. A plan refuses patterns that match one leaf twice.
        rules: What the algorithm makes of it.
    """

    optimizer: LeafRule
    lr: Schedule
    epochs: int | None = None
    steps: int | None = None
    batch_size: int | None = None
    clip_norm: float | None = None
    drop_last: bool = False
    groups: tuple[LeafGroup, ...] = ()
    rules: ClientRules = ClientRules()

    def __post_init__(self) -> None:
        hold_plain_numbers(self)
        if self.epochs is not None and self.steps is not None:
            raise PlanError("epochs-or-steps", "give either epochs= or steps=, not both")
        for name in ("epochs", "steps", "batch_size", "clip_norm"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise PlanError("positive", f"{name}={value} must be positive")
        expect(self.drop_last, bool, "drop_last=")
        if self.drop_last and self.batch_size is None:
            raise PlanError("positive", "drop_last=True needs batch_size=: without it, all examples are one batch")

    def group_of(self, leaf: str) -> LeafGroup | None:
        """The group of a leaf; None for one that is optimized like most."""
        return next((group for group in self.groups if fnmatch.fnmatchcase(leaf, group.pattern)), None)

    def rule_of(self, leaf: str) -> LeafRule:
        """The optimizer of a leaf."""
        group = self.group_of(leaf)
        return self.optimizer if group is None else group.optimizer

    def lr_factor_of(self, leaf: str) -> float:
        """What the rate is multiplied by for a leaf."""
        group = self.group_of(leaf)
        return 1.0 if group is None else group.lr_factor

    @property
    def has_one_rate(self) -> bool:
        """Whether all leaves and all steps of a round have one rate."""
        return self.lr.within is None and all(group.lr_factor == 1.0 for group in self.groups)

    @property
    def keeps_state(self) -> bool:
        """Whether a client must remember something from round to round."""
        return self.rules.init is not no_state

    def step_count(self, examples: int) -> int:
        """Return the number of steps of one round for a client with this number of examples."""
        return self.steps or (self.epochs or 1) * self._batches_a_pass(examples)

    def batches(self, examples: int, rng: np.random.Generator, most: int | None = None) -> Iterator[Any]:
        """Row indices of each batch of one round, int64 arrays; a whole-client batch is `slice(None)`.

        Each pass visits every example once, in a new order; with `drop_last`, but for those that do not fill a batch. most: the
        steps that the client has time for, if not for all.
        """
        size, order = self._batch(examples), None
        steps = self.step_count(examples)
        for number in range(steps if most is None else min(steps, most)):
            start = number % self._batches_a_pass(examples) * size
            if start == 0 and size < examples:
                order = rng.permutation(examples)
            yield slice(None) if order is None else order[start : start + size]

    def _batches_a_pass(self, examples: int) -> int:
        size = self._batch(examples)
        return examples // size if self.drop_last else -(-examples // size)

    def _batch(self, examples: int) -> int:
        return min(self.batch_size or examples, examples)


def expect_plain(client: ClientWork, by: str) -> None:
    """Refuse a work that another algorithm has changed already: `by` would undo or misread it."""
    if not client.rules.are_plain:
        raise PlanError(
            "client-changed-twice", f"{by} takes plain client work such as sgd(), as it is, and not {client!r}"
        )


def apply_gradients(
    work: ClientWork,
    params: Tensors,
    grads: Tensors,
    states: Mapping[str, LeafState],
    broadcast: Parts,
    client_state: ClientState,
    lr: Any,
    step: Any,
) -> tuple[dict[str, Any], dict[str, LeafState]]:
    """Take one local step after the gradient is known: correct, clip, update every leaf. Pure; the reference for executors.

    Args:
        work: What the client does.
        params: Every leaf with a gradient, float arrays or tensors. Leaves that are not in `broadcast["params"]` are personal:
            they are trained, and never corrected.
        grads: The gradients, of the shapes and dtypes of the leaves.
        states: What the optimizer keeps of each leaf.
        broadcast: What the server sent.
        client_state: What the client keeps.
        lr: The rate of this step, a float or a 0-d float.
        step: The number of the step, from 1 within the client's round, an int or a 0-d float.

    Returns:
        The leaves, and what the optimizer keeps of each.
    """
    shared = {name: grads[name] for name in broadcast["params"] if name in grads}
    with own_code("correct", work, "it must give a gradient for every gradient that it is given"):
        corrected = dict(work.rules.correct(shared, params, broadcast, client_state))
    if corrected.keys() != shared.keys():
        raise UsageError(
            f"correct of {work!r} gave {sorted(corrected)} for the gradients of {sorted(shared)}: give them all"
        )
    grads = {**grads, **corrected}
    if work.clip_norm is not None:
        grads = clip_gradients(grads, work.clip_norm)
    moved: dict[str, Any] = {}
    after: dict[str, LeafState] = {}
    with own_code("update", work.optimizer, "it must give (param, state), both like those that it is given"):
        for name in grads:
            factor = work.lr_factor_of(name)
            rate = lr if factor == 1.0 else lr * factor
            moved[name], after[name] = work.rule_of(name).update(grads[name], states[name], params[name], rate, step)
    for name, param in moved.items():
        if (shape := getattr(param, "shape", None)) != params[name].shape:
            raise UsageError(
                f"update of {work.optimizer!r:.200} made the leaf `{name}` a {type(param).__name__} of shape {shape}, and the "
                f"leaf is of shape {tuple(params[name].shape)}: give (param, state), both like those that it is given"
            )
    return moved, after


def clip_gradients(grads: Tensors, max_norm: float) -> dict[str, Any]:
    """g ← g · C / max(‖g‖₂, C), the norm over all leaves. [Pascanu et al. 2013, arXiv:1211.5063, Alg. 1]"""
    squares = [(grad * grad).sum() for grad in grads.values()]
    norm = sum(squares[1:], squares[0]) ** 0.5
    scale = max_norm / norm.clip(min=max_norm)
    return {name: grad * scale for name, grad in grads.items()}


NO_GROUPS: Mapping[str, Mapping[str, float]] = MappingProxyType({})
"""All leaves are optimized alike."""
_LATER = ("drop_last", "leaves")
_OF_LEAVES = ("lr_factor", "weight_decay")


def _client_work(
    rule: Callable[[float], LeafRule],
    weight_decay: float,
    leaves: Mapping[str, Mapping[str, float]],
    lr: float | Schedule,
    epochs: int | None,
    steps: int | None,
    batch_size: int | None,
    clip_norm: float | None,
    drop_last: bool,
) -> ClientWork:
    """Client work as users write it.

    Args:
        rule: Makes an optimizer of a weight decay.
        weight_decay: Of all leaves for which `leaves` says nothing else.
        leaves: By pattern of their names, what is otherwise for some leaves.
        lr: The rate of each round.
        epochs: See `ClientWork`, as for all that follow.
    """
    return ClientWork(
        optimizer=rule(weight_decay),
        lr=as_schedule(lr),
        epochs=epochs,
        steps=steps,
        batch_size=batch_size,
        clip_norm=clip_norm,
        drop_last=drop_last,
        groups=_groups(leaves, weight_decay, rule),
    )


def _groups(
    leaves: Mapping[str, Mapping[str, float]], weight_decay: float, rule: Callable[[float], LeafRule]
) -> tuple[LeafGroup, ...]:
    """Groups of leaves, as users write them; arguments as of `_client_work`."""
    expect(leaves, Mapping, "leaves= of client work")
    made: list[LeafGroup] = []
    for pattern, given in leaves.items():
        said = f"leaves={{{pattern!r}: {given!r:.80}}}"
        if not isinstance(cast(object, given), Mapping) or not given or set(given) - set(_OF_LEAVES):
            raise PlanError(
                "leaf-options",
                f"{said}: give what is otherwise for these leaves, of {', '.join(map(repr, _OF_LEAVES))}",
            )
        factor, decay = (
            plain_number(value) for value in (given.get("lr_factor", 1.0), given.get("weight_decay", weight_decay))
        )
        expect_number(factor, 0, math.inf, f"lr_factor of {said}", open_low=True)
        expect_number(decay, 0, math.inf, f"weight_decay of {said}")
        made.append(LeafGroup(str(pattern), rule(float(decay)), float(factor)))
    return tuple(made)


# ── the client optimizers ────────────────────────────────────────────────────────────────────────────────────────────


@registered("rule/sgd")
def sgd_rule(momentum: float = 0.0, nesterov: bool = False, weight_decay: float = 0.0) -> LeafRule:
    """g ← g + λp;  v ← μv + g;  p ← p − η(g + μv if nesterov else v): PyTorch's convention, the buffer starting at 0.
    [Sutskever et al. 2013]"""
    expect_number(momentum, 0, 1, "momentum")
    expect_number(weight_decay, 0, math.inf, "weight_decay")
    if nesterov and not momentum > 0:
        raise PlanError("positive", "nesterov=True needs momentum > 0")

    def init(param: Any) -> LeafState:
        return (param * 0,) if momentum else ()

    def update(grad: Any, state: LeafState, param: Any, lr: Any, step: Any) -> tuple[Any, LeafState]:
        if weight_decay:
            grad = grad + weight_decay * param
        if not momentum:
            return param - lr * grad, ()
        velocity = momentum * state[0] + grad
        return param - lr * (grad + momentum * velocity if nesterov else velocity), (velocity,)

    return LeafRule(init=init, update=update)


@registered("rule/adam")
def adam_rule(
    betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8, weight_decay: float = 0.0, decoupled: bool = False
) -> LeafRule:
    """Adam with bias correction [Kingma & Ba 2015, arXiv:1412.6980, Alg. 1]; `weight_decay` is added to the gradient,
    or with `decoupled` shrinks the parameter by ηλ [AdamW: Loshchilov & Hutter 2019, arXiv:1711.05101, Alg. 2]."""
    beta1, beta2 = betas
    for beta in betas:
        expect_number(beta, 0, _BELOW_ONE, "betas")
    expect_number(weight_decay, 0, math.inf, "weight_decay")

    def init(param: Any) -> LeafState:
        return param * 0, param * 0

    def update(grad: Any, state: LeafState, param: Any, lr: Any, step: Any) -> tuple[Any, LeafState]:
        if weight_decay and decoupled:
            param = param - lr * weight_decay * param
        elif weight_decay:
            grad = grad + weight_decay * param
        first = beta1 * state[0] + (1 - beta1) * grad
        second = beta2 * state[1] + (1 - beta2) * grad * grad
        debiased = (second / (1 - beta2**step)) ** 0.5
        return param - lr * (first / (1 - beta1**step)) / (debiased + eps), (first, second)

    return LeafRule(init=init, update=update)


@registered("client/sgd", later=_LATER)
def sgd(
    lr: float | Schedule,
    *,
    epochs: int | None = None,
    steps: int | None = None,
    batch_size: int | None = None,
    momentum: float = 0.0,
    nesterov: bool = False,
    weight_decay: float = 0.0,
    clip_norm: float | None = None,
    drop_last: bool = False,
    leaves: Mapping[str, Mapping[str, float]] = NO_GROUPS,
) -> ClientWork:
    """Local SGD: one epoch unless `epochs` or `steps` says otherwise; state starts afresh each round.

    Args:
        lr: The rate of each round.
        epochs: Passes over the client's examples.
        steps: A number of batches, in place of `epochs`.
        batch_size: Examples of a batch; None for one batch of all examples.
        momentum: The share of the last step that the next one keeps.
        nesterov: Whether momentum looks ahead.
        weight_decay: The rate at which each leaf is pulled towards zero.
        clip_norm: The largest L2 norm of a step's gradient; None for no clipping.
        drop_last: Whether the examples that do not fill a pass's last batch are left out.
        leaves: Other values for some leaves, by a shell-style pattern of their names: `weight_decay`, and `lr_factor`, which
            multiplies the rate. A leaf may match one pattern at most.
    """
    amount = lr, epochs, steps, batch_size, clip_norm, drop_last
    return _client_work(lambda decay: sgd_rule(momentum, nesterov, decay), weight_decay, leaves, *amount)


@registered("client/adam", later=_LATER)
def adam(
    lr: float | Schedule,
    *,
    epochs: int | None = None,
    steps: int | None = None,
    batch_size: int | None = None,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    clip_norm: float | None = None,
    drop_last: bool = False,
    leaves: Mapping[str, Mapping[str, float]] = NO_GROUPS,
) -> ClientWork:
    """Local Adam; its moments start afresh each round and never leave the device. `leaves` are as of `sgd`."""
    amount = lr, epochs, steps, batch_size, clip_norm, drop_last
    return _client_work(lambda decay: adam_rule(betas, eps, decay), weight_decay, leaves, *amount)


@registered("client/adamw", later=_LATER)
def adamw(
    lr: float | Schedule,
    *,
    epochs: int | None = None,
    steps: int | None = None,
    batch_size: int | None = None,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.01,
    clip_norm: float | None = None,
    drop_last: bool = False,
    leaves: Mapping[str, Mapping[str, float]] = NO_GROUPS,
) -> ClientWork:
    """Local AdamW: weight decay apart from the gradient. `leaves` are as of `sgd`."""
    amount = lr, epochs, steps, batch_size, clip_norm, drop_last
    return _client_work(lambda decay: adam_rule(betas, eps, decay, decoupled=True), weight_decay, leaves, *amount)
