"""LoRA (Hu et al., arXiv 2106.09685) in PEFT's parameters, names and files, with a leaner module than PEFT's.

With it: scaling by alpha / sqrt(rank) (rsLoRA, Kalajdzievski, arXiv 2312.03732), a faster B (LoRA+, Hayou et al., arXiv
2402.12354), and beginnings taken from the weight itself (PiSSA, Meng et al., arXiv 2404.02948; OLoRA, Büyükakyüz, arXiv
2406.01775). DoRA and QLoRA in the files beside this one are kinds of it. PEFT is imported nowhere.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...errors import ModelError, RequestError
from ...files import read_json, write_json
from ..fused import lora_linear
from ..load import embeddings, untie, write_tensors
from . import LoraSettings, LowRankSettings, saved_shapes
from .base import Method, fill, freeze_base, left_alone, linear_layers

PREFIX = "base_model.model."  # PEFT wraps the model twice; its file names keep that
DECOMPOSED = ("pissa", "olora")  # beginnings that take a part of the weight over into A and B


class LoraLinear(nn.Module):
    """A frozen linear layer with a trained low-rank path: y = x W^T + b + s (x A^T) B^T.

    Where A and B begin as a part of W (PiSSA, OLoRA), that part is taken off by a second, frozen path with their first
    values and the opposite sign. W itself is never changed, so the adapter means the same over every copy of the base,
    in every dtype, and is saved as an ordinary one of twice the rank.
    """

    initial_A: Tensor | None
    initial_B: Tensor | None

    def __init__(self, base: nn.Linear, *, rank: int, scale: float, dropout: float):
        super().__init__()
        self.base = base
        new: Any = {"dtype": torch.float32, "device": base.weight.device}
        self.lora_A = nn.Parameter(torch.empty(rank, base.in_features, **new))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, rank, **new))
        nn.init.kaiming_uniform_(self.lora_A, a=5**0.5)
        self.register_buffer("initial_A", None, persistent=False)
        self.register_buffer("initial_B", None, persistent=False)
        self.scale = scale
        self.dropout = dropout

    @property
    def weight(self) -> Tensor:
        return self.base.weight

    @property
    def bias(self) -> Tensor | None:
        return self.base.bias

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The frozen weight, (out, in) in `dtype`."""
        return self.base.weight.to(dtype)

    def factors(self) -> tuple[Tensor, Tensor]:
        """A (rank, in) and B (out, rank), with the part that they began as taken off again."""
        if self.initial_A is None or self.initial_B is None:
            return self.lora_A, self.lora_B
        return torch.cat([self.lora_A, self.initial_A]), torch.cat([self.lora_B, -self.initial_B], 1)

    def delta(self) -> Tensor:
        """What the low-rank path adds to the weight, (out, in) in fp32."""
        a, b = self.factors()
        return self.scale * (b @ a)

    def merged(self) -> Tensor:
        """The weight of the plain layer that computes the same, (out, in) in fp32."""
        return self.dense(torch.float32) + self.delta()

    def saved(self) -> dict[str, Tensor]:
        """The layer's tensors under PEFT's names."""
        a, b = self.factors()
        return {"lora_A.weight": a, "lora_B.weight": b}

    def trained(self) -> dict[str, nn.Parameter]:
        """The parameters that tensors of these names are read into."""
        return {"lora_A.weight": self.lora_A, "lora_B.weight": self.lora_B}

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.factors()
        if self.training and self.dropout > 0:
            return self.dropped(x, F.dropout(x, self.dropout), a, b)
        return self.adapted(x, a, b)

    def adapted(self, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return lora_linear(x, self.base.weight, self.base.bias, a, b, self.scale)

    def dropped(self, x: Tensor, kept: Tensor, a: Tensor, b: Tensor) -> Tensor:
        """With what dropout left of the input on the low-rank path."""
        low = F.linear(kept, a.to(x.dtype))
        return self.base(x) + self.scale * F.linear(low, b.to(x.dtype))

    # beginnings

    @torch.no_grad()
    def begin(self, how: str) -> None:
        """A and B as PEFT begins them under the same name; the layer computes the base's function still."""
        rank, width = self.lora_A.shape
        if how == "gaussian":
            nn.init.normal_(self.lora_A, std=1 / rank)
        elif how == "orthogonal":
            turn, _ = torch.linalg.qr(torch.randn(rank, rank))
            even, odd = turn[0::2], turn[1::2]
            self.lora_A.copy_((torch.randn(width, rank // 2) @ even).t() / 10)
            self.lora_B.copy_((torch.randn(rank // 2, len(self.lora_B)).t() @ odd) / 10)
        elif how == "pissa":
            left, values, right = torch.linalg.svd(self.dense(torch.float32), full_matrices=False)
            root = (values[:rank] / self.scale).sqrt()
            self._begin_at(root[:, None] * right[:rank], left[:, :rank] * root)
        elif how == "olora":
            left, right = torch.linalg.qr(self.dense(torch.float32))
            self._begin_at(right[:rank], left[:, :rank])

    def _begin_at(self, a: Tensor, b: Tensor) -> None:
        self.lora_A.copy_(a)
        self.lora_B.copy_(b)
        self.initial_A, self.initial_B = self.lora_A.detach().clone(), self.lora_B.detach().clone()


class Lora(Method):
    settings: LowRankSettings
    layer: type[LoraLinear] = LoraLinear

    def __init__(self, settings: LowRankSettings):
        self.settings = settings

    # making a model trainable

    def apply(self, model: Any) -> None:
        freeze_base(model)
        chosen, whole = self._targets(model), self._whole(model)
        self._check_patterns(chosen)
        for name in chosen:
            parent, _, leaf = name.rpartition(".")
            owner = model.get_submodule(parent)
            setattr(owner, leaf, self._adapted(name, getattr(owner, leaf)))
        for module in whole.values():
            for parameter in module.parameters():
                parameter.requires_grad_(True)

    def _adapted(self, name: str, base: nn.Linear) -> LoraLinear:
        rank, scale = self._rank_and_scale(name)
        if self.settings.init in DECOMPOSED and rank > min(base.in_features, base.out_features):
            raise RequestError(
                f"method.rank is {rank}, and {name} is {base.out_features} by {base.in_features}",
                harm=f"init: {self.settings.init} cannot take more than the smaller of the two from it.",
                hint="Lower method.rank, or give this layer another in method.rank_pattern.",
            )
        layer = self.layer(base, rank=rank, scale=scale, dropout=self.settings.dropout)
        if self.settings.init not in DECOMPOSED:
            layer.begin(self.settings.init)
        return layer

    def _rank_and_scale(self, name: str) -> tuple[int, float]:
        """The rank of a layer, and what its path is multiplied by."""
        settings = self.settings
        rank = _patterned(settings.rank_pattern, name, settings.rank)
        alpha = _patterned(settings.alpha_pattern, name, settings.alpha)
        return rank, alpha / (rank**0.5 if settings.rslora else rank)

    def _targets(self, model: Any) -> list[str]:
        """Names of the layers to adapt, as PEFT finds them by the ends of names; none of what is trained whole."""
        chosen = linear_layers(model, self.settings.targets, head=True, beside=self._whole(model))
        for name in chosen:
            self._check_base(name, model.get_submodule(name))
        return chosen

    def _check_base(self, name: str, base: nn.Linear) -> None:
        if not base.weight.is_floating_point():
            raise ModelError(
                f"{name} of this model is stored quantised",
                harm="This method computes with the weights as they are.",
                hint="Use method: {kind: qlora}, or the model's 16-bit original.",
            )

    def _whole(self, model: Any) -> dict[str, nn.Module]:
        """The modules that are trained whole, by name; of two that share a weight both."""
        wanted = self.settings.train_also
        names = {name: module for name, module in model.named_modules(remove_duplicate=False)}
        chosen = {n: m for n, m in names.items() if _named(n, wanted)}
        missing = [w for w in wanted if not any(_named(n, [w]) for n in names)]
        if missing:
            raise RequestError(
                f"method.train_also names modules this model does not have: {', '.join(missing)}",
                harm="They would silently stay untrained.",
                hint=f"For example: {', '.join(embeddings(model))}.",
            )
        for name, module in chosen.items():
            if any(not parameter.is_floating_point() for parameter in module.parameters()):
                raise RequestError(
                    f"method.train_also names {name}, which is held in 4 bits",
                    harm="Rounded weights cannot take small steps.",
                    hint="Name it in method.targets, or train it over an unquantised base (kind: lora).",
                )
        tied = _tied(model)
        if any(module in tied for module in chosen.values()):
            chosen.update({n: m for n, m in names.items() if m in tied})
        return chosen

    def _check_patterns(self, chosen: Iterable[str]) -> None:
        for key in ("rank_pattern", "alpha_pattern"):
            unused = [p for p in getattr(self.settings, key) if not any(_matches(p, name) for name in chosen)]
            if unused:
                raise RequestError(
                    f"method.{key} has patterns that no adapted layer's name ends in: {', '.join(unused)}",
                    harm="They would change nothing, without a word.",
                    hint=f"A layer's name here: {next(iter(chosen))}",
                )

    def rates(self, model: nn.Module) -> dict[str, float]:
        """LoRA+ (Hayou et al., arXiv 2402.12354): B learns `lr_ratio` times as fast as A."""
        if self.settings.lr_ratio == 1:
            return {}
        return {f"{name}.lora_B": self.settings.lr_ratio for name in adapters(model)}

    def begin(
        self, model: nn.Module, gradients: Callable[[], Iterator[None]], alive: Callable[[], None] = lambda: None
    ) -> None:
        if self.settings.init in DECOMPOSED and not self.state(model):
            self._decompose(model, alive)

    def _decompose(self, model: nn.Module, alive: Callable[[], None] = lambda: None) -> None:
        for layer in adapters(model).values():
            alive()
            layer.begin(self.settings.init)

    def state(self, model: nn.Module) -> dict[str, Tensor]:
        """The first values of A and B, where they are a part of the weight."""
        layers = adapters(model).items()
        return {
            f"{name}.{key}": getattr(layer, key)
            for name, layer in layers
            for key in ("initial_A", "initial_B")
            if getattr(layer, key) is not None
        }

    def restore(self, model: nn.Module, state: dict[str, Tensor]) -> None:
        for name, layer in adapters(model).items():
            if f"{name}.initial_A" in state:
                layer.initial_A = state[f"{name}.initial_A"].to(layer.lora_A.device)
                layer.initial_B = state[f"{name}.initial_B"].to(layer.lora_B.device)

    def notes(self, model: nn.Module) -> list[str]:
        whole = self._whole(model)
        lines = [f"trained whole besides: {', '.join(whole)}"] if whole else []
        shared = [name for name, module in whole.items() if module in _tied(model)]
        if shared:
            lines.append(f"{' and '.join(shared)} share one weight: it is trained as both, and saved as both")
        return [*lines, *left_alone(model)]

    # files

    def save(self, model: Any, folder: Path, *, base: str, revision: str | None = None) -> None:
        layers, whole = adapters(model), self._whole(model)
        write_tensors(folder / "adapter_model.safetensors", self._tensors(model))
        taken = 2 if any(layer.initial_A is not None for layer in layers.values()) else 1
        stretch = taken**0.5 if self.settings.rslora else taken  # of alpha, which keeps the scale as it is
        config: dict[str, Any] = {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": base,
            "revision": revision,
            "r": self.settings.rank * taken,
            "lora_alpha": self.settings.alpha * stretch,
            "lora_dropout": self.settings.dropout,
            "target_modules": self._target_names(model, list(layers)),
            "bias": "none",
            "fan_in_fan_out": False,
            "inference_mode": True,
            "init_lora_weights": True if self.settings.init in ("default", *DECOMPOSED) else self.settings.init,
            "use_rslora": self.settings.rslora,
            "use_dora": any("lora_magnitude_vector" in layer.saved() for layer in layers.values()),
            "modules_to_save": sorted({_shortest(name, model) for name in whole}) or None,
            "rank_pattern": {key: rank * taken for key, rank in self.settings.rank_pattern.items()},
            "alpha_pattern": {key: alpha * stretch for key, alpha in self.settings.alpha_pattern.items()},
        }
        write_json(folder / "adapter_config.json", config)

    def _target_names(self, model: Any, names: list[str]) -> list[str]:
        """As the recipe names them, or the last parts of the names where nothing else ends in them."""
        if self.settings.targets != "all-linear":
            return list(self.settings.targets)
        ends = sorted({name.rpartition(".")[2] for name in names})
        plain = {name.removesuffix(".base") for name, _ in model.named_modules()}
        inside = tuple(f"{name}." for name in (*names, *self._whole(model)))
        matched = {name for name in plain if _named(name, ends) and not f"{name}.".startswith(inside)} | set(names)
        return ends if matched == set(names) else sorted(names)

    def _tensors(self, model: Any) -> dict[str, Tensor]:
        """What is saved, under PEFT's names."""
        tensors = {
            f"{PREFIX}{name}.{key}": tensor.detach()
            for name, layer in adapters(model).items()
            for key, tensor in layer.saved().items()
        }
        for name, parameter in self._whole_parameters(model, grown=True).items():
            tensors[PREFIX + name] = parameter.detach().clone()  # a shared weight is written twice
        return tensors

    def _whole_parameters(self, model: Any, *, grown: bool) -> dict[str, nn.Parameter]:
        """Parameters of the base that are trained whole, by name; with those of a grown vocabulary if so."""
        modules = self._whole(model)
        if grown and getattr(model, "fitout_grown_vocabulary", False):
            modules = {**embeddings(model), **modules}
        return {f"{name}.{key}": p for name, module in modules.items() for key, p in module.named_parameters()}

    def load(self, model: Any, folder: Path) -> None:
        from safetensors.torch import load_file

        saved = load_file(folder / "adapter_model.safetensors")
        self._check_same(model, folder)
        self._part_tied(model, saved)
        wanted: dict[str, Tensor] = {}
        for name, layer in adapters(model).items():
            wanted.update({f"{PREFIX}{name}.{key}": parameter for key, parameter in layer.trained().items()})
            if f"{PREFIX}{name}.base_layer.weight" in saved:  # PEFT adds an adapted head's own weight
                wanted[f"{PREFIX}{name}.base_layer.weight"] = layer.base.get_parameter("weight")
        wanted.update({PREFIX + n: p for n, p in self._whole_parameters(model, grown=False).items()})
        for name, module in embeddings(model).items():
            if f"{PREFIX}{name}.weight" in saved:
                wanted[f"{PREFIX}{name}.weight"] = module.weight
        fill(wanted, saved, folder)

    def _check_same(self, model: Any, folder: Path) -> None:
        """The adapter must mean with these settings what it meant with its own."""
        theirs = create(settings_of(folder))
        taken = [x.settings.init if x.settings.init in DECOMPOSED else None for x in (self, theirs)]
        if taken[0] != taken[1]:
            raise ModelError(
                f"method.init is {self.settings.init}, and this adapter is an ordinary one" if taken[0] else
                f"this adapter began as a part of the weight ({taken[1]}), which method.init does not say",
                where=str(folder),
                harm="A part of the base would be counted twice, or not at all.",
                hint="Use the method.init that its adapter_config.json implies"
                + (": leave it out." if taken[0] else f": {taken[1]}."),
            )  # fmt: skip
        for name, layer in adapters(model).items():
            _, scale = theirs._rank_and_scale(name)
            if abs(scale - layer.scale) > 1e-6 * scale:
                raise ModelError(
                    f"this adapter is scaled by {scale:g} at {name}, the recipe's rank and alpha scale by "
                    f"{layer.scale:g}",
                    where=str(folder),
                    harm="The same numbers would add up to another model.",
                    hint="Take method.rank, alpha, rslora and the patterns from its adapter_config.json.",
                )
        if taken[0] and not self.state(model):
            self._decompose(model)  # as PEFT does when it loads one

    def _part_tied(self, model: Any, saved: dict[str, Tensor]) -> None:
        """Gives the head a weight of its own where an adapter has other values for it than for the embedding."""
        shared = {name: module for name, module in self._whole(model).items() if module in _tied(model)}
        theirs = [saved.get(f"{PREFIX}{name}.weight") for name in shared]
        if not shared or all(t is not None and theirs[0] is not None and torch.equal(t, theirs[0]) for t in theirs):
            return
        untie(model)
        for name, module in shared.items():
            module.get_parameter("weight").requires_grad_(_named(name, self.settings.train_also))
            saved.setdefault(f"{PREFIX}{name}.weight", module.get_parameter("weight").detach().clone())

    def merge(self, model: Any) -> None:
        """W <- W + s B A for every adapted layer, summed in fp32 and rounded once to the weight's own dtype."""
        with torch.no_grad():
            for name, layer in adapters(model).items():
                weight = layer.base.weight
                merged = layer.merged().to(weight.dtype)
                parent, _, leaf = name.rpartition(".")
                setattr(model.get_submodule(parent), leaf, layer.base)
                if layer.base in _tied(model):
                    untie(model)
                layer.base.weight.copy_(merged)


def adapters(model: Any) -> dict[str, LoraLinear]:
    """The adapted layers by their name in the base model."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLinear)}


def _tied(model: Any) -> list[nn.Module]:
    """The input embedding and the head, where they share one weight; else none."""
    into, head = model.get_input_embeddings(), model.get_output_embeddings()
    return [into, head] if head is not None and head.weight is into.weight else []


def _named(name: str, wanted: Iterable[str]) -> bool:
    """Whether a module's name is one of those wanted, or ends in one."""
    return any(name == w or name.endswith("." + w) for w in wanted)


def _matches(pattern: str, name: str) -> bool:
    """PEFT's rule for rank_pattern and alpha_pattern: a regular expression for the end of a name, at a dot."""
    return re.match(rf"(.*\.)?({pattern})$", name) is not None


def _patterned(patterns: dict[str, Any], name: str, default: Any) -> Any:
    return next((value for pattern, value in patterns.items() if _matches(pattern, name)), default)


def _shortest(name: str, model: Any) -> str:
    """A module's last name where no other ends in it (PEFT compares ends), else the whole."""
    leaf = name.rpartition(".")[2]
    return leaf if sum(n.endswith(leaf) for n, _ in model.named_modules(remove_duplicate=False)) == 1 else name


# reading what PEFT wrote

BEGINNINGS: dict[Any, Literal["default", "gaussian", "orthogonal", "pissa", "olora"]] = {
    True: "default", False: "default", None: "default", "eva": "default", "mica": "default",
    "gaussian": "gaussian", "orthogonal": "orthogonal", "pissa": "pissa", "olora": "olora",
}  # fmt: skip
# Keys of adapter_config.json that are computed, or say nothing about what a loaded adapter computes.
KNOWN = {
    "peft_type", "task_type", "auto_mapping", "base_model_name_or_path", "revision", "inference_mode", "peft_version",
    "r", "lora_alpha", "lora_dropout", "use_rslora", "rank_pattern", "alpha_pattern", "init_lora_weights",
    "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save", "use_dora",
    "fan_in_fan_out", "eva_config", "corda_config", "lora_ga_config", "loftq_config", "megatron_config",
    "megatron_core", "qalora_group_size", "runtime_config",
}  # fmt: skip
VARIANTS = ("qlora", "dora")  # files beside this one that know folders of their own among those of this type


def settings_of(folder: Path) -> LowRankSettings:
    """The settings of a saved PEFT adapter; what this method does not compute is refused by name."""
    config = read_json(folder / "adapter_config.json")
    wrong = [] if config.get("peft_type") == "LORA" else [f"peft_type {config.get('peft_type')}"]
    wrong += [f"bias: {config['bias']}"] if config.get("bias", "none") != "none" else []
    wrong += [key for key, value in config.items() if value and key not in KNOWN | {"bias"}]
    if config.get("init_lora_weights", True) not in BEGINNINGS:
        wrong.append(f"init_lora_weights: {config['init_lora_weights']}")
    names = list(saved_shapes(folder))
    wrong += ["an adapted embedding"] if any("lora_embedding_" in name for name in names) else []
    if wrong:
        raise ModelError(
            f"this adapter uses {', '.join(wrong)}, which Fitout does not compute",
            where=str(folder / "adapter_config.json"),
            harm="Ignoring it would change what the adapter does.",
            hint="Merge it with the tool that made it, and use the merged model as model.base.",
        )
    common = {
        "rank": config["r"],
        "alpha": config["lora_alpha"],
        "dropout": config.get("lora_dropout") or 0.0,
        "targets": _targets_of(config, names),
        "rank_pattern": _used(config.get("rank_pattern"), names),
        "alpha_pattern": _used(config.get("alpha_pattern"), names),
        "rslora": bool(config.get("use_rslora")),
        "init": BEGINNINGS[config.get("init_lora_weights", True)],
        "train_also": _whole_of(config, names),
    }
    for variant in VARIANTS:
        settings = import_module(f".{variant}", __package__).settings_from(folder, config, common)
        if settings is not None:
            return settings
    return LoraSettings(**common)


def _adapted_names(names: list[str]) -> list[str]:
    end = ".lora_A.weight"
    return [name.removeprefix(PREFIX).removesuffix(end) for name in names if name.endswith(end)]


def _targets_of(config: dict[str, Any], names: list[str]) -> list[str]:
    """The adapted layers: as the list in the config names them where it says all, else by the saved tensors."""
    targets, adapted = config["target_modules"], _adapted_names(names)
    narrowed = any(config.get(key) not in (None, []) for key in ("exclude_modules", "layers_to_transform"))
    if not isinstance(targets, list) or narrowed:
        return adapted
    return [target for target in targets if any(_named(name, [target]) for name in adapted)]


def _whole_of(config: dict[str, Any], names: list[str]) -> list[str]:
    """The modules trained whole. PEFT takes every module whose name ends in the letters given, also in mid-word
    ("norm" in "input_layernorm"); where that found more than the names mean here, they are named in full."""
    wanted = config.get("modules_to_save") or []
    found = set()
    for name in names:
        parts = name.removeprefix(PREFIX).split(".")
        starts = [".".join(parts[:n]) for n in range(1, len(parts))]
        found.update([start for start in starts if start.endswith(tuple(wanted))][:1])
    return list(wanted) if all(_named(module, wanted) for module in found) else sorted(found)


def _used(patterns: dict[str, Any] | None, names: list[str]) -> dict[str, Any]:
    """Patterns that some adapted layer matches; the others change nothing, in PEFT too."""
    adapted = _adapted_names(names)
    return {key: value for key, value in (patterns or {}).items() if any(_matches(key, name) for name in adapted)}


def create(settings: LowRankSettings) -> Lora:
    if type(settings) is LoraSettings:
        return Lora(settings)
    return import_module(f".{settings.kind}", __package__).create(settings)  # type: ignore[attr-defined]
