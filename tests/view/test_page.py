"""The viewer's page in a real browser: its rule is the gate's, what it draws are the nuclei; keys and fingers work."""

from __future__ import annotations

import base64
import json
import re
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np
import pytest

from cellslide.classify.decision import DecisionConfig, decide, prior_ratio
from cellslide.types import Calibration, PathProbs
from cellslide.view import cells as view_cells
from cellslide.view.answers import Viewer
from cellslide.view.server import LOOPBACK, Server
from tests.support.browser import Chromium, Page
from tests.support.random_cells import ellipses, write_table
from tests.viewed import CALIBRATION, CLASSES, HEIGHT, WIDTH, Viewed, made_up_probs, serving, write_viewed

HERE, ALL = "td:nth-child(2)", "td:nth-child(3)"
RULES = [
    DecisionConfig("mix", abstain=0.55),
    DecisionConfig("local", abstain=0.0),
    DecisionConfig("global", thresholds=None, abstain=0.3),
    DecisionConfig("safe", abstain=0.6),
    DecisionConfig("safe", tau=0.6, gamma=0.0, abstain=0.0),
    DecisionConfig("safe", tau=0.83, gamma=0.21, abstain=0.7),
    DecisionConfig("mix", abstain=0.4, prior=(1.0,)),
]


@pytest.fixture(scope="module")
def viewed(tmp_path_factory: pytest.TempPathFactory) -> Viewed:
    """Return a typed slide's folder; no test may change it."""
    return write_viewed(tmp_path_factory.mktemp("viewed") / "out")


@pytest.fixture(scope="module")
def server(viewed: Viewed) -> Iterator[Server]:
    with serving(Viewer(viewed.root)) as server:
        yield server


@contextmanager
def looking(chromium: Chromium, server: Server, slide: str = "s", **window: Any) -> Iterator[Page]:
    """Open a slide's page and wait until its nuclei are drawn."""
    with chromium.page(**window) as page:
        page.open(f"{server.address}s/{slide}/")
        settled(page)
        yield page


def settled(page: Page) -> None:
    """Wait until the view is at rest and its cells are there."""
    # After a click on a link the page that it was on may still be there, without a status.
    page.wait("document.getElementById('status')?.dataset.n !== undefined")
    page.raw.wait_for_load_state("networkidle")
    page.raw.wait_for_timeout(250)


def numbers(page: Page, column: str) -> list[int]:
    """Return a column of the table of classes: the classes, those that abstain, those not typed."""
    words = page.run("s => [...document.querySelectorAll('#classes tbody ' + s)].map(c => c.textContent)", column)
    return [int(word.replace(",", "")) for word in words]


def slide_to(page: Page, name: str, value: float) -> None:
    """Move a slider as a hand does."""
    page.run(
        "([id, v]) => { const e = document.getElementById(id); e.value = v; e.dispatchEvent(new Event('input')); }",
        [name, value],
    )


def at(page: Page, xy: np.ndarray) -> tuple[float, float]:
    """Return where a point of the slide is in the window while the whole slide is in view."""
    box = page.raw.locator("#slide").bounding_box()
    assert box is not None
    scale = min(box["width"] / WIDTH, box["height"] / HEIGHT)
    x = box["x"] + box["width"] / 2 + (xy[0] - WIDTH / 2) * scale
    return x, box["y"] + box["height"] / 2 + (xy[1] - HEIGHT / 2) * scale


def expected(probs: PathProbs, decision: DecisionConfig, calibration: Calibration = CALIBRATION) -> list[int]:
    """Return how many cells are of each class, abstain, are not typed."""
    known = np.flatnonzero(~np.isnan(probs.local).any(axis=1))
    made = decide(PathProbs(probs.local[known], probs.global_[known], probs.gate[known]), decision, calibration)
    k = probs.local.shape[1]
    counts = np.bincount(np.where(made.abstained, k, made.class_index), minlength=k + 1).tolist()
    return [*counts, len(probs) - len(known)]


