"""A data root of made-up benchmarks: small, and in the hub's fields."""

import json
import random

WORDS = ["the", "a", "cat", "dog", "saw", "ran", "far", "old", "new", "red", "is", "was", "not"]
SUBJECTS = ("abstract_algebra", "astronomy", "virology")


def data_root(folder, count=12):
    """Write every set of lm-eval's six benchmarks below a folder, and return it."""
    random.seed(0)
    write(folder, "arc_challenge/train", arc(30))
    write(folder, "arc_challenge/validation", arc(5))
    write(folder, "arc_challenge/test.part0", arc(count // 2))
    write(folder, "arc_challenge/test.part1", arc(count - count // 2))
    write(folder, "hellaswag/validation", hellaswag(count + 11))
    write(folder, "mmlu/dev", mmlu(5))
    write(folder, "mmlu/test", mmlu(count // 3))
    write(folder, "truthfulqa/mc_v1_817", truthfulqa(count))
    write(folder, "winogrande/train_s", winogrande(20))
    write(folder, "winogrande/validation", winogrande(count))
    write(folder, "gsm8k/train", gsm8k(20))
    write(folder, "gsm8k/test", gsm8k(count))
    return folder


def write(folder, name, rows):
    file = folder / f"{name}.jsonl"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def words(count=4):
    return " ".join(random.choices(WORDS, k=random.randint(1, count)))


def arc(count):
    return [
        {
            "id": str(i),
            "question": words(8) + "?",
            "choices": {"text": [words() for _ in "ABCD"], "label": [*"ABCD"]},
            "answerKey": random.choice("ABCD"),
        }
        for i in range(count)
    ]


def hellaswag(count):
    return [
        {
            "ind": i,
            "activity_label": words(2),
            "ctx_a": words(8) + ".",
            "ctx_b": words(2),
            "ctx": "",
            "endings": [words(6) for _ in range(4)],
            "label": random.choice("0123"),
        }
        for i in range(count)
    ]


def mmlu(each):
    return [
        {
            "question": words(8),
            "subject": subject,
            "choices": [words() for _ in range(4)],
            "answer": random.randrange(4),
        }
        for subject in SUBJECTS
        for _ in range(each)
    ]


def truthfulqa(count):
    def targets(number):
        return {"choices": [words(5) for _ in range(number)], "labels": [1] + [0] * (number - 1)}

    return [
        {"question": words(6), "mc1_targets": targets(3), "mc2_targets": targets(5)}
        for _ in range(count)
    ]


def winogrande(count):
    return [
        {
            "sentence": f"{words()} _ {words()}",
            "option1": words(1),
            "option2": words(1),
            "answer": random.choice("12"),
        }
        for _ in range(count)
    ]


def gsm8k(count):
    return [
        {"question": words(8), "answer": f"{words()}\n#### {random.randrange(100)}"}
        for _ in range(count)
    ]
