"""A diffusers pipeline as a policy: its own images, its prompts, its base left alone."""

import gc
import shutil
from collections import Counter
from dataclasses import replace

import pytest
import torch

from orwcfm_fast.checkpoints import checkpoint
from orwcfm_fast.errors import UserError
from orwcfm_fast.method import noise
from orwcfm_fast.method.callbacks import Callback
from orwcfm_fast.method.coupling import couple
from orwcfm_fast.method.rollout import draw, sample, start_conditions, start_noise
from orwcfm_fast.method.weighting import weigh, weigh_within
from orwcfm_fast.networks import lora
from orwcfm_fast.networks.flow import encodings
from orwcfm_fast.networks.flow.field import PipelineVelocity
from orwcfm_fast.rewards import make_reward
from orwcfm_fast.runs.build import build_trainer
from orwcfm_fast.runs.load import Loader
from orwcfm_fast.runs.trainer_state import restore_trainer, save_trainer
from orwcfm_fast.settings import Finetune, Sample

CPU = torch.device("cpu")
EULER = dict(solver="euler", grid="own", nfe=4, prompt_tokens=6, chunk=3, image_size=16)
SMALL = dict(rollout=12, batch=6, steps_per_round=2, probe=4, rounds=1, lr=1e-2, warmup=0)


def policy_of(folder, how):
    return Loader(CPU, "fp32", how=how).load(f"diffusers:{folder}").policy


@pytest.fixture
def trained_on(pipeline_folder, prompts_file):
    """trained_on(kind, **settings) → settings and a policy, for fine-tuning."""

    def make(kind="sd3", **settings):
        s = Finetune(prompts=str(prompts_file), **EULER | SMALL | settings)
        return s, policy_of(pipeline_folder(kind), s)

    return make


def disturb(network):
    """As training does: B away from zero."""
    with torch.no_grad():
        for key, p in network.named_parameters():
            if "lora_B" in key:
                p.normal_(std=0.1, generator=torch.Generator().manual_seed(2))


def their_images(folder, x0, texts, how):
    """What the pipeline itself makes of the same noise and prompts, [B, 3, H, W] in [-1, 1]."""
    import diffusers

    theirs = diffusers.DiffusionPipeline.from_pretrained(folder)
    theirs.set_progress_bar_config(disable=True)
    made = theirs(
        texts, height=how.image_size, width=how.image_size, num_inference_steps=how.nfe, latents=x0,
        guidance_scale=how.guidance, max_sequence_length=how.prompt_tokens, output_type="pt",
    )  # fmt: skip
    return 2 * made.images - 1


@pytest.mark.parametrize(
    ("kind", "guidance"), [("sd3", 1.0), ("sd3", 4.0), ("flux", 3.5), ("schnell", 1.0)], ids=str
)
def test_our_sampler_gives_the_pipelines_own_images(kind, guidance, pipeline_folder, prompts_file):
    folder = pipeline_folder(kind)
    how = Sample(prompts=str(prompts_file), guidance=guidance, **EULER)
    policy = policy_of(folder, how)
    x0 = start_noise(policy, 5, 0)
    texts = [p.text for p in policy.prompts_of(start_conditions(policy, 5, how))]
    ours = policy.decode(sample(policy, x0, how, how.chunk))
    assert len({*texts}) > 1 and ours.std() > 0.1
    assert (ours - their_images(folder, x0, texts, how)).abs().max() <= 1e-3


@pytest.mark.parametrize("kind", ["sd3", "flux"])
def test_with_its_adapters_off_a_policy_has_the_base_models_velocity_bit_for_bit(kind, trained_on):
    _, policy = trained_on(kind)
    x, c, t = start_noise(policy, 4, 0), torch.tensor([0, 2, 1, 1]), torch.rand(4)
    before = policy.velocity(t, x, c)
    lora.add_lora(policy.network, Finetune(lora=4))
    disturb(policy.network)
    assert torch.equal(policy.frozen_copy().velocity(t, x, c), before)
    assert not torch.allclose(policy.velocity(t, x, c), before, atol=1e-3)


