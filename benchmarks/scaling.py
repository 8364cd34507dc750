"""Rounds of published models on up to 1,024 GPUs, on paper: `python -m orwcfm_fast.benchmarks.scaling --out FILE`.

The transformers are built from their published configurations without weights; their work is counted for images of
1024 x 1024. Nothing is measured here: rates are those of `planning.scaling`, links of 400 Gbit/s for each GPU.
"""

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from orwcfm_fast.planning.scaling import Cluster, RoundWork, ladder, stops_at, why_it_stops
from orwcfm_fast.settings import Finetune

RANKS = 1024
ROUND = Finetune(
    rollout=1024, batch=256, steps_per_round=16, chunk=8, micro_batch=4, gradient_checkpointing=True
)
LORA = 32
REWARD_SECONDS = 0.05  # of a preference model for an image
META = torch.device("meta")


def empty(*shape: int) -> torch.Tensor:
    return torch.empty(*shape, device=META)


@dataclass(frozen=True)
class Published:
    """A transformer, how it is called for one image, evaluations of an image, calls for a velocity (guidance)."""

    build: Callable[[], nn.Module]
    inputs: Callable[[], dict[str, Any]]
    nfe: int
    calls: int
    sharded_when_full: bool


def _sd35_medium() -> Any:
    from diffusers import SD3Transformer2DModel

    return SD3Transformer2DModel(
        sample_size=128, patch_size=2, num_layers=24, num_attention_heads=24, attention_head_dim=64,
        caption_projection_dim=1536, pos_embed_max_size=384, dual_attention_layers=(*range(13),), qk_norm="rms_norm",
    )  # fmt: skip


def _flux() -> Any:
    from diffusers import FluxTransformer2DModel

    return FluxTransformer2DModel(guidance_embeds=True)


def _qwen_image() -> Any:
    from diffusers import QwenImageTransformer2DModel

    return QwenImageTransformer2DModel()


MODELS = {
    "SD 3.5 Medium": Published(
        _sd35_medium,
        lambda: {"hidden_states": empty(1, 16, 128, 128), "encoder_hidden_states": empty(1, 333, 4096),
                 "pooled_projections": empty(1, 2048), "timestep": empty(1)},
        28, 2, False,
    ),
    "FLUX.1-dev": Published(
        _flux,
        lambda: {"hidden_states": empty(1, 4096, 64), "encoder_hidden_states": empty(1, 512, 4096),
                 "pooled_projections": empty(1, 768), "timestep": empty(1), "guidance": empty(1),
                 "img_ids": empty(4096, 3), "txt_ids": empty(512, 3)},
        28, 1, True,
    ),
    "Qwen-Image": Published(
        _qwen_image,
        lambda: {"hidden_states": empty(1, 4096, 64), "encoder_hidden_states": empty(1, 512, 3584),
                 "timestep": empty(1), "img_shapes": [[(1, 64, 64)]],
                 "encoder_hidden_states_mask": torch.ones(1, 512, dtype=torch.bool, device=META)},
        50, 2, True,
    ),
}  # fmt: skip


def counted(model: Published) -> tuple[int, float, int]:
    """Parameters, FLOP of a velocity, and parameters of adapters on every linear layer of the blocks."""
    with META:
        network = model.build()
    with torch.no_grad(), FlopCounterMode(display=False) as flops:
        network(**model.inputs())
    adapters = sum(
        LORA * (m.in_features + m.out_features)
        for name, m in network.named_modules()
        if isinstance(m, nn.Linear) and "blocks" in name
    )
    parameters = sum(p.numel() for p in network.parameters())
    return parameters, model.calls * flops.get_total_flops(), adapters


def rows() -> list[dict[str, Any]]:
    """One row a model and way to train it."""
    found = []
    for name, model in MODELS.items():
        parameters, flops, adapters = counted(model)
        for trained in ("adapters", "all weights"):
            full = trained == "all weights"
            s = ROUND.model_copy(
                update={
                    "nfe": model.nfe,
                    "lora": 0 if full else LORA,
                    "shard": full and model.sharded_when_full,
                }
            )
            work = RoundWork.of(
                s,
                flops,
                2 * parameters,
                4 * (parameters if full else adapters),
                REWARD_SECONDS,
            )
            times = ladder(work, Cluster(RANKS))
            end = stops_at(times)
            found.append({
                "model": name, "trained": trained, "sharded": work.sharded, "parameters": parameters,
                "velocity_tflop": flops / 1e12, "gradient_bytes": work.gradients,
                "rounds": [asdict(t) | {"total": t.total, "faster": times[0].total / t.total} for t in times],
                "pays_to": (end[0] if end else times[-1]).ranks,
                "because": why_it_stops(work, end[1]) if end else "",
            })  # fmt: skip
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    kept = ROUND.model_dump(include={"rollout", "batch", "steps_per_round", "chunk", "micro_batch"})
    found: dict[str, Any] = {
        "settings": kept | {"lora": LORA, "reward_seconds": REWARD_SECONDS},
        "rows": rows(),
    }
    arguments.out.write_text(json.dumps(found, indent=1) + "\n")
    for row in found["rows"]:
        last = row["rounds"][-1]
        print(
            f"{row['model']}, {row['trained']}: {row['velocity_tflop']:.0f} TFLOP a velocity; "
            f"{last['ranks']} ranks {last['faster']:.0f} times as fast as one"
        )


if __name__ == "__main__":
    main()
