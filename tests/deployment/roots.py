"""Images without a container engine: a Debian made by debootstrap, in which the steps of a Dockerfile are carried out.

Every step runs in a mount namespace of its own, so that nothing stays mounted whatever happens. Needs root, a Debian
mirror and a package index.

    python tests/deployment/roots.py FOLDER [STAGE ...]      builds base and images under FOLDER
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPOSITORY))

from tests.deployment.dockerfile import Dockerfile, Stage, command_of, pair_of, pairs_of, read, substituted  # noqa: E402  (also run as a program)  # fmt: skip

SUITE, MIRROR = "bookworm", "http://deb.debian.org/debian"
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
STEP_SECONDS = 1800.0
IMAGES = {
    "node": ("trainer.Dockerfile", "node"), "trainer": ("trainer.Dockerfile", "trainer"),
    "orchestrator": ("orchestrator.Dockerfile", "orchestrator"),
}  # fmt: skip
NOT_COPIED = shutil.ignore_patterns("__pycache__", "*.egg-info")


def missing() -> str:
    """Why no root can be made here; empty where it can."""
    if os.geteuid() != 0:
        return "only root may make devices and change its root"
    programs = [name for name in ("debootstrap", "unshare", "chroot") if shutil.which(name, path=PATH) is None]
    return f"without {', '.join(programs)}: apt-get install debootstrap util-linux" if programs else ""


@dataclass
class Image:
    """A root, and how a container of it would be started."""

    root: Path
    environment: dict[str, str] = field(default_factory=lambda: {"PATH": PATH})
    shell: list[str] = field(default_factory=lambda: ["/bin/sh", "-c"])
    user: str = "0:0"
    folder: str = "/"
    entrypoint: list[str] = field(default_factory=list)
    command: list[str] = field(default_factory=list)
    healthcheck: list[str] = field(default_factory=list)

    def child(self, root: Path) -> Image:
        """The image that begins where this one ends."""
        return Image(
            root, dict(self.environment), list(self.shell), self.user, self.folder, list(self.entrypoint),
            list(self.command), list(self.healthcheck),
        )  # fmt: skip


def in_root(
    root: Path, command: Sequence[str], *, user: str = "0:0", folder: str = "/", binds: Mapping[str, str] | None = None,
    host: str = "build",
) -> list[str]:  # fmt: skip
    """The command line that runs a command in a root, with folders of this machine bound into it, and a host's name."""
    lines = [
        f"hostname {shlex.quote(host)}",
        *(f"mount --rbind /{name} {root}/{name}" for name in ("dev", "sys")),
        f"mount -t proc proc {root}/proc",
    ]
    for source, target in (binds or {}).items():
        inside = shlex.quote(f"{root}{target}")
        make = f"mkdir -p {inside}" if Path(source).is_dir() else f"mkdir -p $(dirname {inside}); touch {inside}"
        lines.append(f"{make}; mount --rbind {shlex.quote(source)} {inside}")
    enter = f'cd {shlex.quote(folder)} && exec "$@"'
    inner = ["chroot", f"--userspec={user}", str(root), "/bin/sh", "-c", enter, "sh", *command]
    script = "; ".join(["set -e", *lines, 'exec "$@"'])
    return ["unshare", "--uts", "--mount", "--propagation=private", "/bin/sh", "-c", script, "sh", *inner]


def _lend_pip(root: Path) -> tuple[dict[str, str], dict[str, str]]:
    """This machine's variables of pip, for which files are copied into the root, and folders that have to be bound."""
    variables = {name: value for name, value in os.environ.items() if name.startswith("PIP_")}
    folders = {value: value for value in variables.values() if Path(value).is_absolute() and Path(value).is_dir()}
    for name, value in variables.items():
        if Path(value).is_file():
            variables[name] = f"/run/{name.lower()}"
            shutil.copyfile(value, root / variables[name].lstrip("/"))
    return variables, folders


