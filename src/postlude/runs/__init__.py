"""The run directory: its layout, its readers and writers, and how the command line's RUN and RUN/STAGE are found."""

from postlude.runs.examples import ExamplesWriter, read_examples
from postlude.runs.find import artifact_of, find, list_runs, open_run
from postlude.runs.run import Run
from postlude.runs.stage import Checkpoint, Stage, State, Status

__all__ = [
    "Checkpoint",
    "ExamplesWriter",
    "Run",
    "Stage",
    "State",
    "Status",
    "artifact_of",
    "find",
    "list_runs",
    "open_run",
    "read_examples",
]
