"""Scores: upstream's, to the letter."""

import pytest

from loki_attn.errors import UnknownNameError
from loki_attn.evaluate import ruler
from loki_attn.evaluate.ruler.scoring import recall_all, recall_any


def test_recall_of_all_is_the_share_of_the_references():
    references = ("1111111", "2222222", "3333333", "4444444")
    assert recall_all("They are 1111111, 3333333 and 4444444.", references) == 0.75
    assert recall_all("", references) == 0
    assert recall_all(" ".join(references), references) == 1


def test_recall_of_any_is_that_of_the_best():
    assert recall_any("It was Elmford.", ("Alder", "elmford")) == 1
    assert recall_any("It was Dunbury.", ("Alder", "elmford")) == 0


@pytest.mark.parametrize("recall", [recall_all, recall_any])
def test_case_and_surroundings_do_not_matter(recall):
    assert recall("\n  the answer is: hArBour-lantern!", ["Harbour-Lantern"]) == 1


@pytest.mark.parametrize("recall", [recall_all, recall_any])
def test_control_characters_become_line_ends(recall):
    assert recall("one\x00two", ["one\ntwo"]) == 1
    assert recall("one\ttwo", ["one\ttwo"]) == 0
    assert recall("\x00 one \x1f", [" one"]) == 0


def test_a_task_is_scored_by_its_kind():
    by_task = {task: ruler.score(task, "a", ("a", "b")) for task in ruler.TASKS}
    assert {task for task, score in by_task.items() if score == 1} == {"qa_1", "qa_2"}
    assert {score for task, score in by_task.items() if task[:2] != "qa"} == {0.5}
    with pytest.raises(UnknownNameError, match=r"Unknown RULER task 'vtt'\. Did you mean 'vt'"):
        ruler.score("vtt", "a", ("a",))
