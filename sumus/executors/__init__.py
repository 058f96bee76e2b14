"""What trains clients, one after another or many at once: the contract, its implementations, and the choice among them."""
