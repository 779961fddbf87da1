"""A real server as a process, and what talks to it."""

from __future__ import annotations

import base64
import io
import json
import signal
import subprocess
import sys
import threading
from pathlib import Path

import httpx
import openai
from PIL import Image
from waiting import HANG

KEY = "sk-first-0123456789abcdef"
OTHER = "sk-second-0123456789abcdef"


class Server:
    """`mllm-fast serve` on a free port. `raw`: the lines that it logged."""

    def __init__(self, *options: object, cwd: Path):
        command = [sys.executable, "-m", "mllm_fast.cli", "serve", "--port", "0", *map(str, options)]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, cwd=cwd)
        self._clients: list[openai.OpenAI] = []
        self.raw: list[str] = []
        stderr = self.process.stderr
        assert stderr is not None
        for line in stderr:
            self.raw.append(line)
            if '"listening"' in line:
                break
        else:
            raise RuntimeError("".join(self.raw))
        self.port = json.loads(self.raw[-1])["port"]
        self.url = f"http://127.0.0.1:{self.port}"
        self._reader = threading.Thread(target=lambda: self.raw.extend(stderr), daemon=True)
        self._reader.start()

    def client(self, key: str = KEY, **options) -> openai.OpenAI:
        made = openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, timeout=HANG, **{"max_retries": 0, **options})
        self._clients.append(made)
        return made

    def http(self, key: str = KEY) -> httpx.Client:
        return httpx.Client(base_url=self.url, headers={"Authorization": f"Bearer {key}"}, timeout=HANG)

    def metric(self, name: str) -> float:
        lines = httpx.get(f"{self.url}/metrics", timeout=HANG).text.splitlines()
        return float(next(line.split()[-1] for line in lines if line.startswith(f"{name} ")))

    def handled(self) -> int:
        """Chat completions that came to an end, given up ones among them."""
        lines = httpx.get(f"{self.url}/metrics", timeout=HANG).text.splitlines()
        counts = [line for line in lines if line.startswith("mllm_fast_request_seconds_count{") and "/chat/" in line]
        return sum(int(float(line.split()[-1])) for line in counts)

    def terminate(self) -> None:
        self.process.send_signal(signal.SIGTERM)

    def stop(self) -> int:
        for client in self._clients:
            client.close()
        if self.process.poll() is None:
            self.terminate()
        code = self.process.wait(HANG)
        self._reader.join(HANG)
        self.process.stderr.close()  # type: ignore[union-attr]
        return code


def data_url(image: Image.Image, kind: str = "PNG") -> str:
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return f"data:image/{kind.lower()};base64," + base64.b64encode(buffer.getvalue()).decode()


def asked(text: str, *urls: str) -> list[dict]:
    """One question about pictures."""
    pictures = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    return [{"role": "user", "content": [*pictures, {"type": "text", "text": text}]}]


# of a server whose answers must still be going on when a test looks at them: the layers are run by transformers
SLOW = ("--backend", "torch")


def endless(folder: Path) -> Path:
    """The embedded model, but that it never ends an answer by itself."""
    import shutil

    import mllm_fast.shapes

    shutil.copytree(Path(mllm_fast.shapes.__file__).parent / "weights", folder)
    path = folder / "generation_config.json"
    settings = json.loads(path.read_text())
    path.write_text(json.dumps(settings | {"eos_token_id": settings["pad_token_id"]}))
    return folder
