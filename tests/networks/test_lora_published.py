"""Published adapters: a run starts from one as its own reference, and what it exports is the whole change."""

import json
from pathlib import Path

import diffusers
import pytest
import torch
from peft import LoraConfig, get_peft_model
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
from orwcfm_fast.runs.resolve import resolved
from orwcfm_fast.runs.resume import restarted_settings
from orwcfm_fast.runs.run import Run
from orwcfm_fast.runs.trainer_state import restore_trainer, save_trainer
from orwcfm_fast.settings import Finetune, Sample

CPU = torch.device("cpu")
HOW = dict(solver="euler", grid="own", nfe=3, prompt_tokens=6, chunk=4, image_size=16)
SMALL = dict(rollout=12, batch=6, steps_per_round=2, probe=4, rounds=2, lr=1e-2, warmup=0)
WEIGHTS = "pytorch_lora_weights.safetensors"


def randomised(network):
    """Every adapter of it with random A and B."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for key, p in network.named_parameters():
            if "lora_A" in key or "lora_B" in key:
                p.normal_(std=0.3, generator=generator)


def plain(folder):
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def by_diffusers(folder, out, **config):
    """`add_adapter` and `save_lora_weights`, as a user of diffusers does."""
    from diffusers.training_utils import _collate_lora_metadata

    pipe = plain(folder)
    wanted = {"r": 4, "lora_alpha": 6, "target_modules": ["to_q", "to_v", "ff.net.2"]} | config
    pipe.transformer.add_adapter(LoraConfig(**wanted))
    randomised(pipe.transformer)
    layers = lora.peft().get_peft_model_state_dict(pipe.transformer)
    header = _collate_lora_metadata({"transformer": pipe.transformer})
    type(pipe).save_lora_weights(out, transformer_lora_layers=layers, **header)
    return out / WEIGHTS


def by_peft(folder, out):
    """PeftModel.save_pretrained: keys "base_model.model.…", and its settings in a file beside."""
    model = get_peft_model(
        plain(folder).transformer, LoraConfig(r=3, lora_alpha=5, use_rslora=True, target_modules=["to_k"])
    )
    randomised(model)
    model.save_pretrained(out)
    return out / "adapter_model.safetensors"


def by_kohya(folder, out):
    """Keys of kohya's scripts for FLUX, with an alpha that is not the rank."""
    generator = torch.Generator().manual_seed(4)
    tensors = {}
    for block, width in (("double_blocks_0_img_attn_proj", 32), ("double_blocks_0_txt_attn_proj", 32)):
        key = f"lora_unet_{block}"
        tensors[f"{key}.lora_down.weight"] = torch.randn(4, width, generator=generator) * 0.5
        tensors[f"{key}.lora_up.weight"] = torch.randn(32, 4, generator=generator) * 0.5
        tensors[f"{key}.alpha"] = torch.tensor(2.0)
    out.mkdir(exist_ok=True)
    save_file(tensors, out / "kohya.safetensors")
    return out / "kohya.safetensors"


def start(folder, prompts_file, file, **more):
    named = dict(prompts=str(prompts_file), lora_init=[str(file)], reward=["brightness"])
    s = Finetune(**named | HOW | SMALL | more)
    loaded = Loader(CPU, "fp32", f"diffusers:{folder}", how=s).load()
    return resolved(s, loaded), loaded.policy


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


def name_of(value):
    return getattr(value, "__name__", str(value))


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


def foreign(folder, out):
    save_file({"transformer.blocks.0.attn.to_q.lora_A.weight": torch.zeros(4, 8)}, out / "f.safetensors")
    return out / "f.safetensors"


def of_another_width(folder, out):
    file = by_diffusers(folder, out)
    save_file({k: torch.zeros(8, 7) if "lora_A" in k else torch.zeros(5, 8) for k in load_file(file)}, file)
    return file


def no_safetensors(folder, out):
    (out / "f.safetensors").write_text("nothing of the kind")
    return out / "f.safetensors"


def weights_of_a_vae(folder, out):
    save_file({"encoder.conv_in.weight": torch.zeros(3, 3)}, out / "f.safetensors")
    return out / "f.safetensors"


def with_a_wrong_alpha(folder, out):
    file = by_peft(folder, out)
    beside = out / "adapter_config.json"
    beside.write_text(json.dumps(json.loads(beside.read_text()) | {"lora_alpha": "much"}))
    return file


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (with_a_wrong_alpha, "no LoRA of"),
        (foreign, "adapters of another network or rank"),
        (of_another_width, "adapters of another network or rank"),
        (no_safetensors, "its header"),
        (weights_of_a_vae, "holds no low-rank adapter"),
        (lambda folder, out: out / "missing.safetensors", "No such file"),
    ],
    ids=name_of,
)
def test_a_wrong_file_is_one_line(make, message, pipeline_folder, prompts_file, tmp_path):
    folder = pipeline_folder("sd3")
    with pytest.raises(UserError, match=message) as error:
        start(folder, prompts_file, make(folder, tmp_path))
    assert str(error.value).startswith("--lora-init ") and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lora": 8}, r"^--lora 8: the published adapter has 4; leave --lora out$"),
        ({"lora_alpha": 4.0}, r"^--lora-alpha 4.0: the published adapter has 6"),
        ({"lora_kind": "dora"}, r"^--lora-kind dora: the published adapter has plain"),
    ],
    ids=str,
)
def test_a_setting_that_the_file_contradicts_is_one_line(
    change, message, pipeline_folder, prompts_file, tmp_path
):
    folder = pipeline_folder("sd3")
    file = by_diffusers(folder, tmp_path)
    with pytest.raises(UserError, match=message):
        start(folder, prompts_file, file, **change)
    s, _ = start(folder, prompts_file, file, lora=4)
    assert (s.lora, s.lora_alpha, s.lora_kind) == (4, 6.0, "plain")


def test_more_files_than_transformers_are_refused(pipeline_folder, prompts_file, tmp_path):
    folder = pipeline_folder("sd3")
    file = str(by_diffusers(folder, tmp_path))
    with pytest.raises(UserError, match="2 files, but the pipeline has 1 transformer"):
        start(folder, prompts_file, file, lora_init=[file, file])


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
