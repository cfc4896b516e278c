"""The defaults and what they refuse."""

import dataclasses
import math
import typing

import pytest

from nfkernels.training import GlowShape, Recipe, auto_levels
from nfkernels.training.recipe import RecipeChanges


def test_what_fit_takes_by_name_is_the_recipe():
    assert list(typing.get_type_hints(RecipeChanges).items()) == list(typing.get_type_hints(Recipe).items())


def test_learning_rate_rises_then_falls_to_zero():
    recipe = Recipe(steps=100, lr=0.1, warmup=10, schedule="cosine")
    rates = [recipe.lr_at(step) for step in range(100)]
    assert rates[0] == pytest.approx(0.01)
    assert max(rates) == pytest.approx(0.1, rel=0.03)
    assert rates.index(max(rates)) == 9
    assert rates[50] == pytest.approx(0.05)
    assert 0 < rates[-1] < 1e-4
    assert Recipe(steps=100, lr=0.1, warmup=0, schedule="linear").lr_at(75) == pytest.approx(0.025)
    assert Recipe(steps=100, lr=0.1, warmup=0, schedule="constant").lr_at(99) == 0.1


def test_learning_rate_ends_where_it_is_told_to():
    options = {"steps": 1000, "lr": 0.1, "warmup": 0}
    last = {}
    for schedule in ("linear", "cosine", "exponential"):
        recipe = Recipe(**options, schedule=schedule, lr_end=0.2)
        assert recipe.lr_at(0) == pytest.approx(0.1)
        last[schedule] = recipe.lr_at(999)
        assert 0.02 <= last[schedule] < 0.0202
        assert all(recipe.lr_at(step) > recipe.lr_at(step + 1) for step in range(999))
    assert Recipe(**options, schedule="linear", lr_end=0.2).lr_at(500) == pytest.approx(0.06)
    exponential = Recipe(**options, schedule="exponential")
    assert exponential.lr_at(500) == pytest.approx(0.01)  # half way to a hundredth: a tenth
    ratios = {round(exponential.lr_at(step + 1) / exponential.lr_at(step), 12) for step in range(999)}
    assert len(ratios) == 1


def test_a_recipe_of_an_older_run_has_the_defaults_of_what_it_lacks():
    new = {"optimizer", "lr_end", "accumulate", "precision", "flip"}
    stored = {name: value for name, value in dataclasses.asdict(Recipe(steps=7)).items() if name not in new}
    stored["betas"] = list(stored["betas"])  # as JSON has it
    assert Recipe(**stored) == Recipe(steps=7)


def test_averaging_starts_short():
    recipe = Recipe(ema=0.9)
    assert recipe.ema_at(0) == pytest.approx(0.1)
    assert recipe.ema_at(1000) == 0.9
    assert Recipe(ema=0.0).ema_at(1000) == 0.0


@pytest.mark.parametrize(
    "wrong",
    [
        {"steps": 0},
        {"steps": 2.5},
        {"batch_size": True},
        {"lr": 0.0},
        {"lr": math.nan},
        {"warmup": -1},
        {"seed": 2**32},
        {"weight_decay": -1.0},
        {"clip": math.inf},
        {"ema": 1.0},
        {"betas": (0.9,)},
        {"betas": (0.9, 1.0)},
        {"schedule": "step"},
        {"patience": 0},
        {"optimizer": "sgd"},
        {"precision": "float16"},
        {"flip": 1},
        {"accumulate": 0},
        {"accumulate": 3},
        {"lr_end": 1.5},
        {"lr_end": math.nan},
        {"lr_end": 0.1, "schedule": "constant"},
        {"lr_end": 0.0, "schedule": "exponential"},
    ],
)
def test_values_that_make_no_sense_are_named(wrong):
    with pytest.raises(ValueError, match=f"^{next(iter(wrong))} is "):
        Recipe(**wrong)


def test_levels_follow_the_size():
    sizes = {(8, 8): 2, (28, 28): 2, (32, 32): 3, (64, 48): 3, (4, 4): 1, (2, 2): 0, (7, 8): 0, (128, 6): 1}
    assert {size: auto_levels(*size) for size in sizes} == sizes
    assert GlowShape().levels is None
