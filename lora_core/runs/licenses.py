"""Licenses in the metadata of a model card."""

from __future__ import annotations

import re

# Ids of licenses that the hub knows (huggingface.co/docs/hub/repositories-licenses).
_IDS = """
afl-3.0 agpl-3.0 apache-2.0 artistic-2.0 bigscience-openrail-m bsd bsd-2-clause bsd-3-clause
bsd-3-clause-clear bsl-1.0 c-uda cc cc-by-2.0 cc-by-2.5 cc-by-3.0 cc-by-4.0 cc-by-nc-2.0
cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0
cc-by-nc-sa-4.0 cc-by-nd-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc0-1.0 cdla-permissive-1.0
cdla-permissive-2.0 cdla-sharing-1.0 creativeml-openrail-m ecl-2.0 epl-1.0 epl-2.0 etalab-2.0
eupl-1.1 eupl-1.2 gfdl gpl gpl-2.0 gpl-3.0 isc lgpl lgpl-2.1 lgpl-3.0 lppl-1.3c mit mpl-2.0
ms-pl ncsa odbl odc-by ofl-1.1 openrail openrail++ osl-3.0 other pddl postgresql unknown
unlicense wtfpl zlib
"""
HUB_LICENSES = frozenset(_IDS.split())
LINKS = ("https://", "http://")


def license_fields(text: str) -> dict[str, str]:
    """The fields of a card's metadata for a license; none for "".

    The hub knows some by an id; another is `other`, with a name and, where it has one, an address.
    """
    known = text.strip().lower().replace(" ", "-")
    if not known:
        return {}
    if known in HUB_LICENSES:
        return {"license": known}
    if known.startswith(LINKS):
        return {"license": "other", "license_name": "see-link", "license_link": text.strip()}
    return {"license": "other", "license_name": re.sub(r"[^\w.+-]+", "-", known).strip("-")}
