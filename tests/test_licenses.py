"""Licenses in a card's metadata: ids of the hub, other names, addresses."""

import pytest
from huggingface_hub import ModelCard, ModelCardData

from lora_core.runs.licenses import license_fields


@pytest.mark.parametrize(
    "text, expected",
    [
        ("", {}),
        ("mit", {"license": "mit"}),
        ("CC-BY-4.0", {"license": "cc-by-4.0"}),
        ("CreativeML OpenRAIL-M", {"license": "creativeml-openrail-m"}),
        ("My own terms!", {"license": "other", "license_name": "my-own-terms"}),
        (
            "https://a.b/License.md",
            {
                "license": "other",
                "license_name": "see-link",
                "license_link": "https://a.b/License.md",
            },
        ),
    ],
)
def test_a_license_is_an_id_of_the_hub_or_another_with_its_name(
    text: str, expected: dict[str, str]
) -> None:
    found = license_fields(text)
    assert found == expected
    data = ModelCardData(**found)
    card = ModelCard(f"---\n{data.to_yaml()}\n---\ntext")  # the hub's own parser
    assert {key: card.data.to_dict()[key] for key in expected} == expected
