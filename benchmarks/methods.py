"""Methods side by side on digits or MNIST, on held-out noise: reward, drift, confidence, width by method, α and seed.

    python -m orwcfm_fast.benchmarks.methods --method orw-centred --method orw --alpha 1 --alpha 0.3 --seeds 3 --out F

Each run is written as soon as it is done; runs that F holds already are not repeated. Beside each stand its forecast,
made before it, and the least W2 at which any method could have its reward (`theory.limit`); at the end, reward at equal
W2. The figures of a round are those of its rollout, which the policy drew before the round's steps; its coupled W2 is
that of the probe after them.
"""

import argparse
import json
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from orwcfm_fast.batch_sizes import BatchSizes
from orwcfm_fast.benchmarks.calibration import beside
from orwcfm_fast.benchmarks.forecasts import scored
from orwcfm_fast.benchmarks.methods_report import EQUAL_W2, pictures, plot, reward_at
from orwcfm_fast.benchmarks.mnist import NAME, held_out_digits
from orwcfm_fast.checkpoints import checkpoint
from orwcfm_fast.device import device_name
from orwcfm_fast.evaluation.drift import pairwise_distance
from orwcfm_fast.evaluation.evaluate import FidelityTarget, evaluate
from orwcfm_fast.evaluation.fidelity import frechet_distance
from orwcfm_fast.evaluation.held_out import Evaluator, evaluator_for
from orwcfm_fast.method import noise
from orwcfm_fast.method.callbacks import Callback
from orwcfm_fast.method.rollout import Rollout, sample, start_noise
from orwcfm_fast.method.trainer import Trainer
from orwcfm_fast.networks.policy import Policy
from orwcfm_fast.rewards import RewardSum, make_reward
from orwcfm_fast.runs.build import build_trainer
from orwcfm_fast.runs.load import Loader
from orwcfm_fast.runs.recipe import RECIPES
from orwcfm_fast.settings import Finetune, Predict
from orwcfm_fast.theory.forecast import Forecast
from orwcfm_fast.theory.limit import limit_line
from orwcfm_fast.theory.prediction import Reference, draw_reference, forecast_grid
from orwcfm_fast.theory.recursion import METHODS as FORECAST_OF

CPU = torch.device("cpu")
SHOWN = 32  # samples in pictures
LIMIT = {"digits": 8192, "mnist": 4096}  # samples of the limit line


@dataclass(frozen=True)
class Bench:
    """A pretrained model, the settings of its runs, the reward, and how they are measured.

    Attributes:
        target: real digits of the wanted classes, which FID is measured against; None: it is not measured.
    """

    data: str
    base: Policy
    settings: dict[str, Any]
    reward: RewardSum
    evaluator: Evaluator
    held_out: int = 4096
    target: FidelityTarget | None = None

    @classmethod
    def of(cls, data: str, data_dir: str = "") -> "Bench":
        """digits: the default model and settings. mnist: the model that ships and its recipe, in bf16."""
        reward = make_reward("even-digits")
        evaluator = evaluator_for(data, reward, "even-digits")
        if data == "digits":
            return cls(data, Loader(CPU, "fp32").default().policy, {}, reward, evaluator)
        recipe = RECIPES.get("mnist-small").finetune
        taken = {key: value for key, value in recipe.items() if key not in ("data", "model", "reward")}
        images, labels = held_out_digits(data_dir)
        even = FidelityTarget("even test digits", images[labels % 2 == 0])
        return cls(data, Loader(CPU, "bf16").load(NAME).policy, taken, reward, evaluator, target=even)


class RolloutFigures(Callback):
    """Adds to a round's record what the evaluator says of its rollout, which costs no sample more."""

    def __init__(self, bench: Bench) -> None:
        self.evaluator = bench.evaluator
        real = None if bench.target is None else bench.target.samples
        self.real = None if real is None else self.features(real)

    def features(self, x: Tensor) -> Tensor:
        return torch.cat([self.evaluator.features(part) for part in x.split(512)]).double()

    @torch.inference_mode()
    def on_measure(self, trainer: Trainer, rollout: Rollout, record: dict[str, Any]) -> None:
        assert self.evaluator.probabilities
        x = trainer.policy.decode(rollout.x1)
        found = torch.cat([self.evaluator.probabilities(part) for part in x.split(512)])
        record["confidence"] = float(found.max(1).values.mean())
        record["classes"] = [float((found.argmax(1) == k).double().mean()) for k in range(found.shape[1])]
        features = self.features(x)
        record["diversity"] = pairwise_distance(features)
        if self.real is not None:
            record["fid"] = frechet_distance(features, self.real)


BY_ROUND = ("reward_mean", "w2_coupled", "confidence", "classes", "diversity", "fid")


