"""Every method's loss as its paper or code has it, in float64, each written out by itself.

x holds, of a round's draws: u, v, v_old, v_ref [B, D], rewards r and noise levels s = 1 − t [B], in the order of the
rollout. Each function returns the loss of every draw, [B].
"""

import torch

from orwcfm_fast.settings import Finetune

ALPHA, TAU = 0.7, 1.3
SETTINGS = Finetune(alpha=ALPHA, tau=TAU, adrpo_beta0=2.5, ram_m=0.3, nft_beta=0.4, kl=0.02, raft_best_of=3)


def squared(a, b):
    return (a - b).square().mean(1)


def weights(r):
    w = (TAU * r).exp()
    return w / w.mean()


def advantage(r):
    return ((r - r.mean()) / r.std(correction=0)).clamp(-5, 5)


def orw(x):
    """Fan et al., ICLR 2025, the loss above its equation 10: w‖v − u‖² + α‖v − v_ref‖²."""
    return weights(x["r"]) * squared(x["v"], x["u"]) + ALPHA * squared(x["v"], x["v_ref"])


def orw_centred(x):
    w = weights(x["r"])
    c = w.mean()
    return (
        (w - c) * squared(x["v"], x["u"])
        + c * squared(x["v"], x["v_old"])
        + ALPHA * squared(x["v"], x["v_ref"])
    )


def rwr(x):
    return x["r"] / x["r"].mean() * squared(x["v"], x["u"])


def raft(x):
    best = torch.zeros(len(x["r"]), dtype=torch.float64)
    for k in range(0, len(x["r"]), 3):
        best[k + int(x["r"][k : k + 3].argmax())] = 1
    return best * squared(x["v"], x["u"])


def adrpo(x):
    """Fan et al., arXiv 2510.18053: A‖v − u‖² + (β₀ − A)‖v − v_ref‖²."""
    a = advantage(x["r"])
    return a * squared(x["v"], x["u"]) + (2.5 - a) * squared(x["v"], x["v_ref"])


def ram(x):
    """Bergmeister et al., arXiv 2605.10759: regress on v_ref + m·A·(u − v_old), the policy's own velocity detached."""
    target = x["v_ref"] + 0.3 * advantage(x["r"])[:, None] * (x["u"] - x["v_old"])
    return squared(x["v"], target)


def nft(x):
    """Zheng et al., arXiv 2509.16117: two branches around v_old, each endpoint's error over its detached mean."""
    beta, s, share = 0.4, x["s"][:, None], 0.5 + advantage(x["r"]) / 10
    x_t = torch.ones_like(x["u"])
    x1 = x_t + s * x["u"]
    loss = 0.0
    for sign, part in ((1, share), (-1, 1 - share)):
        branch = (1 - sign * beta) * x["v_old"] + sign * beta * x["v"]
        error = x_t + s * branch - x1
        size = error.detach().abs().mean(1, keepdim=True).clamp_min(1e-5)
        loss = loss + 5 * part / beta * (error.square() / size).mean(1)
    return loss + 0.02 * squared(x["v"], x["v_ref"])


def awm(x):
    """Xue et al., arXiv 2509.25050: −A/5 · exp(log p − log p detached), log p = −s·4·(ℓ + 1e-10)^¼, and two anchors."""
    log_p = -x["s"] * 4 * (squared(x["v"], x["u"]) + 1e-10) ** 0.25
    policy = -advantage(x["r"]) / 5 * (log_p - log_p.detach()).exp()
    return policy + squared(x["v"], x["v_old"]) + 0.02 * squared(x["v"], x["v_ref"])


PUBLISHED = {
    "orw": orw, "orw-centred": orw_centred, "rwr": rwr, "raft": raft,
    "adrpo": adrpo, "ram": ram, "nft": nft, "awm": awm,
}  # fmt: skip
