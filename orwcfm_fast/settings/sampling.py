"""Settings of sampling: the conditions of a pipeline, the solver, and `orwcfm sample`."""

from orwcfm_fast.settings.declare import Precision, Settings, setting


class Conditioned(Settings):
    """Conditions of a text-to-image pipeline; what is not set is as the run has it, or as the pipeline has it."""

    prompts: str = setting(
        "",
        panel="Large models",
        help="file of prompts, one a line, or JSON lines with prompt, weight and metadata",
        metavar="FILE",
    )
    guidance: float | None = setting(
        None,
        panel="Large models",
        help="classifier-free guidance of the policy, or the guidance that FLUX embeds; 1 is no guidance",
        default_text="1, or what a pipeline that embeds it has as its own",
        ge=1,
        allow_inf_nan=False,
    )
    group: int = setting(
        1,
        panel="Large models",
        help="consecutive samples that share a prompt; above 1, weights compare samples of one prompt",
        ge=1,
    )
    image_size: int = setting(
        0,
        panel="Large models",
        help="side of an image in pixels",
        default_text="the pipeline's own",
        ge=0,
    )
    prompt_tokens: int = setting(
        0,
        panel="Large models",
        help="number of T5 tokens of a prompt",
        default_text="the pipeline's own",
        ge=0,
    )
    vae_chunk: int = setting(
        4, panel="Large models", help="number of latents that are decoded to images at once", ge=1
    )


class Sampling(Conditioned):
    """How noise becomes samples."""

    solver: str = setting(
        "abm4", panel="Sampling", help="ODE solver (orwcfm list solvers)", metavar="NAME", complete="solvers"
    )
    nfe: int = setting(
        14, panel="Sampling", help="network evaluations of a sample (dopri5 chooses its own number)", ge=1
    )
    grid: str = setting(
        "power:1.3",
        panel="Sampling",
        help="time steps: uniform; power:P for t = 1 − (1−s)^P, finer near the data; own, the schedule of the "
        "pipeline",
        metavar="GRID",
    )
    chunk: int = setting(512, panel="Sampling", help="number of samples that are drawn at once", ge=1)


class Sample(Sampling):
    """Settings of `orwcfm sample`."""

    n: int = setting(64, panel="Sampling", help="number of samples", ge=1)
    precision: Precision = setting("fp32", panel="Machine", help="number format of the network")
