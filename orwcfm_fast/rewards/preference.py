"""Preferences and alignment by CLIP models: PickScore and CLIPScore through transformers, HPSv2 through open_clip."""

import functools
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from orwcfm_fast.checkpoints import checkpoint
from orwcfm_fast.checkpoints.torch_files import read_weights
from orwcfm_fast.rewards.clip import CHUNK, Clip, own_prompt
from orwcfm_fast.rewards.hub import fast_dtype, from_hub, hub_file, with_prompts
from orwcfm_fast.rewards.pixels import Transform
from orwcfm_fast.rewards.registry import Reward, reward_factory
from orwcfm_fast.settings import RewardOptions

PICKSCORE = ("yuvalkirstain/PickScore_v1", "laion/CLIP-ViT-H-14-laion2B-s32B-b79K")
"""Its model, and the repository of the processor that it was trained with."""
CLIPSCORE = "openai/clip-vit-base-patch32"
HPSV2 = ("xswu/HPSv2", "HPS_v2.1_compressed.pt")
HPSV2_MODEL = "ViT-H-14"


@dataclass(frozen=True)
class HubClip:
    """A CLIP of transformers with its tokenizer and its image transform; goes to where its images are.

    Attributes:
        scale: exp of its logit scale, read before the model is cast.
    """

    network: Any
    tokenizer: Any
    transform: Transform
    scale: float

    def on(self, device: torch.device) -> "HubClip":
        """The same, with its weights on the device, in bfloat16 on a GPU."""
        self.network.to(device, fast_dtype(device))
        return self

    def image_features(self, images: Tensor) -> Tensor:
        """Images [B, 1 or 3, H, W] in [-1, 1] → unit features [B, F], float32."""
        network = self.network
        with torch.no_grad():
            parts = [
                network.visual_projection(
                    network.vision_model(pixel_values=self.transform(part).to(network.dtype)).pooler_output
                ).float()
                for part in images.split(CHUNK)
            ]
            return F.normalize(torch.cat(parts), dim=-1)

    def text_features(self, texts: tuple[str, ...], device: torch.device) -> Tensor:
        """Unit features [len(texts), F], float32; texts beyond the model's context are cut off."""
        network, longest = self.network, self.network.config.text_config.max_position_embeddings
        tokens = self.tokenizer(
            list(texts), padding=True, truncation=True, max_length=longest, return_tensors="pt"
        ).to(device)
        with torch.no_grad():
            found = network.text_projection(network.text_model(**tokens).pooler_output)
            return F.normalize(found.float(), dim=-1)


@functools.lru_cache(maxsize=2)
def hub_clip(reward: str, name: str, processor: str) -> HubClip:
    """The CLIP of a repository or folder, with the processor of another.

    Raises:
        UserError: not there, or no CLIP.
    """
    from transformers import CLIPImageProcessor, CLIPModel, CLIPTokenizer

    def load() -> HubClip:
        network = CLIPModel.from_pretrained(name).eval().requires_grad_(False)
        how, crop = CLIPImageProcessor.from_pretrained(processor), network.config.vision_config.image_size
        transform = Transform(
            (crop, crop),
            tuple(how.image_mean),
            tuple(how.image_std),
            resize_to=int(how.size["shortest_edge"]),
        )
        return HubClip(
            network, CLIPTokenizer.from_pretrained(processor), transform, float(network.logit_scale.exp())
        )

    return from_hub(reward, name, f"{reward}:FOLDER, as save_pretrained writes it", load)


@reward_factory("pickscore")
def pickscore(argument: str, options: RewardOptions) -> Reward:
    """PickScore: preference of users for an image under its prompt, about 15 to 25; or pickscore:FOLDER

    Kirstain et al., NeurIPS 2023: the logit of a fine-tuned CLIP ViT-H/14.
    """
    model = hub_clip("pickscore", argument or PICKSCORE[0], argument or PICKSCORE[1])
    cosine = own_prompt(model.on)
    return with_prompts("pickscore", options, lambda images, prompts: model.scale * cosine(images, prompts))


@reward_factory("clipscore")
def clipscore(argument: str, options: RewardOptions) -> Reward:
    """CLIPScore: 2.5 · max(cosine of image and prompt, 0); or clipscore:FOLDER or a repository of a CLIP

    Hessel et al., EMNLP 2021.
    """
    name = argument or CLIPSCORE
    cosine = own_prompt(hub_clip("clipscore", name, name).on)
    return with_prompts(
        "clipscore", options, lambda images, prompts: 2.5 * cosine(images, prompts).clamp(min=0)
    )


@functools.lru_cache(maxsize=1)
def load_hpsv2(file: str) -> Clip:
    """The CLIP of a file of the authors', with their image transform, which pads to a square.

    Raises:
        UserError: not there, or other weights.
    """
    import open_clip

    weights = read_weights(file, "hpsv2")
    network = open_clip.create_model(HPSV2_MODEL, pretrained=None)
    checkpoint.load_weights(network, weights, f"hpsv2 {file}")
    own, side = open_clip.get_model_preprocess_cfg(network), network.visual.image_size
    size = side if isinstance(side, tuple) else (side, side)
    transform = Transform(size, tuple(own["mean"]), tuple(own["std"]), mode="longest")
    tokenizer = open_clip.get_tokenizer(HPSV2_MODEL)
    return Clip(network.eval().requires_grad_(False), tokenizer, transform, torch.float32)


@reward_factory("hpsv2")
def hpsv2(argument: str, options: RewardOptions) -> Reward:
    """HPS v2.1: preference of people for an image under its prompt, about 0.2 to 0.35; or hpsv2:FILE

    Wu et al., 2023: the cosine of a fine-tuned CLIP ViT-H/14.
    """
    model = load_hpsv2(argument or hub_file("hpsv2", *HPSV2, f"hpsv2:FOLDER/{HPSV2[1]}"))

    def model_on(device: torch.device) -> Clip:
        dtype = fast_dtype(device)
        return replace(model, network=model.network.to(device, dtype), dtype=dtype)

    return with_prompts("hpsv2", options, own_prompt(model_on))
