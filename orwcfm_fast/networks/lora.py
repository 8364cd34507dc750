"""Low-rank adapters of PEFT: policy and reference share one base in memory.

TRAINED is the adapter that learns: W + scale · B·A. A is drawn and B starts at zero, so the policy starts as its
reference. With rank r and alpha α the scale is α/r (Hu et al., ICLR 2022), or α/√r for rslora (Kalajdzievski, 2023);
dora (Liu et al., ICML 2024) trains the norms of W's rows as well.

A run that continues a published adapter holds it twice. START is the adapter as published, frozen, and TRAINED begins
as its copy. The reference is the base with START, so that the policy starts as its own reference and the W2 anchor
pulls towards the published model. TRAINED is the whole change from the plain base, so it is exported as it is. Merging
the published adapter into the base instead would round it to the base's precision, and leave half of the change out of
the export.
"""

import copy
import re
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from orwcfm_fast.errors import UserError
from orwcfm_fast.networks.lora_targets import parts, targets
from orwcfm_fast.settings import Finetune
from orwcfm_fast.sharding import like

TRAINED, START = "default", "published"  # PEFT's names of adapters
DOWN, UP = ".lora_A.weight", ".lora_B.weight"
Record = dict[str, Any]
"""What tensors do not say of an adapter, as JSON values, by the names of PEFT's `LoraConfig`."""


def peft() -> Any:
    """The library.

    Raises:
        UserError: it is missing; says how to install it.
    """
    try:
        import peft
        import peft.functional
    except ImportError as error:
        raise UserError(
            f"--lora: {error.name or error} is missing: pip install 'orwcfm-fast[lora]'"
        ) from None
    return peft


def add_lora(network: nn.Module, s: Finetune) -> None:
    """Add the adapter that is trained and freeze all the rest: a copy of START, else a fresh one as the settings say.

    Raises:
        UserError: no such layers, none that is large enough, or the network has the adapter already.
    """
    if has_adapter(network, TRAINED):
        raise UserError("this network has low-rank adapters already")
    if has_adapter(network, START):
        add_saved(network, TRAINED, lora_state(network, START), records(network, START), "--lora-init")
        return
    layers = targets(network, s)
    network.requires_grad_(False)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(s.seed % 2**63)
        for prefix, part in parts(network).items():
            if layers[prefix]:
                _inject(
                    part, TRAINED, layers[prefix], r=s.lora, lora_alpha=s.lora_alpha or s.lora,
                    use_dora=s.lora_kind == "dora", use_rslora=s.lora_kind == "rslora",
                )  # fmt: skip
    _activate(network, TRAINED)


def add_saved(
    network: nn.Module, name: str, state: dict[str, Tensor], known: dict[str, Record], where: str
) -> None:
    """Add and activate an adapter whose tensors exist: its layers, ranks and kind are theirs, its alphas `known`'s.

    Args:
        state: as `lora_state` gives it; known: as `records`; without a record every alpha is its layer's rank.

    Raises:
        UserError: adapters of another network.
    """
    network.requires_grad_(False)
    for prefix, part in parts(network).items():
        own = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
        ranks = {key.removesuffix(DOWN): len(value) for key, value in own.items() if key.endswith(DOWN)}
        for layer in ranks:
            problem = f"{where}: adapters of another network or rank (at '{prefix}{layer}')"
            _check_fits(part, layer, own, problem)
        if not ranks:
            continue
        record = known.get(prefix, {})
        rank = Counter(ranks.values()).most_common(1)[0][0]
        by_layer = {f"^{re.escape(layer)}": r for layer, r in ranks.items() if r != rank}
        _inject(
            part, name, [*ranks], r=rank, rank_pattern=by_layer, lora_alpha=float(record.get("lora_alpha", rank)),
            alpha_pattern=record.get("alpha_pattern") or ({} if "lora_alpha" in record else by_layer),
            use_dora=any(".lora_magnitude_vector" in key for key in own),
            use_rslora=bool(record.get("use_rslora")),
            lora_bias=any(key.endswith(".lora_B.bias") for key in own),
        )  # fmt: skip
    load_lora(network, state, where, name)
    _activate(network, name)


def _check_fits(part: nn.Module, layer: str, own: dict[str, Tensor], problem: str) -> None:
    """The sizes of an adapter's matrices are those of its layer."""
    try:
        weight = cast(Any, part.get_submodule(layer)).weight
        down, up = own[layer + DOWN], own[layer + UP]
    except (AttributeError, KeyError):
        raise UserError(problem) from None
    if down.shape[1:] != weight.shape[1:] or up.shape[:2] != (len(weight), len(down)):
        raise UserError(problem)


