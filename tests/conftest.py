"""Shared by all tests: a cache of their own, a small pretrained model, the command line in process."""

import os
import shutil
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

os.environ["HF_HUB_OFFLINE"] = "1"  # nothing is fetched in a test
for name in ("FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
    os.environ.pop(name, None)  # with these rich takes a pipe for a terminal


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory) -> Path:
    """An empty $ORWCFM_CACHE for the whole session; the first to need the digits model fills it."""
    path = tmp_path_factory.mktemp("cache")
    os.environ["ORWCFM_CACHE"] = str(path)
    return path


@pytest.fixture
def stopwatch():
    """Seconds since the test began: wall clock, or on a busy machine what two cores of its own would take."""
    wall, cpu = time.perf_counter(), time.process_time()
    return lambda: min(time.perf_counter() - wall, (time.process_time() - cpu) / 2)


@pytest.fixture
def run_cli(tmp_path, monkeypatch):
    """orwcfm(*args) in an empty directory → code, out, err; tracebacks of bugs come through."""
    monkeypatch.chdir(tmp_path)
    return orwcfm


def orwcfm(*args) -> SimpleNamespace:
    from typer.testing import CliRunner

    from orwcfm_fast.cli import load_app

    result = CliRunner().invoke(load_app(), [str(a) for a in args])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return SimpleNamespace(code=result.exit_code, out=result.stdout, err=result.stderr)


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory):
    """clip_folder(**of the vision tower): a random open_clip model saved to disk with its configuration."""
    import json

    import open_clip

    def make(preprocess: dict | None = None, **vision) -> Path:
        tower = {"image_size": 32, "layers": 2, "width": 64, "head_width": 32, "patch_size": 16, **vision}
        text = {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2}
        config = {"embed_dim": 32, "vision_cfg": tower, "text_cfg": text}
        folder = tmp_path_factory.mktemp("clip")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            network = open_clip.CLIP(**config)
        for same_for_all in (network.visual.class_embedding, network.visual.positional_embedding):
            torch.nn.init.zeros_(same_for_all)  # or every picture would look alike to it
        torch.nn.init.constant_(
            network.logit_scale, 3.0
        )  # its cosines differ 5 times as much as trained ones
        saved = {"model_cfg": config, "preprocess_cfg": preprocess or {}}
        (folder / "open_clip_config.json").write_text(json.dumps(saved))
        torch.save(network.state_dict(), folder / "open_clip_pytorch_model.bin")
        return folder

    return make


@pytest.fixture(scope="session")
def two_gaussians_weights():
    """State dict of an MLP pretrained on the two Gaussians: a few seconds, shared."""
    from orwcfm_fast.data.datasets import load_data
    from orwcfm_fast.method.pretrain import pretrain
    from orwcfm_fast.networks.policy import make_policy
    from orwcfm_fast.settings import Pretrain

    torch.set_num_threads(1)  # small networks are slower on two
    data, _ = load_data("two-gaussians")
    policy = make_policy("mlp", "two-gaussians", (1,), torch.device("cpu"))
    settings = Pretrain(data="two-gaussians", model="mlp", steps=1500, batch=512)
    return pretrain(policy, data, settings, lambda step, loss: None).averaged().network.state_dict()


@pytest.fixture(scope="session")
def digits_model(cache):
    """The default digits model in the cache, pretrained for a seventh of its steps."""
    from orwcfm_fast.data.datasets import load_data
    from orwcfm_fast.method.pretrain import pretrain
    from orwcfm_fast.networks.policy import make_policy
    from orwcfm_fast.settings import Pretrain

    torch.set_num_threads(1)
    data, _ = load_data("digits")
    policy = make_policy("unet-digits", "digits", (1, 8, 8), torch.device("cpu"))
    from orwcfm_fast.runs.trainer_state import save_pretrainer

    trainer = pretrain(policy, data, Pretrain(steps=150, ema=0.97), lambda step, loss: None)
    save_pretrainer(trainer, cache / "pretrained" / "unet-digits")
    return trainer.averaged()


@pytest.fixture
def two_gaussians(two_gaussians_weights):
    """A fresh policy with those weights."""
    from orwcfm_fast.networks.policy import make_policy

    policy = make_policy("mlp", "two-gaussians", (1,), torch.device("cpu"))
    policy.network.load_state_dict(two_gaussians_weights)
    return policy


@pytest.fixture
def base(two_gaussians_weights, tmp_path, monkeypatch) -> str:
    """The pretrained two Gaussians as the checkpoint "base" in an empty working directory."""
    from orwcfm_fast.checkpoints import checkpoint

    monkeypatch.chdir(tmp_path)
    state = {"kind": "reference", "model": "mlp", "data": "two-gaussians", "shape": [1]}
    checkpoint.save("base", state, model=two_gaussians_weights)
    return "base"


