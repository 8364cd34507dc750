"""Rewards that people use, by name: on tiny random weights, as the libraries save them, what the libraries say."""

import functools
import json
import string

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F

from orwcfm_fast.rewards import make_reward, preference
from orwcfm_fast.rewards.imagereward import DEVIATION, MEAN
from orwcfm_fast.settings import RewardOptions

TEXTS = ["a cat", "dog 3 on a mat", "sky"]
CLOSE = {"atol": 1e-4, "rtol": 1e-4}


def scores(name: str, images, prompts=TEXTS):
    """Of the reward on a model that has prompts; and the same asked one by one."""
    ((_, _, function),) = make_reward(name, RewardOptions().with_prompts()).terms
    whole = function(images, prompts=prompts)
    each = [function(image[None], prompts=[text]) for image, text in zip(images, prompts, strict=True)]
    assert torch.allclose(whole, torch.cat(each), **CLOSE) and len(whole) == len(images)
    assert whole.std() > 1e-3, "it tells the three apart"
    return whole


@pytest.fixture(scope="module")
def pictures():
    """Three square pictures of 32 pixels: as Pillow has them, and as a reward does."""
    levels = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 3)).repeat(4, 1).repeat(4, 2).astype("uint8")
    return [Image.fromarray(p) for p in levels], torch.from_numpy(levels).permute(0, 3, 1, 2) / 127.5 - 1


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """A folder with a tiny CLIP and its processor, as transformers saves them."""
    import transformers as t

    folder = tmp_path_factory.mktemp("clip")
    letters = [*string.ascii_lowercase, *string.digits]
    words = [*letters, *(f"{c}</w>" for c in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = t.CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=12)
    sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2)
    ends = dict(bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id)
    text = t.CLIPTextConfig(vocab_size=len(tokenizer), max_position_embeddings=12, **sizes, **ends)
    vision = t.CLIPVisionConfig(image_size=32, patch_size=8, **sizes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = t.CLIPModel(t.CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict())).eval()
        for parameter in model.parameters():
            if parameter.dim() > 1:  # as they begin, all pictures look alike to it
                nn.init.normal_(parameter, std=0.2)
    processor = t.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    for part in (model, processor, tokenizer):
        part.save_pretrained(folder)
    return folder, model, t.CLIPProcessor(processor, tokenizer)


@torch.no_grad()
def test_pickscore_and_clipscore_are_transformers_own(clip, pictures):
    folder, model, processor = clip
    inputs = processor(text=TEXTS, images=pictures[0], return_tensors="pt", padding=True)
    logits = model(**inputs).logits_per_image.diagonal()
    assert torch.allclose(scores(f"pickscore:{folder}", pictures[1]), logits, **CLOSE)
    cosine = logits / model.logit_scale.exp()
    assert torch.allclose(scores(f"clipscore:{folder}", pictures[1]), 2.5 * cosine.clamp(min=0), **CLOSE)


@pytest.fixture
def tiny_hps(tmp_path, monkeypatch):
    """A small architecture in the place of ViT-H-14."""
    import open_clip

    tower = {"image_size": 32, "layers": 2, "width": 64, "head_width": 32, "patch_size": 8}
    text = {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2}
    config = {"embed_dim": 32, "vision_cfg": tower, "text_cfg": text}
    (tmp_path / "tiny-hps.json").write_text(json.dumps(config))
    open_clip.add_model_config(tmp_path / "tiny-hps.json")
    monkeypatch.setattr(preference, "HPSV2_MODEL", "tiny-hps")


@torch.no_grad()
def test_hpsv2_is_the_cosine_of_open_clip(tmp_path, pictures, tiny_hps):
    import open_clip

    network, _, preprocess = open_clip.create_model_and_transforms("tiny-hps")
    torch.save({"state_dict": network.eval().state_dict()}, tmp_path / "HPS_v2.1_compressed.pt")
    image = network.encode_image(torch.stack([preprocess(p) for p in pictures[0]]), normalize=True)
    words = network.encode_text(open_clip.get_tokenizer("tiny-hps")(TEXTS), normalize=True)
    found = scores(f"hpsv2:{tmp_path / 'HPS_v2.1_compressed.pt'}", pictures[1])
    assert torch.allclose(found, (image @ words.T).diagonal(), **CLOSE)
    wide = torch.cat([pictures[1], pictures[1]], 3)  # 32×64: halved, and padded above and below
    assert preference.load_hpsv2(str(tmp_path / "HPS_v2.1_compressed.pt")).transform(wide).shape == (
        3,
        3,
        32,
        32,
    )


WIDTH = 64


