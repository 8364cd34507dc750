"""Published adapters: a run starts from one as its own reference, and what it exports is the whole change."""

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from published_loras import (
    CPU,
    HOW,
    SMALL,
    WEIGHTS,
    by_diffusers,
    by_kohya,
    by_peft,
    name_of,
    plain,
    randomised,
    start,
)
from safetensors.torch import load_file, save_file
from tiny_pipelines import build

from orwcfm_fast.checkpoints import checkpoint
from orwcfm_fast.errors import UserError
from orwcfm_fast.method.rollout import sample, start_conditions, start_noise
from orwcfm_fast.networks import lora
from orwcfm_fast.networks.flow.field import PipelineVelocity
from orwcfm_fast.planning.pipeline import plan_pipeline
from orwcfm_fast.runs.build import build_trainer
from orwcfm_fast.runs.load import Loader
from orwcfm_fast.runs.resume import restarted_settings
from orwcfm_fast.runs.run import Run
from orwcfm_fast.runs.trainer_state import restore_trainer, save_trainer
from orwcfm_fast.settings import Finetune, Sample


def images(policy, how):
    return policy.decode(sample(policy, start_noise(policy, 4, 0), how, how.chunk))


def their_images(pipe, policy, how):
    texts = [p.text for p in policy.prompts_of(start_conditions(policy, 4, how))]
    guidance = 3.5 if "Flux" in type(pipe).__name__ else 1.0
    made = pipe(
        texts, height=16, width=16, num_inference_steps=3, guidance_scale=guidance, max_sequence_length=6,
        output_type="pt", latents=start_noise(policy, 4, 0),
    )  # fmt: skip
    return 2 * made.images - 1


CASES = [
    ("flux", by_diffusers, {}),
    ("sd3", by_diffusers, {}),
    ("flux", by_diffusers, {"use_dora": True}),
    ("sd3", by_diffusers, {"rank_pattern": {"to_v": 2}, "alpha_pattern": {"to_v": 8}, "use_rslora": True}),
    ("flux", by_kohya, {}),
]


@pytest.mark.parametrize(("kind", "make", "config"), CASES, ids=name_of)
def test_a_run_starts_as_the_published_model_and_exports_all_of_what_it_became(
    kind, make, config, pipeline_folder, prompts_file, tmp_path
):
    folder = pipeline_folder(kind)
    file = make(folder, tmp_path / "published", **config)
    s, policy = start(folder, prompts_file, file)
    theirs = plain(folder)
    untuned = their_images(theirs, policy, s)
    theirs.load_lora_weights(file.parent, weight_name=file.name)
    published = their_images(theirs, policy, s)
    assert (untuned - published).abs().mean() > 3e-3
    assert (images(policy, s) - published).abs().max() <= 1e-3

    trainer = build_trainer(policy, lambda x: x.flatten(1).mean(1), s)
    assert torch.equal(images(policy, s), images(trainer.reference, s))  # its own reference, bit for bit
    [*trainer.train(1)]
    assert (images(trainer.reference, s) - published).abs().max() <= 1e-3
    save_trainer(trainer, tmp_path / "step", {})
    tuned = images(policy, s)
    assert (tuned - published).abs().max() > 3e-3

    exported = plain(folder)
    exported.load_lora_weights(tmp_path / "step", weight_name=WEIGHTS)
    assert (their_images(exported, policy, s) - tuned).abs().max() <= 1e-3


def test_one_that_peft_saved_starts_a_run(pipeline_folder, prompts_file, tmp_path):
    folder = pipeline_folder("sd3")
    s, policy = start(folder, prompts_file, by_peft(folder, tmp_path))
    assert (s.lora, s.lora_alpha, s.lora_kind) == (3, 5.0, "rslora")
    theirs = plain(folder)
    theirs.transformer = get_peft_model(
        theirs.transformer, LoraConfig(r=3, lora_alpha=5, use_rslora=True, target_modules=["to_k"])
    ).base_model.model
    randomised(theirs.transformer)
    assert (images(policy, s) - their_images(theirs, policy, s)).abs().max() <= 1e-3


