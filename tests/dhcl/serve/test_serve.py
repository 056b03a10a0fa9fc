"""The page of ``dhcl serve``: what it answers, what it refuses, and in a browser."""

import contextlib
import csv
import http.client
import io
import json
import os
import shutil
import signal
import socket
import struct
import threading
import time
import zlib
from urllib.parse import quote

import numpy as np
import pytest
import torch
from dhcl.cli import main
from dhcl.inference.index import Index
from dhcl.inference.search import search
from dhcl.inference.update import create_index
from PIL import Image

from tests.dhcl.browser import chromium

pytest.importorskip("fastapi", reason="the extra serve is not installed")

from dhcl.serve.app import make_app
from dhcl.serve.gallery import Gallery
from dhcl.serve.server import address, is_loopback, make_server, open_port

PATTERN = r"(?P<id>-?\d+)_c(?P<camera>\d+)(?:.*_t(?P<time>\d+))?"
MARKUP = "=cmd 0099_c1 <img src=x onerror='document.title=1'>.png"
LIMIT = 100_000


@contextlib.contextmanager
def served(gallery, **options):
    """The address of a page that is answered from a thread."""
    with open_port("127.0.0.1", 0) as opened:
        server = make_server(make_app(gallery, max_bytes=LIMIT, **options))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [opened]})
        thread.start()
        try:
            yield address(opened)
        finally:
            server.should_exit = True
            thread.join()


@pytest.fixture(scope="module")
def folder(pictures, tmp_path_factory):
    """16 images, and four of them under odd names: by markup, bytes and links."""
    place = tmp_path_factory.mktemp("gallery")
    root = place / "images"
    shutil.copytree(pictures / "bounding_box_test", root)
    for number, file in enumerate(sorted(root.iterdir())):
        file.rename(root / f"{file.stem}_t{1_700_000_000 + number}.png")
    files = sorted(root.iterdir())
    shutil.copy(files[0], root / MARKUP)
    shutil.copy(files[1], os.fsencode(root) + b"/caf\xe9.png")
    shutil.copy(files[2], place / "secret.png")
    (root / "outward.png").symlink_to(place / "secret.png")
    (root / "inward.png").symlink_to(files[3])
    return root


@pytest.fixture(scope="module")
def index(folder, model):
    create_index(folder.parent / "index", [folder], model, pattern=PATTERN)
    return Index.open(folder.parent / "index")


@pytest.fixture(scope="module")
def page(index, model):
    with served(Gallery(index, model), hosts=frozenset({"reid.example"})) as url:
        yield url


def ask(url, path, body=None, method=None, **headers):
    """Status, headers and body of an answer."""
    host = url.removeprefix("http://").rstrip("/")
    link = http.client.HTTPConnection(host, timeout=20)
    try:
        names = {name.replace("_", "-"): value for name, value in headers.items()}
        link.request(method or ("GET" if body is None else "POST"), path, body, names)
        answer = link.getresponse()
        return answer.status, answer.headers, answer.read()
    finally:
        link.close()


def told(url, path, body=None, **headers):
    status, _, data = ask(url, path, body, **headers)
    assert status == 200, data
    return json.loads(data)


def refused(url, path, body=None, **headers):
    status, _, data = ask(url, path, body, **headers)
    assert status >= 400
    return status, json.loads(data)["error"]


def row_of(index, name):
    return next(row for row, record in enumerate(index.records) if record.path == name)


def test_the_gallery_is_listed_by_what_is_asked_for(page, index):
    about = told(page, "/about")
    assert (about["name"], about["images"], about["cameras"]) == ("index", len(index), ["1", "2"])
    everything = told(page, "/rows?limit=200")
    assert everything["total"] == len(everything["rows"]) == len(index)
    part = told(page, "/rows?offset=5&limit=3")
    assert (part["total"], part["rows"]) == (len(index), everything["rows"][5:8])
    of = {
        "camera=0": lambda each: each["camera"] == "1",
        "camera=0&camera=1": lambda each: each["camera"] is not None,
        "id=0009": lambda each: each["id"] == "9",
        "id=nobody": lambda each: False,
        "since=1700000004": lambda each: (each["time"] or 0) >= 1_700_000_004,
        "since=1700000004&until=1700000006.5&camera=1": lambda each: (
            1_700_000_004 <= (each["time"] or 0) <= 1_700_000_006.5 and each["camera"] == "2"
        ),
    }
    for query, meant in of.items():
        found = told(page, f"/rows?{query}&limit=200")["rows"]
        assert found == [each for each in everything["rows"] if meant(each)], query
    assert "caf\\udce9.png" in [each["path"] for each in everything["rows"]]
    assert refused(page, "/rows?camera=-1") == (
        400,
        "camera.0: input should be greater than or equal to 0",
    )
    assert refused(page, "/rows?since=nan")[0] == refused(page, "/rows?order=1")[0] == 400


