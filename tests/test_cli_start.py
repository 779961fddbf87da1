"""How the command line starts: version, help, completion, where options and models come from, what it tells on stderr
while it loads and serves, and what an error tells to install."""

from __future__ import annotations

import io
import json
import logging
import os
import re
import shutil
import socket
import subprocess
import sys
from contextlib import nullcontext
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import httpx
import pytest
import torch
from rich.console import Console
from safetensors.torch import save_file
from typer.main import get_command

import mllm_fast
from mllm_fast.cli import config, options, serve
from mllm_fast.cli.app import app
from mllm_fast.context import file_format
from mllm_fast.core import extras
from mllm_fast.core.assets import SHAPES_JOINT, SHAPES_WEIGHTS
from mllm_fast.core.threads import spin_settings
from mllm_fast.models.loading import shows_bars

ROOT = Path(__file__).parent.parent
IN_ORDER = [
    "explain",
    "generate",
    "knockout",
    "compress",
    "ask",
    "kept",
    "serve",
    "eval",
    "coco",
    "joint",
    "detect",
    "convert",
    "info",
    "tune",
]

NOTE = "the embedded model knows coloured shapes alone; give your own with "


def process(*arguments: object, **variables: str) -> subprocess.CompletedProcess[str]:
    """The command as a process of its own, and whether it loaded torch in the last line of stderr."""
    code = "import sys, atexit; atexit.register(lambda: print('torch' in sys.modules, file=sys.stderr)); "
    code += f"sys.argv = {['mllm-fast', *map(str, arguments)]!r}; from mllm_fast.cli import main; main()"
    environment = {**os.environ, **variables}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)


def is_without_torch(done: subprocess.CompletedProcess[str]) -> bool:
    return done.stderr.splitlines()[-1] == "False"


def test_version_without_torch():
    done = process("--version")
    assert (done.returncode, done.stdout) == (0, f"mllm-fast {mllm_fast.__version__}\n"), done.stderr
    assert is_without_torch(done)


def test_help_lists_the_commands_in_the_order_of_use():
    done = process("--help")
    assert done.returncode == 0, done.stderr
    assert re.findall(r"^│ ([a-z]+)  ", done.stdout, re.MULTILINE) == IN_ORDER
    assert is_without_torch(done)
    assert process("-h").stdout == done.stdout


@pytest.mark.parametrize("words", [["explain"], ["joint"], ["joint", "train"], ["serve"]], ids=" ".join)
def test_h_is_help(run, words):
    code, out, _ = run(*words, "-h")
    assert code == 0
    assert out == run(*words, "--help")[1]
    assert f"mllm-fast {' '.join(words)}" in out
    assert "<bool>" not in out  # a flag takes no value
    assert "[[" not in out


def test_module_is_the_command():
    done = subprocess.run([sys.executable, "-m", "mllm_fast", "--version"], capture_output=True, text=True)
    assert done.stdout == f"mllm-fast {mllm_fast.__version__}\n", done.stderr
    done = subprocess.run([sys.executable, "-m", "mllm_fast", "ask", "-h"], capture_output=True, text=True)
    assert "Usage: mllm-fast ask" in done.stdout


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_script_of_a_shell(shell):
    done = process(_MLLM_FAST_COMPLETE=f"source_{shell}")
    assert done.returncode == 0, done.stderr
    assert "complete_" + shell in done.stdout
    assert is_without_torch(done)


def test_words_are_completed_without_torch():
    def completed(words: str, at: int) -> list[str]:
        done = process(_MLLM_FAST_COMPLETE="complete_bash", COMP_WORDS=words, COMP_CWORD=str(at))
        assert is_without_torch(done)
        return done.stdout.split()

    assert completed("mllm-fast ", 1) == IN_ORDER
    assert completed("mllm-fast explain --max", 2) == ["--max-new-tokens", "--max-pixels"]


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")
def test_completion_of_the_shell_that_asks(tmp_path):
    """--show-completion finds its shell by itself, and --install-completion writes into that shell's files."""
    environment = {**os.environ, "HOME": str(tmp_path), "SHELL": shutil.which("bash") or ""}
    for option in ("--show-completion", "--install-completion"):
        # a second command keeps the shell from giving its process to Python
        command = ["bash", "--norc", "-c", f'"{sys.executable}" -m mllm_fast {option}; exit $?']
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr
        assert "_MLLM_FAST_COMPLETE" in done.stdout or "installed in" in done.stdout
    written = "".join(path.read_text() for path in tmp_path.rglob("*") if path.is_file())
    assert "_MLLM_FAST_COMPLETE=complete_bash" in written


