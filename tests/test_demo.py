"""A page to play with: whom it answers, and how mistakes come back. What a task answers stands in its own tests."""

import base64
import http.client
import json
import socket
import threading

import numpy as np
import pytest
from ml_collections import ConfigDict
from playing import frames, mistake, pixels_of, png, send, served

from configs import dit_digits
from dblocks_jax.data import images
from dblocks_jax.data.datasets import Card
from dblocks_jax.data.images import read_image
from dblocks_jax.data.text import TextSource
from dblocks_jax.data.vocabulary import letters
from dblocks_jax.models.blueprint import Blueprint
from dblocks_jax.modes import serving
from dblocks_jax.modes.demo import DEMOS
from dblocks_jax.modes.serving import MOST_BYTES, DemoServer
from dblocks_jax.pages.pictures import data_uri
from dblocks_jax.run.errors import Diverged, UserError
from dblocks_jax.tasks import text_demo
from dblocks_jax.tasks.demo import MOST_FRAMES, bytes_of, kept, number, text_of, whole_number
from dblocks_jax.tasks.generate.demo import classes_of
from dblocks_jax.tasks.generate.demo import demo as of_generator
from dblocks_jax.tasks.generate.task import GENERATE
from dblocks_jax.tasks.mask.demo import HIDDEN, colour, first_text
from dblocks_jax.tasks.table import TASKS
from dblocks_jax.tasks.text import TextCard

INFINITE, NONE = float("inf"), float("nan")
BEYOND = 10**400  # any float


def repeat(wanted):
    """An answer without a model."""
    yield {"wanted": wanted}


@pytest.fixture(scope="module")
def server():
    with served(DemoServer(0, "<p>a page", "nonce-of-it", repeat)) as server:
        yield server


def test_every_task_has_a_page():
    assert set(DEMOS) == set(TASKS)


def test_only_this_machine_is_served(server):
    assert server.server_address[0] == "127.0.0.1" and server.address == f"http://127.0.0.1:{server.server_port}/"
    assert send(server, b"", method="GET", path="/") == (200, "<p>a page")
    assert frames(server, {"a": [1, "\ud800"]}) == [{"wanted": {"a": [1, "\ud800"]}}]


def test_strangers_are_refused(server):
    """Another name for this machine, another page's request, and what a form can send."""
    port = server.server_port
    for host in ("evil.example", f"evil.example:{port}", "127.0.0.1", f"127.0.0.1:{port + 1}", ""):
        assert "no other name" in mistake(server, {}, 403, Host=host)
        assert send(server, b"", method="GET", path="/", Host=host)[0] == 403
    assert "others" in mistake(server, {}, 403, Origin="http://evil.example")
    assert "others" in mistake(server, {}, 403, Origin="null")
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data", ""):
        assert "application/json" in mistake(server, {}, 415, Content_Type=kind)
    for host in (f"127.0.0.1:{port}", f"localhost:{port}"):
        assert send(server, {}, Host=host, Origin=f"http://{host}")[0] == 200


@pytest.mark.parametrize(
    ("body", "status", "how", "told"),
    [
        (b"", 404, {"method": "GET", "path": "/etc/passwd"}, "nothing but /"),
        (b"", 404, {"method": "GET", "path": "/../launch.py"}, "nothing but /"),
        ({}, 404, {"path": "/other"}, "nothing but /answer"),
        ({}, 501, {"method": "DELETE"}, "Unsupported method"),
        (b" " * (MOST_BYTES + 1), 413, {}, "at most 16 MiB are read"),
        ({}, 411, {"Content_Length": "-1"}, "Content-Length"),
        ({}, 411, {"Content_Length": "9" * 5000}, "Content-Length"),
        (b'{"a": NaN}', 400, {}, "NaN is no number of JSON"),
        (b"[" * 100_000, 400, {}, "the request is no JSON"),
        (b"\xff", 400, {}, "the request is no JSON"),
        (b"1" * 5000, 400, {}, "the request is no JSON"),
        ([], 400, {}, "the request is no object"),
    ],
)  # fmt: skip
def test_other_requests_are_refused(server, body, status, how, told):
    assert told in mistake(server, body, status, **how)


@pytest.mark.parametrize(
    ("error", "before", "status", "told"),
    [
        (UserError("your mistake"), 0, 400, "your mistake"),
        (UserError("your mistake"), 1, 200, "your mistake"),
        (Diverged("not finite"), 0, 500, "not finite"),
        (RuntimeError("a\nb"), 0, 500, "the program failed: RuntimeError: a b"),
        (RuntimeError("ours"), 1, 200, "the program failed: RuntimeError: ours"),
    ],
)
def test_errors_are_one_line_whenever_they_come(error, before, status, told):
    def answer(wanted):
        yield from [{"step": 1}] * before
        raise error

    with served(DemoServer(0, "", "n", answer)) as server:
        found, text = send(server, {})
    assert found == status and json.loads(text.splitlines()[-1]) == {"error": told}
    assert len(text.splitlines()) == before + 1


