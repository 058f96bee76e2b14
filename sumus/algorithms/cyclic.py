"""Cyclic training: the model travels from client to client, and each client continues where the previous client stopped.

In a round, the model visits each client of the cohort once, in the order of the population. [Chang et al. 2018,
doi:10.1093/jamia/ocy017, cyclical weight transfer] Each client receives the model that the previous client alone has
just trained, which reveals that person's data. A plan with this algorithm is therefore refused outside the simulator.

    part      value    weight     divided by
    params    x − y    uniform    the number of contributors, which is one at a time
"""

from sumus import optimizers
from sumus.aggregate import Aggregator, Part, mean
from sumus.algorithm import Algorithm
from sumus.spec import registered
from sumus.update.transform import chain
from sumus.work import ClientWork

PARAMS = Part("params", weight="uniform", denominator="count")


def cyclic(client: ClientWork) -> Algorithm:
    """Make cyclic training: the model after a client's visit is that client's model."""
    return Algorithm(client, chain(), travelling(PARAMS), optimizers.sgd(1.0))


@registered("aggregator/travelling")
def travelling(*parts: Part) -> Aggregator:
    """Combine each update on its own, one client after another."""
    plain = mean(*parts)
    return Aggregator(parts=plain.parts, combine=plain.combine, one_by_one=True)