@pytest.fixture
def configured(tmp_path, monkeypatch):
    """Writes a config file, which commands then read."""

    def write(text: str | bytes) -> Path:
        path = tmp_path / "config.toml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        monkeypatch.setenv("MLLM_FAST_CONFIG", str(path))
        return path

    return write


def test_option_goes_before_environment_before_config_before_default(run, configured, monkeypatch):
    def refused(*arguments: str) -> str:
        code, _, err = run("generate", *arguments)
        assert code == 2
        return err

    assert run("generate")[1] == "blue\n"
    configured('model = "/of-all"')
    assert "/of-all: no such model folder" in refused()
    configured('model = "/of-all"\n[generate]\nmodel = "/of-this-command"')
    assert "/of-this-command: no such model folder" in refused()
    monkeypatch.setenv("MLLM_FAST_MODEL", "/of-the-environment")
    assert "/of-the-environment: no such model folder" in refused()
    assert "/of-the-line: no such model folder" in refused("--model", "/of-the-line")
    assert run("generate", "--model", "shapes")[1] == "blue\n"


def test_config_gives_options_of_all_kinds(run, configured, tmp_path, monkeypatch):
    configured("""
        json = true
        max-new-tokens = 3
        out = "none.safetensors"
        [generate]
        question = "Describe the image."
        [explain]
        out = "why.json"
        lens = ["all@60,40", "3.1"]
        words = "red"
        [joint.train]
        rate = 1
        wide = true
    """)
    said = json.loads(run("generate")[1])
    assert (said["question"], len(said["tokens"])) == ("Describe the image.", 3)
    assert len(json.loads(run("generate", "--max-new-tokens", 2)[1])["tokens"]) == 2
    monkeypatch.chdir(tmp_path)
    explained = json.loads(run("explain")[1])
    assert explained["saved"] == "why.json"
    assert {one["lens"] for one in explained["lens"]} == {"all@60,40", "3.1"}
    assert "[default: 1" in re.sub(r"[│\s]+", " ", run("joint", "train", "--help")[1])


def test_config_of_all_commands_leaves_other_meanings_of_model_alone(configured):
    """`info --model` asks for another report, and a released W belongs to a model of its own."""
    configured('model = "/of-all"\n[joint]\nseed = 5\n[info]\ndevice = "cpu"')
    found = config.defaults(get_command(app))
    assert "model" not in found["info"]
    assert "model" not in found["joint"].get("import", {})
    assert found["joint"]["train"] == {"model": "/of-all", "seed": 5}
    assert set(found) == set(IN_ORDER) - {"detect", "convert", "tune"}
    configured('[info]\nmodel = "shapes"')
    assert config.defaults(get_command(app)) == {"info": {"model": "shapes"}}


def test_home_in_config(configured, monkeypatch):
    monkeypatch.setenv("HOME", "/home/of-somebody")
    configured('[serve]\nstore = "~/contexts"')
    assert config.defaults(get_command(app)) == {"serve": {"store": "/home/of-somebody/contexts"}}


def test_where_the_config_file_lies(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("MLLM_FAST_CONFIG")
    monkeypatch.delenv("XDG_CONFIG_HOME", raising=False)
    assert config.config_file() is None
    for folder in (tmp_path / ".config", tmp_path / "xdg"):
        (folder / "mllm-fast").mkdir(parents=True)
        (folder / "mllm-fast" / "config.toml").touch()
    assert config.config_file() == tmp_path / ".config" / "mllm-fast" / "config.toml"
    monkeypatch.setenv("XDG_CONFIG_HOME", "xdg")  # a relative one is none
    assert config.config_file() == tmp_path / ".config" / "mllm-fast" / "config.toml"
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "xdg"))
    assert config.config_file() == tmp_path / "xdg" / "mllm-fast" / "config.toml"
    monkeypatch.setenv("MLLM_FAST_CONFIG", "other.toml")
    assert config.config_file() == Path("other.toml")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('modle = "shapes"', "modle is an option of no command; is model meant?"),
        ("model = 3", "model is a text in quotes, got 3"),
        ('[serve]\nport = "x"', "port in [serve] is a whole number, got 'x'"),
        ("[serve]\nport = true", "port in [serve] is a whole number, got True"),
        ("[serve]\nui = 1", "ui in [serve] is true or false, got 1"),
        ('[serve]\nallow-origin = "a"', "allow-origin in [serve] is an array, each a text in quotes, got 'a'"),
        ("[joint.train]\nrate = []", "rate in [joint.train] is a number, got []"),
        ("[serve]\nprt = 3", "prt in [serve] is no option; accepted are host, port,"),
        ("[sevre]\nport = 3", "[sevre] is no command; the tables here are named by commands: explain,"),
        ("[explain.more]\n", "[explain.more] is no command"),
        ('plugin = "mine.py"', "plugin is not read from a file; give it before the command"),
        ("model", "the config file is not TOML"),
        (b'model = "\xff"', "the config file is not TOML"),
    ],
)
def test_bad_config_is_one_line(run, configured, text, message):
    path = configured(text)
    code, out, err = run("generate")
    assert (code, out) == (2, "")
    assert err.startswith(f"mllm-fast: {path}: ")
    assert err.count("\n") == 1
    assert message in err


