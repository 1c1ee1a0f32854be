"""`pissa finetune`, with TRL's SFTTrainer, and `pissa dpo`, with its DPOTrainer: wrap a model, check it, train it with
TRL and save the adapter."""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import json
import math
import os
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import torch
import trl
from accelerate import DistributedType
from transformers import AutoProcessor
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import ProgressCallback, TrainerState
from transformers.trainer_utils import IntervalStrategy
from trl.trainer.utils import create_model_from_path

import pissa
from pissa.adapters.pissa_layout import AdapterRecord
from pissa.cli.answers import HeldOutAnswers
from pissa.cli.card import write_card
from pissa.cli.cores import Threads
from pissa.cli.data import encode, note_on_facts, read_chats, read_preferences, shown
from pissa.cli.early_checks import check_held_out
from pissa.cli.generation import check_tokens
from pissa.cli.memory import free_memory
from pissa.cli.options import adapter_config, parse, rate_of
from pissa.cli.outcome import method_name, report, results
from pissa.cli.past_run import last_checkpoint, resume_command
from pissa.cli.plan import collate, evaluations, make_plan, needs_checkpointing
from pissa.cli.progress import CompleteError, LossBar, Watch
from pissa.cli.repeats import distinct, divide
from pissa.cli.run_folder import (
    Limits,
    check_names,
    check_same_data,
    check_same_run,
    digests_of,
    record,
    taken_folder,
)
from pissa.cli.saving import errors_of_saving, save_safely
from pissa.cli.selftest import has_passed_on_gpu
from pissa.cli.sources import ALLOWED, Records, is_records, records
from pissa.cli.templates import check_continues, give_template
from pissa.cli.terminal import UserError, busy_with, count_of, first_interrupt, handled, print_row, user_errors
from pissa.cli.training_options import AUTO
from pissa.cli.verification import packing_check, step0_check
from pissa.config import IMPLICIT
from pissa.containers.checkpoint import AS_STORED, PISSA_RECORD, Contents, ModelFolder
from pissa.containers.hub import weight_files
from pissa.containers.messages import CodeError, first_line
from pissa.containers.tensor_file import has_safetensors
from pissa.notices import InexactLoraWarning
from pissa.training.suggest_lr import own_loss


class Training(NamedTuple):
    """A command that trains with one of TRL's trainers."""

    trainer: str
    """The name of the trainer without "Trainer"."""
    rows: Callable[[Records, Any, int], tuple[list[dict[str, Any]], str]]
    """Rows of records (these, tokenizer, most tokens), and a note on what was cut."""

    def run(self, args: argparse.Namespace) -> int:
        """Runs one training. Returns the exit code."""
        ours, training = parse(args, self.trainer)
        screen = io.StringIO() if training.process_index else sys.stderr if ours.json else sys.stdout
        with contextlib.redirect_stdout(screen), contextlib.ExitStack() as until_the_end:
            if training.world_size == 1:  # one of several would go on waiting for the others
                until_the_end.enter_context(handled(signal.default_int_handler, signal.SIGTERM))
            _check_device(training)
            config, source = _complete_options(ours, training)
            run = _Run(args.command, ours, training, config, source, _checkpoint(ours, training))
            if not ours.resume:
                until_the_end.enter_context(taken_folder(ours, training))
            threads = Threads(ours.threads, training.device.type == "cpu" and training.world_size == 1)
            data = _read_data(run, self.rows)
            threads.choose()
            model = _model(run, data)
            watch = Watch(threads)
            answers = HeldOutAnswers(model, data.tokenizer, data.held_out if training.world_size == 1 else None)
            trainer = _trainer(self.trainer, run, data, model, watch, answers)
            loss = own_loss if self is FINETUNE else partial(_trainers_loss, trainer)
            result = _check_and_train(run, data, trainer, watch, answers, loss)
            # DDP's reducer must be freed before its process group. If the reducer is the last to hold the group, it
            # holds Python's lock and waits for a gloo thread that waits for the same lock (torch 2.13).
            accelerator = trainer.accelerator
            del trainer, loss
            accelerator.free_memory()
            accelerator.end_training()
        if ours.json and not training.process_index:
            print(json.dumps(result, indent=2))
        return 0 if result["check"]["passed"] else 1


