"""The training loop.

A step: draw the batch of this step, forward and backward `grad_accum_steps` times, clip the gradient's norm, AdamW. At every evaluation
the training and validation loss are measured on fixed text with dropout off, a line goes to metrics.jsonl, better weights go to
model.safetensors, and a checkpoint is written.

Everything a step depends on is a function of the step (batch, learning rate) or is in the checkpoint (weights, moments, random-number
state, plan), so a resumed run repeats the uninterrupted one bit for bit on the CPU with the same number of threads.

A time budget becomes a number of steps after its first seconds (`fastgpt.train.plan`). It is a plan, not a stopwatch: on a machine
that slows down later, the run takes longer.

Of several processes (fastgpt.train.parallel) each trains on its rows of every batch; rank 0 writes and speaks.

The run stops early, and says why in plain words, when Ctrl-C comes (a checkpoint is written first), when the loss is no longer a finite
number, and when the validation loss has not improved for `patience` evaluations.
"""

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fastgpt.data.loader import EvalBatches, Loader
from fastgpt.errors import UserError
from fastgpt.model import GPT, load_model
from fastgpt.model.weights import save_tensors
from fastgpt.terminal import counted
from fastgpt.train.checkpoint import TrainState, latest_checkpoint, load_checkpoint, save_checkpoint
from fastgpt.train.evaluate import autocast, bigram_loss, bits_per_byte, choose_dtype, fit_bigram, mean_loss
from fastgpt.train.files import explain_writing, remove_leftovers
from fastgpt.train.metrics import Metrics, plot_losses
from fastgpt.train.optimizer import build_optimizer, update
from fastgpt.train.outcome import Outcome, diverged, finished, interrupted, out_of_patience
from fastgpt.train.parallel import Group, Parallel, device_of, explain_loss, lost_peer
from fastgpt.train.plan import Budget, eval_interval
from fastgpt.train.progress import Pace, Progress, duration
from fastgpt.train.report import parting
from fastgpt.train.run import KEEP_CHECKPOINTS, Run, choose_device, write_config, write_summary
from fastgpt.train.schedule import Schedule
from fastgpt.train.signals import StopSignals
from fastgpt.train.track import Tracking, tracker_names

PLOT_INTERVAL_S = 5.0
ALONE = Group()


def _nothing(message: str) -> None:
    """What the ranks other than 0 say."""