def test_who_does_not_hang_up_keeps_nobody_waiting(monkeypatch):
    """A refused client that goes on sending is listened to for a while, but not while others wait for the model."""
    monkeypatch.setattr(serving, "LINGER_SECONDS", 60.0)

    def answer(wanted):
        if "mistake" in wanted:
            raise UserError("a mistake")
        yield {"step": 1}

    body = b'{"mistake": 1}'
    with served(DemoServer(0, "", "n", answer)) as server:
        head = f"POST /answer HTTP/1.1\r\nHost: 127.0.0.1:{server.server_port}\r\nContent-Type: application/json\r\n"
        with socket.create_connection(("127.0.0.1", server.server_port), timeout=30) as slow:
            slow.sendall(head.encode() + b"Content-Length: %d\r\n\r\n" % len(body) + body)
            assert b" 400 " in slow.recv(100)
            assert frames(server, {}) == [{"step": 1}]


def test_one_request_at_a_time_and_none_after_the_end():
    inside, most, go_on = [0], [0], threading.Event()

    def answer(wanted):
        inside[0] += 1
        most[0] = max(most[0], inside[0])
        yield {"step": 1}
        go_on.wait(5)
        inside[0] -= 1
        yield {"step": 2}

    answers: list[str] = []
    with served(DemoServer(0, "", "n", answer)) as server:
        asking = [threading.Thread(target=lambda: answers.append(send(server, {})[1])) for _ in range(3)]
        for each in asking:
            each.start()
        go_on.set()
        for each in asking:
            each.join()
    assert most == [1] and [text.count("step") for text in answers] == [2, 2, 2]
    with pytest.raises(ConnectionRefusedError):
        send(server, {})


def test_an_answer_ends_with_the_server():
    has_begun, go_on = threading.Event(), threading.Event()
    answers: list[str] = []

    def answer(wanted):
        for step in range(1000):
            yield {"step": step}
            has_begun.set()
            go_on.wait(5)

    with served(DemoServer(0, "", "n", answer)) as server:
        asking = threading.Thread(target=lambda: answers.append(send(server, {})[1]))
        asking.start()
        assert has_begun.wait(5)
        server.is_closing = True
        go_on.set()
        asking.join()
    assert answers[0].count("step") == 2  # that under way, and the one that was told


def test_an_answer_ends_when_nobody_listens_any_more():
    """And the next one need not wait for it."""
    has_ended = threading.Event()

    def answer(wanted):
        try:
            yield from ({"step": step, "much": "a" * 10_000} for step in range(wanted["steps"]))
        finally:
            has_ended.set()

    with served(DemoServer(0, "", "n", answer)) as server:
        connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=30)
        connection.request("POST", "/answer", json.dumps({"steps": 10**9}), {"Content-Type": "application/json"})
        connection.getresponse().read(100)
        connection.close()
        assert send(server, {"steps": 1})[0] == 200 and has_ended.is_set()


@pytest.mark.parametrize(
    ("sent", "told"),
    [
        (b"hello\r\n\r\n", "Bad request syntax"),
        (b"GET / HTTP/9.9\r\n\r\n", "Invalid HTTP version"),
        (b"GET /" + b"a" * 70_000 + b" HTTP/1.1\r\n\r\n", "cannot be read"),
        (b"GET / HTTP/1.1\r\n\r\n", "no other name"),
        (b"GET / HTTP/1.1\r\nHost: %s\r\nHost: %s\r\n\r\n", "no other name"),
        (b"POST /answer HTTP/1.1\r\nHost: %s\r\nContent-Type: application/json\r\n\r\n", "Content-Length"),
    ],
)
def test_what_is_hardly_http_is_one_line(server, sent, told):
    host = f"127.0.0.1:{server.server_port}".encode()
    with socket.create_connection(("127.0.0.1", server.server_port), timeout=30) as connection:
        connection.sendall(sent.replace(b"%s", host))
        connection.shutdown(socket.SHUT_WR)
        answered = b"".join(iter(lambda: connection.recv(2**16), b"")).decode()
    assert answered.startswith("HTTP/1.0 4") or answered.startswith("HTTP/1.0 505")
    assert told in json.loads(answered.partition("\r\n\r\n")[2])["error"]


def test_a_port_that_is_taken_is_named(server):
    with pytest.raises(UserError, match=f"--port={server.server_port} cannot be had .*choose another, or 0"):
        DemoServer(server.server_port, "", "n", repeat)


