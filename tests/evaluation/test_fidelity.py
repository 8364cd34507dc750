"""Fidelity and diversity against closed forms, other implementations, and samples whose answer is known."""

import json

import numpy as np
import pytest
import torch

from orwcfm_fast.data.datasets import load_data
from orwcfm_fast.errors import UserError
from orwcfm_fast.evaluation.features import features_for
from orwcfm_fast.evaluation.fidelity import (
    fidelity,
    frechet_distance,
    kernel_distance,
    mode_coverage,
    precision_recall,
    vendi_score,
)
from orwcfm_fast.evaluation.intervals import Interval, half_sampled, mean_pairwise_distance


def normal(n: int, mean=(0.0, 0.0), std=(1.0, 1.0), seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.tensor(mean) + torch.tensor(std) * torch.randn(n, len(mean), generator=g).double()


def test_fid_of_two_gaussians_is_their_squared_w2():
    x, y = normal(40_000), normal(40_000, (1.0, 2.0), (2.0, 0.5), seed=1)
    assert frechet_distance(x, y) == pytest.approx(1 + 4 + 1 + 0.25, rel=0.02)
    assert frechet_distance(x[:, :1], y[:, :1]) == pytest.approx(1 + 1, rel=0.03)
    assert frechet_distance(x, x) == pytest.approx(0, abs=1e-6)


def test_fid_is_the_textbook_formula_on_correlated_features():
    from scipy.linalg import sqrtm

    g = torch.Generator().manual_seed(0)
    x, y = (torch.randn(300, 12, generator=g) @ torch.randn(12, 12, generator=g) for _ in range(2))
    a, b = np.cov(x.double().T), np.cov(y.double().T)
    mean = float((x.double().mean(0) - y.double().mean(0)).square().sum())
    textbook = mean + np.trace(a + b - 2 * sqrtm(a @ b).real)
    assert frechet_distance(x.double(), y.double()) == pytest.approx(textbook, rel=1e-6)


def test_kid_of_two_gaussians_is_the_distance_of_their_first_three_moments():
    """(xy + 1)³ = x³y³ + 3x²y² + 3xy + 1: for N(0, 1) and N(1, 1), 3·1² + 3·1² + 4² = 22."""
    x, y = normal(1500, (0.0,), (1.0,)), normal(1500, (1.0,), (1.0,), seed=1)
    assert kernel_distance(x, y) == pytest.approx(22, rel=0.25)
    assert abs(kernel_distance(x, normal(1500, (0.0,), (1.0,), seed=2))) < 1


def test_precision_and_recall_tell_missing_modes_from_false_ones():
    g = torch.Generator().manual_seed(0)
    whole, other = torch.rand(600, 2, generator=g).double(), torch.rand(600, 2, generator=g).double()
    half = other * torch.tensor([0.5, 1.0])
    assert precision_recall(whole, whole) == (1, 1) and precision_recall(whole, whole + 9) == (0, 0)
    lost, false = precision_recall(half, whole), precision_recall(whole, half)
    assert lost[0] > 0.95 and lost[1] == pytest.approx(0.53, abs=0.07) and false == (lost[1], lost[0])


@pytest.mark.parametrize("k", [1, 3, 10])
def test_vendi_score_of_k_orthogonal_clusters_is_k(k):
    x = torch.eye(10)[:k].repeat(20, 1) * torch.rand(20 * k, 1, generator=torch.Generator().manual_seed(0))
    assert vendi_score(x + 0.0) == pytest.approx(k, rel=1e-6)


@pytest.mark.parametrize("shape", [(50, 20), (20, 50)], ids=str)
def test_vendi_score_is_the_exponential_entropy_of_the_similarity_matrix(shape):
    """By its definition, from all N × N cosine similarities (Friedman & Dieng, TMLR 2023)."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    unit = x / x.norm(dim=1, keepdim=True)
    shares = torch.linalg.eigvalsh(unit @ unit.T / len(x)).clamp_min(1e-300)
    assert vendi_score(x) == pytest.approx(float((-(shares * shares.log()).sum()).exp()), rel=1e-8)


@pytest.mark.parametrize("what", ["pairwise distance", "FID", "Vendi"])
def test_intervals_from_halves_cover_what_more_samples_would_give(what):
    """95 of 100 should; the mean over many sets stands for the truth at that size."""
    figure = {
        "pairwise distance": mean_pairwise_distance,
        "FID": lambda x: half_sampled(lambda a: [frechet_distance(a, TRUTH)], x, repeats=24)[0],
        "Vendi": lambda x: half_sampled(lambda a: [vendi_score(a)], x, repeats=24)[0],
    }[what]
    found = [figure(normal(120, (1.0, 0.5), seed=s)) for s in range(150)]
    truth = np.mean([f.mean for f in found])
    assert 0.88 < np.mean([f.low <= truth <= f.high for f in found]) < 0.995


TRUTH = normal(2000, seed=77)


def test_interval_of_the_pairwise_distance_is_about_the_exact_mean():
    found = mean_pairwise_distance(torch.tensor([[0.0], [1.0], [3.0], [7.0]]))
    assert found.mean == pytest.approx((1 + 3 + 7 + 2 + 6 + 4) / 6) and found.low < found.mean < found.high
    assert mean_pairwise_distance(torch.ones(8, 2)) == Interval(0, 0, 0)


def test_mode_coverage_counts_the_modes_that_samples_hold():
    real, labels = load_data("8gaussians")
    real, labels, more, kinds = real[:2000], labels[:2000], real[2000:4000], labels[2000:4000]
    covered, on_data = mode_coverage(more, real, labels)
    assert covered == Interval(8, 8, 8) and on_data.mean == pytest.approx(0.99, abs=0.01)
    few, on_data = mode_coverage(more[kinds < 3], real, labels)
    assert few.mean == 3 and on_data.mean > 0.97
    square = 6 * torch.rand(2000, 2, generator=torch.Generator().manual_seed(0)) - 3
    assert mode_coverage(square, real, labels)[1].high < 0.5
    nowhere = mode_coverage(torch.full((50, 2), 9.0), real, labels)
    assert nowhere[0].mean == 0 and nowhere[1].mean == 0


def test_too_few_samples_are_refused_or_left_out():
    x = torch.randn(20, 30, generator=torch.Generator().manual_seed(0))
    assert fidelity(x, x, "data").fid is None
    with pytest.raises(UserError, match=r"FID in 30 features needs more than 30 .* 20 and 20 of the data"):
        fidelity(x, x, "data", strict=True)
    with pytest.raises(UserError, match="need 8 samples"):
        fidelity(x[:7], x, "data")


def test_evaluate_compares_models_in_chosen_features_with_intervals(run_cli, tiny_run):
    found = json.loads(run_cli("evaluate", "run", "base", "-n", 64, "--json").out)["models"]
    assert len(found) == 3 and {m["features"] for m in found} == {"pixels"}
    for m in found:
        assert m["n"] == 64 and m["against"] == "64 of the data" and m["vendi"] is None
        for key in (
            "reward",
            "w2_coupled",
            "diversity",
            "fid",
            "kid",
            "precision",
            "recall",
            "modes",
            "on_data",
        ):
            assert m[key]["low"] <= m[key]["mean"] <= m[key]["high"]
    own = json.loads(run_cli("evaluate", "run", "-n", 64, "--against", "reference", "--json").out)["models"]
    assert own[0]["against"] == "64 of the reference" and own[0]["fid"]["mean"] < found[0]["fid"]["mean"]
    plain = run_cli("evaluate", "run", "-n", 64, "--against", "none")
    assert "FID" not in plain.out and "FID against 64 of the data" in run_cli("evaluate", "run", "-n", 64).out


def test_a_wrong_argument_is_one_clear_line(run_cli, tiny_run):
    for arguments, message in {
        ("run", "--features", "classifier"): "knows digits and mnist, not two-gaussians",
        ("run", "--features", "vgg"): "features = 'vgg'",
        ("run", "--against", "data", "-n", 6): "need 8 samples",
        ("base", "--against", "reference"): "name one with --reference",
        ("run", "--features", "clip", "--clip-weights", "nowhere.pt"): "clip-weights 'nowhere.pt'",
    }.items():
        result = run_cli("evaluate", *arguments, "--quiet")
        assert result.code == 2 and message in result.err and result.err.count("\n") == 1, arguments


def test_features_of_the_digits_classifier_and_of_a_clip_model_on_disk(tmp_path):
    import open_clip

    from orwcfm_fast.settings import RewardOptions

    images, _ = load_data("digits")
    assert features_for("auto", "digits")(images[:300]).shape == (300, 128)
    tower = {"width": 64, "layers": 1}
    small = {"embed_dim": 32, "vision_cfg": tower | {"image_size": 32, "patch_size": 16, "head_width": 32},
             "text_cfg": tower | {"context_length": 8, "vocab_size": 49408, "heads": 2}}  # fmt: skip
    (tmp_path / "ViT-tiny-test.json").write_text(json.dumps(small))
    open_clip.add_model_config(tmp_path)
    torch.manual_seed(0)
    network = open_clip.create_model("ViT-tiny-test").eval()
    torch.save(network.state_dict(), tmp_path / "clip.pt")
    options = RewardOptions(clip_model="ViT-tiny-test", clip_weights=str(tmp_path / "clip.pt"))
    found = features_for("clip", "digits", options)(images[:3])
    flat = features_for("clip", "digits", options)(torch.full((1, 1, 8, 8), -1.0))
    mean, std = torch.tensor(open_clip.OPENAI_DATASET_MEAN), torch.tensor(open_clip.OPENAI_DATASET_STD)
    with torch.no_grad():
        black = network.encode_image((-mean / std).view(1, 3, 1, 1).expand(1, 3, 32, 32))
    assert found.shape == (3, 32) and torch.allclose(flat, black, atol=1e-4)


def test_inception_without_its_weights_says_where_they_belong(monkeypatch, tmp_path):
    import socket

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(socket, "getaddrinfo", lambda *a, **k: (_ for _ in ()).throw(OSError("no network")))
    with pytest.raises(UserError, match=f"no weights in {tmp_path}.*use clip, classifier or pixels"):
        features_for("inception", "digits")