@pytest.mark.parametrize("rerank", [False, True])
def test_a_row_finds_what_the_index_finds_without_itself(rerank, page, index):
    query = torch.tensor(np.array(index.features[3:4]))
    [expected] = index.search(query, len(index), rerank=rerank)
    keep = expected.indices != 3
    got = told(page, f"/search?row=3&topk=7&rerank={rerank}", b"")
    rows = [each["row"] for each in got["results"]]
    assert rows == expected.indices[keep][:7].tolist()
    similarities = [each["similarity"] for each in got["results"]]
    assert np.allclose(similarities, expected.similarities[keep][:7], atol=1e-6)
    assert [each["rank"] for each in got["results"]] == [*range(1, 8)]
    assert all((each["distance"] is not None) == rerank for each in got["results"])
    assert got["reranked"] == rerank


def test_filters_choose_of_the_same_order(page, index):
    whole = [each["row"] for each in told(page, "/search?row=0&topk=100", b"")["results"]]
    records = index.records
    for query, meant in {
        "camera=1": lambda row: records[row].camera == 2,
        "id=10": lambda row: records[row].id == 10,
        "until=1700000009": lambda row: (records[row].time or 1e99) <= 1_700_000_009,
        "other_cameras=true": lambda row: records[row].camera != records[0].camera,
        "camera=1&id=12&rerank=true": lambda row: (records[row].camera, records[row].id) == (2, 12),
    }.items():
        got = told(page, f"/search?row=0&topk=100&{query}", b"")["results"]
        rows = [each["row"] for each in got]
        expected = [row for row in whole if meant(row)]
        assert expected
        assert sorted(rows) == sorted(expected)
        if "rerank" not in query:
            assert rows == expected, query
    assert told(page, "/search?row=0&id=nobody", b"")["results"] == []
    unknown = row_of(index, "inward.png")
    assert (
        "camera of the query is not known"
        in refused(page, f"/search?row={unknown}&other_cameras=true", b"")[1]
    )


def test_a_sent_image_finds_what_its_file_finds(page, index, model, pictures):
    files = sorted((pictures / "query").iterdir())
    query = model.features(files[4])
    expected = search(query, torch.tensor(np.array(index.features)), 5)
    got = told(page, f"/search?topk=5&name={quote(files[4].name)}", files[4].read_bytes())
    assert [each["row"] for each in got["results"]] == expected.indices[0].tolist()
    others = f"/search?topk=50&name={quote(files[4].name)}&other_cameras=true"
    cameras = {each["camera"] for each in told(page, others, files[4].read_bytes())["results"]}
    assert cameras == {"2", None}


def png(width, height):
    def chunk(kind, data):
        whole = kind + data
        return struct.pack(">I", len(data)) + whole + struct.pack(">I", zlib.crc32(whole))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = zlib.compress(bytes(100))
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")
    )


def test_what_is_no_image_to_search_with_is_refused_in_a_line(page, monkeypatch):
    assert refused(page, "/search", b"") == (400, "image: the file is empty")
    for data in (b"no image", b"%!PS-Adobe-3.0 EPSF-3.0\n", b"GIF89a", b"\x89PNG\r\n\x1a\n"):
        assert refused(page, "/search", data) == (400, "image: must be a JPEG, PNG or WebP")
    status, said = refused(page, "/search", png(50, 50))
    assert status == 400
    assert said.startswith("image: must be a whole, readable image")
    monkeypatch.setattr("dhcl.serve.gallery.read_bytes", None)  # it must not come to that
    status, said = refused(page, "/search", png(1 << 20, 1 << 20))
    assert status == 400
    assert "at most 67,108,864 pixels (got 1,048,576 x 1,048,576" in said


