"""kohya's network: networks.lora, networks.lora_flux and lycoris.kohya with their network_args, as
adapters of ours.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lora_core.errors import UserError
from lora_core.text import is_number, nearest_hint
from training.translation.kohya_options import read_pairs
from training.translation.translated_options import TranslatedOptions

LORA, FLUX, LYCORIS = "networks.lora", "networks.lora_flux", "lycoris.kohya"
MODULES = (LORA, FLUX, LYCORIS)
SAMPLERS = ("*.downsamplers.*.conv", "*.upsamplers.*.conv")
CONVOLUTIONS = ("*.conv1", "*.conv2", "*.conv")  # 3 x 3, which have conv_dim
ALGORITHMS = {"lora": "lora", "locon": "lora", "loha": "loha", "lokr": "lokr", "full": "full"}
PRESETS = ("full", "full-lin", "attn-mlp", "attn-only", "unet-only", "unet-transformer-only")
# network_args without a counterpart -> what to do.
UNTAKEN = {
    "block_dims": "give ranks by pattern: --adapter.rank-pattern",
    "block_alphas": "give alphas by pattern: --adapter.alpha-pattern",
    "conv_block_dims": "give ranks by pattern: --adapter.rank-pattern",
    "conv_block_alphas": "give alphas by pattern: --adapter.alpha-pattern",
    "img_attn_dim": "give ranks by pattern: --adapter.rank-pattern",
    "txt_attn_dim": "give ranks by pattern: --adapter.rank-pattern",
    "img_mlp_dim": "give ranks by pattern: --adapter.rank-pattern",
    "txt_mlp_dim": "give ranks by pattern: --adapter.rank-pattern",
    "img_mod_dim": "give ranks by pattern: --adapter.rank-pattern",
    "txt_mod_dim": "give ranks by pattern: --adapter.rank-pattern",
    "single_dim": "give ranks by pattern: --adapter.rank-pattern",
    "single_mod_dim": "give ranks by pattern: --adapter.rank-pattern",
    "in_dims": "add the layers to --adapter.targets",
    "network_reg_dims": "give ranks by pattern: --adapter.rank-pattern",
    "network_reg_lrs": "give rates by pattern: --optimizer.lr-pattern",
    "ggpo_sigma": "nothing here does that",
    "ggpo_beta": "nothing here does that",
    "train_t5xxl": "T5 gets no adapters",
    "use_scalar": "nothing here does that",
    "train_norm": "norms are not trained",
    "rescaled": "nothing here does that",
    "constraint": "nothing here does that",
    "decompose_both": "the larger factor alone has a rank",
    "full_matrix": "nothing here does that",
    "rank_dropout_scale": "the kept ranks are always scaled up",
    "wd_on_output": "norms are those of the weight's rows",
    "loraplus_unet_lr_ratio": "one ratio for all: loraplus_lr_ratio",
    "loraplus_text_encoder_lr_ratio": "one ratio for all: loraplus_lr_ratio",
}
UNREAD = {
    "split_qkv": "the layers are three here in any case",
    "verbose": "--list-targets",
    "bypass_mode": "the same numbers",
    "use_tucker": "3 x 3 convolutions have two factors here",
    "use_cp": "3 x 3 convolutions have two factors here",
    "use_conv_cp": "3 x 3 convolutions have two factors here",
    "disable_conv_cp": "3 x 3 convolutions have two factors here",
    "block_size": "of another algorithm",
    "unbalanced_factorization": "the smaller factor comes first here",
    "block_lr_zero_threshold": "read with the block weights",
}
BLOCK_WEIGHTS = ("down_lr_weight", "mid_lr_weight", "up_lr_weight")
NUMBERS = (
    "conv_dim", "conv_alpha", "rank_dropout", "module_dropout", "loraplus_lr_ratio",
    "block_lr_zero_threshold", "factor",
)  # fmt: skip
KNOWN = (
    "algo", "preset", "conv_dim", "conv_alpha", "factor", "dora_wd", "use_dora", "rs_lora",
    "use_rslora", "rank_dropout", "module_dropout", "dropout", "loraplus_lr_ratio", "train_blocks",
    "train_double_block_indices", "train_single_block_indices", *BLOCK_WEIGHTS, *UNTAKEN, *UNREAD,
)  # fmt: skip


def translate_network(options: TranslatedOptions, groups: Sequence[str]) -> dict[str, str]:
    """Record what becomes of the network, of which `groups` train; returns its network_args.

    The rates of blocks (down_lr_weight ...) are left to `translate_block_rates`, which needs the
    model's layers. Raises UserError for a network or an algorithm that is not here.
    """
    module = options["network_module"]
    if module not in MODULES:
        raise options.refuse(
            "network_module", f"only {', '.join(MODULES)} are read; choose one of them"
        )
    arguments = read_pairs(options["network_args"], "network_args")
    for name in arguments:
        if name not in KNOWN:
            near = nearest_hint(name, KNOWN)
            raise UserError(f"network_args has {name}, which is unknown{near}")
    _check_numbers(options, arguments)
    kind = _read_kind(options, module, arguments)
    if kind == "full":
        options.take("network_dim", {}, "the weights themselves are trained, without a rank")
    else:
        rank = 4 if options["network_dim"] is None else int(options["network_dim"])
        words = "" if options["network_dim"] else "its rank then"
        options.take("network_dim", {"adapter.rank": rank}, words)
        alpha = float(options["network_alpha"] or 0)
        options.take("network_alpha", {"adapter.alpha": alpha})
    ours: dict[str, Any] = {} if kind == "lora" else {"adapter.kind": kind}
    if kind in ("lora", "dora"):
        ours["adapter.init"] = "kaiming"
    options.take("network_module", ours)
    _record_arguments(options, module, arguments, groups)
    if options["network_dropout"]:
        options.change(
            "network_dropout",
            {"adapter.dropout": float(options["network_dropout"])},
            "drops elements of the input, and not of the ranks",
        )
    if options["network_weights"]:
        options.take("network_weights", {"from_lora": options["network_weights"]})
        if options["dim_from_weights"]:
            options.take("dim_from_weights", {"from_lora_rank": "file"})
    if options["scale_weight_norms"]:
        norm = float(options["scale_weight_norms"])
        options.take("scale_weight_norms", {"optimizer.max_update_norm": norm})
    return arguments


def _check_numbers(options: TranslatedOptions, arguments: Mapping[str, str]) -> None:
    for name in NUMBERS:
        text = arguments.get(name, "0")
        if not (text.lstrip("-").isdigit() if name == "factor" else is_number(text)):
            kind = "a whole number" if name == "factor" else "a number"
            raise options.refuse("network_args", f"{name} is {text}; expected {kind}")


def _read_kind(options: TranslatedOptions, module: str, arguments: Mapping[str, str]) -> str:
    """The kind of the adapters. Raises UserError for an algorithm of LyCORIS that is not here."""
    if module != LYCORIS:
        return "lora"
    algorithm = arguments.get("algo", "lora").lower()
    if algorithm not in ALGORITHMS:
        raise options.refuse(
            "network_args",
            f"algo={algorithm} is not trained here; choose {', '.join(ALGORITHMS)}, or write it as "
            "a kind of your own, --adapter.kind my_adapter.py:Class",
        )
    is_dora = is_true(arguments.get("dora_wd")) or is_true(arguments.get("use_dora"))
    if is_dora and ALGORITHMS[algorithm] != "lora":
        raise options.refuse("network_args", f"dora_wd is for algo=lora here, not {algorithm}")
    return "dora" if is_dora else ALGORITHMS[algorithm]


def _record_arguments(
    options: TranslatedOptions, module: str, arguments: Mapping[str, str], groups: Sequence[str]
) -> None:
    """The entry of network_args: the layers, convolutions, dropouts."""
    targets, patterns = _read_targets(options, module, arguments)
    ours: dict[str, Any] = {}
    if "denoiser" in groups:
        ours = {"adapter.targets": targets, **patterns}
    if "text_encoder" in groups:
        is_attention = arguments.get("preset") == "attn-only"
        ours["adapter.text_targets"] = ["attention" if is_attention else "kohya"]
    simple = {"rank_dropout": "adapter.rank_dropout", "module_dropout": "adapter.module_dropout"}
    simple |= {"loraplus_lr_ratio": "optimizer.lora_plus"}
    for name, option in simple.items():
        if float(arguments.get(name) or 0):
            ours[option] = float(arguments[name])
    if "factor" in arguments and ALGORITHMS.get(arguments.get("algo", "")) == "lokr":
        ours["adapter.factor"] = int(arguments["factor"])
    if is_true(arguments.get("rs_lora")) or is_true(arguments.get("use_rslora")):
        ours["adapter.rslora"] = True
    remarks = [f"{name}: {UNTAKEN[name]}" for name in arguments if name in UNTAKEN]
    remarks += [f"{name}: {UNREAD[name]}" for name in arguments if name in UNREAD]
    if remarks:
        options.change("network_args", ours, "; ".join(remarks))
    else:
        options.take("network_args", ours, "the layers of its networks" if not arguments else "")


def _read_targets(
    options: TranslatedOptions, module: str, arguments: Mapping[str, str]
) -> tuple[list[str], dict[str, Any]]:
    """(--adapter.targets, ranks and alphas of convolutions)."""
    if module == FLUX:
        return _flux_targets(arguments), {}
    preset = arguments.get("preset", "full") if module == LYCORIS else ""
    if module == LYCORIS and preset not in PRESETS:
        raise options.refuse("network_args", f"preset={preset} is not read; give --adapter.targets")
    if preset == "attn-only":
        return ["attention"], {}
    dim, alpha = arguments.get("conv_dim"), arguments.get("conv_alpha")
    has_convolutions = bool(dim) or preset in ("full", "unet-only")
    if preset in ("attn-mlp", "unet-transformer-only") or not has_convolutions:
        return ["kohya"], {}
    patterns: dict[str, Any] = {}
    if dim:
        patterns["adapter.rank_pattern"] = dict.fromkeys(CONVOLUTIONS, float(dim))
    if dim or alpha:
        usual = "1" if module == LORA else str(options["network_alpha"])
        value = float(alpha or usual)
        patterns["adapter.alpha_pattern"] = dict.fromkeys(CONVOLUTIONS, value)
    return ["all", *SAMPLERS], patterns


def _flux_targets(arguments: Mapping[str, str]) -> list[str]:
    """The blocks of Flux that train: train_blocks, or lists such as 0-3,7."""
    kinds = {"double": "transformer_blocks", "single": "single_transformer_blocks"}
    wanted = arguments.get("train_blocks", "all")
    targets: list[str] = []
    for kind, name in kinds.items():
        chosen = arguments.get(f"train_{kind}_block_indices", "all")
        if wanted not in ("all", kind) or chosen == "none":
            continue
        if chosen == "all":
            targets.append(f"{name}.*")
        else:
            targets += [f"{name}.{i}.*" for i in _read_indices(chosen)]
    whole = [f"{name}.*" for name in kinds.values()]
    return ["kohya"] if targets == whole else targets


def _read_indices(text: str) -> list[int]:
    """The numbers of "0-3,7". Raises UserError for another text."""
    found: list[int] = []
    for part in text.split(","):
        first, _, last = part.strip().partition("-")
        if not first.isdigit() or not (last or first).isdigit():
            raise UserError(f"network_args has the blocks {text!r}; expected numbers as in 0-3,7")
        found += range(int(first), int(last or first) + 1)
    return found


def is_true(text: Any) -> bool:
    """Whether a text of network_args says yes."""
    return str(text).strip().lower() in ("true", "1", "yes")
