"""The first watch of an engineer who is new on call, on a real `pretrade up --alerts`, with the deployment's waits.

`TEST_CONSOLE=docs` writes the times and the pictures of docs/first-watch.md.
"""

from __future__ import annotations

import itertools
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final, NamedTuple

import grpc
import psutil
import pytest
from playwright.sync_api import Browser, Page, expect
from support.console_browser import into_docs, loaded, opened, picture, running_chromium
from support.figures import Figure
from support.harness import CallingThreads, eventually
from support.receivers import Mailbox, Webhook, serving, written_configuration
from support.up_command import Up, up

from local.stack.parts import alertmanager, prometheus
from pretrade.client.stack_file import Endpoints, StackFile
from pretrade.decision.v1 import decision_pb2 as pb
from pretrade.decision.v1 import decision_pb2_grpc

pytestmark = [pytest.mark.stack, pytest.mark.long, pytest.mark.timeout(1_500)]

START_SECONDS: Final = 300.0
BACK_SECONDS: Final = 240.0
"""A model server has taken two minutes to start beside other work."""
MAIL_SECONDS: Final = 420.0
"""A ticket needs a minute without the replica and two until Alertmanager tells; one that is over up to five."""
AT_EASE: Final = {
    "PRETRADE_BUDGET__CAP_SECONDS": "0.6",  # who answers is looked at, and not how fast
    "PRETRADE_CONTROL__OUT_OF_DOMAIN": "false",  # the models of tests know another market
}


class Times:
    """How long each step took, in the words of the page."""

    def __init__(self) -> None:
        self._rows: list[tuple[str, float]] = []

    def took(self, step: str, since: float, until: float | None = None) -> float:
        """Notes a step that has just ended, or did at a moment."""
        seconds = (until or time.monotonic()) - since
        self._rows.append((step, seconds))
        return seconds

    def table(self) -> str:
        rows = "".join(f"| {step} | {_written(seconds)} |\n" for step, seconds in self._rows)
        return f"| what | after |\n|---|---|\n{rows}"


def _written(seconds: float) -> str:
    if seconds < 10:
        return f"{seconds:.1f} s"
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds // 60:.0f} min {seconds % 60:.0f} s"


class Answer(NamedTuple):
    """What one order heard."""

    at: float
    source: pb.Source.ValueType
    halted: bool


class Desk(CallingThreads):
    """Orders, some ten a second."""

    def __init__(self, endpoints: Endpoints) -> None:
        super().__init__(count=1)
        self._endpoints = endpoints
        self.answers: list[Answer] = []
        self.failed: list[str] = []

    def first(self, since: float, source: pb.Source.ValueType) -> Answer:
        """The first answer of a source after a moment."""

        def found() -> Answer | None:
            return next((one for one in list(self.answers) if one.at > since and one.source == source), None)

        answer = eventually(found, bool, BACK_SECONDS)
        assert answer is not None
        return answer

    def _call(self, number: int) -> None:
        names = self._endpoints.instruments
        with grpc.insecure_channel(str(self._endpoints.decision)) as channel:
            stub = decision_pb2_grpc.DecisionServiceStub(channel)
            for at in itertools.count():
                if self._stopped.wait(0.1):
                    return
                side = pb.SIDE_SELL if at % 3 else pb.SIDE_BUY
                order = pb.Order(instrument=names[at % len(names)], side=side, quantity=0.01, strategy="twap")
                try:
                    found = stub.Decide(pb.DecideRequest(order=order), timeout=5.0).decision
                except grpc.RpcError as error:
                    self.failed.append(str(error))
                    continue
                halted = pb.REASON_CODE_TRADING_HALTED in found.reasons
                self.answers.append(Answer(time.monotonic(), found.source, halted))


@pytest.fixture
def mails() -> Mailbox:
    return Mailbox()


@pytest.fixture
def stack(tmp_path: Path, model_store: Path, mails: Mailbox) -> Iterator[tuple[Up, float]]:
    """A stack that tells a mailbox, and how long it took to start."""
    if prometheus.program() is None or alertmanager.program() is None:
        pytest.skip("needs prometheus and prometheus-alertmanager (Debian's packages)")
    pages = Webhook()
    given = {
        "PRETRADE_LOCAL_ALERTS": "true",
        "PRETRADE_LOCAL_ALERTMANAGER_CONFIG": str(written_configuration(tmp_path, pages, mails, in_haste=False)),
        "PRETRADE_LOCAL_MODEL_STORE": str(model_store),
        "PRETRADE_LOCAL_START_TIMEOUT_SECONDS": "200",
    }
    directory = tmp_path / "stack"
    directory.mkdir()
    began = time.monotonic()
    with serving(pages, mails), up(directory, **given, **AT_EASE) as command:
        command.wait_until_up(START_SECONDS)
        yield command, began
        command.process.send_signal(signal.SIGINT)
        command.process.wait(60)


@pytest.fixture
def chromium(browser: str) -> Iterator[Browser]:
    with running_chromium(browser) as started:
        yield started


def primary_of(command: Up) -> psutil.Process:
    found = StackFile.read(command.directory)
    assert found is not None
    return psutil.Process(found.processes["primary"])


def pretrade(command: Up, *arguments: str) -> str:
    """What a command prints."""
    argv = [sys.executable, "-m", "local", *arguments, "--dir", str(command.directory)]
    environment = os.environ | {"COLUMNS": "200"}
    return subprocess.run(argv, capture_output=True, text=True, check=False, timeout=60.0, env=environment).stdout