def _inject(part: nn.Module, name: str, layers: list[str], **config: Any) -> None:
    """Add an adapter to these layers; `config`: of PEFT's `LoraConfig`."""
    exactly = dict.fromkeys(layer + DOWN for layer in layers)  # target_modules alone match ends of names
    wanted = peft().LoraConfig(target_modules=layers, **config)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Already found a `peft_config`")  # two adapters are meant
        empty = next(part.parameters()).is_meta  # in a plan
        peft().inject_adapter_in_model(wanted, part, name, low_cpu_mem_usage=empty, state_dict=exactly)
    peft().functional.cast_adapter_dtype(part, name)
    for layer in _layers(part):
        if name not in layer.lora_magnitude_vector:
            layer.cast_input_dtype_enabled = False  # autocast chooses the type of the product
            continue
        # in float32 as in every forward pass, or a base in bf16 would not start as itself
        a, b = layer.lora_A[name].weight, layer.lora_B[name].weight
        magnitude = layer.lora_magnitude_vector[name]
        magnitude.update_layer(
            base_layer=layer.get_base_layer(),
            lora_A=a.detach(),
            lora_B=b.detach(),
            scaling=layer.scaling[name],
        )
        if magnitude.weight.device.type != "meta" and not magnitude.weight.all():
            raise UserError("--lora-kind dora: a layer has an output whose weights are all zero; use plain")


def _layers(network: nn.Module) -> list[Any]:
    from peft.tuners.lora import LoraLayer

    return [module for module in network.modules() if isinstance(module, LoraLayer)]


def _activate(network: nn.Module, name: str) -> None:
    for layer in _layers(network):  # one that lacks the adapter is its base
        layer.set_adapter(name, inference_mode=name != TRAINED)


def _adapted(network: nn.Module, name: str) -> dict[str, Any]:
    """The parts that have the adapter, by the prefix of their keys."""
    return {
        prefix: part
        for prefix, part in parts(network).items()
        if name in cast(dict[str, Any], getattr(part, "peft_config", {}))
    }


def has_adapter(network: nn.Module, *names: str) -> bool:
    """Whether the network has any of these adapters; of TRAINED and START where none is named."""
    return any(_adapted(network, name) for name in names or (TRAINED, START))


@contextmanager
def base_only(network: nn.Module) -> Iterator[None]:
    """Inside, the network is the reference: its base, with START where it has that."""
    layers = _layers(network)
    before = layers[0].active_adapters
    _activate(network, START)
    try:
        yield
    finally:
        for name in before:
            _activate(network, name)


def lora_state(network: nn.Module, name: str = TRAINED) -> dict[str, Tensor]:
    """The tensors of an adapter, by diffusers' and PEFT's keys "<layer>.lora_A.weight"; none where it has none."""
    return {
        prefix + key: value
        for prefix, part in _adapted(network, name).items()
        for key, value in peft()
        .get_peft_model_state_dict(part, adapter_name=name, save_embedding_layers=False)
        .items()
    }


def load_lora(network: nn.Module, state: dict[str, Tensor], where: str, name: str = TRAINED) -> None:
    """Inverse of `lora_state`.

    Raises:
        UserError: adapters of another network or rank.
    """
    own = lora_state(network, name)
    for key in sorted(own.keys() | state.keys()):
        if key not in own or key not in state or own[key].shape != state[key].shape:
            raise UserError(f"{where}: adapters of another network or rank (at '{key}')")
    for prefix, part in _adapted(network, name).items():
        mine = {k.removeprefix(prefix): like(v, own[k]) for k, v in state.items() if k.startswith(prefix)}
        peft().set_peft_model_state_dict(part, mine, name)


def records(network: nn.Module, name: str = TRAINED) -> dict[str, Record]:
    """What a file must say of an adapter beside its tensors, by the prefix of its keys."""
    keys = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_dora", "use_rslora", "lora_bias")
    found = {prefix: part.peft_config[name] for prefix, part in _adapted(network, name).items()}
    return {
        prefix: {key: getattr(config, key) for key in keys}
        | {"target_modules": sorted(config.target_modules)}
        for prefix, config in found.items()
    }


def settings_of(network: nn.Module) -> dict[str, Any]:
    """The settings that a published adapter brings, where the network has one."""
    for record in records(network, START).values():
        kind = "dora" if record["use_dora"] else "rslora" if record["use_rslora"] else "plain"
        return {"lora": record["r"], "lora_alpha": record["lora_alpha"], "lora_kind": kind}
    return {}


def plain_state(network: nn.Module, merged: bool = True) -> dict[str, Tensor]:
    """The state dict of a network without adapters: the one that is trained added to the weights, or none."""
    state = {
        key.replace(".base_layer.", "."): value
        for key, value in network.state_dict().items()
        if ".lora_" not in key
    }
    for prefix, part in _adapted(network, TRAINED).items() if merged else ():
        for key, layer in part.named_modules():
            if TRAINED in getattr(layer, "lora_A", ()):
                one = copy.deepcopy(layer)  # the base keeps its own bits
                one.merge(adapter_names=[TRAINED])
                state |= {f"{prefix}{key}.{k}": v for k, v in one.get_base_layer().state_dict().items()}
    return state


def trained_parameters(network: nn.Module) -> list[nn.Parameter]:
    """What fine-tuning trains: the adapters where there are some, else everything."""
    if not has_adapter(network):
        network.requires_grad_(True)
    return [p for p in network.parameters() if p.requires_grad]
