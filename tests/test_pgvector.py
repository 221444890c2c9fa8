"""PostgreSQL alone: its index, its connections, and its secrets, which nobody is told."""

import numpy as np
import pytest
import torch
from database_servers import PASSWORD, QUOTED
from database_tables import (
    ENTRY,
    assert_same,
    everything,
    queries,
    scored,
    write_rows,
)

from modeling_altmoe import LatentStore
from modeling_altmoe.search_altmoe import LatentIndex, open_index
from serving import databases, ingest
from trainer.cli import main


@pytest.fixture
def store(tmp_path):
    return write_rows(tmp_path / "store")


@pytest.fixture(scope="module")
def model():
    return scored()


def test_no_secret_is_told(postgres, store, model, capsys):
    wrong = postgres.replace(QUOTED, "wr0ng%2Fword") + "?table=t"
    with pytest.raises(ConnectionError, match="password authentication failed") as caught:
        databases.open_table(wrong)
    assert "wr0ng" not in everything(caught.value)
    with pytest.raises(RuntimeError, match='invalid URI query parameter: "nosuch"') as caught:
        databases.open_table(f"{postgres}?table=t&nosuch={PASSWORD.replace('/', '%2F')}")
    assert PASSWORD not in everything(caught.value)
    with pytest.raises(SystemExit):
        main(["import", wrong, "--modality", "image", "--like", str(store.path), "--out", str(store.path) + "2"])
    assert "wr0ng" not in "".join(capsys.readouterr())
    url = f"{postgres}?table=secrets"
    ingest.ingest(store, url, model, progress=False)
    table = databases.open_table(url)
    index = open_index(model, None, "text->image", url)
    for told in (table.address, repr(table.address), index.describe(), table.description):
        assert PASSWORD not in str(told) and QUOTED not in str(told) and "altmoe:" not in str(told)


def test_a_database_without_pgvector_says_how_to_get_it(postgres):
    import psycopg

    with psycopg.connect(postgres, autocommit=True) as connection:
        connection.execute("CREATE DATABASE plain")
    with pytest.raises(RuntimeError, match=r"has no pgvector.*CREATE EXTENSION vector"):
        databases.open_table(postgres.replace("/postgres", "/plain") + "?table=t")


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_pgvector_answers_from_its_index_and_under_rare_conditions_finds_all(
    postgres, model, tmp_path, monkeypatch, dtype
):
    monkeypatch.setattr(databases, "FEW", 0)
    rows, url = 3000, f"{postgres}?table=many_{dtype}"
    with LatentStore.create(tmp_path, "image", ENTRY, dtype=dtype, columns={"part": "int64"}) as store:
        latents = torch.nn.functional.normalize(torch.randn(rows, 24), dim=-1)
        store.append([str(n) for n in range(rows)], latents, part=[n % 500 for n in range(rows)])
    ingest.ingest(store, url, model, progress=False)
    index = open_index(model, None, "text->image", url)
    table = index.backend.table
    with table._session() as connection:
        connection.execute("SET LOCAL enable_seqscan = off")  # few enough rows for the planner to read them all
        plan = connection.execute(
            f"EXPLAIN {table._nearest_query(10, None).as_string(connection)}".replace("%s", f"'{[1] * 24}'")
        )
        assert f"Index Scan using many_{dtype}" in "".join(line for (line,) in plan)
        assert table.kind == ("halfvec" if dtype == "float16" else "vector") and table.index == "hnsw"
    exact = LatentIndex(model, store, "text->image", "exact")
    assert_same(index.search(queries(3), 5, {"part": 77}), exact.search(queries(3), 5, {"part": 77}), columns=False)
    vectors = torch.nn.functional.normalize(torch.randn(20, 24), dim=-1)
    nearest = (vectors @ latents.T).topk(100).indices.tolist()
    found = table.nearest(vectors.numpy(), 100, None)
    assert np.mean([len({int(key) for key in a} & set(b)) for a, b in zip(found, nearest, strict=True)]) > 95
    assert torch.equal(
        store.take(store.rows_of(["5"])), torch.from_numpy(table.fetch(["5"], None, True)["5"].latent[None])
    )


def test_latents_too_wide_for_an_index_are_searched_row_by_row(postgres, tmp_path):
    url = f"{postgres}?table=wide"
    latents = torch.nn.functional.normalize(torch.randn(20, 4100), dim=-1)
    with LatentStore.create(tmp_path, "image", {"latent_size": 4100}) as store:
        store.append([str(n) for n in range(20)], latents)
    ingest.ingest(store, url, progress=False)
    table = databases.open_table(url)
    assert table.index is None and table.nearest(latents[3:5].numpy(), 2, None)[1][0] == "4"
    assert torch.equal(torch.from_numpy(table.fetch(["7"], None, True)["7"].latent), latents[7])


def test_a_lost_connection_is_made_again(postgres, store, model):
    import psycopg

    url = f"{postgres}?table=lost"
    ingest.ingest(store, url, model, progress=False)
    index = open_index(model, None, "text->image", url)
    with psycopg.connect(postgres, autocommit=True) as connection:
        connection.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid <> pg_backend_pid() AND datname = 'postgres'"
        )
    with pytest.raises(ConnectionError, match=r"postgresql://127\.0\.0\.1"):
        index.search(queries(1), 1)
    assert len(index.search(queries(1), 1)[0]) == 1
