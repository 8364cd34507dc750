"""Pipelines of eight families learn, stay at τ = 0, resume, and export adapters that the pipeline itself reads."""

import json
from pathlib import Path

import pytest
import torch
from recording import recorded
from tiny_pipelines import build

from orwcfm_fast.checkpoints import checkpoint
from orwcfm_fast.method.callbacks import Callback
from orwcfm_fast.method.rollout import sample, start_conditions, start_noise
from orwcfm_fast.method.trainer import Trainer
from orwcfm_fast.networks import lora
from orwcfm_fast.networks.flow.field import PipelineVelocity
from orwcfm_fast.runs.build import build_trainer
from orwcfm_fast.runs.load import Loader
from orwcfm_fast.runs.trainer_state import restore_trainer, save_trainer
from orwcfm_fast.settings import Finetune

CPU = torch.device("cpu")
EIGHT = ("FLUX.1 Kontext", "FLUX.1 Fill", "Chroma", "AuraFlow", "Bria", "Wan 2.1", "LTX", "Z-Image")
IN_SLOW_TESTS = ("FLUX.1 Fill", "Wan 2.1")
TAKING_TURNS = [
    pytest.param(name, marks=pytest.mark.slow if name in IN_SLOW_TESTS else pytest.mark.soak)
    for name in EIGHT
]
ROUNDS, HELD_OUT = 10, 128
RESULTS = Path(__file__).parents[2] / "benchmarks/results/families-learning.json"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """saved(name) → a folder with that pipeline, its velocities small, and its prompts as JSON lines."""

    def make(name):
        folder = tmp_path_factory.mktemp("family")
        pipe, call = build(name)
        for key, p in pipe.transformer.named_parameters():
            if key.startswith(("proj_out", "output_proj")):
                p.data *= 0.1  # samples are then spread like noise, as a trained flow's
        pipe.save_pretrained(folder / "pipeline")
        inputs = {}
        for key, value in call.items():
            inputs[key] = f"{key}.png" if "image" in key else value
            if "image" in key:
                value.save(folder / inputs[key])
        lines = [json.dumps({"prompt": prompt, **inputs}) for prompt in ("a cat", "dog 3 by the sea")]
        (folder / "prompts.jsonl").write_text("\n".join(lines))
        return folder

    return make


def settings(folder, **more):
    # all layers: the output layer, drawn small, lets through a tenth of what the layers before it learn
    small = dict(
        rollout=64, batch=64, steps_per_round=8, rounds=ROUNDS, lr=3e-2, warmup=0, alpha=0.0, tau=1.0,
        weights="advantage", solver="euler", grid="own", nfe=3, probe=4, lora=4, lora_targets=["all"], chunk=64,
    )  # fmt: skip
    return Finetune(prompts=str(folder / "prompts.jsonl"), **small | more)


def policy_of(folder, s):
    return Loader(CPU, "fp32", how=s).load(f"diffusers:{folder / 'pipeline'}").policy


def mean(x):
    return x.flatten(1).mean(1)


def held_out(policy, s):
    """Mean reward of held-out samples, with its 95 % interval."""
    rows = start_conditions(policy, HELD_OUT, s)
    x = sample(policy, start_noise(policy, HELD_OUT, s.seed), s, s.chunk, condition=rows)
    r = mean(policy.decode(x, rows))
    half = 1.96 * float(r.std()) / HELD_OUT**0.5
    return [float(r.mean()) + k * half for k in (-1, 0, 1)]


class Leave(Callback):
    class Left(Exception):
        pass

    def on_boundary(self, trainer):
        if trainer.round == 1 and trainer.current and trainer.current.losses:
            raise self.Left


@pytest.mark.parametrize("name", TAKING_TURNS)
def test_a_family_learns_and_the_fresh_pipeline_reads_its_adapters(name, saved, results, tmp_path):
    folder = saved(name)
    s = settings(folder)
    policy = policy_of(folder, s)
    before = held_out(policy, s)
    trainer = Trainer(policy, mean, s)
    for _ in trainer.train(ROUNDS):
        pass
    after = held_out(policy, s)
    print(f"{name}: reward {before} before, {after} after {ROUNDS} rounds")
    save_trainer(trainer, tmp_path / "step", {})
    exported = export_error(folder, tmp_path / "step", policy, s)
    results.setdefault(name, {}).update(before=before, after=after, export_error=exported)
    assert after[0] > before[2]


def export_error(folder, exported, policy, s):
    """Largest difference between our pictures and those of the pipeline itself with the exported adapters."""
    import diffusers

    fresh = diffusers.DiffusionPipeline.from_pretrained(folder / "pipeline")
    fresh.set_progress_bar_config(disable=True)
    own, row = policy.pipeline, torch.tensor([1])
    call = own.arguments | own.conditions[1].inputs
    _, untuned = recorded(fresh, s.nfe, **call)
    if hasattr(fresh, "load_lora_weights"):
        fresh.load_lora_weights(exported, weight_name="pytorch_lora_weights.safetensors")
    else:
        fresh.transformer.load_lora_adapter(
            exported, prefix="transformer", weight_name="pytorch_lora_weights.safetensors"
        )
    steps, output = recorded(fresh, s.nfe, **call)
    ours = policy.decode(sample(policy, steps[0].x.float(), s, 1, condition=row), row)
    theirs, base = (PipelineVelocity.decoded(out) for out in (output, untuned))
    error, moved = (ours - theirs).abs().max(), (base - theirs).abs().max()
    assert error <= 1e-3 and error <= 0.02 * moved, (error, moved)
    return float(error)


@pytest.mark.slow
@pytest.mark.parametrize("name", EIGHT)
def test_at_no_temperature_nothing_moves(name, saved, results):
    folder = saved(name)
    s = settings(folder, rounds=2, rollout=6, batch=6, steps_per_round=2, chunk=4, tau=0.0)
    assert s.method == Finetune.model_fields["method"].default
    trainer = build_trainer(policy_of(folder, s), mean, s)
    before = {key: value.clone() for key, value in lora.lora_state(trainer.policy.network).items()}
    drift = max(record["w2_coupled"] for record in trainer.train(2))
    results.setdefault(name, {}).update(drift_at_no_temperature=drift)
    after = lora.lora_state(trainer.policy.network)
    assert all(torch.equal(before[key], after[key]) for key in before) and drift <= 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("name", EIGHT)
def test_a_run_that_was_left_ends_as_one_that_was_not(name, saved, results, tmp_path):
    folder = saved(name)
    s = settings(folder, rounds=2, rollout=6, batch=6, steps_per_round=2, chunk=4)
    whole, left, again = (Trainer(policy_of(folder, s), mean, s) for _ in range(3))
    list(whole.train(2))
    left.callbacks.append(Leave())
    with pytest.raises(Leave.Left):
        list(left.train(2))
    save_trainer(left, tmp_path / "step", {})
    restore_trainer(again, checkpoint.load(tmp_path / "step"))
    list(again.train(2))
    one, two = (lora.lora_state(t.policy.network) for t in (whole, again))
    difference = max(float((one[key] - two[key]).abs().max()) for key in one)
    results.setdefault(name, {}).update(difference_after_resuming=difference)
    assert difference == 0


def test_the_result_file_holds_what_the_tests_demand():
    found = json.loads(RESULTS.read_text())
    assert set(found) == set(EIGHT)
    for r in found.values():
        assert r["after"][0] > r["before"][2] and r["difference_after_resuming"] == 0
        assert r["drift_at_no_temperature"] <= 1e-6
