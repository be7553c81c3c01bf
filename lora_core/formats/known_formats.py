"""The table of adapter file formats: the keys that identify each, its reader and its writer.

An entry names the module of its reader and writer, which is imported when one is first called.
Nothing here needs torch, so that a command line can list the formats.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from math import prod
from pathlib import Path
from typing import Any

NATIVE = "pytorch_lora_weights.safetensors"  # the name diffusers looks for in a folder
EMBEDDINGS = "_emb.safetensors"  # ending of a run's file of token rows
# Ending of a run's file of adapters of a kind that the user defined (adapters.custom_files).
CUSTOM = "_adapter.safetensors"
CUSTOM_KIND = "lora_core.adapter_kind"  # header entry of such a file: FILE.py:Class
CHECKPOINTS, STEP = "checkpoints", re.compile(r"\d+")  # RUN/checkpoints/300

# Header entry: peft's LoraConfig fields as JSON, "unet.r" and so on.
PEFT_HEADER = "lora_adapter_metadata"
PICKLED = (".ckpt", ".pt", ".bin", ".pth")  # endings of files of torch.save

# Role of a tensor in an adapted layer -> its spellings at the end of a key. Those that begin with
# "_" go with the names of old attention processors.
LEAVES: Mapping[str, tuple[str, ...]] = {
    "down": (
        ".lora_A.weight",
        ".lora_down.weight",
        ".lora.down.weight",
        ".lora_linear_layer.down.weight",
        "_lora.down.weight",
        ".lora_A",
    ),
    "up": (
        ".lora_B.weight",
        ".lora_up.weight",
        ".lora.up.weight",
        ".lora_linear_layer.up.weight",
        "_lora.up.weight",
        ".lora_B",
    ),
    "mid": (".lora_mid.weight",),
    "alpha": (".alpha", "_lora.alpha"),
    "magnitude": (".lora_magnitude_vector", ".lora_magnitude_vector.weight"),  # by rows
    "dora_scale": (".dora_scale",),  # by rows or columns
    "hada_w1_a": (".hada_w1_a",),  # from here on LyCORIS' (see lycoris.py)
    "hada_w1_b": (".hada_w1_b",),
    "hada_w2_a": (".hada_w2_a",),
    "hada_w2_b": (".hada_w2_b",),
    "hada_t1": (".hada_t1",),
    "hada_t2": (".hada_t2",),
    "lokr_w1": (".lokr_w1",),
    "lokr_w1_a": (".lokr_w1_a",),
    "lokr_w1_b": (".lokr_w1_b",),
    "lokr_w2": (".lokr_w2",),
    "lokr_w2_a": (".lokr_w2_a",),
    "lokr_w2_b": (".lokr_w2_b",),
    "lokr_t2": (".lokr_t2",),
    "diff": (".diff",),
    "scalar": (".scalar",),
    "w_norm": (".w_norm", ".scale.diff"),  # the second: the original code's name of the weight
    "b_norm": (".b_norm",),
    "diff_b": (".diff_b",),
}
# Role of a tensor that is added to a parameter without factors -> the parameter of the module.
# `diff` is one in norms only; in layers it is an update like the others.
PARAMETER_ROLES = {"w_norm": "weight", "b_norm": "bias", "diff": "weight", "diff_b": "bias"}
XLABS_LEAVES = {".down.weight": "down", ".up.weight": "up"}  # the only ones of XLabs' trainer
ROLE_OF_LEAF: dict[str, str] = {}
for _role, _leaves in LEAVES.items():
    ROLE_OF_LEAF |= dict.fromkeys(_leaves, _role)
FACTOR_LEAVES = tuple(leaf for leaf, role in ROLE_OF_LEAF.items() if role != "alpha")
# The name of an adapter, where peft left it in a key.
ADAPTER_NAME = re.compile(
    r"\.lora_(?:[AB]\.(?P<factor>[^.]+)\.weight"
    r"|magnitude_vector\.(?!weight$)(?P<vector>[^.]+)(?:\.weight)?)$"
)

# Encoder -> spellings of its token rows' key, all of them written; ComfyUI looks for t5xxl.
ENCODER_KEYS = {"clip_l": ("clip_l",), "clip_g": ("clip_g",), "t5": ("t5", "t5xxl")}
# Spelling -> encoder, with those of cog-sdxl, which are only read.
ENCODER_SPELLINGS = {"text_encoders_0": "clip_l", "text_encoders_1": "clip_g"}
for _encoder, _keys in ENCODER_KEYS.items():
    ENCODER_SPELLINGS |= dict.fromkeys(_keys, _encoder)
TOKEN_NAMES = "token_names"  # header entry: JSON list of the tokens in row order
SINGLE = "emb_params"  # a file's only tensor, for its only encoder
TOKEN = re.compile(r"<.+>|[^.:]+")  # a key that may be a token; keys of weights have dots
# In the names of weights, which a file's only key may have too.
WEIGHT = re.compile(
    r":|\.(weight|bias|scale|alpha|diff)$|(^|\.)(lora|lycoris|lllite|hada|lokr|oft|boft|vera)_"
    r"|^(unet|transformer|text_encoder\w*|model|\w+_model|vae|conditioner)\."
)

Shapes = Mapping[str, tuple[int, ...]]  # key -> shape


@dataclass(frozen=True)
class Format:
    """One format of adapter files.

    The reader has the signature read(tensors, header, layout, source, options) -> AdapterState,
    the writer write(state, layout, title) -> (tensors, header); those of a pickle read(content,
    layout, source) and write(state, path, layout). All raise UserError.
    """

    module: str  # in lora_core.formats
    reader: str  # names of functions in it
    writer: str = ""  # "": the format is only read
    # Function reading_names(layout) -> (grammar, layout as files store it) of layers with names;
    # "": layers have numbers, or there are none.
    names: str = ""
    starts: tuple[str, ...] = ()  # beginnings of keys that end like a tensor of an adapter
    pattern: str = ""  # or a pattern of whole keys
    is_pickle: bool = False  # a file of torch.save, found by pickled_adapters.py
    is_token_rows: bool = False  # rows of an embedding table, no factors
    holds_parameters: bool = False  # changes of norms and biases
    holds_lycoris: bool = False  # LoHa, LoKr and full updates
    stores_scales: bool = False  # alphas; else the scale is multiplied into the factors
    joins_layers: bool = False  # whether some layers are stored as one (joined_layers.py)
    endings: tuple[str, ...] = (".safetensors",)  # of the names of files that are written

    def detect(self, shapes: Shapes) -> bool:
        """Whether tensors are of the format. One matching key is enough: readers refuse others."""
        if self.is_pickle:
            return False
        if self.is_token_rows:
            return is_embedding(shapes)
        if self.pattern:
            return any(map(re.compile(self.pattern).fullmatch, shapes))
        return any(is_adapter_key(key) for key in shapes if key.startswith(self.starts))

    @property
    def read(self) -> Callable[..., Any]:
        return import_function(self.module, self.reader)

    @property
    def reading_names(self) -> Callable[..., Any] | None:
        return import_function(self.module, self.names) if self.names else None

    @property
    def write(self) -> Callable[..., Any] | None:
        return import_function(self.module, self.writer) if self.writer else None


# Names in pipelines of the networks that are adapted.
COMPONENTS = ("unet", "transformer", "text_encoder", "text_encoder_2", "text_encoder_3")
PEFT_MODULE = "base_model.model"  # peft's wrapper of a network, where it was left in keys
COMPONENT_HEADS = [f"{name}." for name in COMPONENTS]
COMPONENT_HEADS += [f"{PEFT_MODULE}.{name}." for name in COMPONENTS]
FORMATS = {  # in the order in which they are tried
    "diffusers": Format(
        "diffusers",
        "read_diffusers",
        "write_diffusers",
        names="diffusers_names",
        starts=tuple(COMPONENT_HEADS),
    ),
    "kohya": Format(
        "kohya",
        "read_kohya",
        "write_kohya",
        names="kohya_names",
        starts=("lora_", "lycoris_"),
        holds_parameters=True,
        holds_lycoris=True,
        stores_scales=True,
        joins_layers=True,
    ),
    "cloneofsimo": Format(
        "cloneofsimo",
        "read_cloneofsimo",
        "write_cloneofsimo",
        pattern=r"[^:]+:\d{1,9}:(up|down)",
        endings=(".safetensors", ".pt"),
    ),
    "mixofshow": Format(
        "mixofshow", "read_mixofshow", "write_mixofshow", is_pickle=True, endings=(".pth",)
    ),
    "xlabs": Format(
        "comfy",
        "read_xlabs",
        names="xlabs_names",
        pattern=r"(.+\.)?processor\.(qkv|proj)_lora[12]?\.(down|up)\.weight",
    ),
    "comfyui": Format(
        "comfy",
        "read_comfyui",
        names="comfyui_names",
        starts=("diffusion_model.", "model.diffusion_model.", "text_encoders."),
    ),
    "peft": Format("peft", "read_peft", names="peft_names", starts=("",)),
    "embeddings": Format("embeddings", "read_embeddings", "write_embeddings", is_token_rows=True),
    "a1111": Format(
        "embeddings",
        "read_embeddings",
        "write_a1111",
        is_token_rows=True,
        endings=(".safetensors", ".pt", ".bin"),
    ),
    "textual_inversion": Format(
        "embeddings",
        "read_embeddings",
        "write_textual_inversion",
        is_token_rows=True,
        endings=(".safetensors", ".pt", ".bin"),
    ),
}
READABLE = tuple(FORMATS)
WRITABLE = tuple(name for name, row in FORMATS.items() if row.writer)
TOKEN_FORMATS = tuple(name for name, row in FORMATS.items() if row.is_token_rows)
LORA_FORMATS = tuple(name for name in WRITABLE if name not in TOKEN_FORMATS)


def find_format(shapes: Shapes) -> str | None:
    """The name of the first format that a file's keys match; None when there is none."""
    return next((name for name, row in FORMATS.items() if row.detect(shapes)), None)


