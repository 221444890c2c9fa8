"""Baselines learn what is there to learn, learn nothing from shuffled pairs, and keep to one protocol."""

import pytest
import torch
import torch.nn.functional as F

from modeling_altmoe.scoring_altmoe import score_matrix
from trainer.baselines import BASELINES, CCA, TRIALS, Chance, KernelRidge, LinearInfoNCE, Ridge
from trainer.closed_form import fit_closed_form
from trainer.evaluation import RetrievalData, evaluate_retrieval, fit_postprocessing

LEARNING = [name for name in BASELINES if name != "chance"]


def world(n, seed, n_groups=None):
    """Two linear views of the same hidden vectors, with noise; rows of one group have the same hidden vector."""
    fixed = torch.Generator().manual_seed(99)
    views = {"image": torch.randn(8, 14, generator=fixed), "text": torch.randn(8, 10, generator=fixed)}
    generator = torch.Generator().manual_seed(seed)
    groups = torch.arange(n) % (n_groups or n)
    hidden = torch.randn(n, 8, generator=generator)[groups]
    return {
        m: hidden @ view + 0.3 * torch.randn(n, view.shape[1], generator=generator) for m, view in views.items()
    }, groups


def validation_and_test():
    return (RetrievalData.from_groups(*world(n, seed)) for n, seed in ((30, 1), (60, 2)))


def make(name):
    baseline = BASELINES[name]()
    if name == "linear_infonce":  # one configuration, same code
        baseline.rates, baseline.decays, baseline.sizes = (1e-2,), (0.01,), (8,)
    return baseline


@pytest.mark.parametrize("name", LEARNING)
def test_learns_a_linear_world_and_nothing_from_shuffled_pairs(name):
    train, groups = world(120, 0, n_groups=100)
    validation, test = validation_and_test()
    retriever = make(name).fit(train, validation, groups)
    post = fit_postprocessing(retriever, train, validation)
    assert evaluate_retrieval(retriever, test, post)["mean_recall"] > 0.75
    assert retriever.validation_mean_recall == pytest.approx(post.validation_mean_recall)
    order = torch.randperm(120, generator=torch.Generator().manual_seed(5))
    broken = make(name).fit({"image": train["image"], "text": train["text"][order]}, validation, torch.arange(120))
    assert evaluate_retrieval(broken, test)["mean_recall"] < 0.25  # chance is 0.09


def test_chance_is_at_chance():
    recalls = []
    for seed in range(20):
        train, groups = world(40, 0)
        validation, test = validation_and_test()
        recalls.append(evaluate_retrieval(Chance().fit(train, validation, groups, seed), test)["mean_recall"])
    expected = (1 + 5 + 10) / 3 / 60
    assert sum(recalls) / 20 == pytest.approx(expected, abs=0.03)


@pytest.mark.parametrize("name", LEARNING)
def test_vectors_are_unit_and_every_direction_is_served(name):
    train, groups = world(60, 0)
    validation, test = validation_and_test()
    retriever = make(name).fit(train, validation, groups)
    assert retriever.directions == ["image->text", "text->image"]
    for direction in retriever.directions:
        source, target = direction.split("->")
        queries = retriever.queries(direction, {source: test.latents[source]})
        gallery = retriever.gallery(direction, test.latents[target])
        assert queries.shape[1] == gallery.shape[1]
        for vectors in (queries, gallery):
            torch.testing.assert_close(vectors.norm(dim=1), torch.ones(60))


def test_budgets_are_equal():
    assert all(len(kind.gammas) * len(kind.lambdas) == TRIALS for kind in (Ridge, KernelRidge))
    assert len(CCA.regularisers) * len(CCA.sizes) * len(CCA.powers) == TRIALS
    assert len(LinearInfoNCE.rates) * len(LinearInfoNCE.decays) * len(LinearInfoNCE.sizes) == TRIALS

    class Greedy(Chance):
        def candidates(self, train, validation, groups, seed):
            for trial in range(TRIALS + 1):
                yield from super().candidates(train, validation, groups, trial)

    train, groups = world(20, 0)
    with pytest.raises(RuntimeError, match=str(TRIALS)):
        Greedy().fit(train, next(validation_and_test()), groups)


def test_leave_group_out_selection_never_sees_validation():
    train, groups = world(60, 0)
    first, second = validation_and_test()
    fits = [Ridge("leave_group_out").fit(train, validation, groups) for validation in (first, second)]
    assert fits[0].config == fits[1].config
    units = {m: F.normalize(x - x.mean(0), dim=1) for m, x in train.items()}
    expected = fit_closed_form(units["image"], units["text"], groups, kind="ridge")
    torch.testing.assert_close(fits[0].maps["image->text"].weight, expected.weight)


def test_a_shared_space_gives_both_directions_one_score():
    train, groups = world(60, 0)
    validation, test = validation_and_test()
    retriever = CCA().fit(train, validation, groups)
    images, texts = test.latents["image"], test.latents["text"]
    forward = score_matrix(retriever, None, "image->text", {"image": images}, texts)
    backward = score_matrix(retriever, None, "text->image", {"text": texts}, images)
    torch.testing.assert_close(forward, backward.T)


def test_infonce_is_seeded():
    train, groups = world(40, 0)
    validation = next(validation_and_test())
    first, again, other = (
        make("linear_infonce").fit(train, validation, groups, seed).projections for seed in (0, 0, 1)
    )
    assert torch.equal(first["image"], again["image"]) and not torch.equal(first["image"], other["image"])


def test_wrong_use_is_named():
    train, groups = world(40, 0)
    validation = next(validation_and_test())
    with pytest.raises(ValueError, match="paired"):
        Ridge().fit({"image": train["image"][:39], "text": train["text"]}, validation, groups)
    with pytest.raises(ValueError, match="selection"):
        Ridge("test")
