"""Training: models run here. No other package imports torch."""