@pytest.mark.parametrize("value", [0, 17, 2.5, 3.0, True, None, "3", [3], BEYOND, INFINITE, NONE])
def test_whole_numbers_are_those_of_their_range(value):
    with pytest.raises(UserError, match=r"count must be a whole number in \[1, 16\]"):
        whole_number({"count": value}, "count", 1, 16)
    assert whole_number({"count": 16}, "count", 1, 16) == 16


@pytest.mark.parametrize("value", [-0.1, 1001, True, None, "3", BEYOND, INFINITE, -INFINITE, NONE])
def test_numbers_are_those_of_their_range(value):
    with pytest.raises(UserError, match=r"cfg_scale must be a number in \[0, 1000\]"):
        number({"cfg_scale": value}, "cfg_scale", 0.0, 1000.0)
    assert number({"cfg_scale": 2}, "cfg_scale", 0.0, 1000.0) == 2


def test_texts_and_files_are_what_they_should_be():
    assert text_of({"text": "é"}, "text") == "é" and bytes_of({"image": "aGVsbG8="}, "image") == b"hello"
    for value, told in ((None, "text must be a text"), ("a" * 100_001, "text has 100,001 characters")):
        with pytest.raises(UserError, match=told):
            text_of({"text": value}, "text")
    for value in (None, 3, "é", "aGVsbG8", "a b", [], "\ud800"):
        with pytest.raises(UserError, match="image must be a file in base64"):
            bytes_of({"image": value}, "image")


@pytest.mark.parametrize("classes", [[], [10], [-1], ["3"], [True], [0] * 11, None, 3, {"0": 1}])
def test_classes_are_numbers_of_classes(classes):
    with pytest.raises(UserError, match=r"choose at least one class|classes are numbers from 0 to 9"):
        classes_of({"classes": classes}, 10)
    assert classes_of({"classes": [3, 9]}, 10) == [3, 9]


@pytest.mark.parametrize("count", [1, 2, MOST_FRAMES, 1000])
def test_frames_are_even_and_have_both_ends(count):
    assert len(kept(count)) == min(count, MOST_FRAMES) and {0, count - 1} <= kept(count) <= set(range(count))


def test_a_picture_of_any_size_and_kind_is_cut_to_what_the_model_sees():
    """Red is as bright as the luma of ITU-R BT.601 says: 0.299 of 255. An image that fits stays as it is."""
    red = np.broadcast_to(np.array([255, 0, 0], np.uint8), (30, 50, 3))
    np.testing.assert_array_equal(read_image(base64.b64decode(png(red)), (8, 8, 1)), np.full((8, 8, 1), 76))
    grey = np.arange(64, dtype=np.uint8).reshape(8, 8, 1)
    np.testing.assert_array_equal(read_image(base64.b64decode(png(grey)), (8, 8, 1)), grey)
    np.testing.assert_array_equal(pixels_of(data_uri(grey)), grey[..., 0])


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"", "it is neither a JPEG nor a PNG file"),
        (b"hello", "it is neither a JPEG nor a PNG file"),
        (b"GIF89a", "it is a GIF file, not JPEG or PNG: convert it"),
        (base64.b64decode(png(np.zeros((20, 20, 1), np.uint8)))[:30], "it begins like a PNG file, but is damaged"),
        (base64.b64decode(png(np.zeros((20, 20, 1), np.uint8))), "it has 20 x 20 pixels, of at most 399: make it sm"),
    ],
)
def test_what_is_no_image_or_too_large_is_said_so_before_it_is_decoded(monkeypatch, content, told):
    monkeypatch.setattr(images, "MOST_PIXELS", 399)
    monkeypatch.setattr(images, "_to_rgb", lambda _: pytest.fail("it was decoded"))
    with pytest.raises(UserError, match=f"cannot read the image that was sent: {told}"):
        read_image(content, (8, 8, 1))


def test_latents_make_no_page():
    config = ConfigDict({**dit_digits.get_config().to_dict(), "dataset": "latents"})
    task = GENERATE.make(config, Card(("a", "b"), (8, 8, 4), (0.5,) * 4, (0.5,) * 4))
    with pytest.raises(UserError, match="latents, of which only their decoder makes pictures"):
        of_generator(task, Blueprint({}), {}, None)


def test_hidden_pixels_have_a_colour_of_their_own():
    levels = np.arange(4).reshape(1, 2, 2, 1)
    found = colour(levels, np.array([True, False, False, True]).reshape(1, 2, 2, 1))
    np.testing.assert_array_equal(found[0], [[HIDDEN, [1] * 3], [[2] * 3, HIDDEN]])


def test_a_page_of_text_opens_with_held_out_text_where_it_is_at_hand():
    vocabulary = letters()
    card, test = TextCard(vocabulary, 10), TextSource(vocabulary.encode("held out text"), 10, 10, 13)
    assert first_text(card, test) == "he__ o__ t" and first_text(card, None) == "_" * 10
    assert text_demo.first_text(card, test) == "held " and text_demo.first_text(card, None) == " "
