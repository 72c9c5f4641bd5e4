"""The page of a student: what it draws, what it refuses, what cannot be reached through it, and what a browser sees."""

from __future__ import annotations

import asyncio
import base64
import http.client
import io
import json
import math
import os
import re
import signal
import socket
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from runs_helpers import FAST, NULL_CLASS, assert_refused, call_cli, copied, finished_run, teacher_folder
from torch import Tensor

import onestill
from browser import opened
from onestill.core.errors import FoundWarning
from onestill.core.settings import LONGEST_TEXT
from onestill.pages import server as room
from onestill.pages.config import MOST_PICTURES, MOST_SEED, Asked, ServeConfig
from onestill.pages.player import Played, draw
from onestill.pages.playground import playground
from onestill.pages.server import DRAW, MOST_BODY, Server, listening, serve_page
from onestill.runs.serve import MISSING, _played, open_server
from onestill.sampling.pictures import to_pil
from onestill.sampling.png import read_settings
from onestill.sampling.samplers.network import StudentSampler
from onestill.students.student import Student
from onestill.teachers.load import load_teacher

NAME = "a ${window.owned=1} {{7*7}} <b onclick=owned=1>"
"""Of a folder, which the page shows."""
W = (1.0, 3.0)
TEACHER_STEPS = 3


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student of 3 labels, of a range of w, and of 1 to 8 steps."""
    folder: Path = tmp_path_factory.mktemp("serve") / NAME
    own = {"null_class": NULL_CLASS, "guidance_scale_min": W[0], "guidance_scale_max": W[1], "learning_rate": 3e-3}
    maps = {"anchor_fraction": 0.5, "anchor_path_fraction": 0.5, "num_anchors": 8, "t_min": 0.05}
    onestill.distill(teacher_folder("class"), folder, show_progress=False, **{**FAST, **own, **maps})
    return folder


@contextmanager
def serving(server: Server) -> Iterator[str]:
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        yield server.address
    finally:
        server.stop()
        thread.join()


def config_of(student: Path, **own: Any) -> ServeConfig:
    return ServeConfig(student=str(student), port=0, device="cpu", num_teacher_steps=TEACHER_STEPS, **own)


@pytest.fixture(scope="module")
def server(run: Path) -> Iterator[Server]:
    found = open_server(config_of(run, queue_size=1))
    with serving(found):
        yield found


@pytest.fixture(scope="module")
def text_server() -> Iterator[Server]:
    """An untrained student of glyphs, which draws mush."""
    sampler = StudentSampler(Student(load_teacher("glyphs")), name="this student")
    played = Played(sampler, "glyphs", torch.device("cpu"), prompt="a red A")
    found = serve_page(playground(played), played, listening("127.0.0.1", 0), host="127.0.0.1", queue_size=4)
    with serving(found):
        yield found


def ask(
    server: Server, body: bytes | str, method: str = "POST", path: str = DRAW, **headers: str
) -> tuple[int, bytes, dict[str, str]]:
    """Return (status, body, headers) of one request, whose path is sent as it is."""
    connection = http.client.HTTPConnection(server.address.removeprefix("http://"), timeout=30)
    sent = {"Content-Type": "application/json", **{name.replace("_", "-"): value for name, value in headers.items()}}
    connection.request(method, path, body, sent)
    answer = connection.getresponse()
    found = answer.status, answer.read(), {name.lower(): value for name, value in answer.getheaders()}
    connection.close()
    return found


def drawn(server: Server, **asked: Any) -> dict[str, Any]:
    status, body, _ = ask(server, json.dumps(asked))
    assert status == 200, body
    return json.loads(body)


def until(is_so: Callable[[], bool]) -> None:
    end = time.monotonic() + 30
    while not is_so():
        assert time.monotonic() < end
        time.sleep(0.005)


def pixels(picture: dict[str, Any]) -> np.ndarray[Any, Any]:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(picture["png"]))))


def is_same(picture: dict[str, Any], image: Tensor) -> bool:
    """Return whether a picture is an image, whose last digit sums of another order may move."""
    return np.abs(pixels(picture).astype(int) - np.asarray(to_pil(image[None])[0]).astype(int)).max() <= 1


# What it draws


@pytest.mark.parametrize(
    "own",
    [{}, {"guidance_scale": 2.5}, {"num_inference_steps": 4}, {"target_time": 0.5}, {"guidance_scale": 1, "target_time": 1}],
)  # fmt: skip
def test_a_picture_is_that_of_sample(own: dict[str, float], server: Server, run: Path) -> None:
    found = drawn(server, seed=5, class_label=1, **own)
    (picture,) = found["pictures"]
    sampler = onestill.load_sampler(run, device="cpu", **{"guidance_scale": 2.0, **own})
    images = sampler.images([5], sampler.conditions(1, [1]))
    assert is_same(picture, images[0]) and found["num_steps"] == own.get("num_inference_steps", 1)
    assert 0 < found["milliseconds"] < 30_000 and found["warnings"] == [] and picture["seed"] == 5


def test_below_the_cleanest_time_the_picture_is_that_one(server: Server) -> None:
    first, cleanest, later = (drawn(server, target_time=t)["pictures"][0] for t in (0, 0.02, 0.3))
    assert np.array_equal(pixels(first), pixels(cleanest)) and not np.array_equal(pixels(first), pixels(later))


def test_between_two_seeds_is_the_way_of_interpolate(server: Server, run: Path) -> None:
    sampler = onestill.load_sampler(run, device="cpu")
    way = onestill.interpolate(sampler, 5, seed=7, to_seed=8, class_labels=[2]).images[0]
    for place in (1, 2, 3):
        (picture,) = drawn(server, seed=7, between=place / 4, class_label=2)["pictures"]
        assert is_same(picture, way[place]) and picture["seed"] == 7 + place / 4


def test_several_pictures_are_those_of_the_next_seeds(server: Server) -> None:
    several = drawn(server, seed=3, class_label=0, num_images=3)["pictures"]
    assert [each["seed"] for each in several] == [3, 4, 5]
    one = drawn(server, seed=5, class_label=0)["pictures"][0]
    assert np.abs(pixels(several[2]).astype(int) - pixels(one)).max() <= 1


def test_the_teacher_draws_the_same_noise_in_its_steps(server: Server, run: Path) -> None:
    found = drawn(server, seed=4, class_label=1, guidance_scale=3, by_teacher=True)
    expected = onestill.sample(
        teacher=teacher_folder("class"), null_class=NULL_CLASS, num_images=1, seed=4, class_labels=[1],
        num_inference_steps=TEACHER_STEPS, guidance_scale=3, device="cpu",
    )  # fmt: skip
    assert is_same(found["pictures"][0], expected[0]) and found["num_steps"] == TEACHER_STEPS


def test_the_settings_are_inside_the_picture(server: Server, tmp_path: Path) -> None:
    said = []
    for i, own in enumerate(({"num_inference_steps": 2}, {"by_teacher": True}, {"between": 0.5, "target_time": 0.3})):
        picture = drawn(server, seed=4, class_label=1, guidance_scale=2.5, **own)["pictures"][0]
        (tmp_path / f"{i}.png").write_bytes(base64.b64decode(picture["png"]))
        said.append(read_settings(tmp_path / f"{i}.png"))
    own = {"student": NAME, "class_label": "1", "seed": "4", "guidance_scale": "2.5"}
    own["Software"] = f"onestill {version('onestill')}"
    assert said[0] == {**own, "drawn_by": NAME, "num_inference_steps": "2", "target_time": "0.0"}
    assert said[1] == {**own, "drawn_by": "teacher-class (the teacher)", "num_inference_steps": str(TEACHER_STEPS)}
    assert said[2] == {**own, "drawn_by": NAME, "num_inference_steps": "1", "target_time": "0.3", "between": "0.5"}


def test_a_request_that_names_no_scale_has_that_of_the_command(run: Path, tmp_path: Path) -> None:
    for student, w, own in ((run, "2.75", {}), (run / "pipeline", "2.0", {"teacher": str(teacher_folder("class"))})):
        played = _played(config_of(student, guidance_scale=2.75, **own), torch.device("cpu"))
        made = [draw(played, Asked(class_label=1, seed=4, by_teacher=by)) for by in (False, True)]
        for answer, scale in zip(made, (w, "2.75"), strict=True):
            (tmp_path / "a.png").write_bytes(answer.pictures[0].png)
            assert read_settings(tmp_path / "a.png")["guidance_scale"] == scale
            sampler = onestill.load_sampler(student, device="cpu", guidance_scale=None if own else 2.75)
            if answer is made[0]:
                image = sampler.images([4], sampler.conditions(1, [1]))[0]
                assert np.array_equal(np.asarray(Image.open(tmp_path / "a.png")), np.asarray(to_pil(image[None])[0]))


def test_a_prompt_that_is_cut_is_drawn_with_a_line(text_server: Server) -> None:
    assert drawn(text_server, prompt="a blue B")["warnings"] == []
    (line,) = drawn(text_server, prompt="a blue " + "very " * 200 + "big B")["warnings"]
    assert line.startswith("1 prompt is longer than the ") and "it cuts it" in line
    assert not np.array_equal(
        *(pixels(drawn(text_server, prompt=text)["pictures"][0]) for text in ("a red A", "a blue B"))
    )


# What it refuses

BAD: tuple[tuple[bytes | str, int, str], ...] = (
    (b"", 400, "the request is no JSON"),
    (b"\xff\xfe", 400, "the request is no UTF-8 text"),
    ("{", 400, "the request is no JSON"),
    ("[1]", 400, "the request is no JSON object"),
    ("null", 400, "the request is no JSON object"),
    ("[" * 100_000, 400, "the request is nested"),
    ('{"seed":' + "9" * 100_000 + "}", 400, "the request is no JSON"),
    (b" " * (MOST_BODY + 1), 413, f"a request has at most {MOST_BODY:,} bytes"),
    ('{"seed": -1}', 400, "seed: must be at least 0"),
    ('{"seed": 1.5}', 400, "seed: must be a valid integer"),
    ('{"seed": NaN}', 400, "seed: must be a finite number"),
    ('{"seed": true}', 400, "seed: must be no bool"),
    ('{"seed": null}', 400, "seed: must be a valid integer"),
    ('{"seed": {}}', 400, "seed: must be a valid integer"),
    (json.dumps({"seed": MOST_SEED + 1}), 400, f"seed: must be at most {MOST_SEED}"),
    (json.dumps({"seed": 10**300}), 400, "seed: must be at most"),
    ('{"between": 1}', 400, "between: must be below 1"),
    ('{"between": Infinity}', 400, "between: must be a finite number"),
    ('{"num_images": 0}', 400, "num images: must be at least 1"),
    (json.dumps({"num_images": MOST_PICTURES + 1}), 400, f"num images: must be at most {MOST_PICTURES}"),
    ('{"num_inference_steps": 9}', 400, "num inference steps: must be at most 8"),
    ('{"num_inference_steps": 2, "target_time": 0.5}', 400, "target time: is of a single step"),
    ('{"target_time": 2}', 400, "target time: must be at most 1"),
    ('{"guidance_scale": 7}', 400, "guidance scale: is outside 1 to 3, which the student was trained on"),
    ('{"guidance_scale": NaN}', 400, "guidance scale: must be a finite number"),
    ('{"class_label": 3}', 400, "class label: this student knows 0 to 2"),
    ('{"class_label": "<b>"}', 400, "class label: must be a valid integer"),
    ('{"prompt": "a cat"}', 400, "prompt: this student takes no text"),
    ('{"prompt": ["a cat"]}', 400, "prompt: must be a valid string"),
    ('{"by_teacher": true, "num_inference_steps": 2}', 400, "num inference steps: is the student's; the teacher has"),
    ('{"by_teacher": true, "target_time": 0.5}', 400, "target time: is the student's; the teacher has"),
    ('{"student": "/etc"}', 400, "the request: unknown setting 'student'"),
    (json.dumps({"../" * 30: 1}), 400, "the request: unknown setting '../"),
)


@pytest.mark.parametrize(("body", "status", "words"), BAD, ids=range(len(BAD)))
def test_what_cannot_be_drawn_is_refused_in_words(body: bytes | str, status: int, words: str, server: Server) -> None:
    found, answer, headers = ask(server, body)
    error = json.loads(answer)["error"]
    assert found == status and words in error and len(error) < 400 and "\n" not in error, error
    assert headers["content-type"] == "application/json" and "Traceback" not in error and "/" + "tmp" not in error


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({}, "prompt: this student takes text; say what to draw"),
        ({"prompt": "a" * (LONGEST_TEXT + 1)}, f"prompt: has {LONGEST_TEXT + 1:,} characters; give at most"),
        ({"prompt": "a\0b"}, "prompt: holds a zero byte"),
        ({"prompt": "\ud800"}, "prompt: is no UTF-8 text"),
        ({"prompt": "a cat", "class_label": 1}, "class label: this student takes prompts"),
        ({"prompt": "a cat", "by_teacher": True}, "by teacher: there is no teacher beside this student"),
        ({"prompt": "a cat", "guidance_scale": 2}, "guidance scale: this student was distilled with w fixed"),
    ],
)
def test_prompts_that_cannot_be_drawn_are_refused(body: dict[str, Any], words: str, text_server: Server) -> None:
    status, answer, _ = ask(text_server, json.dumps(body))
    assert status == 400 and words in json.loads(answer)["error"]


ODD = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=40), st.just(math.inf), st.just("../" * 9),
    st.lists(st.integers(), max_size=3), st.dictionaries(st.text(max_size=5), st.none(), max_size=2),
)  # fmt: skip


@given(st.dictionaries(st.sampled_from([*room.Asked.model_fields, "x", "__proto__"]), ODD, max_size=4))
@settings(max_examples=25)
def test_whatever_is_asked_there_is_an_answer(server: Server, body: dict[str, Any]) -> None:
    status, answer, _ = ask(server, json.dumps(body))
    assert (status == 200 and json.loads(answer)["pictures"]) or (status == 400 and json.loads(answer)["error"])


def test_only_json_from_the_page_is_taken(server: Server) -> None:
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=a", ""):
        assert ask(server, "{}", Content_Type=kind)[0] == 415
    for host in ("evil.example", "evil.example:80", "127.0.0.1.evil.example", ""):
        assert ask(server, "{}", Host=host)[0] == 403 and ask(server, "", "GET", "/", Host=host)[0] == 403
    assert (
        ask(server, "{}", Host="localhost")[0]
        == ask(server, "{}", Content_Type="application/json; charset=utf-8")[0]
        == 200
    )
    status, _, headers = ask(server, "", "OPTIONS", DRAW, Origin="http://evil.example")
    assert status == 404 and "access-control-allow-origin" not in headers


def test_a_failure_is_one_line_and_the_next_is_drawn(
    server: Server, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: Any) -> Any:
        raise KeyError("a secret of the machine")

    with monkeypatch.context() as patch:
        patch.setattr(room, "draw", fail)
        status, answer, _ = ask(server, "{}")
    assert status == 500 and json.loads(answer) == {
        "error": "this could not be drawn; the terminal of the server says why"
    }
    assert "a secret of the machine" in caplog.text and drawn(server)


def test_too_little_memory_is_said(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    with monkeypatch.context() as patch:
        patch.setattr(StudentSampler, "images", fail)
        for num, words in ((12, "12 pictures at once"), (1, "1 picture at once")):
            status, answer, _ = ask(server, json.dumps({"num_images": num}))
            todo = "ask for fewer" if num > 1 else "end what else takes it"
            said = f"not enough memory for {words} (2.00 GiB more were asked for); {todo}"
            assert status == 503 and json.loads(answer) == {"error": said}
    assert drawn(server)


def test_who_goes_in_the_midst_of_a_request_is_no_failure(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    host, port = server.address.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as half:
        head = f"POST {DRAW} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\nContent-Length: 99\r\n\r\n{{"
        half.sendall(head.encode())
        time.sleep(0.1)
    assert drawn(server)
    time.sleep(0.1)
    assert caplog.text == ""


def test_too_many_are_told_to_come_again(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    goes_on, calls, answers = threading.Event(), [], list[tuple[int, bytes, dict[str, str]]]()
    draw = room.draw

    def slow(*given: Any) -> Any:
        calls.append(given)
        goes_on.wait(30)
        return draw(*given)

    def one() -> None:
        answers.append(ask(server, "{}"))

    monkeypatch.setattr(room, "draw", slow)
    threads = [threading.Thread(target=one) for _ in range(2)]
    for i, thread in enumerate(threads):
        thread.start()
        until(lambda num=i: server.door.present == num + 1)
    assert len(calls) == 1, "one is drawn at a time"
    status, answer, _ = ask(server, "{}")
    assert status == 503 and json.loads(answer)["error"] == "1 requests wait already; try again in a moment"
    goes_on.set()
    for thread in threads:
        thread.join()
    assert [answer[0] for answer in answers] == [200, 200] and server.door.present == 0


def test_nothing_is_drawn_for_who_has_gone(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    goes_on, calls, draw = threading.Event(), [], room.draw

    def slow(*given: Any) -> Any:
        calls.append(given)
        goes_on.wait(30)
        return draw(*given)

    monkeypatch.setattr(room, "draw", slow)
    first = threading.Thread(target=ask, args=(server, "{}"))
    first.start()
    until(lambda: len(calls) == 1)
    gone = http.client.HTTPConnection(server.address.removeprefix("http://"))
    gone.request("POST", DRAW, "{}", {"Content-Type": "application/json"})
    until(lambda: server.door.present == 2)
    gone.close()
    time.sleep(0.1)
    goes_on.set()
    first.join()
    until(lambda: server.door.present == 0)
    assert len(calls) == 1


# What cannot be reached


def test_no_file_is_read_through_it(server: Server, run: Path) -> None:
    secret = run / "config.yaml"
    up, inside = "../" * 12, str(secret).lstrip("/")
    quoted = inside.replace("{", "%7B").replace("}", "%7D").replace(" ", "%20").replace("<", "%3C").replace(">", "%3E")
    paths = [
        f"{start}{way}{end}"
        for start in ("/", "/gradio_api/", "//", "/static/../gradio_api/")
        for way in (
            "file=",
            "file/",
            "proxy=file://",
            "proxy=http://127.0.0.1/",
            "custom_component/",
            "stream/",
            "upload",
        )
        for end in (f"/{quoted}", quoted, "etc/passwd", "/etc/passwd", "..%2f..%2f..%2fetc%2fpasswd")
    ]
    paths += [
        f"/{folder}/{way}etc/passwd"
        for folder in ("static", "assets", "svelte")
        for way in (up, "%2e%2e%2f" * 12, "..%5c" * 12, "%252e%252e%252f" * 12, "/", "%2f", "a/../" + up, "%00/", ".")
    ]
    paths += ["/config", "/docs", "/openapi.json", "/info", "/gradio_api/info", "/gradio_api/runs", "/user", "/token",
              "/gradio_api/startup-events", "/gradio_api/heartbeat/a", "/monitoring", "/manifest.json", "/login",
              "/gradio_api/deep_link", "/theme.css/..", "/draw", "/draw/", "/..", "/%2e%2e/", "*"]  # fmt: skip
    for path in paths:
        status, answer, _ = ask(server, "", "GET", path)
        assert status in (400, 404) and b"root:" not in answer and b"teacher:" not in answer, path
    for path in ("/gradio_api/upload", "/gradio_api/queue/join", "/gradio_api/run/0", "/gradio_api/call/0", "/login",
                 "/gradio_api/component_server", "/gradio_api/process_recording", "/", "/assets/a.js"):  # fmt: skip
        for method in ("POST", "PUT", "DELETE"):
            assert ask(server, "{}", method, path)[0] == 404, path


def test_the_page_is_served_with_bounds(server: Server) -> None:
    status, page, headers = ask(server, "", "GET", "/")
    assert status == 200 and headers["x-frame-options"] == "DENY" and "server" not in headers
    assert "connect-src 'self'" in headers["content-security-policy"]
    for query in ("page=../", "deep_link=..%2f..%2fa", "deep_link=a&page=a"):
        assert ask(server, "", "GET", f"/?{query}")[:2] == (200, page), query
    for address in re.findall(rb'(?:src|href)="\./((?:assets|static)/[^"]+)"', page)[:4]:
        assert ask(server, "", "GET", f"/{address.decode()}")[0] == 200
    assert str(Path.cwd()).encode() not in page and str(Path.home()).encode() not in page


# What a browser sees


def source(page: Any, which: str = "student") -> str:
    return str(page.get_attribute(f"#of-{which} img", "src"))


def until_changed(page: Any, before: str, which: str = "student") -> str:
    page.wait_for_function(f"before => document.querySelector('#of-{which} img').src != before", arg=before)
    return source(page, which)


def saved(page: Any, which: str, folder: Path) -> tuple[str, dict[str, str]]:
    """Return the name of the picture that is saved, and the settings inside."""
    with page.expect_download() as found:
        page.click(f"#of-{which} a.save")
    found.value.save_as(folder / "saved.png")
    return found.value.suggested_filename, read_settings(folder / "saved.png")


def test_it_is_played_with_in_a_browser(server: Server, tmp_path: Path) -> None:
    with opened(server.address) as page:
        page.wait_for_selector("#of-student img[src]")
        assert page.inner_text("#head h1") == NAME and page.title() == f"{NAME} · onestill"
        first = source(page)
        page.click("#class_label label:nth-of-type(3)")
        second = until_changed(page, first)
        page.fill("#seed input[type=number]", "12.25")
        page.keyboard.press("Tab")
        third = until_changed(page, second)
        assert re.search(r"1 step\s+[\d.]+ ms", page.inner_text("#of-student figcaption"))
        name, said = saved(page, "student", tmp_path)
        assert name == "seed-12.25.png" and (said["seed"], said["between"], said["class_label"]) == ("12", "0.25", "2")
        page.click("#ask-teacher")
        page.wait_for_selector("#of-teacher img[src]")
        assert re.search(r"3 steps\s+[\d.]+ ms · [\d.]+ × the student", page.inner_text("#of-teacher figcaption"))
        assert saved(page, "teacher", tmp_path)[0] == "seed-12.25-teacher.png"
        page.click("#ask-gallery")
        page.wait_for_selector("#gallery button:nth-of-type(12)")
        page.click("#gallery button:nth-of-type(3)")
        fourth = until_changed(page, third)
        assert saved(page, "student", tmp_path)[1]["seed"] == "14" and page.locator("#of-teacher.stale").count() == 1
        page.fill("#num_inference_steps input[type=number]", "4")
        page.keyboard.press("Tab")
        until_changed(page, fourth)
        assert "4 steps" in page.inner_text("#of-student figcaption") and page.locator("#target_time.off").count() == 1
        page.fill("#seed input[type=number]", "100")
        page.keyboard.press("Tab")
        page.click("#ask-gallery")
        page.wait_for_function("() => document.querySelector('#gallery span').textContent == '89'")
        assert page.heard == [] and page.evaluate("window.owned") is None
        assert page.locator("footer:visible").count() == 0


def test_a_prompt_is_drawn_as_it_is_typed_and_stays_text(text_server: Server, tmp_path: Path) -> None:
    hostile = '<img src=x onerror="window.owned=1"> ${window.owned=1} {{7*7}} </script>'
    with opened(text_server.address, width=390, dark=True) as page:
        page.wait_for_selector("#of-student img[src]")
        before = source(page)
        page.type("#prompt textarea", hostile, delay=2)
        until_changed(page, before)
        page.wait_for_timeout(600)
        assert saved(page, "student", tmp_path)[1]["prompt"] == f"a red A{hostile}"
        page.fill("#prompt textarea", "a" * (LONGEST_TEXT + 1))
        page.wait_for_selector("#message.wrong")
        assert "give at most 10,000" in page.inner_text("#message") and page.locator("#of-student.stale").count() == 1
        page.fill("#prompt textarea", "")
        page.wait_for_function("() => document.querySelector('#message').textContent == 'Say what to draw.'")
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        assert not page.is_visible("#ask-teacher") and page.locator("#num_inference_steps").count() == 1
        assert page.evaluate("window.owned") is None
        # A request that is refused is told of in the console too.
        assert [line for line in page.heard if "status of 400" not in line] == []


# How it begins and ends


def test_what_cannot_be_served_is_refused_before_it_is(run: Path, tmp_path: Path) -> None:
    taken = socket.create_server(("127.0.0.1", 0))
    port = taken.getsockname()[1]
    points = tmp_path / "module"
    points.mkdir()
    mark = {"kind": "one-step student", "format": "module", "sample_shape": [2]}
    (points / "onestill.json").write_text(json.dumps({**mark, "head": dict.fromkeys(("a", "b", "c", "net_time"), 0.5)}))
    for words, why in (
        (["nowhere"], "--student nowhere: no such folder"),
        ([tmp_path], "is neither a run"),
        ([points], "is a network of your own; load it in Python with onestill.load_module"),
        (["digits"], "--student digits: is a teacher, of many steps"),
        ([run, "--port", port], f"--port {port}: is taken by another program; give another, or 0 for a free one"),
        ([run, "--port", 65_536], "--port 65536: must be at most 65535"),
        ([run, "--host", "no.such.invalid"], "--host no.such.invalid: is no address"),
        ([run, "--host", "192.0.2.1", "--port", 0], "--host 192.0.2.1: is no address of this machine"),
        ([run, "--queue_size", 0], "--queue_size 0: must be at least 1"),
        ([run, "--guidance_scale", 9, "--port", 0], "--guidance_scale 9: is outside 1 to 3"),
        ([run, "--prompt", "a cat", "--port", 0], "--prompt 'a cat': this student takes no text"),
        ([run, "--teacher", teacher_folder(), "--port", 0], "has 0 classes and --student 3"),
        ([run / "pipeline", "--guidance_scale", 2, "--port", 0], "and no teacher stands beside it; leave it out"),
        ([], "--student: is required"),
    ):
        assert_refused(call_cli("serve", *words, "--device", "cpu"), why)
    taken.close()


def test_without_gradio_it_says_what_brings_it(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from importlib import util

    find = util.find_spec
    monkeypatch.setattr(util, "find_spec", lambda name, *more: None if name == "gradio" else find(name, *more))
    assert_refused(call_cli("serve", run), MISSING)
    assert "pip install 'onestill[serve]'" in MISSING


def test_an_exported_student_has_what_is_baked_in(run: Path) -> None:
    found = open_server(config_of(run / "pipeline", teacher=str(teacher_folder("class"))))
    found.socket.close()
    played = found.door.played
    assert (played.steps, played.guidance_range, played.times) == ((1, 1), None, None) and played.teacher is not None
    assert played.name == f"{NAME}/pipeline" and played.sampler.name == "this student"


def test_a_run_without_its_teacher_is_drawn_by_its_export(tmp_path: Path) -> None:
    run = copied(finished_run(), tmp_path / "run")
    config = run / "config.yaml"
    config.write_text(re.sub(r"^teacher: .*$", "teacher: python object", config.read_text(), flags=re.MULTILINE))
    with pytest.warns(
        FoundWarning, match="so its exported pipeline is what draws, with one target time and no teacher"
    ):
        found = open_server(config_of(run))
    found.socket.close()
    assert found.door.played.times is None and found.door.played.teacher is None


def test_an_address_that_is_open_to_others_is_warned_of(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", FoundWarning)
        open_server(config_of(run / "pipeline")).socket.close()
    monkeypatch.setattr("onestill.runs.serve.is_own", lambda _: False)
    with pytest.warns(FoundWarning, match="whoever reaches this machine over its network can draw with this student"):
        open_server(config_of(run / "pipeline")).socket.close()


def test_it_is_served_in_a_notebook_too(server: Server) -> None:
    door, answers = server.door, list[int]()
    found = serve_page(door.page, door.played, listening("127.0.0.1", 0), host="127.0.0.1", queue_size=1)

    def visit() -> None:
        answers.append(ask(found, '{"class_label": 1}')[0])
        found.stop()

    async def cell() -> None:
        found.run()

    visitor = threading.Thread(target=visit)
    visitor.start()
    asyncio.run(cell())
    visitor.join()
    assert answers == [200]


def test_ctrl_c_ends_it_in_one_line(run: Path) -> None:
    with listening("127.0.0.1", 0) as place:
        port = place.getsockname()[1]
    answers: list[bytes] = []

    def visit_and_stop() -> None:
        end = time.monotonic() + 60
        while not answers and time.monotonic() < end:
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
            with suppress(OSError):
                connection.request("GET", "/")
                answers.append(connection.getresponse().read())  # and the connection stays open
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGINT)

    visitor = threading.Thread(target=visit_and_stop)
    visitor.start()
    outcome = call_cli("serve", run / "pipeline", "--port", port, "--device", "cpu")
    visitor.join()
    assert outcome.code == 130 and outcome.err == "stopped\n" and answers[0].startswith(b"<!doctype html>")
    assert outcome.out == f"http://127.0.0.1:{port}  (open it in a browser; Ctrl-C ends it)\n"
