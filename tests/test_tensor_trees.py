"""Tensors in nested containers."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lora_core.tensor_trees import map_tensors, tree_tensors


class Pair(NamedTuple):
    first: Tensor
    second: Any


@dataclass(frozen=True)
class Record:
    tensor: Tensor
    name: str


def test_tensors_are_found_in_order_and_the_tree_keeps_its_form() -> None:
    a, b, c, d = (torch.tensor(float(i)) for i in range(4))
    tree = {"x": [a, (b, None)], "y": Pair(c, "text"), "z": Record(d, "name")}
    assert all(x is y for x, y in zip(tree_tensors(tree), (a, b, c, d), strict=True))
    doubled = map_tensors(tree, lambda t: 2 * t)
    assert doubled == {
        "x": [2 * a, (2 * b, None)],
        "y": Pair(2 * c, "text"),
        "z": Record(2 * d, "name"),
    }
    assert isinstance(doubled["y"], Pair) and isinstance(doubled["z"], Record)
    assert tree_tensors("no tensor") == []
