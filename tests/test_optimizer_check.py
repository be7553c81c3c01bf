"""Optimizers and schedules of others: tried before any weight is read, logged, resumed."""

import inspect
from dataclasses import replace
from pathlib import Path
from typing import Any

import prodigyopt
import pytest
import torch
from torch import Tensor, nn

import train
from lora_core.config import Config, OptimizerConfig, Stage, ValidationConfig
from lora_core.errors import UserError
from lora_core.optim import building
from lora_core.prodigy import read_distance
from tests.conftest import final, learned, rows, same
from tests.opened_run import open_parts
from training import setup
from training.checks.optimizer_check import try_optimizer

SETTINGS = {"denoiser": {"name": "denoiser", "lr": 1e-2}, "tokens": {"name": "tokens", "lr": 1e-3}}
CPU = torch.device("cpu")
OWN = '''
import torch

class Plain(torch.optim.Optimizer):
    """Gradient descent."""
    def __init__(self, params, lr=1e-2, shrink=0.0):
        super().__init__(params, dict(lr=lr, shrink=shrink))
    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.mul_(1 - group["shrink"]).sub_(group["lr"] * p.grad)

class WithD(Plain):
    """Keeps a float d in its groups, as prodigyopt."""
    def __init__(self, params, lr=1.0, d0=1e-3):
        torch.optim.Optimizer.__init__(self, params, dict(lr=lr, d=d0, shrink=0.0))

class Averaging(Plain):
    """Schedule-free in small: trains at y, is evaluated at the mean x of all y."""
    def __init__(self, params, lr=1e-2):
        torch.optim.Optimizer.__init__(self, params, dict(lr=lr, shrink=0.0, train_mode=False, k=0))
    @torch.no_grad()
    def step(self, closure=None):
        assert all(group["train_mode"] for group in self.param_groups), "not in train mode"
        super().step()
        for group in self.param_groups:
            group["k"] += 1
            for p in group["params"]:
                state = self.state[p]
                state["x"] = state.get("x", torch.zeros_like(p)).lerp(p, 1 / group["k"])
    def _swap(self, mode):
        for group in self.param_groups:
            if group["train_mode"] != mode:
                group["train_mode"] = mode
                for p in group["params"]:
                    if "x" in self.state[p]:
                        p.data.add_(self.state[p]["y" if mode else "x"] - p.data)
    def eval(self):
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["y"] = p.detach().clone()
        self._swap(False)
    def train(self):
        self._swap(True)

class NeedsClosure(Plain):
    def step(self, closure):
        closure()

class AsksForClosure(Plain):
    def step(self, closure=None):
        assert closure is not None, "Sharpness Aware Minimization requires closure"

class WithoutLr(torch.optim.Optimizer):
    def __init__(self, params, speed=1.0):
        super().__init__(params, dict(speed=speed))
    def step(self, closure=None): ...

class OddState(Plain):
    def step(self, closure=None):
        for group in self.param_groups:
            self.state[group["params"][0]]["seen"] = {1, 2}

class Regroups(Plain):
    def __init__(self, params, lr=1e-2):
        super().__init__([p for group in params for p in group["params"]], lr)

class Forgets(Plain):
    """Resumes with other bits."""
    def step(self, closure=None):
        super().step()
        self.count = getattr(self, "count", 0) + 1
        for group in self.param_groups:
            for p in group["params"]:
                p.data.add_(0.1 * self.count)

class KeepsHalf(Plain):
    """A state that torch's load_state_dict gives another dtype.

    Nothing shows it in the parameters for a while.
    """
    def step(self, closure=None):
        super().step()
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                zeros = torch.zeros_like(p, dtype=torch.bfloat16)
                state["s"] = state.get("s", zeros) + p.grad.bfloat16()

class NoDefault(Plain):
    """As bitsandbytes' SGD and LARS: asks for a learning rate."""
    def __init__(self, params, lr):
        super().__init__(params, lr)

class ChecksNone(Plain):
    """As came_pytorch.CAME."""
    def __init__(self, params, lr=None):
        if not lr > 0.0:
            raise ValueError(f"Invalid learning rate: {lr}")
        super().__init__(params, lr)

class AverageFirst(Averaging):
    """As pytorch_optimizer's SPlus: its eval() needs what the first step makes."""
    def eval(self):
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["x"]

class CannotLoad(Plain):
    def load_state_dict(self, state):
        raise KeyError("precision")

def hold(step, total, warmup, low=0.25):
    return 1.0 if step < total // 2 else low

def broken(step, total, warmup):
    return float("nan") if step else 1.0

def one(step):
    return 1.0

number = 3
'''


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> str:
    file = tmp_path_factory.mktemp("own") / "mine.py"
    file.write_text(OWN)
    return str(file)


