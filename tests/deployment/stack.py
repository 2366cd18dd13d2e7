"""docker/compose.yaml without a container engine: every service in the root that its Dockerfile makes, in one sandbox.

The sandbox has a network of its own with nothing but loopback, on which the services have the names and ports of compose,
and its own processes, which end with it. Images, commands, users, environments, volumes and health checks are those of the
files. Two servers are others': Debian's PostgreSQL, made by our script, and moto for Garage.

    python tests/deployment/stack.py ROOTS FOLDER STUDIES      runs the orchestrator to its end; its exit code
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPOSITORY))

from tests.deployment import compose, services  # noqa: E402  (also run as a program)
from tests.deployment.dockerfile import command_of  # noqa: E402
from tests.deployment.roots import IMAGES, Builder, Image, in_root  # noqa: E402
from tests.deployment.services import Services  # noqa: E402

OTHERS = ("postgres", "garage")
ADDRESS = "10.77.0.1"  # of the sandbox's loopback: Slurm finds no host whose only address is 127.0.0.1
HEALTHY_SECONDS = 180.0
STUDY_SECONDS = 1500.0
IN_SANDBOX = "CADDIE_TEST_SANDBOX"


def sandboxed(arguments: list[str]) -> list[str]:
    """The command line that runs this program in a sandbox of its own."""
    own = ["--net", "--mount", "--pid", "--fork", "--kill-child=KILL", "--mount-proc"]
    return ["unshare", *own, sys.executable, str(Path(__file__).resolve()), *arguments]


class Stack:
    """The services of one compose file, in the order in which they need each other."""

    def __init__(self, roots: Path, folder: Path, studies: Path) -> None:
        self.folder = folder
        settings = compose.made_settings(folder)
        self.services: dict[str, dict[str, Any]] = compose.interpolated(compose.read(), settings)["services"]
        builder = Builder(roots, {"CADDIE_UID": settings["CADDIE_UID"]})
        self.images = {name: builder.image(name) for name in IMAGES}
        self.moved = {"./studies": studies}
        """Folders of the repository in whose place a test puts others."""

        ours = [name for name in self.services if name not in OTHERS]
        hosts = f"127.0.0.1 localhost {' '.join(OTHERS)}\n{ADDRESS} {' '.join(ours)}\n"
        for image in self.images.values():
            (image.root / "etc/hosts").write_text(hosts)

    # ------------------------------------------------------------------------------------------------ one service

    def image_of(self, name: str) -> Image:
        build = self.services[name]["build"]
        stage = build.get("target", "")
        made = next(
            key for key, (file, its) in IMAGES.items() if f"docker/{file}" == build["dockerfile"] and stage in ("", its)
        )
        return self.images[made]

    def environment(self, name: str) -> dict[str, str]:
        own = {key: str(value) for key, value in self.services[name].get("environment", {}).items()}
        return {**self.image_of(name).environment, **own}

    def binds(self, name: str) -> dict[str, str]:
        """The service's volumes as folders of this machine; a new one begins as its place in the image is."""
        found = {}
        for entry in self.services[name].get("volumes", []):
            source, target = entry.split(":")[:2]
            place = (
                self.moved.get(source, compose.DOCKER / source)
                if source.startswith(".")
                else self.folder / "volumes" / source
            )
            inside = self.image_of(name).root / target.lstrip("/")
            if not place.exists():
                place.mkdir(parents=True)
                if inside.is_dir():
                    subprocess.run(["cp", "--archive", f"{inside}/.", str(place)], check=True)
            found[str(place)] = target
        return found

    def command(self, name: str, words: list[str], *, user: str = "") -> list[str]:
        """A command as it runs in the service's container."""
        service, image = self.services[name], self.image_of(name)
        return in_root(
            image.root, words, user=user or service.get("user", image.user), folder=image.folder, binds=self.binds(name),
            host=service.get("hostname", name),
        )  # fmt: skip

    def start(self, name: str) -> subprocess.Popen[bytes]:
        service, image = self.services[name], self.image_of(name)
        words = [*service.get("entrypoint", image.entrypoint), *service.get("command", image.command)]
        with (self.folder / f"{name}.log").open("ab") as log:
            return subprocess.Popen(
                self.command(name, words), env=self.environment(name), stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )

    def is_healthy(self, name: str) -> bool:
        own = self.services[name].get("healthcheck", {}).get("test")
        words = self.image_of(name).healthcheck
        if own:
            kind, *rest = own
            words = rest if kind == "CMD" else command_of(rest[0], ["/bin/sh", "-c"])
        done = subprocess.run(
            self.command(name, words), env=self.environment(name), stdin=subprocess.DEVNULL, capture_output=True, timeout=60,
            check=False,
        )  # fmt: skip
        return done.returncode == 0

    # ------------------------------------------------------------------------------------------------ all of them

    @contextlib.contextmanager
    def others(self) -> Iterator[None]:
        """The two servers that are not ours, where compose has them."""
        theirs = self.services["postgres"]["environment"]
        place = Services(self.folder, postgres_port=5432, s3_port=3900, mlflow_port=5000)
        with services.postgres(place, theirs), services.bucket(place):
            yield

    def up(self, name: str) -> subprocess.Popen[bytes]:
        """Start a service once those that it needs are as it needs them."""
        for needed, condition in self.services[name].get("depends_on", {}).items():
            if needed in OTHERS:
                continue
            process = self.up(needed)
            if condition["condition"] == "service_completed_successfully":
                require(
                    process.wait(STUDY_SECONDS) == 0,
                    f"{needed} ended with {process.returncode}",
                    self.folder / f"{needed}.log",
                )
            else:
                self.wait_until_healthy(needed, process)
        print(f"starting {name}", file=sys.stderr, flush=True)
        return self.start(name)

    def wait_until_healthy(self, name: str, process: subprocess.Popen[bytes]) -> None:
        deadline, log = time.monotonic() + HEALTHY_SECONDS, self.folder / f"{name}.log"
        while not self.is_healthy(name):
            require(process.poll() is None, f"{name} ended with {process.returncode}", log)
            require(time.monotonic() < deadline, f"{name} does not become healthy", log)
            time.sleep(1)