@contextmanager
def on_call(chromium: Browser, command: Up, endpoints: Endpoints, times: Times) -> Iterator[Page]:
    """A page on which Ann has logged in by the link that the command prints."""
    began = time.monotonic()
    (link,) = re.findall(r"http://\S+", pretrade(command, "console"))
    times.took("`pretrade console` prints a link", began)
    with opened(chromium, str(endpoints.console_url)) as page:
        page.goto(link)
        page.get_by_label("Your name").fill("ann")
        began = time.monotonic()
        page.keyboard.press("Enter")
        expect(page.get_by_text("All is well")).to_be_visible()
        expect(page.locator("main")).not_to_contain_text("Asking")
        times.took("the overview is there: *All is well*", began)
        yield page


def change(page: Page, link: str, why: str, state: str) -> float:
    """Halts or resumes, as a person who reads the difference first; returns the moment of the last key."""
    page.get_by_role("link", name=link).click()
    expect(page.locator("#preview")).to_contain_text(f"→ {state}")
    page.get_by_label("Why").fill(why)
    began = time.monotonic()
    page.keyboard.press("Enter")
    expect(page.locator("#trading-state")).to_have_text(state)
    return began


def test_the_first_watch(
    stack: tuple[Up, float], mails: Mailbox, chromium: Browser, tmp_path: Path, figure: Figure
) -> None:
    command, began = stack
    times = Times()
    times.took("`pretrade up --alerts` has started everything", began)
    found = StackFile.read(command.directory)
    assert found is not None
    endpoints = found.endpoints
    with Desk(endpoints) as desk, on_call(chromium, command, endpoints, times) as page:
        desk.first(0.0, pb.SOURCE_PRIMARY)

        # The primary is killed: the stack repairs that by itself, before anybody is told.
        began = time.monotonic()
        primary_of(command).kill()
        times.took("**kill**: the secondary answers", began, desk.first(began, pb.SOURCE_SECONDARY).at)
        expect(page.locator("#parts tr", has_text="primary").first).to_contain_text("NO")
        expect(page.locator("#parts tr", has_text="primary").first).to_contain_text("yes", timeout=BACK_SECONDS * 1e3)
        times.took("the stack has started the primary again, and it answers", began)
        expect(page.get_by_text("All is well")).to_be_visible(timeout=BACK_SECONDS * 1e3)

        # The primary hangs: its process lives, so nothing starts it again.
        primary, told = primary_of(command), len(mails.received)
        began = time.monotonic()
        primary.suspend()
        times.took("**hang**: the secondary answers", began, desk.first(began, pb.SOURCE_SECONDARY).at)
        expect(page.locator("#status .worst")).to_contain_text("primary")
        times.took("the overview says so", began)
        expect(page.locator("#alerts li").first).to_contain_text("ReplicaDown", timeout=MAIL_SECONDS * 1e3)
        times.took("the alert is on the overview", began)
        picture(page, "watch", tmp_path, whole=False)
        eventually(lambda: [one for one in mails.subjects()[told:] if "ReplicaDown" in one], bool, MAIL_SECONDS)
        figure(times.took("the mail has arrived", began) < 270, "the mail comes within four and a half minutes")
        mail = next(one for one in mails.received[told:] if "ReplicaDown" in str(one["Subject"]))
        assert mail["Subject"] == "TICKET ReplicaDown"
        (part,) = mail.iter_parts()
        assert "docs/runbook.md#replicadown" in part.get_content()

        # Why?
        began = time.monotonic()
        page.locator("#alerts li").first.get_by_role("link", name="What to do").click()
        expect(page.locator("#replicadown")).to_be_in_viewport()
        times.took("the runbook, at its section", began)
        began = time.monotonic()
        status = pretrade(command, "status", "--once")
        assert re.search(r"primary does not answer", status), status
        times.took("`pretrade status --once`", began)
        assert psutil.Process(primary.pid).status() == psutil.STATUS_STOPPED, "ps says T"

        # Halt while it is repaired.
        loaded(page, "/")
        began = change(page, "Halt trading", "primary hangs, looking", "HALTED")
        times.took("**halt**: from the last key until the page says HALTED", began)
        halted = eventually(lambda: [one for one in list(desk.answers) if one.halted], bool)[0].at
        times.took("until an order hears HALTED", began, halted)
        assert all(one.halted for one in list(desk.answers) if one.at > halted), "and every one after it"

        # Repair, and resume.
        began = time.monotonic()
        primary.kill()
        row = page.locator("#parts tr", has_text="primary").first
        expect(row).to_contain_text("yes", timeout=BACK_SECONDS * 1e3)
        repaired = time.monotonic()
        times.took("**repair**: the hung process is killed, and the primary is back", began)
        began = change(page, "Resume trading", "primary was started again", "ACTIVE")
        times.took("**resume**: from the last key until the page says ACTIVE", began)
        assert desk.first(began, pb.SOURCE_PRIMARY).at > began
        expect(page.get_by_text("All is well")).to_be_visible(timeout=BACK_SECONDS * 1e3)

        # Who did what?
        began = time.monotonic()
        changes = pretrade(command, "changes", "--since", "1h")
        times.took("`pretrade changes --since 1h` says who did what", began)
        for why in ("primary hangs, looking", "primary was started again"):
            assert re.search(rf"ann.*{why}", changes), changes
            expect(page.locator("#changes tr", has_text=why).first).to_contain_text("ann")
        picture(page, "watched", tmp_path)
        eventually(mails.subjects, lambda subjects: "RESOLVED ReplicaDown" in subjects[told:], MAIL_SECONDS)
        times.took("after the repair: the mail that it is over", repaired)
    assert not desk.failed, "no call has failed at any time"
    into_docs("first-watch.md", "times", times.table())
    print(*mails.subjects(), sep="\n")
