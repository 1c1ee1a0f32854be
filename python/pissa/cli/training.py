"""`pissa finetune`, with TRL's SFTTrainer, and `pissa dpo`, with its DPOTrainer: wrap a model, check it, train it with
TRL and save the adapter."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import signal
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from importlib.util import find_spec
from itertools import islice, pairwise
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import torch
import trl
from accelerate import DistributedType
from accelerate.utils import send_to_device
from transformers import AutoProcessor, TrainerCallback
from transformers.trainer_callback import ProgressCallback
from trl.trainer.utils import create_model_from_path

import pissa
from pissa.adapters.peft_layout import inexact_lora
from pissa.adapters.pissa_layout import AdapterRecord
from pissa.cli.data import encode, is_records, read_chats, read_preferences
from pissa.cli.memory import peak_memory_mib, return_freed_blocks
from pissa.cli.options import AUTO, RUN_FILE, adapter_config, check_same_run, parse, record
from pissa.cli.templates import check_continues, give_template
from pissa.cli.terminal import UserError, print_row, user_errors
from pissa.cli.verification import step0_check
from pissa.containers.checkpoint import PISSA_RECORD, Contents, ModelFolder
from pissa.containers.messages import first_line
from pissa.containers.staged import check_unused
from pissa.notices import InexactLoraWarning

PICTURE_FILE = "loss.png"


class Training(NamedTuple):
    """A command that trains with one of TRL's trainers."""

    trainer: str
    """The name of the trainer without "Trainer"."""
    unit: str
    """What the loss is averaged over."""
    rows: Callable[[str, Any, int], tuple[list[dict[str, Any]], str]]
    """Rows of a file (its name, tokenizer, most tokens), and a note on what was cut."""

    def run(self, args: argparse.Namespace) -> int:
        """Runs one training. Returns the exit code."""
        ours, training, mixture = parse(args, self.trainer)
        screen = io.StringIO() if training.process_index else sys.stderr if ours.json else sys.stdout
        with contextlib.redirect_stdout(screen), _explain_cut_images(training):
            config, contents = _complete_options(ours, training, mixture)
            if args.is_process and training.device.type == "cpu" and return_freed_blocks():
                print_row("memory", "freed blocks of 8 MiB and more go back to the system (malloc's limits are set)")
            code = {"revision": ours.model_revision, "trust_remote_code": training.trust_remote_code}
            processor = _load(ours, AutoProcessor.from_pretrained, **code)
            train, held_out = _data(ours, training, mixture, self.rows, getattr(processor, "tokenizer", processor))
            model = _model(ours, training, config, contents, train, **code)
            datasets.disable_progress_bars()
            watch = Watch()
            names = {"train_dataset": train, "eval_dataset": held_out, "processing_class": processor}
            recorded = training.model_init_kwargs
            training.model_init_kwargs = None  # TRL would report that it ignores them
            with user_errors(ValueError, KeyError):  # options that contradict each other or do not fit the data
                made = getattr(trl, f"{self.trainer}Trainer")
                trainer: Any = made(model, args=training, callbacks=[watch], **names)
            training.model_init_kwargs = recorded
            if "ref" in model.peft_config:  # TRL's copy of the adapter, which computes what the base does
                model.delete_adapter("ref")
            _fuse(trainer.model)
            if not training.disable_tqdm:
                trainer.remove_callback(ProgressCallback)
                trainer.add_callback(LossBar)
            result = {"out": training.output_dir, "trainable_parameters": model.get_nb_trainable_parameters()[0]}
            result["check"] = _check(trainer)
            if passed := result["check"]["passed"]:
                if training.learning_rate == AUTO:
                    loss = None if self is FINETUNE else trainer.compute_loss
                    with user_errors(ValueError, before=f"--lr {AUTO}: "):
                        suggestion = pissa.suggest_lr(trainer.model, _batches(trainer, 30), loss=loss)
                    training.learning_rate = suggestion.rate
                    print_row("rate", suggestion.text)
                if trainer.is_world_process_zero() and not ours.resume:
                    record(Path(training.output_dir), ours, training, mixture)
                _train(trainer, ours, watch, f"pissa {args.command}")
                result |= _report(trainer, ours, contents, self.unit)
            # DDP's reducer must be freed before its process group. If the reducer is the last to hold the group, it
            # holds Python's lock and waits for a gloo thread that waits for the same lock (torch 2.13).
            accelerator = trainer.accelerator
            del trainer
            accelerator.free_memory()
            accelerator.end_training()
        if ours.json and not training.process_index:
            print(json.dumps(result, indent=2))
        return 0 if passed else 1


