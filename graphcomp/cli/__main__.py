"""`python -m graphcomp.cli`."""

from graphcomp.cli import main

main()
