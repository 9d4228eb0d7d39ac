"""The course of a run: measure, train, save, measure again; also when it is stopped or resumed."""

from __future__ import annotations

import logging
import math
import shlex
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

from torch import Tensor

from dora_fx.app.bases import fitting_in_memory
from dora_fx.app.data import BaseTokenizer
from dora_fx.app.errors import Interrupted, UserError
from dora_fx.app.options import FinetuneOptions, saved_options, shown_name
from dora_fx.app.runs import Display, Ranks, RunFolder, StopSignals, TrainingDisplay, training_log
from dora_fx.app.training.sample import generate_greedily
from dora_fx.app.training.trainer import Trainer
from dora_fx.checkpoint import CheckpointError

logger = logging.getLogger(__name__)

_ROW = ("step", "loss", "lr", "grad_norm", "tokens", "seconds")
# This many steps in a row without an update end a run: one may be due to a sample, several are not.
_MOST_SKIPPED = 3
_SMALLER_BATCH = "take a smaller --batch-size, with --gradient-accumulation in its place, or --sequence-length"

# Commands to run after a finished run, with what each does.
_NEXT = (
    ("chat {run}", "talk to the trained model; --raw continues a text"),
    ("export {run} --to adapter", "the adapter, for Hugging Face PEFT"),
    ("merge {run} --to merged", "the whole model, for transformers and inference engines"),
    ("finetune --resume {run} --steps {more}", "train on"),
)


