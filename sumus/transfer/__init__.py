"""Transfer: a model begins with the values of another one, and few numbers of it are trained.

    net = Net()
    print(transfer.load(net, "watch.safetensors", rename={"encoder.": "features."}))    what was taken, and what was not

    small = transfer.adapters(net, rank=2, targets="features.*", train="head")           all else is frozen
    task = sumus.Task(lambda: small, loss, leaves=transfer.adapter_leaves(small))
    whole = transfer.merged(small)                                                       plain layers again

`checkpoints` reads files, `loading` puts their values into a module, and `low_rank` has the adapters.
"""

from sumus.transfer.loading import Loaded, load
from sumus.transfer.low_rank import adapter_leaves, adapters, merged

__all__ = ["Loaded", "adapter_leaves", "adapters", "load", "merged"]
