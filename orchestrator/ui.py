"""`caddie ui`: MLflow's server on the home's store, as a child process that ends with this one.

This machine alone reaches it, unless another address is asked for: then every page wants a password.
"""

from __future__ import annotations

import ipaddress
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from typing import TextIO

from orchestrator import access as accesses
from orchestrator import tracking_server
from orchestrator.access import USER, Access
from orchestrator.errors import MachineError
from orchestrator.home import Home

LOOPBACK = "127.0.0.1"
DEFAULT_PORT = 5000
START_SECONDS = 120.0
"""Longest start; on a cold network file system the imports alone take most of a minute."""

END_SECONDS = 10.0
"""Between asking the server to end and ending it."""

SERVER_ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # seven queue consumers that a viewer does not need
}


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach the host."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def require_free_port(host: str, port: int) -> None:
    """Raise MachineError, with a port that is free, where another program listens."""
    if not 1 <= port <= 65535:
        raise MachineError(f"port must be from 1 to 65535, got {port}", hint=f"take --port {DEFAULT_PORT}")
    try:
        _bind(host, port)
    except socket.gaierror as error:
        raise MachineError(
            f"{host}: this is no name or address of this machine", hint=f"take --host {LOOPBACK}"
        ) from error
    except OSError as error:
        free = _bind(host, 0, otherwise=_bind(LOOPBACK, 0))
        reason = error.strerror or str(error)
        raise MachineError(f"port {port} of {host} cannot be taken: {reason}", hint=f"take --port {free}") from error


def _bind(host: str, port: int, *, otherwise: int | None = None) -> int:
    """The port that a bind to `port` gives (0: any free one); `otherwise` where the host itself cannot be bound."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the server does, after its own restart
        try:
            probe.bind((host, port))
        except OSError:
            if otherwise is None:
                raise
            return otherwise
        return int(probe.getsockname()[1])


def allowed_hosts(host: str, port: int) -> list[str]:
    """Host headers that the server answers. MLflow compares them whole, port included, and its own default is replaced."""
    names = ["localhost", LOOPBACK, "[::1]", socket.gethostname(), socket.getfqdn()]
    names += [host] if host not in ("0.0.0.0", "::") else _own_addresses()
    return [form for name in dict.fromkeys(names) for form in (name, f"{name}:{port}")]


def _own_addresses() -> list[str]:
    """Addresses by which others reach a server that is bound to all of them."""
    try:
        found = socket.getaddrinfo(socket.gethostname(), None, socket.AF_INET)
    except OSError:
        return []
    return sorted({str(address[4][0]) for address in found})


def server_command(home: Home, host: str, port: int) -> list[str]:
    """The command line of MLflow's server; one worker, because four need 3 GB to show the same."""
    command = [
        sys.executable, "-m", "mlflow", "server", "--backend-store-uri", f"sqlite:///{home.mlflow_database}",
        "--default-artifact-root", home.mlflow_artifacts.as_uri(), "--host", host, "--port", str(port), "--workers", "1",
    ]  # fmt: skip
    if not is_loopback(host):
        hosts = allowed_hosts(host, port)
        # The UI's own POST requests carry an Origin, which MLflow refuses from any place but this machine unless it is named.
        origins = [f"http://{name}" for name in hosts if name.endswith(f":{port}")]
        command += [
            "--app-name",
            "basic-auth",
            "--allowed-hosts",
            ",".join(hosts),
            "--cors-allowed-origins",
            ",".join(origins),
        ]
    return command


def prepare_store(home: Home) -> list[str]:
    """Bring MLflow up to every study of the home, making its database if there is none; returns what could not be read."""
    from orchestrator.mirror import sync_all  # loads MLflow: a second that a busy port need not wait for

    return sync_all(home)


def prepare_access(home: Home) -> Access:
    """The password that other machines need."""
    return accesses.prepare(home)


def study_paths(home: Home) -> dict[str, str]:
    """Path within the UI of each study's view."""
    from orchestrator.mirror import view_paths

    return view_paths(home)


