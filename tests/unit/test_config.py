"""Settings: what is refused says what, why and how to fix it; epochs become steps once."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from cvdist.arguments import parse
from cvdist.config import PrepareConfig, Resolved, TrainConfig, dump, from_dict, resolve
from cvdist.errors import ConfigError
from tests.made_splits import made_manifest

TRAIN = {"data": "file:///d", "model": "m", "epochs": "2", "global_batch": "8", "run": "file:///r"}
PREPARE = ["file:///source", "file:///target"]


def train(*extra: str, **changes: str | None) -> TrainConfig:
    """Parses a command line of cvdist train."""
    given = {key: value for key, value in {**TRAIN, **changes}.items() if value is not None}
    return parse(TrainConfig, [*(f"--{key}={value}" for key, value in given.items()), *extra], prog="train")


def prepare(*extra: str) -> PrepareConfig:
    """Parses a command line of jobs/prepare.py."""
    return parse(PrepareConfig, [*PREPARE, *extra], prog="prepare.py", positional=("source_url", "target_url"))


def refusal(function: Any, *args: Any, **changes: Any) -> str:
    """Returns the message with which settings are refused: one line of what was found, what was expected, and the fix."""
    with pytest.raises(ConfigError) as caught:
        function(*args, **changes)
    message = str(caught.value)
    assert "\n" not in message
    return message


def assert_says(message: str, name: str, value: str) -> None:
    """Checks the three parts of a message."""
    found, expected, *fix = message.split("; ")
    assert found.startswith(f"{name}: ")
    assert value in found
    assert expected.startswith("expected ")
    assert len(fix) == 1
    assert fix[0]


OUT_OF_RANGE = {
    "epochs": ["0", "-1"],
    "global_batch": ["0", "-8"],
    "image_size": ["7", "8193"],
    "seed": ["-1", "4294967296"],
    "max_steps": ["-1"],
    "log_every_steps": ["0"],
    "check_sync_every_steps": ["-1"],
    "loader.threads": ["0", "1025"],
    "loader.prefetch_batches": ["0"],
    "loader.readahead_bytes": ["-1"],
    "loader.num_lanes": ["0"],
    "loader.shuffle_bytes": ["-1", "2199023255552"],
    "dropout": ["-0.1", "1"],
    "loader.member": ["-1", "2000000"],
    "loader.cache_bytes": ["0", "2251799813685248"],
    "augment.crop_scale_min": ["0", "1.5"],
    "augment.crop_ratio_max": ["0.5"],
    "augment.rotation_deg": ["-1", "181"],
    "augment.shift": ["-0.1", "1"],
    "augment.shear": ["2"],
    "augment.zoom": ["1.0"],
    "augment.brightness": ["-1"],
    "augment.contrast": ["1"],
    "augment.saturation": ["1"],
    "optim.lr": ["-0.1", "1000"],
    "optim.base_lr": ["-1"],
    "optim.warmup_epochs": ["-1"],
    "optim.momentum": ["1.1"],
    "optim.weight_decay": ["-1"],
    "optim.clip_norm": ["-1"],
    "evaluate.every_epochs": ["-1"],
    "checkpoint.keep": ["1"],
    "checkpoint.every_epochs": ["0"],
    "checkpoint.every_steps": ["-1"],
}
PREPARE_OUT_OF_RANGE = {
    "image_size": ["7", "8193"],
    "quality": ["0", "101"],
    "shard_bytes": ["1"],
    "row_group_bytes": ["1", "100000000"],
    "seed": ["-1"],
    "max_bad_fraction": ["-0.1", "1.1"],
    "limit_per_class": ["0"],
    "max_bytes": ["0", "2000000000"],
    "max_pixels": ["0", "2000000000"],
    "max_aspect": ["0", "100000"],
    "decode_timeout_s": ["0", "4000"],
    "decode_memory_bytes": ["1000"],
    "read_threads": ["0", "257"],
}
WRONG_TYPE = {
    "epochs": ["two", "2.5", "[2]", ""],
    "global_batch": ["8.5"],
    "precision": ["fp16"],
    "resume": ["maybe"],
    "loader.threads": ["many"],
    "loader.remainder": ["keep"],
    "augment.flip": ["2"],
    "augment.zoom": ["nan"],
    "optim.name": ["adm"],
    "optim.lr": ["fast", "inf"],
    "optim.scaling": ["cubic"],
    "optim.schedule": ["cosin"],
}


def nested(name: str, value: Any) -> dict[str, Any]:
    """Returns {"a": {"b": value}} for the name a.b."""
    for part in reversed(name.split(".")):
        value = {part: value}
    return value  # type: ignore[no-any-return]


@pytest.mark.parametrize("name, value", [(name, value) for name, values in OUT_OF_RANGE.items() for value in values])
def test_a_number_out_of_range_is_named_with_the_range_and_how_to_fix_it(name: str, value: str) -> None:
    given = {**TRAIN, "epochs": 2, "global_batch": 8, **nested(name, yaml.safe_load(value))}
    assert_says(refusal(from_dict, TrainConfig, given, "config.json"), name, value)


@pytest.mark.parametrize("name, value", [(name, values[0]) for name, values in list(OUT_OF_RANGE.items())[::5]])
def test_a_number_out_of_range_is_refused_on_the_command_line(name: str, value: str) -> None:
    assert_says(refusal(train, f"--{name}={value}"), name, value)


@pytest.mark.parametrize(
    "name, value", [(name, value) for name, values in PREPARE_OUT_OF_RANGE.items() for value in values]
)
def test_a_number_of_prepare_out_of_range_is_named_with_the_range_and_how_to_fix_it(name: str, value: str) -> None:
    given = {"source_url": "file:///a", "target_url": "file:///b", name: yaml.safe_load(value)}
    assert_says(refusal(from_dict, PrepareConfig, given, "config.json"), name, value)


@pytest.mark.parametrize("name, value", [(name, value) for name, values in WRONG_TYPE.items() for value in values])
def test_a_value_of_the_wrong_kind_is_named_with_the_kind_and_how_to_fix_it(
    name: str, value: str, tmp_path: Path
) -> None:
    assert_says(refusal(train, f"--{name}={value}"), name, value)
    path = tmp_path / "settings.yaml"
    path.write_text(yaml.safe_dump(nested(name, yaml.safe_load(value) if value else "")))
    given = {name: None} if name in TRAIN else {}
    assert_says(refusal(train, f"--config={path}", **given), name, value)


@pytest.mark.parametrize("kind", [TrainConfig, PrepareConfig])
def test_no_number_among_the_settings_is_left_unchecked(kind: type) -> None:
    def numbers(of: Any, prefix: str = "") -> set[str]:
        found = set()
        for field in dataclasses.fields(of):
            group: Any = field.default_factory
            if dataclasses.is_dataclass(group):
                found |= numbers(group, f"{prefix}{field.name}.")
            elif {"int", "float"} & set(str(field.type).split(" | ")):
                found.add(prefix + field.name)
        return found

    checked = set(OUT_OF_RANGE if kind is TrainConfig else PREPARE_OUT_OF_RANGE)
    assert numbers(kind) - checked == set()


@pytest.mark.parametrize(
    "shares",
    [
        "train=0.8,val=0.1",
        "train=1.1",
        "train=0.8.1,val=0.1",
        "foo=1",
        "train",
        "",
        "train=0.8,,val=0.2",
        "train=0.5,train=0.5",
        "val=0.1,validation=0.9",
        "train=-1,val=2",
        "train=0.8;val=0.2",
        "train=1,",
    ],
)
def test_shares_that_are_no_division_are_refused(shares: str) -> None:
    assert_says(refusal(prepare, f"--split={shares}"), "split", repr(shares))


def test_shares_are_read_under_one_name_for_each_split() -> None:
    assert prepare("--split=train=.7,validation=0.3").split_shares() == {"train": 0.7, "val": 0.3}
    assert prepare("--split=train=1,test=0").split_shares() == {"train": 1.0}


@pytest.mark.parametrize(
    "argument, found, nearest",
    [
        ("--epoch=3", "epoch", "epochs"),
        ("--batch_size=3", "batch_size", None),
        ("--globl_batch=3", "globl_batch", "global_batch"),
        ("--optim.lrr=3", "optim.lrr", "optim.lr"),
        ("--optm.lr=3", "optm.lr", "optim.lr"),
        ("--loader.thread=3", "loader.thread", "loader.threads"),
        ("--agument.flip", "agument.flip", "augment.flip"),
        ("--zzzzzz=1", "zzzzzz", None),
    ],
)
def test_an_unknown_setting_is_refused_and_the_nearest_named(argument: str, found: str, nearest: str | None) -> None:
    message = refusal(train, argument)
    assert message.startswith(f"{found}: no such setting; ")
    assert (
        message.endswith(f"did you mean {nearest}?" if nearest else "run with --help for the list") or nearest is None
    )


@pytest.mark.parametrize(
    "text, found, nearest",
    [
        ("epoch: 3", "epoch", "epochs"),
        ("optim: {lrr: 3}", "optim.lrr", "optim.lr"),
        ("optimm: {lr: 3}", "optimm.lr", "optim.lr"),
        ("augment: {flip: true, zooom: 0.1}", "augment.zooom", "augment.zoom"),
        ("checkpoint: {kep: 3}", "checkpoint.kep", "checkpoint.keep"),
    ],
)
def test_an_unknown_setting_in_yaml_is_refused_and_the_nearest_named(
    text: str, found: str, nearest: str, tmp_path: Path
) -> None:
    path = tmp_path / "settings.yaml"
    path.write_text(text)
    assert refusal(train, f"--config={path}") == f"{found}: no such setting; did you mean {nearest}?"


@pytest.mark.parametrize("text", ["optim: 3", "optim: null", "loader: 0.5", "augment: [flip]"])
def test_a_value_in_the_place_of_a_group_is_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "settings.yaml"
    path.write_text(text)
    group = text.split(":")[0]
    message = refusal(train, f"--config={path}")
    assert message.startswith(f"{group}: ")
    assert f"expected settings such as {group}." in message


@pytest.mark.parametrize("text", ["", "- 1", "just words", "a: [", "epochs: 3\nepochs 4"])
def test_a_file_that_is_no_yaml_mapping_is_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "settings.yaml"
    path.write_text(text)
    message = refusal(train, f"--config={path}")
    assert "YAML file of NAME: VALUE lines" in message


def test_a_missing_file_of_settings_is_named(tmp_path: Path) -> None:
    assert f"{tmp_path}/absent.yaml" in refusal(train, f"--config={tmp_path}/absent.yaml")


def test_nothing_named_in_yaml_is_imported_or_run(tmp_path: Path) -> None:
    path, proof = tmp_path / "settings.yaml", tmp_path / "proof"
    for group in ("optim:", "loader:"):
        path.write_text(f"{group}\n  class_path: subprocess.Popen\n  init_args:\n    args: [touch, {proof}]\n")
        assert refusal(train, f"--config={path}").startswith(
            "class_path: 'subprocess.Popen' names code; expected settings"
        )
    assert not proof.exists()


@pytest.mark.parametrize(
    "function, args, message",
    [
        (
            lambda *args: parse(TrainConfig, list(args), prog="train"),
            [],
            "add --data VALUE --model VALUE --epochs VALUE",
        ),
        (
            lambda *args: parse(TrainConfig, list(args), prog="train"),
            ["--data=x", "--run=y"],
            "not given: model, epochs, global_batch",
        ),
        (train, ["stray"], "stray: not expected here"),
        (train, ["--epochs"], "epochs: has no value; expected one; add --epochs VALUE"),
        (
            lambda *args: parse(PrepareConfig, list(args), prog="p", positional=("source_url", "target_url")),
            ["a"],
            "add TARGET_URL",
        ),
    ],
)
def test_an_incomplete_command_line_says_what_to_add(function: Any, args: list[str], message: str) -> None:
    assert message in refusal(function, *args)


def test_two_learning_rates_at_once_are_refused() -> None:
    message = refusal(train, "--optim.lr=1", "--optim.base_lr=0.1")
    assert message.startswith("optim: lr 1.0 and base_lr 0.1 are both set; expected one of them; drop base_lr")


def test_a_bare_switch_means_true() -> None:
    assert train("--resume").resume
    assert train("--resume", "--augment.flip", "--seed=3").augment.flip
    assert train("--augment.flip", "--resume").resume
    assert not train("--resume", "false").resume
    assert not train("--resume=false").resume
    assert train("--resume", "true").resume
    assert not train().resume


def test_a_switch_takes_no_url_for_its_value() -> None:
    @dataclasses.dataclass(frozen=True)
    class Arguments:
        """A URL and a switch."""

        run: str
        json: bool = False

    for argv in (["--json", "hdfs://host:1/run"], ["hdfs://host:1/run", "--json"]):
        assert parse(Arguments, argv, prog="evaluate", positional=("run",)) == Arguments("hdfs://host:1/run", True)


def test_options_win_over_the_file_whichever_comes_first_in_nesting(tmp_path: Path) -> None:
    path = tmp_path / "settings.yaml"
    path.write_text("epochs: 7\nseed: 5\noptim: {name: adam, lr: 1e-3}\naugment:\n  flip: true\nloader.threads: 3\n")
    config = train(f"--config={path}", "--optim.lr=0.5", epochs=None)
    assert (config.epochs, config.seed, config.optim.name, config.optim.lr) == (7, 5, "adam", 0.5)
    assert (config.augment.flip, config.loader.threads) == (True, 3)


def test_printed_settings_can_be_read_again(tmp_path: Path) -> None:
    extra = ["--optim.base_lr=0.2", "--augment.flip", "--loader.remainder=drop", "--image_size=64"]
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), pytest.raises(SystemExit) as leaving:
        train(*extra, "--print_config")
    assert leaving.value.code == 0
    path = tmp_path / "settings.yaml"
    path.write_text(printed.getvalue())
    assert parse(TrainConfig, [f"--config={path}"], prog="train") == train(*extra)


@pytest.mark.parametrize(
    "config", [train("--augment.flip", "--optim.lr=0.1", "--image_size=64"), prepare("--codec=raw")]
)
def test_dumped_settings_come_back_equal_through_json(config: TrainConfig | PrepareConfig) -> None:
    assert from_dict(type(config), json.loads(json.dumps(dump(config))), "run/config.json") == config


def test_settings_of_another_version_are_refused() -> None:
    values = dump(train())
    for change in ({"colour": 1}, {"optim": {**values["optim"], "beta": 1}}, {"colours": {"red": 1}}):
        assert "run/config.json does not fit this version" in refusal(
            lambda c=change: from_dict(TrainConfig, {**values, **c}, "run/config.json")
        )
    del values["model"]
    assert "model" in refusal(lambda: from_dict(TrainConfig, values, "run/config.json"))


def resolved(world_size: int = 1, splits: dict[str, int] | None = None, **changes: Any) -> Resolved:
    """Resolves a run, by default on a data set of 100 training samples; optim__lr is optim.lr."""
    values: dict[str, Any] = {**TRAIN, "epochs": 2, "global_batch": 8}
    for name, value in changes.items():
        group, _, member = name.partition("__")
        values[group] = {**values.get(group, {}), member: value} if member else value
    config = from_dict(TrainConfig, values, "test")
    return resolve(config, made_manifest(splits or {"train": 100, "val": 10}), world_size)


@pytest.mark.parametrize(
    "batch, world_size, fix",
    [(10, 3, "use 9 or 12"), (1000, 64, "use 960 or 1024"), (3, 4, "use 4"), (7, 2, "use 6 or 8")],
)
def test_a_batch_that_does_not_divide_names_the_nearest_that_do(batch: int, world_size: int, fix: str) -> None:
    message = refusal(resolved, world_size, global_batch=batch)
    assert message == f"global_batch: {batch} does not divide over {world_size} ranks; {fix}"


def test_fewer_samples_than_ranks_are_refused() -> None:
    message = refusal(resolved, 101, global_batch=101)
    assert message.startswith("data: split 'train' of file:///d holds 100 samples for 101 ranks; expected at least one")
    assert message.endswith("use at most -np 100")
    assert resolved(100, global_batch=100).per_rank_batch == 1


def test_padding_and_dropping_are_counted() -> None:
    padded = resolved(2, global_batch=16, epochs=3)
    assert (padded.steps_per_epoch, padded.total_steps, padded.per_rank_batch) == (7, 21, 8)
    assert (padded.padded_per_epoch, padded.dropped_per_epoch) == (12, 0)
    dropped = resolved(2, global_batch=16, loader__remainder="drop")
    assert (dropped.steps_per_epoch, dropped.padded_per_epoch, dropped.dropped_per_epoch) == (6, 0, 4)
    even = resolved(global_batch=20)
    assert (even.steps_per_epoch, even.padded_per_epoch, even.dropped_per_epoch) == (5, 0, 0)


def test_dropping_everything_is_refused() -> None:
    message = refusal(resolved, global_batch=101, loader__remainder="drop")
    assert message.startswith("global_batch: 101 is more than the 100 samples of split 'train' and loader.remainder is")
    assert resolved(global_batch=101).padded_per_epoch == 1


def test_the_warm_up_is_counted_in_steps() -> None:
    assert resolved(global_batch=10, epochs=40).warmup_steps == 20  # 5 % of 400
    assert resolved(global_batch=10, epochs=40, optim__warmup_epochs=1.5).warmup_steps == 15
    assert resolved(global_batch=10, epochs=2, optim__warmup_epochs=9).warmup_steps == 20
    assert resolved(global_batch=10, epochs=40, optim__warmup_epochs=0).warmup_steps == 0


@pytest.mark.parametrize(
    "optim, batch, lr",
    [
        ({"base_lr": 0.1}, 1024, 0.4),
        ({"base_lr": 0.1, "scaling": "sqrt"}, 1024, 0.2),
        ({"base_lr": 0.1, "scaling": "none"}, 1024, 0.1),
        ({"lr": 0.3}, 1024, 0.3),
        ({}, 512, 0.2),
        ({"name": "adam"}, 1024, 0.001),
        ({"name": "adam", "base_lr": 0.001}, 64, 0.00025),
    ],
)
def test_the_learning_rate_is_scaled_to_the_global_batch_once(optim: dict[str, Any], batch: int, lr: float) -> None:
    assert resolved(global_batch=batch, optim=optim).lr == pytest.approx(lr)


def test_the_input_size_is_the_data_set_s_unless_given() -> None:
    plan = resolved()
    assert (plan.image_size, plan.channels, plan.num_classes, plan.num_samples) == (32, 3, 2, 100)
    assert resolved(image_size=64).image_size == 64


def test_the_split_to_evaluate_is_val_where_there_is_one() -> None:
    assert resolved().eval_split == "val"
    assert resolved(splits={"train": 100, "test": 10}).eval_split is None
    assert resolved(evaluate__split="validation").eval_split == "val"
    assert resolved(evaluate__every_epochs=0).eval_split is None
    assert resolved(train_split="validation").num_samples == 10


@pytest.mark.parametrize("name", ["train_split", "evaluate.split"])
def test_a_split_that_is_not_there_is_named_with_those_that_are(name: str) -> None:
    message = refusal(resolved, **{name.replace(".", "__"): "holdout"})
    assert message.startswith(f"{name}: 'holdout' is not in the data set file:///d; expected one of train, val")


def test_help_takes_less_than_half_a_second_and_imports_nothing_heavy() -> None:
    # CPU time, because a loaded machine must not fail this; the best of three.
    command = [sys.executable, "-X", "importtime", "-m", "cvdist.train", "--help"]
    cpu_s = []
    for _ in range(3):
        with subprocess.Popen(command[:1] + command[3:], stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            text = process.stdout.read().decode()
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
        assert process.returncode == 0
        assert "--optim.lr" in text
        cpu_s.append(usage.ru_utime + usage.ru_stime)
    assert min(cpu_s) < 0.5
    imports = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    modules = {
        line.split("|")[-1].strip().split(".")[0] for line in imports.splitlines() if line.startswith("import time:")
    }
    assert "jsonargparse" in modules
    assert modules.isdisjoint({"tensorflow", "keras", "horovod", "pyspark", "cv2", "pyarrow", "numpy", "petastorm"})