class Builder:
    """Builds images of this project under one folder; what is there is not built again."""

    def __init__(self, folder: Path, arguments: Mapping[str, str] | None = None) -> None:
        self.folder = folder
        self.arguments = dict(arguments or {})
        self._built: dict[str, Image] = {}

    def image(self, name: str) -> Image:
        """One of IMAGES, built where it is not yet."""
        file, stage = IMAGES[name]
        dockerfile = read(REPOSITORY / "docker" / file)
        return self._stage(dockerfile, dockerfile.stage(stage))

    def base(self) -> Path:
        """The Debian that every image begins with, as the base image has it."""
        root = self.folder / "base"
        if not (root / "etc/debian_version").exists():
            partial = self.folder / "base.partial"
            shutil.rmtree(partial, ignore_errors=True)
            command = ["debootstrap", "--variant=minbase", SUITE, str(partial), MIRROR]
            subprocess.run(
                command, check=True, timeout=STEP_SECONDS, stdout=sys.stderr, env=dict(os.environ, PATH=PATH)
            )
            partial.rename(root)
        return root

    def _stage(self, file: Dockerfile, stage: Stage) -> Image:
        base = substituted(stage.base, file.arguments)
        known = {earlier.name: earlier for earlier in file.stages}
        parent = self._stage(file, known[base]) if base in known else Image(self.base())
        place = f"{file.path.stem}.{stage.name}"
        if place not in self._built:
            image = parent.child(self.folder / place)
            done = self.folder / f"{place}.done"
            if not done.exists():
                _copy_root(parent.root, image.root)
            self._carry_out(image, stage, is_done=done.exists())
            done.touch()
            self._built[place] = image
        return self._built[place]

    def _carry_out(self, image: Image, stage: Stage, *, is_done: bool) -> None:
        variables: dict[str, str] = {}
        for step in stage.instructions:
            text = step.text
            if step.word == "ARG":
                name, default = pair_of(text)
                variables[name] = self.arguments.get(name, default)
            elif step.word == "ENV":
                image.environment |= {
                    name: substituted(value, {**image.environment, **variables})
                    for name, value in pairs_of(text).items()
                }
            elif step.word == "SHELL":
                image.shell = command_of(text, [])
            elif step.word == "USER":
                image.user = substituted(text, variables)
            elif step.word == "WORKDIR":
                image.folder = text
            elif step.word == "ENTRYPOINT":
                image.entrypoint, image.command = command_of(text, image.shell), []
            elif step.word == "CMD":
                image.command = command_of(text, image.shell)
            elif step.word == "HEALTHCHECK":
                image.healthcheck = command_of(text.partition("CMD ")[2], image.shell)
            elif step.word == "COPY" and not is_done:
                _copy(text, image.root)
            elif step.word == "RUN" and not is_done:
                began = time.monotonic()
                _run(image, command_of(text, image.shell), variables)
                print(f"{stage.name}: line {step.line}, {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)


def _copy_root(source: Path, target: Path) -> None:
    if target.exists():
        shutil.rmtree(target)
    subprocess.run(["cp", "--archive", "--reflink=auto", str(source), str(target)], check=True, timeout=STEP_SECONDS)


def _copy(text: str, root: Path) -> None:
    """COPY from the build context: folders' contents, files into a folder or under a name."""
    words = text.split()
    options, (*sources, target) = (
        [word for word in words if word.startswith("--")],
        [word for word in words if not word.startswith("--")],
    )
    for source in (REPOSITORY / name for name in sources):
        place = root / target.lstrip("/")
        if source.is_dir():
            shutil.copytree(source, place, dirs_exist_ok=True, ignore=NOT_COPIED)
            continue
        place = place / source.name if target.endswith("/") else place
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(source, place)
        for option in options:
            place.chmod(int(option.removeprefix("--chmod="), 8))


def _run(image: Image, command: list[str], variables: Mapping[str, str]) -> None:
    settings, folders = _lend_pip(image.root)
    shutil.copyfile("/etc/resolv.conf", image.root / "etc/resolv.conf")
    environment = {**image.environment, **variables, **settings, "DEBIAN_FRONTEND": "noninteractive"}
    subprocess.run(
        in_root(image.root, command, user=image.user, folder=image.folder, binds=folders),
        check=True, timeout=STEP_SECONDS, stdout=sys.stderr, stdin=subprocess.DEVNULL,
        env=environment | {"PATH": f"{environment['PATH']}:{PATH}"},
    )  # fmt: skip


def main(arguments: list[str]) -> int:
    if not arguments:
        print(__doc__, file=sys.stderr)
        return 2
    if missing():
        print(missing(), file=sys.stderr)
        return 1
    builder = Builder(Path(arguments[0]).resolve())
    for name in arguments[1:] or IMAGES:
        image = builder.image(name)
        print(f"{name}: {image.root}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