@contextlib.contextmanager
def _explain_cut_images(training: Any) -> Iterator[None]:
    """Explains how to handle an image whose tokens --max-length cuts. Collator and model find one only batch by
    batch."""
    try:
        yield
    except ValueError as error:
        if "image" not in str(error).lower() or "token" not in str(error):
            raise
        raise UserError(
            f"--max-length {training.max_length}: {first_line(error)}; a row that is cut must keep all tokens of its "
            "images: raise --max-length, or give smaller images"
        ) from error


# ---- Before ----------------------------------------------------------------------------------------------------------


def _complete_options(ours: Any, training: Any, mixture: Any) -> tuple[pissa.PissaConfig, Contents]:
    """Completes and checks the options. Returns the configuration of the method, and what the model is stored as."""
    data = ours.dataset_name or mixture.datasets
    for name, value in {"model": ours.model_name_or_path, "data": data, "out": training.output_dir}.items():
        if not value:
            raise UserError(f"--{name} is missing; needed: --model, --data and --out")
    name, out = ours.model_name_or_path, Path(training.output_dir)
    with user_errors(OSError, ValueError, before=f"--model {name}: "):
        model_folder = ModelFolder.open(name, ours.model_revision)
        model_folder.require(*(contents for contents in Contents if contents is not Contents.PEFT_RESIDUAL))
        is_residual = model_folder.contents is Contents.RESIDUAL
        split = AdapterRecord.read(model_folder.folder / PISSA_RECORD).config if is_residual else None
    config = adapter_config(ours, training.seed, split)
    base = model_folder.config if is_residual or model_folder.contents is Contents.RELEASED else {}
    ours.dtype = ours.dtype or base.get("dtype") or base.get("torch_dtype") or "float32"
    if ours.resume:
        check_same_run(out, ours, training, mixture)
    elif training.process_index == 0:
        with user_errors(ValueError, before="--out "):
            check_unused(out, "go on with that run by --resume, or " if (out / RUN_FILE).is_file() else "")
    return config, model_folder.contents


def _data(ours: Any, training: Any, mixture: Any, rows: Callable[..., Any], tokenizer: Any) -> tuple[Any, Any]:
    """The training data and the held-out data, in TRL's form."""

    def source(label: str, name: str, split: str) -> Any:
        if is_records(name):
            examples, note = rows(name, tokenizer, training.max_length)
            print_row(label, f"{name}, {len(examples):,} examples{note}")
            return datasets.Dataset.from_list(examples)
        print_row(label, f"{name}, split {split}")
        before = f"{name}: cannot be loaded as a data set: "
        allowed = f"; allowed: a .jsonl or .json file, or the folder or name of a data set with the split {split}"
        with user_errors(OSError, ValueError, datasets.exceptions.DatasetsError, before=before, after=allowed):
            return datasets.load_dataset(name, ours.dataset_config, split=split, streaming=ours.dataset_streaming)

    if mixture.datasets:
        both = trl.get_dataset(mixture)
        return both["train"], both.get("test")
    asked = training.eval_strategy != "no" and not is_records(ours.dataset_name)
    held_out = ours.eval_data or (ours.dataset_name if asked else None)
    train = source("data", ours.dataset_name, ours.dataset_train_split)
    return train, source("held out", held_out, ours.dataset_test_split) if held_out else None


