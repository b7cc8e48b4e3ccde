"""The one training loop: seeded, time-boxed or step-boxed, averaged, resumable; on a GPU or a few CPU cores."""

import argparse
import copy
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from recipe.files import write_whole

CALIBRATION_STEPS = 2


@dataclass(frozen=True, slots=True)
class Options:
    """How long and how fast to train."""

    name: str
    """Of the checkpoint, ``work/NAME.pt``, and of what is written in the end, ``work/NAME``."""
    work: Path
    device: torch.device
    batch: int
    rate: float
    """Peak learning rate: warmed up over ``warmup`` steps, then a cosine to 2 % of it."""
    steps: int | None = None
    seconds: float | None = None
    """Training ends at whichever of the two comes first, counted over all resumptions."""
    seed: int = 0
    warmup: int = 200
    weight_decay: float = 0.01
    averaging: float = 0.999
    dtype: str = "auto"
    report_every_s: float = 20.0
    save_every_s: float = 60.0

    @property
    def checkpoint(self) -> Path:
        """Where the state of the training is kept."""
        return self.work / f"{self.name}.pt"


@dataclass(frozen=True, slots=True)
class Dice:
    """The randomness of one step: ``cpu`` draws data, alike on every machine; ``device`` draws noise."""

    cpu: torch.Generator
    device: torch.Generator

    @classmethod
    def at(cls, seed: int, step: int, device: torch.device) -> "Dice":
        """The dice of a step, whatever was drawn before it; on the CPU, too, their numbers have nothing in common."""
        number = seed * 1_000_003 + step
        return cls(torch.Generator().manual_seed(number), torch.Generator(device).manual_seed(number + 2**31))


Loss = Callable[[nn.Module, Dice], torch.Tensor]


