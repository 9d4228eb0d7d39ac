"""Which files of a data set's repository make a split: by their names as the Hugging Face hub does, or by its card."""

from __future__ import annotations

import re
import time
from pathlib import Path

import pytest
import yaml

from dora_fx.app.data.data_source import locate_data
from dora_fx.app.data.dataset_splits import split_files
from dora_fx.app.errors import UserError
from dora_fx.app.options import HubName
from dora_fx.app.options.hub_name import absolute_or_on_hub
from dora_fx.app.runs import Display
from tests.tables import every_case

SUFFIXES = (".txt", ".jsonl", ".json", ".csv", ".parquet")
PUSHED = [f"data/{split}-00000-of-00001.parquet" for split in ("test_sft", "train_gen", "train_sft")]
SHARDS = [f"data/train-{number:05}-of-00003-0a1b.parquet" for number in range(3)]
SUBSETS = [f"{subset}/{split}-00000-of-00001.parquet" for subset in ("main", "socratic") for split in ("train", "test")]
GLOBS = [
    {"config_name": "main", "data_files": [{"split": split, "path": f"main/{split}-*"} for split in ("train", "test")]},
    {"config_name": "socratic", "data_files": [{"split": "train", "path": ["socratic/train-*"]}]},
]


@every_case(
    "names, part, configs, expected",
    [
        (["train.jsonl", "test.jsonl", "README.md", "LICENSE.txt"], None, None, ["train.jsonl"]),
        (["train.jsonl", "test.jsonl"], "test", None, ["test.jsonl"]),
        (["train.jsonl", "val.jsonl"], "validation", None, ["val.jsonl"]),
        (["a.csv", "b.csv"], None, None, ["a.csv", "b.csv"]),
        (["notes.txt"], "train", None, ["notes.txt"]),
        (["my-training-set.json", "dataset_infos.json", ".hidden.json"], None, None, ["my-training-set.json"]),
        # `dev` and `train` are words of a name, and not parts of words.
        (["trainer_devices.jsonl"], None, None, ["trainer_devices.jsonl"]),
        (["train/a.csv", "train/b.csv", "test/a.csv"], "train", None, ["train/a.csv", "train/b.csv"]),
        (SHARDS, None, None, SHARDS),
        ([*SHARDS, "data/test-00000-of-00001.parquet"], "train", None, SHARDS),
        (PUSHED, "train_sft", None, [PUSHED[2]]),
        (PUSHED, PUSHED[1], None, [PUSHED[1]]),
        # As the hub's own conversion to Parquet lies on its branch.
        (["default/train/0000.parquet", "default/train/0001.parquet"], None, None, 2),
        (SUBSETS, "main/train", None, [SUBSETS[0]]),
        (SUBSETS, "socratic", GLOBS, [SUBSETS[2]]),
        (SUBSETS, "main/test", GLOBS, [SUBSETS[1]]),
        # One subset alone has it.
        (SUBSETS, "test", GLOBS, [SUBSETS[1]]),
        (SUBSETS, None, [GLOBS[0] | {"default": True}, GLOBS[1]], [SUBSETS[0]]),
        (["en/a.jsonl", "en/b.jsonl", "fr/a.jsonl"], None, [{"data_files": "en/*.jsonl"}], 2),
        (
            ["en/x/a.jsonl", "b.jsonl"],
            None,
            [{"data_files": {"train": "**/a.jsonl", "other": "b.*"}}],
            ["en/x/a.jsonl"],
        ),
        (["a1.csv", "a2.csv", "ab.csv"], None, [{"data_files": ["a[0-9].csv"]}], ["a1.csv", "a2.csv"]),
        (
            ["en/train.csv", "fr/train.csv"],
            "fr",
            [{"config_name": x, "data_dir": x} for x in ("en", "fr")],
            ["fr/train.csv"],
        ),
        # Patterns that have files in common.
        (["a.csv", "b.csv"], None, [{"data_files": ["*.csv", "a*"]}], ["a.csv", "b.csv"]),
        (["en/a.csv", "fr/a.csv"], None, [{"data_dir": "fr", "data_files": "a.csv"}], ["fr/a.csv"]),
        # What a card says that is no list of subsets says nothing.
        (["train.csv"], None, "nothing", ["train.csv"]),
    ],
)
def test_a_split_is_made_of_its_files(
    names: list[str], part: str | None, configs: object, expected: list[str] | int
) -> None:
    found = split_files(names, part, configs, SUFFIXES)
    assert found == (names[:expected] if isinstance(expected, int) else expected)


