"""Wrong arguments, as people make them, are refused before anything is imported that takes seconds."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import pissa
from hub_cache import HubCache
from pissa.cli import BY_PURPOSE, COMMANDS, main
from pissa.cli.early_checks import check_exists
from pissa.cli.options import trl_parser
from pissa.cli.training_options import FORMATS, GROUPS, INITS, PRECISIONS, SHOWN, read
from pissa.model import pissa_model
from pissa.ops import formats

TABLE = "message,team\nWhere is it?,delivery\n"
FILES = {
    "tickets.csv": TABLE,
    "train.jsonl": json.dumps({"question": "1", "answer": "2"}) + "\n",
    "broken.jsonl": '{"question": "1", "answer": "2"}\n{"question": \n',
    "empty.csv": "",
    "notes.docx": "x",
    "full/model.bin": "x",
    "there.gguf": "x",
    "begun/run.yaml": "r: 4\n",
    "begun/checkpoint-2/adapter_config.json": '{"base_model_name_or_path": "org/model"}',
    "begun/checkpoint-2/trainer_state.json": "{}",
    "bad.yaml": "[",
    "list.yaml": "[1]",
    "name.yaml": "learnin_rate: 1",
    "value.yaml": "learning_rate: fast",
    "optim.yaml": "optim: adam",
    "pairs.jsonl": json.dumps({"prompt": "1", "chosen": "2", "rejected": "3"}) + "\n",
}
TRAIN = "finetune --model org/model --data train.jsonl"
WRONG = {
    "finetunes": "there is no such command; did you mean finetune?",
    "--verson": "there is no such command; did you mean --version?",
    "finetune": "--model is missing; needed: --model and --data",
    "finetune --model org/model": "--data is missing",
    "finetune --model org/model --data tikets.csv": "tikets.csv: no such file; did you mean tickets.csv",
    "finetune --model ./modle --data train.jsonl": "--model ./modle: no such file or folder",
    "finetune --model org/a/model.gguf --data train.jsonl": "--model org/a/model.gguf: no such file or folder",
    "finetune --model org/model --data tickets.csv": "tickets.csv:2: found the columns 'message', 'team'; allowed",
    "finetune --model org/model --data tickets.csv --columns question=mesage,answer=team": (
        "--columns names 'mesage'; allowed: 'message', 'team'"
    ),
    "finetune --model org/model --data tickets.csv --columns question": "argument --columns: got 'question'; allowed",
    "finetune --model org/model --data broken.jsonl": "broken.jsonl:2: not JSON",
    "finetune --model org/model --data empty.csv": "empty.csv: is empty",
    "finetune --model org/model --data notes.docx": "notes.docx: is of an unknown kind; allowed",
    f"{TRAIN} --eval-data nothing.csv": "nothing.csv: no such file",
    f"{TRAIN} --rank x": "--rank: got 'x'; allowed: a whole number above 0",
    f"{TRAIN} --rank 0": "--rank: got '0'; allowed: a whole number above 0",
    f"{TRAIN} --lr 0": "--lr: got '0'; allowed: a number above 0, or auto",
    f"{TRAIN} --minutes soon": "--minutes: got 'soon'; allowed: a number of minutes, 1 or more",
    f"{TRAIN} --epochs -1": "--epochs: got '-1'; allowed: a number above 0",
    f"{TRAIN} --quant nf5": "--quant: invalid choice: 'nf5' (choose from",
    f"{TRAIN} --held-out half": "--held-out: got 'half'; allowed: a whole number of at least 0",
    f"{TRAIN} --bath-size 4": "--bath-size: there is no such option; did you mean --batch-size?",
    f"{TRAIN} --weight-decai 0.1": "--weight-decai: there is no such option; did you mean --weight-decay?",
    f"{TRAIN} --optim adam": "--optim: invalid choice: 'adam' (choose from 'adamw_torch', ",
    f"{TRAIN} --lr_scheduler_type cosin": "invalid choice: 'cosin' (choose from 'linear', 'cosine', ",
    f"{TRAIN} --truncation-mode end": "--truncation-mode/--truncation_mode: invalid choice: 'end'",
    f"{TRAIN} --weight-decay=much": "got 'much'; allowed: a number",
    f"{TRAIN} --packing maybe": "--packing: got 'maybe'; allowed: true or false",
    f"{TRAIN} --save-total-limit 1.5": "got '1.5'; allowed: a whole number",
    f"{TRAIN} --config optim.yaml": "--config optim.yaml: argument --optim: invalid choice: 'adam'",
    "dpo --model org/model --data pairs.jsonl --beta high": "--beta: got 'high'; allowed: a number",
    f"{TRAIN} --calibrate": "--calibrate: nothing is quantised, so nothing is fitted to data; give --quant nf4 with it",
    f"{TRAIN} --held-out 1": "--held-out 1: the data has 1 example; allowed: fewer than that",
    "dpo --model org/model --data pairs.jsonl --held-out 2": "--held-out 2: the data has 1 example;",
    "finetune --model modle --data train.jsonl": "--model modle: no such file or folder; 'modle' is not a model: there",
    "chat ful --prompt Hello": "RUN ful: no such file or folder; did you mean full?; 'ful' is not a model",
    f"{TRAIN} --out full": "--out full is not empty (model.bin)",
    f"{TRAIN} --out begun": "go on with that run by --resume, or choose a new one",
    f"{TRAIN} --resume": "--resume: --out is missing",
    f"{TRAIN} --resume --out full": "--resume: full holds no run (run.yaml is missing)",
    "finetune --model ./full --data train.jsonl": "--model ./full: holds no model: there is neither config.json nor",
    "finetune --model begun --data train.jsonl": "`pissa merge begun/checkpoint-2 NEW_FOLDER`, then give NEW_FOLDER",
    f"{TRAIN} --config no.yaml": "--config no.yaml: [Errno 2] No such file",
    f"{TRAIN} --config bad.yaml": "--config bad.yaml: while parsing",
    f"{TRAIN} --config list.yaml": "--config list.yaml: holds no options; needed: a file of options by",
    f"{TRAIN} --config name.yaml": "name.yaml: learnin_rate: there is no such option; did you mean learning_rate?",
    f"{TRAIN} --config value.yaml": "--config value.yaml: argument --learning_rate",
    f"{TRAIN} --init pisa": "--init: got 'pisa'; allowed: pissa, lora, activations",
    f"{TRAIN} --dtype bf16": "--dtype: invalid choice: 'bf16'",
    f"{TRAIN} --lora_r 8": "--lora_r: there is no such option; did you mean --rank?",
    f"{TRAIN} -rank 8": "-rank: there is no such option; did you mean --rank?",
    "finetune org/model train.jsonl": "org/model: belongs to no option; needed: pissa finetune --model MODEL --data",
    "dpo --model org/model --data train.jsonl": "train.jsonl:1: found",
    "chat ./trained": "RUN ./trained: no such file or folder",
    "chat begun": "RUN begun: holds no model: there is neither config.json nor a GGUF file; there is no adapter either",
    "chat org/model --promt Hello": "--promt: there is no such option; did you mean --prompt?",
    "merge ./full": "the following arguments are required: OUT; --help lists the options",
    "export ./full out --to onnx": "--to: invalid choice: 'onnx'",
    "init org/model out --init pisa": "--init: got 'pisa'; allowed: pissa, lora, activations",
    "merge ./ful merged": "ADAPTER ful: no such file or folder; did you mean full?",
    "merge begun/checkpoint-2 merged --quant nf5": "--quant: invalid choice: 'nf5'",
    "merge full merged": "full holds no adapter: there is no adapter_config.json",
    "merge begun/checkpoint-2 merged --base ./base": "--base ./base: no such file or folder",
    "merge begun/checkpoint-2 merged --data tickets.csv": "tickets.csv:2: found the columns 'message', 'team'; allowed",
    "export begun/checkpoint-2 out --to gguf-model --calibration no.csv": "no.csv: no such file",
    "export begun/checkpoint-2 out --to vllm --check": "--check: got --to vllm; it compares with llama.cpp",
    "convert train.jsonl lora": "train.jsonl is a file; needed: an adapter folder",
    "convert begun/checkpoint-2 full": "full is not empty (model.bin)",
    "predict ./ful --data tickets.csv --out out.csv": "RUN ./ful: no such file or folder; did you mean full?",
    "convert ./ful lora": "ADAPTER ful: no such file or folder",
    "init org/model out --calibration train.jsonl": "--calibration: needs --quant",
    "init org/model out --init activations": "--init activations: got no --calibration",
    "init full out": "SRC full: holds no model: there is neither config.json nor a GGUF file",
    "init begun out": "SRC begun: it is the folder of a run, not of a model; to continue it: `pissa finetune --config",
    "init org/model full": "full is not empty (model.bin) and nothing is overwritten",
    "merge begun/checkpoint-2 full": "full is not empty (model.bin) and nothing is overwritten",
    "export begun/checkpoint-2 full --to bnb4": "full is not empty (model.bin) and nothing is overwritten",
    "export begun/checkpoint-2 full --to vllm": "full is not empty (model.bin) and nothing is overwritten",
    "export begun/checkpoint-2 there.gguf --to gguf": "there.gguf exists already and nothing is overwritten",
    "export begun/checkpoint-2 there.gguf --to gguf-model": "there.gguf exists already and nothing is overwritten",
    "init ./model out": "SRC ./model: no such file or folder",
}
RUNS = """
import contextlib, io, json, shlex, sys
from pissa.cli import main
for line in json.load(sys.stdin):
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
        code = main(shlex.split(line))
    heavy = {"torch", "transformers", "trl", "peft", "datasets", "numpy"} & {*sys.modules}
    print(json.dumps([line, code, said.getvalue(), sorted(heavy)]))
