"""`python -m graphcomp`."""

from graphcomp.cli import main

main()