@pytest.mark.parametrize("kind", ["plain", "dora"])
def test_a_continued_run_resumes_exactly_without_the_published_file(
    kind, pipeline_folder, prompts_file, tmp_path
):
    folder = pipeline_folder("flux")
    file = by_diffusers(folder, tmp_path / "published", use_dora=kind == "dora")

    def reward(x):
        return x.flatten(1).mean(1)

    s, policy = start(folder, prompts_file, file)
    assert s.lora_kind == kind
    whole = build_trainer(policy, reward, s)
    reference = whole.reference
    checkpoint.save(
        tmp_path / "reference", {"kind": "reference", **reference.describe()}, **reference.tensors()
    )
    [*whole.train(1)]
    save_trainer(whole, tmp_path / "step", {})
    [*whole.train(2)]
    file.unlink()
    loader = Loader(CPU, "fp32", how=s)
    again = build_trainer(loader.load(str(tmp_path / "reference")).policy, reward, s)
    restore_trainer(again, checkpoint.load(tmp_path / "step"))
    [*again.train(2)]
    for name in (lora.TRAINED, lora.START):
        one, two = (lora.lora_state(t.policy.network, name) for t in (whole, again))
        assert one and all(torch.equal(one[key], two[key]) for key in one)
    tuned = Loader(CPU, "fp32", how=Sample()).load(str(tmp_path / "step")).policy
    at = start_noise(tuned, 2, 0), torch.tensor([0, 1])
    save_trainer(again, tmp_path / "last", {})
    last = Loader(CPU, "fp32", how=Sample()).load(str(tmp_path / "last")).policy
    assert torch.equal(last.velocity(0.5, *at), policy.velocity(0.5, *at))
    assert torch.equal(last.frozen_copy().velocity(0.5, *at), reference.velocity(0.5, *at))
    assert not torch.equal(last.velocity(0.5, *at), tuned.velocity(0.5, *at))


def test_with_no_reward_weight_a_continued_policy_stays_where_it_was(pipeline_folder, prompts_file, tmp_path):
    folder = pipeline_folder("sd3")
    s, policy = start(folder, prompts_file, by_diffusers(folder, tmp_path), tau=0.0)
    trainer = build_trainer(policy, lambda x: x.flatten(1).mean(1), s)
    before = {key: value.clone() for key, value in lora.lora_state(policy.network).items()}
    records = [*trainer.train(2)]
    assert max(record["w2_coupled"] for record in records) <= 1e-6
    assert all(torch.equal(before[key], value) for key, value in lora.lora_state(policy.network).items())


def test_what_the_file_says_of_text_encoders_is_left_out_with_a_warning(
    pipeline_folder, prompts_file, tmp_path, capsys
):
    folder = pipeline_folder("flux")
    file = by_diffusers(folder, tmp_path)
    tensors = load_file(file)
    tensors["text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_A.weight"] = torch.zeros(4, 16)
    save_file(tensors, file)
    start(folder, prompts_file, file)
    assert "its adapters of text_encoder are left out" in capsys.readouterr().err


def test_a_continued_run_is_resumed_and_evaluated_against_the_published_model(
    run_cli, pipeline_folder, prompts_file, tmp_path
):
    folder = pipeline_folder("flux")
    file = by_diffusers(folder, tmp_path / "published")
    flags = ("--image-size", 8, "--prompt-tokens", 6, "--solver", "euler", "--grid", "own", "--nfe", 3)
    made = run_cli(
        "finetune", "--model", f"diffusers:{folder}", "--prompts", prompts_file, "--lora-init", file, *flags,
        "--precision", "fp32", "--reward", "brightness", "--rounds", 1, "--steps-per-round", 3, "--rollout", 16,
        "--batch", 8, "--lr", 0.01, "--warmup", 0, "--probe", 4, "--eval-n", 8, "--quiet", "--out", "run",
    )  # fmt: skip
    assert made.code == 0, made.err
    file.unlink()
    again = run_cli("finetune", "--resume", "run", "--rounds", 2, "--quiet")
    assert again.code == 0, again.err
    before = json.loads(Path("run/summary.json").read_text())["before"]
    measured = run_cli("evaluate", "run", "-n", 8, *flags[4:], "--json")
    assert measured.code == 0, measured.err
    reference, tuned = json.loads(measured.out)["models"]
    assert reference["reward"]["mean"] == pytest.approx(before["reward"]["mean"], abs=1e-5)
    assert reference["w2_coupled"]["mean"] == 0 < tuned["w2_coupled"]["mean"]