class Trainer:
    """Trains the model of a run.

    Args:
        run: a complete run folder, new or to be gone on with.
        say: receives lines for the user before the bar is up.
        group: the processes that train together; each makes a Trainer and calls the same methods.

    Raises:
        UserError: a damaged or foreign checkpoint, a device that is not there.

    Example:
        >>> outcome = Trainer(start_run(load_config(), Path("run"), print), print).fit()  # doctest: +SKIP
    """

    def __init__(self, run: Run, say: Callable[[str], None], group: Group = ALONE) -> None:
        options = run.config.train
        self.run, self.options, self.group = run, options, group
        self.say = say if group.main else _nothing
        self.device = device_of(choose_device(options.device), group)
        self.dtype = choose_dtype(options.dtype, self.device)
        if options.threads:
            torch.set_num_threads(options.threads)
        torch.manual_seed(options.seed)
        self.model = GPT(run.model_config()).to(self.device)
        self.model.activation_checkpointing = options.activation_checkpointing
        self.parallel = Parallel(self.model, group, options.parallel)
        if group.rank:  # the same weights on all ranks, but a dropout of its own on each
            torch.manual_seed(options.seed + group.rank)
        self.optimizer = build_optimizer(
            self.model,
            learning_rate=options.learning_rate,
            weight_decay=options.weight_decay,
            betas=(options.beta1, options.beta2),
        )
        block_size = self.model.config.block_size
        self.loader = Loader(
            run.tokens.train,
            block_size,
            options.batch_size,
            options.seed,
            order=run.config.data.order,
            rank=group.rank,
            world_size=group.world_size,
        )
        self.eval_train = EvalBatches(
            run.tokens.train, block_size, options.batch_size, options.eval_tokens, what="training"
        )
        self.eval_val = EvalBatches(run.tokens.val, block_size, options.batch_size, options.eval_tokens)
        self.final_val = EvalBatches(run.tokens.val, block_size, options.batch_size, options.final_eval_tokens)
        self.bigram = fit_bigram(run.tokens.train, run.tokenizer.n_vocab) if group.main else None
        self.bigram_val_loss = bigram_loss(self.bigram, self.eval_val) if self.bigram is not None else math.nan
        self.metrics = Metrics(run.folder / "metrics.jsonl")
        self.state = TrainState(threads=torch.get_num_threads())
        self.last_good = group.agree(latest_checkpoint(run.folder))
        if self.last_good is not None:
            self._restore(self.last_good)
        if group.main:
            remove_leftovers(run.folder)
            write_config(run)
            self.metrics.keep_until(self.state.step if self.last_good is not None else -1)
        self._plan()
        self.tracking = Tracking([], run.folder, {}, 0, self.say)
        self.signals, self._stop = StopSignals(several=group.world_size > 1), False
        self.pace, self._plotted = Pace(), 0.0

    def _restore(self, checkpoint: Path) -> None:
        threads = self.state.threads
        self.state = load_checkpoint(checkpoint, self.model, self.optimizer, self.group)
        self.say(f"resuming from {checkpoint}")
        if self.state.threads != threads:
            self.say(
                f"note: this run used {counted(self.state.threads, 'CPU thread')} and now has {threads}; "
                "the losses will differ in the last bits"
            )
            self.state.threads = threads

    @property
    def description(self) -> str:
        """One line: the model, the device, the number format."""
        config, words = self.model.config, str(self.dtype).removeprefix("torch.")
        threads = f" with {counted(self.state.threads, 'thread')}" if self.device.type == "cpu" else ""
        if self.group.world_size > 1:
            threads += f", {self.group.world_size} processes ({self.options.parallel})"
        return (
            f"model: {self.model.n_params() / 1e6:.2f} M parameters, {config.n_layer} layers, {config.n_head} heads, "
            f"{config.n_embd} wide, block {config.block_size}; {words} on {self.device}{threads}"
        )

    # The plan: how many steps, how often to evaluate.

    def _plan(self) -> None:
        """Fix the length where it does not depend on a measurement."""
        state, options = self.state, self.options
        if options.max_steps is not None:
            state.max_steps = options.max_steps
        elif options.epochs is not None:
            state.max_steps = math.ceil(options.epochs * self.loader.steps_per_epoch(options.grad_accum_steps))
        if options.eval_interval is not None:
            state.eval_interval = options.eval_interval
        elif state.max_steps is not None and state.eval_interval is None:
            state.eval_interval = eval_interval(state.max_steps)

    def _schedule(self) -> Schedule:
        options = self.options
        floor = options.learning_rate / 10 if options.min_lr is None else options.min_lr
        return Schedule(options.learning_rate, floor, options.warmup_steps, self.state.max_steps)

    # One step, one evaluation.

    def _step(self, learning_rate: float) -> float | None:
        """One optimizer step; the loss, or None where the loss or the gradient is not finite (then nothing was updated)."""
        options, accum = self.options, self.options.grad_accum_steps
        total = torch.zeros((), device=self.device)
        for micro in range(accum):
            x, y = self.loader.batch(self.state.step, micro, accum)
            with self.parallel.part(last=micro == accum - 1):
                with autocast(self.device, self.dtype):
                    _, loss = self.parallel.forward(x.to(self.device), y.to(self.device), need_logits=False)
                (loss / accum if accum > 1 else loss).backward()
            total += loss.detach()
        value = self._mean_and_signal(total) / accum
        return value if update(self.optimizer, value, learning_rate, options.grad_clip) else None

    def _mean_and_signal(self, loss: torch.Tensor) -> float:
        """The mean of a loss over the ranks; in the same exchange they learn whether a signal has come to one of them."""
        if self.group.world_size == 1:
            self._stop = self.signals.number != 0
            return loss.item()
        mine = torch.stack([loss, torch.full_like(loss, float(self.signals.number != 0))])
        total, signals = self.group.sum(mine).tolist()
        self._stop = signals > 0
        return total / self.group.world_size

    def _mean_loss(self, batches: EvalBatches) -> float:
        return mean_loss(self.model, batches, self.device, self.dtype, self.group)

    def _evaluate(self, progress: Progress, learning_rate: float) -> bool:
        """Measure, record, keep better weights; False where the validation loss is not finite."""
        state = self.state
        train_loss, val_loss = self._mean_loss(self.eval_train), self._mean_loss(self.eval_val)
        if not math.isfinite(val_loss):
            return False
        speed = self.pace.take()
        better = state.note(train_loss, val_loss)
        if better:
            weights = self.parallel.weights()
            if self.group.main:
                save_tensors(weights, self.model.config, self.run.folder / "model.safetensors")
        self._record(
            {
                "step": state.step,
                "train_loss": train_loss,
                "val_loss": val_loss,
                "bigram_val_loss": self.bigram_val_loss,
                "val_bits_per_byte": bits_per_byte(val_loss, self.run.tokens.bytes_per_token("val")),
                "tokens_per_s": round(speed, 1),
                "lr": learning_rate,
                "elapsed_s": round(state.elapsed_s, 3),
            }
        )
        words = f"step {state.step:,}: training loss {train_loss:.4f}, validation loss {val_loss:.4f}"
        words += f" (bigram {self.bigram_val_loss:.4f})"
        progress.say(words + (f", {speed:,.0f} tokens/s" if speed else ""))
        if not better and not state.warned_overfitting and (warning := parting(state, train_loss, val_loss)):
            state.warned_overfitting = True
            progress.say(warning)
        return True

    def _record(self, line: dict[str, Any]) -> None:
        if self.group.main:
            self.metrics.append(line)
            self.tracking.log(line)

    def _start_tracking(self) -> None:
        if self.group.main:
            parts = self.run.config.to_dict().items()
            config = {f"{part}.{key}": value for part, items in parts for key, value in items.items()}
            names = tracker_names(self.options.track)
            self.tracking = Tracking(names, self.run.folder, config, self.state.step, self.say)

    def _save(self) -> None:
        if self.last_good is not None and self.last_good.name == f"step-{self.state.step:06d}":
            return
        self.last_good = save_checkpoint(
            self.run.folder, self.model, self.optimizer, self.state, keep=KEEP_CHECKPOINTS, group=self.group
        )

    def _plot(self) -> None:
        if not self.group.main:
            return
        config = self.model.config
        title = (
            f"{self.run.folder.name}: {self.model.n_params() / 1e6:.2f} M parameters, vocabulary {config.vocab_size:,}"
        )
        plot_losses(self.metrics.lines, self.run.folder / "loss.png", title)
        self._plotted = time.monotonic()

    # The whole.

    def fit(self) -> Outcome:
        """Train until the run's length is reached or something stops it.

        Raises:
            UserError: a file of the run cannot be written; the message names the last good checkpoint.
        """
        state, options = self.state, self.options
        if state.max_steps is not None and state.step >= state.max_steps:
            self.say(f"the run is finished: step {state.step:,} of {state.max_steps:,}; --train.max_steps N goes on")
            return Outcome("finished", "", state)
        if options.patience and state.evals_without_better >= options.patience:
            return self._out_of_patience()
        precision = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision(options.matmul_precision)
        progress = Progress(state.step, state.max_steps, quiet=not self.group.main)
        try:
            with (
                self.signals,
                explain_writing(self.run.folder, "see --resume for going on from the last checkpoint"),
            ):
                self._start_tracking()
                return self._loop(progress)
        except RuntimeError as error:
            if self.group.world_size == 1 or not lost_peer(error):
                raise
            raise self._explained(explain_loss(error, self.group, self.run.folder)) from error
        except UserError as error:
            raise self._explained(error) from error
        finally:
            progress.close()
            self.tracking.close()
            torch.set_float32_matmul_precision(precision)

    def _explained(self, error: UserError) -> UserError:
        """The error with the last good checkpoint, if there is one."""
        return error if self.last_good is None else UserError(f"{error}; last good checkpoint: {self.last_good}")

    def _loop(self, progress: Progress) -> Outcome:
        state, options = self.state, self.options
        batch_tokens = options.batch_size * options.grad_accum_steps * self.loader.block_size
        schedule = self._schedule()
        self.model.train()
        budget = None
        if state.max_steps is None and options.time_budget_s is not None:
            budget = Budget(options.time_budget_s, options.eval_interval)
        begun, before = time.monotonic(), state.elapsed_s
        if self.last_good is None:
            if not self._evaluate(progress, schedule.at(0)):
                return self._diverged(schedule)
            self._save()
            if budget is not None:
                budget.eval_s = time.monotonic() - begun
        while state.max_steps is None or state.step < state.max_steps:
            started = time.monotonic()
            loss = self._step(schedule.at(state.step))
            if loss is None:
                return self._diverged(schedule)
            state.step += 1
            now = time.monotonic()
            state.elapsed_s = before + now - begun
            self.pace.add(batch_tokens, now - started)
            progress.update(state.step, loss, self.pace.tokens_per_s)

            if budget is not None and (plan := self._planned(budget, now - started)):
                state.max_steps, state.eval_interval = plan
                schedule = self._schedule()
                progress.set_max_steps(state.max_steps)
                progress.say(
                    f"plan: {state.max_steps:,} steps in {duration(budget.seconds)}, "
                    f"an evaluation every {state.eval_interval:,}"
                )
                budget = None
            last = state.max_steps is not None and state.step >= state.max_steps
            evaluated = last or (state.eval_interval is not None and state.step % state.eval_interval == 0)
            if evaluated and not self._evaluate(progress, schedule.at(state.step)):
                return self._diverged(schedule)
            state.elapsed_s = before + time.monotonic() - begun
            every = options.checkpoint_interval
            if last or (evaluated if every is None else state.step % every == 0):
                self._save()
            if evaluated and (last or time.monotonic() - self._plotted > PLOT_INTERVAL_S):
                self._plot()
            if evaluated and options.patience and state.evals_without_better >= options.patience and not last:
                return self._out_of_patience()
            came = self._stop or (self.signals.number and self.group.world_size == 1)  # during the step, or since
            if came and not last:
                return self._interrupted()
        return finished(state)

    def _planned(self, budget: Budget, step_s: float) -> tuple[int, int] | None:
        """Rank 0's plan for all, once it knows enough."""
        known = budget.add(step_s, self.state.elapsed_s)
        return self.group.agree(budget.plan(self.state.step, self.state.elapsed_s) if known else None)

    def _interrupted(self) -> Outcome:
        self._save()
        self._plot()
        return interrupted(self.state, self.run.folder, self.group, self.signals.number)

    def _out_of_patience(self) -> Outcome:
        self._save()
        self._plot()
        return out_of_patience(self.state)

    def _diverged(self, schedule: Schedule) -> Outcome:
        return diverged(self.state, schedule.at(self.state.step), self.last_good)

    def finish(self) -> dict[str, Any]:
        """Evaluate the best weights and the baseline on the same validation tokens, and write summary.json with what it returns.

        For rank 0 alone.
        """
        assert self.bigram is not None
        best = load_model(self.run.folder / "model.safetensors").to(self.device)
        val_loss = mean_loss(best, self.final_val, self.device, self.dtype)
        bigram = bigram_loss(self.bigram, self.final_val)
        speeds = [line["tokens_per_s"] for line in self.metrics.lines if line["tokens_per_s"]]
        bytes_per_token = self.run.tokens.bytes_per_token("val")
        summary = {
            "steps": self.state.step,
            "best_step": self.state.best_step,
            "val_loss": val_loss,
            "bigram_val_loss": bigram,
            "val_bits_per_byte": bits_per_byte(val_loss, bytes_per_token),
            "bigram_val_bits_per_byte": bits_per_byte(bigram, bytes_per_token),
            "val_tokens": self.final_val.n_tokens,
            "n_params": self.model.n_params(),
            "tokens_per_s": sum(speeds) / len(speeds) if speeds else 0.0,
            "elapsed_s": round(self.state.elapsed_s, 3),
            "dtype": str(self.dtype).removeprefix("torch."),
            "device": str(self.device),
            "threads": self.state.threads,
        }
        write_summary(self.run.folder, summary)
        return summary
