"""Metrics on answers scored by hand."""

from __future__ import annotations

import difflib

import pytest

from fluxion_jax.evaluation import metrics


def test_substrings_count_whatever_their_case():
    assert metrics.share_found("It is BLUE and 42.", ["blue", "42", "red"]) == pytest.approx(2 / 3)
    assert metrics.any_found("It is BLUE.", ["red", "blue"]) == 1
    assert metrics.any_found("It is green.", ["red", "blue"]) == 0


def test_token_f1_ignores_articles_punctuation_and_case():
    # Two of three words shared with a reference of two: precision 2/3, recall 1.
    assert metrics.token_f1("The Old man!", ["an old man"]) == 1
    assert metrics.token_f1("very old man", ["old man"]) == pytest.approx(0.8)
    assert metrics.token_f1("old old", ["old man"]) == pytest.approx(0.5)
    assert metrics.token_f1("sea", ["old man", "the sea"]) == 1
    assert metrics.token_f1("", ["old"]) == 0


def test_accuracy_is_equality_after_normalising():
    assert metrics.accuracy(" The B. ", ["b"]) == 1
    assert metrics.accuracy("b c", ["b"]) == 0


def test_edit_similarity_counts_insertions_and_deletions():
    # "kitten" and "sitting" share "ittn": 2 * 4 / 13.
    assert metrics.edit_similarity("kitten", ["sitting"]) == pytest.approx(8 / 13)
    assert metrics.edit_similarity("abc", ["xyz", "abd"]) == pytest.approx(4 / 6)
    assert metrics.edit_similarity("", [""]) == 1
    lines = metrics.edit_similarity_of_lines("a\nb\nc\nd", ["a\nb"])
    assert lines == 1


def test_the_longest_subsequence_is_no_shorter_than_any_found_otherwise():
    first, second = "abcbdabxaabbcd" * 3, "bdcabaxbadcb" * 3
    table = [[0] * (len(second) + 1) for _ in range(len(first) + 1)]
    for i, a in enumerate(first):
        for j, b in enumerate(second):
            table[i + 1][j + 1] = (
                table[i][j] + 1 if a == b else max(table[i][j + 1], table[i + 1][j])
            )
    assert metrics.longest_common_subsequence(first, second) == table[-1][-1]
    matched = difflib.SequenceMatcher(None, first, second, autojunk=False).get_matching_blocks()
    assert sum(block.size for block in matched) <= table[-1][-1]


def test_an_interval_holds_the_mean_and_shrinks_with_samples():
    few, many = [0.0, 1.0] * 10, [0.0, 1.0] * 250
    low, high = metrics.bootstrap_interval(few)
    assert low < 0.5 < high
    assert (low, high) == metrics.bootstrap_interval(few)
    narrow = metrics.bootstrap_interval(many)
    # A binomial mean of 500: 1.96 * 0.5 / sqrt(500) to either side.
    assert narrow == pytest.approx((0.5 - 0.0438, 0.5 + 0.0438), abs=0.006)
    assert metrics.bootstrap_interval([0.25] * 7) == (0.25, 0.25)
