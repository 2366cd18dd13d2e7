import dataclasses
import subprocess
import sys

import pytest
from fakes import FAKE_BUNDLE, subprocess_environment, tiny_study
from make_controller import controller

from orchestrator.errors import ConfigError
from orchestrator.identity import identity_of
from orchestrator.record_attempt import record_study


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"high": 0.2}, "space"),
        ({"settings": '"ttt.epochs" = 1'}, "configuration"),
        ({"seeds": "[7]"}, "seeds"),
    ],
)
def test_a_changed_question_is_refused(home, change, word):
    controller(tiny_study(), home).run()
    with pytest.raises(ConfigError, match=f"tiny: the {word} changed since the study was opened") as caught:
        controller(tiny_study(**change), home).run()
    assert "new name" in caught.value.hint


def test_other_data_and_another_trainer_are_refused(home):
    controller(tiny_study(), home).run()
    with pytest.raises(ConfigError, match="the data and the trainer changed"):
        controller(tiny_study(), home, manifest_sha256="other", pack=lambda config: FAKE_BUNDLE + b"#").run()
    study = tiny_study()
    objective = dataclasses.replace(study, search=dataclasses.replace(study.search, objective="sliding"))
    with pytest.raises(ConfigError, match="the objective changed"):
        controller(objective, home).run()


def test_a_record_attempt_is_not_continued_with_another_trainer(home):
    study = record_study("smoke", data="d", seeds=(1, 2), knobs={}, name="mine")
    controller(study, home).run()
    with pytest.raises(ConfigError, match="the trainer changed"):
        controller(study, home, pack=lambda config: FAKE_BUNDLE + b"#").run()


def test_the_identity_of_a_study_is_the_same_in_every_process():
    study = tiny_study()
    code = (
        "import sys; from orchestrator.study_file import parse_study; from orchestrator.identity import identity_of; "
        "print(identity_of(parse_study(sys.stdin.read()), manifest_sha256='m', bundle_sha256='b'))"
    )
    other = subprocess.run(
        [sys.executable, "-c", code],
        input=study.source,
        capture_output=True,
        text=True,
        env=subprocess_environment(),
        check=True,
    )
    assert other.stdout.strip() == str(identity_of(study, manifest_sha256="m", bundle_sha256="b"))