def test_what_is_too_large_is_not_taken_in(page):
    message = f"image: must have at most {LIMIT:,} bytes"
    assert refused(page, "/search", bytes(LIMIT + 1)) == (413, message)
    # Told by its length alone, with nothing of it sent; and without a length, as it comes.
    assert refused(page, "/search", b"", Content_Length=str(1 << 40)) == (413, message)
    parts = (bytes(50_000) for _ in range(3))
    assert refused(page, "/search", parts) == (413, message)


def test_pictures_are_of_the_index_alone(page, index, folder):
    status, headers, data = ask(page, "/pictures/0")
    assert (status, headers["Content-Type"]) == (200, "image/jpeg")
    assert Image.open(io.BytesIO(data)).size == (16, 32)
    assert ask(page, f"/pictures/{row_of(index, 'inward.png')}")[0] == 200
    odd = next(row for row, record in enumerate(index.records) if "caf" in record.path)
    assert ask(page, f"/pictures/{odd}")[0] == 200
    status, said = refused(page, f"/pictures/{row_of(index, 'outward.png')}")
    assert (status, said.startswith("picture: outward.png is a link to outside of")) == (404, True)
    assert refused(page, "/pictures/20")[0] == 404
    for wrong in ("/pictures/-1", f"/pictures/{1 << 70}", "/pictures/x", "/rows?camera=2"):
        assert refused(page, wrong)[0] == 400, wrong
    for path in ("/pictures/..%2f..%2fsecret.png", "/pictures/0/../../secret.png", "/page.html"):
        assert refused(page, path)[0] in (400, 404)


def test_a_gallery_that_has_moved_is_named(model, folder, tmp_path):
    shutil.copytree(folder, tmp_path / "here")
    create_index(tmp_path / "index", [tmp_path / "here"], model)
    gallery = Gallery(Index.open(tmp_path / "index"), model)
    (tmp_path / "here").rename(tmp_path / "there")
    with served(gallery) as url:
        status, said = refused(url, "/pictures/0")
        assert status == 404
        assert f"in {tmp_path / 'here'} any more; if the gallery has moved" in said
        assert len(told(url, "/search?row=0", b"")["results"]) == 19


def test_others_are_not_answered_and_every_answer_has_its_headers(page):
    own = page.removeprefix("http://").rstrip("/")
    port = own.rpartition(":")[2]
    for host in (
        own,
        f"localhost:{port}",
        "[::1]",
        "192.0.2.7:1",
        "reid.example",
        "REID.example.:9",
    ):
        assert ask(page, "/about", Host=host)[0] == 200, host
    for host in (
        "evil.example",
        f"evil.example:{port}",
        "localhost.evil.example",
        "",
        "127.0.0.1.x",
    ):
        assert refused(page, "/about", Host=host)[0] == 403, host
    row = ("/search?row=0&topk=1", b"")
    assert ask(page, *row, Origin=page.rstrip("/"), Sec_Fetch_Site="same-origin")[0] == 200
    for origin in ("http://evil.example", "null", f"http://localhost:{port}", page):
        assert refused(page, *row, Origin=origin)[0] == 403, origin
    for site in ("cross-site", "same-site"):
        assert refused(page, "/pictures/0", Sec_Fetch_Site=site)[0] == 403
    for path, status in {"/": 200, "/serve.js": 200, "/x": 404, "/rows?x=1": 400}.items():
        got, headers, _ = ask(page, path)
        assert got == status
        assert headers["X-Content-Type-Options"] == "nosniff"
        assert "default-src 'none'; script-src 'self'" in headers["Content-Security-Policy"]
        assert "unsafe" not in headers["Content-Security-Policy"]
        assert headers["Cache-Control"] == "no-store"
    assert refused(page, "/search?row=0")[0] == 405
    for path in ("/docs", "/openapi.json", "/redoc"):
        assert refused(page, path)[0] == 404


def marks(*given):
    plain = {"query": None, "name": "", "rank": 1, "similarity": 0.5, "distance": None}
    return json.dumps({"marks": [{**plain, "mark": "right", **each} for each in given]}).encode()