def test_config_that_is_not_there(run, tmp_path, monkeypatch):
    for path, why in ((tmp_path / "none.toml", "No such file"), (tmp_path, "directory")):
        monkeypatch.setenv("MLLM_FAST_CONFIG", str(path))
        code, _, err = run("generate")
        assert code == 2
        assert f"{path}: the config file cannot be read: " in err
        assert why in err
    assert run("--help")[0] == 0
    assert run("--version")[0] == 0


def test_joint_and_model_contradict_each_other_only_where_both_are_given(run, configured, monkeypatch):
    both = "give --joint or --model, not both"
    assert both in run("explain", "--joint", "/j", "--model", "/m")[2]
    monkeypatch.setenv("MLLM_FAST_MODEL", "/of-the-environment")
    assert "/j" in run("explain", "--joint", "/j")[2]
    assert "/j" in run("serve", "--ui", "--joint", "/j")[2]
    monkeypatch.delenv("MLLM_FAST_MODEL")
    configured('joint = "/j"')
    assert "/m: no such model folder" in run("explain", "--model", "/m")[2]
    assert "/m: no such model folder" in run("serve", "--model", "/m", "--port", 0)[2]
    assert "/j" in run("explain")[2]
    configured('joint = "/j"\nmodel = "/m"')
    assert both in run("explain")[2]
    configured('model = "/m"')
    assert "needs a detector" in run("explain", "--method", "gradient-alignment")[2]


def test_serve_takes_the_model_as_a_word(run, monkeypatch):
    assert "/word: no such model folder" in run("serve", "/word", "--port", 0)[2]
    assert "/word: no such model folder" in run("serve", "/word", "--model", "/word", "--port", 0)[2]
    code, _, err = run("serve", "/word", "--model", "shapes", "--port", 0)
    assert (code, err) == (2, "mllm-fast: two models are given, /word and --model shapes: give one\n")
    assert "give /word or --joint, not both" in run("serve", "/word", "--ui", "--joint", "shapes")[2]
    monkeypatch.setenv("MLLM_FAST_MODEL", "/of-the-environment")
    assert "/word: no such model folder" in run("serve", "/word", "--port", 0)[2]
    assert "/of-the-environment: no such model folder" in run("serve", "--port", 0)[2]


def test_busy_port_is_told_before_the_model_loads(run):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        code, _, err = run("serve", "/none", "--port", port)
    assert (code, err) == (2, f"mllm-fast: port {port} of 127.0.0.1 is in use: give another with --port\n")
    assert "/none: no such model folder" in run("serve", "/none", "--port", port)[2]
    assert "--host is an address of this machine, got 'no host'" in run("serve", "/none", "--host", "no host")[2]


