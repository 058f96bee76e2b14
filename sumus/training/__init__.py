"""Training: the package in which models run. No other package imports torch."""
