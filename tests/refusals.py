"""What a refusal says."""

import pytest

from lora_core.errors import UserError


def sentence(function, *args, **settings):
    with pytest.raises(UserError) as info:
        function(*args, **settings)
    assert "\n" not in str(info.value)
    return str(info.value)