@pytest.fixture(scope="session")
def tiny_run_made(tmp_path_factory) -> Path:
    """A folder with `base`, an all but untrained checkpoint on two Gaussians, and `run`, two rounds from it."""
    folder = tmp_path_factory.mktemp("tiny")
    before = Path.cwd()
    os.chdir(folder)
    try:
        _make_tiny_run()
    finally:
        os.chdir(before)
    return folder


@pytest.fixture(scope="module")
def launch(cache):
    """launch(world, *args): orwcfm on so many ranks; launch.loop: the loop alone."""
    sys.path.append(str(Path(__file__).parent))
    from many_ranks import Launcher

    launcher = Launcher()
    yield launcher
    launcher.close()


@pytest.fixture
def tiny_run(tiny_run_made, run_cli) -> Path:
    """That run, copied to the test's directory: files of every kind."""
    shutil.copytree(tiny_run_made, ".", dirs_exist_ok=True, symlinks=True)
    return Path("run")


def _make_tiny_run() -> None:
    made = orwcfm(
        "pretrain", "--data", "two-gaussians", "--steps", 30, "--batch", 64, "--out", "base", "--quiet"
    )
    assert made.code == 0, made.err
    small = (
        "--rounds",
        2,
        "--rollout",
        64,
        "--batch",
        32,
        "--steps-per-round",
        3,
        "--eval-n",
        64,
        "--probe",
        16,
    )
    made = orwcfm("finetune", "--checkpoint", "base", "--out", "run", *small, "--quiet")
    assert made.code == 0, made.err


def _words(folder: Path):
    """A CLIP and a T5 tokenizer that know letters and digits, from small files."""
    import json
    import string

    from transformers import CLIPTokenizer, T5Tokenizer

    letters = [*string.ascii_lowercase, *string.digits]
    words = [*letters, *(f"{c}</w>" for c in letters), "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    clip = CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=12)
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), *((c, -3.0) for c in letters)]
    return clip, T5Tokenizer(pieces, extra_ids=0, model_max_length=12)


@pytest.fixture(scope="session")
def pipeline_folder(tmp_path_factory):
    """pipeline_folder("sd3", "flux" or "schnell"): a random pipeline of diffusers' own classes, saved to disk.

    calm: its velocities are small, so its samples are spread like noise, and training on them as they are keeps them
    so; as for a trained flow, and unlike for a random one.
    """
    import functools

    @functools.cache
    def make(kind: str, calm: bool = False) -> Path:
        import diffusers as d
        import transformers as t

        folder = tmp_path_factory.mktemp(kind)
        clip, t5 = _words(folder / "words")
        text = t.CLIPTextConfig(
            vocab_size=len(clip), hidden_size=16, intermediate_size=24, projection_dim=16, num_hidden_layers=2,
            num_attention_heads=2, max_position_embeddings=12, bos_token_id=clip.bos_token_id,
            eos_token_id=clip.eos_token_id, pad_token_id=clip.pad_token_id,
        )  # fmt: skip
        heads = dict(attention_head_dim=16, num_attention_heads=2, joint_attention_dim=32)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            long = t.T5EncoderModel(
                t.T5Config(vocab_size=len(t5), d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
            )
            vae = d.AutoencoderKL(
                3, 3, ("DownEncoderBlock2D",) * 2, ("UpDecoderBlock2D",) * 2, (8, 8), latent_channels=4,
                norm_num_groups=4, use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.06,
                scaling_factor=1.5,
            )  # fmt: skip
            if kind == "sd3":
                short = [t.CLIPTextModelWithProjection(text).eval() for _ in range(2)]
                network = d.SD3Transformer2DModel(
                    8, 1, 4, 2, **heads, caption_projection_dim=32, pooled_projection_dim=32, out_channels=4,
                    pos_embed_max_size=16, dual_attention_layers=(0,), qk_norm="rms_norm",
                )  # fmt: skip
                schedule = d.FlowMatchEulerDiscreteScheduler(shift=3.0)
                made = d.StableDiffusion3Pipeline(
                    network, schedule, vae, short[0], clip, short[1], clip, long.eval(), t5
                )
            else:
                network = d.FluxTransformer2DModel(
                    1, 16, num_layers=1, num_single_layers=1, **heads, pooled_projection_dim=16,
                    guidance_embeds=kind == "flux", axes_dims_rope=(4, 4, 8),
                )  # fmt: skip
                schedule = d.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=kind == "flux")
                one = t.CLIPTextModel(text).eval()
                made = d.FluxPipeline(schedule, vae, one, clip, long.eval(), t5, network)
        if calm:
            for p in made.transformer.proj_out.parameters():
                p.data *= 0.1
        made.save_pretrained(folder / "pipeline")
        return folder / "pipeline"

    return make


@pytest.fixture
def prompts_file(tmp_path) -> Path:
    """Three prompts, one of them twice as often as the others, with what a reward may read."""
    path = tmp_path / "prompts.jsonl"
    lines = [
        '{"prompt": "a cat"}',
        '{"prompt": "dog 3", "weight": 2}',
        '{"prompt": "sky", "metadata": {"dark": 1}}',
    ]
    path.write_text("\n".join(lines) + "\n")
    return path