def is_adapter_key(key: str) -> bool:
    """Whether a key ends like a tensor of an adapter."""
    return key.endswith(FACTOR_LEAVES) or bool(ADAPTER_NAME.search(key))


def is_embedding(shapes: Shapes) -> bool:
    """Whether any key is an encoder's, or all may be tokens. Try the other formats first."""
    if SINGLE in shapes or not ENCODER_SPELLINGS.keys().isdisjoint(shapes):
        return True
    is_alone = len(shapes) == 1  # as learned_embeds are, whose word may have dots
    for key, shape in shapes.items():
        may_be_token = TOKEN.fullmatch(key) or (is_alone and not WEIGHT.search(key))
        if not may_be_token or len(shape) not in (1, 2) or prod(shape) <= 1:
            return False
    return True


def import_function(module: str, name: str) -> Callable[..., Any]:
    """A function of a module of this package, which is imported on the first call."""
    return getattr(import_module(f"lora_core.formats.{module}"), name)


# ---------------------------------------------------------------- names of a run's files


def run_file_names(name: str) -> tuple[str, str, str]:
    """The names of the files of a run called `name`: diffusers', kohya's, token rows."""
    return NATIVE, f"{name}.safetensors", f"{name}{EMBEDDINGS}"


def folder_file_stem(folder: Path) -> str:
    """What the files in a run's folder are called: as the folder is, in RUN/checkpoints/300
    RUN-000300.
    """
    if folder.parent.name == CHECKPOINTS and STEP.fullmatch(folder.name):
        return f"{folder.parent.parent.name}-{int(folder.name):06d}"
    return folder.name


def is_single_file(path: str) -> bool:
    """Whether the path of a model names a single file (which need not exist)."""
    return Path(path).is_file() or Path(path).suffix in (".safetensors", *PICKLED)
