import io
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
from make_study import make_record

from orchestrator import ui
from orchestrator.access import Access
from orchestrator.errors import MachineError
from orchestrator.home import Home
from orchestrator.ui import allowed_hosts, is_loopback, require_free_port, serve, server_command


@pytest.fixture
def busy_port():
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        yield holder.getsockname()[1]


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_a_busy_port_is_named_with_a_free_one(busy_port):
    with pytest.raises(MachineError, match=f"port {busy_port} of 127.0.0.1 cannot be taken") as error:
        require_free_port("127.0.0.1", busy_port)
    assert error.value.exit_code == 8
    suggested = int(error.value.hint.removeprefix("take --port "))
    require_free_port("127.0.0.1", suggested)


def test_a_busy_port_is_found_before_anything_is_started(tmp_path, busy_port):
    home = Home(tmp_path)
    with pytest.raises(MachineError):
        serve(home, port=busy_port, stream=io.StringIO())
    assert not home.mlflow_database.exists()


@pytest.mark.parametrize("port", [0, 65536, -1])
def test_a_port_out_of_range_is_refused(port):
    with pytest.raises(MachineError, match=f"port must be from 1 to 65535, got {port}"):
        require_free_port("127.0.0.1", port)


def test_an_address_of_another_machine_is_refused_with_a_free_port():
    with pytest.raises(MachineError, match="192.0.2.1") as error:  # an address kept for documentation
        require_free_port("192.0.2.1", 5000)
    assert error.value.hint.startswith("take --port ")


def test_a_host_that_is_no_name_is_refused(monkeypatch):
    def unknown(host, port, otherwise=None):
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(ui, "_bind", unknown)
    with pytest.raises(MachineError, match="no name or address of this machine") as error:
        require_free_port("no-such-host.invalid", 5000)
    assert error.value.hint == "take --host 127.0.0.1"


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("127.0.0.1", True),
        ("127.0.1.1", True),
        ("localhost", True),
        ("::1", True),
        ("0.0.0.0", False),
        ("login01", False),
    ],
)
def test_loopback_is_what_only_this_machine_reaches(host, expected):
    assert is_loopback(host) is expected


def test_by_default_the_server_has_one_worker_and_mlflows_own_host_check(tmp_path):
    command = server_command(Home(tmp_path), "127.0.0.1", 5000)
    assert command[command.index("--workers") + 1] == "1"
    assert "--allowed-hosts" not in command
    assert f"sqlite:///{tmp_path}/mlflow.db" in command


def test_an_open_server_allows_its_names_with_and_without_the_port_and_their_origins(tmp_path):
    command = server_command(Home(tmp_path), "0.0.0.0", 5001)
    hosts = command[command.index("--allowed-hosts") + 1].split(",")
    origins = command[command.index("--cors-allowed-origins") + 1].split(",")
    for name in ("localhost", "127.0.0.1", socket.gethostname()):
        assert {name, f"{name}:5001"} <= set(hosts)
        assert f"http://{name}:5001" in origins
    assert "login01:5001" in allowed_hosts("login01", 5001)


class FakeServer:
    """A command line that stands for MLflow's server."""

    def __init__(self, monkeypatch, code):
        monkeypatch.setattr(ui, "server_command", lambda home, host, port: [sys.executable, "-c", code, str(port)])
        monkeypatch.setattr(ui, "prepare_store", lambda home: ["a damaged run"])
        monkeypatch.setattr(ui, "study_paths", lambda home: {"wd": "/#/experiments/1"})


HEALTHY = """
import http.server, sys
class Answer(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.end_headers()
    def log_message(self, *a): pass
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Answer).serve_forever()
"""


def test_the_address_of_every_studys_view_is_printed_once_the_server_answers(tmp_path, monkeypatch):
    FakeServer(monkeypatch, HEALTHY)
    stream, port = io.StringIO(), free_port()
    serve(Home(tmp_path), port=port, stream=stream, is_wanted=lambda: False)
    assert stream.getvalue().splitlines() == [
        "warning: a damaged run",
        f"MLflow: http://127.0.0.1:{port}/#/experiments?workflowType=machine_learning   (Ctrl-C ends it)",
        f"  wd: http://127.0.0.1:{port}/#/experiments/1",
    ]
    require_free_port("127.0.0.1", port)


