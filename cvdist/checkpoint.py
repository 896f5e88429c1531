"""Checkpoints: complete or invisible, verified byte for byte, written in the background.

    RUN_URL/checkpoints/step-00000120/variables.npz   the variables of the model and the optimizer
                                      state.json      epoch, step, seed, what the run was, an index of the variables
                                      COMMIT.json     bytes and sha256 of both, written last
    RUN_URL/checkpoints/.tmp-*                        a save under way, or one that died

A save writes a hidden folder, reads it back, and renames it once. A restore hashes every byte it uses, and walks back
to the newest checkpoint that verifies, reporting each one that does not. Only rank zero writes and reads; the caller
broadcasts.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import hashlib
import io
import json
import os
import platform
import re
import tempfile
import uuid
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import metadata
from types import TracebackType
from typing import Any, Self

import numpy as np

from cvdist import comm, storage
from cvdist.errors import AlreadyExistsError, CheckpointError, NotFoundError, StorageError

FORMAT = 1
VARIABLES, STATE, COMMIT = "variables.npz", "state.json", "COMMIT.json"
HIDDEN = ".tmp-"
# Whole files are written again so many times when the storage fails in the middle of one; each time is reported.
WRITE_ATTEMPTS = 3

Report = Callable[[str], None]
Arrays = Mapping[str, np.ndarray[Any, Any]]


@dataclasses.dataclass(frozen=True)
class State:
    """What a run needs beside its variables to go on.

    Attributes:
        model: Name that create_model knows the network by.
        epoch: Whole epochs that are done.
        step: Optimizer steps that are done, since the start of the run.
        seed: Of the run.
        global_batch: Samples of one step.
        config_digest: Of the resolved configuration.
        data_digest: Of the data set's manifest.
        extra: Anything else that JSON can hold.
        versions: Of the packages that wrote the checkpoint; filled in by the save.
    """

    model: str
    epoch: int
    step: int
    seed: int
    global_batch: int
    config_digest: str = ""
    data_digest: str = ""
    extra: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    versions: Mapping[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint in memory.

    Attributes:
        url: Its folder.
        state: What it holds beside the variables.
        index: Data type and shape of each variable, by name.
        data: The bytes of variables.npz.
    """

    url: str
    state: State
    index: Mapping[str, tuple[str, tuple[int, ...]]]
    data: bytes = dataclasses.field(repr=False)

    def arrays(self, names: Sequence[str]) -> Iterator[tuple[str, np.ndarray[Any, Any]]]:
        """Yields the named variables one by one, so that only one at a time is in memory twice."""
        with np.load(io.BytesIO(self.data), allow_pickle=False) as stored:
            for name in names:
                dtype, shape = self.index[name]
                # Types that NumPy does not know by itself (bfloat16) are stored as integers of the same size.
                yield name, stored[name].view(np.dtype(dtype)).reshape(shape)


def named_variables(model: Any, optimizer: Any = None) -> dict[str, Any]:
    """Returns the variables of a Keras model and its optimizer under names that every process gives them.

    In place of Keras's numbers (see `comm.stable_path`) they carry the position in the model.
    """
    groups = {"model": model.variables, "optimizer": [] if optimizer is None else optimizer.variables}
    return {
        f"{group}/{index:04d}/{comm.stable_path(variable)}": variable
        for group, variables in groups.items()
        for index, variable in enumerate(variables)
    }


