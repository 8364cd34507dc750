"""Low-rank adapters of U-Nets: one base for policy and reference, the same gradients, checkpoints that stand alone."""

import copy
import sys
from collections import Counter
from dataclasses import replace

import pytest
import torch

from orwcfm_fast.checkpoints import checkpoint
from orwcfm_fast.errors import UserError
from orwcfm_fast.method.rollout import sample, start_noise
from orwcfm_fast.networks import lora
from orwcfm_fast.networks.models import build_network
from orwcfm_fast.networks.policy import make_policy
from orwcfm_fast.runs.build import build_trainer
from orwcfm_fast.runs.load import Loader
from orwcfm_fast.runs.trainer_state import restore_trainer, save_trainer
from orwcfm_fast.settings import Finetune

CPU = torch.device("cpu")
SMALL = Finetune(
    lora=4, rollout=32, batch=16, steps_per_round=3, probe=8, rounds=2, lr=1e-2, warmup=0, nfe=6, tau=2.0
)
KINDS = ("plain", "dora", "rslora")
SHAPES = {"mlp": (2,), "unet-digits": (1, 8, 8)}


def policy_of(model):
    """Fresh weights, the zero layers too, so that every adapter has something to add to."""
    policy = make_policy(model, "digits" if len(SHAPES[model]) == 3 else "moons", SHAPES[model], CPU)
    with torch.no_grad():
        for p in policy.network.parameters():
            if not p.any():
                p.normal_(std=0.02, generator=torch.Generator().manual_seed(1))
    return policy


def adapted_layers(network):
    return [name for name, layer in network.named_modules() if lora.TRAINED in getattr(layer, "lora_A", ())]


def brighter(x):
    return x.flatten(1).mean(1)


