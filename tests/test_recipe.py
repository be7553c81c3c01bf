"""The recipe of a merge: read back from a header and from a folder, with digests of its inputs."""

import hashlib

import pytest
import torch
from safetensors.torch import save_file

from merging.commands import Resize
from merging.recipe import (
    describe_recipe,
    make_recipe,
    parse_recipe,
    read_merge_recipe,
    recipe_header,
    sha256_digest,
    write_sidecar,
)
from tests.refusals import sentence


def test_a_recipe_is_read_as_it_was_written(tmp_path):
    source = tmp_path / "a b.safetensors"
    save_file({"x": torch.ones(1)}, source)
    recipe = make_recipe("resize", Resize(file=str(source), out="left out"), [str(source)])
    digest = hashlib.sha256(source.read_bytes()).hexdigest()
    assert recipe["options"] == {"file": str(source)} and recipe["inputs"] == {str(source): digest}
    save_file({"x": torch.ones(1)}, tmp_path / "r.safetensors", recipe_header(recipe))
    write_sidecar(recipe, tmp_path)
    assert read_merge_recipe(str(tmp_path / "r.safetensors")) == recipe
    assert read_merge_recipe(str(tmp_path)) == recipe
    assert describe_recipe(recipe).startswith(f"made by: merge.py resize '{source}'")
    assert "has no recipe" in sentence(read_merge_recipe, str(source))
    torch.save({}, source.with_suffix(".pth"))
    assert "only .safetensors files" in sentence(read_merge_recipe, str(source.with_suffix(".pth")))


def test_the_digest_of_a_folder_leaves_hidden_files_out(tmp_path):
    (tmp_path / "a").write_bytes(b"1")
    before = sha256_digest(str(tmp_path))
    (tmp_path / ".hidden").write_bytes(b"2")
    assert sha256_digest(str(tmp_path)) == before
    (tmp_path / "b").write_bytes(b"2")
    assert sha256_digest(str(tmp_path)) != before


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"command": "mix"}', "[" * 100_000])
def test_a_broken_recipe_is_refused(text):
    assert "the recipe of x is broken" in sentence(parse_recipe, text, "x")
