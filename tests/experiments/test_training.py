import json
import math
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch
from torch import nn

from torchgraft.experiments import fit, pick_learning_rate
from torchgraft.experiments.training import _Batches

X = torch.linspace(-1, 1, 48)[:, None]


def squared(model, batch):
    x, y = batch
    return (model(x) - y).square().mean()


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)


def line(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(1, 4), nn.Dropout(0.5), nn.Linear(4, 1))


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_learns_the_least_squares_line():
    model = nn.Linear(1, 1)
    fit(model, (X, 3 * X - 1), squared, steps=300, batch_size=16, optimizer=sgd, schedule="cosine")
    assert model.weight.item() == pytest.approx(3, abs=1e-3)
    assert model.bias.item() == pytest.approx(-1, abs=1e-3)


def test_one_step_equals_the_hand_written_step():
    model, by_hand = nn.Linear(1, 1), nn.Linear(1, 1)
    by_hand.load_state_dict(model.state_dict())
    fit(
        model,
        (X, 2 * X),
        squared,
        steps=1,
        batch_size=len(X),
        optimizer=lambda p: torch.optim.SGD(p, lr=0.5),
        seed=3,
    )
    squared(by_hand, (X, 2 * X)).backward()
    with torch.no_grad():
        for p in by_hand.parameters():
            p -= 0.5 * p.grad
    torch.testing.assert_close(weights(model), weights(by_hand))


def test_every_epoch_sees_every_example_once():
    batches = list(_Batches(size=10, batch=4, steps=5, seed=1, start=0, rank=0, world=1))
    seen = [i for batch in batches for i in batch]
    assert sorted(seen[:10]) == list(range(10))
    assert sorted(seen[10:]) == list(range(10))
    assert seen[:10] != seen[10:]


def test_processes_share_out_the_same_global_batches():
    whole = list(_Batches(10, 4, 7, seed=5, start=0, rank=0, world=1))
    parts = [list(_Batches(10, 4, 7, seed=5, start=0, rank=r, world=2)) for r in range(2)]
    assert [a + b for a, b in zip(*parts, strict=True)] == whole


def test_batches_continue_in_the_middle():
    whole = list(_Batches(10, 4, 7, seed=5, start=0, rank=0, world=1))
    assert list(_Batches(10, 4, 7, seed=5, start=3, rank=0, world=1)) == whole[3:]


class Killed(Exception):
    pass


def test_a_run_that_died_continues_to_the_same_weights(tmp_path):
    settings = dict(steps=20, batch_size=8, optimizer=sgd, schedule="one_cycle", seed=2, clip=1.0)
    settings |= dict(evaluate=lambda m: {"w": float(weights(m).sum())}, evaluate_at=(0, 6, 12, 20))
    straight = line()
    expected = fit(straight, (X, 3 * X), squared, **settings)

    def die(done, total, note):
        if done == 13:
            raise Killed

    kept = dict(checkpoint=tmp_path, checkpoint_every=5)
    with pytest.raises(Killed):
        fit(line(), (X, 3 * X), squared, **settings, **kept, progress=die)
    resumed, steps = line(seed=99), []
    got = fit(resumed, (X, 3 * X), squared, **settings, **kept, progress=lambda d, t, n: steps.append(d))
    assert steps[0] == 11
    assert torch.equal(weights(resumed), weights(straight))
    assert got.losses == expected.losses
    assert got.history == expected.history


def test_a_checkpoint_of_other_settings_is_refused(tmp_path):
    settings = dict(batch_size=8, optimizer=sgd, checkpoint=tmp_path, checkpoint_every=2)
    fit(line(), (X, X), squared, steps=5, **settings)
    with pytest.raises(ValueError, match="other settings"):
        fit(line(), (X, X), squared, steps=6, **settings)


def test_clipping_bounds_the_step():
    model = nn.Linear(1, 1)
    before = weights(model).clone()
    fit(
        model,
        (X, 1000 * X),
        squared,
        steps=1,
        batch_size=8,
        optimizer=lambda p: torch.optim.SGD(p, lr=1.0),
        clip=0.01,
    )
    assert (weights(model) - before).norm() == pytest.approx(0.01, rel=1e-3)


