import ast

from orchestrator.cuts import UP_TO_ARROW, Cut, begin_of, cut_out, end_of, first_of

SOURCE = "def f(a) -> int:\n    return [\n        a, 'é', 2,\n    ]  # end\n"


def test_what_is_cut_out_leaves_its_line_breaks():
    found = cut_out(SOURCE, [Cut((2, 4), (4, 5), "pass")])
    assert found == "def f(a) -> int:\n    pass\n\n  # end\n"


def test_columns_are_bytes():
    assert cut_out(SOURCE, [Cut((3, 15), (3, 16), "3")]).splitlines()[2] == "        a, 'é', 2,".replace(", 2", "3 2")


def test_an_arrow_goes_with_what_stands_behind_it():
    assert cut_out(SOURCE, [Cut((1, 12), (1, 15), UP_TO_ARROW)]).startswith("def f(a) :\n")


def test_a_cut_inside_another_goes_with_it():
    cuts = [Cut((3, 8), (3, 9), "b"), Cut((2, 11), (4, 5), "1")]
    assert cut_out(SOURCE, cuts) == cut_out(SOURCE, cuts[1:])


def test_a_statement_begins_with_its_decorators():
    (function,) = ast.parse("@one\n@two()\ndef f():\n    pass\n").body
    assert (first_of(function), begin_of(function), end_of(function)) == ((1, 0), (3, 0), (4, 8))
