"""The commands: they read their arguments, call what does the work, and show what comes back. No logic.

Nothing heavy is imported before a command needs it, so that ``postlude --help`` answers at once.
"""

from postlude.cli.app import main
