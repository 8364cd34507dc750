"""`doctor --plan` of a pipeline: from its configurations alone, and what a run of it then takes."""

import copy
import functools
import json
import re
import shlex
import shutil
from contextlib import nullcontext
from itertools import accumulate
from pathlib import Path

import pytest
import torch
from tiny_pipelines import build
from torch._subclasses.fake_tensor import FakeTensorMode

from orwcfm_fast.batch_sizes import BatchSizes
from orwcfm_fast.benchmarks.large_models import rows
from orwcfm_fast.checkpoints import checkpoint
from orwcfm_fast.cli.doctor import _show_plan
from orwcfm_fast.evaluation.evaluate import evaluate
from orwcfm_fast.evaluation.held_out import evaluator_for
from orwcfm_fast.method.trainer import Trainer
from orwcfm_fast.networks.flow.call import mapped
from orwcfm_fast.planning.allocations import record_allocations
from orwcfm_fast.planning.cuda_autocast import CudaAutocastRules
from orwcfm_fast.planning.pipeline import Meter, plan_pipeline
from orwcfm_fast.rewards import make_reward
from orwcfm_fast.runs.build import build_trainer
from orwcfm_fast.runs.load import Loader
from orwcfm_fast.runs.trainer_state import trainer_contents
from orwcfm_fast.settings import Finetune

CPU = torch.device("cpu")
SHORT = dict(device="cpu", precision="fp32", prompt_tokens=6, probe=4, steps_per_round=2, nfe=4, chunk=4)


def measured(s: Finetune) -> int:
    """Peak of torch's own accounting of CPU memory over two whole rounds, and what was there before."""
    policy = Loader(CPU, "fp32", how=s).load(s.model).policy
    modules = (policy.network, policy.pipeline.pipe.vae)
    before = sum(x.nbytes for m in modules for x in (*m.parameters(), *m.buffers()))

    def rounds():
        loop = build_trainer(policy, make_reward("brightness"), s)
        loop.one_round()
        copied = checkpoint.copied(trainer_contents(loop, {})[1])  # as while it is written
        loop.one_round()
        del copied

    return before + max(accumulate(record_allocations(rounds, CPU)))


CASES = [
    ("flux", dict(batch=8, rollout=4, image_size=32, gradient_checkpointing=True)),
    pytest.param("flux", dict(batch=2, rollout=16, image_size=32), marks=pytest.mark.soak),
    pytest.param("sd3", dict(batch=8, rollout=8, image_size=16), marks=pytest.mark.soak),
    pytest.param(
        "sd3", dict(batch=8, rollout=8, micro_batch=4, image_size=16, guidance=2.0), marks=pytest.mark.soak
    ),
]


@pytest.mark.parametrize(("kind", "sizes"), CASES, ids=str)
def test_predicted_memory_is_what_torch_then_allocates(kind, sizes, pipeline_folder, prompts_file, capsys):
    s = Finetune(
        model=f"diffusers:{pipeline_folder(kind)}", prompts=str(prompts_file), lora=8, **SHORT | sizes
    )
    plans = plan_pipeline(s)
    assert [*plans] == ["all weights", "adapters of rank 8"]
    for plan, rank in zip(plans.values(), (0, 8), strict=True):
        ours = max(bytes for phase, bytes in plan.phases.items() if phase not in ("encoding", "evaluation"))
        theirs = measured(s.model_copy(update={"lora": rank}))
        print(
            f"{kind} {sizes} rank {rank}: predicted {ours / 2**20:.2f} MiB, measured {theirs / 2**20:.2f} MiB"
        )
        assert abs(ours / theirs - 1) <= 0.15
        _show_plan(plan, s)
        table = capsys.readouterr().out
        for word in (
            "VAE",
            "step: activations, micro-batch",
            "encoding: text_encoder_2",
            "probe: sampling or decoding",
            "evaluation: sampling, decoding or figures",
            "peak, in the",
            "fits with",
        ):
            assert word in table, word


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["Wan 2.1", *(pytest.param(name, marks=pytest.mark.soak) for name in ("Z-Image", "Qwen-Image"))]
)
def test_a_family_is_planned_as_it_is_called(name, tmp_path):
    """Transformers that take lists of samples, or one of two experts, are called so for a whole batch."""
    pipe, call = build(name)
    pipe.save_pretrained(tmp_path / "pipeline")
    (tmp_path / "prompts.jsonl").write_text(json.dumps({"prompt": "a cat", **call, "guidance_scale": 3.0}))
    short = {key: value for key, value in SHORT.items() if key != "prompt_tokens"}
    s = Finetune(
        model=f"diffusers:{tmp_path / 'pipeline'}", prompts=str(tmp_path / "prompts.jsonl"), batch=8, rollout=4,
        lora=8, **short,
    )  # fmt: skip
    plan = plan_pipeline(s)["adapters of rank 8"]
    ours = max(bytes for phase, bytes in plan.phases.items() if phase not in ("encoding", "evaluation"))
    theirs = measured(s)
    print(f"{name}: predicted {ours / 2**20:.2f} MiB, measured {theirs / 2**20:.2f} MiB")
    assert abs(ours / theirs - 1) <= 0.15


