"""What crosses a boundary as bytes: trees, sums and bundles. No IO, no pickle."""
