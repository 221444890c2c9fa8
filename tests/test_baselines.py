"""Baselines learn what is there to learn, learn nothing from shuffled pairs, and keep to one protocol."""

import math

import pytest
import torch
import torch.nn.functional as F

from modeling_altmoe.scoring_altmoe import score_matrix
from trainer.baselines import ASIF, CCA, TRIALS, CentredUnit, Chance, KernelRidge, Ridge
from trainer.closed_form import fit_closed_form
from trainer.evaluate import BASELINES
from trainer.evaluation import RetrievalData, evaluate_retrieval, fit_postprocessing
from trainer.heads import HEADS, AuthorsAlternating, AuthorsPredictor, AuthorsPublished, LinearInfoNCE, _Run

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


SMALL = {"learning_rate": (1e-2,), "weight_decay": (0.01,), "size": (16,), "dropout": (0.1,)}


def make(name):
    baseline = BASELINES[name]()
    if name in HEADS:  # one configuration, same code
        baseline.grid = {key: SMALL[key] for key in baseline.grid}
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
    assert len(ASIF.kept) * len(ASIF.powers) <= TRIALS
    sizes = {name: math.prod(len(values) for values in head.grid.values()) for name, head in HEADS.items()}
    assert len(set(sizes.values())) == 1 and sizes["sail"] <= TRIALS

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


@pytest.mark.parametrize("name", HEADS)
def test_heads_are_seeded_and_leave_the_random_state_alone(name):
    train, groups = world(40, 0)
    validation = next(validation_and_test())
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    first, again, other = (
        make(name).fit(train, validation, groups, seed).gallery("image->text", train["text"]) for seed in (0, 0, 1)
    )
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(torch.rand(1), expected)


def test_halving_runs_every_configuration_and_finishes_the_best():
    train, groups = world(60, 0)
    validation = next(validation_and_test())
    head = LinearInfoNCE()
    head.grid = {"learning_rate": (1e-2, 1e-5, 3e-3, 1e-6), "weight_decay": (0.01,), "size": (16,)}
    head.finalists = 2
    rates = [config["learning_rate"] for config, _ in head.candidates(train, validation, groups, 0)]
    assert sorted(rates) == [3e-3, 1e-2]


def test_a_run_taken_up_again_equals_one_without_a_break():
    train, groups = world(60, 0)
    validation = next(validation_and_test())
    head = make("mlp_infonce")
    config = {key: values[0] for key, values in head.grid.items()}
    standard = {m: CentredUnit.fit(x) for m, x in train.items()}
    rows = {m: standard[m](x) for m, x in train.items()}
    whole, broken = (_Run(head, config, rows, standard, validation, groups, 0) for _ in range(2))
    whole.advance(20)
    for until in (7, 13, 20):
        broken.advance(until)
    for a, b in zip(whole.module.parameters(), broken.module.parameters(), strict=True):
        assert torch.equal(a, b)


def test_authors_predictor_equals_the_sum_over_chosen_experts():
    torch.manual_seed(0)
    module = AuthorsPredictor({"image": 6, "text": 5}, ["image->text", "text->image"], 8, 0.0, experts=5, top_k=2)
    x = torch.randn(3, 6)
    hidden = module.read["image"](F.layer_norm(x, (6,))) + module.task["image->text"]
    weights = module.gate(hidden).softmax(-1)
    for row, found in enumerate(module.query("image->text", x)):
        expected = hidden[row].clone()
        for expert in weights[row].topk(2).indices:  # weights as they are: their sum is below one
            expected += weights[row, expert] * (F.gelu(hidden[row] @ module.up[expert]) @ module.down[expert])
        torch.testing.assert_close(found, expected)


def test_alternating_updates_one_direction_a_step_and_joint_both():
    torch.manual_seed(0)
    for head, touched in ((AuthorsPublished(), 2), (AuthorsAlternating(), 1)):
        module = head.build({"image": 6, "text": 5}, ["image->text", "text->image"], {"size": 8, "dropout": 0.0})
        rows = {"image": torch.randn(4, 6), "text": torch.randn(4, 5)}
        head.loss(module, 1, rows, torch.zeros(4, 4, dtype=torch.bool), ["image->text", "text->image"]).backward()
        assert sum(task.grad is not None for task in module.task.values()) == touched


def test_asif_with_every_anchor_is_the_dense_formula():
    train, groups = world(30, 0)
    validation, test = validation_and_test()
    asif = ASIF()
    asif.kept, asif.powers = (30,), (2.0,)
    retriever = asif.fit(train, validation, groups)
    found = retriever.queries("image->text", {"image": test.latents["image"]})
    standard = CentredUnit.fit(train["image"])
    dense = (standard(test.latents["image"]) @ standard(train["image"]).T).clamp_min(0) ** 2
    order = torch.randperm(30, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(found, F.normalize(dense, dim=1)[:, order])


def test_wrong_use_is_named():
    train, groups = world(40, 0)
    validation = next(validation_and_test())
    with pytest.raises(ValueError, match="paired"):
        Ridge().fit({"image": train["image"][:39], "text": train["text"]}, validation, groups)
    with pytest.raises(ValueError, match="selection"):
        Ridge("test")
