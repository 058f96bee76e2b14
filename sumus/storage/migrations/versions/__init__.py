"""The migration steps, one file for each."""
