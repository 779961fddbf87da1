"""The command line before a model runs: version, help, completion, where the defaults of options come from, logs, and
what an error tells to install."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest
from typer.main import get_command

import mllm_fast
from mllm_fast.cli import config
from mllm_fast.cli.app import app
from mllm_fast.core import extras

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
]


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
    assert set(found) == set(IN_ORDER) - {"detect", "convert"}
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