def test_marks_are_exported_as_the_index_knows_the_images(page, index):
    evil = row_of(index, MARKUP)
    body = marks(
        {"query": 0, "row": evil, "rank": 2, "distance": 0.25},
        {"name": "=HYPERLINK(1)\n.jpg", "row": 3, "mark": "wrong"},
    )
    status, headers, data = ask(page, "/marks?format=csv", body)
    assert (status, headers["Content-Type"]) == (200, "text/csv; charset=utf-8")
    assert headers["Content-Disposition"] == 'attachment; filename="marks.csv"'
    first, second = csv.DictReader(io.StringIO(data.decode(), newline=""))
    assert (first["query"], first["path"]) == (index.records[0].path, f"./{MARKUP}")
    assert (first["mark"], first["rank"], first["distance"]) == ("right", "2", "0.25")
    assert (first["id"], first["camera"]) == ("99", "1")
    assert (second["query"], second["mark"]) == ("./=HYPERLINK(1)\\n.jpg", "wrong")
    assert second["distance"] == ""
    whole = told(page, "/marks?format=json", body)
    assert whole["model"] == index.model
    assert [each["path"] for each in whole["marks"]] == [MARKUP, index.records[3].path]
    assert refused(page, "/marks?format=csv", marks({"row": 99}))[0] == 400
    for wrong in ({"row": 0, "mark": "maybe"}, {"row": 0, "path": "/etc/passwd"}, {"row": "x"}):
        assert refused(page, "/marks?format=json", marks(wrong))[0] == 400
    assert refused(page, "/marks?format=json", b"{")[0] == 400
    assert refused(page, "/marks?format=xml", marks())[0] == 400


def test_an_error_of_the_server_is_said_in_a_line(page, index, monkeypatch):
    def search(*_, **__):
        raise RuntimeError("out of luck\nand more")

    monkeypatch.setattr(Index, "find", search)
    assert refused(page, "/search?row=0", b"") == (500, "RuntimeError: out of luck")


def test_the_command_serves_until_it_is_stopped(index, run, capsys):
    with open_port("127.0.0.1", 0) as free:
        port = free.getsockname()[1]
    seen = []

    def look():
        for _ in range(200):
            with contextlib.suppress(OSError):
                seen.append(told(f"http://127.0.0.1:{port}", "/about"))
                break
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=look)
    thread.start()
    status = main(["serve", str(index.folder), "--port", str(port), "--device", "cpu"])
    thread.join()
    assert (status, seen[0]["images"]) == (0, len(index))
    said = capsys.readouterr()
    assert f"{len(index)} images, at http://127.0.0.1:{port}/ (Ctrl-C ends it)" in said.out
    assert said.out.endswith("ended\n")
    assert said.err == ""


def test_what_can_not_be_served_is_said_before_anything_is(index, run, tmp_path, capsys):
    with open_port("127.0.0.1", 0) as taken:
        port = str(taken.getsockname()[1])
        for words, message in {
            (str(tmp_path / "none"),): "is not an index",
            (str(index.folder), "--port", port): f"port: {port} of 127.0.0.1 can't be opened",
            (str(index.folder), "--port", "70000"): "port: must be from 0 to 65535",
            (str(index.folder), "--host", "host.invalid"): "host.invalid can't be opened",
            (str(index.folder), "--max-megabytes", "0"): "max_megabytes: must be from 1 to 256",
            (str(index.folder), "--port", "0", "--run", str(tmp_path)): "run",
        }.items():
            assert main(["serve", *words]) == 2, words
            assert message in capsys.readouterr().err, words


def test_a_warning_is_due_where_others_can_reach_it():
    for host in ("127.0.0.1", "127.8.8.8", "::1", "localhost"):
        assert is_loopback(host)
    for host in ("0.0.0.0", "::", "192.168.1.2", "reid.example", "localhost.example"):
        assert not is_loopback(host)
    with open_port("0.0.0.0", 0) as opened:
        assert address(opened) == f"http://127.0.0.1:{opened.getsockname()[1]}/"
    if socket.has_ipv6:
        with contextlib.suppress(Exception), open_port("::1", 0) as opened:
            assert address(opened).startswith("http://[::1]:")


# ---- in a browser -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser():
    with chromium() as opened:
        yield opened


