"""What a budget accepts, and how ``--budget`` is read."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from qwenforge.calibration import recipes
from qwenforge.calibration.accuracy import DistributionAccuracy
from qwenforge.calibration.budget import Budget, default_budget, parse_budget
from qwenforge.errors import UserError

MEASURED = sorted((Path(__file__).parents[2] / "bench" / "results").glob("*-cpu-quantization-accuracy-*.json"))
BUDGET = Budget(kl=0.02, ppl=1.02, top1=0.97)
GOOD = DistributionAccuracy(100, 10.0, 10.1, 0.01, 0.1, 0.2, 0.98, ())


def test_accuracy_within_every_limit_holds() -> None:
    assert BUDGET.missed(GOOD) == []


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"mean_kl": 0.0201}, "mean KL is 0.0201 (at most 0.02)"),
        ({"perplexity": 10.3}, "perplexity is 1.0300 times the unquantized (at most 1.02)"),
        ({"top1_agreement": 0.969}, "the best token agrees at 96.9% (at least 97.0%)"),
        ({"mean_kl": math.nan}, "mean KL is nan (at most 0.02)"),
    ],
)
def test_a_figure_beyond_its_limit_is_told(change: dict[str, float], words: str) -> None:
    assert BUDGET.missed(replace(GOOD, **change)) == [words]


def test_each_limit_is_held_to_the_worst_of_several_graphs() -> None:
    first, second = replace(GOOD, mean_kl=0.5), replace(GOOD, perplexity=20.0)
    told = ["mean KL is 0.5 (at most 0.02)", "perplexity is 2.0000 times the unquantized (at most 1.02)"]
    assert BUDGET.missed(first, second) == BUDGET.missed(second, first) == told
    assert BUDGET.missed(GOOD, replace(GOOD, mean_kl=float("nan"))) == ["mean KL is nan (at most 0.02)"]


def test_limits_are_read_and_the_rest_is_the_default() -> None:
    assert parse_budget("kl=0.05, top1=0.9", BUDGET) == Budget(kl=0.05, ppl=1.02, top1=0.9)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "is no limit"),
        ("kl", "is no limit"),
        ("kl:0.1", "is no limit"),
        ("bleu=3", "knows no 'bleu'; give limits for kl, ppl, top1"),
        ("kl=0.1,kl=0.2", "gives kl twice"),
        ("kl=small", "kl=small is not a number"),
        ("kl=nan", "kl is 0 or more"),
        ("kl=-1", "kl is 0 or more"),
        ("ppl=0.9", "ppl is 1 or more"),
        ("top1=97", "top1 is 0 to 1"),
    ],
)
def test_a_budget_that_is_none_is_refused_with_what_to_write(text: str, words: str) -> None:
    with pytest.raises(UserError) as refusal:
        parse_budget(text, BUDGET)
    assert words in str(refusal.value)


def test_fewer_bits_and_quantized_activations_may_lose_more() -> None:
    int8 = default_budget("int8", activations=False, cache=False)
    w8a8 = default_budget("int8", activations=True, cache=False)
    int4 = default_budget("int4", activations=False, cache=False)
    fp8 = default_budget("fp8", activations=True, cache=False)
    assert int8.kl < w8a8.kl < fp8.kl < int4.kl
    assert default_budget("int8", activations=False, cache=True) == fp8


@pytest.mark.parametrize("recipe", [recipes.get(name) for name in recipes.NAMES], ids=lambda recipe: recipe.name)
def test_default_budget_follows_from_the_measured_figures(recipe: recipes.Recipe) -> None:
    """The rule of docs/accuracy.md: four times the KL, upwards; twice the positions that disagree, downwards."""
    found = [json.loads(path.read_text())["subjects"][f"qwenforge {recipe.name}"] for path in MEASURED]
    assert len(found) == 2
    kl = 4 * max(each["mean_kl"] for each in found)
    digit = 10.0 ** math.floor(math.log10(kl))
    top1 = 1 - 2 * (1 - min(each["top1_agreement"] for each in found))
    budget = default_budget(recipe.weight, activations=recipe.activation is not None, cache=False)
    assert budget.kl == pytest.approx(math.ceil(kl / digit) * digit)
    assert budget.ppl == pytest.approx(1 + budget.kl)
    assert budget.top1 == pytest.approx(math.floor(top1 * 100) / 100)
    assert all(each["perplexity_ratio"] < budget.ppl for each in found)
