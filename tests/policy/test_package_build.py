"""What is released: one version number, and a source distribution that can test itself."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
from email.message import Message
from email.parser import Parser
from pathlib import Path

import pytest
import yaml

import ulysses_accel
from tests.helpers.sources import ROOT

# What is no part of the repository.
NOT_COPIED = (".git", ".venv", "runs", "build", "dist", "*.egg-info", "__pycache__", ".*_cache")
SHIPPED = ("benchmarks", "configs", "docs", "examples", "requirements", "tests", "ulysses_accel")


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the repository: building writes into the folder that it reads."""
    folder = tmp_path_factory.mktemp("package") / "sources"
    ignore = shutil.ignore_patterns(*NOT_COPIED, ".hypothesis")
    shutil.copytree(ROOT, folder, ignore=ignore, symlinks=True)
    return folder


@pytest.fixture(scope="module")
def distribution(sources: Path) -> Path:
    _build(sources, "build_sdist", "dist")
    (file,) = (sources / "dist").glob("*.tar.gz")
    return file


def _build(sources: Path, hook: str, folder: str) -> None:
    """Calls a hook of the build backend that pyproject.toml names, as pip does, without a network."""
    (sources / folder).mkdir()
    code = f"from setuptools import build_meta; build_meta.{hook}({folder!r})"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=sources, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-4000:]


def _metadata(text: str) -> Message:
    return Parser().parsestr(text)


def test_the_source_distribution_holds_all_that_its_tests_read(
    sources: Path, distribution: Path
) -> None:
    with tarfile.open(distribution) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    expected = {
        file.relative_to(sources).as_posix()
        for folder in SHIPPED
        for file in (sources / folder).rglob("*")
        if file.is_file()
    }
    expected |= {file.name for file in sources.iterdir() if file.is_file()}
    assert expected - names == set()
    assert {"CHANGELOG.md", ".ci/run", ".github/workflows/ci.yml"} <= names


def test_there_is_one_version_number(sources: Path, distribution: Path) -> None:
    version = ulysses_accel.__version__
    assert distribution.name == f"ulysses_accel-{version}.tar.gz"
    pyproject = (ROOT / "pyproject.toml").read_text()
    assert "\nversion = {" in pyproject
    assert f'"{version}"' not in pyproject
    assert "version" not in yaml.safe_load((ROOT / "CITATION.cff").read_text())


def test_metadata_says_what_the_package_is(sources: Path) -> None:
    _build(sources, "prepare_metadata_for_build_wheel", "metadata")
    (file,) = (sources / "metadata").glob("*/METADATA")
    metadata = _metadata(file.read_text())
    assert metadata["Name"] == "ulysses-accel"
    assert metadata["Version"] == ulysses_accel.__version__
    assert metadata["Author"]
    assert metadata["Keywords"]
    addresses = metadata.get_all("Project-URL") or []
    assert {entry.partition(",")[0] for entry in addresses} >= {"Homepage", "Issues", "Changelog"}
    assert "Typing :: Typed" in (metadata.get_all("Classifier") or [])


def test_the_workflow_calls_what_contributors_call() -> None:
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
    commands = [
        step["run"] for job in workflow["jobs"].values() for step in job["steps"] if "run" in step
    ]
    assert any(command.startswith("make test") for command in commands)
    assert any(command.startswith("make check") for command in commands)
    targets = (ROOT / "Makefile").read_text()
    for command in commands:
        assert f"\n{command.split()[1]}:" in targets


def test_the_hooks_are_the_tools_of_make_check() -> None:
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    checks = (ROOT / "Makefile").read_text().partition("\ncheck:")[2].partition("\n\n")[0]
    for hook in hooks:
        tool = " ".join(word for word in hook["entry"].split() if not word.startswith("--"))
        assert f"$(BIN)/{tool}" in checks