class _Run(NamedTuple):
    """A training whose options are complete."""

    command: str
    ours: Any
    """Our options."""
    training: Any
    """Those of TRL's trainer."""
    config: pissa.PissaConfig
    source: ModelFolder
    """The model that is trained."""
    checkpoint: Path | None
    """The checkpoint from which the training goes on, if any."""

    @property
    def code(self) -> dict[str, Any]:
        """Which revision of the model is loaded, and whether the code that comes with it may run."""
        return {"revision": self.ours.model_revision, "trust_remote_code": self.training.trust_remote_code}


class _Data(NamedTuple):
    """What is trained on, in TRL's form, and what has encoded it."""

    processor: Any
    tokenizer: Any
    train: Any
    held_out: Any
    digests: dict[str, str]


def _check_and_train(
    run: _Run, data: _Data, trainer: Any, watch: Watch, answers: HeldOutAnswers, loss: Callable[..., torch.Tensor]
) -> dict[str, Any]:
    """Checks that the untrained adapter changes nothing. If so, plans, trains and saves. Returns the report."""
    ours, training = run.ours, run.training
    result = {"out": training.output_dir, "trainable_parameters": trainer.model.get_nb_trainable_parameters()[0]}
    result["check"] = _check(trainer)
    if not result["check"]["passed"]:
        return result
    if training.learning_rate == AUTO:
        with user_errors(ValueError, before=f"--lr {AUTO}: "), busy_with("trying learning rates"):
            suggestion = pissa.suggest_lr(trainer.model, _batches(trainer, 30), loss=loss)
        training.learning_rate = suggestion.rate
        print_row("rate", suggestion.text)
    if trainer.is_world_process_zero() and not ours.resume:
        record(Path(training.output_dir), data.digests, ours, training)
    if run.checkpoint or ours.resume:
        print_row("resume", f"from {run.checkpoint or 'the beginning: no checkpoint was kept'}")
    watch.threads.choose()
    result["plan"] = _plan(trainer, run, watch, loss, answers)
    answers.ask_before()
    _train(trainer, watch, run.checkpoint, f"pissa {run.command}")
    answers.show()
    return result | report(trainer, ours, run.config, run.source.contents, answers)


# ---- Before ----------------------------------------------------------------------------------------------------------


def _check_device(training: Any) -> None:
    """Says which device trains, where there is a choice. Refuses a GPU that has not passed the self-test."""
    if not torch.cuda.is_available():
        return
    gpu, needed = torch.cuda.get_device_name(), "`pissa selftest --device cuda` has passed here"
    if training.device.type == "cpu":
        print_row("device", f"the CPU: {gpu} trains unless --use_cpu is given, once {needed}")
    elif has_passed_on_gpu():
        print_row("device", f"{gpu}: {needed}; --use_cpu true takes the CPU")
    else:
        raise UserError(f"--use_cpu false: {gpu} has not been tested; allowed once {needed} [P095]")


def _complete_options(ours: Any, training: Any) -> tuple[pissa.PissaConfig, ModelFolder]:
    """Completes and checks the options that `early_checks` has let through. Returns the configuration of the method,
    and the model."""
    name = ours.model_name_or_path
    with user_errors(OSError, ValueError, before=f"--model {name}: "):
        model_folder = ModelFolder.open(name, ours.model_revision, config_from=ours.config_from)
        model_folder.require(*(contents for contents in Contents if contents is not Contents.PEFT_RESIDUAL))
        is_residual = model_folder.contents is Contents.RESIDUAL
        split = AdapterRecord.read(model_folder.folder / PISSA_RECORD).config if is_residual else None
    check_names(model=model_folder.name, data=ours.dataset_name, eval_data=ours.eval_data, out=training.output_dir)
    config = adapter_config(ours, training.seed, split)
    if training.learning_rate is None:
        training.learning_rate = rate_of(config)
    ours.dtype = ours.dtype or _own_dtype(model_folder)
    if ours.resume:
        check_same_run(Path(training.output_dir), ours, training)
    return config, model_folder