def require(holds: bool, problem: str, log: Path) -> None:
    if not holds:
        raise RuntimeError(f"{problem}: {log.read_text(errors='replace')[-3000:]}")


def main(arguments: list[str]) -> int:
    if len(arguments) != 3:
        print(__doc__, file=sys.stderr)
        return 2
    roots, folder, studies = (Path(argument).resolve() for argument in arguments)
    if IN_SANDBOX not in os.environ:
        return subprocess.run(
            sandboxed([str(roots), str(folder), str(studies)]), env={**os.environ, IN_SANDBOX: "1"}, check=False
        ).returncode
    for command in ("link set lo up", f"address add {ADDRESS}/32 dev lo"):
        subprocess.run(["ip", *command.split()], check=True)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    stack = Stack(roots, folder, studies)
    with stack.others():
        orchestrator = stack.up("orchestrator")
        code = orchestrator.wait(STUDY_SECONDS)
        print((folder / "orchestrator.log").read_text(errors="replace"))
        require(stack.is_healthy("orchestrator"), "the orchestrator's own check fails", folder / "orchestrator.log")
        if code == 0:
            code = verify_on_node(stack)
    return code


def verify_on_node(stack: Stack) -> int:
    """`caddie verify` of one run, as the operators' page gives it; its exit code."""
    run = min(path.name for path in (stack.folder / "volumes/home/runs").iterdir())
    command = stack.command("slurm", ["caddie", "verify", run], user="caddie")
    done = subprocess.run(
        command, env=stack.environment("slurm"), capture_output=True, text=True, timeout=STUDY_SECONDS, check=False
    )
    print(done.stdout, done.stderr)
    return done.returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
