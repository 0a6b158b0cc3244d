"""``python -m postlude``: the command line."""

import sys

if not sys.flags.safe_path:
    del sys.path[0]  # the current folder, which `python -m` puts before all that is installed

from postlude.cli import main

main()