@pytest.mark.parametrize(
    ("name", "args", "said"),
    [
        ("NeedsClosure", {}, "wants to compute the loss itself"),
        ("AsksForClosure", {}, "requires closure"),
        ("WithoutLr", {}, "takes no lr"),
        ("OddState", {}, r"a state that no checkpoint holds: state/0/seen is a set"),
        ("Regroups", {}, "arranges its groups anew"),
        ("Plain", {"shrik": 1.0}, "no argument 'shrik'.*nearest: shrink"),
        ("Plain", {"lr": 1.0}, "no argument 'lr' to set here"),
        ("Plane", {}, "has no class 'Plane'"),
        ("AverageFirst", {}, "fails in its first steps: KeyError: 'x'"),
        ("hold", {}, "not a torch.optim.Optimizer class"),
    ],
)
def test_an_optimizer_that_the_loop_cannot_use_is_refused(
    own: str, name: str, args: dict[str, Any], said: str
) -> None:
    with pytest.raises(UserError, match=said):
        try_optimizer(f"{own}:{name}", SETTINGS, args, CPU)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("torch.optim.LBFGS", "LBFGS"),
        ("torch.optim.SparseAdam", "does not support dense gradients"),
        ("no_such_package.Adam", "cannot be imported"),
        ("prodigyopt.Prodigy", "different lr values"),  # its own rule
        ("torch.optim.SDG", "nearest: SGD"),
        ("nothing.py:Adam", "names no Python file"),
    ],
)
def test_installed_classes_are_tried_too(name: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        try_optimizer(name, SETTINGS, {}, CPU)


@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("adamw", {}),
        ("prodigy", {}),
        ("prodigyopt.Prodigy", {}),
        ("torch.optim.Adam", {"fused": True}),
        ("torch.optim.Adam", {"foreach": True}),
        ("torch.optim.SGD", {"momentum": 0.9}),
        ("torch.optim.Adafactor", {}),
        ("torch.optim.Muon", {}),
        ("torch.optim.Rprop", {}),
        ("torch.optim.NAdam", {}),
        ("torch.optim.ASGD", {}),
    ],
)
def test_others_pass_and_leave_the_generators_alone(name: str, args: dict[str, Any]) -> None:
    before = torch.get_rng_state()
    settings = {group: {**s, "lr": 1e-2} for group, s in SETTINGS.items()}
    assert try_optimizer(name, settings, args, CPU) == []
    assert torch.equal(torch.get_rng_state(), before)


def test_one_that_cannot_go_on_from_a_checkpoint_is_a_warning(own: str) -> None:
    assert "the same bits" in try_optimizer(f"{own}:Forgets", SETTINGS, {}, CPU)[0]
    assert "the same bits" in try_optimizer(f"{own}:KeepsHalf", SETTINGS, {}, CPU)[0]
    assert "cannot be resumed" in try_optimizer(f"{own}:CannotLoad", SETTINGS, {}, CPU)[0]
    assert try_optimizer(f"{own}:Averaging", SETTINGS, {}, CPU) == []


