"""The node's certificate: TLS 1.2 and later, read at the start, read again at SIGHUP.

A renewal is read into a context of its own first, and only if that works into the one that
connections are made with: a certificate without its key, half a renewal, must not end the service.
Connections that are open keep the certificate they began with.
"""

from __future__ import annotations

import ssl
from pathlib import Path

from cortex.ipc.keys import read_secret
from cortex.ipc.settings import ConfigError


class Certificate:
    """A certificate chain and its private key, as PEM files; ``context`` is a server's."""

    def __init__(self, certificate_file: Path, key_file: Path) -> None:
        """Read them; raise ConfigError."""
        self._certificate_file = certificate_file
        self._key_file = key_file
        self.context = self._read()

    def reload(self) -> None:
        """Read them again for connections to come; raise ConfigError and keep the old ones."""
        self._read()
        self._load_into(self.context)

    def _read(self) -> ssl.SSLContext:
        """Return a context with what the files hold now; raise ConfigError."""
        read_secret(self._key_file)
        self._refuse_no_certificate()
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        self._load_into(context)
        return context

    def _refuse_no_certificate(self) -> None:
        """Raise ConfigError for a wrong certificate; OpenSSL does not tell it from a wrong key."""
        try:
            ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(self._certificate_file)
        except ssl.SSLError as exc:
            raise ConfigError(f"{self._certificate_file} holds no certificate in PEM form") from exc
        except OSError as exc:
            raise ConfigError(f"cannot read {self._certificate_file}: {exc.strerror}") from exc

    def _load_into(self, context: ssl.SSLContext) -> None:
        try:
            context.load_cert_chain(self._certificate_file, self._key_file, self._no_password)
        except ssl.SSLError as exc:
            raise ConfigError(
                f"{self._key_file} is not the key of the certificate in {self._certificate_file}"
                if exc.reason == "KEY_VALUES_MISMATCH"
                else f"{self._key_file} holds no private key in PEM form"
            ) from exc

    def _no_password(self) -> str:
        raise ConfigError(f"{self._key_file} is encrypted, and a daemon knows no password")