def test_classifier_free_guidance_is_planned_for_a_gpu(pipeline_folder, prompts_file):
    s = Finetune(model=f"diffusers:{pipeline_folder('sd3')}", prompts=str(prompts_file), lora=8, **SHORT)
    without, guided = (
        plan_pipeline(s.model_copy(update={"guidance": g, "precision": "auto"}), 24) for g in (1.0, 2.0)
    )
    for name, plan in guided.items():
        assert plan.flops == 2 * without[name].flops
        assert plan.phases["step"] > without[name].phases["step"]


def test_the_closing_evaluation_and_a_ranks_share_are_in_the_plan(pipeline_folder, prompts_file):
    sizes = dict(batch=8, rollout=8, image_size=32, eval_n=48, lora=8)
    s = Finetune(model=f"diffusers:{pipeline_folder('sd3')}", prompts=str(prompts_file), **SHORT | sizes)
    plan = plan_pipeline(s)["adapters of rank 8"]
    policy = Loader(CPU, "fp32", how=s).load(s.model).policy
    loop = Trainer(policy, make_reward("brightness"), s)
    evaluator = evaluator_for(policy.data, make_reward("brightness"), "brightness")
    models = {"before": loop.reference, "after": policy}

    def closing():
        evaluate(models, loop.reference, evaluator, s, s.eval_n, BatchSizes(chunk=s.chunk))

    closing()  # what torch builds on first use
    theirs = max(accumulate(record_allocations(closing, CPU)))
    ours = sum(plan.evaluation.values())
    print(f"closing evaluation: predicted {ours / 2**20:.2f} MiB, measured {theirs / 2**20:.2f} MiB")
    assert 0.95 <= ours / theirs <= 2
    assert (
        sum(plan_pipeline(s.model_copy(update={"eval_n": 480}))["all weights"].evaluation.values()) > 4 * ours
    )
    many = plan_pipeline(s, ranks=8)["all weights"]
    alone = plan_pipeline(s.model_copy(update={"batch": 1}))["all weights"]
    assert many.step == alone.step and many.micro_batch == 1, (
        "an eighth of the batch; the exchange needs less"
    )