@every_case(
    "names, part, configs, message",
    [
        (["model.safetensors", "a.py"], None, None, r"no data file, expected .*\.parquet; there are a.py, model.safe"),
        (["train.tar.gz"], None, None, "found no data file"),
        (["image.png", "train.csv"], "image.png", None, "found the file image.png, expected one of the kinds .txt,"),
        (["train.csv"], "test", None, "found no part 'test' with files, expected one of :train"),
        (PUSHED, None, None, "several parts and none named, expected one of :test_sft, :train_gen, :train_sft"),
        (SUBSETS, "train", None, "split 'train' in several subsets, expected one of :main/test, :main/train, :soc"),
        (SUBSETS, None, GLOBS, "several parts and none named, expected one of :main/train"),
        (
            ["en/a.jsonl", "fr/a.jsonl"],
            None,
            None,
            "several parts and none named, expected one of :en/train, :fr/train",
        ),
        (
            ["train.jsonl", "train.parquet"],
            None,
            None,
            "found train.jsonl and train.parquet, which may be the same data",
        ),
        (SHARDS[:2], None, None, "found 2 of the 3 files of data/train, expected number 2 too"),
        (SHARDS[1:], None, None, "expected number 0 too"),
        ([*SHARDS, "data/train-00000-of-00001.parquet"], None, None, "data/train in sets of 1 and of 3, which may be"),
        (["a.csv"], None, [{"data_files": "b.csv"}], "README.md: found no file that its configs name; name .* :a.csv"),
        (["a.csv"], None, ["b.csv"], "README.md: found 'b.csv' in configs"),
        (["a" * 200 + ".csv"], None, [{"data_files": "**a" * 30}], "expected at most 6 wildcards"),
    ],
)
def test_what_is_no_split_is_named(names: list[str], part: str | None, configs: object, message: str) -> None:
    start = time.monotonic()
    with pytest.raises(ValueError, match=message):
        split_files(names, part, configs, SUFFIXES)
    assert time.monotonic() - start < 5


def test_the_card_of_a_folder_is_read(tmp_path: Path) -> None:
    for name in ("one.csv", "two.csv"):
        (tmp_path / name).write_text("text\na\n")
    head = {
        "configs": [{"config_name": "default", "data_files": [{"split": "train", "path": "two.csv"}]}],
        "tags": ["a"],
    }
    card = tmp_path / "README.md"
    for text in (
        yaml.safe_dump(head),
        "license: mit\nconfigs:\n- config_name: default\n  data_files: two.csv\ntags: []\n",
    ):
        card.write_text(f"---\n{text}---\n# Data\nconfigs:\n- data_files: one.csv\n")
        assert locate_data(f"{tmp_path}:train", Display(quiet=True)) == [tmp_path / "two.csv"]
    for text, message in (
        ("configs: [\n", r"README.md: cannot be read \(ParserError"),
        ("configs: &a\n- *a\n", "README.md, configs: found a value given by an alias"),
    ):
        card.write_text(f"---\n{text}---\n")
        with pytest.raises(UserError, match=message):
            locate_data(f"{tmp_path}:train", Display(quiet=True))
        # A file needs no card.
        assert locate_data(f"{tmp_path}:one.csv", Display(quiet=True)) == [tmp_path / "one.csv"]


@every_case(
    "text, expected",
    [
        ("org/name", HubName("org/name")),
        ("HuggingFaceTB/SmolLM2-1.7B-Instruct", HubName("HuggingFaceTB/SmolLM2-1.7B-Instruct")),
        ("org/name@v1.0", HubName("org/name", "v1.0")),
        ("org/name@refs/pr/1:main/train", HubName("org/name", "refs/pr/1", "main/train")),
        ("org/name:data/a b.jsonl", HubName("org/name", None, "data/a b.jsonl")),
        ("name", None),
        ("smollm2", None),
        ("a/b/c", None),
        ("./org/name", None),
        ("../name", None),
        ("/org/name", None),
        ("~/name", None),
        ("org/name/", None),
        ("org/", None),
        ("data/train.jsonl", None),
        ("models/a.gguf", None),
        ("https://huggingface.co/org/name", None),
        ("org/name:", None),
        ("org/name@", None),
        ("org/name@-x", None),
        ("", None),
    ],
)
def test_names_on_the_hub_are_told_from_paths(text: str, expected: HubName | None) -> None:
    found = HubName.parse_maybe(text)
    assert found == expected and (found is None or str(found) == text)


def test_a_file_or_folder_wins_over_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("org/name", "org/name@v1:train"):
        assert absolute_or_on_hub(name) == name
    (tmp_path / "org" / "name").mkdir(parents=True)
    (tmp_path / "org" / "a:b").write_text("")
    for name in ("org/name", "org/name:train", "org/a:b"):
        assert absolute_or_on_hub(name) == str(tmp_path / name)
    # Another state than the folder may have.
    assert absolute_or_on_hub("org/name@v1") == "org/name@v1"
    assert re.fullmatch(r".*/org/name", absolute_or_on_hub("org/name"))