def _own_dtype(folder: ModelFolder) -> str:
    """The dtype to train in: the checkpoint's. In float16, gradients would underflow; float32 holds its weights."""
    dtype = str(folder.config.get("dtype") or folder.config.get("torch_dtype") or "float32")
    is_dense = folder.contents not in (Contents.RESIDUAL, Contents.RELEASED)
    return "float32" if is_dense and dtype == "float16" else dtype


# Columns of data sets that TRL reads itself: of images, of tools, of what is encoded.
_ONLY_TRL = {"image", "images", "tools", "input_ids"}


def _read_data(run: _Run, rows: Callable[..., Any]) -> _Data:
    """Reads the data, for the model's tokenizer. A run that goes on must have the same as before."""
    is_gguf = run.source.contents is Contents.GGUF
    processor = (
        run.source.tokenizer(**run.code) if is_gguf else _load(run.ours, partial(_processor, run.source), **run.code)
    )
    tokenizer = getattr(processor, "tokenizer", processor)
    train, held_out = _examples(run.ours, run.training, rows, tokenizer)
    digests = digests_of(train, held_out)
    if run.ours.resume:
        check_same_data(Path(run.training.output_dir), digests)
    return _Data(processor, tokenizer, train, held_out, digests)


def _examples(ours: Any, training: Any, rows: Callable[..., Any], tokenizer: Any) -> tuple[Any, Any]:
    """The training data and the held-out data, in TRL's form."""

    def source(label: str, name: str, split: str) -> Any:
        data = None
        if not is_records(name):
            before = f"{name}: cannot be loaded as a data set: "
            allowed = f"; {ALLOWED}, or the folder or name of a data set with the split {split} [P101]"
            with user_errors(OSError, ValueError, datasets.exceptions.DatasetsError, before=before, after=allowed):
                data = datasets.load_dataset(name, ours.dataset_config, split=split, streaming=ours.dataset_streaming)
            name = f"{name}, split {split}"
            columns = {*data.column_names} if not ours.dataset_streaming else _ONLY_TRL
            if columns & _ONLY_TRL or columns == {"chosen", "rejected"}:  # texts that begin alike
                print_row(label, name)
                return data
        examples, note = rows(records(name, ours.columns, data), tokenizer, training.max_length)
        lengths = [len(row["input_ids"]) for row in examples if "input_ids" in row]
        size = f", {sum(lengths):,} tokens, the longest has {max(lengths):,}" if lengths else ""
        different = f", {count:,} distinct" if (count := distinct(examples)) < len(examples) else ""
        print_row(label, f"{name}, {len(examples):,} examples{different}{size}{note}")
        if label == "data":
            print(shown(examples[0], tokenizer))
            if on_facts := note_on_facts(examples, tokenizer):
                print_row("note", on_facts)
        return datasets.Dataset.from_list(examples)

    asked = training.eval_strategy != "no" and not is_records(ours.dataset_name)
    name = ours.eval_data or (ours.dataset_name if asked else None)
    train = source("data", ours.dataset_name, ours.dataset_train_split)
    held_out = source("held out", name, ours.dataset_test_split) if name else None
    if name is None and isinstance(train, datasets.Dataset):
        train, held_out = _hold_out(train, ours.held_out, training.seed)
    if held_out is None:
        training.eval_strategy = IntervalStrategy.NO
    elif training.eval_strategy == IntervalStrategy.NO:
        training.eval_strategy, training.eval_steps = IntervalStrategy.STEPS, training.eval_steps or _EVALUATE
    return train, held_out