DECIDE = """
async ([rule, policy, local, global, gate, n, k]) => {
  const { decide } = await import("../../static/decide.js");
  const floats = (text) => new Float32Array(Uint8Array.from(atob(text), (c) => c.charCodeAt(0)).buffer);
  const out = decide(rule, policy, floats(local), floats(global), floats(gate), n, k);
  const say = (a) => btoa(Array.from(new Uint8Array(a.buffer), (b) => String.fromCharCode(b)).join(""));
  return [out.index, out.path, out.abstained, out.prob, out.all].map(say);
}
"""


@pytest.mark.parametrize("accepts", [True, False])
@pytest.mark.parametrize("k", [3, 11, 17])
def test_the_page_decides_as_the_gate_does(chromium: Chromium, server: Server, k: int, accepts: bool) -> None:
    """Class, path and abstention are equal; a probability may differ where exp and log of two libraries do."""
    probs, rng = made_up_probs(4_000, k, seed=k), np.random.default_rng(k)
    frequencies = rng.dirichlet(np.ones(k), 2)
    calibration = replace(
        CALIBRATION, class_prior=tuple(frequencies[0]),
        reliability_local=tuple(rng.uniform(0.2, 1, k)), reliability_global=tuple(rng.uniform(0.2, 1, k)),
        thresholds=tuple(rng.uniform(0.1, 0.8, k)), safe_accepts=accepts, temperature_global=1.0 if accepts else 1.3,
    )  # fmt: skip
    known = ~np.isnan(probs.local).any(axis=1)
    packed = [base64.b64encode(a.tobytes()).decode() for a in (probs.local, probs.global_, probs.gate)]
    with chromium.page() as page:
        page.open(f"{server.address}s/s/")
        for config in RULES:
            floors = config.gate in ("mix", "safe")
            prior = None if config.prior is None else tuple(frequencies[1])
            decision = replace(config, thresholds=calibration.thresholds if floors else None, prior=prior)
            part = PathProbs(probs.local[known], probs.global_[known], probs.gate[known])
            made = decide(part, decision, calibration)
            said = page.run(DECIDE, [_rule(calibration, prior), _policy(config, floors), *packed, len(probs), k])
            kinds = (np.int16, np.int8, np.uint8, np.float32, np.float32)
            index, path, abstained, top, vectors = (
                np.frombuffer(base64.b64decode(text), kind) for text, kind in zip(said, kinds, strict=True)
            )
            np.testing.assert_array_equal(index[known], made.class_index)
            np.testing.assert_array_equal(path[known], made.path)
            np.testing.assert_array_equal(abstained[known].astype(bool), made.abstained)
            np.testing.assert_allclose(top[known], made.class_prob, rtol=2e-7)
            np.testing.assert_allclose(vectors.reshape(-1, k)[known], made.prob, rtol=2e-6, atol=1e-12)
            assert (index[~known] == -1).all()
        settled(page)


def _rule(calibration: Calibration, prior: tuple[float, ...] | None) -> dict[str, Any]:
    """Return the calibration as the page takes it."""
    given = asdict(calibration)
    return {
        **given, "accepts": calibration.safe_accepts, "calibrated_tau": calibration.tau,
        "calibrated_gamma": calibration.gamma,
        "temperatures": [given[f"temperature_{name}"] for name in ("mix", "local", "global")],
        "prior_ratio": None if prior is None else prior_ratio(prior, calibration).tolist(),
    }  # fmt: skip


def _policy(config: DecisionConfig, floors: bool) -> dict[str, Any]:
    return {"gate": config.gate, "tau": config.tau, "gamma": config.gamma, "abstain": config.abstain, "floors": floors}