def ahead(bench: Bench, reference: Reference, **change: Any) -> Forecast | None:
    """What is forecast of such a run; None of a method for which nothing can be."""
    if change["method"] not in FORECAST_OF:
        return None
    s = Finetune(**bench.settings | change)
    how = Predict(
        method=s.method, alpha=[s.alpha], tau=[s.tau], rounds=s.rounds, normalize_weights=s.normalize_weights
    )
    return forecast_grid(reference, how)[0]


def run(
    bench: Bench,
    expected: Forecast | None = None,
    before: dict[str, Any] | None = None,
    shown: dict[str, Tensor] | None = None,
    **change: Any,
) -> dict[str, Any]:
    """Fine-tune a copy of the base with these settings; its figures beside the base's and the forecast's.

    Args:
        before: the base's figures at this seed, where they are known.
        shown: filled with samples of the trained model.
    """
    s = Finetune(**bench.settings | change, guard="off")
    trainer = build_trainer(
        bench.base.trainable_copy(), bench.reward, s, reference=bench.base, callbacks=[RolloutFigures(bench)]
    )
    began = time.perf_counter()
    records = [*trainer.train(s.rounds)]
    seconds = time.perf_counter() - began
    if shown is not None:
        shown[f"{s.method}, α = {s.alpha:g}"] = show(trainer.policy)
    models = {"after": trainer.policy} if before else {"before": bench.base, "after": trainer.policy}
    measured = evaluate(
        models, bench.base, bench.evaluator, s, bench.held_out, BatchSizes(chunk=512), target=bench.target
    )
    row: dict[str, Any] = {**change, "seconds": seconds, "before": before}
    for m in measured:
        row[m.name] = {
            "reward": [m.reward.mean, m.reward.low, m.reward.high],
            "w2_coupled": m.w2_coupled.mean if m.w2_coupled else None,
            "w2_exact": m.w2_exact.mean if m.w2_exact else None,
            "confidence": m.confidence,
            "deviation": m.pixel_std,
            "diversity": m.diversity.mean,
            "classes": {name: share.mean for name, share in m.classes.items()},
            "fid": [m.fid.mean, m.fid.low, m.fid.high] if m.fid else None,
        }
    row["by_round"] = [{key: r[key] for key in BY_ROUND if key in r} for r in records]
    if expected:
        done, (mean, low, high) = row["after"], row["after"]["reward"]
        row["forecast"] = beside(expected.final, mean, (high - low) / 3.92, done["w2_coupled"])
    return row


def show(policy: Policy) -> Tensor:
    """Decoded samples [SHOWN, *shape] of a model, each time from the same noise."""
    return policy.decode(sample(policy, start_noise(policy, SHOWN, 0, noise.HELD_OUT), Finetune(), SHOWN))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--method", action="append", required=True)
    parser.add_argument("--alpha", type=float, action="append", required=True)
    parser.add_argument("--tau", type=float, default=0.5)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--pictures", type=Path, help="PNG of samples of the models trained here, same noise")
    parser.add_argument("--plot", type=Path, help="PNG of all runs in F")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--data", choices=[*LIMIT], default="digits")
    parser.add_argument("--data-dir", default="", help="of mnist: the folder with its files")
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    bench = Bench.of(given.data, given.data_dir)
    about: dict[str, Any] = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": device_name(CPU),
        "versions": checkpoint.versions(),
        "data": given.data,
        "held_out": bench.held_out,
    }
    found: dict[str, Any] = json.loads(given.out.read_text()) if given.out.exists() else {**about, "runs": []}
    line = limit_line(*scored(bench.base, bench.reward, LIMIT[given.data]))
    found["limit"] = line.to_dict()
    reference = draw_reference(bench.base, bench.reward, Predict())

    def keep() -> None:
        for row in found["runs"]:
            row["least_w2"] = line.least_w2(row["after"]["reward"][0])
        given.out.write_text(json.dumps(found, indent=1) + "\n")

    shown = {"pretrained": show(bench.base)}
    for method, alpha, seed in product(given.method, given.alpha, range(given.seeds)):
        change = {"method": method, "alpha": alpha, "tau": given.tau, "rounds": given.rounds, "seed": seed}
        if any(change.items() <= row.items() for row in found["runs"]):
            continue
        before = next((row["before"] for row in found["runs"] if row["seed"] == seed), None)
        found["runs"].append(run(bench, ahead(bench, reference, **change), before, shown, **change))
        keep()
        after = found["runs"][-1]["after"]
        print(
            f"{method} α={alpha:g} seed {seed}: reward {after['reward'][0]:.3f}, W2 {after['w2_coupled']:.2f}",
            flush=True,
        )
        if given.pictures:
            pictures(shown, given.pictures)
    keep()
    if given.plot:
        plot(found, given.plot)
    for w2, method in product(EQUAL_W2[given.data], given.method):
        own = [r for r in found["runs"] if r["method"] == method and r["rounds"] == given.rounds]
        if at := reward_at(own, w2):
            print(f"{method} at a coupled W2 of {w2}: reward {at[0]:.3f} ± {2 * at[1]:.3f}")


if __name__ == "__main__":
    main()
