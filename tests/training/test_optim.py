"""Each optimiser is torch's own, and a step that is not finite changes nothing."""

import pytest
import torch
from tiny import tabular

from nfkernels.training import Recipe
from nfkernels.training.optim import Optimizer
from nfkernels.training.recipe import OPTIMIZERS

CLASSES = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam, "adamax": torch.optim.Adamax}
EACH = pytest.mark.parametrize("name", OPTIMIZERS)


def recipe_of(name, **changes):
    return Recipe(
        **{"optimizer": name, "steps": 20, "lr": 0.02, "warmup": 3, "weight_decay": 0.1, "clip": 0.5} | changes
    )


def batches(count=8):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(16, 2, generator=generator) for _ in range(count)]


def take(flow, optimizer, batch, step):
    loss = flow.nll(batch)
    loss.backward()
    return optimizer.step(loss, step)


def snapshot(optimizer):
    moments = [t.clone() for p in optimizer.parameters for t in optimizer.adam.state[p].values()]
    return [p.detach().clone() for p in optimizer.parameters] + moments


@EACH
def test_steps_are_those_of_a_loop_written_by_hand(name):
    recipe = recipe_of(name)
    flow, by_hand = tabular(), tabular()
    optimizer = Optimizer(flow, recipe)
    matrices = [p for p in by_hand.parameters() if p.dim() == 2]
    vectors = [p for p in by_hand.parameters() if p.dim() == 1]
    fused = {} if name == "adamax" else {"fused": True}
    own = CLASSES[name](
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}],
        betas=recipe.betas,
        **fused,
    )
    averages = [p.detach().clone() for p in by_hand.parameters()]
    for step, batch in enumerate(batches()):
        norm, bad = take(flow, optimizer, batch, step)
        by_hand.nll(batch).backward()
        wanted = torch.nn.utils.clip_grad_norm_(by_hand.parameters(), 0.5)
        for group in own.param_groups:
            group["lr"] = recipe.lr_at(step)
        own.step()
        own.zero_grad()
        assert norm == pytest.approx(float(wanted))
        assert not bad
        for average, p in zip(averages, by_hand.parameters(), strict=True):
            average.lerp_(p.detach(), 1 - recipe.ema_at(step))
    for mine, theirs, average, wanted in zip(
        flow.parameters(), by_hand.parameters(), optimizer.averages, averages, strict=True
    ):
        assert torch.equal(mine, theirs)
        assert torch.equal(average, wanted)


@EACH
@pytest.mark.parametrize("broken", ["loss", "gradient"])
@pytest.mark.parametrize("at", [0, 3])
def test_a_bad_step_changes_nothing_but_its_counters(name, broken, at):
    flow = tabular()
    optimizer = Optimizer(flow, recipe_of(name, clip=0.0))
    for step, batch in enumerate(batches()[:at]):
        take(flow, optimizer, batch, step)
    before = snapshot(optimizer)
    averages = [average.clone() for average in optimizer.averages]
    loss = flow.nll(batches()[at])
    loss.backward()
    if broken == "loss":
        loss = loss * torch.inf
    else:
        optimizer.parameters[1].grad[0] = torch.nan
    _, bad = optimizer.step(loss, at)
    assert bad == 1
    after = snapshot(optimizer)
    if at == 0:  # moments and counts have been made by now, and are zero
        assert len(after) == 4 * len(optimizer.parameters)
        assert not any(tensor.any() for tensor in after[len(before) :])
    assert all(torch.equal(old, new) for old, new in zip(before, after, strict=False))
    # The averages went on towards the parameters, which are finite.
    weight = 1 - optimizer.recipe.ema_at(at)
    for old, new, p in zip(averages, optimizer.averages, optimizer.parameters, strict=True):
        assert torch.equal(new, torch.lerp(old, p.detach(), weight))
    assert all(p.grad is None for p in optimizer.parameters)
    assert [float(t) for t in (optimizer.skipped, optimizer.streak, optimizer.longest_streak)] == [1, 1, 1]
    take(flow, optimizer, batches()[at + 1], at + 1)
    assert [float(t) for t in (optimizer.skipped, optimizer.streak, optimizer.longest_streak)] == [1, 0, 1]
    assert not torch.equal(before[0], optimizer.parameters[0])


@EACH
def test_a_saved_state_goes_on_bit_for_bit(name):
    flow = tabular()
    optimizer = Optimizer(flow, recipe_of(name))
    for step, batch in enumerate(batches()[:4]):
        take(flow, optimizer, batch, step)
    state = {key: value.clone() for key, value in optimizer.state_dict().items()}
    moments = {"exp_avg", "exp_inf", "step"} if name == "adamax" else {"exp_avg", "exp_avg_sq", "step"}
    assert {key.split(".")[1] for key in state if key.startswith("adam.")} == moments
    other = tabular(seed=1)
    other.load_state_dict(flow.state_dict())
    resumed = Optimizer(other, recipe_of(name))
    resumed.load_state_dict(state)
    for step, batch in enumerate(batches()[4:], start=4):
        take(flow, optimizer, batch, step)
        take(other, resumed, batch, step)
    ours, theirs = optimizer.state_dict(), resumed.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert all(torch.equal(a, b) for a, b in zip(flow.parameters(), other.parameters(), strict=True))


@EACH
def test_parameters_without_a_gradient_are_left_alone(name):
    flow = tabular()
    idle = torch.nn.Parameter(torch.ones(3))
    flow.register_parameter("idle", idle)
    optimizer = Optimizer(flow, recipe_of(name))
    take(flow, optimizer, batches()[0], 0)
    assert torch.equal(idle, torch.ones(3))
    assert not any(key.endswith(".idle") for key in optimizer.state_dict() if key.startswith("adam."))
