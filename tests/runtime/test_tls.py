"""The node's certificate: what is refused at the start, what a renewal does."""

import contextlib
import ssl
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    PrivateFormat,
    load_pem_private_key,
)

from certificates import Authority
from cortex.ipc.settings import ConfigError
from cortex.runtime.tls import Certificate


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    """An authority whose files lie in ``tmp_path``."""
    return Authority(tmp_path)


def refusal(certificate: Path, key: Path) -> str:
    """Return in which words the files are refused, without their folder."""
    with pytest.raises(ConfigError) as caught:
        Certificate(certificate, key)
    return str(caught.value).replace(f"{key.parent}/", "")


def shown(context: ssl.SSLContext, ca_file: Path, host: str) -> str:
    """Return whose certificate a server with *context* shows to a client that asks for *host*."""
    client_in, client_out, server_in, server_out = (ssl.MemoryBIO() for _ in range(4))
    client = ssl.create_default_context(cafile=ca_file).wrap_bio(
        client_in, client_out, server_hostname=host
    )
    server = context.wrap_bio(server_in, server_out, server_side=True)
    for _ in range(4):
        for side in (client, server):
            with contextlib.suppress(ssl.SSLWantReadError):
                side.do_handshake()
        server_in.write(client_out.read())
        client_in.write(server_out.read())
    certificate = client.getpeercert()
    assert certificate is not None
    return str(certificate["subjectAltName"])


def test_a_certificate_is_shown_and_trusted(authority: Authority) -> None:
    certificate = Certificate(*authority.certify("node.lan"))

    assert "node.lan" in shown(certificate.context, authority.ca_file, "node.lan")


def test_nothing_older_than_tls_1_2_is_spoken(authority: Authority) -> None:
    assert Certificate(*authority.certify()).context.minimum_version is ssl.TLSVersion.TLSv1_2


def test_a_file_that_is_not_there_is_refused(authority: Authority, tmp_path: Path) -> None:
    certificate, key = authority.certify()

    assert refusal(certificate, tmp_path / "none") == "cannot read none: No such file or directory"
    assert refusal(tmp_path / "none", key) == "cannot read none: No such file or directory"


def test_a_private_key_that_everybody_may_read_is_refused(authority: Authority) -> None:
    certificate, key = authority.certify()
    key.chmod(0o644)

    assert refusal(certificate, key).startswith("node.key holds a secret and has the mode rw-r--r-")


def test_a_key_of_another_certificate_is_refused(authority: Authority) -> None:
    certificate, _ = authority.certify()
    _, key = authority.certify(name="other")

    assert refusal(certificate, key) == "other.key is not the key of the certificate in node.crt"


@pytest.mark.parametrize("text", ["", "-----BEGIN CERTIFICATE-----\nx\n-----END CERTIFICATE-----"])
def test_a_file_without_a_certificate_is_refused(authority: Authority, text: str) -> None:
    certificate, key = authority.certify()
    certificate.write_text(text)

    assert refusal(certificate, key) == "node.crt holds no certificate in PEM form"


def test_a_file_without_a_private_key_is_refused(authority: Authority) -> None:
    certificate, key = authority.certify()
    key.write_bytes(certificate.read_bytes())

    assert refusal(certificate, key) == "node.key holds no private key in PEM form"


def test_an_encrypted_key_is_refused_instead_of_asked_for(authority: Authority) -> None:
    certificate, key = authority.certify()
    private = load_pem_private_key(key.read_bytes(), None)
    form = (Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"secret"))
    key.write_bytes(private.private_bytes(*form))

    assert refusal(certificate, key) == "node.key is encrypted, and a daemon knows no password"


def test_a_renewal_is_shown_to_new_connections(authority: Authority) -> None:
    certificate = Certificate(*authority.certify("old.lan"))

    authority.certify("new.lan")
    certificate.reload()

    assert "new.lan" in shown(certificate.context, authority.ca_file, "new.lan")


def test_half_a_renewal_keeps_the_old_certificate(authority: Authority) -> None:
    path, key = authority.certify("old.lan")
    certificate = Certificate(path, key)

    old = key.read_bytes()
    authority.certify("new.lan")
    key.write_bytes(old)
    with pytest.raises(ConfigError, match="is not the key of the certificate"):
        certificate.reload()

    assert "old.lan" in shown(certificate.context, authority.ca_file, "old.lan")
