"""``python -m postlude``: the command line."""

from postlude.cli import main

main()
