"""Client work: a description of a client's local training as data, with three small pure rules.

    work = sgd(lr=0.1, epochs=1, batch_size=20)

`ClientWork` holds no model and no loop. An executor (`sumus.training`) owns the gradient; for every batch it calls

    grads = work.rules.correct(grads, params, broadcast, client_state)            FedProx and SCAFFOLD live here
    param, leaf_state = work.optimizer.update(grad, leaf_state, param, lr, step)    leaf by leaf: SGD, Adam

At the end, `work.rules.finish(broadcast, params, client_state, done)` returns the parts to send, and the client's next state,
which is pending until its update is counted; `work.rules.init` returns its first state. Rules see the leaves that have a
gradient: `params` of `correct` are the shared and the personal ones, `params` of `finish` are the shared ones. The executor
handles running statistics.

The rules use only operators that numpy and torch share, so an executor can run them client by client, vectorize them,
or trace them into a graph for a phone. An executor may fuse a rule that it recognizes by its spec.

`client(train=...)` is client work by the user's own training function (`sumus.own_loop`), which receives a state dict and returns
one. sumus does not know its steps, so it has no rules.
"""

import fnmatch
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, TypeAlias, cast

import numpy as np

from sumus.errors import PlanError, UsageError, expect, expect_number, own_code
from sumus.own_loop import OwnFunction, OwnLoop, offer, parameters_of
from sumus.schedules import Schedule, as_schedule, constant
from sumus.spec import Spec, Value, registered, to_json
from sumus.tree import tree_map
from sumus.types import Json, Tensors, hold_plain_numbers, plain_number

_BELOW_ONE = math.nextafter(1.0, 0.0)

LeafState: TypeAlias = tuple[Any, ...]
ClientState: TypeAlias = Mapping[str, Tensors]
"""The state that a client keeps between rounds: trees by the algorithm's own names, and its personal leaves under `personal`."""
PERSONAL = "personal"
Parts: TypeAlias = Mapping[str, Tensors]


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class LeafRule(Value):
    """An optimizer for one leaf. Arrays are from numpy or torch, all of one shape.

    Attributes:
        init: (param) → state.
        update: (grad, state, param, lr, step) → (param, state), where `step` counts from 1 within the client's round.
    """

    init: Callable[[Any], LeafState]
    update: Callable[[Any, LeafState, Any, Any, Any], tuple[Any, LeafState]]


@dataclass(frozen=True)
class LeafGroup:
    """Leaves with optimizer settings of their own.

    Attributes:
        pattern: Shell-style pattern of the leaves' names.
        optimizer: The optimizer of these leaves.
        lr_factor: The factor by which the learning rate is multiplied for these leaves.
    """

    pattern: str
    optimizer: LeafRule
    lr_factor: float = 1.0


def no_state(params: Tensors) -> ClientState:
    """Return an empty state: a client keeps nothing between rounds."""
    return {}


def zeros_as(name: str) -> Callable[[Tensors], ClientState]:
    """Return a function that makes a client's first state: under this name, zeros shaped like the params."""

    def init(params: Tensors) -> ClientState:
        return {name: tree_map(lambda leaf: leaf * 0, params)}

    return init


def no_correction(grads: Tensors, params: Tensors, broadcast: Parts, state: ClientState) -> Tensors:
    """Return the gradients unchanged."""
    return grads


@dataclass(frozen=True)
class LocalRun:
    """A summary of one client's local training in one round.

    Attributes:
        steps: The number of local steps.
        lr: Their learning rate; the mean if it changes within the round.
        examples: The number of examples that the client holds.
        gradient: The gradient of the mean loss over all examples, at the broadcast model, if the rules need it.
    """

    steps: int
    lr: float
    examples: int
    gradient: Tensors | None = None


def send_difference(broadcast: Parts, params: Tensors, state: ClientState, done: LocalRun) -> tuple[Parts, ClientState]:
    """Send `params` = broadcast − trained, which the server subtracts like a gradient. Keep no state."""
    return {"params": tree_map(lambda base, trained: base - trained, broadcast["params"], params)}, {}


