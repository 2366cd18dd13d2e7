def controller(study, home, **parts):
    listener = parts.pop("listener", Listener())
    fakes = {
        "launcher": FakeLauncher(),
        "search": FakeSearch(),
        "bundle": FAKE_BUNDLE,
        "progress": listener,
        "mirror": listener,
    }
    fixed = {"code": {}, "data_dir": home.root, "manifest_sha256": MANIFEST, "poll_seconds": 0.001}
    return Controller(study, home, **{**fakes, **fixed, **parts})


def records(home, name="tiny"):
    return [record for _, record in protocol.read_lines(home.study(name).ledger)]


def kinds(home):
    return [record["kind"] for record in records(home)]


def kill_at(home, kind, count):
    """A controller that dies, as by kill -9, just after the given decision is on disk for the n-th time."""

    class Killed(BaseException):
        pass

    class Dying(Controller):
        seen = 0

        def _record(self, what, **fields):
            super()._record(what, **fields)
            self.seen += what == kind
            if self.seen == count and what == kind:
                raise Killed

    return Dying, Killed

