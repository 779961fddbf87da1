"""How the server ends when its engine fails, and whom it lets in from a web page."""

from __future__ import annotations

import json

import httpx
import pytest
import served
from PIL import Image
from served import KEY, asked
from starlette.testclient import TestClient
from waiting import HANG

from mllm_fast.core.assets import SAMPLE
from mllm_fast.serving.app import create_app
from mllm_fast.serving.auth import ApiKeys
from mllm_fast.serving.logs import Log
from mllm_fast.serving.metrics import Metrics
from mllm_fast.serving.routes.state import Probes
from mllm_fast.serving.settings import Settings

PLUGIN = """
from pathlib import Path
from mllm_fast.serving.scheduler import Scheduler

admit = Scheduler.admit


def broken(self):
    if Path("break").exists():
        raise RuntimeError("the engine breaks")
    return admit(self)


Scheduler.admit = broken
"""


def test_a_server_whose_engine_fails_ends(tmp_path, monkeypatch):
    (tmp_path / "plugin.py").write_text(PLUGIN)
    monkeypatch.setenv("MLLM_FAST_PLUGINS", str(tmp_path / "plugin.py"))
    server = served.Server("--grace", 10, cwd=tmp_path)
    url = served.data_url(Image.open(SAMPLE).convert("RGB"))
    with server.http() as http:
        body = {"messages": asked("What color is the star?", url)}
        assert http.post("/v1/chat/completions", json=body).status_code == 200
        (tmp_path / "break").touch()
        reply = http.post("/v1/chat/completions", json=body)
        assert reply.status_code == 500
        assert "the engine breaks" not in reply.text
    assert server.process.wait(HANG) == 1
    server.stop()
    events = [json.loads(line) for line in server.raw]
    (failed,) = [one for one in events if one["event"] == "engine_failed"]
    assert failed["error"].startswith("RuntimeError: plugin.py:")
    assert events[-1]["event"] == "stopped"


class Nothing:
    name, settings = "nothing", Settings()


@pytest.mark.parametrize("alive", [True, False])
def test_health_is_the_engine_s(alive):
    app = create_app(Nothing(), ApiKeys(), metrics=Metrics(), log=Log(None), probes=Probes(alive=lambda: alive))
    with TestClient(app) as client:
        for path in ("/health", "/healthz"):
            assert client.get(path).status_code == (200 if alive else 503)


def test_scripts_of_an_allowed_page_are_let_in():
    """A browser asks without a key; what is not allowed gets no answer that a script could read."""
    options = {"metrics": Metrics(), "log": Log(None), "probes": Probes(), "origins": ["https://app.example.org"]}
    app = create_app(Nothing(), ApiKeys([KEY]), **options)
    asks = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
    with TestClient(app) as client:
        for origin, allowed in (("https://app.example.org", True), ("https://evil.example.org", False)):
            reply = client.options("/v1/chat/completions", headers={"Origin": origin, **asks})
            assert (reply.status_code == 200) == allowed
            refused = client.get("/v1/models", headers={"Origin": origin})
            assert refused.status_code == 401
            assert ("access-control-allow-origin" in refused.headers) == allowed


def test_a_client_without_a_key_is_slowed(tmp_path):
    (tmp_path / "keys").write_text(KEY)
    server = served.Server("--api-keys", tmp_path / "keys", cwd=tmp_path)
    try:
        with httpx.Client(base_url=server.url, timeout=HANG) as http:
            found = {401}
            for _ in range(20_000):  # as many as it takes on a slow machine
                found.add(http.get("/v1/models").status_code)
                if 429 in found:
                    break
            assert found == {401, 429}
            key = {"Authorization": f"Bearer {KEY}"}
            assert {http.get("/v1/models", headers=key).status_code for _ in range(50)} == {200}
    finally:
        server.stop()