def arguments(
    description: str | None, name: str, batch: tuple[int, int], rate: float, multiple: int = 1
) -> argparse.ArgumentParser:
    """The arguments that every trainer takes.

    ``batch`` is the default on the CPU and on a GPU; others have to be a multiple of ``multiple``.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--steps", type=_above_zero(int))
    parser.add_argument("--seconds", type=_above_zero(float), help="training ends after this time, or at --steps")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--name", default=name, help="of the checkpoint and of what is written")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=["auto", "bfloat16", "float32"], default="auto", help="auto: the faster")
    parser.add_argument("--batch", type=_above_zero(int), help=f"default {batch[0]} on the CPU, {batch[1]} on a GPU")
    parser.add_argument("--rate", type=_above_zero(float), default=rate)
    parser.set_defaults(batches=batch, multiple=multiple)
    return parser


def _above_zero(kind: Callable[[str], Any]) -> Callable[[str], Any]:
    def number(text: str) -> Any:
        value = kind(text)
        if value <= 0:
            raise argparse.ArgumentTypeError(f"{text} is not above 0")
        return value

    return number


def options(args: argparse.Namespace, **more: Any) -> Options:
    """Options from parsed arguments; ends the program without --steps and --seconds, and at a batch that cannot be."""
    if args.steps is None and args.seconds is None:
        raise SystemExit("say --steps or --seconds")
    device = torch.device(args.device)
    batch = args.batch or args.batches[device.type != "cpu"]
    if batch % args.multiple:
        raise SystemExit(f"--batch {batch} is not a multiple of {args.multiple}")
    given = {key: getattr(args, key) for key in ("name", "work", "rate", "steps", "seconds", "seed", "dtype")}
    return Options(device=device, batch=batch, **given, **more)


class Trainer:
    """A model, its running average, its optimiser and how far they have come."""

    def __init__(self, model: nn.Module, options: Options) -> None:
        self.options = options
        torch.backends.cudnn.benchmark = True  # every step has the same shapes
        self.model = model.to(options.device).train()
        self.average = copy.deepcopy(self.model).eval().requires_grad_(False)
        self.optimiser = torch.optim.AdamW(
            self.model.parameters(), lr=options.rate, weight_decay=options.weight_decay, betas=(0.9, 0.99), fused=True
        )
        self.step, self.spent_s, self.dtype = 0, 0.0, ""
        self._load()

    def fit(self, loss: Loss, report: Callable[[nn.Module], str] | None = None) -> nn.Module:
        """Train until the options' end and return the averaged model; ``report`` of it is printed now and then."""
        if not self.dtype or self.options.dtype != "auto":
            self.dtype = self._choose_dtype(loss)
        before, begin, first = self.spent_s, time.monotonic(), self.step
        reported = saved = begin
        while self.progress < 1:
            value = self._advance(loss)
            now = time.monotonic()
            self.spent_s = before + now - begin
            done = self.progress >= 1
            if done or now - reported >= self.options.report_every_s:
                speed = (self.step - first) * self.options.batch / (now - begin)
                told = f"{self.step} {self.spent_s:.0f}s loss {value.item():.4f} {speed:.0f}/s {self._told(report)}"
                print(told, flush=True)
                reported = time.monotonic()
            if done or now - saved >= self.options.save_every_s:
                self._save()
                saved = time.monotonic()
        return self.average

    @property
    def progress(self) -> float:
        """How much of the training is done, 0 to 1."""
        by_steps = self.step / self.options.steps if self.options.steps else 0.0
        by_time = self.spent_s / self.options.seconds if self.options.seconds else 0.0
        return min(1.0, max(by_steps, by_time))

    def _advance(self, loss: Loss) -> torch.Tensor:
        for group in self.optimiser.param_groups:
            group["lr"] = self.options.rate * self._share_of_rate()
        self.step += 1
        value = self._backward(loss, self.dtype, self.step)
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimiser.step()
        decay = min(self.options.averaging, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            torch._foreach_lerp_(list(self.average.parameters()), list(self.model.parameters()), 1 - decay)
        return value.detach()

    def _share_of_rate(self) -> float:
        warm = min(1.0, (self.step + 1) / self.options.warmup)
        return warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * self.progress)))

    def _backward(self, loss: Loss, dtype: str, step: int) -> torch.Tensor:
        device = self.options.device
        torch.manual_seed(self.options.seed * 1_000_003 + step + 2**30)  # for layers that draw by themselves: DropPath
        self.optimiser.zero_grad()
        with torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bfloat16"):
            value = loss(self.model, Dice.at(self.options.seed, step, device))
        torch.autograd.backward(value)
        return value

    def _choose_dtype(self, loss: Loss) -> str:
        """The asked for, or on a CPU whichever is faster here: bfloat16 pays only where the processor multiplies it."""
        if self.options.dtype != "auto" or self.options.device.type != "cpu":
            return self.options.dtype.replace("auto", "bfloat16")
        took = {dtype: self._time(loss, dtype) for dtype in ("bfloat16", "float32")}
        print(", ".join(f"{dtype} {seconds:.3f} s a step" for dtype, seconds in took.items()), flush=True)
        return min(took, key=lambda dtype: took[dtype])

    def _time(self, loss: Loss, dtype: str) -> float:
        self._backward(loss, dtype, 0)
        times = []
        for _ in range(CALIBRATION_STEPS):
            begin = time.perf_counter()
            self._backward(loss, dtype, 0)
            times.append(time.perf_counter() - begin)
        return min(times)

    def _told(self, report: Callable[[nn.Module], str] | None) -> str:
        with torch.no_grad():
            return report(self.average) if report else ""

    def _save(self) -> None:
        state = {part: getattr(self, part).state_dict() for part in ("model", "average", "optimiser")}
        state |= {"step": self.step, "spent_s": self.spent_s, "dtype": self.dtype}
        write_whole(state, self.options.checkpoint)

    def _load(self) -> None:
        if not self.options.checkpoint.exists():
            return
        state = torch.load(self.options.checkpoint, map_location=self.options.device)
        for part in ("model", "average", "optimiser"):
            getattr(self, part).load_state_dict(state[part])
        self.step, self.spent_s, self.dtype = state["step"], state["spent_s"], state["dtype"]
        print(f"resumed at step {self.step} after {self.spent_s:.0f} s", flush=True)
