"""The benchmark of the loader does not take a loader that does nothing, or something else, for a fast one."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import cv2
import numpy as np
import pytest

from tests.bench import loader
from tests.bench.environments import UnavailableError, limits_library

NUM_IMAGES, WIDTH, HEIGHT = 64, 160, 120


@pytest.fixture
def peers(monkeypatch: pytest.MonkeyPatch) -> dict[str, ModuleType]:
    """Modules that the peers' own environments import."""
    monkeypatch.syspath_prepend(str(Path(loader.__file__).parent))
    return {name: importlib.import_module(f"peers.{name}") for name in ("common", "check", "bare")}


@pytest.fixture
def work(peers: dict[str, ModuleType], tmp_path: Path) -> Any:
    """A corpus of coarse random pictures, with and without restart markers."""
    rng = np.random.default_rng(0)
    about = {"num_images": NUM_IMAGES, "width": WIDTH, "height": HEIGHT}
    (tmp_path / "corpus.json").write_text(json.dumps(about))
    for index in range(NUM_IMAGES):
        pixels = cv2.resize(rng.integers(0, 256, (6, 8, 3), np.uint8), (WIDTH, HEIGHT), interpolation=cv2.INTER_CUBIC)
        for part, interval in (("images", 0), ("restart", 2)):
            path = tmp_path / part / "class0" / f"{index:06d}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            cv2.imwrite(str(path), pixels, [cv2.IMWRITE_JPEG_QUALITY, 95, cv2.IMWRITE_JPEG_RST_INTERVAL, interval])
    return peers["common"].Work(tmp_path, tmp_path, "opencv", {})


def first_batch(work: Any) -> tuple[Any, Any]:
    """What a loader gives that does as it is told: images and numbers, shuffled."""
    data, transform = dict(work.records()), work.transform
    order = np.random.default_rng(1).permutation(NUM_IMAGES)
    return np.stack([transform(index, data[index]) for index in order]), order


def test_a_right_batch_is_accepted(peers: dict[str, ModuleType], work: Any) -> None:
    found = peers["check"].check_batch(object(), work, *first_batch(work))
    assert found == {"difference": 0.0, "checked": "same crop"}


def test_grey_constant_repeated_unshuffled_and_wrong_images_are_refused(
    peers: dict[str, ModuleType], work: Any
) -> None:
    check = peers["check"].check_batch
    images, order = first_batch(work)
    constant = images.copy()
    constant[5] = 127
    straight = np.argsort(order)
    for batch, numbers, words in (
        (images[:63], order[:63], "expected uint8"),
        (images.astype(np.float32), order, "expected uint8"),
        (constant, order, "one colour"),
        (images, np.zeros(NUM_IMAGES, int), "comes twice"),
        (images[straight], order[straight], "stored order"),
        (images[::-1], order, "differ from their reference"),
        (images[:, :, :, ::-1], order, "differ from their reference"),
    ):
        with pytest.raises(ValueError, match=words):
            check(object(), work, batch, numbers)


def test_a_crop_of_the_photo_is_told_from_a_crop_of_another(peers: dict[str, ModuleType], work: Any) -> None:
    check = peers["check"]
    images, order = first_batch(work)
    own = [check.closest_crop(check.photo(work, int(order[at])), images[at]) for at in range(4)]
    other = [check.closest_crop(check.photo(work, int(order[at + 1])), images[at]) for at in range(4)]
    assert max(own) < check.MAX_CROP_DIFFERENCE < min(other)


def test_crops_lie_within_the_photo_and_are_the_same_each_time(peers: dict[str, ModuleType], work: Any) -> None:
    boxes, flips = peers["common"].crops(work.corpus)
    again, _ = peers["common"].crops(work.corpus)
    assert np.array_equal(boxes, again)
    assert (boxes >= 0).all()
    assert (boxes[:, 0] + boxes[:, 2] <= WIDTH).all()
    assert (boxes[:, 1] + boxes[:, 3] <= HEIGHT).all()
    assert 0 < flips.sum() < NUM_IMAGES


@pytest.mark.parametrize("limit", ["L2", "L3", "kernel"])
def test_the_bare_limits_decode_what_they_are_asked_for(peers: dict[str, ModuleType], work: Any, limit: str) -> None:
    try:
        library = limits_library()
    except UnavailableError as error:
        pytest.skip(str(error))
    work = work._replace(options={"limit": limit, "library": str(library)})
    images, numbers = next(peers["bare"].open_epochs(work)())
    assert peers["check"].check_batch(peers["bare"], work, images, numbers)["difference"] < 4


def test_a_ratio_is_taken_against_ours_before_and_after() -> None:
    results = loader.Results()
    runs = loader.ordered(["a", "b", "c", "d"])
    assert runs == ["cvdist", "a", "b", "c", "cvdist", "d", "cvdist"]
    rates = [1000.0, 500.0, None, 1100.0, 1200.0, 800.0, 2000.0]
    loader.add_ratios(loader.Table("500x375", "own", {}), runs, rates, results)
    assert results.ratios == {
        ("500x375", "own", "a"): [2.2],
        ("500x375", "own", "c"): [1.0],
        ("500x375", "own", "d"): [2.0],
    }


def test_the_table_says_what_is_met_missed_and_skipped() -> None:
    results = loader.Results()
    for name, rate, ratio in (("Grain", 700.0, 2.1), ("LitData", 700.0, 2.1)):
        key = ("500x375", "own", name)
        results.rates[key], results.ratios[key] = [rate], [ratio]
        results.seen[key] = {"difference": 1.0, "checked": "same crop", "num_lost": 3, "num_images": 61}
    results.skipped["500x375", "own", "DALI on CPU"] = "skipped: no room"
    text = "\n".join(results.markdown())
    assert "| Grain | 700 (700 to 700) | 2.10 | 2.10 to 2.10 | 2 | ok | same crop: 1.0; LOST 3 of 64 samples |" in text
    assert "| 2.2 | MISSED |" in text
    assert "| DALI on CPU | | | | | skipped: no room | |" in text


def test_every_row_of_the_issue_has_a_peer_and_a_list_of_requirements() -> None:
    folder = Path(loader.__file__).parent
    for row in loader.ROWS.values():
        assert (folder / "peers" / f"{row.module}.py").is_file()
        assert (
            row.environment == "main" or (loader.ROOT / "requirements" / "bench" / f"{row.environment}.txt").is_file()
        )
    assert set(loader.PYTHON_KERNEL) <= set(loader.ROWS)
