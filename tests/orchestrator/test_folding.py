import ast
import types

import pytest

from orchestrator.bundle import CONFIG, ENTRY, MODULES, PACKAGE, ROOT
from orchestrator.errors import CaddieError
from orchestrator.folding import KINDS, SWITCHES, choices, fold
from orchestrator.inference import Program
from orchestrator.presets import load_preset
from trainer.config import SECTIONS, Config, with_knobs

CLASSES = """\
FOLDED = ""
class ModelConfig:
    qk_norm: bool
    tie_embeddings: bool
    skips: str
    rope_dims: int
    qk_gain: float
    layers: int
    parallel_start_layer: int
    recurrence_layers: tuple[int, ...]
    @property
    def has_recurrence(self) -> bool:
        return bool(self.recurrence_layers)
class Config:
    model: ModelConfig
"""
"""What the folded code is typed by; a copy of the trainer's, with what the tests read."""

KNOBS = {
    "model.qk_norm": True, "model.tie_embeddings": False, "model.skips": "gated", "model.rope_dims": 4,
    "model.qk_gain": 0.0, "model.parallel_start_layer": -1, "model.recurrence_layers": (1,), "model.layers": 11,
}  # fmt: skip


def folded(body, **knobs):
    """The body of a module after folding, without the classes before it."""
    chosen = {**KNOBS, **{f"model.{name}": value for name, value in knobs.items()}}
    source = CLASSES + body
    found = fold({"m": source}, choices(with_knobs(Config(), chosen)), entry="main", table_in="m")["m"]
    assert found.count("\n") == source.count("\n")
    return "\n".join(found.splitlines()[CLASSES.count("\n") :])


def run(body, **knobs):
    """What `main` gives for the configuration."""
    values = {**KNOBS, **{f"model.{name}": value for name, value in knobs.items()}}
    namespace = {}
    exec(compile(CLASSES + body, "m", "exec"), namespace)  # our own text
    config = namespace["Config"]()
    config.model = namespace["ModelConfig"]()
    for knob, value in values.items():
        setattr(config.model, knob.partition(".")[2], value)
    return namespace["main"](config)


HEAD = "def main(config: Config) -> object:\n    model = config.model\n"
"""Two lines that stay."""

FOLDS = [
    # expressions
    ("return 1 if model.qk_norm else 2", {}, "return 1"),
    ("return 1 if model.qk_norm else 2", {"qk_norm": False}, "return 2"),
    ("return (print if model.skips == 'off' else len)('ab')", {}, "return len('ab')"),
    ("return [model.layers if model.qk_norm else\n        2]", {}, "return [model.layers\n]"),
    ("return (\n        1 if model.qk_norm else\n        [2])", {"qk_norm": False}, "return (\n (\n[2]))"),
    ("return model.skips in ('gated', 'plain')", {}, "return True"),
    ("return model.skips not in ('gated', 'plain')", {}, "return False"),
    ("return not model.qk_norm, model.layers", {}, "return False, model.layers"),
    ("return model.layers > 2 and model.qk_norm and model.layers", {}, "return model.layers > 2 and model.layers"),
    ("return model.qk_norm or print('no')", {}, "return True"),
    ("return 5 if model.layers == 11 and model.tie_embeddings else 6", {}, "return 6"),
    ("return model.rope_dims if model.rope_dims else None", {}, "return model.rope_dims"),
    ("return model.qk_gain > 0, model.rope_dims > 0", {}, "return False, True"),
    ("return 0 <= model.parallel_start_layer <= 7", {}, "return 0 <= model.parallel_start_layer <= 7"),
    ("return 0 <= model.parallel_start_layer <= 7", {"parallel_start_layer": 2}, "return model.parallel_start_layer <= 7"),
    ("return model.has_recurrence", {}, "return True"),
    ("return model.has_recurrence", {"recurrence_layers": ()}, "return False"),
    ("return {'gated': model.layers, 'off': 0}[model.skips]", {}, "return (model.layers)"),
    ("return model.tie_embeddings * (model.qk_gain + 1)", {}, "return False * (model.qk_gain + 1)"),
    ("return (model.skips == 'off') * model.rope_dims", {}, "return 0"),
    ("return f'{1 if model.qk_norm else 2}'", {}, "return f'{1 if model.qk_norm else 2}'"),
    ("return (config is model) and model.qk_norm", {}, "return (config is model)"),
    ("return model.layers and model.qk_norm", {}, "return model.layers and True"),
    # statements
    ("for _ in range(model.tie_embeddings * model.rope_dims):\n        print()\n    return 1", {}, "return 1"),
    ("if model.qk_norm:\n        return 1\n    return 2", {}, "return 1"),
    ("if model.qk_norm:\n        return 1\n    return 2", {"qk_norm": False}, "return 2"),
    ("if model.qk_norm: return 1\n    else: return 2", {}, "return 1"),
    ("if model.qk_norm: return 1\n    else: return 2", {"qk_norm": False}, "return 2"),
    ("if model.qk_norm:\n        return 1\n    else:  # why\n        return 2", {"qk_norm": False}, "return 2"),
    ("if model.skips == 'off':\n        return 1\n    elif model.layers:\n        return 2", {}, "if model.layers:\n return 2"),
    (
        "if model.layers > 20:\n        return 1\n    elif model.qk_norm:\n        return 2\n    else:\n        return 3",
        {},
        "if model.layers > 20:\n return 1\nelse:\n return 2",
    ),
    (
        "if model.layers > 20:\n        return 1\n    elif model.qk_norm:\n        return 2\n    else:\n        return 3",
        {"qk_norm": False},
        "if model.layers > 20:\n return 1\nelse:\n return 3",
    ),
    (
        "if model.layers > 20:\n        return 1\n    elif model.qk_norm:\n        return 2\n    return 3",
        {"qk_norm": False},
        "if model.layers > 20:\n return 1\nreturn 3",
    ),
    ("for _ in range(2):\n        if model.tie_embeddings:\n            print()\n    return 4", {}, "for _ in range(2):\n 0\nreturn 4"),
    ("if model.qk_norm:\n        return '''a\n        b'''\n    return 1", {}, "return '''a\n b'''"),
    ("found = None\n    if model.qk_norm:\n        found = model.layers\n    return found", {}, "found = model.layers\nreturn found"),
    ("is_on = model.skips == 'off'\n    if is_on:\n        return 1\n    return 2", {}, "return 2"),
    ("is_on, two = model.skips == 'off', 2\n    return [two] if is_on else two", {}, "two = 2\nreturn two"),
    ("two, is_on = 2, model.skips == 'off'\n    return [two] if is_on else two", {}, "two = 2\nreturn two"),
]  # fmt: skip


