"""The networks, tokens, loss and optimizer of Mix-of-Show's YAML options."""

from __future__ import annotations

import itertools
import math
from typing import Any

from lora_core.errors import UserError
from training.translation.translated_options import TranslatedOptions

UNET_TARGETS = {"Attention": ["attention"], "Transformer2DModel": ["kohya"]}
TEXT_TARGETS = {"CLIPAttention": ["attention"], "CLIPEncoderLayer": ["kohya"]}
GROUPS = {"unet": "denoiser", "text_encoder": "text_encoder", "text_embedding": "tokens"}
USUAL_RATES = {"unet": 1e-4, "text_encoder": 1e-5, "text_embedding": 1e-3}
TUNING = "models.finetune_cfg"


def translate_models(record: TranslatedOptions) -> tuple[str, ...]:
    """Record the model, the tokens and the adapters; returns the concepts' names in files."""
    model = record.given.get("models.pretrained_path")
    if not isinstance(model, str):
        raise UserError("models.pretrained_path is missing; give a folder or hub id")
    record.take("models.pretrained_path", {"model": model})
    concepts = _translate_tokens(record)
    _translate_adapters(record)
    offset = float(record.given.get("models.noise_offset") or 0.0)
    record.take("models.noise_offset", {"noise.offset": offset})
    if record.given.get("models.gradient_checkpoint"):
        record.take("models.gradient_checkpoint", {"gradient_checkpointing": "blocks"})
    return concepts


def _translate_tokens(record: TranslatedOptions) -> tuple[str, ...]:
    """The words of the captions and the concepts that stand for them.

    replace_mapping has a word and its concepts, <TOK>: <hermione1> <hermione2>.
    """
    name = "datasets.train.replace_mapping"
    mapping = record.given.get(name)
    concepts = str(record.given.get("models.new_concept_token") or "").split("+")
    starts = str(record.given.get("models.initializer_token") or "").split("+")
    if not isinstance(mapping, dict) or not mapping:
        raise UserError(f"{name} is missing; write the word of the captions and its concepts")
    listed = {str(word): str(names).split() for word, names in mapping.items()}
    wanted = list(itertools.chain.from_iterable(listed.values()))
    if wanted != concepts or len(starts) not in (len(concepts), 1):
        raise record.refuse(
            "models.new_concept_token",
            f"expected the concepts of {name}, {'+'.join(wanted)}, and a start of each in "
            "models.initializer_token",
        )
    if len({len(names) for names in listed.values()}) > 1:
        raise record.refuse(name, "words have different numbers of concepts; train them apart")
    starts = starts if len(starts) == len(concepts) else ["<rand-0.017>"] * len(concepts)
    count = len(concepts) // len(listed)
    inits = ["+".join(starts[i : i + count]) for i in range(0, len(starts), count)]
    record.take(name, {"tokens.words": list(listed)}, "captions and prompts say the word")
    per_layer = bool(record.given.get("models.enable_edlora", True))
    ours: dict[str, Any] = {"tokens.vectors": count, "tokens.encoders": ["clip_l"]}
    record.take("models.new_concept_token", ours, "their names in the .pth")
    record.take("models.initializer_token", {"tokens.init": inits})
    record.take("models.enable_edlora", {"tokens.per_layer": per_layer})
    return tuple(concepts)


def _translate_adapters(record: TranslatedOptions) -> None:
    """Ranks, alphas, which are not divided by the rank there, and classes of layers."""
    parts = {}
    tables = (("unet", UNET_TARGETS), ("text_encoder", TEXT_TARGETS))
    for name, targets in tables:
        if not record.given.get(f"{TUNING}.{name}.enable_tuning", True):
            continue
        start = f"{TUNING}.{name}.lora_cfg"
        where = record.given.get(f"{start}.where", next(iter(targets)))
        if where not in targets:
            raise record.refuse(f"{start}.where", f"expected one of {', '.join(targets)}")
        option = "adapter.targets" if name == "unet" else "adapter.text_targets"
        record.take(f"{start}.where", {option: targets[where]})
        rank = int(record.given.get(f"{start}.rank", 4))
        parts[name] = rank, float(record.given.get(f"{start}.alpha", 1.0)) * rank
    if "unet" not in parts:
        raise UserError(f"{TUNING}.unet.enable_tuning is false; train.py can train tokens alone")
    rank, alpha = parts["unet"]
    record.take(f"{TUNING}.unet.lora_cfg.rank", {"adapter.rank": rank, "adapter.init": "kaiming"})
    why = "times the rank, by which it is divided here"
    record.take(f"{TUNING}.unet.lora_cfg.alpha", {"adapter.alpha": alpha}, why)
    if "text_encoder" in parts:
        own: dict[str, Any] = {}
        if parts["text_encoder"] != parts["unet"]:
            for pattern in ("*.self_attn.*", "*.mlp.*")[: 1 if where == "CLIPAttention" else 2]:
                own.setdefault("adapter.rank_pattern", {})[pattern] = float(
                    parts["text_encoder"][0]
                )
                own.setdefault("adapter.alpha_pattern", {})[pattern] = parts["text_encoder"][1]
        record.take(f"{TUNING}.text_encoder.lora_cfg.rank", own)
        record.take(f"{TUNING}.text_encoder.lora_cfg.alpha", {})


