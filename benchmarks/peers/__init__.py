"""sumus compared with other simulators of federated learning: `python -m benchmarks.peers`."""