def squeezed(text):
    """Without blank lines, each level one space."""
    lines = [line for line in text.splitlines()[2:] if line.strip()]
    return "\n".join(" " * ((len(line) - len(line.lstrip()) - 4) // 4) + line.strip() for line in lines)


@pytest.mark.parametrize(("body", "knobs", "expected"), FOLDS)
def test_what_a_choice_decides_is_decided(body, knobs, expected):
    source = HEAD + f"    {body}\n"
    found = folded(source, **knobs)
    assert squeezed(found) == expected
    assert run(found, **knobs) == run(source, **knobs)


KEPT = [
    ("return 1 if print(end='') and model.tie_embeddings else 2", "1 if print(end='') and"),  # what is done before
    ("value = model.qk_norm\n    for _ in range(2):\n        value = not value\n    return value", "return value"),
    (
        "other = config\n    if model.layers < 0:\n        other = 1\n    return other.model.qk_norm",
        "other.model.qk_norm",
    ),
    ("return [model.qk_norm for model in [config.model]][0]", "model.qk_norm for"),  # another `model`
    ("return (lambda model: model.qk_norm)(model)", "model.qk_norm)(model)"),
    ("return getattr(model, 'qk_norm')", "getattr(model, 'qk_norm')"),
]


@pytest.mark.parametrize(("body", "kept"), KEPT)
def test_what_cannot_be_followed_stays_as_it_is(body, kept):
    source = HEAD + f"    {body}\n"
    assert kept in folded(source)
    assert run(folded(source)) == run(source)


CALLS = """\
class Box:
    def __init__(self, size: int, is_big: bool) -> None:
        self.size, self.is_big = size, is_big
        self.extra = [] if is_big else None
    def width(self, *, doubles: bool = True) -> int:
        return 2 * self.size if doubles and self.is_big else self.size
def helper(number: int, word: str, flag: bool = False) -> int:
    if word == "gated":
        return number
    return number + 1 if flag else -number
def main(config: Config) -> object:
    box = Box(config.model.layers, config.model.qk_norm)
    extra = "none" if box.extra is None else "some"
    return extra, helper(box.width(), config.model.skips), helper(2, word=config.model.skips)
"""


@pytest.mark.parametrize("knobs", [{}, {"skips": "off"}, {"qk_norm": False}])
def test_choices_are_followed_through_calls_and_attributes(knobs):
    found = folded(CALLS, **knobs)
    assert run(found, **knobs) == run(CALLS, **knobs)
    assert "config.model.skips" not in found and "config.model.qk_norm" not in found
    assert "doubles" not in found and "flag" not in found and "word" not in found


def test_a_function_that_returns_what_is_known_is_known():
    source = (
        "def steps(config: Config, number: int) -> int:\n"
        "    return config.model.rope_dims if config.model.qk_norm else 0 * number\n"
        "class Box:\n    def __init__(self, config: Config) -> None:\n"
        "        self.steps, self.size = steps(config, 2), 5\n        self.unread = config.model.layers\n"
        "def main(config: Config) -> object:\n    for _ in range(steps(config, 3)):\n        print(end='')\n"
        "    return Box(config).size\n"
    )
    assert run(folded(source, qk_norm=False), qk_norm=False) == run(source, qk_norm=False) == 5
    assert "print" not in folded(source, qk_norm=False) and "print" in folded(source)
    assert "unread" not in folded(source) and "self.size = 5" in folded(source, qk_norm=False)


def test_a_function_that_is_handed_on_keeps_its_parameters():
    source = (
        "def helper(number: int, flag: bool = False) -> int:\n    return number if flag else -number\n"
        "def main(config: Config) -> object:\n    return list(map(helper, [1, 2])) + [helper(3, config.model.qk_norm)]\n"
    )
    assert "def helper(number: int, flag: bool = False)" in folded(source)
    assert run(folded(source)) == run(source) == [-1, -2, 3]


def test_an_attribute_that_is_set_twice_is_not_a_constant():
    source = (
        "class Box:\n    def __init__(self, flag: bool) -> None:\n        self.flag = flag\n"
        "def main(config: Config) -> object:\n    box = Box(config.model.qk_norm)\n    box.flag = not box.flag\n"
        "    return 1 if box.flag else 2\n"
    )
    assert run(folded(source)) == run(source) == 2


def test_a_call_that_does_something_is_kept_where_its_value_is_known():
    source = (
        "seen: list[int] = []\ndef note() -> int:\n    seen.append(1)\n    return 1\n"
        "def main(config: Config) -> object:\n    if note() is None:\n        return 0\n    return len(seen)\n"
    )
    assert run(folded(source)) == run(source) == 1


def test_the_table_says_which_choices_were_folded_and_no_others():
    source = HEAD + "    return model.layers if model.qk_norm and model.rope_dims else model.qk_gain\n"
    found = fold({"m": CLASSES + source}, choices(with_knobs(Config(), KNOBS)), entry="main", table_in="m")["m"]
    table = ast.literal_eval(found.splitlines()[0].partition("=")[2].strip()).split(" ")
    names = sorted(KINDS, key=lambda knob: knob.split("."))
    assert {knob: choice for knob, choice in zip(names, table, strict=True) if choice} == {
        "model.qk_norm": "1", "model.rope_dims": "1", "model.recurrence_layers": "1",
    }  # fmt: skip


def test_trials_that_differ_in_numbers_have_the_same_choices():
    study = with_knobs(Config(), {"model.qk_gain": 2.5, "optim.muon_weight_decay": 0.0, "ttt.lr": 0.1})
    assert choices(study) == choices(Config())
    assert choices(with_knobs(Config(), {"model.qk_gain": 0.0})) != choices(Config())
    assert choices(with_knobs(Config(), {"ttt.method": "off"})) != choices(Config())


def test_every_switch_is_a_knob_with_a_number_or_a_list():
    assert all(KINDS[knob] not in (bool, str) for knob in SWITCHES)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (
            "def main(config: Config) -> object:\n    setattr(config, 'model', 1)\n",
            "m, line 17: setattr sets attributes",
        ),
        (HEAD + "    return vars(model)\n", "m, line 18: vars sets attributes that cannot be followed"),
    ],
)
def test_a_program_that_cannot_be_followed_is_refused(body, message):
    with pytest.raises(CaddieError, match=message):
        folded(body)


