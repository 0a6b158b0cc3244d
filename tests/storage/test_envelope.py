"""Encrypted files: they come back, by any range, and whatever is done to them is refused before a byte is used."""

from __future__ import annotations

import io
import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from postlude import storage
from postlude.storage import envelope, files, rules
from storage.conftest import encrypt, new_master_key

FRAME, WHOLE = envelope.FRAME_BYTES, envelope.FRAME_BYTES + envelope.TAG_BYTES
BATCH = FRAME * envelope.BATCH_FRAMES
KEY = envelope.DataKey(bytes(16), bytes(range(32)), "model")


@pytest.fixture
def encrypted(tmp_path: Path) -> Iterator[Path]:
    """A folder in which everything is encrypted."""
    folder = tmp_path / "runs"
    folder.mkdir()
    encrypt(str(folder), new_master_key(tmp_path))
    yield folder
    rules.use(())


def seal(content: bytes, path: str = "weights.bin", key: envelope.DataKey = KEY) -> bytes:
    sealed = io.BytesIO()
    kept = io.BytesIO()
    kept.close = lambda: sealed.write(kept.getvalue())  # type: ignore[method-assign]
    with envelope.Writer(kept, envelope.FileCipher(key, path, path, envelope.new_header(key))) as file:
        pieces = random.Random(len(content))
        view = memoryview(content)
        while view:
            count = pieces.randint(1, 3 * FRAME)
            file.write(view[:count])
            view = view[count:]
    return sealed.getvalue()


def open_(sealed: bytes, path: str = "weights.bin", key: envelope.DataKey = KEY) -> envelope.Reader:
    header = envelope.read_header(path, sealed[:100])
    cipher = envelope.FileCipher(key, path, path, header)
    return envelope.Reader(path, cipher, len(sealed), lambda at, count: sealed[at : at + count], lambda: None)


@pytest.mark.parametrize("size", [0, 1, FRAME - 1, FRAME, FRAME + 1, BATCH - 1, BATCH, BATCH + 1, 6 * BATCH + 5])
def test_content_of_any_size_comes_back(size: int) -> None:
    content = os.urandom(size)
    sealed = seal(content)
    assert envelope.content_bytes("x", len(sealed)) == size
    assert open_(sealed).readall() == content
    assert size < 16 or content[:16] not in sealed


