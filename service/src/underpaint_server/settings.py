"""Every setting of the server: a flag, an environment variable and a default, from one declaration."""

import os
import re
from enum import StrEnum
from typing import Annotated, Self

from pydantic import AfterValidator, Field, model_validator
from pydantic_settings import BaseSettings, CliPositionalArg, NoDecode, SettingsConfigDict

_MIB = 1024 * 1024

EMBEDDED_MODEL = "underpaint-mini"
"""Id of the model that is served when none is named."""


_ADDRESS = re.compile(r"(?:[^\s:\[\]]+|\[[0-9A-Fa-f:.]+\]):(\d{1,5})")


def usable_cores() -> int:
    """Cores that this process may run on: fewer than the machine has where it is confined to some."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _check_address(value: str) -> str:
    found = _ADDRESS.fullmatch(value)
    if found is None or int(found[1]) > 65535:
        raise ValueError(f"'{value}' is not HOST:PORT, such as 127.0.0.1:50051 or [::1]:50051")
    return value


Address = Annotated[str, AfterValidator(_check_address)]


class Device(StrEnum):
    """Where the network runs."""

    AUTO = "auto"
    CPU = "cpu"
    CUDA = "cuda"


class Dtype(StrEnum):
    """Number format of the network. Latent state is float64 whatever this says."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


class LogLevel(StrEnum):
    """From which level on a line is written."""

    DEBUG = "debug"
    INFO = "info"
    WARNING = "warning"
    ERROR = "error"


class ExactBatching(StrEnum):
    """How exact jobs get the same bits in both directions."""

    AUTO = "auto"
    PINNED = "pinned"


