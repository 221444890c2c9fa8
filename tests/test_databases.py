"""Databases: the same results as in this process, from real servers; nothing doubled, missing or injected."""

import itertools
import signal
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch
from database_servers import PASSWORD, QUOTED, free_port, milvus_server
from database_tables import (
    COLUMNS,
    ENTRY,
    NASTY,
    ROWS,
    assert_same,
    columns_of,
    everything,
    ids_of,
    queries,
    scored,
    write_rows,
)

from modeling_altmoe import LatentStore
from modeling_altmoe.search_altmoe import LatentIndex, open_index
from serving import databases, ingest
from trainer.cli import main

numbers = itertools.count()


@pytest.fixture(scope="module")
def milvus():
    pytest.importorskip("pymilvus")
    with milvus_server() as address:
        yield address


@pytest.fixture(params=["postgres", "milvus", "milvus file"])
def url(request, tmp_path):
    """The address of a table that does not exist yet, in each kind of database."""
    name = f"t{next(numbers)}"
    if request.param == "postgres":
        return f"{request.getfixturevalue('postgres')}?table={name}"
    if request.param == "milvus":
        return f"{request.getfixturevalue('milvus')}/{name}"
    pytest.importorskip("milvus_lite")
    return f"milvus://{tmp_path}/lite.db?collection={name}"


@pytest.fixture(params=["postgres", "milvus"])
def server_url(request):
    """The same, of the servers only."""
    join = "?table=" if request.param == "postgres" else "/"
    return f"{request.getfixturevalue(request.param)}{join}t{next(numbers)}"


@pytest.fixture
def store(tmp_path):
    return write_rows(tmp_path / "store")


@pytest.fixture(scope="module")
def model():
    return scored()


def test_results_are_those_of_the_exact_index_in_this_process(url, store, model):
    """Both directions, hubness, confidence, metadata; with the scalars that were stored and with another model's."""
    assert ingest.ingest(store, url, model, progress=False) == {
        "written": ROWS,
        "present": 0,
        "deleted": 0,
        "rows": ROWS,
    }
    expected = LatentIndex(model, store, "text->image", "exact").search(queries(), 5)
    index = open_index(model, None, "text->image", url, short_list=ROWS)
    assert index.backend.hubness == "altmoe_hubness_text_to_image"
    found = index.search(queries(), 5)
    assert_same(found, expected)
    assert all(hit.row is None for hits in found for hit in hits)
    other = scored(seed=1)  # its hubness is not the stored one: it is measured on the short list
    index = open_index(other, None, "text->image", url, short_list=ROWS)
    assert index.backend.hubness is None
    assert_same(index.search(queries(2), 5), LatentIndex(other, store, "text->image", "exact").search(queries(2), 5))
    local = open_index(model, store, "text->image", url, short_list=ROWS)  # latents read from the store
    found = local.search(queries(2), 5)
    assert_same([*found], expected[:2], columns=False)
    assert [hit.row for hit in found[0]] == store.rows_of([hit.id for hit in found[0]]).tolist()


def test_the_stored_hubness_is_what_counts(url, store, model):
    ingest.ingest(store, url, model, progress=False)
    index = open_index(model, None, "text->image", url, short_list=ROWS)
    fetched = index.backend.nearest(np.eye(24, dtype=np.float32)[:2], 30, None)
    from modeling_altmoe.scoring_altmoe import item_vectors

    post = model.postprocessing("text->image")
    measured = item_vectors(model, post, "text->image", store.take(store.rows_of(fetched.ids)))[:, -1]
    assert measured.std() > 0.01
    torch.testing.assert_close(fetched.hubness, measured, atol=1e-5, rtol=0)


