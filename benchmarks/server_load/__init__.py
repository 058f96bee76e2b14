"""The parts of `benchmarks.server`: servers in processes of their own, and a generator of requests in another."""
