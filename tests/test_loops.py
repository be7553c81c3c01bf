"""The compiled loops: compiled once, kept in the cache, and what runs without a compiler."""

from pathlib import Path

import pytest

from lora_core import kernels
from lora_core.optim.adamw import AdamW
from tests.adamw_runs import error, parameters, train


def test_without_a_compiler_one_sentence_says_so_and_with_one_nothing_is_printed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """And torch's fused kernel takes over, for fp64 to the same 1e-12."""
    found = []
    for compiler in ("", "/no/such/compiler"):
        kernels.loops.load_library.cache_clear()
        monkeypatch.setenv("CC", compiler)
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / (compiler.replace("/", "_") or "cc")))
        params = parameters()
        found.append(train(AdamW(params), params, range(4), skip=1))
        said = capsys.readouterr().err
        assert said.count("\n") == bool(compiler)
        assert ("no compiled loops (" in said) == bool(compiler)
    kernels.loops.load_library.cache_clear()
    assert error(*found) < 1e-12


def test_the_loops_are_compiled_once_and_kept_in_the_cache(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Found there without a compiler, and compiled again where the file is damaged."""
    load_library = kernels.loops.load_library

    def load_in(folder: Path, compiler: str) -> bool:
        monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
        monkeypatch.setenv("CC", compiler)
        load_library.cache_clear()
        return load_library() is not None

    assert load_in(tmp_path / "first", "")
    (library,) = (tmp_path / "first" / "lora_core").iterdir()
    for case, content, compiler, loaded in (
        ("moved", library.read_bytes(), "/no/such/compiler", True),
        ("damaged", b"damaged", "", True),
        ("damaged, no compiler", b"damaged", "/no/such/compiler", False),
    ):
        kept = tmp_path / case / "lora_core" / library.name
        kept.parent.mkdir(parents=True)
        kept.write_bytes(content)
        assert load_in(tmp_path / case, compiler) == loaded
        assert [path.name for path in kept.parent.iterdir()] == [library.name]
        assert (kept.read_bytes() == b"damaged") != loaded
    load_library.cache_clear()
    assert capsys.readouterr().err.count("\n") == 1