def test_sliders_decide_anew_in_the_page(chromium: Chromium, server: Server, viewed: Viewed) -> None:
    with looking(chromium, server) as page:
        stored = expected(viewed.probs, DecisionConfig())
        assert numbers(page, HERE) == numbers(page, ALL) == stored
        assert page.raw.locator("#tau").is_disabled() and page.raw.locator("#reset").is_disabled()
        before = len(page.requests)
        slide_to(page, "abstain", 0.9)
        floors = CALIBRATION.thresholds
        assert numbers(page, HERE) == expected(viewed.probs, DecisionConfig("mix", thresholds=floors, abstain=0.9))
        assert len(page.requests) == before, "the page asked for what it has"
        page.raw.locator("#floors").uncheck()
        page.raw.select_option("#gate", "safe")
        slide_to(page, "tau", 0.9)
        slide_to(page, "gamma", 0.3)
        slide_to(page, "abstain", 0.5)
        now = expected(viewed.probs, DecisionConfig("safe", tau=0.9, gamma=0.3, abstain=0.5))
        assert numbers(page, HERE) == now != stored
        settled(page)
        assert numbers(page, ALL) == now
        slide_to(page, "score", 0.75)
        settled(page)
        assert sum(numbers(page, HERE)) == sum(numbers(page, ALL)) == 150
        page.click("#reset")
        settled(page)
        assert numbers(page, HERE) == numbers(page, ALL) == stored
        page.shot("view-sliders", whole=False)


def test_nuclei_are_drawn_in_the_colour_of_their_class(chromium: Chromium, server: Server, viewed: Viewed) -> None:
    made = decide(viewed.probs, DecisionConfig("local", abstain=0.0), CALIBRATION)
    known = ~np.isnan(viewed.probs.local).any(axis=1)
    with looking(chromium, server) as page:
        page.raw.select_option("#gate", "local")
        slide_to(page, "abstain", 0)
        page.raw.locator("#floors").uncheck()
        page.raw.locator("#filled").check()
        settled(page)
        for k, spec in enumerate(CLASSES):
            inner = known & (made.class_index == k) & (np.abs(viewed.xy - (WIDTH / 2, HEIGHT / 2)) < 400).all(axis=1)
            x, y = at(page, viewed.xy[np.flatnonzero(inner)[0]])
            drawn = np.array(page.color_at(x, y), float)
            box = page.raw.locator("#classes tbody input[type=checkbox]").nth(k)
            box.uncheck()
            bare = np.array(page.color_at(x, y), float)
            # Painted over the disc with three tenths of the colour.
            np.testing.assert_allclose(drawn, 0.7 * bare + 0.3 * np.array(spec.color), atol=4)
            box.check()
        page.press("o")
        x, y = at(page, viewed.xy[np.flatnonzero(known)[0]])
        np.testing.assert_allclose(page.color_at(x, y), (95, 55, 140), atol=8)
        assert page.raw.get_attribute("#overlay", "aria-pressed") == "false"


def test_colours_can_be_those_that_all_eyes_tell_apart(chromium: Chromium, server: Server) -> None:
    colors = "[...document.querySelectorAll('#classes input[type=color]')].slice(0, 3).map(e => e.value)"
    with looking(chromium, server) as page:
        assert page.run(colors) == ["#dc1e1e", "#1e5adc", "#14963c"]
        page.raw.locator("#plain").check()
        assert page.run(colors) == ["#e69f00", "#0072b2", "#009e73"]


