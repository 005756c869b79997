"""An authority for tests, and certificates from it, as the files that daemons are told to read."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path

import trustme


class Authority:
    """Signs certificates; its own is the file ``ca_file``."""

    def __init__(self, folder: Path, name: str = "authority") -> None:
        self._folder = folder
        self._name = name
        self._authority = trustme.CA(organization_name=name)
        self.ca_file = folder / f"{name}.pem"
        self._authority.cert_pem.write_to_path(str(self.ca_file))

    def certify(
        self, host: str = "127.0.0.1", name: str = "node", expires: datetime | None = None
    ) -> tuple[Path, Path]:
        """Return the files of a certificate for *host*, valid now, and of its private key."""
        issued = self._authority.issue_cert(host, not_after=expires)
        certificate, key = self._folder / f"{name}.crt", self._folder / f"{name}.key"
        key.touch(mode=0o600)
        issued.private_key_pem.write_to_path(str(key))
        certificate.write_bytes(b"".join(pem.bytes() for pem in issued.cert_chain_pems))
        return certificate, key
