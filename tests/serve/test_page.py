"""The page in a real browser: by mouse and by keyboard, on a desktop and on a phone, without a request to elsewhere."""

from contextlib import ExitStack

import pytest
from pages import chromium, fits, needs_chromium, visit
from playwright.sync_api import expect
from reward_server import picture, running

PROMPT = "What is in the picture?"
RESPONSES = ["two red circles", "I think so.", "two red circles on the left of the picture"]

pytestmark = [needs_chromium, pytest.mark.xdist_group("page")]  # one browser


@pytest.fixture(scope="module")
def browser():
    with chromium() as browser:
        yield browser


@pytest.fixture
def open_page(scorer, browser):
    """Open the page of a server."""
    with ExitStack() as stack:

        def start(*, token=None, width=1280):
            url = stack.enter_context(running(scorer, token=token))
            return stack.enter_context(visit(browser, url, width=width))

        yield start


def fill(page, responses=RESPONSES):
    page.get_by_label("Prompt").fill(PROMPT)
    for i, response in enumerate(responses):
        if i >= 2:
            page.get_by_role("button", name="Add a response").click()
        page.get_by_label(f"Response {i + 1}", exact=True).fill(response)


def ranking(page, name):
    """(response, reward) as one of the two rankings shows them."""
    rows = page.locator(f"#{name} li").all()
    return [(row.locator(".text").text_content(), float(row.locator(".reward").text_content())) for row in rows]


def expected(scorer, tmp_path=None):
    """The responses by their rewards, with the picture where `tmp_path` takes it."""
    record = {"prompt": PROMPT, "responses": RESPONSES}
    if tmp_path is not None:
        (tmp_path / "x.png").write_bytes(picture())
        record["img_path"] = str(tmp_path / "x.png")
    (rewards,) = scorer.score([record])
    return sorted(zip(RESPONSES, rewards, strict=True), key=lambda item: -item[1])


def check(shown, wanted):
    assert [text for text, _ in shown] == [text for text, _ in wanted]
    assert [reward for _, reward in shown] == pytest.approx([reward for _, reward in wanted], abs=6e-4)


@pytest.mark.parametrize("width", [1280, 390], ids=["desktop", "phone"])
def test_responses_are_ranked_with_and_without_the_image(open_page, scorer, tmp_path, width):
    page = open_page(width=width)
    fill(page)
    page.set_input_files("#file", files=[{"name": "cat.png", "mimeType": "image/png", "buffer": picture()}])
    expect(page.get_by_alt_text("Chosen image: cat.png")).to_be_visible()
    page.get_by_role("button", name="Rank responses").click()
    expect(page.get_by_role("status")).to_have_text("Ranked 3 responses.")
    with_image, without = expected(scorer, tmp_path), expected(scorer)
    check(ranking(page, "with"), with_image)
    check(ranking(page, "without"), without)
    margin = with_image[0][1] - with_image[1][1]
    assert f"{margin:.3f}" in page.locator("#with .margin").text_content()
    same = with_image[0][0] == without[0][0]
    expect(page.locator("#verdict")).to_contain_text("The same response" if same else "Another response")
    assert fits(page)
    assert not page.foreign and not page.complaints


def test_everything_can_be_done_with_the_keyboard(open_page, scorer):
    page = open_page()
    keys = page.keyboard

    def tab_to(identity):
        for _ in range(20):
            keys.press("Tab")
            if (
                page.evaluate("document.activeElement.id || document.activeElement.getAttribute('aria-label')")
                == identity
            ):
                return
        raise AssertionError(f"{identity} is not reached by Tab")

    tab_to("file")
    tab_to("prompt")
    keys.type(PROMPT)
    for i, response in enumerate(RESPONSES):
        if i == 2:
            tab_to("add")
            keys.press("Enter")
        else:
            tab_to(f"Response {i + 1}")
        keys.type(response)
    tab_to("rank")
    keys.press("Enter")
    expect(page.get_by_role("status")).to_have_text("Ranked 3 responses.")
    check(ranking(page, "without"), expected(scorer))
    assert page.locator("#with").is_hidden()


def test_every_control_has_a_name_and_enough_contrast(open_page):
    page = open_page()
    unnamed = page.evaluate("""[...document.querySelectorAll('input, textarea, button')].filter(node =>
        !(node.labels?.length || node.getAttribute('aria-label') || node.getAttribute('aria-labelledby')
          || node.textContent.trim())).map(node => node.outerHTML)""")
    assert unnamed == []
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        for name, least in {"ink": 7, "soft": 4.5, "bad": 4.5, "accent": 4.5, "line": 3}.items():
            assert contrast(page, name, "paper") >= least, (scheme, name)
        assert contrast(page, "soft", "panel") >= 4.5 and contrast(page, "on-accent", "accent") >= 4.5


def contrast(page, front, back):
    """WCAG's contrast ratio of two of the page's colours."""
    lightness = []
    for name in (front, back):
        page.evaluate(f"document.body.style.color = 'var(--{name})'")
        colour = page.evaluate("getComputedStyle(document.body).color")
        channels = [int(part) / 255 for part in colour.removeprefix("rgb(").removesuffix(")").split(",")]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        lightness.append(0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2])
    return (max(lightness) + 0.05) / (min(lightness) + 0.05)


def test_an_error_is_said_and_the_token_helps(open_page):
    page = open_page(token="secret")
    fill(page, RESPONSES[:2])
    page.get_by_role("button", name="Rank responses").click()
    expect(page.get_by_role("status")).to_contain_text("needs its token")
    page.get_by_text("Access token").click()
    page.get_by_label("Token, if this server asks for one").fill("secret")
    page.get_by_role("button", name="Rank responses").click()
    expect(page.get_by_role("status")).to_have_text("Ranked 2 responses.")


def test_what_is_written_is_shown_as_text(open_page):
    page = open_page()
    written = ["<img src=x onerror=document.title='broken'>", "<b>two</b>"]
    fill(page, written)
    page.get_by_role("button", name="Rank responses").click()
    expect(page.get_by_role("status")).to_have_text("Ranked 2 responses.")
    assert {text for text, _ in ranking(page, "without")} == {
        "<img src=x onerror=document.title='broken'>",
        "<b>two</b>",
    }
    assert page.title() == "Reward model" and not page.complaints