def test_a_click_shows_both_paths_and_the_crop(chromium: Chromium, server: Server, viewed: Viewed) -> None:
    row = 7 * 20 + 9
    with looking(chromium, server) as page:
        page.raw.mouse.click(*at(page, viewed.xy[row]))
        page.wait("!document.getElementById('nucleus').hidden")
        settled(page)
        assert page.text("#nucleus-title") == f"Nucleus {row}"
        words = page.text("#nucleus .bars")
        local, global_ = (p[row] for p in (viewed.probs.local, viewed.probs.global_))
        for values in (local, global_):
            for value in values:
                assert f"{100 * value:.1f} %" in words or np.isnan(value)
        assert page.run("[...document.querySelectorAll('#nucleus img')].every(i => i.naturalWidth > 32)")
        crop = page.pixels("#nucleus .picture")
        middle = crop[crop.shape[0] // 2 - 3 : crop.shape[0] // 2 + 3, crop.shape[1] // 2 - 3 : crop.shape[1] // 2 + 3]
        np.testing.assert_allclose(middle.reshape(-1, 3).mean(axis=0), (95, 55, 140), atol=10)
        yellow = (np.abs(crop.astype(int) - (255, 212, 0)).max(axis=2) < 40).sum()
        assert yellow > 60, "no outline on the crop"
        before = page.text("#verdict")
        slide_to(page, "abstain", 1)
        assert "abstains" in page.text("#verdict") and page.text("#verdict").split("Now")[0] == before.split("Now")[0]
        page.press("Escape")
        assert page.run("document.getElementById('nucleus').hidden")


def test_the_panel_says_nothing_of_a_nucleus_that_it_does_not_show_yet(
    chromium: Chromium, server: Server, viewed: Viewed
) -> None:
    """The next one is chosen, and its cell is slow to come: what is decided of it is not said of the one before."""
    first, second = 7 * 20 + 9, 7 * 20 + 10
    hold = "const real = fetch; window.fetch = (to, how) => !String(to).startsWith('cell/') ? real(to, how) :"
    hold += " new Promise((go) => { window.release = () => go(real(to, how)); });"
    with looking(chromium, server) as page:
        page.raw.mouse.click(*at(page, viewed.xy[first]))
        page.wait("!document.getElementById('nucleus').hidden")
        settled(page)
        said = page.text("#verdict")
        page.run(f"() => {{ {hold} }}")
        page.raw.mouse.click(*at(page, viewed.xy[second]))
        page.wait("window.release !== undefined")
        slide_to(page, "abstain", 0.99)
        assert page.text("#nucleus-title") == f"Nucleus {first}" and page.text("#verdict") == said
        page.run("window.release()")
        page.wait(f"document.getElementById('nucleus-title').textContent === 'Nucleus {second}'")
        assert "abstains" in page.text("#verdict")


def test_keys_walk_and_zoom(chromium: Chromium, server: Server, viewed: Viewed) -> None:
    with looking(chromium, server) as page:
        page.raw.locator("#slide .openseadragon-canvas").first.focus()
        for _ in range(20):
            page.press("+")
            page.raw.wait_for_timeout(150)
            if page.run("Number(document.getElementById('status').dataset.n) < 60"):
                break
        page.wait("n => Number(document.getElementById('status').dataset.n) < n", 60)
        settled(page)
        page.press("n")
        page.wait("document.getElementById('nucleus').dataset.row")
        rows = [page.run("document.getElementById('nucleus').dataset.row")]
        middle = np.array([WIDTH / 2, HEIGHT / 2])
        far = np.abs(viewed.xy[int(rows[0])] - middle).max()
        assert far <= 60, "the first is in the middle"
        page.press("n")
        page.wait("r => document.getElementById('nucleus').dataset.row !== r", rows[0])
        page.press("p")
        page.wait("r => document.getElementById('nucleus').dataset.row === r", rows[0])
        place = page.text("#status")
        page.press("r", "f")
        page.raw.wait_for_timeout(300)
        assert page.text("#status") == place
        for _ in range(8):
            page.press("ArrowRight")
        page.raw.wait_for_timeout(900)
        page.press("0")
        page.wait("document.getElementById('status').dataset.n === '300'")


def test_the_address_holds_the_place_and_odd_nuclei_come_in_turn(
    chromium: Chromium, server: Server, viewed: Viewed
) -> None:
    row = "document.getElementById('nucleus').dataset.row"
    with chromium.page() as page:
        page.open(f"{server.address}s/s/#x=840&y=440&w=200")
        settled(page)
        assert page.text("#status").startswith(("4 ", "5 ", "6 ", "7 ", "8 ", "9 "))
        page.press("u")
        page.wait(f"{row} !== undefined")
        first = int(page.run(row))
        page.wait("xy => { const a = new URLSearchParams(location.hash.slice(1)); "
                  "return Math.abs(a.get('x') - xy[0]) < 2 && Math.abs(a.get('y') - xy[1]) < 2; }",
                  viewed.xy[first].tolist())  # fmt: skip
        page.press("u")
        page.wait(f"r => {row} !== r", str(first))
        assert page.text("#found") == "least sure: 2 of 200"
        page.raw.fill("#find-id", "42")
        page.press("Enter")
        page.wait(f"{row} === '42'")
        slide_to(page, "abstain", 0.25)
        assert page.text("#command").endswith("--regate --gate mix --abstain 0.25") and str(viewed.folder) in page.text(
            "#command"
        )
        page.shot("view-found")


def test_every_control_is_reached_by_tab_and_has_a_name(chromium: Chromium, server: Server) -> None:
    with looking(chromium, server) as page:
        page.raw.select_option("#gate", "safe")
        slide_to(page, "abstain", 0.3)
        wanted = set(page.run(
            "[...document.querySelectorAll('button, input, select, summary')].filter(e => e.checkVisibility() &&"
            "!e.disabled && !e.closest('.navigator')).map("
            "e => e.id || e.ariaLabel || e.closest('tr')?.cells[0].innerText)"
        ))  # fmt: skip
        seen = set()
        for _ in range(60):
            page.press("Tab")
            seen.add(page.run(
                "(e => e.id || e.ariaLabel || e.closest('tr')?.cells[0].innerText)(document.activeElement)"
            ))  # fmt: skip
        assert wanted - seen <= {None}, wanted - seen
        nameless = page.run(
            "[...document.querySelectorAll('button, input, select')].filter(e => e.checkVisibility() &&"
            "!e.closest('.navigator') && !(e.labels?.length || e.ariaLabel || e.innerText)).map(e => e.outerHTML)"
        )
        assert nameless == []


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [1280, 400])
def test_it_fits_light_and_dark(chromium: Chromium, server: Server, width: int, dark: bool) -> None:
    with looking(chromium, server, width_px=width, dark=dark, touch=width == 400) as page:
        assert not page.overflows()
        page.shot(f"view-{width}-{'dark' if dark else 'light'}", whole=False)
        shade = page.run("getComputedStyle(document.body).backgroundColor")
        assert (max(map(int, re.findall(r"\d+", shade)[:3])) < 80) == dark
        stage = page.raw.locator("#stage").bounding_box()
        assert stage is not None and stage["height"] > 300 and stage["width"] >= min(width, 900)


