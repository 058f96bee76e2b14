"""The wire format: trees, sums, reports, messages and bundles as bytes. No input or output happens here, and no pickle
is used."""
