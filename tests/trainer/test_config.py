import typing

from trainer.config import SECTIONS, Config, from_mapping, to_mapping, with_knobs


def test_every_section_is_a_field_of_the_configuration_by_the_same_name() -> None:
    assert typing.get_type_hints(Config) == SECTIONS


def test_what_is_not_given_has_its_default() -> None:
    assert from_mapping({}) == Config()
    assert from_mapping({"model": {"layers": 12}}) == with_knobs(Config(), {"model.layers": 12})


def test_a_configuration_comes_back_from_its_plain_values() -> None:
    config = with_knobs(Config(), {"model.recurrence_layers": (3, 4), "optim.matrix_lr": 1})
    assert from_mapping(to_mapping(config)) == config
