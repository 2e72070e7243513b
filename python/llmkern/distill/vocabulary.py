"""Whether the classes of two models mean the same tokens."""

from __future__ import annotations

from typing import Any

# Text that tokenizers of one vocabulary may still cut differently: spaces, digits, case, accents, code, other scripts.
SAMPLE = "The 3rd café: naïve  test_case(x=10.25);\n\tdef f(): return 'Ünïcödé' + \"日本語\" # don't"


def check_tokenizers(student: Any, teacher: Any) -> None:
    """ValueError unless both tokenizers give every text the same ids; it names the first token that differs.

    Compared are the vocabularies, added tokens included, and the ids of a sample of text. Sizes of embeddings, which
    are often padded, play no part.
    """
    ours, theirs = ({number: token for token, number in t.get_vocab().items()} for t in (student, teacher))
    for number in sorted(ours.keys() | theirs.keys()):
        one, other = ours.get(number), theirs.get(number)
        if one != other:
            raise ValueError(
                f"check_tokenizers: the tokenizers differ: token {number} is {_name(one)} for the student and "
                f"{_name(other)} for the teacher"
            )
    one, other = (t(SAMPLE, add_special_tokens=False)["input_ids"] for t in (student, teacher))
    if one != other:
        at = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
        raise ValueError(
            f"check_tokenizers: the tokenizers have the same tokens but cut text differently: token {at} of a sample "
            f"is {_name(ours.get(_at(one, at)))} for the student, {_name(theirs.get(_at(other, at)))} for the teacher"
        )


def check_classes(student: int, teacher: int, tokenizers: tuple[Any, Any] | None, shared_prefix: bool) -> None:
    """ValueError unless heads of so many classes may be compared class by class, over the first that both have."""
    if tokenizers is not None:
        check_tokenizers(*tokenizers)
    elif student != teacher and not shared_prefix:
        raise ValueError(
            f"DistillWrapper: the student has {student} classes and the teacher {teacher}; give tokenizers=(student's, "
            "teacher's), which are compared, or shared_prefix=True if the classes that both have are the same tokens"
        )


def _name(token: str | None) -> str:
    return "none" if token is None else repr(token)


def _at(ids: list[int], at: int) -> int:
    return ids[at] if at < len(ids) else -1
