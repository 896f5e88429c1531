"""Raw images to a data set: list the source, fix what every shard holds, write the shards, count, and write the manifest, last.

`run` does it all, with one function that runs tasks: under Spark in jobs/prepare.py, or in this process. What a task does is in
tasks.py; a run that was killed goes on with the shards that are not finished.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import logging
import pathlib
import re
import tempfile
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from cvdist import ledger, storage
from cvdist.config import PrepareConfig
from cvdist.errors import ConfigError, CvdistError, DataError, StorageError
from cvdist.finish import finish
from cvdist.ledger import ShardResult
from cvdist.listing import SPLITS
from cvdist.lock import PREFIX as LOCK_PREFIX
from cvdist.lock import Lock
from cvdist.outline import Outline, RunTasks, settings
from cvdist.progress import Progress
from cvdist.shards import MANIFEST_NAME, Manifest, read_manifest
from cvdist.tasks import JOB_NAME, WORK_FOLDER, Job, job_url, work_url, write_shard

__all__ = ["Job", "RunTasks", "ShardResult", "finish", "run", "run_here", "start", "write_shard"]

T = TypeVar("T")
log = logging.getLogger("cvdist.prepare")

ANOTHER_TARGET = "expected an empty or absent folder; choose another target URL, or delete that folder first"


def run_here(description: str, function: Callable[[int], T], numbers: Sequence[int]) -> list[T]:
    """Runs tasks one after the other in this process."""
    log.info("%s", description)
    return [function(number) for number in numbers]


def run(
    config: PrepareConfig, run_tasks: RunTasks = run_here, say: Callable[[str], None] = log.info
) -> Manifest | None:
    """Prepares a data set, or finishes one that was interrupted.

    Args:
        config: The settings.
        run_tasks: Runs the tasks of a stage.
        say: Is given lines about what is done.

    Returns:
        The manifest, new or found; None after a dry run.

    Raises:
        ConfigError: A URL or a setting cannot be used.
        DataError: The source is no set of images, the target holds something else, another run is at work, or too much is bad.
        StorageError: A file system failed.
    """
    config = checked(config)
    if config.dry_run:
        dry_run(config, say)
        return None
    check_target(config)
    with Lock(work_url(config), config.target_url) as lock:
        try:
            job = start(config, run_tasks, say)
            if isinstance(job, Manifest):
                say(f"{config.target_url} holds this data set already; nothing to do")
                storage.delete(work_url(config), recursive=True)
                return job
            done = finished(job)
            pending = [index for index in range(len(job.shards)) if index not in done]
            if done:
                say(f"{len(done)} of {len(job.shards)} shards are finished already; writing the others")
            with Progress(job.url, job.num_inputs - job.num_skipped, say):
                description = f"write {len(pending)} shards of {config.target_url}"
                results = run_tasks(description, functools.partial(write_shard, job), pending)
            return finish(job, [*done.values(), *results], lock.require)
        except CvdistError as error:
            with contextlib.suppress(StorageError):  # the first error is the one to be told
                is_refusal = not isinstance(error, StorageError)
                state = read_state(config)
                if lock.is_mine() and (state is None or (is_refusal and not has_shards(config, state))):
                    remove_empty(config)  # there is nothing to go on with
            raise


def has_shards(config: PrepareConfig, state: dict[str, Any] | None) -> bool:
    """Says whether an unfinished run has finished any shard."""
    return state is not None and storage.exists(storage.join(job_url(config, state["digest"]), ledger.FOLDER))


def checked(config: PrepareConfig) -> PrepareConfig:
    """Returns the settings with their URLs in one spelling."""
    source = storage.check_url(config.source_url, "source_url").rstrip("/")
    target = storage.check_url(config.target_url, "target_url").rstrip("/")
    if target == source or target.startswith(source + "/") or source.startswith(target + "/"):
        raise ConfigError(
            f"target_url: {target} and the source {source} lie in each other; expected two folders; choose another target"
        )
    if config.append and config.limit_per_class is not None:
        raise ConfigError("append: limit_per_class counts from nothing; expected one of the two; leave one out")
    return dataclasses.replace(config, source_url=source, target_url=target)


def remove_empty(config: PrepareConfig) -> None:
    """Removes the work folder of a run that never came to write, and the target where that made it."""
    storage.delete(work_url(config), recursive=True)
    try:
        if not storage.list_dir(config.target_url):
            storage.delete(config.target_url)
    except StorageError as error:  # another run may have begun just now
        log.debug("%s stays: %s", config.target_url, error)


def check_target(config: PrepareConfig) -> Manifest | None:
    """Returns the manifest that the target holds, if any.

    Raises:
        DataError: It holds a data set, or an unfinished one, of other settings, or files that are neither.
    """
    target, ours = config.target_url, settings(config)
    names = {storage.name(entry.url) for entry in storage.list_dir(target)} if storage.exists(target) else set()
    manifest = read_manifest(target) if MANIFEST_NAME in names else None
    if manifest is not None and manifest.settings != ours:
        raise DataError(f"{target} holds another data set ({difference(manifest.settings, ours)}); {ANOTHER_TARGET}")
    state = read_state(config) if WORK_FOLDER in names else None
    if state is not None and state["settings"] != ours and has_shards(config, state):
        changes = difference(state["settings"], ours)
        raise DataError(f"{target} holds an unfinished other data set ({changes}); {ANOTHER_TARGET}")
    if manifest is None and state is None and names - {WORK_FOLDER}:
        raise DataError(
            f"{target} holds {len(names)} files or folders that are no data set ({min(names)}, ...); {ANOTHER_TARGET}"
        )
    return manifest


def read_state(config: PrepareConfig) -> dict[str, Any] | None:
    """Returns what an unfinished run has noted down."""
    url = work_url(config, JOB_NAME)
    if not storage.exists(url):
        return None
    state: dict[str, Any] = json.loads(storage.read_bytes(url))
    return state


def write_state(config: PrepareConfig, digest: str, num_shards: dict[str, int] | None) -> None:
    """Notes down what a later run needs to go on."""
    state = {"digest": digest, "settings": settings(config), "num_shards": num_shards}
    storage.write_bytes(work_url(config, JOB_NAME), json.dumps(state).encode(), overwrite=True)


def difference(theirs: dict[str, Any], ours: dict[str, Any]) -> str:
    """Says in words which settings differ."""
    return "; ".join(
        f"{key} {theirs.get(key)!r} there, {value!r} here" for key, value in ours.items() if theirs.get(key) != value
    )


def start(
    config: PrepareConfig, run_tasks: RunTasks = run_here, say: Callable[[str], None] = log.info
) -> Job | Manifest:
    """Lists the source, checks the target, and fixes what each shard holds.

    Returns:
        The job; or the manifest, when the target already holds exactly this data set.

    Raises:
        As `run`.
    """
    config = checked(config)
    previous = check_target(config)
    with tempfile.TemporaryDirectory(prefix="cvdist-prepare-") as folder:
        outline = Outline(config, pathlib.Path(folder), previous)
        outline.list_source()
        if previous is not None and (
            outline.digest in previous.generations or (config.append and not outline.num_listed)
        ):
            return previous
        if previous is not None and not config.append:
            raise DataError(
                f"{config.target_url} holds another data set (same settings, other input files); expected an empty or absent folder;"
                " add --append to add what is new, or choose another target URL"
            )
        state = read_state(config)
        if state is not None and state["digest"] != outline.digest:
            say(f"{config.target_url}: inputs or settings are not those of the interrupted run; starting over")
            start_over(config, previous)
            state = None
        if state is None:
            write_state(config, outline.digest, None)
        outline.read_contents(run_tasks)
        if config.append and not outline.num_listed:  # known only now, where the inputs had to be unpacked
            storage.delete(work_url(config, JOB_NAME))
            assert previous is not None
            return previous
        if config.append and previous is not None:
            say(f"  {outline.num_held:,} inputs are there already, by their keys; {outline.num_listed:,} are new")
        num_shards = (state or {}).get("num_shards") or outline.num_shards()
        job = outline.write_listing(num_shards)
        write_state(config, outline.digest, num_shards)
        return job


def start_over(config: PrepareConfig, previous: Manifest | None) -> None:
    """Removes what an unfinished run has written; what is no shard stays."""
    kept = {shard.path for split in (previous.splits.values() if previous else ()) for shard in split.shards}
    for entry in storage.list_dir(work_url(config)) if storage.exists(work_url(config)) else ():
        if not storage.name(entry.url).startswith(LOCK_PREFIX):
            storage.delete(entry.url, recursive=True)
    for split in SPLITS:
        folder = storage.join(config.target_url, split)
        for entry in storage.list_dir(folder) if storage.exists(folder) else ():
            path = storage.relative(entry.url, config.target_url)
            if re.fullmatch(r"\w+/shard-\d+\.parquet", path) and path not in kept:
                storage.delete(entry.url)


def finished(job: Job) -> dict[int, ShardResult]:
    """Returns the results of shards that an earlier run has finished."""
    folder = storage.join(job.url, ledger.FOLDER)
    if not storage.exists(folder):
        return {}
    names = {storage.name(entry.url) for entry in storage.list_dir(folder)}
    found: dict[int, ShardResult] = {}
    for index, shard in enumerate(job.shards):
        url = ledger.ledger_url(job.url, *shard)
        if storage.name(url) in names and (result := ledger.read_result(url)) is not None:
            found[index] = result
    return found


def dry_run(config: PrepareConfig, say: Callable[[str], None]) -> None:
    """Says what a run would do: inputs, splits, classes, bytes, shards, time; writes nothing."""
    previous = check_target(config)
    with tempfile.TemporaryDirectory(prefix="cvdist-prepare-") as folder:
        outline = Outline(config, pathlib.Path(folder), previous)
        outline.list_source()
        for line in outline.describe():
            say(line)
