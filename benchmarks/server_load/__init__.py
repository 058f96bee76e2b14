"""What `benchmarks.server` measures, and with what: servers in processes of their own, and a generator of requests in another."""
