"""Which URLs are opened: places that store files, never a scheme that would run a shell."""

import re

SCHEMES = ("file", "memory", "s3", "gs", "az", "http", "https")
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.\-]*):")


def scheme_of(url: str) -> str:
    """The scheme of a URL, `file` for a path; ValueError if it is none of `SCHEMES`."""
    match = _SCHEME.match(url)
    scheme = match[1].lower() if match else "file"
    well_formed = match is None or url.startswith(f"{match[0]}//")
    if scheme not in SCHEMES or not well_formed or "::" in url:
        raise ValueError(
            f"{url!r} is not a place glipv2 reads or writes: use a path or one of "
            + ", ".join(f"{name}://" for name in SCHEMES)
        )
    return scheme
