"""Cyclic training: the model travels from worker to worker, and each goes on where the last one stopped.

A round visits its cohort once, in the population's order. [Chang et al. 2018, doi:10.1093/jamia/ocy017, cyclical weight
transfer] Every worker receives the model that its predecessor alone has just trained, which shows that person's data: a plan
of this kind is refused outside the simulator.

    params    x − y    uniform    over the contributors, of whom there is one at a time
"""

from sumus import optimizers
from sumus.aggregate import Aggregator, Part, mean
from sumus.algorithm import Algorithm
from sumus.spec import registered
from sumus.update.transform import chain
from sumus.work import ClientWork

PARAMS = Part("params", weight="uniform", denominator="count")


def cyclic(client: ClientWork) -> Algorithm:
    """Cyclic training: the model after a client is that client's."""
    return Algorithm(client, chain(), travelling(PARAMS), optimizers.sgd(1.0))


@registered("aggregator/travelling")
def travelling(*parts: Part) -> Aggregator:
    """Each update by itself, one client after the other."""
    plain = mean(*parts)
    return Aggregator(parts=plain.parts, combine=plain.combine, one_by_one=True)
