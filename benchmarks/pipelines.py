"""What it costs to read velocities off a pipeline's own call, beside the work of its transformer.

python -m orwcfm_fast.benchmarks.pipelines [ROWS]
"""

import json
import sys
import time

import torch

from orwcfm_fast.networks.flow.field import PipelineVelocity
from orwcfm_fast.networks.flow.library import library

SIZE, TOKENS = 256, 64  # pixels of an image's side, tokens of a prompt
REPEATS = 2


def pipeline_of(parameters_in_millions: int = 311) -> PipelineVelocity:
    """A FLUX.1 pipeline with a random transformer of about that size, on a prompt's random embeddings."""
    d = library()
    doubles = max(1, round(parameters_in_millions / 155))
    network = d.FluxTransformer2DModel(
        1, 64, num_layers=doubles, num_single_layers=2 * doubles, attention_head_dim=128, num_attention_heads=12,
        joint_attention_dim=256, pooled_projection_dim=64,
    )  # fmt: skip
    vae = d.AutoencoderKL(
        3,
        3,
        ("DownEncoderBlock2D",) * 4,
        ("UpDecoderBlock2D",) * 4,
        (8,) * 4,
        latent_channels=16,
        norm_num_groups=4,
    )
    pipe = d.FluxPipeline(d.FlowMatchEulerDiscreteScheduler(), vae, None, None, None, None, network.eval())
    pipe.set_progress_bar_config(disable=True)
    field = PipelineVelocity(pipe, {"height": SIZE, "width": SIZE})
    field.add(prompt_embeds=torch.randn(1, TOKENS, 256), pooled_prompt_embeds=torch.randn(1, 64))
    return field.requires_grad_(False)


def overhead(field: PipelineVelocity, rows: int) -> dict[str, float]:
    """CPU seconds of a velocity of `rows` rows, within the transformer and in all, and the share of the rest."""
    inside, began = 0.0, 0.0

    def before(*_) -> None:
        nonlocal began
        began = time.process_time()

    def after(*_) -> None:
        nonlocal inside
        inside += time.process_time() - began

    x = torch.randn(rows, *field.shape)
    t, conditions = torch.linspace(0.1, 0.9, rows), torch.zeros(rows, dtype=torch.int64)
    (network,) = field.denoisers.values()
    with torch.no_grad():
        field(t, x, conditions)
        handles = [network.register_forward_pre_hook(before), network.register_forward_hook(after)]
        start = time.process_time()
        for _ in range(REPEATS):
            field(t, x, conditions)
        total = (time.process_time() - start) / REPEATS
        for handle in handles:
            handle.remove()
    inside /= REPEATS
    parameters = sum(p.numel() for p in field.parameters())
    return {
        "parameters": parameters, "rows": rows, "seconds": total, "seconds_transformer": inside,
        "share": 1 - inside / total,
    }  # fmt: skip


if __name__ == "__main__":
    torch.manual_seed(0)
    print(json.dumps(overhead(pipeline_of(), int(sys.argv[1]) if len(sys.argv) > 1 else 4), indent=1))