@pytest.fixture
def tab(browser, page):
    """The page, opened; at the end it must have asked nobody else, and run no error."""
    context = browser.new_context(viewport={"width": 1280, "height": 900}, accept_downloads=True)
    opened = context.new_page()
    troubles = []
    opened.on("pageerror", lambda error: troubles.append(str(error)))
    opened.on("console", lambda m: troubles.append(m.text) if "policy" in m.text.lower() else None)
    inside = (page, f"blob:{page}", "data:")
    opened.on("request", lambda r: None if r.url.startswith(inside) else troubles.append(r.url))
    opened.goto(page)
    opened.wait_for_selector("html[data-ready]", state="attached")
    yield opened
    context.close()
    assert not troubles


def found(tab, count):
    """The paths of the results, when there are this many."""
    tab.wait_for_function(
        "n => document.querySelectorAll('#results li').length === n"
        " && !document.querySelector('#results[aria-busy]')",
        arg=count,
    )
    return tab.locator("#results li > span:last-of-type").all_text_contents()


def test_someone_searches_marks_and_exports(tab, index, model, pictures):
    assert tab.title() == "Search index"
    file = sorted((pictures / "query").iterdir())[2]
    tab.set_input_files("#file", file)
    [expected] = index.search(model.features(file), 20)
    assert found(tab, 20)[:3] == [index.records[row].path for row in expected.indices[:3].tolist()]
    tab.locator("#results .yes").nth(0).click()
    tab.locator("#results .no").nth(1).click()
    tab.locator("#results .no").nth(2).click()
    tab.locator("#results .no").nth(2).click()  # again takes it back
    assert tab.locator("#counts").text_content() == "Marked: 1 right, 1 wrong"
    assert tab.locator("#results li.right .yes").get_attribute("aria-pressed") == "true"
    with tab.expect_download() as download:
        tab.click("text=Export CSV")
    rows = [*csv.DictReader(io.StringIO(download.value.path().read_text()))]
    assert [(each["query"], each["rank"], each["mark"]) for each in rows] == [
        (file.name, "1", "right"),
        (file.name, "2", "wrong"),
    ]
    tab.fill("input[name=topk]", "4")
    tab.check("input[name=camera][value='1']")
    tab.check("input[name=rerank]")
    paths = found(tab, 4)
    assert all("_c2" in path for path in paths)
    assert "by re-ranked distance" in tab.locator("#said").text_content()
    assert "of 8" in tab.locator("#place").text_content()
    tab.click("text=Reset")
    found(tab, 20)
    tab.locator("#gallery button").nth(5).click()
    assert index.records[5].path not in found(tab, 19)
    tab.click("text=Remove marks")
    assert tab.locator("#marks").is_hidden()


def test_names_with_markup_are_shown_and_do_nothing(tab, index):
    assert tab.locator("#gallery").get_by_text(MARKUP).count() == 1
    tab.locator("#gallery button", has_text="onerror").click()
    found(tab, 19)
    assert MARKUP in tab.locator("#hint").text_content()
    assert tab.title() == "Search index"
    assert tab.locator("img[src=x]").count() == 0


def test_what_goes_wrong_is_said_on_the_page(tab, tmp_path):
    outward = "picture: outward.png is a link to outside of"
    tab.locator("#gallery li").last.scroll_into_view_if_needed()
    tab.wait_for_selector("#trouble:not([hidden])")
    assert tab.locator("#trouble p").text_content().startswith(outward)
    tab.click("#seen")
    assert tab.locator("#trouble").is_hidden()
    for name, data, message in (
        ("text.png", b"no image", "image: must be a JPEG, PNG or WebP"),
        ("large.png", bytes(LIMIT + 1), "large.png: the file is too large"),
    ):
        (tmp_path / name).write_bytes(data)
        tab.set_input_files("#file", tmp_path / name)
        tab.wait_for_function(
            "text => document.querySelector('#trouble').textContent.includes(text)", arg=message
        )
        assert tab.locator("#results li").count() == 0


def test_it_fits_a_narrow_window(tab):
    tab.set_viewport_size({"width": 360, "height": 740})
    tab.locator("#gallery button").nth(0).click()
    found(tab, 19)
    assert tab.evaluate("document.documentElement.scrollWidth") == 360
    assert (
        tab.evaluate("document.querySelector('#results-heading').getBoundingClientRect().top") < 400
    )
