"""The components of a model folder: configs, networks, VAE and tokenizers, for all families."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from torch import Tensor, nn

from lora_core.errors import UserError, first_line
from lora_core.json_files import LARGEST_NUMBER, read_object
from lora_core.text import check_prompt_length, shorten_value
from models.hub_models import missing_model
from models.planned_tokenizer import PlannedTokenizer

# Limits of a network's config: one of 100 bytes can announce a billion layers.
MOST_LAYERS = 200  # of one kind; Flux has 38
LARGEST_AXIS = 1 << 20  # of a tensor; the vocabulary of Gemma has 256,000 words
LARGEST_SIDE = 4096  # pixels of a model's own images; those of the families here have up to 1024
MOST_TOKENS = 10_000  # of a prompt; CLIP reads 77
SHOWN_TOKENS = 200  # of the words that do not fit into a prompt
LONGEST_LIST = 64  # such as the channels of the blocks


def read_json(path: str, name: str) -> dict[str, Any]:
    """`name` (say "scheduler/scheduler_config.json") of a model in a folder or on the hub.

    Raises UserError when it does not exist.
    """
    file = Path(path) / name
    if not Path(path).is_dir():
        try:
            file = Path(hf_hub_download(path, name))
        except Exception as error:
            # The hub's client raises a dozen classes: no network, no such repository or file ...
            raise missing_model(path, error, file=f"{name} for it") from None
    if not file.exists():
        raise UserError(
            f"the model folder {path} has no {name}; it must be in the diffusers layout"
        )
    table = read_object(file, "fetch the model again")
    if file.name == "config.json":
        _check_sizes(table, str(file))
        _check_latent_units(table, str(file))
    return table


def _check_sizes(config: dict[str, Any], source: str) -> None:
    """Raises UserError for more layers, or larger ones, than any network has."""
    for key, value in config.items():
        limit = MOST_LAYERS if "layers" in key else LARGEST_AXIS
        waiting = [value]
        while waiting:
            item = waiting.pop()
            size = abs(item) if isinstance(item, int) else 0
            if isinstance(item, list):
                waiting += item
                size = len(item) * limit // LONGEST_LIST
            if size > limit:
                raise UserError(
                    f"{source} has {shorten_value(value)} as {key}, expected at most {limit}, "
                    f"or {LONGEST_LIST} values; fetch the model again"
                )


def _check_latent_units(config: dict[str, Any], source: str) -> None:
    """Raises UserError for a VAE whose latents have no unit: texts, lists of another length, 0."""
    for key in ("scaling_factor", "shift_factor"):
        value = config.get(key)
        is_left_out = key not in config or (key == "shift_factor" and value is None)
        if not is_left_out and not (_is_finite(value) and (value or key == "shift_factor")):
            raise UserError(
                f"{source} has {shorten_value(value)} as {key}, expected a number; "
                "fetch the model again"
            )
    channels = config.get("latent_channels", 4)
    for key in ("latents_mean", "latents_std"):
        value = config.get(key)
        if value is None:
            continue
        numbers = value if isinstance(value, list) else []
        if len(numbers) != channels or not all(map(_is_finite, numbers)):
            raise UserError(
                f"{source} has {shorten_value(value)} as {key}, expected {channels} numbers; "
                "fetch the model again"
            )


def _is_finite(value: Any) -> bool:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and abs(value) <= LARGEST_NUMBER


@contextmanager
def config_errors(path: str) -> Iterator[None]:
    """Turns errors of a library that builds networks from a model's configs into a UserError."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        # TypeError, KeyError, AttributeError, its own ... for a value of another type
        raise UserError(
            f"the configs of {path} make up no model: {type(error).__name__}, {first_line(error)}; "
            "fetch it again"
        ) from error


def load_part(load: Callable[..., Any], path: str, subfolder: str, **settings: Any) -> Any:
    """One component of a model, loaded by its library's class.

    Where `subfolder` is empty `path` itself is the component. Python files of the model are never
    run, and transformers does not ask whether to. Raises UserError with the reason.
    """
    if subfolder and Path(path).is_dir() and not (Path(path) / subfolder).is_dir():
        raise UserError(
            f"the model folder {path} has no {subfolder}/; it must be in the diffusers layout"
        )
    place = {"subfolder": subfolder} if subfolder else {}
    try:
        return load(path, trust_remote_code=False, **place, **settings)
    except Exception as error:
        # OSError, SafetensorError, JSONDecodeError, EnvironmentError ... by library and version
        reason = first_line(error)
        shown = f"{subfolder}/ of {path}" if subfolder else path
        raise UserError(f"cannot load {shown}: {reason}") from None


