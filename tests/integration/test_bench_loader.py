"""`make bench-loader` in small: every light peer reads real photos, gives the crops asked for, and stands in the table or says why not."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.bench import loader

PHOTOS = loader.ROOT.parent / "shared" / "data" / "clothing"


@pytest.mark.timeout(900)
def test_light_peers_are_measured_or_say_why_not(tmp_path: Path) -> None:
    if not PHOTOS.is_dir():
        pytest.skip("no photos beside the project")
    settings = ["--peers", "light", "--corpus", "500x375", "--kernel", "own", "--rounds", "1", "--images", "512"]
    done = subprocess.run(
        [sys.executable, loader.__file__, *settings, "--out", str(tmp_path / "found.json")],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    rows = {row["loader"]: row for row in json.loads((tmp_path / "found.json").read_text())["rows"]}
    assert set(rows) == {name for name, row in loader.ROWS.items() if row.is_light}
    for name, row in rows.items():
        is_lossy, is_elsewhere = name.startswith("Petastorm"), loader.ROWS[name].environment != "main"
        may_skip = (is_elsewhere and str(row["skipped"]).startswith("skipped: ")) or "apt-get" in (row["skipped"] or "")
        assert row["images_per_cpu_s"] or may_skip or is_lossy, row
        if row["images_per_cpu_s"]:
            print(f"{name}: {row['images_per_cpu_s'][0]:,.0f} images per CPU-second, {row['last_run']['checked']}")
        else:
            print(f"{name}: {row['skipped']}")
    assert rows["cvdist"]["last_run"]["checked"] == "same crop"
