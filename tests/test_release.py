"""What a release needs: one version everywhere, files that follow their schemas, and options that the program has."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import yaml
from typer.main import get_command

import mllm_fast
from mllm_fast.cli.app import app
from mllm_fast.serving.auth import VARIABLE

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pytest brings it there

ROOT = Path(__file__).parent.parent
CHART = ROOT / "deploy" / "helm" / "mllm-fast"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
REPOSITORY = PROJECT["project"]["urls"]["Source"]
SCHEMAS = {
    "vendor.github-workflows": [
        ".github/workflows/ci.yml",
        ".github/workflows/docs.yml",
        ".github/workflows/wheels.yml",
    ],
    "vendor.github-issue-forms": [".github/ISSUE_TEMPLATE/bug.yml", ".github/ISSUE_TEMPLATE/feature.yml"],
    "vendor.github-issue-config": [".github/ISSUE_TEMPLATE/config.yml"],
    "vendor.citation-file-format": ["CITATION.cff"],
    "vendor.compose-spec": ["compose.yaml"],
}


def read(name: str) -> str:
    return (ROOT / name).read_text()


@pytest.mark.parametrize("schema", SCHEMAS)
def test_files_follow_their_schemas(schema):
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", schema, *SCHEMAS[schema]]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_workflow_is_checked():
    assert SCHEMAS["vendor.github-workflows"] == sorted(
        path.relative_to(ROOT).as_posix() for path in (ROOT / ".github" / "workflows").iterdir()
    )


def test_a_broken_file_is_seen(tmp_path):
    (tmp_path / "ci.yml").write_text(read(".github/workflows/ci.yml").replace("runs-on", "runs_on"))
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.github-workflows"]
    assert subprocess.run([*command, tmp_path / "ci.yml"], capture_output=True).returncode == 1


def test_versions_agree():
    version = PROJECT["project"]["version"]
    released = re.findall(r"^## \[(\d+\.\d+\.\d+)\] - (\d{4}-\d\d-\d\d)$", read("CHANGELOG.md"), re.MULTILINE)
    citation = yaml.safe_load(read("CITATION.cff"))
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    assert mllm_fast.__version__ == version
    assert released[0] == (version, citation["date-released"].isoformat())
    assert citation["version"] == chart["version"] == chart["appVersion"] == version
    for name in ("compose.yaml", "deploy/kuberay/rayservice.yaml", "docs/serving.md"):
        tags = re.findall(r"mllm-fast:(\d[\w.]*)", read(name))
        assert set(tags) == {version}, name


def test_the_changelog_links_its_versions():
    text = read("CHANGELOG.md")
    named = re.findall(r"^## \[(.+?)\]", text, re.MULTILINE)
    assert named[0] == "Unreleased"
    assert re.findall(r"^\[(.+?)\]: " + re.escape(REPOSITORY), text, re.MULTILINE) == named


def test_one_address_of_the_repository():
    citation = yaml.safe_load(read("CITATION.cff"))
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    assert {citation["repository-code"], chart["home"], *chart["sources"]} == {REPOSITORY}
    assert citation["url"] == PROJECT["project"]["urls"]["Documentation"]
    assert PROJECT["project"]["urls"]["Issues"].startswith(REPOSITORY)
    assert citation["license"] == PROJECT["project"]["license"]


def test_pythons_agree():
    classifiers = PROJECT["project"]["classifiers"]
    said = [one.rpartition(" ")[2] for one in classifiers if re.search(r":: 3\.\d+$", one)]
    built = [re.sub(r"cp3(\d+)-\*", r"3.\1", one) for one in PROJECT["tool"]["cibuildwheel"]["build"]]
    assert said == built
    assert PROJECT["project"]["requires-python"] == f">={said[0]}"
    matrix = yaml.safe_load(read(".github/workflows/ci.yml"))["jobs"]["pythons"]["strategy"]["matrix"]["python"]
    assert {*matrix, "3.11"} == set(said)  # .ci/run has 3.11


def test_hooks_are_those_of_the_dev_extra():
    hooks = yaml.safe_load(read(".pre-commit-config.yaml"))["repos"]
    (ruff,) = (one["rev"] for one in hooks if one["repo"].endswith("ruff-pre-commit"))
    assert f"ruff=={ruff.removeprefix('v')}" in PROJECT["project"]["optional-dependencies"]["dev"]


def options(text: str) -> set[str]:
    return set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", text))


def test_containers_give_options_that_serve_has():
    known = {name for one in get_command(app).commands["serve"].params for name in one.opts}
    dockerfile = read("Dockerfile")
    deployment = (CHART / "templates" / "deployment.yaml").read_text()
    given = options(dockerfile[dockerfile.index("\nCMD") :])
    given |= {
        one for service in yaml.safe_load(read("compose.yaml"))["services"].values() for one in service["command"]
    }
    given |= options(deployment[deployment.index("args:") : deployment.index("env:")])
    given = {one for one in given if one.startswith("--")}
    assert {"--host", "--store", "--model", "--keep", "--grace", "--disk"} <= given
    assert given <= known
    for text in (deployment, read("compose.yaml"), read("deploy/kuberay/rayservice.yaml")):
        assert VARIABLE in text


def test_the_image_has_what_it_needs():
    """What the build copies is in the repository, and a user without rights runs it."""
    kept = [line[1:] for line in read(".dockerignore").splitlines() if line.startswith("!")]
    assert all((ROOT / name).exists() for name in kept)
    assert {"pyproject.toml", "setup.py", "mllm_fast", "kernels", PROJECT["project"]["readme"]} <= set(kept)
    dockerfile = read("Dockerfile")
    assert re.search(r"^USER 10001", dockerfile, re.MULTILINE)
    assert "/healthz" in dockerfile
    extras = re.findall(r"EXTRAS=([\w,]+)", dockerfile + read("docs/serving.md"))
    assert {one for each in extras for one in each.split(",")} <= set(PROJECT["project"]["optional-dependencies"])


@pytest.mark.filterwarnings("ignore:Using extra keyword arguments on `Field`")  # Ray's own
def test_ray_takes_the_services_arguments():
    from ray.serve.schema import ServeDeploySchema

    from mllm_fast.serving.ray_app import Options

    service = yaml.safe_load(read("deploy/kuberay/rayservice.yaml"))
    (application,) = ServeDeploySchema.model_validate(yaml.safe_load(service["spec"]["serveConfigV2"])).applications
    assert application.import_path == "mllm_fast.serving.ray_app:app"
    given = Options(**application.args)
    assert given.settings.store
    (workers,) = service["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    assert given.max_replicas == workers["maxReplicas"]
    (container,) = workers["template"]["spec"]["containers"]
    assert float(container["resources"]["limits"]["nvidia.com/gpu"]) == given.gpus


def test_values_of_the_chart_are_those_that_its_templates_read():
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    read_ones = {
        tuple(one.split(".")[1:])
        for path in (CHART / "templates").iterdir()
        for one in re.findall(r"\.Values((?:\.\w+)+)", path.read_text())
    }
    for names in read_ones:
        found = values
        for name in names:
            assert name in found, names
            found = found[name]
    assert {names[0] for names in read_ones} == set(values)


@pytest.mark.skipif(shutil.which("helm") is None, reason="helm is not installed")
def test_the_chart_renders():
    def rendered(*settings: str) -> dict[str, dict]:
        command = ["helm", "template", "x", str(CHART), *(word for one in settings for word in ("--set", one))]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        return {one["kind"]: one for one in yaml.safe_load_all(text) if one}

    assert subprocess.run(["helm", "lint", "--strict", CHART], capture_output=True).returncode == 0
    usual = rendered()
    assert set(usual) == {"Secret", "PersistentVolumeClaim", "Service", "Deployment"}
    other = rendered("gpus=2", "keys.existingSecret=mine", "persistence.enabled=false")
    assert set(other) == {"Service", "Deployment"}
    (container,) = other["Deployment"]["spec"]["template"]["spec"]["containers"]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == 2
    assert container["env"][0]["valueFrom"]["secretKeyRef"] == {"name": "mine", "key": "keys"}
    assert container["image"].endswith("-cuda")


def test_a_source_distribution_is_the_repository(tmp_path):
    """Every file that git knows is in it, so that whoever unpacks it can build, test and change the package."""
    pytest.importorskip("pybind11", reason="building needs pybind11, of the dev extra")
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("this is no checkout of git")
    command = [sys.executable, "setup.py", "-q", "egg_info", "--egg-base", tmp_path, "sdist", "--dist-dir", tmp_path]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    with tarfile.open(next(tmp_path.glob("*.tar.gz"))) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    assert not {name for name in listed.stdout.splitlines() if (ROOT / name).exists()} - held
    assert not {name for name in held if name.endswith((".so", ".pyc"))}