def test_a_rollouts_prompts_are_those_of_its_global_numbers_and_reach_reward_policy_and_reference(trained_on):
    s, policy = trained_on(lora=4)
    seen = []

    def reward(images, prompts, metadata):
        seen.extend(zip(prompts, metadata, strict=True))
        return images.flatten(1).mean(1)

    trainer = build_trainer(policy, reward, s)
    trainer.round = 2
    rollout = trainer.draw_and_score().rollout
    expected = start_conditions(policy, 12, s, 24)
    assert torch.equal(rollout.condition, expected)
    assert torch.equal(draw(policy, 12, 2, s.seed, s, 5).condition, expected)  # in chunks of any size
    assert seen == [(p.text, p.metadata) for p in policy.conditions.of(expected)]
    batch = next(iter(trainer.minibatches(rollout, torch.ones(12))))
    for x1, c in zip(batch.x1, batch.condition, strict=True):
        here = [i for i in range(12) if torch.equal(rollout.x1[i], x1)]
        assert c in rollout.condition[here]
    v = policy.velocity(batch.t, batch.x_t, batch.condition)
    reference = trainer.reference
    assert torch.equal(reference.velocity(batch.t, batch.x_t, batch.condition), v)  # adapters start at zero
    other = (batch.condition + 1) % 3
    assert not torch.equal(reference.velocity(batch.t, batch.x_t, other), v)


def test_a_round_left_between_its_steps_goes_on_bit_for_bit(trained_on, tmp_path):
    def trainer():
        s, policy = trained_on("flux", lora=4, rounds=2, steps_per_round=3)
        return build_trainer(policy, lambda x: x.flatten(1).mean(1), s)

    class Left(Exception):
        pass

    class Leave(Callback):
        def on_boundary(self, trainer):
            if trainer.round == 1 and trainer.current and trainer.current.losses:
                raise Left

    whole, left, again = trainer(), trainer(), trainer()
    list(whole.train(2))
    left.callbacks.append(Leave())
    with pytest.raises(Left):
        list(left.train(2))
    save_trainer(left, tmp_path / "step_4", {})
    restore_trainer(again, checkpoint.load(tmp_path / "step_4"))
    list(again.train(2))
    one, two = (lora.lora_state(t.policy.network) for t in (whole, again))
    assert all(torch.equal(one[k], two[k]) for k in one)


def test_with_groups_weights_compare_within_the_prompt_alone(trained_on):
    s, policy = trained_on(lora=4, group=3, weights="advantage", tau=1.0)
    trainer = build_trainer(policy, lambda x: x.flatten(1).mean(1), s)
    rollout = trainer.draw_and_score().rollout
    w = trainer.signal(rollout)
    shifted = replace(rollout, reward=rollout.reward + 10.0 * rollout.condition)  # easy prompts and hard ones
    assert torch.allclose(trainer.signal(shifted), w, atol=1e-3)
    for c in rollout.condition.unique():
        mine = rollout.condition == c
        assert torch.allclose(w[mine], weigh(rollout.reward[mine], 1.0, "advantage"))
    alone = weigh_within(torch.tensor([3.0, 1.0, 1.0]), torch.tensor([0, 1, 1]), 0.5)
    assert alone.tolist() == [1.0, 1.0, 1.0]


def test_guidance_is_part_of_the_policy_that_is_trained(trained_on, prompts_file):
    prompts_file.write_text('{"prompt": "a cat"}\n{"prompt": "dog 3"}\n{"prompt": ""}\n')
    _, plain = trained_on()
    _, guided = trained_on(guidance=3.0)
    x, c, t = start_noise(plain, 2, 0), torch.tensor([0, 1]), torch.rand(2)
    none = plain.velocity(t, x, torch.tensor([2, 2]))
    expected = none + 3.0 * (plain.velocity(t, x, c) - none)
    assert torch.allclose(guided.velocity(t, x, c), expected, atol=1e-5)
    assert torch.equal(guided.frozen_copy().velocity(t, x, c), guided.velocity(t, x, c))


