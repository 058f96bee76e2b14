"""`python -m sumus` is the command line."""

from sumus.cli import main

main()