def load_network(
    kind: Any, path: str, subfolder: str, dtype: torch.dtype, device: torch.device | str
) -> Any:
    """A network of diffusers or transformers with its weights, on `device`.

    `subfolder` as in `load_part`. diffusers' default way of loading needs accelerate, which is no
    dependency here, and warns twice without it. The other way leaves weights that the files lack
    uninitialized, and transformers initializes them at random: both are refused. Raises UserError.
    """
    table = read_json(path, f"{subfolder}/config.json".lstrip("/"))  # checked before anything
    if torch.device(device).type == "meta":
        return make_meta_network(kind, table, dtype, path)
    if kind.__module__.startswith("diffusers."):
        settings = {"torch_dtype": dtype, "low_cpu_mem_usage": False}
    else:
        settings = {"dtype": dtype}
    loaded, report = load_part(
        kind.from_pretrained, path, subfolder, output_loading_info=True, **settings
    )
    if missing := sorted(report["missing_keys"]):
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        place = f"{subfolder}/ of {path}" if subfolder else path
        raise UserError(
            f"cannot load {place}: its files lack {missing[0]}{more}; download them again"
        )
    if kind.__module__.startswith("diffusers."):
        # diffusers 0.42 keeps the files' dtype if the first tensor of a new network has it too,
        # such as the table of positions of Stable Diffusion 3. Its own `to` warns.
        nn.Module.to(loaded, dtype)
    return loaded.to(device)


def make_meta_network(kind: Any, table: Mapping[str, Any], dtype: torch.dtype, path: str) -> Any:
    """A network of diffusers or transformers on the meta device, from its config: no weight is
    read. Its dtypes are those of `load_network`: transformers keeps some layers of T5 in fp32 where
    the others are in fp16. Raises UserError, which names `path`.
    """
    with torch.device("meta"), config_errors(path):
        if kind.__module__.startswith("diffusers."):
            network = kind.from_config(dict(table))
        else:
            network = kind(kind.config_class(**table))
    nn.Module.to(network, dtype)  # diffusers' own `to` warns
    if dtype == torch.float16:
        wide = getattr(network, "_keep_in_fp32_modules", None) or ()
        for name, module in network.named_modules():
            if name.rpartition(".")[2] in wide:
                module.float()
    return network


def open_tokenizer(kind: Any, path: str, subfolder: str, device: torch.device | str) -> Any:
    """A tokenizer of transformers; for the meta device a PlannedTokenizer with the sizes of its
    text encoder, which needs no file. Raises UserError.
    """
    if torch.device(device).type != "meta":
        return load_part(kind.from_pretrained, path, subfolder)
    encoder = subfolder.replace("tokenizer", "text_encoder")
    table = read_json(path, f"{encoder}/config.json")
    table = table.get("text_config", table)
    with config_errors(path):
        return PlannedTokenizer(int(table["vocab_size"]), table.get("max_position_embeddings", 512))


def freeze_network(network: nn.Module) -> None:
    """Make a network's parameters constant and its own dropout inactive, also in training mode: in
    T5 it is 0.1, and a checkpointed layer would be recomputed with another mask.
    """
    network.requires_grad_(False).eval()
    for module in network.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        elif isinstance(vars(module).get("dropout"), float):
            module.dropout = 0.0  # type: ignore[assignment]


def read_encoder_config(path: str, component: str, config_class: Any) -> Any:
    """A text encoder's configuration object, read without its weights."""
    return config_class(**read_json(path, f"{component}/config.json"))


# ---------------------------------------------------------------- pixels, latents and tokens


