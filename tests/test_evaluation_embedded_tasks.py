"""The embedded tasks: deterministic, balanced, and nothing but the match tells the answer."""

from collections import Counter

import pytest

from prunelib.evaluation import embedded_tasks as docitems
from prunelib.text import embedded as pydocs

TASKS = tuple(docitems.BUILDERS)


@pytest.fixture(scope="module")
def documents() -> tuple[pydocs.Document, ...]:
    return pydocs.records("pydocs", "evaluation")


@pytest.fixture(scope="module")
def built(documents) -> dict[str, tuple[docitems.Item, ...]]:
    return {task: docitems.build(task, documents) for task in TASKS}


@pytest.mark.parametrize("task", TASKS)
def test_the_same_corpus_gives_the_same_items_with_an_answer_at_every_place(task, documents, built):
    found, count = built[task], 2 if task == "pydocs_yes_no" else 4
    assert len(found) >= 500 and docitems.build(task, tuple(reversed(documents))) == found
    for item in found:
        assert len(item.choices) == len({" ".join(choice.lower().split()) for choice in item.choices}) == count
        assert bool(item.query) != bool(item.continuation)
        assert all(choice.strip() for choice in item.choices)
    places = Counter(item.label for item in found)
    assert sorted(places) == list(range(count)) and max(places.values()) < 1.28 * len(found) / count
    assert max(Counter(item.document for item in found).values()) <= docitems.PER_DOCUMENT
    examples = docitems.items(task, "calibration")
    assert not {item.document for item in examples} & {document.name for document in documents}


def test_answers_come_from_their_documents(documents, built):
    texts = {document.name: document.text for document in documents}
    for item in built["pydocs_next_line"]:
        lines = [line.rstrip() for line in texts[item.document].splitlines()]
        query, answer = item.query.splitlines(), item.choices[item.label]
        start = next(i for i in range(len(lines)) if lines[i : i + len(query) + 1] == [*query, answer])
        assert all(choice in lines for choice in item.choices)
        assert not set(item.choices) & set(lines[start : start + len(query)])
        assert len({len(choice) - len(choice.lstrip()) for choice in item.choices}) == 1
    for item in built["pydocs_summary"]:
        assert texts[item.document].strip().startswith(item.choices[item.label] + "\n")
        assert item.continuation.strip() in texts[item.document]
    for item in built["pydocs_parameter"]:
        heads = [choice.splitlines()[-1] for choice in item.choices]
        assert all(head in texts[item.document] for head in heads)
        assert heads[item.label] + item.continuation in texts[item.document]


def test_letters_list_the_questions_of_the_summaries(built):
    asked = {item.document: item for item in built["pydocs_summary"]}
    assert {item.document for item in built["pydocs_letters"]} == set(asked)
    for item in built["pydocs_letters"]:
        question = asked[item.document]
        lines = item.query.splitlines()
        assert lines[-5:-1] == [f"{letter}. {choice}" for letter, choice in zip("ABCD", question.choices, strict=True)]
        assert item.query.startswith(question.continuation.strip() + "\n")
        assert (item.choices, item.label) == (("A", "B", "C", "D"), question.label)


def test_yes_is_right_for_the_own_summary_and_exactly_half_of_the_time(documents, built):
    texts = {document.name: document.text.strip() for document in documents}
    summaries = {text.splitlines()[0] for text in texts.values()}
    found = built["pydocs_yes_no"]
    assert Counter(item.choices[item.label] for item in found) == {"yes": 250, "no": 250}
    assert len({item.document for item in found}) == len(found)
    for item in found:
        paragraph, question, prompt = item.query.rsplit("\n", 2)
        told = question.removeprefix("Question: Is this its summary? ")
        assert prompt == "Answer:" and told in summaries and paragraph.strip() in texts[item.document]
        assert texts[item.document].startswith(told + "\n") == bool(item.label)


def test_a_shared_description_is_no_answer():
    text = (
        "Mix two colors.\n\nParameters\n----------\na : float\n    Weight of the first color.\n"
        "b : float\n    The same for both of them.\nc : float\n    The same for both of them.\n"
        "d : str\n    Name of the mixed color.\ne : bool\n    Whether to write down the name.\n\n"
        "Returns\n-------\nf : float\n    What came out of all this mixing.\n"
    )
    # Three descriptions of their own are one choice too few; what is returned is no parameter.
    assert not docitems.build("pydocs_parameter", [pydocs.Document("p/m.py:mix", text)])
    told = text.replace("c : float\n    The same for both of them.", "c : float\n    Weight of the third of the colors.")
    items = docitems.build("pydocs_parameter", [pydocs.Document("p/m.py:mix", told)])
    assert len(items) == docitems.PER_DOCUMENT
    assert not any("f : float" in choice for item in items for choice in item.choices)


def test_unknown_task_and_poor_corpus(monkeypatch):
    with pytest.raises(ValueError, match="pydocs_next_line"):
        docitems.items("pydocs_last_line")
    monkeypatch.setattr(docitems, "ITEMS", 100_000)
    with pytest.raises(ValueError, match=r"requirements\.lock"):
        docitems.items.__wrapped__("pydocs_summary")
