"""A class from outside that breaks a law of adapters is refused before the run, with the law."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

import train
from lora_core.adapters import custom_files, injection, kind_laws
from lora_core.adapters.folded_weights import merged_state_dict
from lora_core.adapters.injection import AdapterSpec
from lora_core.config import Config
from lora_core.errors import UserError
from training import processes

FILE = '''
import torch
from torch import nn
from lora_core.adapters.adapter_module import Adapter
from lora_core.adapters.weight_updates import LowRank

class Scaled(Adapter):
    """y = (1 + s) (base(x)), on all outputs alike."""
    def __init__(self, base, layer):
        super().__init__()
        self.s = nn.Parameter(torch.zeros(()))
    def update(self, base, x, y0, strength):
        return strength * self.s * y0

class Started(Scaled):
    def __init__(self, base, layer):
        super().__init__(base, layer)
        self.s.data.fill_(0.5)

class Deaf(Scaled):
    def update(self, base, x, y0, strength):
        return self.s * y0

class Apart(Scaled):
    def forward(self, base, x, strength):
        return base(x) + 2 * self.update(base, x, base(x), strength)

class Squared(Scaled):
    def update(self, base, x, y0, strength):
        return strength * self.s * y0.square()

class Turned(Adapter):
    """W (I + u v^T): its factors are of the weight."""
    def __init__(self, base, layer):
        super().__init__()
        self.v = nn.Parameter(torch.linspace(-1, 1, base.in_features))
        self.u = nn.Parameter(torch.zeros(base.in_features))
    def update(self, base, x, y0, strength):
        return strength * (x @ self.v.to(x))[..., None] * (base.weight @ self.u.to(x))
    def low_rank(self, base):
        up = base.weight.float() @ self.u.detach()
        return LowRank(self.v.detach()[None].clone(), up[:, None].detach(), 1.0)

class Narrow(Scaled):
    def __init__(self, base, layer):
        super().__init__(base, layer)
        self.width = base.width

class Broken(Scaled):
    def update(self, base, x, y0, strength):
        return self.missing

class Bent(Adapter):
    """up tanh(down x): not linear in x."""
    is_linear = False
    def __init__(self, base, layer):
        super().__init__()
        self.down = nn.Parameter(torch.ones(layer.rank, base.in_features))
        self.up = nn.Parameter(torch.zeros(base.out_features, layer.rank))
    def update(self, base, x, y0, strength):
        return strength * torch.tanh(x @ self.down.T) @ self.up.T

class Undeclared(Bent):
    is_linear = True

class Divided(Turned):
    def low_rank(self, base):
        return super().low_rank(base)._replace(scale=0.5)
    def delta_weight(self, base):
        return Adapter.delta_weight(self, base)

class Shifted(Scaled):
    def update(self, base, x, y0, strength):
        return strength * self.s * torch.ones_like(y0)
'''


@pytest.fixture
def file(tmp_path: Path) -> str:
    (tmp_path / "laws.py").write_text(FILE)
    return str(tmp_path / "laws.py")


def injected(kind: str, *layers: nn.Module) -> nn.Module:
    model = nn.Sequential(*layers)
    injection.inject(model, AdapterSpec(("*",), kind=kind))
    return model


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("Started", "changes the layer before it is trained; begin with an update of zero"),
        ("Deaf", "update is not in proportion to the strength"),
        ("Apart", r"forward is not base\(x\) \+ update"),
        ("Squared", r"the layer with delta_weight \(and delta_bias\) in its weights gives another"),
        ("Broken", r"fails: AttributeError: 'Broken' object has no .* \(.*laws.py, line \d+\)"),
        ("Undeclared", r"another output than forward; .* write is_linear = False in the class"),
        ("Divided", "the factors, which LoRA files take, give another update than delta_weight"),
    ],
)
def test_the_law_that_is_broken_is_named(file: str, kind: str, said: str) -> None:
    model = injected(f"{file}:{kind}", nn.Linear(4, 5))
    with pytest.raises(UserError, match=rf"{kind} at unet.0.*{said}"):
        kind_laws.check_kind_laws({"unet": model}, f"{file}:{kind}")


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("kind", ["Scaled", "Shifted"])
def test_the_folded_weight_follows_from_the_update(
    file: str, kind: str, dtype: torch.dtype
) -> None:
    model = injected(f"{file}:{kind}", nn.Linear(1030, 5, dtype=dtype))
    kind_laws.check_kind_laws({"unet": model}, kind)
    (parameter,) = injection.adapter_parameters(model)
    with torch.no_grad():
        parameter.fill_(0.25)
    base, folded = model[0].base, merged_state_dict(model)
    if kind == "Scaled":
        assert torch.allclose(folded["0.weight"], 1.25 * base.weight)
        assert torch.allclose(folded["0.bias"], 1.25 * base.bias)
    else:
        assert torch.equal(folded["0.weight"], base.weight)
        assert torch.allclose(folded["0.bias"], base.bias + 0.25)


def test_a_class_that_is_not_linear_trains_and_no_weight_holds_it(
    file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    model, kind = injected(f"{file}:Bent", nn.Linear(4, 5)), f"{file}:Bent"
    kind_laws.check_kind_laws({"unet": model}, kind)
    assert not custom_files.has_factors(model) and not custom_files.is_foldable(model)
    custom_files.check_custom_kind({"unet": model}, kind, "run")
    said = "is not linear in its input, so that no weight holds it: the run writes run_adapter.saf"
    assert said in capsys.readouterr().out
    with pytest.raises(UserError, match="Bent is not linear in its input: no weight holds it"):
        merged_state_dict(model)


def test_factors_that_depend_on_the_weight(file: str) -> None:
    model = injected(f"{file}:Turned", nn.Linear(6, 5))
    kind_laws.check_kind_laws({"unet": model}, "Turned")
    with torch.no_grad():
        injection.adapter_parameters(model)[1].copy_(torch.arange(6))
    assert custom_files.has_factors(model)
    (lr,) = injection.adapter_factors(model).values()
    change = merged_state_dict(model)["0.weight"] - model[0].base.weight
    assert lr.rank == 1 and torch.allclose(lr.up @ lr.down, change, atol=1e-5)


def test_layers_that_the_update_alone_cannot_fold(file: str) -> None:
    model = injected(f"{file}:Scaled", nn.Conv2d(3, 4, 3))
    said = "Scaled has no delta_weight for a convolution; write it"
    with pytest.raises(UserError, match=said):
        merged_state_dict(model)
    with pytest.raises(UserError, match=f"unet.0 cannot be folded into the weight: {said}"):
        kind_laws.check_kind_laws({"unet": model}, "Scaled")
    model = injected(f"{file}:Shifted", nn.Linear(3, 4, bias=False))
    with torch.no_grad():
        injection.adapter_parameters(model)[0].fill_(1.0)
    with pytest.raises(UserError, match="adds a bias to a layer without one"):
        merged_state_dict(model)
    model = injected(f"{file}:Shifted", nn.Linear(3, 4), nn.Linear(4, 4, bias=False))
    with pytest.raises(UserError, match=r"unet\.1 .*adds a bias to a layer without one"):
        kind_laws.check_kind_laws({"unet": model}, "Shifted")


def test_a_class_that_cannot_be_made_for_a_layer(file: str) -> None:
    said = "Narrow cannot be made for {}: AttributeError: .*; {}"
    for layer, words in (
        (nn.Linear(3, 4), said.format("0, a Linear", "see lora_core")),
        (nn.Conv2d(3, 4, 1), said.format("0, a Conv2d", "if it is for linear layers alone, give")),
    ):
        with pytest.raises(UserError, match=words):
            injected(f"{file}:Narrow", layer)


def test_a_run_of_such_a_class_ends_before_its_folder_exists(
    config: Config, quick: None, file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "open_run", lambda *_: pytest.fail("the folder was opened"))
    with pytest.raises(UserError, match="before it is trained"):
        train.train(
            replace(config, adapter=replace(config.adapter, rank=16, kind=f"{file}:Started"))
        )