def test_a_program_without_the_table_is_refused():
    with pytest.raises(CaddieError, match="there is no FOLDED in which to say what was folded"):
        fold({"m": "def main():\n    pass\n"}, choices(Config()), entry="main", table_in="m")


OFF = {
    "model.qk_norm": False, "model.qk_gain": 0.0, "model.rope_dims": 0, "model.value_embedding_dim": 0,
    "model.residual_mix": False, "model.skips": "plain", "model.tie_embeddings": False, "model.recurrence_passes": 0,
    "model.parallel_start_layer": -1, "model.ln_scale": False, "model.logit_softcap": 0.0, "optim.ema_decay": 0.0,
    "optim.grad_clip_norm": 0.0, "optim.muon_row_normalize": False, "quant.method": "rtn",
    "ttt.method": "off", "schedule.clock": "step", "runtime.device": "cpu",
}  # fmt: skip


@pytest.mark.parametrize("knobs", [{}, OFF], ids=["pr1326", "off"])
def test_no_word_or_switch_of_the_configuration_is_read_by_a_folded_trainer(knobs):
    sources = {f"{PACKAGE}.{name}": (ROOT / f"{name}.py").read_text() for name in MODULES}
    config = with_knobs(load_preset("pr1326"), knobs)
    found = fold(sources, choices(config), entry=ENTRY, table_in=f"{PACKAGE}.{CONFIG}")
    program = Program({name: ast.parse(source) for name, source in found.items()})
    sections = {cls.__name__: section for section, cls in SECTIONS.items()}
    left = [
        ast.unparse(node)
        for node in program.nodes()
        if isinstance(node, ast.Attribute) and isinstance(owner := program.type_of(node.value), str)
        and KINDS.get(f"{sections.get(owner)}.{node.attr}") in (bool, str) and not program.places[node].is_in_text
    ]  # fmt: skip
    assert left == []
    for name, source in found.items():
        assert isinstance(compile(source, name, "exec"), types.CodeType)
        assert source.count("\n") == sources[name].count("\n")
