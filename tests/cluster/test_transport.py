"""Transport security: what is refused before anything starts, what a probe finds out, and what crosses the wire."""

from __future__ import annotations

import json
import ssl
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from socket import create_server

import pytest

from cluster import hosts
from postlude.cluster.certificates import make_certificates
from postlude.cluster.transport import check_collectives, check_transport, probe, ray_variables
from postlude.errors import ComputeError
from postlude.manifest.compute import Certificates, Compute, Pool, Transport
from postlude.manifest.load import load
from postlude.manifest.schema import Manifest
from postlude.workflow.compute import check_compute

needs_hosts = pytest.mark.skipif(not hosts.can_be_made(), reason="this machine makes no network namespaces")


@pytest.fixture
def files(tmp_path: Path) -> Certificates:
    """A certificate of this host, and its authority's."""
    make_certificates(str(tmp_path / "certificates"), ["127.0.0.1"], 1)
    return certificates(tmp_path / "certificates", "127.0.0.1")


def certificates(folder: Path, host: str) -> Certificates:
    authority = str(folder / "authority.pem")
    return Certificates(certificate=str(folder / f"{host}.pem"), key=str(folder / f"{host}.key"), authority=authority)


# --- certificates -------------------------------------------------------------------------------------------


def test_the_authority_is_made_once_and_keys_are_secret(tmp_path):
    folder = tmp_path / "certificates"
    first = make_certificates(str(folder), ["10.0.0.1"], 1)
    later = make_certificates(str(folder), ["10.0.0.2", "fe80::1"], 1)
    assert len(first) == 4
    assert len(later) == 4
    keys = {path.name: oct(path.stat().st_mode)[-3:] for path in folder.glob("*.key")}
    assert keys == dict.fromkeys(("authority.key", "10.0.0.1.key", "10.0.0.2.key", "fe80::1.key"), "600")
    with pytest.raises(ComputeError, match="is there already"):
        make_certificates(str(folder), ["10.0.0.2"], 1)
    with pytest.raises(ComputeError, match="addresses by which"):
        make_certificates(str(folder), ["somewhere"], 1)


# --- the manifest -------------------------------------------------------------------------------------------


def manifest(**compute) -> dict:
    stage = {"recipe": "sft", "model": {"path": "x"}, "data": {"d": 1.0}, "steps": 1}
    return {"name": "m", "data": {"d": {"source": {"path": "d.jsonl"}, "format": "text"}}, "stages": {"s": stage}} | {
        "compute": compute
    }


def test_the_short_form_says_what_the_long_one_says():
    read = load(json.dumps(manifest(transport="require-encryption")), "m.yaml").manifest
    assert read.compute.transport == Transport(require_encryption=True)


def test_a_run_that_would_send_clear_text_is_refused(files, monkeypatch):
    monkeypatch.delenv("RAY_USE_TLS", raising=False)
    asked = {"require_encryption": True}
    check_transport(Compute(transport=Transport(**asked)))  # nothing leaves this machine
    far = {"provider": "ray", "address": "10.0.0.1:6379"}
    with pytest.raises(ComputeError, match="Ray would send clear text") as raised:
        check_transport(Compute(**far, transport=Transport(**asked)))
    assert raised.value.exit_code == 4
    two = {"train": Pool(workers=2)}
    with pytest.raises(ComputeError, match="torch sends their gradients in clear text"):
        check_collectives(Compute(**far, pools=two, transport=Transport(**asked, tls=files)), ["train"])
    check_collectives(Compute(**far, pools=two, transport=Transport(**asked, tls=files)), ["another"])
    one_node = {"train": Pool(workers=2, placement="one_node")}
    check_collectives(Compute(**far, pools=one_node, transport=Transport(**asked, tls=files)), ["train"])
    check_collectives(Compute(**far, pools=two, transport=Transport(**asked, network_is_encrypted=True)), ["train"])
    check_transport(Compute(**far, pools=two, transport=Transport(**asked, tls=files)))


def test_engines_that_would_be_asked_in_clear_text_are_refused():
    def asking(address: str, **transport: bool) -> Manifest:
        stage = {
            "recipe": "grpo",
            "model": {"path": "x"},
            "data": {"d": 1.0},
            "steps": 1,
            "batch": {"tokens": 4096, "block": 1024},
            "optimizer": {"lr": 1e-5},
            "reward": [{"function": "exact_match"}],
            "rollout": {"engine": {"name": "vllm", "addresses": [address]}},
        }
        read = load(json.dumps({**manifest(transport=transport), "stages": {"s": stage}}), "m.yaml")
        return read.manifest

    check_compute(asking("http://127.0.0.1:8000", require_encryption=True))
    check_compute(asking("http://10.0.0.9:8000", require_encryption=True, network_is_encrypted=True))
    with pytest.raises(ComputeError, match="HTTP in clear text"):
        check_compute(asking("http://10.0.0.9:8000", require_encryption=True))


