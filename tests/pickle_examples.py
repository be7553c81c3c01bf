"""Files of torch.save in three containers, their comparison and refusal, an object that is code."""

import pickle

import pytest
import torch

from lora_core.errors import UserError
from lora_core.formats.pickles import read_pickle


def save_pickled(path, value, container):
    if container == "plain":
        path.write_bytes(pickle.dumps(value))
    else:
        torch.save(value, path, _use_new_zipfile_serialization=container == "zip")
    return path


def refusal_of(path):
    with pytest.raises(UserError) as info:
        read_pickle(path)
    text = str(info.value)
    assert str(path) in text and "\n" not in text
    return text


def assert_same_values(ours, theirs):
    if isinstance(theirs, torch.Tensor):
        assert (
            ours.dtype == theirs.dtype
            and ours.shape == theirs.shape
            and ours.stride() == theirs.stride()
        )
        wide = torch.float32 if theirs.is_floating_point() else theirs.dtype
        assert torch.equal(ours.to(wide), theirs.to(wide))
    elif isinstance(theirs, dict):
        assert list(ours) == list(theirs)
        for key in theirs:
            assert_same_values(ours[key], theirs[key])
    elif isinstance(theirs, list | tuple):
        assert isinstance(ours, list) == isinstance(theirs, list) and len(ours) == len(theirs)
        for a, b in zip(ours, theirs):
            assert_same_values(a, b)
    else:
        assert ours == theirs


class Danger:
    def __reduce__(self):
        return (exec, ("raise SystemExit('executed')",))
