"""sumus beside other simulators of federated learning: `python -m benchmarks.peers`."""
