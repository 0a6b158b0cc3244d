"""The run directory: its layout, its readers and writers, and how the command line's RUN and RUN/STAGE are found."""

from postlude.runs.account import Account, final_account, missing, settle, settle_events
from postlude.runs.examples import ExamplesWriter, read_examples
from postlude.runs.find import artifact_of, find, list_runs, open_run
from postlude.runs.identity import Identity
from postlude.runs.lineage import LINEAGE, Ancestor, artifact_digest, provenance, walk
from postlude.runs.requests import Request, Requests
from postlude.runs.revisions import (
    find_finished_elsewhere,
    known_identity,
    revision_of,
    revisions,
    set_aside,
    take_over,
)
from postlude.runs.run import Run
from postlude.runs.stage import Checkpoint, Stage, State, Status