@pytest.mark.parametrize("kind", ["sd3", "flux"])
def test_gradient_checkpointing_changes_no_gradient(kind, trained_on):
    found = []
    for checkpointing in (False, True):
        s, policy = trained_on(kind, lora=4, gradient_checkpointing=checkpointing)
        trainer = build_trainer(policy, lambda x: x.flatten(1).mean(1), s)
        disturb(policy.network)
        seed, index = torch.tensor(0), noise.indices(0, 4, CPU)
        batch = couple(start_noise(policy, 4, 1), torch.ones(4), 1.0, seed, index)
        batch = replace(batch, anchor=torch.zeros_like(batch.x1))
        trainer.optimizer.gradient(replace(batch, condition=torch.tensor([0, 1, 2, 0])), seed, 2)
        found.append([p.grad for p in trainer.optimizer.parameters])
        assert policy.network.transformer.gradient_checkpointing == checkpointing
    assert all(torch.allclose(a, b, atol=1e-7) for a, b in zip(*found, strict=True))


def test_bf16_holds_the_base_in_bf16_and_the_adapters_in_fp32(trained_on, pipeline_folder):
    s, exact = trained_on(lora=4)
    policy = Loader(CPU, "bf16", how=s).load(f"diffusers:{pipeline_folder('sd3')}").policy
    x, c = start_noise(policy, 2, 0), torch.tensor([0, 1])
    v, near = exact.velocity(0.3, x, c), policy.velocity(0.3, x, c).float()
    assert (near - v).norm() <= 0.05 * v.norm()
    record = build_trainer(policy, lambda x: x.flatten(1).mean(1), s).one_round()
    kinds = Counter((p.dtype, p.requires_grad) for p in policy.network.parameters())
    assert kinds.keys() == {(torch.bfloat16, False), (torch.float32, True)}
    assert record["w2_coupled"] > 0


def test_encodings_are_computed_once_and_the_cache_knows_what_they_were_made_of(
    trained_on, monkeypatch, pipeline_folder, tmp_path, prompts_file
):
    _, first = trained_on()
    import transformers

    encoders = (transformers.T5EncoderModel, transformers.CLIPTextModelWithProjection)
    trained_on(prompt_tokens=5)
    there = [x for x in gc.get_objects() if type(x) in encoders]
    assert {p.device.type for x in there for p in x.parameters()} == {"meta"}  # the weights are gone
    added, encode = [], PipelineVelocity.encoded
    monkeypatch.setattr(
        PipelineVelocity, "encoded", lambda self, **of: added.append(of) or encode(self, **of)
    )
    _, again = trained_on()
    assert not added
    x, c, t = start_noise(first, 3, 0), torch.arange(3), torch.rand(3)
    assert torch.equal(first.velocity(t, x, c), again.velocity(t, x, c))
    trained_on(prompt_tokens=7)
    assert len(added) == 3
    prompts_file.write_text("a cat\ndog 3\nsky \nsea\n")
    trained_on()
    assert added[3:] == [{"prompt": "sea"}]
    other = shutil.copytree(pipeline_folder("sd3"), tmp_path / "other")
    assert encodings.fingerprint(other) == encodings.fingerprint(pipeline_folder("sd3"))
    weights = other / "text_encoder_3" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert encodings.fingerprint(other) != encodings.fingerprint(pipeline_folder("sd3"))


def test_clip_without_a_prompt_of_its_own_scores_each_image_against_its_own(trained_on, clip_folder):
    local = dict(clip_model=f"local-dir:{clip_folder()}", reward=["clip"])
    s, policy = trained_on(**local)
    images, rows = torch.rand(4, 3, 16, 16) * 2 - 1, torch.tensor([0, 2, 1, 1])
    found = make_reward(s.reward, s).scores(images, prompts=policy.prompts_of(rows)).total
    for i, prompt in enumerate(policy.conditions.of(rows)):
        alone = Finetune(**local, prompt=[prompt.text], clip_score="cosine")
        assert torch.allclose(make_reward(alone.reward, alone)(images[i : i + 1]), found[i], atol=1e-5)


def test_ot_coupling_across_prompts_is_refused(trained_on):
    s, policy = trained_on(coupling="ot", method="orw", lora=4)
    with pytest.raises(UserError, match="across prompts"):
        build_trainer(policy, lambda x: x.flatten(1).mean(1), s)