CONDITIONS = [
    *({"title": title} for title in NASTY),
    {"title": NASTY},
    {"title": {"ne": NASTY[0]}},
    {"title": {"ge": "a", "lt": "it"}},
    {"year": 1995, "sold": True},
    {"year": {"ge": 2000, "lt": 2010}},
    {"year": [1991, 1992, 2029]},
    {"price": {"gt": 3.05, "ne": 4.0}},
    {"price": 1.25},
    {"sold": False},
    {"seen": {"lt": "2023-12-01 00:00:00"}},
    {"id": ids_of(0, 12)},
    {"id": "no such id"},
]


@pytest.mark.parametrize("few", [1000, 0])
def test_conditions_leave_what_they_leave_in_this_process(url, store, model, few, monkeypatch):
    """Quotes, backslashes, other scripts and attempts at injection are values like any other."""
    monkeypatch.setattr(databases, "FEW", few)  # 0: the database's own index answers
    ingest.ingest(store, url, model, progress=False)
    exact = LatentIndex(model, store, "text->image", "exact")
    index = open_index(model, None, "text->image", url, short_list=ROWS)
    for where in CONDITIONS if few else [{"sold": True}, {"title": {"ne": NASTY[0]}}]:
        expected = exact.search(queries(2), 6, where)
        assert_same(index.search(queries(2), 6, where), expected)
    assert open_index(model, None, "text->image", url).backend.table.count() == ROWS
    with pytest.raises(ValueError, match="no column 'titel'"):
        index.search(queries(1), where={"titel": "x"})


def test_an_ingest_that_was_killed_goes_on_and_doubles_nothing(postgres, milvus, store, monkeypatch):
    """One process writes into both databases and is killed in the middle of the third batch of each."""
    urls = [f"{postgres}?table=killed", f"{milvus}/killed"]
    script = f"""
    import os, signal, threading
    from modeling_altmoe import LatentStore
    from serving import databases, ingest
    ingest.BATCH_BYTES = 50 * 4 * 24  # 50 rows
    both = threading.Barrier(2)
    def send(url):
        written, kind = [], type(databases.open_table(url))
        def write(self, rows, whole=kind.write):
            whole(self, rows[:20] if len(written) == 2 else rows)
            written.append(len(rows))
            if len(written) == 3:
                both.wait()
                os.kill(os.getpid(), signal.SIGKILL)
        kind.write = write
        ingest.ingest(LatentStore.open({str(store.path)!r}), url, progress=False)
    threads = [threading.Thread(target=send, args=[url]) for url in {urls!r}]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    monkeypatch.setattr(ingest, "BATCH_BYTES", 64 * 4 * 24)
    for url in urls:
        assert databases.open_table(url).count() == 120
        counts = ingest.ingest(store, url, progress=False)
        assert counts == {"written": ROWS - 120, "present": 120, "deleted": 0, "rows": ROWS}
        table = databases.open_table(url)
        assert sorted(itertools.chain(*table.ids(37))) == sorted(store.ids)
        latents = {}
        for ids, vectors, columns in table.pages(64):
            latents.update(zip(ids, vectors, strict=True))
            assert columns["title"] == [store.columns_of(row)["title"] for row in store.rows_of(ids)]
        np.testing.assert_array_equal(np.stack([latents[name] for name in store.ids]), store.latents().numpy())


def test_what_changed_in_the_store_is_carried_over(url, store, model, monkeypatch):
    ingest.ingest(store, url, model, progress=False)
    with store:
        gone = store.ids[3:9]
        store.delete(gone)
        changed = torch.nn.functional.normalize(torch.ones(2, 24), dim=-1)
        store.append([gone[0], "new"], changed, **columns_of(0, 2))
    with pytest.raises(ValueError, match=r"holds items that .* does not .*run 'altmoe index' on the store again"):
        open_index(model, store, "text->image", url, short_list=ROWS).search(queries(1), 5)
    assert ingest.ingest(store, url, model, progress=False) == {
        "written": 2,
        "present": ROWS - 6,
        "deleted": 5,
        "rows": ROWS - 4,
    }
    index = open_index(model, None, "text->image", url, short_list=ROWS)
    assert_same(index.search(queries(2), 5), LatentIndex(model, store, "text->image", "exact").search(queries(2), 5))
    other = scored(seed=1)
    again = ingest.ingest(store, url, other, progress=False)  # another model: its own scalars, everywhere
    assert again["written"] == ROWS - 4
    monkeypatch.setattr(databases, "AS_OF", -1.0)  # as a minute later: the open index notices whose scalars they are
    assert_same(index.search(queries(2), 5), LatentIndex(model, store, "text->image", "exact").search(queries(2), 5))
    assert index.backend.hubness is None
    assert open_index(other, None, "text->image", url).backend.hubness is not None


def foreign(url: str, latents: np.ndarray) -> str:
    """A table as somebody else made it: whole numbers as ids, own names; the address's options that it needs."""
    address = databases.parse_url(url)
    titles = columns_of(0, len(latents))["title"]
    if address.scheme == "postgresql":
        import psycopg

        with psycopg.connect(address.url, autocommit=True) as connection:
            kinds = 'doc bigint PRIMARY KEY, title text, "the price" numeric, extra jsonb, embedding vector(24)'
            connection.execute(f"CREATE TABLE {address.table} ({kinds})")
            connection.execute(f"CREATE INDEX ON {address.table} USING hnsw (embedding vector_ip_ops)")
            for number, latent in enumerate(latents.tolist()):
                connection.execute(
                    f"INSERT INTO {address.table} VALUES (%s, %s, %s, %s, %s::vector)",
                    [number, titles[number], number / 4, '{"a": 1}', str(latent)],
                )
            connection.execute(f"INSERT INTO {address.table} (doc) VALUES (-1)")  # without a vector
        return "&columns=title,the%20price"
    from pymilvus import DataType

    client = databases.open_table(url).client
    schema = client.create_schema(auto_id=False)
    schema.add_field("doc", DataType.INT64, is_primary=True)
    schema.add_field("embedding", DataType.FLOAT_VECTOR, dim=24)
    schema.add_field("title", DataType.VARCHAR, max_length=99, nullable=True)
    index = client.prepare_index_params()
    index.add_index("embedding", index_type="FLAT", metric_type="IP")
    client.create_collection(address.table, schema=schema, index_params=index)
    rows = [{"doc": n, "embedding": latent, "title": titles[n]} for n, latent in enumerate(latents)]
    client.upsert(address.table, rows)
    return "&columns=title"