@pytest.mark.parametrize(("kind", "gpu_gib"), [("plain", None), ("dora", 24)])
def test_the_plan_counts_the_published_adapter_its_copy_and_the_values_to_begin_again_from(
    kind, gpu_gib, pipeline_folder, prompts_file, tmp_path
):
    folder = pipeline_folder("flux")
    file = by_diffusers(folder, tmp_path, use_dora=kind == "dora")
    s, policy = start(folder, prompts_file, file, model=f"diffusers:{folder}", lora_kind=kind)
    trainer = build_trainer(policy, lambda x: x.flatten(1).mean(1), s)
    adapters = sum(p.nbytes for key, p in policy.network.named_parameters() if ".lora_" in key)
    held = adapters + sum(value.nbytes for value in trainer.start.values())
    plan = plan_pipeline(s.model_copy(update={"lora": 0}), gpu_gib)
    assert [*plan] == ["all weights", "adapters of rank 4"]
    assert plan["adapters of rank 4"].held["adapters and their initial values"] == held
    trained = sum(p.nbytes for p in trainer.optimizer.parameters)
    assert plan["adapters of rank 4"].held["optimizer"] == 2 * trained


def test_a_restart_by_torchrun_finds_the_run_whose_rank_its_command_does_not_name(
    pipeline_folder, prompts_file, tmp_path, monkeypatch
):
    folder = pipeline_folder("sd3")
    file = by_diffusers(folder, tmp_path)
    s, _ = start(folder, prompts_file, file)
    run = Run.create(tmp_path / "run")
    run.write_config("finetune", s)
    monkeypatch.setattr("orwcfm_fast.runs.resume.launched", lambda: True)
    repeated = Finetune(**{key: getattr(s, key) for key in ("prompts", "lora_init", "reward", *HOW, *SMALL)})
    assert "lora" not in restarted_settings(repeated, run.path, False)
    other = repeated.model_copy(update={"lora_init": []})
    with pytest.raises(UserError, match="holds a run with --lora-init"):
        restarted_settings(other, run.path, False)


def test_two_experts_have_a_file_each_which_the_pipeline_loads_and_from_which_a_run_starts(tmp_path):
    pipe, call = build("Wan 2.2, two experts")
    pipe.save_pretrained(tmp_path / "pipeline")
    (tmp_path / "prompts.jsonl").write_text(json.dumps({"prompt": "a cat", **call}))
    model = f"diffusers:{tmp_path / 'pipeline'}"
    small = dict(
        rollout=4, batch=4, steps_per_round=2, lr=0.05, warmup=0, probe=2, solver="euler", grid="own", nfe=3
    )
    s = Finetune(prompts=str(tmp_path / "prompts.jsonl"), lora=4, lora_alpha=6.0, chunk=2, **small)
    policy = Loader(CPU, "fp32", model, how=s).load().policy
    [*build_trainer(policy, lambda x: x.flatten(1).mean(1), s).train(1)]
    randomised(policy.network)
    out = checkpoint.save(tmp_path / "step", policy.describe(), **policy.tensors())
    files = [out / f"pytorch_lora_weights{more}.safetensors" for more in ("", "_2")]
    assert all(key.startswith("transformer.") for file in files for key in load_file(file))

    fresh = plain(tmp_path / "pipeline")
    for file, second in zip(files, (False, True), strict=True):
        fresh.load_lora_weights(out, weight_name=file.name, load_into_transformer_2=second)
    own = policy.pipeline
    theirs = PipelineVelocity(fresh, own.arguments, conditions=own.conditions)
    again = s.model_copy(update={"lora": 0, "lora_alpha": None, "lora_init": [str(file) for file in files]})
    continued = Loader(CPU, "fp32", model, how=again).load().policy
    x, rows, t = start_noise(policy, 2, 0), torch.zeros(2, dtype=torch.int64), torch.tensor([0.02, 0.9])
    with torch.no_grad():
        ours, base = policy.velocity(t, x, rows), policy.frozen_copy().velocity(t, x, rows)
        for other in (theirs(t, x, rows), continued.velocity(t, x, rows)):
            error = (ours - other).abs().amax(dim=(1, 2, 3, 4))
            assert (error <= 1e-4 * ours.abs().max()).all()
    assert ((ours - base).abs().amax(dim=(1, 2, 3, 4)) > 1e-3).all()  # of either expert