def test_another_machine_needs_a_password_and_is_told_where_it_is(tmp_path, monkeypatch):
    FakeServer(monkeypatch, HEALTHY)
    monkeypatch.setattr(ui, "prepare_access", lambda home: Access({"MADE_UP": "1"}, home.mlflow_access.password))
    stream, port = io.StringIO(), free_port()
    serve(Home(tmp_path), host="0.0.0.0", port=port, stream=stream, is_wanted=lambda: False)
    told = stream.getvalue()
    assert f"http://{socket.gethostname()}:{port}, user caddie, password in {tmp_path}/mlflow-access/password" in told
    assert "this is HTTP" in told


def test_an_open_server_asks_who_is_there_and_one_for_this_machine_does_not(tmp_path):
    assert "basic-auth" in server_command(Home(tmp_path), "0.0.0.0", 5001)
    assert "basic-auth" not in server_command(Home(tmp_path), "127.0.0.1", 5001)


def test_a_server_that_dies_before_it_answers_is_an_error_with_its_command(tmp_path, monkeypatch):
    FakeServer(monkeypatch, "raise SystemExit(3)")
    with pytest.raises(MachineError, match="exit status 3 before it answered") as error:
        serve(Home(tmp_path), port=free_port(), stream=io.StringIO())
    assert "to see why" in error.value.hint


def test_a_server_that_dies_later_is_an_error(tmp_path, monkeypatch):
    FakeServer(
        monkeypatch,
        HEALTHY.replace("self.end_headers()", "self.end_headers(); self.wfile.flush(); import os; os._exit(4)"),
    )
    with pytest.raises(MachineError, match="exit status 4"):
        serve(Home(tmp_path), port=free_port(), stream=io.StringIO())


def test_a_server_that_never_answers_is_ended(tmp_path, monkeypatch):
    FakeServer(monkeypatch, "import time; time.sleep(600)")
    monkeypatch.setattr(ui, "START_SECONDS", 0.5)
    with pytest.raises(MachineError, match="did not answer on port"):
        serve(Home(tmp_path), port=free_port(), stream=io.StringIO())


def test_a_server_that_does_not_listen_to_the_end_is_killed_with_its_children(tmp_path, monkeypatch):
    stubborn = "import signal, subprocess, sys; signal.signal(15, signal.SIG_IGN); subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
    FakeServer(monkeypatch, stubborn + HEALTHY)
    monkeypatch.setattr(ui, "END_SECONDS", 0.5)
    port = free_port()
    serve(Home(tmp_path), port=port, stream=io.StringIO(), is_wanted=lambda: False)
    require_free_port("127.0.0.1", port)


@pytest.mark.slow
def test_the_real_server_answers_and_ctrl_c_ends_it_with_its_children(tmp_path):
    home, port = make_record(tmp_path), free_port()
    # As a terminal would have it: what a shell starts in the background ignores Ctrl-C from the start.
    hears = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
    code = f"{hears}from pathlib import Path; from orchestrator.home import Home; from orchestrator.ui import serve; serve(Home(Path({str(home.root)!r})), port={port})"
    environment = {**os.environ, "PYTHONPATH": str(Path(ui.__file__).parent.parent)}
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True, env=environment)
    try:
        assert process.stderr is not None
        lines = [process.stderr.readline(), process.stderr.readline()]
        assert f"http://127.0.0.1:{port}" in lines[0]
        assert "record-smoke" in lines[1]
        assert _children(process.pid) != []
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/api/2.0/mlflow/experiments/get-by-name?experiment_name=record-smoke"
        )
        assert b"What does smoke score" in urllib.request.urlopen(request, timeout=10).read()
        children = _children(process.pid)
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.wait()
        process.stderr.close()
    deadline = time.monotonic() + 10
    while any(Path(f"/proc/{pid}").exists() for pid in children) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(Path(f"/proc/{pid}").exists() for pid in children)


def _children(pid):
    """Every descendant of a process."""
    found = []
    for path in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        found += [int(path), *_children(int(path))]
    return found