def _load(ours: Any, load: Callable[..., Any], **options: Any) -> Any:
    name = ours.model_name_or_path
    before = f"--model {name}: cannot be loaded as a causal language model with its tokenizer: "
    needed = "; needed: a folder that save_pretrained wrote, or a name on the model hub"
    with user_errors(OSError, ValueError, KeyError, TypeError, before=before, after=needed):
        try:
            return load(name, **options)
        except ImportError as error:  # a processor of images or videos, or the model's own code
            raise UserError(f"--model {name}: {first_line(error).partition('. ')[0]}; install it") from error


def _model(ours: Any, training: Any, config: pissa.PissaConfig, contents: Contents, train: Any, **options: Any) -> Any:
    """The wrapped model, calibrated on the first examples of the training data if its base asks for a calibration."""
    name, dtype = ours.model_name_or_path, getattr(torch, ours.dtype, None)
    load = partial(pissa.load, revision=ours.model_revision, dtype=dtype, device=training.device)
    if contents is Contents.RESIDUAL:
        model = _load(ours, load)
    elif contents is Contents.RELEASED:  # which transformers would expand
        if config.needs_calibration:
            raise UserError(f"--model {name}: as released it has nothing to calibrate; leave --quant out")
        model = _load(ours, load, config=config)
    else:
        options |= {"dtype": ours.dtype, "attn_implementation": ours.attn_implementation}
        if training.world_size > 1:  # a single process spreads the model over its GPUs
            os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"  # each process decomposes weights that it holds
            sharded = training.fsdp or os.environ.get("ACCELERATE_USE_FSDP") == "true"
            is_whole = training.distributed_state.distributed_type == DistributedType.MULTI_GPU and not sharded
            options["device_map"] = {"": training.device} if is_whole else None
        options |= training.model_init_kwargs or {}
        model = _load(ours, create_model_from_path, **options)
        # Raised for a rank above a layer's size or a NaN in a weight. The message names the layer.
        with user_errors(TypeError, ValueError, before=f"--model {name}: "):
            batches = _calibration(train, ours.calibration) if config.needs_calibration else None
            model = pissa.wrap(model, config, calibration=batches, progressbar=not training.process_index)
    trainable, total = model.get_nb_trainable_parameters()
    cores = f"{torch.get_num_threads()} threads" if training.device.type == "cpu" else f"{training.device}"
    print_row("model", f"{name}, {(total - trainable) / 1e6:,.1f} M parameters, {ours.dtype}, {cores}")
    share = f"{trainable:,} trainable parameters ({trainable / total:.2%})"
    print_row("method", f"{_method_name(ours)}, rank {ours.r}: {share}")
    return model


def _calibration(train: Any, count: int) -> list[torch.Tensor]:
    """The first rows of the training data, as tokens."""
    rows = list(islice(iter(train), count))
    if not rows or "input_ids" not in rows[0]:
        raise UserError(
            f"--calibration {count}: needed is --data of records (.jsonl, .json) to finetune on, of which at least one "
            "is read; leave --repair activations and --error-feedback out, or calibrate with pissa init --calibration"
        )
    return [torch.tensor([row["input_ids"]]) for row in rows]


def _method_name(ours: Any) -> str:
    name = "LoRA" if ours.init == "lora" else "QPiSSA" if ours.quant else "PiSSA"
    return f"{name} ({ours.quant})" if ours.quant else name


def _fuse(model: Any) -> None:
    """Makes the model compute its loss without logits where it can, and on a CPU applies `pissa.fuse_layers`."""
    try:
        pissa.fuse_layers(model)
        if not hasattr(trl.trainer.utils, "add_fused_lm_head"):
            return  # TRL 1.14, the last for Python 3.10, asks the head for other sums
        pissa.fuse_head(model)
    except (TypeError, ValueError) as error:
        print_row("loss", f"of logits in memory, since {error}")


def _batches(trainer: Any, count: int) -> list[Any]:
    """At most `count` batches of the training data, in random order."""
    rows, size = iter(trainer.train_dataset.shuffle(seed=trainer.args.seed)), trainer.args.per_device_train_batch_size
    batches = islice(iter(lambda: list(islice(rows, size)), []), count)
    return [send_to_device(trainer.data_collator(batch), trainer.model.device) for batch in batches]