def test_a_table_of_somebody_else_is_searched_as_it_is(url, store, model):
    options = foreign(url, store.latents().numpy())
    url += ("&" if "?" in url else "?") + options[1:]
    fingerprint = store.fingerprint
    with pytest.raises(ValueError, match=rf"nothing says which one. If they were, add protocol={fingerprint}"):
        open_index(model, None, "text->image", url)
    with pytest.raises(ValueError, match="the address says 0123"):
        open_index(model, None, "text->image", url + "&protocol=0123")
    index = open_index(model, None, "text->image", f"{url}&protocol={fingerprint}", short_list=ROWS)
    expected = LatentIndex(model, store, "text->image", "exact")
    for where in (None, {"title": NASTY[1]}, {"id": ["3", "77"]}):
        local = where if where is None or "id" not in where else {"id": [store.ids[3], store.ids[77]]}
        for hits, others in zip(index.search(queries(3), 5, where), expected.search(queries(3), 5, local), strict=True):
            assert [int(hit.id) for hit in hits] == [hit.row for hit in others]
            assert [hit.columns["title"] for hit in hits] == [hit.columns["title"] for hit in others]
            np.testing.assert_allclose([h.score for h in hits], [h.score for h in others], atol=1e-4)
    with pytest.raises(ValueError, match="was not made by altmoe"):
        ingest.ingest(store, url, model)
    with pytest.raises(ValueError, match="no column"):
        databases.open_table(url.replace("columns=title", "columns=titel"))


