"""A JupyterLab of its own, and a hand that drives it in headless Chromium: open, clear, run all, look, move sliders."""

import json
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

# every cell is in the page, also those that are out of sight; no question stands before the notebook: about news, or
# about a file that autosave has changed while the test saves it
SETTINGS = {
    "docmanager-extension/plugin": {"autosave": False},
    "notebook-extension/tracker": {"windowingMode": "none"},
    "apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},
}
# Milliseconds from the key press to the moment when the next picture is there; null if none comes, or the same one.
# Time is taken inside the page, so what the driver needs to speak with the browser is not in it.
WATCH = """
async ([picture, seconds]) => {
  const bytes = async () => new Uint8Array(await (await fetch(picture.src)).arrayBuffer()).toString();
  const before = await bytes();
  const shown = new Promise(resolve => {
    let pressed;
    document.addEventListener("keydown", () => { pressed = performance.now(); }, {capture: true, once: true});
    picture.addEventListener("load", () => resolve(performance.now() - pressed), {once: true});
    setTimeout(() => resolve(null), 1000 * seconds);
  });
  window.moved = async () => { const ms = await shown; return await bytes() === before ? null : ms; };
}
"""

# of the part of the notebook that is in sight, and of all its cells; below them JupyterLab leaves an empty screen
HEIGHTS = """
panel => {
  const end = [...panel.querySelectorAll(".jp-Cell")].at(-1).getBoundingClientRect().bottom;
  return [panel.clientHeight, Math.ceil(end - panel.getBoundingClientRect().top + panel.scrollTop)];
}
"""


@dataclass(frozen=True)
class Server:
    """A running JupyterLab: its address, which ends in a slash, its token, and the folder that it shows."""

    url: str
    token: str
    folder: Path

    def ask(self, path: str, method: str = "GET"):
        """What the server's interface answers to one request, or None for an empty answer."""
        headers = {"Authorization": f"token {self.token}"}
        request = urllib.request.Request(self.url + path, headers=headers, method=method)
        with urllib.request.urlopen(request, timeout=30) as answer:
            text = answer.read()
        return json.loads(text) if text else None


@contextmanager
def serve(folder: Path, own: Path) -> Iterator[Server]:
    """JupyterLab over ``folder``. Settings, data and caches are in the folder ``own``, so nothing of the user's takes
    part and nothing of theirs is changed.
    """
    for name, values in SETTINGS.items():
        path = own / "settings" / "@jupyterlab" / f"{name}.jupyterlab-settings"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(values))
    places = {
        "JUPYTER_CONFIG_DIR": "config",
        "JUPYTER_DATA_DIR": "data",
        "JUPYTER_RUNTIME_DIR": "runtime",
        "JUPYTERLAB_SETTINGS_DIR": "settings",
        "JUPYTERLAB_WORKSPACES_DIR": "workspaces",
        "IPYTHONDIR": "ipython",
        "VITLIB_DATA": "vitlib",
    }
    outside = {name: value for name, value in os.environ.items() if name not in ("JUPYTER_PATH", "MPLBACKEND")}
    environment = (
        outside | {name: str(own / place) for name, place in places.items()} | {"JUPYTER_PREFER_ENV_PATH": "1"}
    )
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--ip=127.0.0.1", str(folder)]
    if hasattr(os, "geteuid") and os.geteuid() == 0:
        command.append("--allow-root")
    with (own / "server.log").open("w") as log:
        # with a terminal to ask, its Ctrl-C would be a question
        process = subprocess.Popen(
            command, cwd=folder, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT
        )
    try:
        yield Server(*_address(process, own), folder)
    finally:
        process.terminate()  # it ends its kernels first
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()


def _address(process: subprocess.Popen, own: Path) -> tuple[str, str]:
    """The server's address and token, as soon as it says them."""
    deadline = time.monotonic() + 60
    while process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.2)
        for path in (own / "runtime").glob("jpserver-*.json"):
            with suppress(ValueError):  # half of it is written
                info = json.loads(path.read_text())
                return info["url"], info["token"]
    raise RuntimeError("JupyterLab did not start: " + (own / "server.log").read_text()[-2000:])


