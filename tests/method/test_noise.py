"""What the library builds on counted noise."""

import torch

from orwcfm_fast.method import noise

SEED = torch.tensor(11)


def test_chunks_of_any_size_draw_the_same_noise():
    whole = noise.normal((3, 5), SEED, noise.indices(0, 100, "cpu"), noise.SAMPLE)
    parts = [noise.normal((3, 5), SEED, noise.indices(i, 10, "cpu"), noise.SAMPLE) for i in range(0, 100, 10)]
    assert torch.equal(whole, torch.cat(parts))


def test_permutation_is_one_and_changes_with_its_number():
    first, second = (noise.permutation(1000, SEED, number) for number in (0, 1))
    assert torch.equal(first.sort().values, torch.arange(1000)) and not torch.equal(first, second)


def test_choice_is_uniform():
    drawn = noise.choice(10, SEED, noise.indices(0, 100_000, "cpu"), noise.PRETRAIN_CHOICE)
    counts = torch.bincount(drawn, minlength=10).double()
    chi2 = float(((counts - 10_000) ** 2 / 10_000).sum())
    assert chi2 < 27.9  # 9 degrees of freedom, p = 0.001


def test_purposes_draw_independent_noise():
    purposes = (noise.X0, noise.ROLLOUT, noise.SAMPLE)
    a, b, c = (noise.normal((1000,), SEED, noise.indices(0, 100, "cpu"), p).flatten() for p in purposes)
    assert abs(float((a * b).mean())) < 0.013 and abs(float((b * c).mean())) < 0.013  # 4 standard errors
