"""The checks of all chapters, on ``RIGHT`` answers and on ``WRONG`` ones, each under a part of its sentence."""

import importlib
import sys
from pathlib import Path

import pytest
import torch

from vitlib.course import checks
from vitlib.model import EncoderBlock

ANSWERS = [importlib.import_module(path.stem) for path in sorted(Path(__file__).parent.glob("answers_[0-9]*.py"))]
RIGHT = {name: answers for module in ANSWERS for name, answers in module.RIGHT.items()}
WRONG = {name: answers for module in ANSWERS for name, answers in module.WRONG.items()}


def raises(error):
    def answer(*args):
        raise error

    return answer


HOSTILE = {
    "a number": 3,
    "a text": "word",
    "nothing in it": "",
    "a tensor": torch.eye(3),
    "a class": int,
    "a module": torch.nn.Linear(2, 2),
    "takes nothing": lambda: 1,
    "gives a number": lambda *args: 1,
    "gives a text": lambda *args: "word",
    "gives a list": lambda *args: [],
    "gives its first argument": lambda first, *args: first,
    "gives all its arguments": lambda *args: args,
    "gives nan": lambda *args: float("nan"),
    "gives a huge number": lambda *args: 10**400,
    "gives an empty tensor": lambda *args: torch.empty(0),
    "gives a complex tensor": lambda first, *args: torch.zeros(getattr(first, "shape", ()), dtype=torch.complex64),
    "gives a tensor without storage": lambda first, *args: torch.zeros(getattr(first, "shape", ()), device="meta"),
    "leaves": sys.exit,
    "raises": raises(ValueError("word " * 100)),
    "calls itself": lambda *args: HOSTILE["calls itself"](*args),
}


def cases(answers):
    return [(name, label, answer) for name, named in answers.items() for label, answer in named.items()]


def test_every_check_is_tried_on_a_right_answer_and_on_three_wrong_ones():
    assert list(RIGHT) == list(WRONG) == list(checks.ALL)
    for name in checks.ALL:
        assert RIGHT[name], name
        assert len(WRONG[name]) >= 3, f"{name}: wrong answers with a message of their own"


def verdict_of(name, answer, verdict):
    """The check's verdict; it leaves random numbers and gradients as they were, here switched off."""
    before = torch.get_rng_state()
    with torch.no_grad():
        said = verdict(checks.ALL[name], answer)
        assert not torch.is_grad_enabled()
    assert torch.equal(torch.get_rng_state(), before)
    return said


@pytest.mark.parametrize(("name", "label", "answer"), cases(RIGHT))
def test_a_right_answer_is_correct_each_time(name, label, answer, verdict):
    assert {verdict_of(name, answer, verdict) for _ in range(4)} == {"correct"}


@pytest.mark.parametrize(("name", "fragment", "answer"), cases(WRONG))
def test_a_wrong_answer_is_told_what_is_wrong(name, fragment, answer, verdict):
    for _ in range(3):
        said = verdict_of(name, answer, verdict)
        assert said.startswith("not yet: ") and fragment in said


@pytest.mark.parametrize("name", checks.ALL)
def test_nothing_handed_over_makes_a_check_crash(name, verdict):
    for label, hostile in HOSTILE.items():
        assert verdict(checks.ALL[name], hostile) != "correct", label


def dots(*args):
    """What it does."""
    return ...  # to be filled in


def bare(*args): ...


def half_done(*args):
    args = args[:1]
    return ...


@pytest.mark.parametrize("stub", [None, ..., dots, bare])
def test_an_untouched_stub_is_not_attempted_yet(stub, verdict):
    for check in checks.ALL.values():
        assert verdict(check, stub) == "not attempted yet"


def test_a_stub_inside_a_model_is_not_attempted_yet(verdict):
    assert verdict(checks.sound_model, importlib.import_module("answers_03").Stub) == "not attempted yet"


@pytest.mark.parametrize(
    ("attempt", "sentence"),
    [
        (lambda *args: None, "nothing came back: end the function with `return`"),
        (half_done, "`...` came back"),
    ],
)
def test_an_attempt_that_returns_nothing_gets_a_sentence(attempt, sentence, verdict):
    for name, check in checks.ALL.items():
        if name != "linear_probe":  # changes a model in place, and returns nothing
            assert sentence in verdict(check, attempt), name


def test_the_lines_of_the_block_compute_what_encoder_block_does():
    block, x = EncoderBlock(8, 2, 16).eval(), torch.randn(2, 5, 8)
    for parameter in block.parameters():  # else both norms are the same
        torch.nn.init.normal_(parameter)
    names = {"x": x, "norm1": block.norm1, "norm2": block.norm2, "mlp": block.mlp}
    names["attention"] = lambda y: block.attention(y)[0]
    for letter in RIGHT["block_order"]["one way"]:
        exec(checks.PRE_NORM_LINES[letter], names)
    assert torch.allclose(names["x"], block(x)[0], atol=1e-4)


def test_ctrl_c_still_stops_an_answer_that_never_ends():
    with pytest.raises(KeyboardInterrupt):
        checks.patchify(raises(KeyboardInterrupt()))
