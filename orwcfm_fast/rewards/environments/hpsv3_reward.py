"""HPSv3 (Ma et al., ICCV 2025), run by the environment that `orwcfm rewards install hpsv3` makes.

Weights: MizzenAI/HPSv3 and Qwen/Qwen2-VL-7B-Instruct of the Hugging Face Hub, read at the first call.
"""

import functools
import os

import torch
from hpsv3 import HPSv3RewardInferencer
from PIL import Image

LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@functools.cache
def model():
    gpu = os.environ.pop("LOCAL_RANK", "0")
    for name in LAUNCHER:  # or transformers would join the process group of the run that this worker serves
        os.environ.pop(name, None)
    return HPSv3RewardInferencer(device=f"cuda:{gpu}" if torch.cuda.is_available() else "cpu")


def score(images, prompts):
    """Images [B, 1 or 3, H, W] in [-1, 1] and their prompts → the mean that HPSv3 gives each, [B]."""
    levels = ((images + 1) * 127.5).round().clamp(0, 255).byte().expand(-1, 3, -1, -1)
    pictures = [Image.fromarray(x.permute(1, 2, 0).contiguous().numpy()) for x in levels]
    with torch.no_grad():
        return model().reward(pictures, prompts)[:, 0].float().cpu()
