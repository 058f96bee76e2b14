"""Where models are run: the only place that imports torch."""
