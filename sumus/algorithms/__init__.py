"""One algorithm, one file, one paper, one page."""

from sumus.algorithms.fedavg import fedadagrad as fedadagrad
from sumus.algorithms.fedavg import fedadam as fedadam
from sumus.algorithms.fedavg import fedavg as fedavg
from sumus.algorithms.fedavg import fedavgm as fedavgm
from sumus.algorithms.fedavg import fedsgd as fedsgd
from sumus.algorithms.fedavg import fedyogi as fedyogi