@dataclass(frozen=True)
class ClientRules:
    """An algorithm's changes to local training: three pure rules, and the parts that they send and need.

    The rules see leaves with a gradient, as torch tensors.

    Attributes:
        correct: (grads, params, broadcast, client state) → grads, for every batch.
        finish: (broadcast, params, client state, run) → (parts, client state), at the end, where `run` is a `LocalRun`.
        init: (the shared params of the client's first broadcast) → the client's first state. With `no_state`, no state is kept.
        needs_gradient: Whether `finish` receives the gradient at the broadcast model, which costs one more pass over the
            examples.
        sends: The names of the parts that `finish` returns.
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
        """Whether gradients are used unchanged, and the difference is sent."""
        return self.correct is no_correction and self.finish is send_difference


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class ClientWork(Value):
    """The local training of a client in one round.

    Attributes:
        optimizer: A rule per leaf.
        lr: The learning rate of each round (`Schedule`).
        epochs: Passes over the client's examples; one if neither `epochs` nor `steps` is given.
        steps: A number of batches, in place of `epochs`; the examples are shuffled anew at each pass.
        batch_size: Examples per batch; the last batch may be smaller. None: all of the client's examples form one batch.
        clip_norm: The largest L2 norm of a step's gradient over all trained leaves; a gradient with a larger norm is scaled down.
        drop_last: Whether a pass leaves out the examples that do not fill its last batch. A client with fewer examples than one
            batch takes all of them as one batch.
        groups: Leaves with optimizer settings of their own. A plan refuses two patterns that match the same leaf.
        rules: The algorithm's changes to local training.
        loop: The user's own code that trains, in place of all of these fields (`client`); None if sumus takes the steps.
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
    loop: OwnLoop | None = None

    def __post_init__(self) -> None:
        hold_plain_numbers(self)
        self._expect_no_steps()
        if self.epochs is not None and self.steps is not None:
            raise PlanError("epochs-or-steps", "give either epochs= or steps=, not both")
        for name in ("epochs", "steps", "batch_size", "clip_norm"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise PlanError("positive", f"{name}={value} must be positive")
        expect(self.drop_last, bool, "drop_last=")
        if self.drop_last and self.batch_size is None:
            raise PlanError("positive", "drop_last=True needs batch_size=: without it, all examples are one batch")

    def _expect_no_steps(self) -> None:
        """Raise PlanError if the user's own code trains and a field says something about steps: it would have no effect."""
        if self.loop is None:
            return
        amount = {name: getattr(self, name) for name in ("epochs", "steps", "batch_size", "clip_norm", "groups")}
        said = [name for name, value in amount.items() if value] + ["drop_last"] * self.drop_last
        if self.rules != ClientRules():
            said.append("rules")
        if said:
            raise PlanError(
                "own-loop",
                f"{', '.join(said)} of client work apply only to steps that sumus takes, but here the code of "
                f"`{self.loop.train}` takes them: leave them out and do it in that code, or train by sgd(), adam() or adamw()",
            )

    def expect_steps(self, what: str) -> None:
        """Raise PlanError if the user's own code trains, so that sumus does not know its steps.

        Args:
            what: What needs the steps, such as "a program for a phone".
        """
        if self.loop is not None:
            raise PlanError(
                "own-loop",
                f"{what} needs to know the gradient and the number of a client's steps, but in {self!r} the user's own code "
                "takes the steps: "
                "train by sgd(), adam() or adamw()",
            )

    def group_of(self, leaf: str) -> LeafGroup | None:
        """Return the group of a leaf; None if the leaf is in no group."""
        return next((group for group in self.groups if fnmatch.fnmatchcase(leaf, group.pattern)), None)

    def rule_of(self, leaf: str) -> LeafRule:
        """Return the optimizer of a leaf."""
        group = self.group_of(leaf)
        return self.optimizer if group is None else group.optimizer

    def lr_factor_of(self, leaf: str) -> float:
        """Return the factor of the learning rate for a leaf."""
        group = self.group_of(leaf)
        return 1.0 if group is None else group.lr_factor

    @property
    def has_one_rate(self) -> bool:
        """Whether all leaves and all steps of a round have the same learning rate."""
        return self.lr.within is None and all(group.lr_factor == 1.0 for group in self.groups)

    @property
    def keeps_state(self) -> bool:
        """Whether a client must remember something from round to round."""
        return self.rules.init is not no_state

    def step_count(self, examples: int) -> int:
        """Return the number of steps in one round for a client with this number of examples; 1 if the user's own code trains."""
        return self.steps or (self.epochs or 1) * self._batches_a_pass(examples)

    def batches(self, examples: int, rng: np.random.Generator, most: int | None = None) -> Iterator[Any]:
        """Yield the row indices of each batch of one round, as int64 arrays; `slice(None)` for a batch of all examples.

        Each pass visits every example once, in a new order; with `drop_last`, it leaves out those that do not fill a batch.

        Args:
            examples: The number of the client's examples.
            rng: The source of the order.
            most: The number of steps that the client has time for; None for all.
        """
        self.expect_steps("a training by batches")
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
    """Refuse client work that another algorithm has already changed: the function `by` would undo or misread that change.

    The user's own code is refused too, since `by` could not change its steps.
    """
    if client.loop is not None:
        raise PlanError(
            "own-loop",
            f"{by} changes or counts each local step of a client, but in {client!r} the user's own code takes them: use "
            "fedavg, with any server optimizer, or fedbuff; or let sumus take the steps, by sgd(), adam() or adamw()",
        )
    if not client.rules.are_plain:
        raise PlanError("client-changed-twice", f"{by} takes unchanged client work such as sgd(), and not {client!r}")


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
    """Take one local step after the gradient is known: correct, clip, and update every leaf.

    This pure function is the reference for executors.

    Args:
        work: The work of the client.
        params: Every leaf with a gradient, float arrays or tensors. Leaves that are not in `broadcast["params"]` are personal:
            they are trained, but never corrected.
        grads: The gradients, with the shapes and dtypes of the leaves.
        states: The optimizer's state of each leaf.
        broadcast: The parts that the server sent.
        client_state: The state that the client keeps between rounds.
        lr: The learning rate of this step, a float or a 0-d float.
        step: The number of the step, from 1 within the client's round, an int or a 0-d float.

    Returns:
        The new leaves, and the optimizer's new state of each.
    """
    work.expect_steps("a local step")
    shared = {name: grads[name] for name in broadcast["params"] if name in grads}
    with own_code("correct", work, "it must return a gradient for every gradient that it is given"):
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
    with own_code("update", work.optimizer, "it must return (param, state), both like those that it is given"):
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
    """Return g ← g · C / max(‖g‖₂, C), with the norm over all leaves. [Pascanu et al. 2013, arXiv:1211.5063, Alg. 1]"""
    squares = [(grad * grad).sum() for grad in grads.values()]
    norm = sum(squares[1:], squares[0]) ** 0.5
    scale = max_norm / norm.clip(min=max_norm)
    return {name: grad * scale for name, grad in grads.items()}


NO_GROUPS: Mapping[str, Mapping[str, float]] = MappingProxyType({})
"""No groups: all leaves have the same optimizer settings."""
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
    """Make client work from the arguments that a user gives.

    Args:
        rule: Function that makes an optimizer from a weight decay.
        weight_decay: The weight decay of all leaves for which `leaves` gives no other value.
        leaves: Other values for some leaves, by pattern of their names.
        lr: The learning rate of each round.
        epochs: See `ClientWork`, also for the arguments after this one.
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
    """Return groups of leaves, from arguments as users write them (see `_client_work`)."""
    expect(leaves, Mapping, "leaves= of client work")
    made: list[LeafGroup] = []
    for pattern, given in leaves.items():
        said = f"leaves={{{pattern!r}: {given!r:.80}}}"
        if not isinstance(cast(object, given), Mapping) or not given or set(given) - set(_OF_LEAVES):
            raise PlanError(
                "leaf-options",
                f"{said}: give the values that differ for these leaves, among {', '.join(map(repr, _OF_LEAVES))}",
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
    """Return SGD: g ← g + λp;  v ← μv + g;  p ← p − η(g + μv if nesterov else v).

    This is PyTorch's convention, with a buffer that starts at 0. [Sutskever et al. 2013]
    """
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
    """Return Adam with bias correction. [Kingma & Ba 2015, arXiv:1412.6980, Alg. 1]

    `weight_decay` is added to the gradient or, with `decoupled`, shrinks the parameter by ηλ.
    [AdamW: Loshchilov & Hutter 2019, arXiv:1711.05101, Alg. 2]
    """
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
    """Return client work that trains by SGD: for one epoch, unless `epochs` or `steps` is given.

    The optimizer's state starts anew in each round.

    Args:
        lr: The learning rate of each round.
        epochs: Passes over the client's examples.
        steps: A number of batches, in place of `epochs`.
        batch_size: Examples per batch; None for one batch of all examples.
        momentum: The share of the last step that is kept in the next one.
        nesterov: Whether to use Nesterov momentum.
        weight_decay: The rate at which each leaf is pulled towards zero.
        clip_norm: The largest L2 norm of a step's gradient; None for no clipping.
        drop_last: Whether the examples that do not fill a pass's last batch are left out.
        leaves: Other values for some leaves, by a shell-style pattern of their names: `weight_decay`, and `lr_factor`, which
            multiplies the learning rate. A leaf may match at most one pattern.
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
    """Return client work that trains by Adam.

    Adam's moments start anew in each round, and never leave the device.

    Args:
        lr: The learning rate of each round.
        epochs: See `sgd`, also for the arguments that are not listed here.
        betas: (β₁, β₂): the decay rates of the first and the second moment.
        eps: The number that is added to the root of the second moment.
    """
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
    """Return client work that trains by AdamW: weight decay is not part of the gradient. The arguments are those of `adam`."""
    amount = lr, epochs, steps, batch_size, clip_norm, drop_last
    return _client_work(lambda decay: adam_rule(betas, eps, decay, decoupled=True), weight_decay, leaves, *amount)


# ── code of the user's own ───────────────────────────────────────────────────────────────────────────────────────────


def _no_steps(grad: Any, state: LeafState, param: Any, lr: Any, step: Any) -> tuple[Any, LeafState]:
    """A placeholder for the optimizer of client work by the user's own code. It is never called."""
    raise PlanError(
        "own-loop", "the client's own code takes the training steps, so sumus has no optimizer rule to apply"
    )


def _own_work(loop: OwnLoop) -> ClientWork:
    return ClientWork(optimizer=LeafRule(init=lambda param: (), update=_no_steps), lr=constant(0.0), loop=loop)


@registered("client/client")
def _read_client(train: str, evaluate: str | None = None) -> ClientWork:
    """Return the client work of a plan that was read from JSON. Its functions are looked up where a client trains."""
    return _own_work(OwnLoop(train, evaluate))


def client(train: OwnFunction, evaluate: OwnFunction | None = None) -> ClientWork:
    """Return client work that runs a training loop of your own. sumus does not know what the loop does.

    The random generators of torch, numpy and Python are seeded for each client and round before `train`, and restored after
    it. The functions may be called in other processes, in any order of clients.

    Args:
        train: (state, examples) → (state, count, metrics). `state`: the model's state dict, as copies for this client.
            `examples`: the client's (inputs, targets), prepared, tensors with one row for each example. It returns all leaves
            of the state dict after training, as tensors or arrays; the number of examples that it trained on, which weighs the
            client; and the mean of "loss" and of any of the task's metrics over these, such as {"loss": 0.3}. Without "loss",
            the task's loss of the trained model is measured.
        evaluate: (state, examples) → (count, metrics), with the mean of "loss" and of every metric of the task; it measures
            clients and central data. None to measure by the task's loss and metrics.

    Both may take a third argument without a default, a `ClientRound`: `client`, `number` (the round, from 0) and `seed`.
    Devices need functions that are defined at the top of a module: a plan holds their names.

    Raises:
        PlanError: A function cannot be called with these arguments.
    """
    given = {"train": train, "evaluate": evaluate}
    names: dict[str, str] = {}
    params: dict[str, Json] = {"train": None, "evaluate": None}
    for which, function in given.items():
        if function is not None:
            parameters_of(function)
            names[which] = str(getattr(function, "__qualname__", type(function).__name__))
            params[which] = offer(function) or to_json(function)
    if names["train"] == names.get("evaluate"):
        raise PlanError(
            "own-loop", f"train= and evaluate= are both called `{names['train']}`: give them different names"
        )
    functions = {name: function for which, name in names.items() if (function := given[which]) is not None}
    work = _own_work(OwnLoop(names["train"], names.get("evaluate"), functions))
    object.__setattr__(work, "spec", Spec("client/client", params))
    return work
