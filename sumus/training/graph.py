"""The local step captured as a graph of kernels: for one client, or for a stack of clients that step together.

    graph = capture(program, work, inputs, targets, stack=8)
    losses = graph(state, inputs, targets, mask, lr, step, noise)       `state` is changed in place

Capturing runs the step once and records what reaches torch's kernels, so no Python of the module and no autograd is left;
then the graph is rewritten (`sumus.training.rewrite`). A stack is the same step under `torch.func.vmap`: dense layers
become batched products. What depends on the values of tensors, or on Python's or numpy's randomness, is refused.
"""

import random
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.func import vmap
from torch.fx import Graph, GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.attention import SDPBackend, sdpa_kernel

from sumus.training import rewrite
from sumus.training.noise import Draw
from sumus.training.program import Program
from sumus.training.rewrite import NotCapturable
from sumus.training.step import local_step, step_values
from sumus.work import ClientWork

_STATE = ("params/", "rule/", "buffers/", "broadcast/", "state/")


@dataclass(frozen=True)
class LocalGraph:
    """A captured step.

    names: of the state it takes.  others: of what it takes besides.  draws: the noise that is among them, by client.
    stack: clients, or None for one.
    """

    module: GraphModule
    names: tuple[str, ...]
    others: tuple[str, ...]
    draws: tuple[Draw, ...]
    stack: int | None

    def __call__(
        self,
        state: Sequence[Tensor],
        inputs: Tensor,
        targets: Tensor,
        mask: Tensor | None,
        lr: float,
        step: int,
        noise: Sequence[Tensor] = (),
    ) -> Tensor:
        """Take a step: `state`, tensors in the order of `names`, is changed in place. Returns the mean loss before it.

        inputs, targets: rows of a batch, `(B, ...)`, or `(K, B, ...)` for a stack, where mask `(K, B)` is 1 for rows that
        count. They may be changed. step: from 1.
        """
        given: dict[str, Any] = {"inputs": inputs, "targets": targets, "mask": mask, "negative_lr": -lr}
        given |= {f"noise_{number}": drawn for number, drawn in enumerate(noise)}
        if "lr" in self.others:
            given["lr"] = torch.tensor(lr, dtype=torch.float64)
        if "step" in self.others:
            given["step"] = torch.tensor(float(step), dtype=torch.float64)
        with torch.enable_grad():  # nothing asks for a gradient: fused recurrent kernels keep what their backward needs
            (loss,) = self.module.forward(*state, *(given[name] for name in self.others))
        return loss

    def noise(self, keys: Sequence[bytes], step: int, device: torch.device) -> list[Tensor]:
        """What these clients' random operators draw in a step: `(K, ...)` each, or one client's."""
        drawn = [np.stack([draw.numbers(key, step, call) for key in keys]) for call, draw in enumerate(self.draws)]
        return [torch.from_numpy(each if self.stack else each[0]).to(device) for each in drawn]


