"""Eight kills of prepare on a real HDFS and a real Spark, one of each scenario; tests/faults/prepare_kills.py does any number."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from cluster.hadoop import SetupError, find_java, hadoop_classpath
from cluster.local_spark import spark_home
from tests.faults.prepare_kills import SCENARIOS, scenario_of

PROGRAM = Path(__file__).with_name("prepare_kills.py")
KILLS = 8


def test_each_deal_of_eight_kills_holds_every_scenario() -> None:
    assert len(SCENARIOS) == KILLS
    deals = [[scenario_of(8 * deal + index, 1) for index in range(1, 9)] for deal in range(5)]
    assert {tuple(sorted(deal)) for deal in deals} == {tuple(sorted(SCENARIOS))}
    assert len({tuple(deal) for deal in deals}) > 1, "the order differs"


@pytest.mark.timeout(900)
def test_whatever_is_killed_reruns_end_with_the_same_data_set() -> None:
    try:
        find_java()
        hadoop_classpath()
        spark_home()
    except SetupError as error:
        pytest.skip(f"no HDFS or Spark: {error}")
    command = [sys.executable, str(PROGRAM), "--kills", str(KILLS), "--seed", "1"]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    print(done.stdout)
    assert done.stdout.splitlines()[-1] == (
        f"{KILLS} of {KILLS} runs end with the same content hash; 0 lost, 0 doubled"
    )
    assert done.returncode == 0
