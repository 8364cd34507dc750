"""The CLIP reward against open_clip's own transform and computation, on random models saved to disk."""

import time

import pytest
import torch
from torch.nn import functional as F

from orwcfm_fast.errors import UserError
from orwcfm_fast.rewards import make_reward
from orwcfm_fast.rewards.clip import clip_of
from orwcfm_fast.settings import RewardOptions

PROMPTS, NEGATIVES = ["An image of dog", "a photo of a puppy"], ["Not an image of dog"]


@pytest.fixture(scope="module")
def folder(clip_folder):
    return clip_folder(image_size=64)


def options(folder, **more) -> RewardOptions:
    return RewardOptions(
        **{"prompt": PROMPTS, "negative": NEGATIVES, "clip_model": f"local-dir:{folder}"} | more
    )


def pictures(n=6, channels=3, height=32, width=32):
    """Smooth random pictures with edges, in [-1, 1]."""
    g = torch.Generator().manual_seed(0)
    coarse = torch.rand(n, channels, 5, 5, generator=g) * 3 - 1.5
    return (F.interpolate(coarse, (height, width), mode="bicubic") + 0.1 * torch.randn(1, generator=g)).clamp(
        -1, 1
    )


def as_pil(images):
    from PIL import Image

    levels = ((images + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).numpy()
    return [Image.fromarray(p[..., 0] if p.shape[-1] == 1 else p) for p in levels]


def open_clips_own(folder, images):
    """Its transform on PIL pictures, its encoders: (inputs, cosines [B, texts], logit scale)."""
    import open_clip

    name = f"local-dir:{folder}"
    model, _, transform = open_clip.create_model_and_transforms(name)
    inputs = torch.stack([transform(picture) for picture in as_pil(images)])
    with torch.no_grad():
        a = F.normalize(model.eval().encode_image(inputs), dim=-1)
        b = F.normalize(model.encode_text(open_clip.get_tokenizer(name)([*PROMPTS, *NEGATIVES])), dim=-1)
        return inputs, a @ b.T, model.logit_scale.exp()


SHAPES = [(3, 32, 32), (1, 28, 28), (3, 150, 201), (3, 97, 64), (3, 64, 64)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("mode", ["shortest", "longest", "squash"])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_transform_is_that_of_open_clip_and_pillow(shape, mode, interpolation):
    from open_clip.transform import PreprocessCfg, image_transform_v2

    from orwcfm_fast.rewards.pixels import Transform

    mean, std = (0.48, 0.46, 0.41), (0.27, 0.26, 0.28)
    own = image_transform_v2(
        PreprocessCfg(size=64, mean=mean, std=std, interpolation=interpolation, resize_mode=mode),
        is_train=False,
    )
    x = pictures(3, *shape)
    expected = torch.stack([own(picture) for picture in as_pil(x)])
    ours = Transform((64, 64), mean, std, interpolation, mode)(x)
    off = (ours - expected).abs() * torch.tensor(std).view(3, 1, 1) * 255
    assert off.max() < 1.01 and (off > 0.01).float().mean() < 0.005, "at most one level, in few pixels"


@pytest.mark.parametrize("shape", SHAPES[:3], ids=str)
def test_probability_and_cosine_are_open_clips_own(folder, shape):
    x = pictures(6, *shape)
    _, cosine, scale = open_clips_own(folder, x)
    p = (scale * cosine).softmax(-1)
    values = make_reward("clip", options(folder))(x)
    assert torch.allclose(values, p[:, 0] + p[:, 1] - p[:, 2], atol=2e-3)
    assert values.std() > 0.02, "this model tells the pictures apart"
    values = make_reward("clip", options(folder, clip_score="cosine"))(x)
    assert torch.allclose(values, cosine[:, :2].mean(1) - cosine[:, 2], atol=2e-3)
    alone = make_reward("clip", options(folder, clip_score="cosine", negative=[]))(x)
    assert torch.allclose(alone, cosine[:, :2].mean(1), atol=2e-3)
    spelled = make_reward(f"clip:{PROMPTS[0]}|{NEGATIVES[0]}", options(folder, prompt=[], negative=[]))(x)
    two = (scale * cosine[:, [0, 2]]).softmax(-1)
    assert torch.allclose(spelled, two[:, 0] - two[:, 1], atol=2e-3)


def test_bf16_is_open_clips_own_bf16_and_near_fp32(folder):
    x = pictures(6)
    exact, rounded = (clip_of(options(folder, clip_precision=p)) for p in ("fp32", "bf16"))
    assert next(rounded.network.visual.transformer.parameters()).dtype == torch.bfloat16 or any(
        p.dtype == torch.bfloat16 for p in rounded.network.parameters()
    )
    a, b = exact.image_features(x), rounded.image_features(x)
    assert b.dtype == torch.float32 and 0 < (a - b).abs().max() < 0.02
    assert make_reward("clip", options(folder, clip_precision="bf16"))(x).isfinite().all()


def test_openais_weights_get_the_activation_they_were_trained_with(monkeypatch):
    import open_clip

    asked = {}

    def no_download(*args, **how):
        asked.update(how)
        raise RuntimeError("no network here")

    monkeypatch.setattr(open_clip, "create_model", no_download)
    with pytest.raises(UserError, match="no network here"):
        make_reward("clip", RewardOptions(prompt=["a"], negative=["b"]))
    assert asked["force_quick_gelu"] is True


def test_a_weights_file_is_read_and_one_of_another_model_named(tmp_path):
    """The smallest architecture that open_clip names."""
    import open_clip

    small = "ViT-S-32-alt"
    torch.manual_seed(0)
    network = open_clip.create_model(small)
    torch.save(network.state_dict(), tmp_path / "w.pt")
    torch.save({"w": torch.zeros(2)}, tmp_path / "other.pt")
    how = {"prompt": ["a"], "negative": ["b"], "clip_model": small}
    x = pictures(2)
    loaded = clip_of(RewardOptions(**how, clip_weights=str(tmp_path / "w.pt")))
    with torch.no_grad():
        expected = F.normalize(network.eval().encode_image(loaded.transform(x)), dim=-1)
    assert torch.allclose(loaded.image_features(x), expected, atol=1e-5)
    for weights, message in (("other.pt", "could not be loaded"), ("gone.pt", "not a file; tags")):
        with pytest.raises(UserError, match=message) as error:
            make_reward("clip", RewardOptions(**how, clip_weights=str(tmp_path / weights)))
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({}, "no prompt; give it --prompt TEXT"),
        ({"prompt": [" "], "negative": ["b"]}, "no prompt"),
        ({"prompt": ["a"]}, "give it one, or --clip-score cosine"),
        ({"prompt": ["a"], "negative": ["b"], "clip_model": "ViT-B-33"}, "did you mean 'ViT-B-32'"),
        ({"prompt": ["a"], "negative": ["b"], "clip_model": "local-dir:/nowhere"}, "could not be loaded"),
        (
            {"prompt": ["a"], "negative": ["b"], "clip_model": "ViT-B-32", "clip_weights": "opnai"},
            "tags: openai",
        ),
    ],
)
def test_what_clip_cannot_use_is_one_line(more, message):
    with pytest.raises(UserError, match=message) as error:
        make_reward("clip", RewardOptions(**more))
    assert "\n" not in str(error.value)


@pytest.mark.soak
def test_a_batch_of_256_at_224_costs_little_more_than_the_bare_model(clip_folder):
    """Against a small tower of ViT-S/32's width, where the transform weighs most; CPU seconds, best of two."""
    how = options(clip_folder(image_size=224, width=384, head_width=64, layers=4, patch_size=32))
    reward, model = make_reward("clip", how), clip_of(how)
    x = pictures(256, 3, 224, 224)
    inputs = model.transform(x)
    reward(x[:2])

    def bare():
        with torch.inference_mode():
            model.network.encode_image(inputs)

    def seconds(call) -> float:
        began = time.process_time()
        call()
        return time.process_time() - began

    ours, alone = (min(seconds(call) for _ in range(2)) for call in (lambda: reward(x), bare))
    assert ours <= 1.15 * alone, f"{ours:.2f} s against {alone:.2f} s"
