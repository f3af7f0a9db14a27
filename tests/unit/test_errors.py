from __future__ import annotations

import pytest

from harness.errors import DataError, UnknownName, Unsupported, explanation

CONSTRAINTS = """Constraints violated (batch)! For more information, run with TORCH_LOGS="+dynamic".
  - You marked batch as dynamic but your code specialized it to be a constant (2).
Suggested fixes:
  batch = 2

The error above occurred when calling torch.export.export. If you would like to view some more information"""
CONVERSION = """
Failed to convert the node <node> failed with OpConversionFailure:

Training mode is not supported for Dropout op

⬆️
more"""
OPENVINO = """Exception from src/inference/src/cpp/core.cpp:107:
Exception from src/inference/src/dev/plugin.cpp:54:
Check 'shape.is_static()' failed at src/plugins/intel_cpu/src/graph.cpp:88:
the shape of 'x' is not known
"""


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (ValueError("one line"), "ValueError: one line"),
        (ValueError("one line.\nand a tail\nof more"), "ValueError: one line."),
        (ValueError(), "ValueError"),
        (ValueError("\n \n"), "ValueError"),
        (KeyError("a"), "KeyError: 'a'"),
        (Unsupported("the layer 'a' is odd"), "the layer 'a' is odd"),
        (
            RuntimeError(CONSTRAINTS),
            "RuntimeError: Constraints violated (batch)! "
            "You marked batch as dynamic but your code specialized it to be a constant (2).",
        ),
        (
            RuntimeError(CONVERSION),
            "RuntimeError: Failed to convert the node <node> failed with OpConversionFailure: "
            "Training mode is not supported for Dropout op",
        ),
        (
            RuntimeError(OPENVINO),
            "RuntimeError: Check 'shape.is_static()' failed at src/plugins/intel_cpu/src/graph.cpp:88: "
            "the shape of 'x' is not known",
        ),
        (RuntimeError("a:\nb:\nc:\nd"), "RuntimeError: a: b: c:"),
        (ExceptionGroup("two", [ValueError("first"), KeyError("k")]), "ValueError: first"),
        (RuntimeError("\x1b[31mred\u202e"), r"RuntimeError: \x1b[31mred\u202e"),
    ],
)
def test_the_line_that_explains_is_kept(error: Exception, expected: str) -> None:
    found = explanation(error)
    assert found.endswith(expected) if isinstance(error, ExceptionGroup) else found == expected
    assert found.isprintable()


def test_an_error_that_says_nothing_takes_its_causes_words() -> None:
    error = RuntimeError("the export failed:")
    error.__cause__ = ValueError("the operator 'x' is not known")
    assert explanation(error) == "RuntimeError: the export failed: ValueError: the operator 'x' is not known"
    empty, other = RuntimeError(), KeyError()
    empty.__cause__, other.__cause__ = other, empty
    assert explanation(empty).startswith("RuntimeError: KeyError")


class _Broken(Exception):
    def __str__(self) -> str:
        raise ZeroDivisionError


def test_an_explanation_is_always_there_and_bounded() -> None:
    assert explanation(_Broken()) == "_Broken"
    for text in ("x" * 10**7, "x:\n" * 10**6, "\n" * 10**7):
        assert len(explanation(ValueError(text))) <= 500


def test_a_long_unknown_name_is_cut() -> None:
    assert len(str(UnknownName("method", "x" * 10**7, ["a", "b"]))) < 300
    assert "Did you mean 'magnitude'?" in str(UnknownName("method", "magnitud", ["magnitude"]))
    assert DataError.exit_code == 2