def disturb(network):
    """As training does: B away from zero."""
    with torch.no_grad():
        for key, p in network.named_parameters():
            if "lora_B" in key:
                p.normal_(std=0.1, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("model", SHAPES)
def test_policy_starts_as_its_reference_and_reference_stays_what_it_was(model, kind):
    policy = policy_of(model)
    x = start_noise(policy, 4, 0)
    before = policy.velocity(0.5, x)
    lora.add_lora(policy.network, Finetune(lora=4, lora_kind=kind))
    reference = policy.frozen_copy()
    assert torch.equal(policy.velocity(0.5, x), reference.velocity(0.5, x))
    assert torch.allclose(policy.velocity(0.5, x), before, atol=1e-5)
    disturb(policy.network)
    assert torch.allclose(reference.velocity(0.5, x), before, atol=1e-5)
    assert not torch.allclose(policy.velocity(0.5, x), before, atol=1e-3)
    shared = {p.data_ptr() for p in reference.network.parameters()}
    assert {p.data_ptr() for p in policy.network.parameters()} == shared


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("model", SHAPES)
@pytest.mark.parametrize("t", [0.3, "each"], ids=["one-time", "each-its-time"])
def test_merged_weights_have_the_same_velocity(model, t, kind):
    policy = policy_of(model)
    lora.add_lora(policy.network, Finetune(lora=4, lora_alpha=2.0, lora_kind=kind))
    disturb(policy.network)
    plain = build_network(model, SHAPES[model]).eval()
    plain.load_state_dict(policy.weights())
    x = start_noise(policy, 4, 0)
    times = torch.tensor([0.1, 0.4, 0.6, 0.9]) if t == "each" else torch.full((4,), t)
    with torch.no_grad():
        assert torch.allclose(policy.velocity(times if t == "each" else t, x), plain(times, x), atol=2e-5)


@pytest.mark.parametrize("model", SHAPES)
def test_only_adapters_learn_and_their_gradients_are_those_of_the_sum(model):
    """∂L/∂A = Bᵀ·∂L/∂W, for every layer, against a plain network with the merged weights."""
    policy = policy_of(model)
    plain = copy.deepcopy(policy.network)
    lora.add_lora(policy.network, Finetune(lora=4))
    disturb(policy.network)
    plain.load_state_dict(policy.weights())
    x, t = start_noise(policy, 8, 0), torch.linspace(0.1, 0.9, 8)
    policy.velocity(t, x).square().sum().backward()
    plain(t, x).square().sum().backward()
    names = adapted_layers(policy.network)
    assert len(names) == sum(isinstance(m, torch.nn.Linear | torch.nn.Conv1d | torch.nn.Conv2d)
                             and min(len(m.weight), m.weight[0].numel()) > 4 for m in plain.modules())  # fmt: skip
    for name in names:
        layer, weight = policy.network.get_submodule(name), plain.get_submodule(name).weight
        expected = layer.lora_B[lora.TRAINED].weight.flatten(1).T @ weight.grad.flatten(1)
        got = layer.lora_A[lora.TRAINED].weight.grad.flatten(1)
        assert torch.allclose(got, expected, atol=1e-3 * expected.detach().abs().max().item() + 1e-6), name
    assert all(p.grad is None for k, p in policy.network.named_parameters() if ".lora_" not in k)


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_leaves_the_base_alone_and_its_checkpoint_is_a_plain_model(kind, tmp_path):
    policy = policy_of("unet-digits")
    base = {k: v.clone() for k, v in policy.network.state_dict().items()}
    trainer = build_trainer(policy, brighter, SMALL.model_copy(update={"lora_kind": kind}))
    records = [*trainer.train(2)]
    assert records[-1]["w2_coupled"] > 0
    assert all(torch.equal(v, base[k]) for k, v in trainer.reference.weights().items())
    save_trainer(trainer, tmp_path / "step_6", {})
    loaded = Loader(CPU, "fp32").load(str(tmp_path / "step_6")).policy
    x0 = start_noise(policy, 8, 3)
    assert torch.allclose(sample(loaded, x0, SMALL, 8), sample(policy, x0, SMALL, 8), atol=1e-4)
    found = checkpoint.load(tmp_path / "step_6")
    kept = ("lora_A.weight", "lora_B.weight") + (("lora_magnitude_vector",) if kind == "dora" else ())
    assert set(found.tensors["lora"]) == {f"{n}.{k}" for n in adapted_layers(policy.network) for k in kept}


@pytest.mark.parametrize("kind", KINDS)
def test_resume_is_exact(kind, tmp_path):
    s = SMALL.model_copy(update={"lora_kind": kind, "lora_alpha": 6.0})
    whole = build_trainer(policy_of("unet-digits"), brighter, s)
    [*whole.train(2)]
    half = build_trainer(policy_of("unet-digits"), brighter, s)
    [*half.train(1)]
    save_trainer(half, tmp_path / "step_3", {})
    again = build_trainer(policy_of("unet-digits"), brighter, s)
    restore_trainer(again, checkpoint.load(tmp_path / "step_3"))
    [*again.train(2)]
    one, two = (lora.lora_state(t.policy.network) for t in (whole, again))
    assert all(torch.equal(one[k], two[k]) for k in one)


def test_the_seed_draws_the_adapters_and_no_other_random_number():
    before = torch.random.get_rng_state()
    first, again, other = (policy_of("mlp").network for _ in range(3))
    for network, seed in ((first, 1), (again, 1), (other, 2)):
        lora.add_lora(network, Finetune(lora=4, seed=seed))
    one, two, three = map(lora.lora_state, (first, again, other))
    assert all(torch.equal(one[k], two[k]) for k in one)
    assert not all(torch.equal(one[k], three[k]) for k in one)
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("kind", KINDS)
def test_over_a_base_in_bf16_the_adapters_are_float32_and_the_policy_starts_as_its_reference(kind):
    policy = policy_of("unet-digits")
    policy = replace(policy, network=policy.network.to(torch.bfloat16), precision=torch.bfloat16)
    x = start_noise(policy, 4, 0)
    before = policy.velocity(0.5, x)
    lora.add_lora(policy.network, Finetune(lora=4, lora_kind=kind))
    assert torch.equal(policy.velocity(0.5, x), policy.frozen_copy().velocity(0.5, x))
    assert torch.allclose(policy.velocity(0.5, x).float(), before.float(), atol=0.05)
    found = Counter((p.dtype, p.requires_grad) for p in policy.network.parameters())
    assert found.keys() == {(torch.bfloat16, False), (torch.float32, True)}


def test_the_scale_is_alpha_over_the_rank_and_of_rslora_over_its_root():
    found = []
    for kind in ("plain", "rslora"):
        policy = policy_of("mlp")
        lora.add_lora(policy.network, Finetune(lora=4, lora_alpha=6.0, lora_kind=kind))
        disturb(policy.network)
        found.append(policy)
    base = found[0].network.net[2].base_layer.weight
    plain, rslora = (p.weights()["net.2.weight"] - base for p in found)
    layer = found[0].network.net[2]
    product = layer.lora_B[lora.TRAINED].weight @ layer.lora_A[lora.TRAINED].weight
    assert torch.allclose(plain, 6 / 4 * product, atol=1e-6)
    assert torch.allclose(rslora, 6 / 2 * product, atol=1e-6)


def test_adapters_saved_before_alpha_was_recorded_are_read_with_the_scale_1(tmp_path):
    """As a checkpoint of the repository's own adapters: the same keys, and nothing in its header or its state."""
    policy = policy_of("unet-digits")
    trainer = build_trainer(policy, brighter, SMALL)
    [*trainer.train(1)]
    save_trainer(trainer, tmp_path / "step_3", {})
    found = checkpoint.load(tmp_path / "step_3")
    plain = policy_of("unet-digits")
    plain.add_adapters({"lora": found.tensors["lora"]}, {}, "old")
    x = start_noise(policy, 4, 0)
    assert torch.equal(plain.velocity(0.5, x), policy.velocity(0.5, x))


def test_without_peft_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(UserError, match=r"^--lora: peft is missing: pip install 'orwcfm-fast\[lora\]'$"):
        lora.add_lora(policy_of("mlp").network, Finetune(lora=4))


def test_a_weight_of_zeros_has_no_dora():
    policy = make_policy("unet-digits", "digits", (1, 8, 8), CPU)  # fresh, its last convolution is zero
    with pytest.raises(UserError, match="all zero; use plain"):
        lora.add_lora(policy.network, Finetune(lora=1, lora_kind="dora", lora_targets=["out.2"]))


def test_copies_have_adapters_of_their_own():
    policy = policy_of("mlp")
    lora.add_lora(policy.network, Finetune(lora=4))
    disturb(policy.network)
    twin, x, t = copy.deepcopy(policy.network), torch.randn(3, 2), torch.full((3,), 0.5)
    with lora.base_only(twin):
        assert not torch.allclose(twin(t, x), policy.network(t, x))
    assert torch.equal(twin(t, x), policy.network(t, x))


def test_bad_input_is_refused():
    policy = policy_of("mlp")
    with pytest.raises(UserError, match="lower rank"):
        lora.add_lora(policy.network, Finetune(lora=1000))
    lora.add_lora(policy.network, Finetune(lora=4))
    with pytest.raises(UserError, match="already"):
        lora.add_lora(policy.network, Finetune(lora=4))
    other = policy_of("mlp")
    lora.add_lora(other.network, Finetune(lora=2))
    with pytest.raises(UserError, match="rank"):
        lora.load_lora(policy.network, lora.lora_state(other.network), "file")
