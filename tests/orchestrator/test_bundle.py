import ast
import hashlib
import json
import os
import subprocess
import sys
import traceback
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import trainer
from orchestrator import bundle
from orchestrator.errors import CaddieError, ConfigError, ProtocolError
from orchestrator.folding import choices
from orchestrator.presets import load_preset
from trainer import protocol
from trainer.config import Config, from_mapping, to_mapping, with_knobs

ROOT = Path(trainer.__file__).parent

PROBE = """
import inspect, runpy, sys, linecache
sys.argv = ["train_gpt.py"]
globals().update(runpy.run_path({path!r}, run_name="probe"))
{body}
"""


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    path = tmp_path_factory.mktemp("bundle") / "train_gpt.py"
    path.write_bytes(bundle.build(load_preset("smoke")))
    return path


def packed_name(module, name, preset="smoke"):
    """What a function is called in the bundle: it stands on the line of the readable one."""
    readable = (ROOT / f"{module}.py").read_text()
    packed = bundle.module_sources(ROOT, choices(load_preset(preset)))[f"trainer.{module}"]
    trees = ast.parse(readable), ast.parse(packed)
    (line,) = (node.lineno for node in trees[0].body if getattr(node, "name", "") == name)
    return next(node.name for node in trees[1].body if node.lineno == line)


def probe(path, body, cwd):
    """Run `body` with the bundle's finder in place, where no readable trainer can be found."""
    program = PROBE.format(path=str(path), body=body)
    return subprocess.run([sys.executable, "-I", "-c", program], capture_output=True, text=True, cwd=cwd, check=False)


@pytest.mark.parametrize("preset", ["pr1326", "smoke"])
def test_the_bundle_is_within_its_limit_and_smaller_than_one_for_any_run(preset):
    assert bundle.LARGEST_BYTES == 25_000
    assert len(bundle.build(load_preset(preset))) <= 25_000
    assert len(bundle.build(load_preset(preset))) < len(bundle.build())


def test_a_bundle_over_the_limit_is_refused(monkeypatch):
    monkeypatch.setattr(bundle, "LARGEST_BYTES", 1000)
    with pytest.raises(CaddieError, match=r"the bundle has \d+ bytes, the limit is 1000"):
        bundle.build(load_preset("smoke"))


def test_the_same_sources_give_the_same_bytes():
    code = (
        "import hashlib; from orchestrator import bundle; from orchestrator.presets import load_preset\n"
        "print(hashlib.sha256(bundle.build(load_preset('smoke'))).hexdigest())"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT.parent), "PYTHONHASHSEED": "7"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.strip() == hashlib.sha256(bundle.build(load_preset("smoke"))).hexdigest()


def test_trials_that_differ_in_numbers_alone_are_packed_once():
    config = load_preset("smoke")
    other = with_knobs(config, {"optim.muon_weight_decay": 0.2, "model.qk_gain": 2.0, "ttt.lr": 0.1})
    assert bundle.build(other) is bundle.build(config)
    assert bundle.build(with_knobs(config, {"ttt.method": "off"})) != bundle.build(config)


def test_every_module_of_a_run_is_packed_and_no_other():
    left_out = {path.stem for path in ROOT.glob("*.py")} - set(bundle.MODULES)
    assert left_out == {
        "__init__", "__main__", "audit", "corpus", "documents", "overlap", "pool", "prepare", "probes", "publication", "sizes",
        "target_bytes", "verification",
    }  # fmt: skip


def test_modules_come_from_the_bundle_where_no_source_is_installed(packed, tmp_path):
    function = packed_name("schedule", "muon_momentum")
    body = (
        "import trainer.schedule as s, trainer.config as c\n"
        "class optim: muon_momentum, muon_momentum_start, muon_momentum_ramp_steps = 0.9, 0.5, 4\n"
        f"print(s.__file__, s.__package__, s.__spec__.parent, s.{function}(2, optim))"
    )
    done = probe(packed, body, tmp_path)
    assert done.stdout.strip().endswith("train_gpt.py/trainer/schedule.py trainer trainer 0.7"), done.stderr


def test_a_module_that_is_not_in_the_bundle_is_not_found(packed, tmp_path):
    done = probe(packed, "import trainer.prepare", tmp_path)
    assert "ModuleNotFoundError: No module named 'trainer.prepare'" in done.stderr


