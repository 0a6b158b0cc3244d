"""Master keys change, data does not: records of data keys are found, told, and wrapped anew."""

from __future__ import annotations

from postlude.manifest.storage import Encryption
from postlude.storage import data_keys, files, guards, uris
from postlude.storage.data_keys import Record
from postlude.storage.errors import NotFound
from postlude.storage.keys import RECORD, rule_for, service_of
from postlude.storage.rules import Rule


def records_below(uri: str) -> dict[str, Record]:
    """The records of the data keys below a folder, by the folder that each is for. CorruptError."""
    folders = [uris.parent(uris.join(uri, path)) for path in files.files_below(uri, True) if uris.name(path) == RECORD]
    return {folder: Record.read(place, files.read_bytes(place)) for folder in folders for place in [_place(folder)]}


def rewrap(uri: str, to: str, old: str | None = None) -> int:
    """Have all data keys below a folder wrapped by the master key ``to``, for the run and stage that each stands in
    now. How many there are.

    They are unwrapped with the master key ``old``, else that of the folder's rule, else that which each names: whoever
    calls this vouches for it. Killed on the way, it is called again: what is wrapped by ``to`` already stays.
    """
    service_of(to)
    records = records_below(uri)
    if not records:
        raise NotFound(f"Nothing below '{uri}' is encrypted: there is no {RECORD}. Check the path.")
    for folder, record in records.items():
        rule = rule_for(folder)
        new = with_key(rule, to)
        if record.key == to and record.context == data_keys.context_of(folder, record.folder):
            continue
        unwrapping = old or (record.key if rule.encrypt is None or rule.encrypt.key == to else rule.encrypt.key)
        anew = record.wrapped_anew(folder, with_key(rule, unwrapping), new)
        guards.check(folder, now=True)
        files.write_bytes(_place(folder), anew.to_bytes())
    return len(records)


def with_key(rule: Rule, key: str) -> Rule:
    """The rule with another master key."""
    return rule.model_copy(update={"encrypt": Encryption(key=key)})


def _place(folder: str) -> str:
    return uris.join(folder, RECORD)
