"""Storage: rows of rounds, devices and leases, blobs, keys and client states. Each store also has an implementation in
memory."""