def test_fingers_choose_a_nucleus(chromium: Chromium, server: Server, viewed: Viewed) -> None:
    row = 7 * 20 + 9
    with looking(chromium, server, width_px=400, touch=True) as page:
        page.raw.touchscreen.tap(*at(page, viewed.xy[row]))
        page.wait("!document.getElementById('nucleus').hidden")
        assert page.text("#nucleus-title") == f"Nucleus {row}"
        page.click("#side-toggle")
        assert not page.raw.locator("#side").is_visible()


def test_a_crowd_is_a_density_until_one_comes_near(
    chromium: Chromium, server: Server, viewed: Viewed, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(view_cells, "MOST_POINTS", 120)
    with looking(chromium, server) as page:
        assert "density" in page.text("#status")
        paler = page.pixels("#slide").astype(int)
        page.click("#show-none")
        assert np.abs(page.pixels("#slide").astype(int) - paler).mean() > 1.5
        page.click("#show-all")
        slide_to(page, "abstain", 1)
        settled(page)
        gone = expected(viewed.probs, DecisionConfig(abstain=1.0))
        assert numbers(page, ALL) == gone
        for _ in range(3):
            page.click("#zoom-in")
            page.raw.wait_for_timeout(300)
        page.wait("document.getElementById('status').dataset.form === 'outlines'")


def test_the_list_and_a_slide_that_is_gone(chromium: Chromium, viewed: Viewed, tmp_path: Path) -> None:
    shutil.copytree(viewed.folder, tmp_path / "out" / "s")
    write_table(tmp_path / "out" / "gone & <b>", ellipses(40)).close()
    (tmp_path / "out" / "s" / "report.html").write_text("<!doctype html><title>r</title><p id=r>report here")
    with serving(Viewer(tmp_path / "out")) as server, chromium.page() as page:
        page.open(server.address)
        page.shot("view-list", whole=False)
        page.click("a:has-text('gone')")
        settled(page)
        assert page.text("#title") == "s1" and "--slide" in page.text("#trouble")
        assert page.run("document.getElementById('status').dataset.n") == "40"
        page.shot("view-gone", whole=False)
        page.click("#all")
        page.click("a:text-is('s')")
        settled(page)
        page.click("#links a:text-is('report')")
        assert page.text("#r") == "report here"


HOSTILE = """<!doctype html><title>r</title><p id=r>page</p><a id=link href="../s/report.html">on</a>
<link rel=prefetch href="{to}/prefetch"><meta http-equiv=refresh content="1; url={to}/refresh">
<img src="{to}/image"><iframe src="{to}/frame"></iframe><form id=f action="{to}/form"><input name=a></form>
<script>
  document.title = "ran"; fetch("{to}/fetch"); navigator.sendBeacon("{to}/beacon"); new Image().src = "{to}/script";
  open("{to}/open"); document.getElementById("f").submit();
  location.href = "{to}/?" + encodeURIComponent(location.href);
</script>
"""


def received(sink: socket.socket) -> bytes:
    """Return all that was sent to a socket; Chromium connects ahead for a frame that it refuses, and sends nothing."""
    sink.settimeout(0.1)
    content = b""
    with suppress(TimeoutError):
        while True:
            line, _ = sink.accept()
            line.settimeout(0.1)
            with line, suppress(TimeoutError):
                content += line.recv(1000)
    return content


def test_a_page_of_the_folder_sends_nothing_out_and_its_links_work(
    chromium: Chromium, viewed: Viewed, tmp_path: Path
) -> None:
    shutil.copytree(viewed.folder, tmp_path / "out" / "s")
    (tmp_path / "out" / "s" / "report.html").write_text("<!doctype html><title>r</title><p id=next>report here")
    with socket.create_server((LOOPBACK, 0)) as sink, serving(Viewer(tmp_path / "out")) as server:
        page_file = tmp_path / "out" / "s" / "hostile.html"
        page_file.write_text(HOSTILE.format(to=f"http://{LOOPBACK}:{sink.getsockname()[1]}"))
        blocked = ("Content Security Policy", "sandbox", "status 403", "403 (Forbidden)", "csp")
        with chromium.page(expected=blocked) as page:
            page.open(f"{server.address}files/s/hostile.html")
            assert page.raw.url == f"http://{LOOPBACK}:{server.server_port}/files/s/hostile.html"
            page.raw.wait_for_timeout(3000)
            assert received(sink) == b""
            assert page.raw.title() == "r"
            # The browser leaves the cookie out at first: a sandboxed page is of no site.
            page.click("#link")
            page.wait("document.getElementById('next') !== null")
            assert page.raw.url.endswith("/files/s/report.html")


def test_no_secret_is_left_in_the_browser(chromium: Chromium, viewed: Viewed) -> None:
    with serving(Viewer(viewed.root)) as server, chromium.page(expected=("status 403", "403 (Forbidden)")) as page:
        link = server.address
        page.open(link)
        settled(page)
        assert page.raw.url.partition("#")[0] == f"http://{LOOPBACK}:{server.server_port}/s/s/"
        assert page.run("document.cookie") == "" and page.run("document.referrer") == ""
        (cookie,) = page.raw.context.cookies()
        assert cookie["httpOnly"] and cookie["sameSite"] == "Strict" and cookie["expires"] == -1
        page.open(link)
        assert "Enter" in page.text() and server.viewer.token not in server.address


def test_a_link_opened_from_another_site_leads_to_the_slide(chromium: Chromium, viewed: Viewed, tmp_path: Path) -> None:
    with serving(Viewer(viewed.root)) as server, chromium.page(expected=("status 403", "403 (Forbidden)")) as page:
        (tmp_path / "mail.html").write_text(f'<a id="a" href="{server.address}">slides</a>')
        page.open(tmp_path / "mail.html")
        page.click("#a")
        settled(page)
        assert page.raw.url.partition("#")[0] == f"http://{LOOPBACK}:{server.server_port}/s/s/"


def test_corrections_are_saved_as_geojson(chromium: Chromium, server: Server, viewed: Viewed) -> None:
    """Deleted, retyped, added and a checked square come out as they were marked; undo takes back the last."""
    near = np.argsort(np.abs(viewed.xy - (WIDTH / 2, HEIGHT / 2)).max(axis=1))
    first, second = viewed.xy[near[0]], viewed.xy[near[3]]
    corners = np.array([[WIDTH * 0.3, HEIGHT * 0.3], [WIDTH * 0.6, HEIGHT * 0.7]])
    with looking(chromium, server) as page:
        mouse = page.raw.mouse
        assert page.raw.locator("#save").is_hidden() and page.raw.locator("#undo").is_disabled()
        page.press("x")
        assert "Choose a nucleus" in page.text("#trouble")
        for place in (first, second):
            mouse.click(*at(page, place))
            page.wait("!document.getElementById('nucleus').hidden")
            page.raw.wait_for_load_state("networkidle")
            if place is first:
                page.press("x")
        page.raw.select_option("#class-of", CLASSES[1].name)
        page.click("#retype-it")
        page.press("a")
        mouse.click(*at(page, np.array([WIDTH * 0.25, HEIGHT * 0.8])))
        page.press("a", "c")
        mouse.move(*at(page, corners[0]))
        mouse.down()
        mouse.move(*at(page, corners[1]), steps=4)
        mouse.up()
        assert page.text("#corrected") == "1 deleted, 1 retyped, 1 added, 1 checked"
        inside = ((viewed.xy >= corners[0] + 2) & (viewed.xy < corners[1] - 2)).all(axis=1)
        counted = sum(int(n) for n in re.findall(r" (\d+)(?:,|$)", page.text("#measured").split("mm²:")[1]))
        assert inside.sum() <= counted <= inside.sum() + 12
        page.shot("view-corrections", whole=False)
        saved = json.loads(unquote(page.run("() => document.getElementById('save').href").split(",", 1)[1]))
        square, *marks = saved["features"]
        assert square["properties"]["classification"]["name"] == "checked"
        assert np.allclose(square["geometry"]["coordinates"][0][0], corners[0], atol=2)
        assert [m["properties"]["correction"] for m in marks] == ["deleted", "retyped", "added"]
        assert marks[1]["properties"]["classification"]["name"] == CLASSES[1].name and marks[1]["id"] != marks[0]["id"]
        assert np.allclose(marks[0]["geometry"]["coordinates"], first, atol=3)
        page.click("#undo")
        assert page.text("#corrected") == "1 deleted, 1 retyped, 1 added"
        page.press("c", "m")
        mouse.move(*at(page, corners[0]))
        mouse.down()
        mouse.move(*at(page, corners[1]), steps=4)
        mouse.up()
        assert re.match(r"[\d.]+ [µm]m", page.text("#measured"))