def test_ray_is_told_everything_and_a_missing_file_is_named(files, tmp_path, monkeypatch):
    for name in ("RAY_USE_TLS", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    assert ray_variables(Transport()) == {"RAY_AUTH_MODE": "disabled"}
    token = tmp_path / "token"
    token.write_text("secret\n")
    told = ray_variables(Transport(tls=files, token=str(token)))
    assert (told["RAY_USE_TLS"], told["RAY_AUTH_MODE"], told["RAY_AUTH_TOKEN"]) == ("1", "token", "secret")
    assert told["RAY_TLS_SERVER_KEY"] == files.key
    with pytest.raises(ComputeError, match=r"transport\.token: there is no file"):
        ray_variables(Transport(token=str(tmp_path / "nowhere")))
    with pytest.raises(ComputeError, match=r"tls\.key: there is no file"):
        ray_variables(Transport(tls=files.model_copy(update={"key": "nowhere.key"})))


# --- the probe ----------------------------------------------------------------------------------------------


@contextmanager
def answering(tls: Certificates | None) -> Iterator[str]:
    """A server that begins to speak HTTP/2, in clear text or by mutual TLS."""
    settings = bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])
    with create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            connection, _ = server.accept()
            try:
                if tls is not None:
                    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=tls.authority)
                    context.load_cert_chain(tls.certificate, tls.key)
                    context.verify_mode = ssl.CERT_REQUIRED
                    connection = context.wrap_socket(connection, server_side=True)
                connection.recv(64)
                connection.sendall(settings)
                connection.recv(64)
            except OSError:
                pass
            finally:
                connection.close()

        threading.Thread(target=serve, daemon=True).start()
        yield f"127.0.0.1:{server.getsockname()[1]}"


@pytest.mark.parametrize(
    ("theirs", "ours", "said"),
    [
        ("tls", "nothing", "it wants TLS"),
        ("nothing", "tls", "it has no TLS"),
        ("tls", "another authority", "another authority"),
    ],
)
def test_what_would_hang_is_told(files, tmp_path, theirs, ours, said, monkeypatch):
    monkeypatch.delenv("RAY_USE_TLS", raising=False)
    make_certificates(str(tmp_path / "others"), ["127.0.0.1"], 1)
    known = {"nothing": None, "tls": files, "another authority": certificates(tmp_path / "others", "127.0.0.1")}
    with answering(known[theirs]) as address, pytest.raises(ComputeError, match=said):
        probe(address, Transport(tls=known[ours]))


def test_nobody_there_is_told(monkeypatch):
    monkeypatch.delenv("RAY_USE_TLS", raising=False)
    with create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    with pytest.raises(ComputeError, match="No Ray cluster answers"):
        probe(f"127.0.0.1:{port}", Transport())
    with pytest.raises(ComputeError, match="has to be host:port"):
        probe("somewhere", Transport())


# --- on the wire --------------------------------------------------------------------------------------------


@pytest.mark.long
@needs_hosts
@pytest.mark.capability(
    "Mutual TLS and a token: who has neither is refused, and no clear text of Ray's crosses the wire"
)
def test_a_cluster_with_tls_and_a_token_lets_in_who_has_both_and_sends_no_clear_text(new_project, tmp_path):
    marker = "A sentence that nobody says by chance, 8315."
    with tempfile.TemporaryDirectory(prefix="t-", dir="/tmp") as place, hosts.Hosts(2) as made:
        folder = Path(place) / "certificates"
        make_certificates(str(folder), [made.address(1), made.address(2)], 1)
        own, token = certificates(folder, made.address(1)), Path(place) / "token"
        token.write_text("t" * 40)

        def on_host(number: int) -> dict[str, str]:
            its = certificates(folder, made.address(number))
            return ray_variables(Transport(tls=its, token=str(token)))

        cluster = hosts.RayOnHosts(made, Path(place) / "ray", {2: 1}, on_host)

        def project_with(**transport):
            project = new_project(tmp_path, provider="ray", address=cluster.address, transport=transport)
            project.manifest["compute"]["pools"]["train"]["workers"] = 1
            project.stage |= {"steps": 30}
            return project

        for name, transport, said in (
            ("neither", {}, "it wants TLS"),
            ("no-token", {"tls": own.model_dump()}, "wants a token"),
        ):
            project = project_with(**transport).called(name)
            project.start(on=cluster)
            assert said in project.ended(4)
        project = project_with(tls=own.model_dump(), token=str(token), require_encryption=True).called("both")
        project.manifest["compute"]["environment"] = {"MARKER": marker}  # crosses as an argument of every worker
        with made.wire(2) as wire:
            project.start(on=cluster)
            project.ended()
        assert len(project.lines()) == 30
        assert len(wire.seen) > 100_000
        assert marker.encode() not in wire.seen
        assert b"Say 77." not in wire.seen
        cluster.close()


@pytest.mark.long
@needs_hosts
def test_without_tls_the_marker_is_seen_on_the_wire(new_project, tmp_path):
    """What the test above would find if there were something to find."""
    marker = "A sentence that nobody says by chance, 8315."
    with tempfile.TemporaryDirectory(prefix="t-", dir="/tmp") as place, hosts.Hosts(2) as made:
        cluster = hosts.RayOnHosts(made, Path(place) / "ray", {2: 1})
        project = new_project(tmp_path, provider="ray", address=cluster.address)
        project.manifest["compute"]["pools"]["train"]["workers"] = 1
        project.manifest["compute"]["environment"] = {"MARKER": marker}
        project.stage |= {"steps": 5}
        with made.wire(2) as wire:
            project.start(on=cluster)
            project.ended()
        assert marker.encode() in wire.seen
        cluster.close()