@dataclass
class TrainingRun:
    """Runs the training of one run. Rank 0 reads and writes the folder, and the other ranks get its results.

    `saved_step` is the step of the checkpoint in the folder; None before this run saved or resumed one.
    """

    options: FinetuneOptions
    ranks: Ranks
    folder: RunFolder
    display: Display
    stop: StopSignals
    trainer: Trainer
    tokenizer: BaseTokenizer
    prompt: Tensor
    device: str
    saved_step: int | None = None
    _first_step: int = field(default=0, init=False)

    def run(self) -> int:
        """Train to the last step, or until a signal; return the exit code.

        Raises:
            UserError: a checkpoint cannot be loaded or saved, or the losses or gradients of several steps in a row are
                not finite. In the second case the state after the last update is saved.
            Interrupted: a second signal came to one of several ranks, or a signal came during an update; the state
                since the last save is lost.
        """
        if self.options.resume is not None:
            self._restore()
        try:
            with self._logging(), self.stop.deferred(), fitting_in_memory("a batch", _SMALLER_BATCH):
                self.trainer.allocate_buffers()
                if self.options.check:
                    self._check()
                if self.trainer.step == 0:
                    self._measure()
                elif self._is_measured(self.trainer.step) and self.trainer.step not in self._held_out_losses():
                    # The run was stopped between the step and its measurement.
                    self._measure_held_out(self.display.say)
                self._train()
                self._measure()
        except Interrupted as interrupted:
            if not self._can_save_after(interrupted):
                raise
            self._save()
            self.display.say(f"{interrupted} at step {self.trainer.step} of {self.options.steps}; saved")
            if self.trainer.step == self.options.steps and self.trainer.step in self._held_out_losses():
                # Only the sample was interrupted, so the run is complete.
                self._say_results()
            else:
                self.display.say(f"go on with: dora-fx finetune --resume {self.folder.path}")
            return interrupted.exit_code
        self._save()
        self._say_results()
        return 0

    def _can_save_after(self, interrupted: Interrupted) -> bool:
        # A save needs every rank, and after a second signal the others may be anywhere.
        ranks_are_here = self.ranks.world_size == 1 or interrupted.on_every_process
        return ranks_are_here and not self.trainer.is_updating

    def _restore(self) -> None:
        try:
            self.trainer.load(self.folder.checkpoint)
        except (CheckpointError, ValueError) as error:
            raise UserError(f"--resume {self.folder.path}: {error}") from error
        step, steps = self.trainer.step, self.options.steps
        if step > steps:
            raise UserError(
                f"--steps: found {steps}, but the run in {self.folder.path} was saved at step {step}; expected more "
                "than that to go on, or another folder to start anew"
            )
        if step == steps and step in self._held_out_losses():
            raise UserError(f"--resume {self.folder.path}: all of its {step} steps are done; more with --steps")
        self.ranks.from_main(self.folder.drop_rows_after, step)
        self.ranks.from_main(self.folder.write_config, saved_options(self.options))
        self.saved_step = self._first_step = step
        self.display.say(f"resumed at step {step} of {steps}")

    def _train(self) -> None:
        options, trainer = self.options, self.trainer
        with self.display.training(trainer.step, options.steps) as shown:
            if options.compile != "none" and not options.check and trainer.step < options.steps:
                shown.say("the first step compiles the model for training, once")
            while trainer.step < options.steps:
                self._train_step(shown)
                self.stop.raise_if_requested()
                if trainer.step == options.steps:
                    break
                if self._is_measured(trainer.step):
                    self._measure_held_out(shown.say)
                    if self._lost_patience():
                        shown.say(f"no lower held-out loss in {options.patience} measurements: stopped early")
                        break
                if options.save_every and trainer.step % options.save_every == 0:
                    self._save()
        self._save()

    def _is_measured(self, step: int) -> bool:
        """Return whether the held-out loss is measured after this step, apart from the last one."""
        options = self.options
        return step < options.steps and bool(options.measuring_interval) and step % options.measuring_interval == 0

    def _train_step(self, shown: TrainingDisplay) -> None:
        try:
            metrics = self.trainer.train_step()
        except Exception:
            # Ctrl-C on a terminal also reaches a C++ compiler that Inductor runs, whose failure makes the step fail.
            if not self.stop.requested:
                raise
            logger.debug("the current step failed after a signal", exc_info=True)
            return
        row = {name: getattr(metrics, name) for name in _ROW}
        if metrics.problem is None:
            self._enter(row)
            shown.show(metrics)
            return
        self._enter({name: value for name, value in row.items() if math.isfinite(value)} | {"skipped": 1})
        shown.say(f"warning: step {metrics.step} made no update: {metrics.problem}")
        self._give_up_maybe(metrics.problem)

    def _give_up_maybe(self, problem: str) -> None:
        """Save the state after the last update and raise UserError if too many steps in a row made no update.

        The saved step count is that of the last update, so that a resumed run takes the failed steps again.
        """
        trainer, last = self.trainer, self.trainer.step
        since = self._first_step if trainer.last_update is None else trainer.last_update
        if last - since < min(_MOST_SKIPPED, self.options.steps - self._first_step):
            return
        if trainer.last_update is None:
            saved = "nothing was trained" + f" since step {since}, which is saved" * bool(since)
        else:
            trainer.go_back_to_last_update()
            self._save()
            saved = f"the state after step {since} is saved in {self.folder.path}"
        raise UserError(
            f"the {last - since} steps up to step {last} made no update, at the last of them because {problem}; "
            f"{saved}; a smaller --lr may help"
        )

    def _check(self) -> None:
        with self.display.phase("checking that what should train trains"):
            report = self.trainer.check()
        self.display.say(str(report))
        if report.failed:
            raise UserError(f"--check: {report.failed[0].name}: {report.failed[0].text}")

    def _measure(self) -> None:
        """Measure the held-out loss and generate a sample, before the first step and after the last, unless done."""
        step = self.trainer.step
        if step not in self._held_out_losses():
            once = " (and compiling for it, once)" if step == 0 and self.options.compile != "none" else ""
            with self.display.phase(f"measuring the held-out loss{once}"):
                self._measure_held_out(self.display.say)
        if self.options.sample_tokens and step not in self.ranks.from_main(self.folder.read_samples):
            with self.display.phase("generating a sample"):
                self._generate()

    def _measure_held_out(self, say: Callable[[str], None]) -> None:
        measured = self.trainer.held_out(between=self.stop.raise_if_requested)
        self._enter({"step": self.trainer.step, **measured})
        say(f"held-out loss at step {self.trainer.step}: {measured['held_out_loss']:.4f}")
        self._keep_best()

    @contextmanager
    def _logging(self) -> Iterator[None]:
        names = self.options.logs if self.ranks.is_main else []
        log = training_log(names, self.folder.path, saved_options(self.options), self.trainer.step + 1)
        with ExitStack() as opened:
            self._log = self.ranks.together(opened.enter_context, log)
            yield

    def _enter(self, row: dict[str, float]) -> None:
        if self.ranks.is_main:
            self.folder.append_metrics(row)
            self._log(row)

    def _keep_best(self) -> None:
        """Keep the adapters if their held-out loss is among the lowest, and remove those that no longer are."""
        step, losses = self.trainer.step, self._held_out_losses()
        losses.pop(0, None)
        best = _best_first(losses)[: self.options.keep]
        if step in best:
            self.ranks.from_main(self.folder.make_best)
            with _saving():
                self.trainer.save(self.folder.best_of(step), with_optimizer=False)
        self.ranks.from_main(self.folder.drop_best_but, best)

    def _lost_patience(self) -> bool:
        losses = self._held_out_losses()
        best = next(iter(_best_first(losses)), -1)
        return 0 < self.options.patience <= sum(measured > best for measured in losses)

    def _generate(self) -> None:
        tokens = generate_greedily(
            self.trainer.passes,
            self.prompt,
            self.options.sample_tokens,
            self.tokenizer.end,
            self.device,
            between=self.stop.raise_if_requested,
        )
        if self.ranks.is_main:
            text = self.tokenizer.text
            self.folder.append_sample(self.trainer.step, text(self.prompt), text(tokens))

    def _held_out_losses(self) -> dict[int, float]:
        return self._measured("held_out_loss")

    def _measured(self, name: str) -> dict[int, float]:
        rows = self.ranks.from_main(self.folder.read_metrics)
        return {row["step"]: row[name] for row in rows if name in row}

    def _save(self) -> None:
        """Save the state unless it is saved already, and draw the loss curve; every rank calls it."""
        if self.saved_step != self.trainer.step:
            with _saving():
                self.trainer.save(self.folder.checkpoint)
            self.saved_step = self.trainer.step
        self.ranks.from_main(self.folder.draw_loss_curve, self._title())

    def _say_results(self) -> None:
        say, folder = self.display.say, self.folder
        losses, samples = self._held_out_losses(), self.ranks.from_main(folder.read_samples)
        step = self.trainer.step
        after, last = losses[step], samples.get(step)
        # If files were removed during the run, the values at its start are missing.
        before, first = losses.get(0), samples.get(0)
        compared = "" if before is None else f"{before:.4f} before, "
        say(f"\nheld-out loss: {compared}{after:.4f} after" + ("" if before is None else f" ({after - before:+.4f})"))
        certain = self._measured("held_out_certain")
        if step in certain:
            compared = f"{certain[0]} before, " if 0 in certain else ""
            of_all = f"{certain[step]} after, of {self.trainer.num_held_out}"
            say(f"held-out samples that are certain to be answered word for word: {compared}{of_all}")
        if skipped := self.ranks.from_main(folder.count_skipped):
            say(f"warning: {skipped} of {step} steps made no update, as their loss or gradients were not finite")
        if self.options.sample_tokens and last is not None:
            say(f"prompt:  {last['prompt']!r}")
            if first is not None:
                say(f"before:  {first['text']!r}")
            say(f"after:   {last['text']!r}")
        best = next(iter(_best_first(losses)), step)
        if best not in (0, step) and self.ranks.from_main(folder.best_of(best).is_dir):
            say(f"best held-out loss: {losses[best]:.4f} at step {best}, kept in {folder.best_of(best)}")
        say(f"\nrun folder: {folder.path}\n  loss curve: {folder.loss_curve.name}   adapter: {folder.checkpoint.name}")
        say("\nwhat comes next:")
        path = shlex.quote(str(folder.path))
        for command, meaning in _NEXT:
            say(f"  # {meaning}\n  dora-fx {command.format(run=path, more=2 * self.options.steps)}")

    def _title(self) -> str:
        """Return the title of the loss curve: the base, the data and the rank."""
        options, text = self.options, _DEMO_TITLES.get(self.options.demo)
        base = "SmolLM2-135M" if options.base == "smollm2" else shown_name(options.base)
        return f"{base} on {text or shown_name(str(options.data))}: DoRA of rank {options.dim}"


_DEMO_TITLES = {"pirate": "a pirate's answers", "text": "Python's language reference"}


def _best_first(losses: dict[int, float]) -> list[int]:
    """Return the steps with finite held-out losses, the lowest loss first; of equal losses, the earlier step first."""
    measured = [step for step, loss in losses.items() if math.isfinite(loss)]
    return sorted(measured, key=lambda step: (losses[step], step))


@contextmanager
def _saving() -> Iterator[None]:
    """Convert CheckpointError in the block to UserError."""
    try:
        yield
    except CheckpointError as error:
        raise UserError(str(error)) from error