def _check(trainer: Any) -> dict[str, Any]:
    difference, bound = step0_check(trainer.model, _batches(trainer, 1)[0])
    print_row("check", f"logits at step 0 differ by {difference:.1e} from the base's (bound {bound:.1e})")
    passed = difference <= bound  # False for NaN
    if not passed:
        print_row(
            "check", "FAILED: the adapter changes the model before it is trained; report it with `pissa selftest`"
        )
    return {"difference": difference, "bound": bound, "passed": passed}


# ---- Training, and after ---------------------------------------------------------------------------------------------


def _train(trainer: Any, ours: Any, watch: Watch, command: str) -> None:
    """Trains, from a checkpoint if asked to resume, evaluates before and after, and saves."""
    args, out = trainer.args, Path(trainer.args.output_dir)
    checkpoint = args.resume_from_checkpoint or (_last_checkpoint(out) if ours.resume else None)
    if checkpoint:
        print_row("resume", f"from {checkpoint}")
    args.eval_on_start = trainer.eval_dataset is not None and not checkpoint
    with warnings.catch_warnings():
        # Reported once at the end instead of across the progress bar at the first checkpoint.
        warnings.simplefilter("ignore", InexactLoraWarning)
        # Several processes would not all receive the signal in the same step.
        interruptible = watch.listen() if args.world_size == 1 else contextlib.nullcontext()
        with interruptible, contextlib.suppress(CompleteError):
            trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
        if watch.requested:
            raise KeyboardInterrupt(
                f"saved after step {trainer.state.global_step}; go on by: {command} --config {out / RUN_FILE} --resume"
            )
        if trainer.eval_dataset is not None:
            trainer.evaluate()
        trainer.save_model()
        trainer.save_state()


def _last_checkpoint(out: Path) -> Path | None:
    """The last complete checkpoint. The Trainer writes trainer_state.json last, so only a complete one contains it."""
    complete = [path.parent for path in out.glob("checkpoint-*/trainer_state.json")]
    return max(complete, key=lambda path: int(path.name.rpartition("-")[2]), default=None)


def _report(trainer: Any, ours: Any, contents: Contents, unit: str) -> dict[str, Any]:
    """Draws the losses, in nats per `unit`, if matplotlib is installed, prints how the run went, and returns the
    report."""
    out, model, history = trainer.args.output_dir, ours.model_name_or_path, trainer.state.log_history
    steps = [row for row in history if "loss" in row]
    losses, held_out = [row["loss"] for row in steps], [row["eval_loss"] for row in history if "eval_loss" in row]
    if not steps:  # none was logged
        return {}
    seconds, memory = statistics.median(row["seconds"] for row in steps), steps[-1]["peak_memory_mib"]
    has_picture = find_spec("matplotlib") is not None
    if has_picture and trainer.is_world_process_zero():
        from pissa.cli.pictures import draw_losses

        curves = {_method_name(ours): ([row["step"] for row in steps], losses)}
        title = f"{Path(model).name}, rank {ours.r}, learning rate {trainer.args.learning_rate:g}"
        draw_losses(curves, Path(out) / PICTURE_FILE, title, unit)
    first, last = (statistics.mean(part) for part in (losses[:5], losses[-5:]))
    print_row("loss", f"{first:.4f} in the first 5 steps, {last:.4f} in the last 5")
    if held_out:
        print_row("held out", f"loss {held_out[0]:.4f} before, {held_out[-1]:.4f} after")
    speed = f", {rate:,.0f} tokens a second" if (rate := _rate(history)) else ""
    print_row("cost", f"{seconds:.2f} s per step (median){speed}, peak memory {memory:,.0f} MiB")
    print_row("saved", f"{out}: the adapter, {RUN_FILE}, {f'{PICTURE_FILE}, ' if has_picture else ''}checkpoints")
    if not has_picture:
        print_row("note", "no picture of the losses: run `pip install matplotlib`")
    print_row("next", f"pissa merge {out} NEW_FOLDER --base {model}")
    if ours.quant:
        print_row("note", inexact_lora([ours.quant]))
    if contents is Contents.RESIDUAL:
        print_row("note", f'pissa.load("{model}", adapter="{out}") has it exactly')
    costs = {"seconds_per_step": seconds, "peak_memory_mib": memory}
    return {"learning_rate": trainer.args.learning_rate, "losses": losses, "held_out": held_out, **costs}