def _hold_out(examples: Any, count: int | None, seed: int) -> tuple[Any, Any]:
    """Divides examples into those that are trained on and those that are held out, if any."""
    few = count is None and len(examples) < 32
    if count is None:
        count = 0 if few else min(max(len(examples) // 20, 8), 200)
    check_held_out(count, len(examples))
    trained, held_out = divide(examples, count, seed) if count else ([], [])
    if held_out:
        how = "chosen at random: --held-out, or a file by --eval-data, changes that"
        print_row("held out", f"{len(held_out)} of them, {how}")
        return examples.select(trained), examples.select(held_out)
    if few or count:
        why = f"{len(examples)} examples are few" if few else "they repeat each other"
        print_row("held out", f"none, because {why}; --held-out 5, or a file by --eval-data, shows if training helps")
    return examples, None


_EVALUATE = 0.2
"""The held-out data are evaluated after each fifth of the steps."""


def _processor(source: ModelFolder, name: str, **options: Any) -> Any:
    """The processor of a model: its tokenizer, unless it also reads images or sounds."""
    if not options["trust_remote_code"]:
        source.check_no_code()
    try:
        return AutoProcessor.from_pretrained(name, **options)
    except ValueError:  # which does not say why there is no tokenizer
        source.tokenizer(**options)
        raise


def _load(ours: Any, load: Callable[..., Any], **options: Any) -> Any:
    name = ours.model_name_or_path
    before = f"--model {name}: cannot be loaded as a causal language model with its tokenizer: "
    needed = "; needed: a folder that save_pretrained wrote, or a name on the model hub [P100]"
    with user_errors(OSError, ValueError, KeyError, TypeError, before=before, after=needed):
        try:
            with busy_with("reading the model"):
                return load(name, **options)
        except CodeError as error:
            raise UserError(f"--model {error}") from error
        except ImportError as error:  # a processor of images or videos, or the model's own code
            raise UserError(f"--model {name}: {first_line(error).partition('. ')[0]}; install it") from error


def _model(run: _Run, data: _Data) -> Any:
    """The wrapped model, calibrated on the first examples of the training data if its base asks for a calibration."""
    _, ours, training, config, source, _ = run
    name, dtype = ours.model_name_or_path, getattr(torch, ours.dtype, None)
    load = partial(pissa.load, revision=ours.model_revision, dtype=dtype, device=training.device)
    if ours.config_from:
        load = partial(load, config_from=ours.config_from)
    if source.contents is Contents.RESIDUAL:
        model = _load(ours, load)
    elif source.contents in AS_STORED:  # which transformers would expand
        if config.needs_calibration:
            raise UserError(f"--model {name}: its codes stay as they are, with nothing to calibrate; leave --quant out")
        model = _load(ours, load, config=config)
    elif _is_read_by_matrix(run):
        batches = _calibration(source.meta_model(), data, ours.examples) if config.needs_calibration else None
        with user_errors(OSError, TypeError, ValueError, before=f"--model {name}: "):
            model = load(name, config, calibration=batches, progressbar=True)
    else:
        options = {**run.code, "dtype": ours.dtype, "attn_implementation": ours.attn_implementation}
        if training.world_size > 1:  # a single process spreads the model over its GPUs
            os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"  # each process decomposes weights that it holds
            sharded = training.fsdp or os.environ.get("ACCELERATE_USE_FSDP") == "true"
            is_whole = training.distributed_state.distributed_type == DistributedType.MULTI_GPU and not sharded
            options["device_map"] = {"": training.device} if is_whole else None
        options |= training.model_init_kwargs or {}
        model = _load(ours, create_model_from_path, **options)
        # Raised for a rank above a layer's size or a NaN in a weight. The message names the layer.
        with user_errors(TypeError, ValueError, before=f"--model {name}: "):
            batches = _calibration(model, data, ours.examples) if config.needs_calibration else None
            model = pissa.wrap(model, config, calibration=batches, progressbar=not training.process_index)
    with user_errors(ValueError, before="--"):
        model.precision = ours.precision
    trainable, total = model.get_nb_trainable_parameters()
    cores = count_of(torch.get_num_threads(), "thread") if training.device.type == "cpu" else str(training.device)
    integers = ", products of integers" if ours.precision == "int8" else ""
    print_row("model", f"{name}, {(total - trainable) / 1e6:,.1f} M parameters, {ours.dtype}, {cores}{integers}")
    share = f"{trainable:,} trainable parameters ({trainable / total:.2%})"
    print_row("method", f"{method_name(ours, config)}, rank {ours.r}: {share}")
    if training.gradient_checkpointing is None:
        training.gradient_checkpointing = needs_checkpointing(training, model, data.train)
        training.activation_checkpointing = training.gradient_checkpointing  # its name in later versions
    return model


def _is_read_by_matrix(run: _Run) -> bool:
    """Whether the base is stored in another form than the checkpoint's, so that no matrix need be in memory as it is
    there: in one process, on a CPU, and with no option that only transformers' own loader takes."""
    _, ours, training, config, source, _ = run
    options = ours.attn_implementation or training.trust_remote_code or training.model_init_kwargs
    is_alone = training.world_size == 1 and training.device.type == "cpu"
    if source.contents is not Contents.DENSE or config.form == IMPLICIT or options or not is_alone:
        return False
    return has_safetensors(weight_files(ours.model_name_or_path, ours.model_revision))


def _calibration(model: Any, data: _Data, count: int) -> list[torch.Tensor]:
    """The first rows of the training data, as tokens."""
    rows = list(itertools.islice(iter(data.train), count))
    if not rows or "input_ids" not in rows[0]:
        raise UserError(
            f"--examples {count}: needed is --data of records to finetune on, of which at least one "
            "is read; leave --repair activations and --error-feedback out, or calibrate with pissa init --calibration"
        )
    check_tokens(model, data.tokenizer, (token for row in rows for token in row["input_ids"]))
    return [torch.tensor([row["input_ids"]]) for row in rows]


def _trainer(kind: str, run: _Run, data: _Data, model: Any, watch: Watch, answers: HeldOutAnswers) -> Any:
    """TRL's trainer of that kind, with our card, our way to save, and our bar."""
    datasets.disable_progress_bars()
    training = run.training
    names = {"train_dataset": data.train, "eval_dataset": data.held_out, "processing_class": data.processor}
    recorded = training.model_init_kwargs
    training.model_init_kwargs = None  # TRL would report that it ignores them
    with user_errors(ValueError, KeyError):  # options that contradict each other or do not fit the data
        trainer: Any = getattr(trl, f"{kind}Trainer")(model, args=training, callbacks=[watch, answers], **names)
    training.model_init_kwargs = recorded
    check_tokens(model, data.tokenizer, _tokens(data.tokenizer, trainer.train_dataset, trainer.eval_dataset))
    base = model.peft_config["default"].base_model_name_or_path or run.ours.model_name_or_path
    trainer.create_model_card = partial(_card, run, trainer, base, answers)
    save_safely(trainer, f"pissa {run.command}")
    if "ref" in model.peft_config:  # TRL's copy of the adapter, which computes what the base does
        model.delete_adapter("ref")
    if not training.disable_tqdm:
        trainer.remove_callback(ProgressCallback)
        trainer.add_callback(LossBar)
    return trainer


_TOKENS = ("input_ids", "prompt_ids", "chosen_ids", "rejected_ids")
"""The columns of tokens of TRL's trainers."""


def _tokens(tokenizer: Any, *data: Any) -> Iterator[int]:
    """All tokens of data in TRL's form, and the one with which their batches are filled up. Data that are encoded only
    while they are read, such as images, have none."""
    yield tokenizer.pad_token_id or 0
    for rows in data:
        names = [name for name in _TOKENS if isinstance(rows, datasets.Dataset) and name in rows.column_names]
        for batch in rows.select_columns(names).with_format(None).iter(1000) if names else ():
            yield from (token for column in batch.values() for row in column for token in row)


def _batches(trainer: Any, count: int, size: int | None = None) -> list[Any]:
    """At most `count` batches of the training data, in random order, of `size` examples or as many as in training."""
    rows = iter(trainer.train_dataset.shuffle(seed=trainer.args.seed))
    size = size or trainer.args.per_device_train_batch_size
    batches = itertools.islice(iter(lambda: list(itertools.islice(rows, size)), []), count)
    return [collate(trainer, batch) for batch in batches]


def _check(trainer: Any) -> dict[str, Any]:
    packs = getattr(trainer, "padding_free", False)
    # Texts are packed only with others. Otherwise one is enough: logits of more would take more memory than a step.
    (batch,) = _batches(trainer, 1, None if packs else 1)
    after = "; leave --packing and --padding-free out" if packs else "; if --max-length cuts images, raise it [P106]"
    with user_errors(ValueError, before="the first batch: ", after=after), busy_with("checking the untrained adapter"):
        difference, bound = step0_check(trainer.model, batch)
    passed = difference <= bound  # False for NaN
    measured = f"(difference {difference:.1e}, allowed {bound:.1e})"
    if passed:
        print_row("check", f"the untrained adapter changes nothing {measured}")
    else:
        print_row("check", f"FAILED: the untrained adapter changes the model {measured}: run `pissa selftest` [P038]")
    if packs and not (off := packing_check(trainer.model, batch)) <= bound:
        what = f"logits differ by {off:.1e} from those of a text alone (allowed: up to {bound:.1e})"
        raise UserError(f"--packing: this model mixes the texts of a row: {what}{after} [P107]")
    return {"difference": difference, "bound": bound, "passed": passed}


def _card(run: _Run, trainer: Any, base: str, answers: HeldOutAnswers, **_: Any) -> None:
    """Writes the model card, in place of TRL's, whenever the trainer would."""
    training = run.training
    if training.process_index == 0:
        out, method, data = training.output_dir, method_name(run.ours, run.config), run.ours.dataset_name
        name = (training.push_to_hub and training.hub_model_id) or out
        write_card(Path(out), name, base, method, run.command, data, results(trainer.state.log_history, answers))


# ---- Training, and after ---------------------------------------------------------------------------------------------


def _checkpoint(ours: Any, training: Any) -> Path | None:
    """The checkpoint from which the training goes on, if any."""
    given = training.resume_from_checkpoint
    return Path(given) if given else last_checkpoint(Path(training.output_dir)) if ours.resume else None


def _trainers_loss(trainer: Any, model: Any, batch: Any) -> torch.Tensor:
    """The loss of a batch that is not one of the training's: what TRL notes of it, to log it, goes again."""
    loss: torch.Tensor = trainer.compute_loss(model, batch)
    trainer._metrics["train"].clear()
    return loss


def _plan(
    trainer: Any, run: _Run, watch: Watch, loss: Callable[..., torch.Tensor], answers: HeldOutAnswers
) -> dict[str, Any] | None:
    """Measures and prints what the training will take, with the time for the answers that are asked for."""
    args, minutes = trainer.args, run.ours.minutes
    state, are_counted = _resumed(trainer, run, watch)
    needs_less = "; a smaller --batch-size or --max-length, or --gradient-checkpointing, needs less"
    with user_errors(torch.OutOfMemoryError, MemoryError, after=needs_less), busy_with("trying a step"):
        plan = make_plan(trainer, loss, state.global_step)
        answers.measure()
    if plan is None:
        return None
    most = min(plan.seconds, 60 * (minutes or math.inf))
    plan = plan._replace(besides=plan.besides + answers.time_needed(most, evaluations(args, plan.steps)))
    if minutes and plan.steps and not are_counted:
        plan = plan.within(minutes)
        args.max_steps = state.global_step + plan.steps
    if plan.steps:
        print_row("plan", plan.text(args.device))
        print_row("", "Ctrl-C keeps what is learned by then, and --resume goes on from there")
        if plan.seconds > _LONG and not minutes:
            print_row("", "--minutes 5 makes it shorter, now or with --resume")
        if state.max_steps not in (0, total := state.global_step + plan.steps):
            rate = "the learning rate goes on along the curve of so many"
            print_row("", f"{total:,} steps in all, where {state.max_steps:,} were planned: {rate}")
    else:
        print_row("plan", "no step is left; larger --steps, --epochs or --minutes train on")
    for note in plan.notes(free_memory()):
        print_row("note", note)
    return plan._asdict() | {"seconds": plan.seconds}


_LONG = 300
"""Seconds of a training from which on a way to shorten it is offered."""


def _resumed(trainer: Any, run: _Run, watch: Watch) -> tuple[TrainerState, bool]:
    """The state from which the training goes on, and whether its steps are counted: those that were to fit into
    --minutes then. Other minutes, steps or epochs count anew, and are recorded with the first checkpoint."""
    if run.checkpoint is None:
        return TrainerState(), False
    state = TrainerState.load_from_json(str(run.checkpoint / TRAINER_STATE_NAME))
    limits = Limits(Path(trainer.args.output_dir), run.ours, trainer.args)
    if limits.are_new:
        watch.after_save = limits.record if trainer.is_world_process_zero() else None
    elif run.ours.minutes:
        trainer.args.max_steps = state.max_steps
    return state, not limits.are_new


_STOPS = (signal.SIGINT, signal.SIGTERM)
"""What ends a training: Ctrl-C, and what `kill` and systems that shut down send."""


def _train(trainer: Any, watch: Watch, checkpoint: Path | None, command: str) -> None:
    """Trains, evaluates before and after, and saves."""
    args, out = trainer.args, Path(trainer.args.output_dir)
    args.eval_on_start = trainer.eval_dataset is not None and not checkpoint
    with warnings.catch_warnings():
        # Reported once at the end instead of across the progress bar at the first checkpoint.
        warnings.simplefilter("ignore", InexactLoraWarning)
        # Several processes would not all receive the signal in the same step.
        interruptible = first_interrupt(watch.stop, *_STOPS) if args.world_size == 1 else contextlib.nullcontext()
        with interruptible, contextlib.suppress(CompleteError):
            trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
        if watch.requested:
            go_on = resume_command(command, out)
            kept = f"saved after step {trainer.state.global_step}; --minutes N can limit the rest"
            raise KeyboardInterrupt(f"{kept}; go on by: {go_on}")
        evaluated = [row["step"] for row in trainer.state.log_history if "eval_loss" in row]
        if trainer.eval_dataset is not None and evaluated[-1:] != [trainer.state.global_step]:
            trainer.evaluate()
        with errors_of_saving(trainer, command):
            trainer.save_model()
            trainer.create_model_card()  # PEFT has added a folder's path to the metadata
            trainer.save_state()


# ---- The two commands ------------------------------------------------------------------------------------------------


def _answers(source: Records, tokenizer: Any, max_length: int) -> tuple[list[dict[str, Any]], str]:
    rows, cut, left_out = encode(read_chats(source), tokenizer, max_length)
    note = f", {cut:,} cut there by --max-length" if cut else ""
    return rows, note + (f", {left_out:,} left out whose prompt alone is longer" if left_out else "")


def _preferences(source: Records, tokenizer: Any, max_length: int) -> tuple[list[dict[str, Any]], str]:
    """Messages, as TRL takes them."""
    give_template(tokenizer)
    rows = []
    for chosen, rejected in read_preferences(source):
        check_continues(chosen, tokenizer)
        answers = {"chosen": chosen.messages[-1:], "rejected": rejected.messages[-1:]}
        rows.append({"prompt": chosen.messages[:-1], **answers})
    return rows, ""


FINETUNE = Training("SFT", _answers)
DPO = Training("DPO", _preferences)
