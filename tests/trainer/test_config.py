import typing
from typing import Any

import pytest

from trainer.config import SECTIONS, Config, from_mapping, parse_value, to_mapping, with_knobs
from trainer.errors import ConfigError


def test_every_section_is_a_field_of_the_configuration_by_the_same_name() -> None:
    assert typing.get_type_hints(Config) == SECTIONS


def test_what_is_not_given_has_its_default() -> None:
    assert from_mapping({}) == Config()
    assert from_mapping({"model": {"layers": 12}}) == with_knobs(Config(), {"model.layers": 12})


def test_a_configuration_comes_back_from_its_plain_values() -> None:
    config = with_knobs(Config(), {"model.recurrence_layers": (3, 4), "optim.matrix_lr": 1})
    assert from_mapping(to_mapping(config)) == config


DOCUMENT = {"ttt.method": "lora", "ttt.lora_unit": "document"}


@pytest.mark.parametrize(
    ("knobs", "message", "hint"),
    [
        ({"ttt.lora_targets": ("q", "key")}, "ttt.lora_targets must name some of q, k, v, out, up, down, mlp, head, got 'key'", "there are"),
        ({"ttt.lora_targets": ("q", "q")}, "ttt.lora_targets must name each target once, got ['q', 'q']", None),
        ({"ttt.lora_targets": ()}, "ttt.lora_targets must name each target once, got []", None),
        ({"ttt.parameters": "query", "ttt.frozen_blocks": 11}, "ttt.frozen_blocks 11 must be below model.layers 11", "nothing"),
        ({"ttt.method": "lora", "ttt.frozen_blocks": 11}, "ttt.frozen_blocks 11 must be below model.layers 11", "nothing"),
        ({"ttt.frozen_blocks": 12}, "ttt.frozen_blocks 12 must not exceed model.layers 11", None),
        ({**DOCUMENT, "ttt.document_tokens": 4096}, "ttt.document_tokens 4096 must not exceed evaluation.sequence_length 2048", None),
        ({"evaluation.protocol": "document"}, "evaluation.protocol must be one of sliding, flat, documents, got 'document'", "documents"),
    ],
)  # fmt: skip
def test_what_cannot_be_scored_or_learned_is_refused(knobs: dict[str, Any], message: str, hint: str | None) -> None:
    with pytest.raises(ConfigError) as caught:
        with_knobs(Config(), knobs)
    assert str(caught.value) == message
    assert hint is None or hint in (caught.value.hint or "")


def test_a_chunk_of_any_size_is_no_concern_where_documents_are_the_unit() -> None:
    assert with_knobs(Config(), {**DOCUMENT, "ttt.chunk_tokens": 100}).ttt.is_by_document
    with_knobs(
        Config(), {"ttt.method": "lora", "ttt.lora_targets": ("head",), "ttt.frozen_blocks": 11}
    )  # the head learns


def test_targets_come_from_a_command_line_and_from_toml() -> None:
    assert parse_value("ttt.lora_targets", "q, k,head") == ("q", "k", "head")
    assert from_mapping({"ttt": {"lora_targets": ["mlp"]}}).ttt.lora_targets == ("mlp",)