class OpenNotebook:
    """A notebook in JupyterLab, on a page of Playwright."""

    def __init__(self, page, server: Server, name: str):
        self.page, self.server, self.name = page, server, name

    def open(self) -> None:
        """Opens the notebook and waits until its kernel is connected: Run All before that does nothing."""
        self.page.goto(f"{self.server.url}lab/tree/{self.name}?reset&token={self.server.token}")
        self.page.locator(".jp-Notebook .jp-CodeCell").first.wait_for(timeout=60_000)
        self._wait(
            lambda: self._kernel_is_idle() and self._shown_status() == "idle", 120, "its kernel is not connected"
        )

    def clear_outputs(self) -> None:
        self._menu("Edit", "Clear Outputs of All Cells")
        self._wait(lambda: not any(self.prompts()), 30, "its outputs are not cleared")

    def run_all(self, seconds: float) -> None:
        """Runs all cells and waits until each has its number, or the kernel has stopped before the last one.

        Raises:
            TimeoutError: if it is still running after ``seconds``.
        """
        self._menu("Run", "Run All Cells")
        self._wait(lambda: any(self.prompts()), 30, "no cell was started")
        busy = time.monotonic()

        def is_done() -> bool:
            nonlocal busy
            prompts = self.prompts()
            if "*" in prompts or not self._kernel_is_idle():
                busy = time.monotonic()
            # a kernel is idle between two cells too, so a cell without a number needs a longer look
            return all(map(str.isdigit, prompts)) or time.monotonic() - busy > 3

        self._wait(is_done, seconds, "still running")

    def prompts(self) -> list[str]:
        """What stands in the brackets before each code cell that is not folded: a number, ``*`` (waits), or nothing."""
        shown = ".jp-Notebook .jp-CodeCell .jp-InputPrompt:not(.jp-Placeholder-prompt)"
        texts = self.page.locator(shown).all_inner_texts()
        return [text.strip().strip("[]:").strip() for text in texts]

    def widgets(self) -> list:
        """The outputs with a picture that has controls, in the order of the page."""
        return self.page.locator(".jp-OutputArea-output").filter(has=self.page.locator("img.widget-image")).all()

    def move(self, slider, picture, seconds: float = 5) -> float | None:
        """Moves a slider one step with the keyboard: to the left from its right end, else to the right.

        Returns:
            milliseconds until ``picture`` was another one, or None if it was not within ``seconds``.
        """
        at_end = slider.get_attribute("aria-valuenow") == slider.get_attribute("aria-valuemax")
        self.page.evaluate(WATCH, [picture.element_handle(), seconds])
        slider.press("ArrowLeft" if at_end else "ArrowRight")
        return self.page.evaluate("window.moved()")

    def saved(self) -> dict:
        """The notebook as it lies on disk after the menu's Save Notebook."""
        with self.page.expect_response(
            lambda answer: answer.request.method == "PUT" and "/api/contents/" in answer.url
        ) as answer:
            self._menu("File", "Save Notebook")
        answer.value.finished()
        return json.loads((self.server.folder / self.name).read_text(encoding="utf-8"))

    def keep_whole_page(self, stem: Path) -> None:
        """Screenshots from the top of the notebook to its end, a window's height each: ``stem_1.png`` and so on."""
        height, whole = self._panel.evaluate(HEIGHTS)
        for number, top in enumerate(range(0, whole, height), start=1):
            self._panel.evaluate("(panel, top) => panel.scrollTo(0, top)", top)
            self.page.screenshot(path=f"{stem}_{number}.png")

    def close(self) -> None:
        """Ends the kernel and closes the page."""
        for session in self._sessions():
            self.server.ask(f"api/sessions/{session['id']}", "DELETE")
        self.page.close()

    @property
    def _panel(self):
        return self.page.locator(".jp-NotebookPanel-notebook .jp-WindowedPanel-outer")

    def _menu(self, menu: str, entry: str) -> None:
        self.page.locator(".lm-MenuBar-itemLabel").get_by_text(menu, exact=True).click()
        self.page.locator(".lm-Menu-itemLabel").get_by_text(entry, exact=True).click()

    def _sessions(self) -> list[dict]:
        try:
            return [session for session in self.server.ask("api/sessions") if session["path"] == self.name]
        except urllib.error.HTTPError:  # the server stumbles over a kernel that is just being started
            return []

    def _kernel_is_idle(self) -> bool:
        kernels = [session["kernel"] for session in self._sessions()]
        return [(k["connections"] > 0, k["execution_state"]) for k in kernels] == [(True, "idle")]

    def _shown_status(self) -> str | None:
        return self.page.locator(".jp-Notebook-ExecutionIndicator").first.get_attribute("data-status")

    def _wait(self, condition: Callable[[], bool], seconds: float, complaint: str) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > deadline:
                raise TimeoutError(f"{self.name}: {complaint} after {seconds} seconds")
            self.page.wait_for_timeout(200)