def test_server_tells_when_it_is_ready(tmp_path):
    """Each line is JSON where no terminal is, what -v shows as well; the last one says where the server is."""
    events: list[dict] = []
    command = [sys.executable, "-m", "mllm_fast", "-v", "serve", "shapes", "--port", "0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=tmp_path) as server:
        assert server.stderr is not None
        for line in server.stderr:
            events.append(json.loads(line))
            if events[-1]["event"] == "ready":
                break
        url = events[-1]["url"]
        assert httpx.get(f"{url}/readyz", timeout=60).status_code == 200
        assert events[-1]["api"] == f"{url}/v1"
        assert events[-1]["ui"] is None
        assert "--ui" in events[-1]["hint"]
        server.terminate()
        events += [json.loads(line) for line in server.stderr]
    told = [one["event"] for one in events if one["event"] != "request"]
    assert told == ["library", "embedded_model", "listening", "ready", "stopped"]
    assert events[0]["message"].startswith("loaded the model shapes: llava, on cpu in torch.float32, in ")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_ready_line_for_a_person_and_for_a_program(monkeypatch, capsys):
    class Bound:
        def getsockname(self) -> tuple[str, int]:
            return "::1", 8000

    monkeypatch.setattr(serve, "ERR", Console(file=Terminal(), width=40))
    serve._ready_line("::1", Bound(), ui=True)()
    assert "ready: http://[::1]:8000 (OpenAI API at /v1; the tool at /ui)\n" in serve.ERR.file.getvalue()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    serve._ready_line("127.0.0.1", Bound(), ui=False)()
    assert "127.0.0.1:8000 (OpenAI API at /v1; --ui adds the tool in the browser, after pip install" in (
        serve.ERR.file.getvalue()
    )
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(serve, "ERR", Console(file=io.StringIO()))
    serve._ready_line("127.0.0.1", Bound(), ui=True)()
    told = json.loads(capsys.readouterr().err)
    assert (told["event"], told["ui"]) == ("ready", "http://127.0.0.1:8000/ui")


def test_verbose_tells_what_happens(run):
    assert any(isinstance(one, logging.NullHandler) for one in logging.getLogger("mllm_fast").handlers)
    _, out, err = run("explain", "--json")
    assert "loaded" not in err
    said = " ".join(run("-v", "explain", "--json")[2].split())
    assert "INFO loaded the model shapes: llava, on cpu in torch.float32, in" in said
    assert "the explained answer is the model's own: 1 tokens after" in said
    assert "DEBUG answered 1 prompts: of" in " ".join(run("-vv", "generate")[2].split())
    assert run("generate")[2] == f"{NOTE}--model\n"  # as without -v before
    assert json.loads(out)["answer"] == "blue"


def test_the_embedded_model_says_what_it_knows(run, tmp_path):
    context = tmp_path / "a.safetensors"
    for words in (["generate"], ["generate", "--json"], ["explain", "--json"], ["compress", "--out", context],
                  ["ask", context, "What color is the star?"], ["ask", context, "--json", "what?"]):  # fmt: skip
        code, out, err = run(*words)
        assert code == 0, err
        assert err == f"{NOTE}--model\n"
        assert NOTE not in out
    assert run("kept", context)[2] == ""
    assert run("info", "--model", "shapes")[2] == ""
    assert run("detect", "--class", "star", "--json")[2] == f"{NOTE}--joint\n"
    other = shutil.copytree(SHAPES_WEIGHTS, tmp_path / "other")
    assert run("generate", "--model", other)[1:] == ("blue\n", "")


def test_ask_takes_the_model_that_the_context_names(run, tmp_path, monkeypatch):
    context, other = tmp_path / "a.safetensors", shutil.copytree(SHAPES_WEIGHTS, tmp_path / "other")
    question = "What color is the star?"
    monkeypatch.chdir(tmp_path)
    assert run("compress", "--model", "other", "--dtype", "bfloat16", "--out", context)[0] == 0
    assert file_format.read_origin(context) == (str(other), "bfloat16")
    monkeypatch.chdir(tmp_path.parent)
    assert run("ask", context, question)[1:] == ("blue\n", "")
    assert run("kept", context)[0] == 0
    monkeypatch.setenv("MLLM_FAST_MODEL", "/of-the-environment")
    assert "/of-the-environment: no such model folder" in run("ask", context, question)[2]
    monkeypatch.delenv("MLLM_FAST_MODEL")
    assert "/of-the-line: no such model folder" in run("ask", context, question, "--model", "/of-the-line")[2]
    shutil.rmtree(other)
    for words in (["ask", context, question], ["kept", context]):
        code, _, err = run(*words)
        assert code == 2
        assert err == (
            f"mllm-fast: {context}: was made with the model {other}, which is not there; give its folder with --model\n"
        )


def test_what_a_context_says_of_its_model(tmp_path):
    path = tmp_path / "a.safetensors"

    def origin(text: str):
        save_file({"keys": torch.zeros(1)}, path, {"mllm_fast.context": text})
        return file_format.read_origin(path)

    assert origin('{"model": {"id": "org/name"}, "dtype": "float16"}') == ("org/name", "float16")
    installed = '{"model": {"id": "/gone/site-packages/mllm_fast/shapes/weights"}, "dtype": "float32"}'
    assert origin(installed) == ("shapes", "float32")
    for text, message in {
        '{"model": {"id": ""}}': "does not name the model that it was made with; give it with --model",
        '{"model": {}}': "does not name the model",
        '{"model": 3}': "description cannot be read",
        "{": "description cannot be read",
    }.items():
        with pytest.raises(mllm_fast.InputError, match=message):
            origin(text)


def test_progress_of_loading_is_shown_where_a_person_sees_it(monkeypatch):
    """A line that stays, below which the libraries draw their bars; the package's own models have no bars."""
    monkeypatch.setattr(options, "ERR", Console(file=Terminal(), width=40, no_color=True, force_terminal=True))
    with options.loading("org/name"):
        assert "loading org/name" in options.ERR.file.getvalue()
    moving: list[str] = []
    monkeypatch.setattr(options, "progress", lambda what: moving.append(what) or nullcontext())
    with options.loading("shapes"):
        assert moving == ["loading shapes"]
    monkeypatch.setattr(options, "ERR", Console(file=io.StringIO()))
    with options.loading("org/name"):
        assert options.ERR.file.getvalue() == ""
    monkeypatch.setattr(sys, "stderr", Terminal())
    assert shows_bars("org/name", None)
    assert not shows_bars("org/name", False)
    for name in ("shapes", str(SHAPES_WEIGHTS), str(SHAPES_JOINT / "detector")):
        assert not shows_bars(name, None)
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    assert not shows_bars("org/name", None)
    assert shows_bars("org/name", True)


def test_bars_of_the_weights_are_on_the_terminal(run, tmp_path, monkeypatch):
    """The library's own bar of the weights comes through, from a command as from Python."""
    other = shutil.copytree(SHAPES_WEIGHTS, tmp_path / "other")
    monkeypatch.setattr("mllm_fast.models.loading.shows_bars", lambda name, progress: progress is None)
    code, out, err = run("generate", "--model", other)
    assert (code, out) == (0, "blue\n")
    assert "Loading weights: 100%" in err


class Installed:
    """A distribution as importlib.metadata gives it, with the direct_url.json that an installer wrote."""

    def __init__(self, direct_url: str | None):
        self._direct_url = direct_url

    def read_text(self, name: str) -> str | None:
        assert name == "direct_url.json"
        return self._direct_url


def test_an_extra_is_installed_as_the_package_was(tmp_path, monkeypatch):
    folder = tmp_path / "my checkout"
    folder.mkdir()
    local = {"url": folder.as_uri(), "dir_info": {}}
    index, archive = 'pip install "mllm-fast[serve]"', {"url": "https://example.org/a.whl", "archive_info": {}}
    for written, expected in (
        (None, index),
        ("", index),
        ("no JSON", index),
        ("[]", index),
        (json.dumps(archive), index),
        (json.dumps({"url": (folder / "a.whl").as_uri(), "archive_info": {}}), index),
        (json.dumps(local), f'pip install "{folder}[serve]"'),
        (json.dumps(local | {"dir_info": {"editable": True}}), f'pip install -e "{folder}[serve]"'),
        (json.dumps(local | {"url": (tmp_path / "gone").as_uri()}), index),
    ):
        monkeypatch.setattr(extras, "distribution", lambda _, written=written: Installed(written))
        assert extras.install_command("serve") == expected, written

    def not_installed(name: str) -> None:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(extras, "distribution", not_installed)
    assert extras.install_command("serve") == index


def test_errors_tell_the_command_of_an_extra(run, monkeypatch):
    monkeypatch.setattr(extras, "distribution", lambda _: Installed(None))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert run("serve")[2] == 'mllm-fast: serve needs fastapi: pip install "mllm-fast[serve]"\n'
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    code, _, err = run("knockout", "--out", "chart.png")
    assert (code, err) == (2, 'mllm-fast: a chart needs matplotlib: pip install "mllm-fast[viz]"\n')


def test_no_message_has_a_command_of_its_own():
    """`install_command` makes them all. What an HTTP client is told names the extra alone: it cannot install it."""
    found = [
        f"{path.relative_to(ROOT)}: {line.strip()}"
        for path in (ROOT / "mllm_fast").rglob("*.py")
        if path.name not in ("extras.py", "structured.py")
        for line in path.read_text().splitlines()
        if "mllm-fast[" in line
    ]
    assert not found


def test_waiting_threads_of_the_command_line_soon_yield_and_an_import_changes_nothing():
    told = "print(os.environ.get('GOMP_SPINCOUNT'), 'torch' in sys.modules)"
    run_it = "import mllm_fast.cli as c; sys.argv[1:] = ['--version']\ntry: c.main()\nexcept SystemExit: pass"
    alone = {name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}

    def seen(statement, **environment):
        script = f"import os, sys\n{statement}\n{told}"
        done = subprocess.run(
            [sys.executable, "-c", script], env=alone | environment, capture_output=True, text=True, check=True
        )
        return done.stdout.splitlines()[-1]

    assert seen("import mllm_fast") == "None False"
    assert seen(run_it) == "2000 False"
    assert seen(run_it, GOMP_SPINCOUNT="7") == "7 False"
    assert seen(run_it, OMP_WAIT_POLICY="active") == "None False"
    assert spin_settings({"KMP_BLOCKTIME": "0"}) == {}
