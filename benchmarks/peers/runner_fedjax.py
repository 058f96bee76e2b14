"""FedJAX 0.0.17: `for_each_client` with its jit backend, and the loop of its `algorithms.fed_avg`, with batches in
stored order.

XLA uses all cores that it is allowed to use.
"""

import jax
import jax.numpy as jnp

jax.tree_map = jax.tree_util.tree_map  # removed from JAX since; FedJAX 0.0.17 still calls it
import fedjax  # noqa: E402
from fedjax.core import tree_util  # noqa: E402

from benchmarks.lockstep import Turns  # noqa: E402
from benchmarks.peers.asked import parser, workload_of  # noqa: E402
from benchmarks.peers.jax_models import Model  # noqa: E402


def main() -> None:
    """Train, one round in each turn."""
    args = parser(__doc__).parse_args()
    jax.config.update("jax_enable_x64", args.double)
    workload = workload_of(args)
    model = Model(workload)
    pairs = model.examples(args.double)
    clients = [fedjax.ClientDataset({"x": inputs, "y": targets}) for inputs, targets in pairs]
    gradient = jax.grad(model.loss)

    def init(shared, key):
        return shared

    def step(params, batch):
        real = batch[fedjax.EXAMPLE_MASK_KEY].astype(next(iter(params.values())).dtype)
        grads = gradient(params, batch["x"], batch["y"], real)
        return jax.tree.map(lambda param, grad: param - workload.lr * grad, params, grads)

    def final(shared, params):
        return jax.tree.map(lambda before, after: before - after, shared, params)

    train = fedjax.for_each_client(init, step, final)

    def one_round(params):
        total, weight = tree_util.tree_zeros_like(params), 0.0
        batched = [(number, one.padded_batch(batch_size=workload.batch), 0) for number, one in enumerate(clients)]
        for number, delta in train(params, batched):
            total = tree_util.tree_add(total, tree_util.tree_weight(delta, len(clients[number])))
            weight += len(clients[number])
        mean = tree_util.tree_inverse_weight(total, weight)
        return jax.block_until_ready(jax.tree.map(lambda param, delta: param - delta, params, mean))

    turns = Turns()
    params = {name: jnp.asarray(leaf) for name, leaf in model.initial(args.double).items()}
    while turns.next():
        params = one_round(params)
    turns.finish(model.as_torch(params))


if __name__ == "__main__":
    main()