"""


def test_wrong_arguments_are_refused_before_the_packages_of_a_training_are_imported(tmp_path: Path) -> None:
    for name, text in FILES.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    lines = json.dumps([*WRONG])
    run = [sys.executable, "-c", RUNS]
    done = subprocess.run(run, input=lines, cwd=tmp_path, capture_output=True, text=True, check=True)
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert [line for line, *_ in answers] == [*WRONG]
    for line, code, said, heavy in answers:
        assert WRONG[line] in said, line
        assert (code, heavy) == (2, []), line
        assert len(said.splitlines()) == 1, line
    assert {path.name for path in tmp_path.iterdir()} == {Path(name).parts[0] for name in FILES}


def test_a_plain_name_may_be_a_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "plain").mkdir()
    HubCache(tmp_path / "cache", monkeypatch).put("plain", tmp_path / "plain", branch="other")
    monkeypatch.chdir(tmp_path / "cache")
    check_exists("--model", "plain")


def test_the_commands_fit_one_screen(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 35
    assert [line for line in lines if line.endswith(":")] == [*map("{}:".format, BY_PURPOSE), "options:"]
    assert [line.split()[0] for line in lines if line[:2].isspace() and line[2:3].isalpha()] == [*COMMANDS]


@pytest.mark.parametrize("command", ["finetune", "dpo"])
def test_the_help_fits_one_screen(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    assert 24 <= len(lines) <= 45
    assert max(map(len, lines)) <= 100
    shown = [line.split()[0] for line in lines if line.startswith("  --")]
    assert shown == ["--help", "--help-all", *(option.flags[0] for group in GROUPS.values() for option in group)]


@pytest.mark.parametrize("trainer", ["SFT", "DPO"])
def test_every_option_that_is_shown_is_one_with_the_same_spellings(trainer: str) -> None:
    known = trl_parser(trainer)._option_string_actions
    missing = [flag for option in SHOWN.values() for flag in option.flags if flag not in known]
    assert missing == []
    assert {name: known[option.flags[0]].dest for name, option in SHOWN.items()} == {name: name for name in SHOWN}


VALUES = {"int": ["-1"], "float": ["-1", "1e-5", "inf"], "string_to_bool": ["True", "f", "YES", "n", "1", "0"]}


@pytest.mark.parametrize(("command", "trainer"), [("finetune", "SFT"), ("dpo", "DPO")])
def test_every_option_of_trl_takes_its_values(command: str, trainer: str) -> None:
    given = []
    for action in trl_parser(trainer)._actions:
        if action.dest not in (*SHOWN, "help"):
            values = action.choices or VALUES.get(getattr(action.type, "__name__", ""), ["1"])
            given += [f"{flag}={value}" for flag in action.option_strings for value in values]
            given += action.option_strings if action.nargs in (0, "?") else []
    assert len(given) > 500
    assert read(command, given) is not None


def test_the_names_are_those_of_the_packages_that_are_not_imported() -> None:
    assert tuple(formats.FORMATS) == FORMATS
    assert pissa_model.PRECISIONS == PRECISIONS
    # Other tests of this process may have added methods of their own.
    assert tuple(name for name, method in pissa.INIT_METHODS.items() if not method.is_given)[: len(INITS)] == INITS


def test_the_rate_of_dpo_that_the_help_shows_is_trls() -> None:
    assert SHOWN["learning_rate"].help_of("dpo").endswith("(default: 1e-6)")
    assert trl_parser("DPO").get_default("learning_rate") == 1e-6
