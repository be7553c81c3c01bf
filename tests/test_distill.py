"""merge.py distill: the difference of two models, exact or the nearest of its rank."""

import pytest
import torch

from lora_core import formats
from tests.merge_commands import assert_equal, call, deltas, summed


@pytest.mark.parametrize("svd", ["exact", "randomized"])
def test_distill_is_exact_or_optimal(here, states, layout, svd, capsys):
    call("fold", "base", "a.safetensors + b.safetensors", "tuned")
    capsys.readouterr()
    exact = summed([(1, states["a"]), (1, states["b"])])
    call("distill", "base", "tuned", "full.safetensors", "--rank", "8", "--svd", svd)
    assert_equal(deltas(formats.load("full.safetensors", layout)), exact, 1e-5)
    assert any("time_emb_proj" in path for _, path in exact) and any(
        "conv" in path for _, path in exact
    )
    call("distill", "base", "tuned", "low.safetensors", "--rank", "2", "--svd", svd)
    low = deltas(formats.load("low.safetensors", layout))
    for key, value in exact.items():
        best = float(torch.linalg.svdvals(value.flatten(1))[2:].norm())
        assert float((low[key] - value).norm()) == pytest.approx(best, rel=1e-3, abs=1e-5)
    call(
        "distill",
        "base",
        "tuned",
        "attn.safetensors",
        "--max-error",
        "0.2",
        "--layers",
        "unet,~conv",
    )
    assert set(formats.load("attn.safetensors", layout).components) == {"unet"}
    assert "differ too: norms, biases" in capsys.readouterr().err
    call("distill", "base", "base", "x.safetensors", "--rank", "2", status=2)
    assert "nothing to distil" in capsys.readouterr().err