def restore(checkpoint: Checkpoint, model: Any, optimizer: Any = None, *, model_name: str) -> None:
    """Assigns a checkpoint's variables: all of them, or none.

    Args:
        checkpoint: What `latest` returned.
        model: A built Keras model.
        optimizer: Its built optimizer; without one the checkpoint's optimizer variables are left alone.
        model_name: The name that the checkpoint must have been saved under.

    Raises:
        CheckpointError: It is a checkpoint of another model or optimizer.
    """
    if checkpoint.state.model != model_name:
        raise CheckpointError(
            f"{checkpoint.url} is a checkpoint of model {checkpoint.state.model!r}; expected {model_name!r};"
            f" use model {checkpoint.state.model!r}, or another run folder"
        )
    variables = named_variables(model, optimizer)
    found = {
        name: entry for name, entry in checkpoint.index.items() if optimizer is not None or name.startswith("model/")
    }
    expected = {name: (_dtype_name(variable.dtype), tuple(variable.shape)) for name, variable in variables.items()}
    for name in sorted(found.keys() | expected.keys()):
        if found.get(name) != expected.get(name):
            raise CheckpointError(
                f"{checkpoint.url} does not fit this {name.partition('/')[0]}: {name} is {_words(found.get(name))} in the"
                f" checkpoint; expected {_words(expected.get(name))}; use the settings of the run that saved it (model"
                f" {model_name!r} with the same classes, image size and optimizer), or another run folder"
            )
    for name, array in checkpoint.arrays(list(variables)):
        variables[name].assign(array)


def latest(run_url: str, report: Report) -> Checkpoint | None:
    """Reads the newest checkpoint of a run that verifies.

    Args:
        run_url: Folder of the run.
        report: Receives one line for each newer checkpoint that was passed over, and why.

    Returns:
        The checkpoint, or None when none of them verifies or there is none.

    Raises:
        StorageError: The storage cannot be read at all.
    """
    unreadable: StorageError | None = None
    for url in _listed(run_url):
        try:
            return read(url)
        except NotFoundError as error:
            report(f"passing over checkpoint {url}: a file is missing ({error})")
        except CheckpointError as error:
            report(f"passing over a damaged checkpoint: {error}")
        except StorageError as error:
            unreadable = error
            report(f"passing over checkpoint {url}: it cannot be read ({error})")
    if unreadable is not None:
        raise unreadable
    return None


def require_latest(run_url: str, report: Report) -> Checkpoint:
    """Reads the newest checkpoint of a run that verifies, and insists on one; see `latest`.

    Raises:
        CheckpointError: There is none.
        StorageError: The storage cannot be read at all.
    """
    reasons: list[str] = []

    def note(message: str) -> None:
        reasons.append(message)
        report(message)

    checkpoint = latest(run_url, note)
    if checkpoint is None:
        damaged = f" that verifies ({len(reasons)} damaged; newest: {reasons[0]})" if reasons else ""
        raise CheckpointError(
            f"{storage.join(run_url, 'checkpoints')} holds no checkpoint{damaged}; expected the run to have saved one;"
            " check the run's URL, or start it anew without resume"
        )
    return checkpoint


def read(url: str) -> Checkpoint:
    """Reads one checkpoint, hashing every byte before it is used.

    Raises:
        CheckpointError: It is not what was saved.
        StorageError: A file is missing or cannot be read.
    """
    files = _read_commit(url)
    data = {}
    for file, entry in files.items():
        data[file] = storage.read_bytes(storage.join(url, file))
        _compare(storage.join(url, file), len(data[file]), hashlib.sha256(data[file]).hexdigest(), entry)
    document = json.loads(data[STATE])
    index = {name: (dtype, tuple(shape)) for name, (dtype, shape) in document.pop("variables").items()}
    return Checkpoint(url=url, state=State(**document), index=index, data=data[VARIABLES])