def serve(
    home: Home,
    host: str = LOOPBACK,
    port: int = DEFAULT_PORT,
    *,
    stream: TextIO | None = None,
    is_wanted: Callable[[], bool] = lambda: True,
) -> None:
    """Serve until Ctrl-C, SIGTERM or until `is_wanted` says no. Raises MachineError for a busy port or a server that dies.

    Where a tracking server is used it is brought up to date, its addresses are printed, and nothing is started.
    """
    stream = sys.stderr if stream is None else stream
    home.require_writable()
    if tracking_server.address():
        for problem in prepare_store(home):
            _say(stream, f"warning: {problem}")
        _print_addresses(home, tracking_server.address(), ending="", stream=stream)
        return
    require_free_port(host, port)
    for problem in prepare_store(home):
        _say(stream, f"warning: {problem}")
    access = None if is_loopback(host) else prepare_access(home)
    server = _start(server_command(home, host, port), access.environment if access else {})
    try:
        _wait_until_healthy(server, host, port)
        _print_addresses(home, _url(host, port), ending="   (Ctrl-C ends it)", stream=stream)
        if access:
            _say(
                stream,
                f"other machines: http://{socket.gethostname()}:{port}, user {USER}, password in {access.password_file}",
            )
            _say(stream, "warning: this is HTTP, the password can be read on the way; ssh -L is private")
        _wait(server, is_wanted)
    except KeyboardInterrupt:
        _say(stream, "ended")
    finally:
        _end(server)


def _start(command: Sequence[str], more: Mapping[str, str]) -> subprocess.Popen[bytes]:
    """The server in a session of its own, so that Ctrl-C reaches it through us and its children end with it."""
    environment = {**os.environ, **SERVER_ENVIRONMENT, **more}
    return subprocess.Popen(
        command,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


def _wait_until_healthy(server: subprocess.Popen[bytes], host: str, port: int) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if server.poll() is not None:
            raise MachineError(
                f"MLflow's server ended with exit status {server.returncode} before it answered",
                hint="run `"
                + " ".join(map(str, server.args if isinstance(server.args, list) else [server.args]))
                + "` to see why",
            )
        if _is_healthy(_url(host, port)):
            return
        time.sleep(0.2)
    raise MachineError(
        f"MLflow's server did not answer on port {port} within {START_SECONDS:g} s", hint="run the command again"
    )


def _is_healthy(url: str) -> bool:
    # Without a proxy: an http_proxy of the environment would be asked for this machine's own address.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(f"{url}/health", timeout=2.0) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def _url(host: str, port: int) -> str:
    shown = LOOPBACK if host in ("0.0.0.0", "::", "localhost") else host
    return f"http://[{shown}]:{port}" if ":" in shown else f"http://{shown}:{port}"


def _print_addresses(home: Home, url: str, *, ending: str, stream: TextIO) -> None:
    _say(stream, f"MLflow: {url}/#/experiments?workflowType=machine_learning{ending}")
    for name, path in study_paths(home).items():
        _say(stream, f"  {name}: {url}{path}")


def _say(stream: TextIO, text: str) -> None:
    stream.write(text + "\n")
    stream.flush()


def _wait(server: subprocess.Popen[bytes], is_wanted: Callable[[], bool]) -> None:
    """Until the server ends, which is an error, or is not wanted any more."""
    previous = signal.signal(signal.SIGTERM, _raise_interrupt) if _is_main_thread() else None
    try:
        while is_wanted():
            if server.poll() is not None:
                raise MachineError(f"MLflow's server ended with exit status {server.returncode}", hint="start it again")
            time.sleep(0.2)
    finally:
        if previous is not None:
            signal.signal(signal.SIGTERM, previous)


def _is_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


def _raise_interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt


def _end(server: subprocess.Popen[bytes]) -> None:
    """End the server and its workers; what does not listen is killed."""
    for number, patience in ((signal.SIGTERM, END_SECONDS), (signal.SIGKILL, END_SECONDS)):
        try:
            os.killpg(server.pid, number)
        except ProcessLookupError:
            break
        try:
            server.wait(patience)
        except subprocess.TimeoutExpired:
            continue
    server.wait()