@given(st.integers(0, 3 * FRAME + 9), st.integers(0, 2 * FRAME))
@settings(max_examples=40)
def test_a_range_takes_its_own_frames_alone(start: int, count: int) -> None:
    content = bytes(range(256)) * (3 * FRAME // 256 + 1)
    sealed, fetched = seal(content), []
    cipher = envelope.FileCipher(KEY, "weights.bin", "weights.bin", sealed[:64])

    def fetch(at: int, size: int) -> bytes:
        fetched.append(sealed[at : at + size])
        return fetched[-1]

    reader = envelope.Reader("weights.bin", cipher, len(sealed), fetch, lambda: None)
    reader.seek(start)
    read = b""
    while len(read) < count and (piece := reader.read(count - len(read))):
        read += piece
    assert read == content[start : start + count]
    frames = (
        len({at // FRAME for at in (*range(start, start + len(read), FRAME), start + len(read) - 1)}) if read else 1
    )
    assert sum(map(len, fetched)) <= frames * WHOLE


CONTENT = random.Random(3).randbytes(4 * FRAME + 1000)
SEALED = seal(CONTENT)
OTHER = seal(CONTENT[::-1])


_AROUND = st.sampled_from([0, 1, FRAME - 1, FRAME, 3 * FRAME, 17 * FRAME + 9])


@given(st.integers(0, 18 * FRAME), st.lists(st.tuples(_AROUND, _AROUND | st.integers(0, 18 * FRAME)), max_size=8))
@settings(max_examples=60, deadline=None)
def test_whatever_was_read_before_a_range_is_what_was_written(size: int, ranges: list[tuple[int, int]]) -> None:
    """A reader keeps the frame that it read last."""
    content = random.Random(size).randbytes(size)
    file = io.BufferedReader(open_(seal(content)), FRAME)
    for start, count in ranges:
        file.seek(start)
        assert file.read(count) == content[start : start + count]


def _frames(sealed: bytes) -> list[bytes]:
    return [sealed[at : at + WHOLE] for at in range(64, len(sealed), WHOLE)]


def _tamper(choose: random.Random) -> bytes:
    """The file as somebody changed it who knows its format and not its key."""
    header, frames, foreign = SEALED[:64], _frames(SEALED), _frames(OTHER)
    first, second = choose.sample(range(len(frames)), 2)
    kind = choose.randrange(8)
    if kind == 0:
        place = choose.randrange(len(SEALED))
        return SEALED[:place] + bytes([SEALED[place] ^ 1 << choose.randrange(8)]) + SEALED[place + 1 :]
    if kind == 1:
        return SEALED[: choose.randrange(len(SEALED))]
    if kind == 2:
        del frames[first]
    elif kind == 3:
        frames.insert(second, frames[first])
    elif kind == 4:
        frames[first], frames[second] = frames[second], frames[first]
    elif kind == 5:
        frames[first] = foreign[first]
    elif kind == 6:
        header = OTHER[:64]
    else:
        return SEALED + choose.randbytes(choose.randrange(1, 2 * WHOLE))
    return header + b"".join(frames)


@given(st.integers(0, 2**32))
@settings(max_examples=150, deadline=None)
def test_whatever_is_done_to_a_file_is_refused_before_a_byte_of_it_is_used(seed: int) -> None:
    tampered = _tamper(random.Random(seed))
    given = bytearray()

    def use() -> None:
        reader = open_(tampered)
        while piece := reader.read(5000):
            given.extend(piece)

    with pytest.raises((storage.CorruptError, storage.NotFound)):
        use()
    assert CONTENT.startswith(bytes(given))  # what was given before is what was written there
    assert not given or tampered[: 64 + len(given) // FRAME * WHOLE] == SEALED[: 64 + len(given) // FRAME * WHOLE]


def test_a_file_is_of_one_place_and_one_key() -> None:
    for path, key in (
        ("weights-2.bin", KEY),
        ("weights.bin", envelope.DataKey(KEY.id, KEY.secret, "model-2")),
        ("weights.bin", envelope.DataKey(KEY.id, bytes(32), "model")),
        ("weights.bin", envelope.DataKey(bytes([1]) * 16, KEY.secret, "model")),
    ):
        with pytest.raises(storage.CorruptError, match="not authentic"):
            open_(SEALED, path, key).read(1)


def test_a_writer_that_fails_leaves_no_file_that_is_believed(encrypted: Path) -> None:
    uri = str(encrypted / "weights.bin")

    def fail() -> None:
        with storage.open_file(uri, "wb") as file:
            file.write(CONTENT)
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    with pytest.raises(storage.CorruptError):
        storage.read_bytes(uri)


# --- in a place -----------------------------------------------------------------------------------------------


def test_a_file_from_elsewhere_is_refused(encrypted: Path) -> None:
    for run in ("a", "b"):
        for step in (10, 20):
            folder = str(encrypted / run / "stages" / "sft" / "checkpoints" / f"step-{step}")
            storage.begin(folder)
            with storage.open_hashed(f"{folder}/part") as file:
                file.write(b"weights %d" % step)
            storage.commit(folder, {"part": file.digest}, {"step": step})
    checkpoints = encrypted / "a" / "stages" / "sft" / "checkpoints"
    new, old = checkpoints / "step-20", checkpoints / "step-10"
    other = encrypted / "b" / "stages" / "sft" / "checkpoints" / "step-20"
    storage.verify(str(new))
    for source in (old, other):
        for name in ("COMMITTED", "part"):
            before = (new / name).read_bytes()
            (new / name).write_bytes((source / name).read_bytes())
            with pytest.raises(storage.CorruptError, match="another data key"):
                storage.verify(str(new))
            (new / name).write_bytes(before)
    keys = (new / "KEYS").read_bytes()
    for source, why in (
        (old, "a folder named 'step-10'"),
        (other, "is of sft of b, and stands where that of sft of a"),
    ):
        for name in ("KEYS", "COMMITTED", "part"):
            (new / name).write_bytes((source / name).read_bytes())
        with pytest.raises(storage.CorruptError, match=why):
            storage.verify(str(new))
    (new / "KEYS").unlink()
    with pytest.raises(storage.CorruptError):
        storage.verify(str(new))
    for name in ("KEYS", "COMMITTED", "part"):
        (new / name).write_bytes(keys)
    with pytest.raises(storage.CorruptError, match="is not encrypted"):
        storage.verify(str(new))


def test_an_encrypted_file_is_told_where_no_rule_says_so(encrypted: Path) -> None:
    storage.write_text(str(encrypted / "state"), "secret")
    storage.Journal(str(encrypted / "lines")).append({"step": 1})
    rules.use(())
    for name in ("state", "lines"):
        with pytest.raises(storage.NotReadable, match="--storage MANIFEST"):
            storage.read_text(str(encrypted / name))


def test_a_clear_file_is_refused_where_an_encrypted_one_belongs(encrypted: Path) -> None:
    (encrypted / "state.json").write_text('{"state": "done"}')
    (encrypted / "metrics.jsonl").write_text('{"step": 1}\n')
    with pytest.raises(storage.CorruptError, match="is not encrypted"):
        storage.read_document(str(encrypted / "state.json"))
    journal = storage.Journal(str(encrypted / "metrics.jsonl"))
    for use in (journal.read, journal.last, lambda: journal.append({"step": 2})):
        with pytest.raises(storage.CorruptError, match="is not encrypted"):
            use()
    assert (encrypted / "metrics.jsonl").read_text() == '{"step": 1}\n'


@given(st.integers(0, 2**32))
@settings(max_examples=60, deadline=None)
def test_a_journal_whose_lines_were_changed_is_refused(tmp_path_factory: pytest.TempPathFactory, seed: int) -> None:
    folder = tmp_path_factory.mktemp("journal")
    encrypt(str(folder), new_master_key(folder))
    choose = random.Random(seed)
    lines = {}
    for name in ("one", "two"):
        journal = storage.Journal(str(folder / name))
        for step in range(6):
            journal.append({"step": step, "text": "x" * 40})
        lines[name] = (folder / name).read_bytes().splitlines(keepends=True)
    content, kind = lines["one"][:], choose.randrange(6)
    first, second = choose.sample(range(len(content)), 2)
    if kind == 0:
        place = choose.randrange(len(content[first]) - 1)
        content[first] = content[first][:place] + bytes([content[first][place] ^ 1]) + content[first][place + 1 :]
    elif kind == 1:
        content.insert(second, content[first])
    elif kind == 2:
        content[first], content[second] = content[second], content[first]
    elif kind == 3:
        content[first] = lines["two"][first]
    elif kind == 4:
        del content[choose.randrange(len(content) - 1)]
    else:
        content = lines["two"]
    if content == lines["one"]:
        return
    (folder / "one").write_bytes(b"".join(content))
    with pytest.raises(storage.CorruptError):
        storage.Journal(str(folder / "one")).read()
    rules.use(())


def test_a_line_that_was_changed_is_dropped_and_mended_like_a_clear_one(encrypted: Path) -> None:
    journal = storage.Journal(str(encrypted / "metrics.jsonl"))
    for step in range(5):
        journal.append({"step": step})
    extent = storage.extent_of(journal, after=0)
    assert extent is not None
    lines = (encrypted / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    for broken in (lines[2][:-5] + b"AAAA\n", b"\n" * len(lines[2])):
        (encrypted / "metrics.jsonl").write_bytes(b"".join([*lines[:2], broken, *lines[3:]]))
        with pytest.raises(storage.CorruptError, match="line 2"):
            journal.read()
        assert storage.restore(journal, [extent])
        assert [entry["step"] for entry in journal.read()] == [*range(5)]
        lines = (encrypted / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    (encrypted / "metrics.jsonl").write_bytes(b"".join([*lines[:2], lines[3], lines[3], *lines[4:]]))
    assert journal.drop_damaged() is not None
    assert [entry["step"] for entry in journal.read()] == [0, 2, 3, 4]


def test_nothing_of_the_content_is_on_the_disk(encrypted: Path) -> None:
    mark = b"MARKER-of-the-test"
    storage.write_bytes(str(encrypted / "a.json"), mark)
    with storage.open_file(str(encrypted / "deep" / "b.txt"), "w") as file:
        file.write(mark.decode() * 1000)
    journal = storage.Journal(str(encrypted / "c.jsonl"))
    journal.append({"text": mark.decode()})
    with storage.new_folder(str(encrypted / "model")) as folder:
        (Path(folder) / "tokenizer.json").write_bytes(mark)
    storage.copy_folder(str(encrypted / "model"), str(encrypted / "copy"), storage.link_file)
    assert storage.create(str(encrypted / "d"), mark)
    for path in [*encrypted.rglob("*")]:
        assert path.is_dir() or mark not in path.read_bytes()
    assert not [path for path in Path("/dev/shm").glob(".*postlude-new-*") if str(os.getpid()) in path.name]
    assert storage.read_bytes(str(encrypted / "copy" / "tokenizer.json")) == mark
    rules.use(())
    clear = str(encrypted.parent / "clear")
    storage.write_bytes(clear, mark)
    assert Path(clear).read_bytes() == mark  # so that the search means something


def test_a_journal_that_was_copied_can_be_added_to(encrypted: Path) -> None:
    before = storage.Journal(str(encrypted / "before.jsonl"))
    for step in range(5):
        before.append({"step": step})
    for name in ("copy.jsonl", "empty.jsonl"):
        storage.copy_file(before.uri, str(encrypted / name))
    storage.write_bytes(str(encrypted / "empty.jsonl"), b"")
    for name, left in (("copy.jsonl", 5), ("empty.jsonl", 0)):
        journal = storage.Journal(str(encrypted / name))
        journal.append({"step": 9})
        assert [entry["step"] for entry in journal.read()] == [*range(left), 9]
        assert journal.last() == {"step": 9}


@given(st.data())
@settings(max_examples=40, deadline=None)
def test_a_torn_line_of_an_encrypted_journal_is_mended(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("torn")
    encrypt(str(folder), new_master_key(folder))
    file, journal = folder / "metrics.jsonl", storage.Journal(str(folder / "metrics.jsonl"))
    for step in range(3):
        journal.append({"step": step})
    whole = file.read_bytes()
    kept = data.draw(st.integers(0, len(whole)))
    file.write_bytes(whole[:kept])
    steps = list(range(max(0, whole[:kept].count(b"\n") - 1)))
    assert [entry["step"] for entry in journal.read()] == steps
    assert journal.last() == ({"step": steps[-1]} if steps else None)
    journal.append({"step": "next"})
    assert [entry["step"] for entry in journal.read()] == [*steps, "next"]
    rules.use(())


def test_a_range_of_a_long_journal_is_that_of_its_content(encrypted: Path) -> None:
    journal = storage.Journal(str(encrypted / "metrics.jsonl"))
    clear = b""
    for step in range(3000):
        journal.append({"step": step, "text": "y" * (step % 97)})
    clear = storage.read_bytes(journal.uri)
    assert clear.count(b"\n") == 3000
    assert storage.size_bytes(journal.uri) == len(clear)
    choose = random.Random(1)
    for _ in range(50):
        start, count = choose.randrange(len(clear)), choose.randrange(3000)
        assert storage.read_range(journal.uri, start, count) == clear[start : start + count]
        with storage.open_file(journal.uri) as file:
            file.seek(start)
            assert file.read(count) == clear[start : start + count]
    assert storage.read_range(journal.uri, len(clear), 10) == b""


def test_a_copy_in_memory_can_be_mapped_and_has_no_name(encrypted: Path) -> None:
    import pyarrow as pa

    table = pa.table({"text": ["MARKER"] * 10})
    uri = str(encrypted / "rows.arrow")
    with storage.open_file(uri, "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table)
    path = storage.clear_path(uri)
    assert storage.clear_path(uri) == path
    with pa.memory_map(path) as mapped:
        assert pa.ipc.open_file(mapped).read_all() == table
    assert b"MARKER" not in Path(uri).read_bytes()
    assert files.size_bytes(uri) == os.path.getsize(path)