def test_a_table_becomes_a_store_with_its_vectors_ids_and_columns(url, store, tmp_path, capsys):
    options = foreign(url, store.latents().numpy())
    source = url + ("&" if "?" in url else "?") + options[1:]
    arguments = ["import", source, "--modality", "image", "--like", str(store.path), "--out", str(tmp_path / "out")]
    main(arguments)
    main(arguments)  # nothing is doubled
    assert f"{ROWS} latents (0 new, {ROWS} already there" in capsys.readouterr().out
    imported = LatentStore.open(tmp_path / "out")
    assert sorted(imported.ids, key=int) == [str(n) for n in range(ROWS)]
    rows = imported.rows_of([str(n) for n in range(ROWS)])
    assert torch.equal(imported.take(rows), store.latents())
    assert imported.column("title", rows) == store.column("title")
    if "the%20price" in source:
        assert imported.column("the price", rows) == [n / 4 for n in range(ROWS)]


def test_what_was_ingested_comes_back_as_a_store(url, store, tmp_path):
    ingest.ingest(store, url, progress=False)
    main(["import", url, "--modality", "image", "--like", str(store.path), "--out", str(tmp_path / "out")])
    back = LatentStore.open(tmp_path / "out")
    rows = back.rows_of(store.ids)
    assert torch.equal(back.take(rows), store.latents())
    for name in ("title", "year", "price", "sold"):
        assert back.column(name, rows) == store.column(name)
    assert back.column("seen", rows) == [str(date) for date in store.column("seen")]


def test_an_address_says_what_it_lacks():
    for url, message in (
        ("mysql://host/db?table=t", "expected postgresql://... or milvus://"),
        ("postgresql://user:secret@host/db", r"postgresql://host/db names no table: expected .*\?table=NAME"),
        ("milvus://user:secret@host:19530", "milvus://HOST:PORT/COLLECTION"),
        ("milvus:///folder/file.db", "collection=NAME"),
    ):
        with pytest.raises(ValueError, match=message) as caught:
            databases.parse_url(url)
        assert "secret" not in str(caught.value)


@pytest.mark.parametrize("kind", ["postgresql", "milvus"])
def test_nothing_answers(kind):
    where = f"{kind}://user:{QUOTED}@127.0.0.1:{free_port()}/x?table=t"
    pytest.importorskip("psycopg" if kind == "postgresql" else "pymilvus")
    with pytest.raises(ConnectionError, match=rf"{kind}://127.0.0.1:\d+/?x? ?.*'t'\)") as caught:
        databases.open_table(where)
    assert PASSWORD not in everything(caught.value) and QUOTED not in everything(caught.value)


def test_what_does_not_fit_is_said_in_a_sentence(server_url, store, model, tmp_path):
    with pytest.raises(ValueError, match=r"does not exist. Make it with 'altmoe index"):
        open_index(model, None, "text->image", server_url)
    ingest.ingest(store, server_url, model, progress=False)
    with pytest.raises(ValueError, match="holds 'image' latents, expected 'text'"):
        open_index(model, None, "image->text", server_url)
    for name, entry, message in (
        ("wide", {"latent_size": 25}, "width 24, expected 25"),
        ("other", {**ENTRY, "protocol": {"pooling": "cls"}}, "pooling: expected 'cls', got 'mean'"),
    ):
        foreign_store = LatentStore.create(tmp_path / name, "image", entry, columns=COLUMNS)
        with pytest.raises(ValueError, match=message):
            ingest.ingest(foreign_store, server_url)
    other = LatentStore.create(tmp_path / "columns", "image", ENTRY, columns={"title": "string"})
    with pytest.raises(ValueError, match="was made with columns="):
        ingest.ingest(other, server_url)
    named = LatentStore.create(tmp_path / "named", "image", ENTRY, columns={"100 %": "string"})
    with pytest.raises(ValueError, match=r"has a name of .*not '100 %'"):
        ingest.ingest(named, server_url + "x")