def test_no_weight_is_read_before(
    config: Config, own: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(setup, "load_family", lambda *_: pytest.fail("weights were read"))
    for name, said in (
        (f"{own}:AsksForClosure", "closure"),
        ("no_such_package.Adam", "imported"),
        ("torch.optim.SGD", "no argument 'nesterof'"),
    ):
        args = {"nesterof": True} if name.endswith("SGD") else {}
        with pytest.raises(UserError, match=said):
            train.train(replace(config, optimizer=OptimizerConfig(name, args=args)))
    with pytest.raises(UserError, match="averages itself"):
        train.train(replace(config, ema=0.5, optimizer=OptimizerConfig(f"{own}:Averaging")))
    with pytest.raises(UserError, match="takes no weight_decay"):
        train.train(
            replace(
                config,
                optimizer=OptimizerConfig("torch.optim.Rprop"),
                stages=(Stage(2, weight_decay={"denoiser": 0.1}),),
            )
        )


# ---------------------------------------------------------------- distances


def test_d_is_logged_whatever_holds_it_and_a_setting_of_that_name_is_none(own: str) -> None:
    p = nn.Parameter(torch.ones(2, 2))
    ours = building.build_optimizer("prodigy", [{"params": [p], "lr": 1.0}], {"d0": 1e-4})
    assert isinstance(read_distance(ours, ours.param_groups[0]), Tensor)
    theirs = prodigyopt.Prodigy([p], d0=1e-4)
    assert read_distance(theirs, theirs.param_groups[0]) == 1e-4
    clipping = torch.optim.Adafactor([p], d=2.0)  # torch: the threshold of its clipping
    assert (
        clipping.param_groups[0]["d"] == 2.0
        and read_distance(clipping, clipping.param_groups[0]) is None
    )
    assert (
        read_distance(theirs, {"d": None}) is None
        and read_distance(theirs, {}) is None
        and read_distance(theirs, {"d": "d"}) is None
    )


@pytest.mark.parametrize("name", ["prodigyopt.Prodigy", "WithD"])
def test_a_float_d_is_in_the_log_and_the_run_goes_on(
    config: Config, quick: None, own: str, name: str
) -> None:
    name = name if "." in name else f"{own}:{name}"
    stages = (Stage(3, ("denoiser", "tokens")),)
    run = train.train(replace(config, optimizer=OptimizerConfig(name), stages=stages))
    logged = [row["d_tokens"] for row in rows(run) if "d_tokens" in row]
    assert len(logged) == 3 and all(d > 0 for d in logged)


# ---------------------------------------------------------------- schedule-free


def run_steps(config: Config) -> dict[str, Tensor]:
    return learned(train.train(config))


def schedule_free(own: str) -> list[str]:
    return [f"{own}:Averaging"]


def test_looking_at_a_schedule_free_run_does_not_change_it(
    config: Config, quick: None, own: str
) -> None:
    name = schedule_free(own)[0]
    base = replace(
        config, optimizer=OptimizerConfig(name, lr={"denoiser": 1e-1}), stages=(Stage(4),)
    )
    seen = replace(
        base, out=config.out + "seen", validation=ValidationConfig(bins=1, every=1), save_every=1
    )
    whole, looked = train.train(base), train.train(seen)
    assert same(learned(whole), learned(looked))
    train.train(replace(base, out=config.out + "part", stages=(Stage(2),)))
    part = train.train(replace(base, out=config.out + "part", resume=True))
    assert same(final(part), final(whole))


def test_validation_and_files_have_the_averaged_weights_and_checkpoints_the_trained(
    config: Config, quick: None, own: str
) -> None:
    s = open_parts(
        replace(config, optimizer=OptimizerConfig(schedule_free(own)[0], lr={"denoiser": 1e-1}))
    )
    s.take_steps(2)
    params, optimizer = s.model.groups["denoiser"], s.optimization.optimizer
    y, x = [p.detach().clone() for p in params], [optimizer.state[p]["x"] for p in params]
    assert any(not torch.equal(a, b) for a, b in zip(x, y))
    inside: list[bool] = []
    denoise = s.model.family.denoise

    def look(*a: Any) -> Tensor:
        inside.append(all(torch.allclose(p, mean) for p, mean in zip(params, x)))
        return denoise(*a)

    s.model.family.denoise = look  # type: ignore[method-assign]
    s.log.validate(2, s.scorer)
    s.checkpoints.write(2, s.log)
    assert inside and all(inside) and all(torch.equal(p, before) for p, before in zip(params, y))
    assert all(group["train_mode"] for group in optimizer.param_groups)
    kept = learned(Path(config.out))
    assert all(torch.equal(kept[f"groups/denoiser/{i}"], before) for i, before in enumerate(y))


@pytest.mark.parametrize("name", ["AdamWScheduleFree", "SGDScheduleFree", "RAdamScheduleFree"])
def test_the_public_schedule_free_optimizers_train_and_resume(
    config: Config, quick: None, name: str
) -> None:
    pytest.importorskip("schedulefree", reason="pip install schedulefree")
    base = replace(
        config,
        optimizer=OptimizerConfig(f"schedulefree.{name}"),
        stages=(Stage(4),),
        validation=ValidationConfig(bins=1, every=2),
    )
    whole = train.train(base)
    train.train(replace(base, out=config.out + "part", stages=(Stage(2),)))
    assert same(
        final(train.train(replace(base, out=config.out + "part", resume=True))), final(whole)
    )


# ---------------------------------------------------------------- schedules


def test_a_schedule_of_a_file_is_used_and_kept(config: Config, quick: None, own: str) -> None:
    stages = (Stage(4), Stage(2, schedule=optim_name(own, "hold")))
    run = train.train(
        replace(
            config,
            stages=stages,
            optimizer=OptimizerConfig(
                lr={"denoiser": 1e-2}, schedule=optim_name(own, "hold"), schedule_args={"low": 0.5}
            ),
        )
    )
    assert [row["lr_denoiser"] for row in rows(run) if "lr_denoiser" in row] == pytest.approx(
        [1e-2, 1e-2, 5e-3, 5e-3, 1e-2, 5e-3]
    )
    assert "mine.py:hold" in (run / "config.toml").read_text()


def optim_name(own: str, function: str) -> Any:
    return f"{own}:{function}"


@pytest.mark.parametrize(
    ("name", "args", "said"),
    [
        ("broken", {}, "is nan at step 1 of 2; expected a finite number"),
        ("one", {}, r"called as fn\(step, steps\)"),
        ("hold", {"hight": 1}, "no argument 'hight'"),
        ("hold", {"low": -1.0}, "is -1 at step 1 of 2"),
        ("number", {}, "has no function 'number'"),
    ],
)
def test_schedules_are_called_before_any_work(
    config: Config, own: str, monkeypatch: pytest.MonkeyPatch, name: str, args: Any, said: str
) -> None:
    monkeypatch.setattr(
        setup.dataset, "scan_folder", lambda *_, **__: pytest.fail("images were read")
    )
    for c in (
        replace(
            config, optimizer=OptimizerConfig(schedule=optim_name(own, name), schedule_args=args)
        ),
        replace(config, stages=(Stage(2, schedule=optim_name(own, name)),)) if not args else None,
    ):
        if c is not None:
            with pytest.raises(UserError, match=said):
                train.train(c)


def test_a_file_is_run_once(own: str) -> None:
    assert building.resolve_optimizer(f"{own}:Plain") is building.resolve_optimizer(f"{own}:Plain")
    assert "shrink" in inspect.signature(building.resolve_optimizer(f"{own}:Plain")).parameters


@pytest.mark.parametrize("name", ["NoDefault", "ChecksNone"])
def test_a_class_without_a_learning_rate_of_its_own_is_given_one_or_none(
    own: str, name: str
) -> None:
    for groups in (["denoiser"], ["denoiser", "tokens"]):
        with pytest.raises(
            UserError,
            match=r"has no learning rate of its own; give --optimizer.lr, such as denoiser=1e-4",
        ):
            building.group_settings(f"{own}:{name}", groups, lr={}, decay={}, betas={})
    settings = building.group_settings(
        f"{own}:{name}",
        ["denoiser", "tokens"],
        lr={"denoiser": 1e-2, "tokens": 2e-2},
        decay={},
        betas={},
    )
    assert try_optimizer(f"{own}:{name}", settings, {}, CPU) == []
    built = building.build_optimizer(
        f"{own}:{name}",
        [{"params": [nn.Parameter(torch.ones(1))], **group} for group in settings.values()],
        {},
    )
    assert [group["lr"] for group in built.param_groups] == [1e-2, 2e-2]
    with pytest.raises(UserError, match=r"own; give --optimizer.lr, such as tokens=1e-4"):
        building.group_settings(
            f"{own}:{name}", ["denoiser", "tokens"], lr={"denoiser": 1e-2}, decay={}, betas={}
        )


def test_settings_that_a_class_refuses_are_named() -> None:
    with pytest.raises(
        UserError, match=r"adamw refuses its settings: .*--optimizer.args are eps=-1.0"
    ):
        try_optimizer("adamw", SETTINGS, {"eps": -1.0}, CPU)
    with pytest.raises(UserError, match="argument eps of optimizer adamw is 'abc', expected a num"):
        try_optimizer("adamw", SETTINGS, {"eps": "abc"}, CPU)


def test_a_state_that_cannot_be_taken_up_is_a_sentence(
    config: Config, quick: None, own: str
) -> None:
    """As adv_optm's Lion and Muon."""
    lion = replace(config, optimizer=OptimizerConfig(f"{own}:CannotLoad"))
    train.train(lion)
    said = r"cannot take up the state it saved .KeyError: 'precision'.*begin anew in another --out"
    with pytest.raises(UserError, match=said):
        train.train(replace(lion, resume=True))
