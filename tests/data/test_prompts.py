"""Prompt files: every kind, what is left out, random access, and every way in which a file can be no prompt file."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from onestill.data.prompts import PromptFile, text_key


def written(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def test_a_text_file_has_one_prompt_per_line_each_once_and_in_order(tmp_path: Path) -> None:
    path = written(tmp_path / "p.txt", "\ufeffein Hündchen\r\n\n  a cat \nein Hündchen\n\t\na dog, 猫\na cat")
    prompts = PromptFile(path)
    assert list(prompts) == ["ein Hündchen", "a cat", "a dog, 猫"]
    assert prompts.num_repeated == 2 and prompts[-1] == "a dog, 猫" and prompts[:2] == ["ein Hündchen", "a cat"]
    assert prompts.keys.tolist() == [text_key(text) for text in prompts] and prompts.keys.dtype == np.int64
    with pytest.raises(IndexError):
        prompts[3]


def test_json_lines_and_csv_hold_them_in_a_field(tmp_path: Path) -> None:
    texts = ['a "red" cat, asleep', "two\nlines", "häuschen", "a,b"]
    lines = "\n\n".join(json.dumps({"id": i, "prompt": text}) for i, text in enumerate(texts))
    assert list(PromptFile(written(tmp_path / "p.jsonl", lines))) == texts
    rows = "id, caption \n" + "\r\n".join(f'{i},"{text.replace(chr(34), chr(34) * 2)}"' for i, text in enumerate(texts))
    found = PromptFile(written(tmp_path / "p.csv", rows + "\n\n9,a cat\n,\n"), "caption")
    assert list(found) == [*texts, "a cat"]
    assert [found[i] for i in (4, 1, 0, 2)] == ["a cat", texts[1], texts[0], texts[2]]


@pytest.mark.parametrize(
    ("name", "content", "field", "words"),
    [
        ("p.txt", None, None, "no such file"),
        ("p.parquet", "x", None, "give a .txt (one prompt per line), a .jsonl or a .csv"),
        ("p.txt", "", None, "holds no prompt"),
        ("p.txt", " \n\n", None, "holds no prompt"),
        ("p.txt", b"a cat\n\xff\xfe\n", None, "line 2: it is not UTF-8 (byte 0xff at position 1)"),
        ("p.txt", b"a cat\na d\x00g\n", None, "line 2: it holds a zero byte"),
        ("p.txt", "a\ncat".encode("utf-16"), None, "line 1"),
        ("p.txt", b"\x89PNG\r\n\x1a\n", None, "line 1: it is not UTF-8"),
        ("p.txt", b"x" * (1 << 21), None, "line 1: it is longer than 1,048,576 bytes"),
        ("p.txt", "a cat", "prompt", "is a .txt, which has one prompt per line"),
        ("p.jsonl", '{"prompt": "a"}\n{"caption": "b"}\n', None, "line 2: no field 'prompt', it has caption"),
        ("p.jsonl", '{"prompt": "a"}\n\n{"prompt": 3}\n', None, "line 3: field 'prompt' is no text but 3"),
        ("p.jsonl", '{"prompt": "a"}\n{"prompt": \n', None, "line 2: it is no JSON"),
        ("p.jsonl", '"a cat"\n', None, "line 1: it holds no object"),
        ("p.jsonl", '{"prompt": "\\ud800"}\n', None, "half of a surrogate pair"),
        ("p.jsonl", "[" * 100_000, None, "line 1: it is no JSON"),
        ("p.jsonl", b'{"prompt": "a"}\n{"prompt": "\xe4"}\n', None, "line 2: it is not UTF-8"),
        ("p.csv", "id,caption\n1,a cat\n", None, "line 1: no column 'prompt', it has id, caption"),
        ("p.csv", "", None, "line 1: no column 'prompt', it has nothing"),
        ("p.csv", "id,prompt\n1,a cat\n2\n", None, "line 3: it has 1 columns"),
        ("p.csv", 'id,prompt\n1,a cat\n2,"a dog\n', None, "line 3: it is no CSV"),
        ("p.csv", b"id,prompt\n1,a\n2,\xff\n", None, "line 3: it is not UTF-8"),
        ("p.csv", "id,prompt\n", None, "holds no prompt"),
    ],
)  # fmt: skip
def test_what_is_no_prompt_file_is_refused(
    tmp_path: Path, name: str, content: str | bytes | None, field: str | None, words: str
) -> None:
    path = tmp_path / name
    if content is not None:
        written(path, content)
    with pytest.raises(ValueError, match="prompt") as error:
        PromptFile(path, field)
    assert words in str(error.value) and "\n" not in str(error.value)
    assert str(path) in str(error.value)


def test_a_folder_is_no_file(tmp_path: Path) -> None:
    (tmp_path / "p.txt").mkdir()
    with pytest.raises(ValueError, match="is a folder"):
        PromptFile(tmp_path / "p.txt")


def test_a_file_that_changes_is_noticed(tmp_path: Path) -> None:
    path = written(tmp_path / "p.txt", "a cat\na dog\n")
    prompts = PromptFile(path)
    assert prompts[1] == "a dog"
    prompts.close()
    written(path, "a cow\na cat\n")
    with pytest.raises(ValueError, match="has changed since it was opened"):
        prompts[1]


def test_random_access_is_the_file(tmp_path: Path) -> None:
    draw = random.Random(0)
    texts = [
        " ".join(draw.choices(["äcat", "dog", "of", "in", "rød", "猫"], k=draw.randint(1, 30))) for _ in range(500)
    ]
    prompts = PromptFile(written(tmp_path / "p.txt", "\n".join(texts)))
    different = list(dict.fromkeys(texts))
    assert len(prompts) == len(different) and prompts.num_repeated == 500 - len(different)
    for i in draw.sample(range(len(prompts)), 100):
        assert prompts[i] == different[i]


def test_memory_is_bytes_per_prompt_and_not_the_prompts(tmp_path: Path) -> None:
    # 100,000 prompts of 1,000 letters: 100 MB of text, of which 16 bytes each stay, and a few times that on the way.
    path = tmp_path / "p.txt"
    with path.open("w", encoding="utf-8") as file:
        for i in range(100_000):
            file.write(f"{i} {'x' * 1000}\n")
    code = (
        "import resource, numpy, pathlib; from onestill.data.prompts import PromptFile; "
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss; "
        f"before = peak(); found = PromptFile(pathlib.Path({str(path)!r})); assert len(found) == 100_000; "
        "print((peak() - before) / 1024)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 20


def test_lines_may_end_with_cr_alone(tmp_path: Path) -> None:
    found = PromptFile(written(tmp_path / "p.txt", "a cat\ra dog\r\rzwei Hündchen\r\na\nb"))
    assert list(found) == ["a cat", "a dog", "zwei Hündchen", "a", "b"] and found[2] == "zwei Hündchen"
    many = [f"prompt {i} {'x' * 90}" for i in range(20_000)]  # 2 MB in one line, as a program for LF sees it
    long = PromptFile(written(tmp_path / "m.txt", "\r".join(many)))
    assert len(long) == len(many) and all(long[i] == many[i] for i in (0, 1, 170, 9_999, 19_999))
    rows = PromptFile(written(tmp_path / "p.csv", 'id,prompt\r1,"a ""red"" cat"\r2,b\r'))
    assert list(rows) == ['a "red" cat', "b"]


def test_a_prompt_without_end_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="line 2: a prompt of 20,000 characters; give at most 10,000"):
        PromptFile(written(tmp_path / "p.txt", "a\n" + "x" * 20_000))
