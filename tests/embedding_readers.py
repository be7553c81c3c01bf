"""How other programs read a file of token rows, written anew from their rules."""

from pathlib import Path

import torch
from safetensors.torch import load_file


def read_as_a1111(path):
    """{encoder or "": rows} by the rules of A1111 1.10 (textual_inversion.py).

    One term of string_to_param; else the pair of SDXL; else a file's only tensor. Pickles go
    through torch's own check, which is as strict as A1111's. Raises AssertionError for other files.
    """
    ending = Path(path).suffix
    assert ending in (".safetensors", ".pt", ".bin")
    if ending == ".safetensors":
        data = load_file(path)
    else:
        data = torch.load(path, weights_only=True)
    if "string_to_param" in data:
        terms = data["string_to_param"]
        assert len(terms) == 1, "embedding file has multiple terms in it"
        return {"": next(iter(terms.values()))}
    if "clip_g" in data and "clip_l" in data:
        assert all(isinstance(rows, torch.Tensor) for rows in data.values())
        return data
    assert len(data) == 1, "embedding file has multiple terms in it"
    rows = next(iter(data.values()))
    assert isinstance(rows, torch.Tensor)
    return {"": rows.reshape(-1, rows.shape[-1])}