@pytest.mark.parametrize("name", ["one_cycle", "cosine", "linear", "constant", None])
def test_schedules(name):
    rates = []
    made = []

    def optimizer(parameters):
        made.append(torch.optim.SGD(parameters, lr=0.5))
        return made[0]

    fit(
        nn.Linear(1, 1), (X, X), squared, steps=50, batch_size=4, optimizer=optimizer, schedule=name,
        progress=lambda *_: rates.append(made[0].param_groups[0]["lr"]),
    )  # fmt: skip
    assert max(rates) <= 0.5 + 1e-9
    if name in ("constant", None):
        assert set(rates) == {0.5}
    else:
        assert rates[-1] < 0.01
    if name == "one_cycle":
        assert rates[0] < 0.1
        assert max(rates) == pytest.approx(0.5, rel=1e-2)


def test_bfloat16_autocast_reaches_the_loss():
    seen = []

    def loss(model, batch):
        seen.append(model[0](batch[0]).dtype)
        return squared(model, batch)

    fit(line(), (X, X), loss, steps=1, batch_size=4, optimizer=sgd, mixed_precision="bf16")
    fit(line(), (X, X), loss, steps=1, batch_size=4, optimizer=sgd)
    assert seen[-1] == torch.float32, "settings of one fit must not leak into the next"


def test_divergence_is_reported_with_its_step():
    with pytest.raises(FloatingPointError, match="at step"):
        fit(
            nn.Linear(1, 1),
            (X, X),
            squared,
            steps=500,
            batch_size=4,
            optimizer=lambda p: torch.optim.SGD(p, lr=1e6),
        )


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (dict(steps=0), "steps"),
        (dict(batch_size=0), "batch_size"),
        (dict(evaluate_at=(99,), evaluate=lambda m: {}), "evaluate_at"),
        (dict(evaluate_at=(1,)), "evaluate"),
        (dict(checkpoint_every=3), "checkpoint"),
    ],
)
def test_wrong_settings(wrong, message):
    with pytest.raises(ValueError, match=message):
        fit(nn.Linear(1, 1), (X, X), squared, **(dict(steps=2, batch_size=4, optimizer=sgd) | wrong))


def test_unknown_schedule(without_shape_checks):
    with pytest.raises(ValueError, match="one_cycle"):
        fit(nn.Linear(1, 1), (X, X), squared, steps=2, batch_size=4, optimizer=sgd, schedule="cosin")


def test_empty_dataset():
    with pytest.raises(ValueError, match="empty"):
        fit(nn.Linear(1, 1), (X[:0], X[:0]), squared, steps=2, batch_size=4, optimizer=sgd)


def test_pick_learning_rate_ranks_divergence_last():
    def score(lr):
        if lr > 1:
            raise FloatingPointError("diverged")
        return math.nan if lr == 0.5 else lr

    picked = pick_learning_rate([0.1, 0.3, 0.5, 10.0], score)
    assert picked == {"chosen": 0.3, "scores": {"0.1": 0.1, "0.3": 0.3, "0.5": None, "10.0": None}}
    assert json.loads(json.dumps(picked)) == picked


def test_pick_learning_rate_when_all_diverge():
    with pytest.raises(ValueError, match="diverged at every"):
        pick_learning_rate([1.0], lambda lr: math.nan)


def test_two_gloo_processes_train_to_the_weights_of_one(tmp_path):
    script = tmp_path / "train.py"
    script.write_text(
        textwrap.dedent(
            """
            import sys, torch
            from torch import nn
            from torchgraft.experiments import fit
            x = torch.linspace(-1, 1, 48)[:, None]
            torch.manual_seed(0)
            model = nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 1))
            fit(model, (x, x.sin()), lambda m, b: (m(b[0]) - b[1]).square().mean(), steps=30, batch_size=8,
                optimizer=lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), clip=1.0, seed=4)
            from accelerate.state import PartialState
            state = PartialState()
            if state.is_main_process:
                flat = torch.cat([p.detach().flatten() for p in model.parameters()])
                print("RESULT", state.num_processes, *[repr(float(v)) for v in flat])
            """
        )
    )

    def run(*launcher):
        done = subprocess.run(
            [sys.executable, *launcher, str(script)], capture_output=True, text=True, timeout=120, check=False
        )
        lines = [row for row in done.stdout.splitlines() if row.startswith("RESULT")]
        assert len(lines) == 1, done.stdout + done.stderr
        _, processes, *values = lines[0].split()
        return int(processes), np.array(values, dtype=float)

    one, alone = run()
    # the launcher's name for "several processes on this machine"; fit's device="cpu" makes it gloo
    several = ["--multi_gpu", "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no"]
    two, together = run("-m", "accelerate.commands.launch", *several, "--dynamo_backend", "no")
    assert (one, two) == (1, 2)
    np.testing.assert_allclose(together, alone, atol=1e-5)