def test_sources_can_be_inspected(packed, tmp_path):
    function = packed_name("schedule", "lr_multiplier")
    done = probe(packed, f"import trainer.schedule as s; print(inspect.getsource(s.{function}))", tmp_path)
    assert done.stdout.startswith(f"def {function}("), done.stderr


def test_a_traceback_names_the_line_of_the_readable_source(packed, tmp_path):
    spec = tmp_path / "spec.json"
    spec.write_text("{")
    function = packed_name("protocol", "read_json")
    body = (
        f"import pathlib\nfrom trainer.protocol import {function} as read_json\n"
        f"try: read_json(pathlib.Path({str(spec)!r}))\n"
        "except Exception:\n import traceback; traceback.print_exc()"
    )
    done = probe(packed, body, tmp_path)
    try:
        protocol.read_json(spec)
    except ProtocolError as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
    assert f'train_gpt.py/trainer/protocol.py", line {frame.lineno}, in {function}' in done.stderr
    assert "raise ProtocolError(" in done.stderr


@given(st.binary(max_size=200).map(lambda content: b"\3" + content))
def test_bytes_come_back_from_their_text(content):
    text = bundle.as_text(content)
    assert not {"\0", "\r"} & set(text)
    if bundle.is_quotable(text):
        number = 0
        source = f"#coding:l1\nfound = r'''{text}'''"
        for code in executed(source.encode("latin-1"))["found"].encode("l1"):  # as the launcher has it
            number = number * 254 + code - 1 - (code > 13)
        assert number.to_bytes(len(content)) == content


def executed(source):
    namespace = {}
    exec(compile(source, "table", "exec"), namespace)  # our own text
    return namespace


