"""Licences of images and weights by their SPDX identifiers, for formats that want one instead of a sentence."""

_SPDX = {  # lower case -> identifier
    identifier.lower(): identifier
    for identifier in (
        *("MIT", "Apache-2.0", "BSD-2-Clause", "BSD-3-Clause", "CC0-1.0", "ODbL-1.0", "PDDL-1.0"),
        *(
            f"CC-BY{terms}-{version}"
            for terms in ("", "-SA", "-NC", "-ND", "-NC-SA", "-NC-ND")
            for version in ("3.0", "4.0")
        ),
    )
}


def spdx(licence: str) -> str | None:
    """The SPDX identifier of a licence, such as CC-BY-4.0 of "CC BY 4.0"; None if it is not a common one."""
    return _SPDX.get("-".join(licence.lower().split()))


def spdx_url(licence: str) -> str | None:
    """The address of the text of a licence; None if it is not a common one."""
    identifier = spdx(licence)
    return f"https://spdx.org/licenses/{identifier}.html" if identifier else None
