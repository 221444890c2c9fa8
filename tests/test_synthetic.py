"""The synthetic world does what it says, and its reading of the gates is right where the answer is known."""

import json

import numpy as np
import pytest
import torch

from benchmarks import synthetic


def linear_map_error(latents, cluster, own, source="m0", target="m1"):
    """Share of the target's variance that one linear map from the source leaves, on all items and within cluster 0."""

    def left(rows):
        x, y = latents[source][rows], latents[target][rows]
        x, y = x - x.mean(0), y - y.mean(0)
        return float((y - x @ torch.linalg.lstsq(x, y).solution).square().sum() / y.square().sum())

    return left(torch.ones(len(cluster), dtype=torch.bool)), left(cluster == 0)


def test_without_conflict_one_map_serves_all_clusters_and_with_it_each_needs_its_own():
    errors = {conflict: linear_map_error(*synthetic.world(2, conflict, 0.05, 3000, 0)) for conflict in (0.0, 1.0)}
    everyone, alone = errors[0.0]
    assert everyone == pytest.approx(alone, abs=0.2)  # what is left is the target's own factor
    everyone, alone = errors[1.0]
    assert everyone > alone + 0.15


def test_worlds_are_seeded():
    first, again, other = (synthetic.world(3, 0.5, 0.1, 20, seed)[0] for seed in (0, 0, 1))
    assert all(torch.equal(first[m], again[m]) for m in first) and not torch.equal(first["m0"], other["m0"])


@pytest.mark.parametrize("conflict", [0.0, 0.4, 1.0])
def test_rotations_are_orthogonal(conflict):
    turn = synthetic.rotation(torch.Generator().manual_seed(0), conflict)
    torch.testing.assert_close(turn @ turn.T, torch.eye(synthetic.SHARED), atol=1e-5, rtol=0)


def test_shared_information_of_equal_independent_and_constant_labels():
    generator = np.random.default_rng(0)
    labels, others = generator.integers(5, size=2000), generator.integers(4, size=2000)
    assert synthetic.shared_information(labels, (labels + 2) % 5) == pytest.approx(1.0)
    assert abs(synthetic.shared_information(labels, others)) < 0.01
    assert synthetic.shared_information(labels, np.zeros(2000)) == pytest.approx(0.0, abs=1e-9)


def test_arms_have_equal_active_parameters():
    active = {c["top_k"] * c["moe_intermediate_size"] for c, _ in synthetic.ARMS.values()}
    assert len(active) == 1


def test_a_quick_study_runs_and_is_kept(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    synthetic.main(["--quick"])
    kept = json.loads((tmp_path / "benchmarks/results/synthetic-quick.json").read_text())["worlds"]
    assert set(kept) == {"2/0.0/30", "2/1.0/30"} and set(kept["2/0.0/30"]) == set(synthetic.ARMS)
    assert set(kept["2/0.0/30"]["mixture, joint"]["0"]["gates"]["regression"]) == {"cluster", "own", "direction"}
    assert "alternation's gain" in capsys.readouterr().out
    synthetic.main(["--quick"])  # nothing is run twice
    assert ": " not in capsys.readouterr().out.split("mean recall")[0]