def test_every_digit_can_stand_in_a_source(tmp_path):
    digits = "".join(chr(code) for code in range(1, 256) if code != 13)
    path = tmp_path / "digits.py"
    path.write_bytes(f"#coding:l1\nprint(ascii(r'''{digits}'''))".encode("latin-1"))
    done = subprocess.run([sys.executable, path], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ascii(digits)


@pytest.mark.parametrize(
    ("text", "is_quotable"),
    [("a''b", True), ("''a", True), ("a\\'b", True), ("a'''b", False), ("a'", False), ("a\\", False)],
)
def test_a_table_is_quotable_where_its_quotes_hold_it(text, is_quotable):
    assert bundle.is_quotable(text) == is_quotable
    if is_quotable:
        assert executed(f"found = r'''{text}'''")["found"] == text


def bytes_of(text):
    number = 0
    for code in text.encode("latin-1"):
        number = number * 254 + code - 1 - (code > 13)
    return number.to_bytes(number.bit_length() + 7 >> 3)


def test_a_table_that_cannot_be_quoted_is_packed_otherwise_or_refused():
    cut_off, open_ended, sound = (bytes_of(text) for text in ("a'''b", "a'", "ab"))
    assert "r'''ab'''" in bundle.launcher([cut_off, open_ended, sound])
    with pytest.raises(CaddieError, match="no packing of the trainer can be quoted"):
        bundle.launcher([cut_off, open_ended])


def test_the_smallest_packing_is_taken():
    sizes = [len(packed) for packed in bundle.packings("text of a table " * 99)]
    assert sizes == sorted(sizes) and len(sizes) > 4


def test_the_launcher_around_the_table_is_text_that_people_can_read():
    head, _, rest = bundle.build(load_preset("smoke")).decode("latin-1").partition("r'''")
    tail = rest.rpartition("'''")[2]
    assert (head + tail).isascii()
    assert head.startswith("#coding:l1\nimport brotli\n") and tail.endswith("exec(t[0])\n")


@pytest.mark.parametrize("change", [{"ttt.method": "off"}, {"model.qk_norm": False}, {"model.qk_gain": 0.0}])
def test_a_bundle_refuses_a_configuration_of_other_choices(packed, tmp_path, change):
    ((knob, value),) = change.items()
    config = to_mapping(with_knobs(load_preset("smoke"), change))
    spec = protocol.Spec(
        run_id=tmp_path.name, seed=1, replicate=0, preset="", config=config, data_dir="", manifest_sha256="", bundle_sha256="",
        code={},
    )  # fmt: skip
    protocol.write_spec(protocol.RunDir(tmp_path).spec, spec)
    done = subprocess.run([sys.executable, packed, tmp_path], capture_output=True, text=True, check=False)
    choice = {"ttt.method": "sgd"}.get(knob, "1")
    assert (done.returncode, done.stderr) == (
        3, f"error: {knob} is {value!r}; this code was packed for the choice {choice} alone\n",
    )  # fmt: skip


def test_code_that_no_choice_needs_is_left_out():
    config = load_preset("smoke")
    without = bundle.module_sources(ROOT, choices(with_knobs(config, {"quant.method": "rtn"})))
    assert "cholesky" in "".join(bundle.module_sources(ROOT, choices(config)).values())
    assert "cholesky" not in "".join(without.values())


@pytest.mark.parametrize("preset", ["pr1326", "smoke"])
def test_a_run_finds_in_its_spec_the_configuration_that_was_planned(tmp_path, preset):
    config = load_preset(preset)
    packed = tmp_path / "train_gpt.py"
    packed.write_bytes(bundle.build(config))
    derived = ["head_dim", "hidden"]
    body = (
        f"import json\nfrom trainer.config import {packed_name('config', 'from_mapping', preset)} as from_mapping\n"
        f"config = from_mapping(json.loads({json.dumps(to_mapping(config))!r}))\n"
        "print(json.dumps({name: vars(section) for name, section in vars(config).items()}))\n"
        f"print(json.dumps([getattr(config.model, name) for name in {derived}]))"
    )
    done = probe(packed, body, tmp_path)
    values, properties = (json.loads(line) for line in done.stdout.splitlines())
    assert json.dumps(values, sort_keys=True) == json.dumps(to_mapping(config), sort_keys=True)
    assert properties == [getattr(config.model, name) for name in derived]


BROKEN = [
    ({"model": {"layers": 0}}, "model.layers must be at least 1, got 0"),
    ({"optim": {"adam_beta1": "high"}}, "optim.adam_beta1 must be of type float, got 'high'"),
    ({"ttt": {"method": "adam"}}, "ttt.method must be one of sgd, adamw, lora, off, got 'adam'"),
    ({"model": {"heads": 7}}, "model: width 512 must be a multiple of heads 7"),
    ({"model": {"layrs": 3}}, "[model] has no key 'layrs'"),
    ({"modell": {}}, "there is no section [modell]"),
    ({"data": {"tokens_per_step": 2049}}, "data.tokens_per_step 2049 must be a multiple of data.sequence_length 2048"),
    ({"ttt": {"chunk_tokens": 100}}, "ttt.chunk_tokens 100 must be a multiple of evaluation.sequence_length 2048"),
]
"""Configurations that a bundle takes on trust, and what is wrong with them."""


@pytest.mark.parametrize(("values", "message"), BROKEN)
def test_what_the_bundle_takes_on_trust_is_refused_when_a_run_is_planned(tmp_path, values, message):
    with pytest.raises(ConfigError) as of_source:
        from_mapping(values)
    preset = tmp_path / "preset.toml"
    tables = [f"[{section}]\n" + "".join(f"{k} = {v!r}\n" for k, v in keys.items()) for section, keys in values.items()]
    preset.write_text("".join(tables))
    with pytest.raises(ConfigError) as of_plan:
        load_preset(str(preset))
    assert str(of_source.value).startswith(message)
    assert f"{preset}: {message}" in str(of_plan.value)


def test_what_the_bundle_takes_on_trust_is_refused_when_the_source_is_run(tmp_path):
    config = to_mapping(Config())
    config["model"]["layers"] = 0
    code = "import sys; from trainer.main import main; sys.exit(main())"
    spec = protocol.Spec(
        run_id=tmp_path.name, seed=1, replicate=0, preset="", config=config, data_dir="", manifest_sha256="", bundle_sha256="",
        code={},
    )  # fmt: skip
    protocol.write_spec(protocol.RunDir(tmp_path).spec, spec)
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": str(ROOT.parent)},
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (3, "error: model.layers must be at least 1, got 0\n")


def test_the_code_state_names_the_commit_of_a_checkout():
    state = bundle.code_state()
    assert not state or len(state["git_sha"]) == 40
