"""What the check of chapter 01 does with a stub that is no answer and no plain ``...`` either."""

from vitlib.course import checks


def test_two_dots_for_two_numbers_count_as_not_attempted(verdict):
    assert verdict(checks.patch_numbers, lambda h, w, c, p: (..., ...)) == "not attempted yet"