def bert_with_sight(weights, ids, mask, seen):
    """BLIP's text encoder (Li et al., ICML 2022), written out: BERT with attention to the image in every layer."""

    def linear(name, x):
        return F.linear(x, weights[f"{name}.weight"], weights[f"{name}.bias"])

    def norm(name, x):
        return F.layer_norm(x, x.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"], 1e-12)

    def attend(name, x, other, keep):
        q, k, v = (linear(f"{name}.self.{p}", y) for p, y in (("query", x), ("key", other), ("value", other)))
        score = (q @ k.transpose(1, 2) / WIDTH**0.5).masked_fill(~keep[:, None].bool(), -1e30)
        return norm(f"{name}.output.LayerNorm", x + linear(f"{name}.output.dense", score.softmax(-1) @ v))

    x = weights["embeddings.word_embeddings.weight"][ids]
    x = norm("embeddings.LayerNorm", x + weights["embeddings.position_embeddings.weight"][: ids.shape[1]])
    for layer in ("encoder.layer.0", "encoder.layer.1"):
        x = attend(f"{layer}.attention", x, x, mask)
        x = attend(f"{layer}.crossattention", x, seen, torch.ones(seen.shape[:2]))
        inner = F.gelu(linear(f"{layer}.intermediate.dense", x))
        x = norm(f"{layer}.output.LayerNorm", x + linear(f"{layer}.output.dense", inner))
    return x


def text_shapes(vocabulary: int):
    shapes = {
        "embeddings.word_embeddings": (vocabulary, WIDTH),
        "embeddings.position_embeddings": (40, WIDTH),
    }
    found = {f"{name}.weight": shape for name, shape in shapes.items()}
    square = {"embeddings.LayerNorm": ()}
    for k in (0, 1):
        at = f"encoder.layer.{k}"
        for kind in ("attention", "crossattention"):
            square |= {f"{at}.{kind}.self.{p}": (WIDTH,) for p in ("query", "key", "value")}
            square |= {f"{at}.{kind}.output.dense": (WIDTH,), f"{at}.{kind}.output.LayerNorm": ()}
        square |= {f"{at}.output.LayerNorm": ()}
        found |= {f"{at}.intermediate.dense.weight": (96, WIDTH), f"{at}.intermediate.dense.bias": (96,)}
        found |= {f"{at}.output.dense.weight": (WIDTH, 96), f"{at}.output.dense.bias": (WIDTH,)}
    for name, more in square.items():
        found |= {f"{name}.weight": (WIDTH, *more), f"{name}.bias": (WIDTH,)}
    return found


@pytest.fixture(scope="module")
def imagereward_folder(tmp_path_factory):
    """ImageReward.pt with the names of its authors' code, and BERT's vocabulary; and the parts that it was made of."""
    from timm.models.vision_transformer import VisionTransformer

    folder = tmp_path_factory.mktemp("imagereward")
    letters = [*string.ascii_lowercase, *string.digits]
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{c}" for c in letters)]
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        vision = VisionTransformer(
            32, 8, num_classes=0, embed_dim=WIDTH, depth=2, num_heads=1,
            norm_layer=functools.partial(nn.LayerNorm, eps=1e-6),
        ).eval()  # fmt: skip
        for parameter in vision.parameters():
            nn.init.normal_(parameter, std=0.2)
        text = {name: 0.3 * torch.randn(shape) for name, shape in text_shapes(len(words)).items()}
        head = nn.Sequential(nn.Linear(WIDTH, 16), nn.Dropout(0.2), nn.Linear(16, 1)).eval()
    saved = {f"blip.visual_encoder.{k}": v for k, v in vision.state_dict().items()}
    saved |= {f"blip.text_encoder.{k}": v for k, v in text.items()}
    saved |= {f"mlp.layers.{k}": v for k, v in head.state_dict().items()}
    saved["blip.text_encoder.embeddings.position_ids"] = torch.arange(40)[None]
    saved["blip.vision_proj.weight"] = torch.zeros(8, WIDTH)  # there, and not used
    torch.save(saved, folder / "ImageReward.pt")
    return folder, vision, text, head


@torch.no_grad()
def test_imagereward_is_its_formula_written_out(imagereward_folder, pictures):
    from transformers import BertTokenizer
    from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

    folder, vision, text, head = imagereward_folder
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD))
    seen = vision.forward_features(((pictures[1] + 1) / 2 - mean) / std)
    tokens = BertTokenizer.from_pretrained(folder)(
        TEXTS, padding="max_length", max_length=35, truncation=True, return_tensors="pt"
    )
    first = bert_with_sight(text, tokens.input_ids, tokens.attention_mask, seen)[:, 0]
    expected = (head(first)[:, 0] - MEAN) / DEVIATION
    assert torch.allclose(scores(f"imagereward:{folder}", pictures[1]), expected, **CLOSE)


def test_one_text_for_all_samples_stands_in_for_prompts(clip, pictures):
    reward = make_reward(f"pickscore:{clip[0]}", RewardOptions(prompt=["sky"]))
    assert torch.allclose(
        reward(pictures[1]), scores(f"pickscore:{clip[0]}", pictures[1], ["sky"] * 3), **CLOSE
    )


@pytest.mark.parametrize("name", ["pickscore", "hpsv2", "imagereward", "aesthetic", "clipscore"])
def test_without_weights_one_line_says_where_to_put_them(name, run_cli):
    made = run_cli("finetune", "--reward", name, *(() if name == "aesthetic" else ("--prompt", "cat")))
    assert made.code == 2 and made.err.count("\n") == 1, made.err
    assert f"reward '{name}'" in made.err and f"{name}:F" in made.err and "Hub" in made.err


@pytest.mark.parametrize("name", ["pickscore", "hpsv2", "imagereward", "clipscore"])
def test_other_files_are_one_line(name, run_cli, tmp_path, tiny_hps):
    torch.save({"state_dict": {"a": torch.zeros(1)}}, "ImageReward.pt")
    (tmp_path / "config.json").write_text("{}")
    argument = "ImageReward.pt" if name == "hpsv2" else str(tmp_path)
    made = run_cli("finetune", "--reward", f"{name}:{argument}", "--prompt", "cat")
    assert made.code == 2 and made.err.count("\n") == 1 and name in made.err, made.err


def test_without_any_prompt_they_ask_for_one(clip, run_cli):
    made = run_cli("finetune", "--reward", f"pickscore:{clip[0]}")
    assert made.code == 2 and "--prompt TEXT" in made.err
    made = run_cli("finetune", "--reward", f"pickscore:{clip[0]}", "--prompt", "a", "--prompt", "b")
    assert made.code == 2 and "takes one --prompt" in made.err