# ---- While it trains -------------------------------------------------------------------------------------------------


def _rate(history: Sequence[Mapping[str, Any]]) -> float:
    """Tokens per second, without padding, of the logged steps; 0 where TRL does not count tokens."""
    steps = [row for row in history if "loss" in row and "num_tokens" in row and "seconds" in row]
    if len(steps) < 2:  # a single one contains only the sum, with everything before it
        return 0.0
    seconds = sum(row["seconds"] * (row["step"] - before["step"]) for before, row in pairwise(steps))
    return float(steps[-1]["num_tokens"] - steps[0]["num_tokens"]) / seconds if seconds else 0.0


class LossBar(ProgressCallback):  # type: ignore[misc]
    """A progress bar with the loss and tokens per second. ProgressCallback prints a line for each step."""

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        super().on_train_begin(*args, **kwargs)
        if self.training_bar is not None:
            self.training_bar.set_description("training", refresh=False)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **_: Any) -> None:
        if self.training_bar is not None and "loss" in logs:
            speed = f", {rate:,.0f} tokens/s" if (rate := _rate(state.log_history)) else ""
            self.training_bar.set_postfix_str(f"loss {logs['loss']:.3f}{speed}", refresh=False)


class CompleteError(Exception):
    """All steps of a run are done."""


class Watch(TrainerCallback):  # type: ignore[misc]
    """Records the `seconds` per step and `peak_memory_mib` with each logged loss, in trainer_state.json. At Ctrl-C, the
    step is finished, a checkpoint is written, and the training ends. A second Ctrl-C ends it at once.

    Raises:
        CompleteError: from `train`, after the checkpoint has been loaded, if the run is resumed after its last step.
            Trainer would make one more step in an epoch that has more batches.
    """

    requested = False
    started = seconds = 0.0

    @contextlib.contextmanager
    def listen(self) -> Iterator[None]:
        """Handles Ctrl-C for the duration of the block."""
        before = signal.signal(signal.SIGINT, self._request)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)

    def _request(self, *_: Any) -> None:
        self.requested = True
        signal.signal(signal.SIGINT, signal.default_int_handler)
        print("\nending after this step, with a checkpoint; Ctrl-C again ends at once", file=sys.stderr)

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step >= state.max_steps:
            raise CompleteError

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.started = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.seconds = time.perf_counter() - self.started
        if self.requested:
            control.should_save = control.should_training_stop = True

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **_: Any) -> None:
        if "loss" in logs:
            costs = {"seconds": round(self.seconds, 4), "peak_memory_mib": round(peak_memory_mib(), 1)}
            state.log_history[-1].update(costs)


# ---- The two commands ------------------------------------------------------------------------------------------------


def _answers(source: str, tokenizer: Any, max_length: int) -> tuple[list[dict[str, Any]], str]:
    rows, cut, left_out = encode(read_chats(source), tokenizer, max_length)
    note = f", {cut:,} answers cut at {max_length} tokens" if cut else ""
    return rows, note + (f", {left_out:,} left out (their prompt alone is longer)" if left_out else "")


def _preferences(source: str, tokenizer: Any, max_length: int) -> tuple[list[dict[str, Any]], str]:
    """Messages, as TRL takes them."""
    give_template(tokenizer)
    rows = []
    for chosen, rejected in read_preferences(source):
        check_continues(chosen, tokenizer)
        answers = {"chosen": chosen.messages[-1:], "rejected": rejected.messages[-1:]}
        rows.append({"prompt": chosen.messages[:-1], **answers})
    return rows, ""


FINETUNE = Training("SFT", "answer token", _answers)
DPO = Training("DPO", "pair", _preferences)