def translate_train(record: TranslatedOptions, images: int, processes: int) -> None:
    """Record the loss, the optimizer and the steps of `images` images."""
    uses_attention = _translate_loss(record)
    _translate_optimizer(record)
    batch = int(record.given.get("datasets.train.batch_size_per_gpu", 1))
    passes = int(record.given.get("gradient_accumulation_steps") or 1)
    enlarge = float(record.given.get("datasets.train.dataset_enlarge_ratio", 1))
    steps = max(1, math.ceil(images * enlarge / (batch * passes * processes)))
    if uses_attention and passes > 1:
        why = "its attention is regularized over the whole batch: one larger forward pass"
        record.change("gradient_accumulation_steps", {"batch_size": batch * passes}, why)
        batch, passes = batch * passes, 1
    elif "gradient_accumulation_steps" in record.given:
        record.take("gradient_accumulation_steps", {"accumulation": passes})
    record.take("datasets.train.batch_size_per_gpu", {"batch_size": batch})
    groups = []
    for name, group in GROUPS.items():
        if record.given.get(f"{TUNING}.{name}.enable_tuning", True):
            groups.append(group)
    ours = {"stages.0.steps": steps, "stages.0.groups": groups}
    why = f"{images} images x {enlarge:g} / {batch * passes * processes}"
    record.take("datasets.train.dataset_enlarge_ratio", ours, why)
    precision = record.given.get("mixed_precision") or "no"
    if precision in ("fp16", "bf16"):
        record.change("mixed_precision", {"precision": "bf16"}, "the frozen weights are in bf16")
    else:
        record.take("mixed_precision", {"precision": "fp32"})


def _translate_loss(record: TranslatedOptions) -> bool:
    """The loss and its masks; returns whether attention is regularized."""
    uses_mask = bool(record.given.get("datasets.train.use_mask"))
    weight = record.given.get("models.attn_reg_weight")
    masks_loss = bool(record.given.get("models.use_mask_loss"))
    if not uses_mask:
        record.take("datasets.train.use_mask", {"data.masks": "none"})
        for name in ("models.attn_reg_weight", "models.use_mask_loss"):
            if record.given.get(name):
                record.leave_out(name, "only with use_mask: true; there the padding is the mask")
        return False
    if weight:
        full = bool(record.given.get("models.reg_full_identity", True))
        ours = {"loss": "edlora", "loss_arg.attention_weight": float(weight)}
        record.take("models.attn_reg_weight", ours)
        record.take("models.reg_full_identity", {"loss_arg.full_identity": full})
        record.take("datasets.train.use_mask", {"data.masks": "file"})
        if not masks_loss:
            record.change("models.use_mask_loss", {}, "the mask weights the loss, too")
        return True
    if masks_loss:
        record.take("datasets.train.use_mask", {"data.masks": "file"})
        record.take("models.use_mask_loss", {"mask_scale": "mixofshow"})
    else:
        record.ignore("datasets.train.use_mask", "neither loss nor attention is to read the masks")
    return False


def _translate_optimizer(record: TranslatedOptions) -> None:
    """AdamW with a rate for each group, linear decay, and the norm at which tokens stop."""
    kind = record.given.get("train.optim_g.type", "AdamW")
    if kind != "AdamW":
        raise record.refuse("train.optim_g.type", "it is AdamW there, too; leave it out")
    record.take("train.optim_g.type", {"optimizer.name": "adamw"})
    decay = float(record.given.get("train.optim_g.weight_decay", 0.01))
    betas = [float(beta) for beta in record.given.get("train.optim_g.betas") or (0.9, 0.999)]
    decays: dict[str, Any] = {}
    for name, group in GROUPS.items():
        if not record.given.get(f"{TUNING}.{name}.enable_tuning", True):
            continue
        rate = float(record.given.get(f"{TUNING}.{name}.lr", USUAL_RATES[name]))
        record.take(f"{TUNING}.{name}.lr", {f"optimizer.lr.{group}": rate})
        decays[f"optimizer.weight_decay.{group}"] = decay
        if betas != [0.9, 0.999]:
            decays[f"optimizer.betas.{group}"] = betas
    record.take("train.optim_g.weight_decay", decays)
    schedule = record.given.get("train.scheduler", "linear")
    if schedule != "linear":
        raise record.refuse("train.scheduler", "the source always decays linearly; write linear")
    record.take("train.scheduler", {"optimizer.schedule": "linear"})
    norm = float(record.given.get("train.emb_norm_threshold") or 0.55)
    ours = {"tokens.norm": "stop", "tokens.norm_target": norm}
    record.take("train.emb_norm_threshold", ours, "the tokens stop at that mean norm")
    if record.given.get("train.unet_kv_drop_rate"):
        record.leave_out("train.unet_kv_drop_rate", "keys and values are not dropped here")