class Settings(BaseSettings):
    """Settings of one server process; ``--kebab-case`` flags, then ``UNDERPAINT_*`` variables, then these defaults.

    ``underpaint-server check-model DIRECTORY`` tries a checkpoint without serving it.
    """

    model_config = SettingsConfigDict(
        env_prefix="UNDERPAINT_",
        frozen=True,
        extra="forbid",
        use_attribute_docstrings=True,
        cli_kebab_case=True,
        cli_prog_name="underpaint-server",
        cli_hide_none_type=True,
        cli_avoid_json=True,
    )

    listen: Address = "127.0.0.1:50051"
    """Address of the gRPC port; port 0 takes a free one, named in the log."""
    metrics_listen: Address = "127.0.0.1:9464"
    """Address of the Prometheus port (/metrics); port 0 takes a free one."""
    models: Annotated[tuple[str, ...], NoDecode] = ()
    """Models as ID=DIRECTORY, separated by commas, the default first; ID= alone, or nothing at all, is the embedded
    underpaint-mini, and ID=underpaint-mini-ddpm the embedded model without text."""
    clips: Annotated[tuple[str, ...], NoDecode] = ()
    """CLIPs that directions are learned by, as ID=DIRECTORY of a transformers CLIPModel or VisionTextDualEncoderModel,
    separated by commas. A folder named clip in or beside a model is found without."""
    vgg: str = ""
    """VGG16's weights as safetensors, with torchvision's names: learned directions then keep the content by them, as in
    the paper. Empty takes the model's own autoencoder."""
    learn_share: float = Field(0.25, gt=0, le=1)
    """Share of the device's time that learning may take while other work waits."""
    allow_network: bool = False
    """Let ID=DIRECTORY also be ID=HUB_ID, fetched from the Hugging Face hub."""
    device: Device = Device.AUTO
    """Where the network runs; auto takes CUDA when there is one."""
    dtype: Dtype = Dtype.FLOAT32
    """Number format of the network."""
    threads: int = Field(0, ge=0)
    """CPU threads of the engine; 0 takes all cores. Must be equal on servers that share a store: exactness needs it."""
    exact_batching: ExactBatching = ExactBatching.AUTO
    """auto: measure at start whether a row's bits depend on the batch size, and pin exact jobs only if they do."""
    exact_batch_class: int = Field(4, ge=2, le=64)
    """Rows of the passes that exact jobs are pinned to, where they must be."""
    max_batch_size: int = Field(16, ge=2, le=256)
    """Rows of one forward pass at most."""
    max_running: int = Field(16, ge=1)
    """Jobs that take part in passes at one time; learning has its share of the passes and takes no place."""
    queue_capacity: int = Field(64, ge=0)
    """Jobs that may wait for a place among those."""
    max_image_bytes: int = Field(16 * _MIB, ge=1)
    """Bytes of one encoded image."""
    max_image_pixels: int = Field(4096 * 4096, ge=1)
    """Pixels of one image, read from its header before it is decoded."""
    max_message_bytes: int = Field(24 * _MIB, ge=1)
    """Bytes of one gRPC message, either way."""
    max_steps: int = Field(200, ge=1, le=1000)
    """Steps of one schedule."""
    max_prompt_chars: int = Field(2000, ge=1)
    """Characters of one prompt."""
    max_mask_samples: int = Field(64, ge=1)
    """Noise samples of one DiffEdit mask."""
    store_url: str = "memory:///"
    """Where inversions, directions and operations live: memory:///, file:///path, s3://bucket/prefix."""
    store_bytes: int = Field(1024 * _MIB, ge=1)
    """Bytes of inversions kept; the least recently used goes first."""
    store_ttl_s: float = Field(24 * 3600, gt=0)
    """Seconds an inversion is kept after its last use."""
    max_learning: int = Field(1, ge=0, le=64)
    """Directions learned here at one time; 0 leaves learning to other servers of the same store."""
    max_operations: int = Field(64, ge=1)
    """Operations that may be unfinished at one time, over all servers of the store."""
    learn_checkpoint_every: int = Field(2, ge=1, le=200)
    """Optimiser steps of a learned direction after which its state is stored."""
    claim_ttl_s: float = Field(30, ge=0.2, le=3600)
    """Seconds after which an operation whose server fell silent is gone on with by another."""
    operation_ttl_s: float = Field(7 * 24 * 3600, gt=0)
    """Seconds a finished operation is remembered."""
    replay_ttl_s: float = Field(600, gt=0)
    """Seconds the answer to a request id is kept for a repeat of the same request."""
    replay_bytes: int = Field(256 * _MIB, ge=0)
    """Bytes of such answers kept."""
    drain_s: float = Field(120, ge=0)
    """Seconds that running work may take after SIGTERM."""
    log_level: LogLevel = LogLevel.INFO
    """From which level on a line is written."""

    @property
    def model_locations(self) -> tuple[tuple[str, str], ...]:
        """(id, place) of every model, the default first; an empty place is the embedded model."""
        pairs = tuple((name, place) for name, _, place in (spec.partition("=") for spec in self.models))
        return pairs or ((EMBEDDED_MODEL, ""),)

    @property
    def clip_directories(self) -> dict[str, str]:
        """Id of a model -> directory of its CLIP."""
        return {name: place for name, _, place in (spec.partition("=") for spec in self.clips)}

    @model_validator(mode="before")
    @classmethod
    def _split_lists(cls, values: dict[str, object]) -> dict[str, object]:
        for key in ("models", "clips"):
            given = values.get(key)
            if isinstance(given, str):
                values[key] = tuple(part.strip() for part in given.split(",") if part.strip())
        return values

    @model_validator(mode="after")
    def _check(self) -> Self:
        for spec in self.models:
            name, equals, _ = spec.partition("=")
            if not name or not equals:
                raise ValueError(f"models: '{spec}' is not ID=DIRECTORY")
        for spec in self.clips:
            name, _, place = spec.partition("=")
            if not name or not place:
                raise ValueError(f"clips: '{spec}' is not ID=DIRECTORY")
        return self


class CheckSettings(Settings):
    """Try a checkpoint as the server would load it, without serving it; exit status 1, and why, if it cannot be served.

    Takes the server's flags and variables; those that decide how a model runs (--device, --dtype, --threads,
    --exact-batching, --exact-batch-class, --max-batch-size, --allow-network) count here.
    """

    model_config = SettingsConfigDict(cli_prog_name="underpaint-server check-model")

    directory: CliPositionalArg[str] = ""
    """A diffusers pipeline directory; empty is the embedded underpaint-mini."""
