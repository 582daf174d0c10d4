"""Redaction of secrets in values that are logged or stored."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

REDACTED = "<redacted>"
_SECRET_KEY = re.compile(
    r"(^|[_.\-])(token|secret|password|passwd|credentials?|api[_\-]?key|access[_\-]?key(_id)?|private[_\-]?key)s?$",
    re.IGNORECASE,
)
# A lookbehind must have a fixed width: "ttps" is the end of https.
_USERINFO = re.compile(
    r"(?P<scheme>[A-Za-z][A-Za-z0-9+.\-]*://)"
    r"(?!(?<=http://|ttps://)(\[[0-9A-Fa-f:.]+\]|[^/?#\s\"'@:\[\]]+)(:\d{0,5})?[/?#])"
    r"(?=[^/?#\s\"']*[:@])[^\s\"']*@",
    re.IGNORECASE,
)
"""User and password, up to the last @ of the address: an unencoded password may contain any of / ? # @.

An address has no user, and a later @ belongs to the path,

* if neither a colon nor an @ precedes the first slash: ``s3://bucket/data@v2``;
* in http and https, if only a host and the digits of a port precede it: ``http://h:5000/x@y``. HTTP clients end the
  host at the first slash. Database clients do not: in ``postgresql://u:12/ss@host`` the digits begin a password.
"""

_SIGNED_QUERY = re.compile(
    r"\?[^\s\"']*(x-amz-\w+|x-goog-\w+|\bsig|signature|token|secret|password|passwd|passphrase|credentials?"
    r"|(access|secret|api|private|account)[_\-]?key(_id)?)=[^\s\"']*",
    re.IGNORECASE,
)
"""The entire query of an address if a parameter's name ends like these (``sslpassword``)."""


def redact(value: Any, key: str = "") -> Any:
    """``value`` without secrets, at any depth.

    Replaced are: values of keys with a secret's name; in addresses, user and password before the last @ (see
    ``_USERINFO``) and a query that contains a signature or a secret.
    """
    if key and _SECRET_KEY.search(key) and isinstance(value, str) and value:
        return REDACTED
    if isinstance(value, Mapping):
        return {str(name): redact(item, str(name)) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [redact(item, key) for item in value]
    if isinstance(value, str):
        return _SIGNED_QUERY.sub(f"?{REDACTED}", _USERINFO.sub(rf"\g<scheme>{REDACTED}@", value))
    return value