def encode_pixels(vae: Any, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and std of the posterior of pixels [b, 3, h, w], in the denoiser's units.

    They are (z - mean) / std * scaling where the VAE's config has latents_mean and latents_std,
    else (z - shift) * scaling. fp32 or better.
    """
    posterior = vae.encode(pixels.to(vae.device, vae.dtype)).latent_dist
    shift, scale = _latent_units(vae, posterior.mean)
    exact = torch.promote_types(posterior.mean.dtype, torch.float32)
    return (posterior.mean.to(exact) - shift) * scale, posterior.std.to(exact) * scale


def decode_latents(vae: Any, latents: Tensor) -> Tensor:
    """Pixels [b, 3, h, w] in [-1, 1] of latents in the denoiser's units."""
    shift, scale = _latent_units(vae, latents)
    return vae.decode((latents / scale + shift).to(vae.dtype)).sample.clamp(-1, 1)


def _latent_units(vae: Any, like: Tensor) -> tuple[Tensor, Tensor]:
    """(shift, scale) of the denoiser's latents (z - shift) * scale, [1, c, 1, 1] or 0-dim."""
    config = vae.config
    exact = torch.promote_types(like.dtype, torch.float32)
    mean = getattr(config, "latents_mean", None)
    std = getattr(config, "latents_std", None)
    if mean is None or std is None:
        shift = getattr(config, "shift_factor", None) or 0.0
        scale = config.scaling_factor
        return (
            torch.tensor(shift, dtype=exact, device=like.device),
            torch.tensor(scale, dtype=exact, device=like.device),
        )
    shape = (1, -1, 1, 1)
    means = torch.tensor(mean, dtype=exact, device=like.device).view(shape)
    stds = torch.tensor(std, dtype=exact, device=like.device).view(shape)
    return means, config.scaling_factor / stds


def read_resolution(sample_size: Any, factor: int = 1) -> int:
    """The side in pixels of a model's own images: sample_size of a config.json, times `factor`.

    Raises UserError for something else than a size of images.
    """
    is_size = type(sample_size) is int and 1 <= sample_size * factor <= LARGEST_SIDE
    if not is_size:
        raise UserError(
            f"config.json has sample_size {shorten_value(sample_size)}, expected 1 to "
            f"{LARGEST_SIDE // factor}; fetch the model again"
        )
    return sample_size * factor


def check_tokenizers(tokenizers: Mapping[str, Any], networks: Mapping[str, Any]) -> None:
    """Raises UserError for a tokenizer of another vocabulary than that of its text encoder.

    The encoder may have more: T5's table has 28 rows without a token. Words that were added to the
    tokenizer alone do no harm before they are used.
    """
    for name, tokenizer in tokenizers.items():
        tokens, rows = tokenizer.get_vocab(), networks[name].get_input_embeddings().num_embeddings
        used = [tokens[word] for word in tokens.keys() - tokenizer.get_added_vocab().keys()]
        largest = max([*used, *tokenizer.all_special_ids], default=0)
        if largest >= rows or len(tokens) < rows // 2:
            raise UserError(
                f"the tokenizer of {name} has {len(tokens)} tokens up to number {largest}, and the "
                f"encoder's table {rows} rows; fetch both from one model"
            )


def tokenize_prompts(
    tokenizer: Any, prompts: Sequence[str], length: int, checked: set[str]
) -> Tensor:
    """Token ids [b, length] with the special tokens, padded as the tokenizer pads.

    Prints a warning with the words that do not fit, once per prompt; `checked` holds the prompts
    that were looked at. The texts of one prompt for several layers, which differ in their learned
    tokens alone, have one warning.
    """
    return tokenize_texts(tokenizer, prompts, length, checked).input_ids


def tokenize_texts(
    tokenizer: Any,
    texts: Sequence[str],
    length: int,
    checked: set[str],
    *,
    adds_special: bool = True,
) -> Any:
    """The tokenizer's output with input_ids and attention_mask [b, length], for prompts or for
    conversations with them; the rest is as in `tokenize_prompts`.

    `adds_special`: whether the tokenizer adds its special tokens.
    """
    for text in texts:
        if text not in checked:
            checked.add(text)
            check_prompt_length(text, "a prompt")
            _warn_of_truncation(tokenizer, text, length, checked, adds_special=adds_special)
    return tokenizer(
        list(texts),
        padding="max_length",
        max_length=length,
        truncation=True,
        return_tensors="pt",
        add_special_tokens=adds_special,
    )


def read_prompt_length(tokenizer: Any) -> int:
    """The tokens of a prompt that a CLIP text encoder reads, by its tokenizer_config.json: 77.

    Raises UserError for something else than a number of tokens.
    """
    length = tokenizer.model_max_length
    if type(length) is not int or not 1 <= length <= MOST_TOKENS:
        raise UserError(
            f"tokenizer_config.json has model_max_length {shorten_value(length)}, expected 77, or "
            f"another number of tokens up to {MOST_TOKENS:,}; fetch the model again"
        )
    return length


def _warn_of_truncation(
    tokenizer: Any, prompt: str, length: int, checked: set[str], *, adds_special: bool
) -> None:
    ids = tokenizer(prompt, add_special_tokens=adds_special, verbose=False).input_ids
    if len(ids) <= length:
        return
    added = set(tokenizer.get_added_vocab().values())
    alike = str(["added" if index in added else index for index in ids])
    if alike in checked:
        return
    checked.add(alike)
    words = tokenizer(prompt, add_special_tokens=False, verbose=False).input_ids
    kept = length - (len(ids) - len(words))
    lost = tokenizer.decode(words[kept:][:SHOWN_TOKENS], clean_up_tokenization_spaces=False).strip()
    more = " ..." if len(words) - kept > SHOWN_TOKENS else ""
    kind = type(tokenizer).__name__.removesuffix("Fast").removesuffix("Tokenizer")  # CLIP, T5
    reader = "the text encoder" if kind == "TokenizersBackend" else kind
    print(
        f"warning: the prompt is {len(ids)} tokens long and {reader} reads {length}; "
        f"cut off: {lost!r}{more}",
        file=sys.stderr,
    )