def test_the_manuals_plan_needs_configurations_alone(run_cli, pipeline_folder, tmp_path):
    page = (Path(__file__).parents[2] / "docs/large-models.md").read_text("utf-8")
    command = shlex.split(re.search(r"\norwcfm (doctor --plan --model diffusers:.*FLUX.*)\n", page).group(1))
    folder = tmp_path / "bare"
    shutil.copytree(pipeline_folder("flux"), folder, ignore=shutil.ignore_patterns("*.safetensors"))
    named = [f"diffusers:{folder}" if part.startswith("diffusers:") else part for part in command]
    planned = run_cli(*named, "--image-size", 32, "--prompt-tokens", 6, "--lora", 4, "--json")
    assert planned.code == 0, planned.err
    found = json.loads(planned.out)
    whole, adapted = found["all weights"], found["adapters of rank 4"]
    assert (
        whole["fits"] and whole["limit"] == 80 << 30 and whole["micro_batch"] == adapted["micro_batch"] == 8
    )
    assert whole["held"]["transformer"] == whole["held"]["reference"] == 2 * adapted["held"]["transformer"]
    assert adapted["held"]["reference"] == 0 < whole["encoding"]["text_encoder_2"]

    page = (Path(__file__).parents[2] / "docs/many-gpus.md").read_text("utf-8")
    command = shlex.split(re.search(r"\norwcfm (doctor --plan .*--ranks 1024.*)\n", page).group(1))
    named = [f"diffusers:{folder}" if part.startswith("diffusers:") else part for part in command]
    shown = run_cli(*named, "--image-size", 32, "--prompt-tokens", 6, "--lora", 4)
    assert shown.code == 0 and shown.out.count("a round by number of ranks, on paper, at 400 TFLOP/s") == 2
    assert re.search(r"\n1024 .*\n", shown.out), shown.out
    counted = run_cli(*named, "--image-size", 32, "--prompt-tokens", 6, "--lora", 4, "--json")
    for one in json.loads(counted.out).values():
        assert one["flops"] > 0
        assert [t["ranks"] for t in one["rounds"]] == [2**k for k in range(11)]
        assert one["rounds"][0]["rollout"] == pytest.approx(1536 * 14 * one["flops"] / 400e12)
    refused = run_cli("doctor", "--plan", "--model", "mlp", "--gpu-gib", 24)
    assert refused.code == 2 and "--gpu-gib" in refused.err and refused.err.count("\n") == 1


@pytest.mark.slow
def test_the_committed_memory_of_a_recipe_is_what_the_plan_says():
    kept = json.loads(
        (Path(__file__).parents[2] / "benchmarks/results/large-models-on-paper.json").read_text("utf-8")
    )
    for own, row in zip(rows("sd35-medium"), kept["sd35-medium"], strict=True):
        assert (own["gpu_gib"], own["fits"], own["micro_batch"]) == (
            row["gpu_gib"],
            row["fits"],
            row["micro_batch"],
        )
        assert own["peak"] == pytest.approx(row["peak"], rel=0.02)


def flash(query, key, value, *args, **more):
    """Keeps for the way back what flash attention does; of fakes, CUDA's would be another kernel."""
    with torch.autocast(query.device.type, enabled=False):
        q, k, v = (x.to(torch.bfloat16) for x in (query, key, value))
        return q + k + v


@pytest.mark.filterwarnings("ignore:Mismatch dtype")  # a CPU's own norm is the slower for it
@pytest.mark.parametrize("kind", ["sd3", "flux"])
def test_planned_for_a_gpu_a_step_keeps_what_autocast_there_keeps(
    kind, pipeline_folder, prompts_file, monkeypatch
):
    common = torch.cuda.amp.common
    if not hasattr(common, "amp_definitely_not_available"):
        pytest.skip("this torch has another way to see that there is no GPU")
    monkeypatch.setattr(common, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *args, **more: True)
    s = Finetune(model=f"diffusers:{pipeline_folder(kind)}", prompts=str(prompts_file), **SHORT)
    policy = Loader(CPU, "fp32", how=s).load(s.model).policy
    calls = []
    field = policy.network
    field.call(field.conditions[0], time=500.0, x=field.samples(1), leave="velocity",
               answer=lambda call: calls.append(call) or field.zeros(call))  # fmt: skip
    (call,) = calls
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", flash)
    kept = {}
    for device, mode in (("cuda", nullcontext), ("cpu", CudaAutocastRules), ("cpu", nullcontext)):
        network = copy.deepcopy(call.module).to("meta").requires_grad_(True)
        like = functools.partial(torch.empty_like, device=device)
        with FakeTensorMode(allow_non_fake_inputs=True):
            network.to_empty(device=device)
            args, named = mapped((call.args, call.named), like, torch.device(device))
            with mode(), Meter() as meter, torch.autocast(device, torch.bfloat16):
                found = network(*args, **named)
            kept[device, mode] = sum(meter.changes)
            del found
    ours, theirs, plain = kept["cpu", CudaAutocastRules], kept["cuda", nullcontext], kept["cpu", nullcontext]
    if torch.__version__ >= "2.13":
        assert ours == theirs > plain
    else:  # whose norms keep more
        assert abs(ours / theirs - 1) <= 0.15