def capture(
    program: Program,
    work: ClientWork,
    inputs: Tensor,
    targets: Tensor,
    stack: int | None = None,
    onednn: bool = False,
) -> LocalGraph:
    """The graph of one step for batches shaped like these `(B, ...)`; for `stack` clients at once, with a mask.

    Raises NotCapturable with the reason.
    """
    values = {name: value.to(program.device) for name, value in step_values(program, work, inputs, targets).items()}
    lr, step = (values.pop(name).cpu() for name in ("lr", "step"))
    values["inputs"], values["targets"] = inputs.clone(), targets.clone()
    if stack is not None:
        values["mask"] = torch.ones(len(inputs), dtype=next(iter(program.trained.values())).dtype).to(program.device)
    values |= {"lr": lr, "step": step}
    outputs: list[str] = []

    def one(*args: Tensor) -> list[Tensor]:
        results = local_step(program, work, dict(zip(values, args, strict=True)), functional=stack is not None)
        outputs[:] = results
        return list(results.values())

    dims = [0 if is_stacked(name, program) else None for name in values]
    run: Any = one
    if stack is not None:
        run = vmap(one, in_dims=tuple(dims), randomness="different")
        values = {
            name: value if dim is None else value.expand(stack, *value.shape).clone()
            for (name, value), dim in zip(values.items(), dims, strict=True)
        }
    module = _recorded(program, run, list(values.values()), stack)
    graph = module.graph
    arguments = [node for node in graph.nodes if node.op == "placeholder"]
    rewrite.simplify(graph)
    draws = rewrite.stand_in_noise(graph, stack)
    rewrite.fuse_bias(graph)
    rewrite.fuse_cross_entropy(graph)
    if program.device.type == "cpu":
        rewrite.pool_channels_last(graph)
    last = [node for node in graph.nodes if node.op == "placeholder"][-1]
    with graph.inserting_after(last):
        negative_lr = graph.placeholder("negative_lr")
    places = {name: place for place, name in enumerate(outputs)}
    state = {node: places[name] for name, node in zip(values, arguments, strict=True) if name in places}
    rewrite.update_in_place(graph, state, arguments[list(values).index("lr")], negative_lr)
    rewrite.simplify(graph)
    if onednn:
        rewrite.multiply_by_onednn(graph)
    named = dict(zip(arguments, values, strict=True))
    used = [named.get(node, node.name) for node in _used_arguments(graph)]
    graph.lint()
    module.recompile()
    names = tuple(name for name in used if name.startswith(_STATE))
    return LocalGraph(module, names, tuple(used[len(names) :]), tuple(draws), stack)


def _used_arguments(graph: Graph) -> list[Node]:
    """The arguments of a graph, after those that nothing uses are gone."""
    for node in [node for node in graph.nodes if node.op == "placeholder" and not node.users]:
        graph.erase_node(node)
    return [node for node in graph.nodes if node.op == "placeholder"]


def is_stacked(name: str, program: Program) -> bool:
    """Whether an argument of a stack's step is each client's own."""
    if name.startswith("buffers/"):
        return program.leaves[name.removeprefix("buffers/")].role != "frozen"
    return name.startswith(("params/", "rule/", "state/")) or name in ("inputs", "targets", "mask")


def _recorded(program: Program, run: Any, values: list[Tensor], stack: int | None) -> GraphModule:
    """Run once, recording. Modules that draw from Python or numpy, or that count their calls, would be frozen: refused."""
    drawn = _generators()
    before = _attributes(program)
    backends = [SDPBackend.MATH] if stack is not None else [SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]
    program.module.train()
    try:
        with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
            warnings.simplefilter("ignore")
            with torch.backends.mkldnn.flags(enabled=stack is None), sdpa_kernel(backends):
                flat = make_fx(run)(*values)
    except NotCapturable:
        raise
    except Exception as error:
        raise NotCapturable(_reason(error)) from error
    if _generators() != drawn:
        raise NotCapturable("it draws from Python's or numpy's generator: use torch's")
    if (after := _attributes(program)) != before:
        changed = sorted(name for name in after.keys() | before.keys() if after.get(name) != before.get(name))
        raise NotCapturable(f"its forward changes its own attribute `{changed[0]}`")
    return flat


def _generators() -> Any:
    """Where Python's and numpy's generators stand."""
    state: Any = np.random.get_state(legacy=False)
    return random.getstate(), state["state"]["pos"], state["state"]["key"].tobytes()


def _attributes(program: Program) -> Mapping[str, Any]:
    """Numbers, words and flags that modules keep beside their tensors."""
    return {
        f"{path}.{name}".lstrip("."): value
        for path, module in program.module.named_modules()
        for name, value in vars(module).items()
        if isinstance(value, int | float | str | bool | None)
    }


def _reason(error: Exception) -> str:
    text = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    if "data-dependent" in str(error) or ".item()" in str(error) or "value out of a tracing tensor" in str(error):
        return "its forward depends on the values of tensors (an `if`, or .item())"
    if "mutat" in str(error):
        return "it changes tensors of its own in place, such as batch statistics"
    return f"{type(error).__name__}: {text}"