class Checkpointer:
    """Saves the checkpoints of one run in one background thread, and keeps the newest. For rank zero only.

    with Checkpointer(run_url, keep=3, report=log) as checkpointer:
        checkpointer.remove_unfinished()
        ...
        checkpointer.save(model, optimizer, State(...))
    """

    def __init__(self, run_url: str, *, keep: int, report: Report) -> None:
        """Takes the run's folder; nothing is read or written yet.

        Args:
            run_url: Folder of the run.
            keep: How many of the newest verified checkpoints stay, at least two.
            report: Receives one line for what went wrong without ending the run; also in the background thread.

        Raises:
            CheckpointError: `keep` is less than two.
        """
        if keep < 2:
            raise CheckpointError(
                f"checkpoint.keep: {keep} is too few; expected at least 2, since one may be damaged; use 2 or more"
            )
        self._folder = storage.join(run_url, "checkpoints")
        self._run_url, self._keep, self._report = run_url, keep, report
        self._thread = concurrent.futures.ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._pending: concurrent.futures.Future[None] | None = None
        self._verified: set[str] = set()

    def __enter__(self) -> Self:
        """Returns itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Finishes the save under way; its error is raised, or only reported where another error is on its way."""
        if error is None:
            self.close()
            return
        failed = self._pending.exception() if self._pending else None
        if failed:
            self._report(f"the last checkpoint could not be saved: {failed}")
        self._thread.shutdown()

    def remove_unfinished(self) -> int:
        """Deletes what saves that died left in this run's folder, and returns how many. For the start of a run."""
        unfinished = [entry.url for entry in _entries(self._folder) if storage.name(entry.url).startswith(HIDDEN)]
        for url in unfinished:
            storage.delete(url, recursive=True)
        if unfinished:
            self._report(f"removed {len(unfinished)} unfinished checkpoints from {self._folder}")
        return len(unfinished)

    def save(self, model: Any, optimizer: Any, state: State) -> None:
        """Copies the variables now and writes them in the background.

        Waits for the save before this one, if it is still under way. A checkpoint of the same step is replaced.

        Raises:
            StorageError: The save before this one failed.
            CheckpointError: What the save before this one wrote did not read back as written.
        """
        self.wait()
        # One copy: numpy() of a TensorFlow variable does not share its memory.
        arrays = {
            name: np.asarray(variable.value.numpy()) for name, variable in named_variables(model, optimizer).items()
        }
        self._pending = self._thread.submit(self._write, state.step, arrays, _state_bytes(arrays, state))

    def wait(self) -> None:
        """Waits for the save under way and raises its error; see `save`."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def close(self) -> None:
        """Finishes the save under way, raises its error and ends the thread; see `save`."""
        try:
            self.wait()
        finally:
            self._thread.shutdown()

    def _write(self, step: int, arrays: Arrays, state: bytes) -> None:
        """Writes one checkpoint under a hidden name, makes it visible, and removes the oldest ones."""
        url = storage.join(self._folder, f"step-{step:08d}")
        hidden = storage.join(self._folder, f"{HIDDEN}{step:08d}-{uuid.uuid4().hex}")
        with contextlib.ExitStack() as on_failure:
            on_failure.callback(self._discard, hidden)
            files = {
                VARIABLES: self._write_file(
                    storage.join(hidden, VARIABLES), lambda stream: _write_arrays(stream, arrays)
                ),
                STATE: self._write_file(storage.join(hidden, STATE), lambda stream: stream.write(state)),
            }
            storage.write_bytes(storage.join(hidden, COMMIT), _commit_bytes(step, files))
            _verify(hidden)
            self._show(hidden, url)
            on_failure.pop_all()
        self._verified.add(url)
        self._prune()

    def _write_file(self, url: str, write: Callable[[Any], object]) -> dict[str, Any]:
        """Writes one file, from its start again where the storage failed; returns its bytes and sha256."""
        for attempt in range(1, WRITE_ATTEMPTS + 1):
            try:
                with storage.create(url, overwrite=True, after_failure=attempt > 1) as file:
                    stream = _HashingStream(file)
                    write(stream)
                return {"bytes": stream.num_bytes, "sha256": stream.sha256.hexdigest()}
            except StorageError as error:
                if attempt == WRITE_ATTEMPTS or isinstance(error, storage.TimedOutError):
                    raise
                self._report(f"attempt {attempt} of {WRITE_ATTEMPTS} to write {url} failed, trying again: {error}")
        raise AssertionError("unreachable")

    def _show(self, hidden: str, url: str) -> None:
        """Gives a finished checkpoint its name; one that has the name already steps aside first."""
        try:
            storage.rename(hidden, url)
        except AlreadyExistsError:
            aside = storage.join(self._folder, f"{HIDDEN}replaced-{uuid.uuid4().hex}")
            self._verified.discard(url)
            storage.rename(url, aside)
            storage.rename(hidden, url)
            self._discard(aside)

    def _discard(self, url: str) -> None:
        """Deletes a hidden folder; what remains of it is deleted at the next start."""
        try:
            storage.delete(url, recursive=True)
        except StorageError as error:
            self._report(f"{url} could not be deleted and stays until the run is started again: {error}")

    def _prune(self) -> None:
        """Removes what is older than the newest `keep` checkpoints that verify; damaged ones do not count."""
        num_good = 0
        for url in _listed(self._run_url):
            if num_good < self._keep:
                num_good += self._is_good(url)
                continue
            # Out of sight first: a deletion that dies in the middle must not leave half a checkpoint.
            hidden = storage.join(self._folder, f"{HIDDEN}removed-{uuid.uuid4().hex}")
            try:
                storage.rename(url, hidden)
            except StorageError as error:
                self._report(f"an old checkpoint stays, {url} could not be removed: {error}")
                continue
            self._verified.discard(url)
            self._discard(hidden)

    def _is_good(self, url: str) -> bool:
        """Says whether a checkpoint verifies; each is read once in the life of this object."""
        if url in self._verified:
            return True
        try:
            _verify(url)
        except (CheckpointError, StorageError) as error:
            self._report(f"a checkpoint does not count among the {self._keep} that are kept: {error}")
            return False
        self._verified.add(url)
        return True


def export_weights(model: Any, url: str) -> str:
    """Writes a model's weights in Keras's `.weights.h5` form, with a `.sha256` file beside it as sha256sum prints it.

    Args:
        model: A built Keras model.
        url: Where to; it ends in .weights.h5. What is there is replaced.

    Returns:
        The sha256 of the file.

    Raises:
        CheckpointError: The URL does not end in .weights.h5.
        StorageError: The storage did not take the file.
    """
    if not url.endswith(".weights.h5"):
        raise CheckpointError(
            f"{url} is no place for weights; expected a name that ends in .weights.h5; add the ending"
        )
    with tempfile.TemporaryDirectory(prefix="cvdist-") as folder:
        path = os.path.join(folder, "model.weights.h5")
        model.save_weights(path)
        with open(path, "rb") as file:
            data = file.read()
    digest = hashlib.sha256(data).hexdigest()
    storage.write_bytes(url, data, overwrite=True)
    storage.write_bytes(url + ".sha256", f"{digest}  {storage.name(url)}\n".encode(), overwrite=True)
    return digest


class _HashingStream(io.RawIOBase):
    """A stream that cannot seek, so that zipfile writes each byte once; counts and hashes what passes."""

    def __init__(self, file: Any) -> None:
        super().__init__()
        self._file = file
        self.sha256 = hashlib.sha256()
        self.num_bytes = 0

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        num_bytes: int = self._file.write(data)
        self.sha256.update(data)
        self.num_bytes += num_bytes
        return num_bytes


def _write_arrays(stream: Any, arrays: Arrays) -> None:
    """Writes what np.savez would, without pickle and without the time of day, so that equal states give equal bytes."""
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_STORED) as archive:
        for name, array in arrays.items():
            plain = array.view(f"u{array.itemsize}") if array.dtype.kind == "V" else array
            with archive.open(zipfile.ZipInfo(name + ".npy"), "w", force_zip64=True) as member:
                np.lib.format.write_array(member, plain, allow_pickle=False)  # type: ignore[no-untyped-call]


def _state_bytes(arrays: Arrays, state: State) -> bytes:
    """Returns state.json."""
    packages = {name: metadata.version(name) for name in ("tensorflow", "keras", "numpy")}
    state = dataclasses.replace(state, versions={**packages, "python": platform.python_version(), **state.versions})
    index = {name: [_dtype_name(array.dtype), list(array.shape)] for name, array in arrays.items()}
    return _json_bytes({**dataclasses.asdict(state), "variables": index})


def _commit_bytes(step: int, files: Mapping[str, Any]) -> bytes:
    """Returns COMMIT.json, which ends in the digest of its other fields."""
    document = {"format": FORMAT, "step": step, "files": files}
    return _json_bytes({**document, "sha256": hashlib.sha256(_json_bytes(document)).hexdigest()})


def _json_bytes(document: Any) -> bytes:
    """Writes JSON the one way in which it is hashed."""
    return (json.dumps(document, indent=1, allow_nan=True) + "\n").encode()


def _read_commit(url: str) -> dict[str, Any]:
    """Returns what COMMIT.json says about each file, after checking COMMIT.json itself, byte for byte.

    Raises:
        CheckpointError: It is damaged, or is another checkpoint's.
        StorageError: It is missing or cannot be read.
    """
    commit_url = storage.join(url, COMMIT)
    data = storage.read_bytes(commit_url)
    try:
        document = json.loads(data)
        step, files = document["step"], document["files"]
        whole = document["format"] == FORMAT and set(files) == {VARIABLES, STATE} and data == _commit_bytes(step, files)
    except (ValueError, KeyError, TypeError, AttributeError):
        whole = False
    if not whole:
        raise CheckpointError(
            f"{commit_url} is damaged: {len(data)} bytes that do not match their own digest; expected what was saved"
        )
    named = _step_of(url)
    if named is not None and named != step:
        raise CheckpointError(
            f"{commit_url} is of step {step}; expected step {named} in this folder; rename the folder back"
        )
    return dict(files)


def _verify(url: str) -> None:
    """Reads a checkpoint through, a block at a time, and compares every byte with its digest; see `read`."""
    for file, entry in _read_commit(url).items():
        file_url = storage.join(url, file)
        with storage.open_read(file_url) as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
            _compare(file_url, stream.tell(), digest, entry)


def _compare(url: str, num_bytes: int, sha256: str, entry: Mapping[str, Any]) -> None:
    """Raises CheckpointError unless a file is what COMMIT.json says."""
    if num_bytes != entry["bytes"]:
        raise CheckpointError(f"{url} is damaged: {num_bytes} bytes; expected {entry['bytes']} as saved")
    if sha256 != entry["sha256"]:
        raise CheckpointError(f"{url} is damaged: sha256 {sha256[:12]}; expected {entry['sha256'][:12]} as saved")


def _entries(folder: str) -> list[storage.FileInfo]:
    """Lists a folder; one that is not there is empty."""
    try:
        return list(storage.list_dir(folder))
    except NotFoundError:
        return []


def _listed(run_url: str) -> list[str]:
    """Returns the visible checkpoints of a run, the newest first."""
    steps = {entry.url: _step_of(entry.url) for entry in _entries(storage.join(run_url, "checkpoints"))}
    return sorted(
        (url for url, step in steps.items() if step is not None), key=lambda url: steps[url] or 0, reverse=True
    )


def _step_of(url: str) -> int | None:
    """Returns the step that a checkpoint's folder is named after; None for other folders."""
    match = re.fullmatch(r"step-([0-9]{8,})", storage.name(url))
    return int(match.group(1)) if match else None


def _dtype_name(dtype: Any) -> str:
    """Returns `float32` for a NumPy or Keras data type."""
    return dtype if isinstance(dtype, str) else str(np.dtype(dtype).name)


def _words(entry: tuple[str, tuple[int, ...]] | None) -> str:
    """Describes a variable in a message."""
    return "absent" if entry is None else f"{entry[0]} of shape {entry[1]}"
