"""The playground: its files and their policy, and the page itself in a headless Chromium."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from llmc.runtime.server import playground_page
from tests.server.browser import CHROMIUM, Browser
from tests.server.running import REPLY, RunningServer, assert_error
from tests.server.test_tools import ECHO

FOLDER = Path(playground_page.__file__).parent / "playground"
NASTY_REPLY = "<img src=x onerror=\"document.title='owned'\"><script>document.title='owned'</script> <b>bold</b> done"
EMPTY = "Array.from(document.querySelectorAll('.message.assistant pre')).at(-1)"


@pytest.fixture(scope="module")
def echoing() -> Iterator[RunningServer]:
    with RunningServer(settings={"chat_template": ECHO}, engine={"max_model_len": 1024, "step_ms": 2}) as running:
        yield running


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    if CHROMIUM is None:
        pytest.skip("no Chromium here (apt-get install chromium)")
    with Browser() as running:
        yield running


def say(browser: Browser, text: str) -> None:
    """Send a message and wait for the end of its answer."""
    browser.value("document.getElementById('input').focus()")
    browser.type(text)
    browser.wait("document.querySelector('.message.assistant:last-child .figures') !== null")


def test_files_and_policy(server: RunningServer) -> None:
    for path, kind in (("/", "text/html"), ("/playground/playground.js", "text/javascript"), ("/playground/playground.css", "text/css")):
        answer = server.http.get(path)
        assert answer.status_code == 200 and answer.headers["content-type"].startswith(kind)
        policy = answer.headers["content-security-policy"]
        assert "default-src 'none'" in policy and "trusted-types 'none'" in policy and "unsafe" not in policy
        assert answer.headers["x-content-type-options"] == "nosniff" and answer.headers["x-frame-options"] == "DENY"
    for path in ("/playground/", "/playground/index.html", "/playground/../app.py", "/playground/%2e%2e/app.py", "/favicon.ico"):
        assert_error(server.http.get(path), 404)


def test_nothing_comes_from_elsewhere_and_nothing_is_html() -> None:
    for file in FOLDER.iterdir():
        text = file.read_text()
        assert not re.search(r"https?://|@import|url\(", text), file
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|DOMParser|eval\(|new Function|srcdoc", text), file
    page = (FOLDER / "index.html").read_text()
    assert not re.search(r"<script(?![^>]* src=)|<style|\sstyle=|\son[a-z]+=", page)


def test_keys_and_docs_switch_it_off() -> None:
    with RunningServer(settings={"api_keys": ["k"]}) as running:
        assert_error(running.http.get("/"), 401)
    with RunningServer(settings={"disable_docs": True}) as running:
        assert_error(running.http.get("/"), 404)


def test_a_conversation_with_probabilities(server: RunningServer, browser: Browser) -> None:
    browser.complaints.clear()
    browser.addresses.clear()
    browser.open(server.url + "/")
    browser.wait("document.querySelectorAll('#model option').length === 1")
    assert browser.value("document.getElementById('status').textContent") == "context of 512 tokens"
    browser.value("document.getElementById('seed').value = '7'")
    say(browser, "Hello")
    assert browser.value(f"{EMPTY}.textContent") == REPLY
    assert browser.value("document.querySelectorAll('.message.assistant .token.p3').length") > 5  # the fake engine is sure to 78 %
    assert "ended by stop" in browser.value("document.querySelector('.figures').textContent")
    assert browser.value("document.getElementById('tip').hidden") is True
    browser.hover(".message.assistant .token:nth-child(2)")
    browser.wait("!document.getElementById('tip').hidden")
    rows = browser.value("Array.from(document.querySelectorAll('#tip tr')).map(row => row.textContent)")
    assert len(rows) == 5 and rows[0].endswith("77.9 %") and rows[1].endswith("28.7 %")
    browser.value("document.getElementById('probabilities').click(); document.getElementById('mode').value = 'completion'")
    browser.value("document.getElementById('max_tokens').value = '3'")
    say(browser, "Once")
    assert "ended by length" in browser.value("Array.from(document.querySelectorAll('.figures')).at(-1).textContent")
    assert browser.complaints == []
    assert all(address.startswith((server.url + "/", "data:")) for address in browser.addresses) and len(browser.addresses) >= 6


def test_what_a_model_writes_is_text(echoing: RunningServer, browser: Browser) -> None:
    browser.complaints.clear()
    browser.open(echoing.url + "/")
    browser.wait("document.querySelectorAll('#model option').length === 1")
    browser.value("document.getElementById('max_tokens').value = '600'")
    say(browser, f"<think>{NASTY_REPLY}</think>{NASTY_REPLY}")
    assert browser.value(f"{EMPTY}.textContent") == NASTY_REPLY
    assert browser.value("document.querySelector('.message.assistant details pre').textContent") == NASTY_REPLY
    assert browser.value("document.querySelectorAll('.message img, .message script, .message b').length") == 0
    assert browser.value("document.title") == "llmc playground" and browser.complaints == []
    refused = "(() => { try { document.body.innerHTML = 'x'; return 'set' } catch (error) { return error.name } })()"
    assert browser.value(refused) == "TypeError"  # the policy itself, not only this script's care


def test_errors_and_stopping(echoing: RunningServer, browser: Browser) -> None:
    browser.open(echoing.url + "/")
    browser.wait("document.querySelectorAll('#model option').length === 1")
    browser.value("document.getElementById('max_tokens').value = '99999'")
    say(browser, "Hello")
    assert "context is 1024 tokens" in browser.value("document.querySelector('.error').textContent")
    browser.value("document.getElementById('max_tokens').value = '600'; document.getElementById('clear').click()")
    seen = "document.querySelectorAll('.message.assistant .token').length > 3"
    press = f"new MutationObserver(() => {seen} && document.getElementById('stop-button').click())"
    browser.value(f"{press}.observe(document.getElementById('log'), {{ childList: true, subtree: true }}); input.focus()")
    browser.type("word " * 60)
    browser.wait("document.querySelector('.figures') !== null")
    assert browser.value("document.querySelector('.figures').textContent") == "ended by you"
    echoing.wait_for_load(0, 0)


@pytest.mark.parametrize("dark", [False, True])
def test_light_and_dark(server: RunningServer, browser: Browser, dark: bool) -> None:
    browser.open(server.url + "/", dark=dark)
    browser.value("localStorage.removeItem('llmc-theme')")
    browser.open(server.url + "/?again", dark=dark)
    back = "getComputedStyle(document.body).backgroundColor"
    colours = {False: "rgb(247, 247, 245)", True: "rgb(20, 22, 26)"}
    assert browser.value(back) == colours[dark]
    browser.value(f"theme.value = '{'light' if dark else 'dark'}'; theme.dispatchEvent(new Event('change'))")
    assert browser.value(back) == colours[not dark]
    browser.open(server.url + "/", dark=dark)
    assert browser.value(back) == colours[not dark]  # kept
    browser.value("localStorage.removeItem('llmc-theme')")
