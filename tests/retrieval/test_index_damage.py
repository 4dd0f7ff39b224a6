"""What can go wrong with an index: bad input, foreign, newer and damaged folders, a full disk,
interruptions, two writers. An index that was whole before stays whole.
"""

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys

import pytest
from index_tools import WORDS, counted, make_corpus, make_documents

from fullrank.core import Corpus, Document, InputError, LockedError, StoreError
from fullrank.core.locking import write_lock
from fullrank.retrieval import Encoder, Index, index_build, index_manifest, index_vectors

QUERIES = {"q1": "matrix rank", "q2": "alpha omega spectrum"}


@pytest.fixture(scope="module")
def encoder(tiny_encoder):
    return Encoder(tiny_encoder(*WORDS))


@pytest.fixture(scope="module")
def whole(encoder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "index"
    return Index.create(folder, make_corpus(12), {"tiny": encoder}, progress=False)


@pytest.fixture
def folder(whole, tmp_path):
    return shutil.copytree(whole.folder, tmp_path / "index")


def results(folder):
    index = Index.open(folder)
    index.verify()
    return list(index.corpus), index.search(QUERIES, 20, system="bm25").to_dict()


# -- documents -------------------------------------------------------------------------------


def test_an_empty_corpus_and_one_document(encoder, tmp_path):
    with pytest.raises(InputError, match="the corpus is empty"):
        Index.create(tmp_path / "i", Corpus([], []), {"tiny": encoder})
    with pytest.raises(InputError, match=r"is a list, not a fullrank\.core\.Corpus"):
        Index.create(tmp_path / "i", ["text"], {"tiny": encoder})
    assert not (tmp_path / "i").exists()
    one = Index.create(tmp_path / "i", Corpus(["a"], ["matrix"]), {"tiny": encoder}, progress=False)
    for system in one.systems:
        assert one.search("matrix", system=system)["q"].ids.tolist() == ["a"]


def test_documents_without_words(encoder, tmp_path):
    corpus = Corpus(["a", "b"], ["", "?!"])
    index = Index.create(tmp_path / "i", corpus, {"tiny": encoder}, progress=False)
    assert len(index.search("matrix", system="bm25")["q"]) == 0
    assert len(index.search("matrix", system="dense")["q"]) == 2
    assert index.snippet("matrix", "a") == ""


@pytest.mark.parametrize("bad", ["a b", "", "a\n", "\u2003x", 7])
def test_bad_ids(bad):
    with pytest.raises(InputError, match="document id"):
        Corpus(["ok", bad], ["x", "y"])


def test_repeated_ids():
    with pytest.raises(InputError, match="'a' occurs twice"):
        Corpus(["a", "b", "a"], ["x", "y", "z"])


def test_a_document_of_a_megabyte(tmp_path, encoder):
    text = "alpha beta " * 95_000 + "spectrum"
    corpus = Corpus(["big", "small"], [text, "beta matrix"])
    index = Index.create(tmp_path / "i", corpus, None, progress=False)
    assert index.search("spectrum")["q"].ids.tolist() == ["big"]
    assert len(index.snippet("alpha", "big")) <= 240
    assert Index.open(index.folder).corpus["big"].text == text
    part = Corpus(["big", "small"], [text[-100_000:], "beta matrix"])
    index = Index.create(tmp_path / "j", part, {"tiny": encoder}, progress=False)
    assert "spectrum" in index.snippet("spectrum", "big", system="bm25") + index.snippet(
        "spectrum", "big", system="dense"
    )


@pytest.mark.parametrize(
    ("document", "message"),
    [
        (Document("x", "broken \ud800"), "its text is no valid Unicode at character 7"),
        (Document("x", "", "\udcff"), "its title is no valid Unicode"),
        (Document("x\ud800", "t"), "its id is no valid Unicode"),
        (Document("x", "t", metadata={"a": object()}), "cannot be stored as JSON"),
        (Document("x", "t", metadata={"a": float("nan")}), "cannot be stored as JSON"),
        (Document("x", "t", metadata={"a": b"bytes"}), "cannot be stored as JSON"),
    ],
)
def test_documents_that_cannot_be_stored(folder, tmp_path, document, message):
    before = results(folder)
    for write in (
        lambda: Index.create(tmp_path / "n", Corpus.from_documents([document]), None),
        lambda: Index.open(folder).update([document]),
    ):
        with pytest.raises(InputError, match=message):
            write()
    assert results(folder) == before


def test_metadata_of_all_kinds(tmp_path):
    odd = [{"n": 1}, {"n": 2.5, "weird name": 1, "huge": 2**70}, {"n": None, "m": 1, "s": "é"}, {}]
    mixed = [{}, {"m": "text"}, {"d": {"a": [1]}}, {"e": []}]
    metadata = [a | b for a, b in zip(odd, mixed, strict=True)]
    corpus = Corpus(list("abcd"), ["xx"] * 4, metadata=metadata)
    index = Index.create(tmp_path / "i", corpus, None, progress=False)
    assert [d.metadata for d in Index.open(index.folder).corpus] == metadata
    assert index.search("xx", where={"n": {">": 1}})["q"].ids.tolist() == ["b"]
    assert index.search("xx", where="s=é")["q"].ids.tolist() == ["c"]
    assert index.search("xx", where="weird name = 1")["q"].ids.tolist() == ["b"]
    for field in ("m", "huge", "d", "nope"):
        with pytest.raises(InputError, match="cannot be filtered by"):
            index.search("xx", where={field: 1})


@pytest.mark.parametrize("field", ["année", "a.b", "1st", "meta_a", "utf8_a", "x'; --", "A", "💡"])
def test_fields_of_any_name(tmp_path, field):
    metadata = [{field: "x", "a": "y"}, {field: "y"}, {"a": "x"}]
    index = Index.create(
        tmp_path / "i", Corpus(list("abc"), ["xx"] * 3, metadata=metadata), None, progress=False
    )
    assert [d.metadata for d in Index.open(index.folder).corpus] == metadata
    assert index.search("xx", where={field: "x"})["q"].ids.tolist() == ["a"]
    assert index.search("xx", where=f"{field}=y")["q"].ids.tolist() == ["b"]
    with pytest.raises(InputError, match=f"there is .*{re.escape(repr(field))}"):
        index.search("xx", where={"nope": 1})


# -- folders ---------------------------------------------------------------------------------


def test_folders_that_are_no_index(folder, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("x")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "manifest.json").write_text('{"name": "an extension"}')
    (tmp_path / "list").mkdir()
    (tmp_path / "list" / "manifest.json").write_text("[1]")
    for name, message in [
        ("absent", "no such folder"),
        ("empty", "it has no manifest.json"),
        ("file", "is a file"),
        ("other", "is of something else"),
        ("list", "is of something else"),
        (".", f"{folder.name} is one: give that folder"),
    ]:
        with pytest.raises(StoreError, match=message):
            Index.open(tmp_path / name)


def test_creating_into_what_is_no_index(tmp_path, whole):
    corpus = make_corpus(2)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("x")
    (tmp_path / "web").mkdir()
    (tmp_path / "web" / "manifest.json").write_text("{")
    (tmp_path / "file").write_text("x")
    for name, message in [
        ("full", "not empty and no index.*thesis.tex"),
        ("web", "damaged"),
        ("file", "cannot make the folder"),
        ("file/inside", "cannot make the folder"),
    ]:
        with pytest.raises(StoreError, match=message):
            Index.create(tmp_path / name, corpus, None)
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["thesis.tex"]
    assert [path.name for path in (tmp_path / "web").iterdir()] == ["manifest.json"]


def edit(folder, checksum=True, **changes):
    path = folder / "manifest.json"
    body = json.loads(path.read_text()) | changes
    del body["checksum"]
    path.write_text(json.dumps({**body, "checksum": index_manifest._checksum(body)}))


def test_an_index_of_a_newer_version(folder):
    edit(folder, version=2, written_by="9.9", something="new")
    kept = sorted(folder.rglob("*"))
    for use in (
        lambda: Index.open(folder),
        lambda: Index.create(folder, make_corpus(2), None),
    ):
        with pytest.raises(StoreError, match=r"newer fullrank \(9.9, index format 2\).*upgrade"):
            use()
    assert sorted(folder.rglob("*")) == kept


def test_every_file_cut_short_is_noticed_and_can_be_made_again(whole, folder, encoder):
    expected = results(folder)
    manifest = whole.manifest
    files = [f"generations/{manifest.generation:06d}/{name}" for name in manifest.files]
    assert len(files) > 10
    for name in ["manifest.json", *files]:
        path = folder / name
        data = path.read_bytes()
        path.write_bytes(data[: len(data) // 2])
        with pytest.raises(StoreError, match=r"damaged: .*; restore it"):
            Index.open(folder)
        path.unlink()
        with pytest.raises(StoreError, match=r"damaged: .*missing|not finished"):
            Index.open(folder)
        path.write_bytes(data)
    assert results(folder) == expected
    path.write_bytes(b"")
    again = Index.create(folder, make_corpus(12), {"tiny": encoder}, progress=False)
    assert results(again.folder) == expected
    assert len(list((folder / "generations").iterdir())) == 1


def test_a_changed_byte_is_found_and_not_carried_on(whole, folder):
    generation = folder / f"generations/{whole.manifest.generation:06d}"
    for name in whole.manifest.files:
        path = generation / name
        data = path.read_bytes()
        path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        index = Index.open(folder)
        with pytest.raises(StoreError, match=f"{path.name} is not what was written"):
            index.verify()
        with pytest.raises(StoreError, match="is not what was written"):
            index.add([Document("new", "x")])
        path.write_bytes(data)
    text = (folder / "manifest.json").read_text()
    (folder / "manifest.json").write_text(text.replace('"depth": 100', '"depth": 101'))
    with pytest.raises(StoreError, match=r"damaged: manifest.json is not what was written"):
        Index.open(folder)
    edit(folder, documents="many")
    with pytest.raises(StoreError, match=r"damaged: manifest.json, documents"):
        Index.open(folder)


# -- a full disk -----------------------------------------------------------------------------


def full_disk(*arguments, **keywords):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize(
    ("module", "name"),
    [
        (index_build, "write_documents"),
        (index_build.BM25, "save"),
        (index_vectors.VectorCache, "put"),
        (index_build, "write_vectors"),
        (index_build, "write_passages"),
        (index_build, "commit"),
        (index_manifest, "atomic_write"),
    ],
)
@pytest.mark.parametrize("change", ["create", "replace", "add"])
def test_a_full_disk(folder, tmp_path, encoder, monkeypatch, change, module, name):
    before = results(folder)
    where = tmp_path / "new" if change == "create" else folder

    def write():
        if change == "add":
            return Index.open(where, encoders={"tiny": encoder}).add(make_documents(3, 50))
        return Index.create(where, make_corpus(9, 70), {"tiny": encoder}, progress=False)

    with monkeypatch.context() as patch:
        patch.setattr(module, name, full_disk)
        with pytest.raises(StoreError, match=r"the disk is full.*free some space"):
            write()
    assert results(folder) == before
    assert len(list((where / "generations").iterdir())) == (change != "create")
    write()
    assert len(results(where)[0]) == (15 if change == "add" else 9)


def test_lance_says_that_the_disk_is_full(tmp_path, monkeypatch):
    from fullrank.retrieval import index_tables

    class Full:
        def create_table(self, *arguments):
            raise RuntimeError("lance error: LanceError(IO): No space left (os error 28), x.rs:1")

    monkeypatch.setattr(index_tables, "_connect", lambda folder: Full())
    with pytest.raises(StoreError, match="the disk is full"):
        Index.create(tmp_path / "i", make_corpus(2), None)


# -- interruptions -------------------------------------------------------------------------------


def interrupt(call, at):
    try:
        counted(call, at)
    except KeyboardInterrupt:
        return True
    return False


def state(folder):
    try:
        return results(folder)
    except StoreError as error:
        return (
            "none"
            if re.search("not finished|no such folder|has no manifest", str(error))
            else error
        )


@pytest.mark.parametrize("change", ["create", "replace", "add", "configure"])
def test_ctrl_c_at_any_moment(folder, tmp_path, encoder, change):
    before = results(folder)

    def write(where):
        if change == "add":
            Index.open(where, encoders={"tiny": encoder}).add(make_documents(2, 50))
        elif change == "configure":
            Index.open(where).configure(depth=5)
        else:
            Index.create(where, make_corpus(9, 70), {"tiny": encoder}, progress=False)

    def place(name):
        if change == "create":
            return tmp_path / name
        return shutil.copytree(folder, tmp_path / name)

    where = place("dry")
    lines = counted(lambda: write(where))
    after = results(where)
    assert lines > 50
    stopped = 0
    for at in [*range(1, lines, max(1, lines // 8)), lines]:
        where = place(f"at{at}")
        stopped += interrupt(lambda where=where: write(where), at)
        if change == "create":
            assert state(where) in (after, "none")
        else:
            assert results(where) in (before, after)
        if change == "add" and len(results(where)[0]) == len(after[0]):
            continue  # added already
        write(where)
        assert results(where) == after
        assert len(list((where / "generations").iterdir())) == 1
        shutil.rmtree(where)
    assert stopped >= 8


def test_encoding_goes_on_where_it_was_interrupted(tmp_path, encoder, monkeypatch):
    monkeypatch.setattr(index_vectors, "_CHUNK", 4)
    encoded = []
    original = Encoder.encode

    def encode(self, texts, **keywords):
        if len(encoded) == 12:
            raise KeyboardInterrupt
        encoded.extend(texts)
        return original(self, texts, **keywords)

    monkeypatch.setattr(Encoder, "encode", encode)
    corpus = make_corpus(30)
    with pytest.raises(KeyboardInterrupt):
        Index.create(tmp_path / "i", corpus, {"tiny": encoder}, progress=False)
    with pytest.raises(StoreError, match="was not finished; run it again, it continues"):
        Index.open(tmp_path / "i")
    torn = tmp_path / "i" / ".work" / encoder.key[:24] / "torn.npy"
    torn.write_bytes(b"\x93NUMPY\x01\x00")
    encoded.append("past the point")
    Index.create(tmp_path / "i", corpus, {"tiny": encoder}, progress=False)
    assert len(encoded) == 12 + 1 + 18
    assert not (tmp_path / "i" / ".work").exists()


# -- two writers ---------------------------------------------------------------------------------

HOLD = """
import sys, time
from pathlib import Path
from fullrank.core.locking import write_lock
with write_lock(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_two_writers(folder, encoder):
    before = results(folder)
    writer = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert writer.stdout.readline() == "held\n"
        for write in (
            lambda: Index.create(folder, make_corpus(3), {"tiny": encoder}, progress=False),
            lambda: Index.open(folder).delete(["d1"]),
            lambda: Index.open(folder).configure(depth=3),
        ):
            with pytest.raises(LockedError, match=f"written to by process {writer.pid} on .*wait"):
                write()
        assert results(folder) == before
    finally:
        writer.send_signal(signal.SIGKILL)
        writer.wait()
    Index.open(folder).delete(["d1"])  # a dead process holds nothing
    assert len(results(folder)[0]) == 11


def test_two_threads(folder):
    with write_lock(folder):
        (folder / ".fullrank.owner").write_text("{torn")
        with pytest.raises(LockedError, match="by another process"):
            Index.open(folder).delete(["d1"])
    Index.open(folder).delete(["d1"])


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written_to(folder):
    folder.chmod(0o555)
    try:
        assert Index.open(folder).search("matrix", system="bm25")["q"].ids.size
        with pytest.raises(StoreError, match="cannot be written to"):
            Index.open(folder).delete(["d1"])
    finally:
        folder.chmod(0o755)
