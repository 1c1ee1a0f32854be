"""The workflows of .github, which do not run here: they name what there is, and may do no more than they need."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

import makefiles

if sys.version_info < (3, 11):
    pytest.skip("Python 3.10 cannot read TOML", allow_module_level=True)
import tomllib

ROOT = Path(__file__).parents[3]
WORKFLOWS = {path.name: path.read_text() for path in sorted((ROOT / ".github/workflows").glob("*.yml"))}
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
# What a job may beyond reading the repository.
RIGHTS = {
    ("docs.yml", "publish"): {"pages", "id-token"},
    **{("release.yml", job): {"id-token"} for job in ("rehearse", "publish")},
    ("release.yml", "announce"): {"contents"},
}
every = pytest.mark.parametrize("name", WORKFLOWS)


def jobs(name: str) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(WORKFLOWS[name])["jobs"]
    return found


def commands(name: str) -> str:
    steps = [step for job in jobs(name).values() for step in job.get("steps", [])]
    return "\n".join(step.get("run", "") for step in steps)


@every
def test_rights_are_the_least(name: str) -> None:
    assert yaml.safe_load(WORKFLOWS[name])["permissions"] == {"contents": "read"}
    for job, content in jobs(name).items():
        assert set(content.get("permissions", {})) == RIGHTS.get((name, job), set()), job
        assert "uses" in content or "timeout-minutes" in content, job
    # A token that stays in the checkout can be read by whatever runs there.
    assert WORKFLOWS[name].count("actions/checkout@") == WORKFLOWS[name].count("persist-credentials: false")


@every
def test_what_it_calls_exists(name: str) -> None:
    assert set(re.findall(r"\bmake ([\w-]+)", commands(name))) <= makefiles.targets()
    assert all((ROOT / path).is_file() for path in re.findall(r"\b(?:ba)?sh (\S+)", commands(name)))
    local, others = [], []
    for used in re.findall(r"uses: (\S+)", WORKFLOWS[name]):
        (local if used.startswith("./") else others).append(used)
    assert all((ROOT / path).is_file() for path in local)
    # By hash: a tag can be moved. PyPI's own is used by its branch, as its page says.
    publish = "pypa/gh-action-pypi-publish@release/v1"
    assert [used for used in others if used != publish and not re.search(r"@[0-9a-f]{40}$", used)] == []


def test_a_release_is_tested_on_avx512bf16() -> None:
    """Of a set that the machine lacks nothing is tested; the published speeds come from this one."""
    tests = jobs("release.yml")["tests"]
    assert tests["uses"].endswith("/everything.yml")
    assert tests["with"] == {"require-isas": "avx512bf16"}
    [step] = [step for step in jobs("everything.yml")["all"]["steps"] if step.get("run") == "bash .ci/run night"]
    assert step["env"] == {"PISSA_REQUIRE_ISAS": "${{ inputs.require-isas }}"}


def test_a_release_has_the_notes_of_its_version() -> None:
    version = PYPROJECT["project"]["version"]
    notes = [sys.executable, str(ROOT / ".ci/notes.py")]
    printed = subprocess.run([*notes, version], capture_output=True, text=True, check=True).stdout
    assert printed.startswith("### Added\n")
    assert printed.strip() in (ROOT / "CHANGELOG.md").read_text()
    assert "\n## " not in printed
    assert "no section '## 0.0.9" in subprocess.run([*notes, "0.0.9"], capture_output=True, text=True).stderr


def test_a_citation_names_the_version() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == PYPROJECT["project"]["version"]
    [date] = re.findall(
        rf"^## {citation['version']} \((.+)\)$", (ROOT / "CHANGELOG.md").read_text(), flags=re.MULTILINE
    )
    assert date == str(citation.get("date-released", "unreleased"))


def test_each_python_is_tested_and_gets_a_wheel() -> None:
    prefix = "Programming Language :: Python :: 3."
    promised = [kind.removeprefix(prefix) for kind in PYPROJECT["project"]["classifiers"] if kind.startswith(prefix)]
    assert len(promised) >= 5
    assert PYPROJECT["project"]["requires-python"] == f">=3.{promised[0]}"
    pythons = [f"3.{minor}" for minor in promised]
    wheels = jobs("wheels.yml")
    for job in (jobs("tests.yml")["python"], wheels["installed"], wheels["macos"]):
        assert job["strategy"]["matrix"]["python"] == pythons
    assert f"make wheels PYTHONS='{' '.join(f'python{python}' for python in pythons)}'" in commands("wheels.yml")
    [versions] = [step["with"]["python-version"] for step in wheels["linux"]["steps"] if "setup-python" in str(step)]
    assert sorted(versions.split()) == sorted(pythons)
    assert f"for minor in {' '.join(promised)};" in makefiles.TEXT  # which Pythons `make wheels` looks for


def test_wheels_are_built_with_what_the_build_requires() -> None:
    """Without isolation, so that torch comes without what it needs to run."""
    tools = {"'cmake>=3.24'", "ninja"}  # scikit-build-core's own, which brings them only to an isolated build
    requires = {f"'{requirement}'" for requirement in PYPROJECT["build-system"]["requires"]}
    [torch] = [requirement for requirement in requires if requirement.startswith("'torch>")]
    for text in (makefiles.TEXT, (ROOT / "tests/wheels/build.sh").read_text()):
        [installed] = re.findall(r"pip install -q ('scikit-build-core.*)", text)
        assert set(installed.split()) - tools == requires - {torch}
    assert f"pip install -q --no-deps {torch}" in makefiles.TEXT


def test_versions_of_cuda_stand_in_pyproject_alone() -> None:
    """What compiles the CUDA library is read from there by Makefile, CMake and, through them, all else."""
    groups = PYPROJECT["dependency-groups"]
    assert len(groups["cuda-compiler"]) >= 3
    assert len(groups["cuda-libraries"]) >= 5
    folders = ("mk", "cpp/cmake", "tests", "bench", ".ci", ".github")
    files = [ROOT / "Makefile", ROOT / "CMakeLists.txt"]
    files += [path for folder in folders for path in (ROOT / folder).rglob("*") if path.suffix not in {".txt", ".json"}]
    texts = {path: path.read_text(errors="replace") for path in files if path.is_file()}
    assert [path for path, text in texts.items() if re.search(r"nvidia-[\w-]+(?:~=|[=<>]=|[<>])\d", text)] == []
