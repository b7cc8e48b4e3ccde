"""Every setting of the server: one declaration gives its flag, its environment variable and its default.

The string after each field is its help text in ``underpaint-server --help``.
"""

import difflib
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Final, Literal, Self

from pydantic import AfterValidator, Field, model_validator
from pydantic_settings import BaseSettings, CliPositionalArg, NoDecode, SettingsConfigDict

_MIB = 1024 * 1024

EMBEDDED_MODEL = "underpaint-mini"
"""Id of the model that is served when ``models`` names none."""

_ADDRESS = re.compile(r"(?:[^\s:\[\]]+|\[[0-9A-Fa-f:.]+\]):(\d{1,5})")


MODEL_ID: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")
"""The form of a model's id; it is part of resource names, labels and log lines."""


def _check_address(value: str) -> str:
    match = _ADDRESS.fullmatch(value)
    if match is None or int(match[1]) > 65535:
        raise ValueError(f"'{value}' is not HOST:PORT; write it as 127.0.0.1:50051 or [::1]:50051")
    return value


Address = Annotated[str, AfterValidator(_check_address)]
"""HOST:PORT; the port is 0..65535, an IPv6 host is in brackets."""


Device = Literal["auto", "cpu", "cuda"]
"""Device that the models run on."""
BackendName = Literal["auto", "torch", "openvino", "onnxruntime"]
"""Library that computes the networks."""
Dtype = Literal["auto", "float32", "bfloat16", "float16"]
"""Number format of the denoising network. Latents are float64 between its calls with every choice."""
LogLevel = Literal["debug", "info", "warning", "error"]
"""Lowest level of the log lines that are written."""
ExactBatching = Literal["auto", "pinned"]
"""How equal requests get bitwise equal noise predictions, alone and beside others."""


class Settings(BaseSettings):
    """Serve diffusion inversion and image editing over gRPC.

    A flag (--max-steps) wins over its environment variable (UNDERPAINT_MAX_STEPS), which wins over the default.
    "underpaint-server check-model DIRECTORY" loads and tests a checkpoint without serving it; "underpaint-server
    self-test DIRECTORY" measures whether its results are exact on this machine.
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
    """HOST:PORT that the gRPC server listens on. Port 0 takes a free port; the log names it."""
    metrics_listen: Address = "127.0.0.1:9464"
    """HOST:PORT that serves Prometheus metrics over HTTP, at /metrics. Port 0 takes a free port; the log names it."""
    models: Annotated[tuple[str, ...], NoDecode] = ()
    """Models to serve, as ID=DIRECTORY of a diffusers pipeline, separated by commas. An ID has 1 to 63 of the
    characters a-z, A-Z, 0-9, '.', '_' and '-', and begins with a letter or a digit. Requests that name no model use the
    first. ID= without a directory is the embedded underpaint-mini, ID=underpaint-mini-ddpm the embedded model without a
    text encoder. The default serves underpaint-mini alone."""
    clips: Annotated[tuple[str, ...], NoDecode] = ()
    """CLIP models for learning directions, as ID=DIRECTORY, separated by commas: ID is the id of a served model,
    DIRECTORY holds a transformers CLIPModel or VisionTextDualEncoderModel. A served model without an entry uses the
    directory named clip in or beside its own; without any CLIP it cannot learn directions."""
    vgg: str = ""
    """Safetensors file of VGG16's weights, with torchvision's parameter names. The content loss of learned directions
    then compares VGG16 features, as in the paper. Empty: it compares features of the model's own autoencoder."""
    learn_share: float = Field(0.25, gt=0, le=1)
    """Largest share of the device's time, above 0 and at most 1, that learning directions takes while other jobs wait.
    While no other job waits, learning uses all of it."""
    allow_network: bool = False
    """Also accept ID=HUB_ID in models: what is not a local directory is downloaded from the Hugging Face hub. By
    default nothing is downloaded."""
    device: Device = "auto"
    """Device that the models run on; auto is a CUDA GPU if there is one, else the CPU."""
    backend: BackendName = "auto"
    """Library that computes the networks: torch, openvino (on a CPU) or onnxruntime (on a CPU; on a GPU with
    onnxruntime-gpu). auto takes the fastest one that is installed and can compute the model: on a CPU openvino, then
    onnxruntime, then torch; on a GPU torch. Gradients of learned directions are always computed with torch."""
    dtype: Dtype = "auto"
    """Number format of the denoising network. auto is bfloat16 on a GPU, and on a CPU that computes in it with the
    openvino backend, else float32. Half precision needs about half the memory of float32 and is less precise; latents
    are float64 with every choice."""
    threads: int = Field(0, ge=0)
    """CPU threads of the engine process; 0 uses all cores that the process may run on, by its CPU affinity and by the
    CPU quota of its control group (a container's CPU limit). Servers that share a store must use the same number,
    because exact inversions can be used only by servers that compute bitwise equal results."""
    exact_batching: ExactBatching = "auto"
    """Whether all forward passes of the network have one fixed number of rows. auto: measure at startup whether that
    number changes the bits of a noise prediction, and fix it only if it does; it is also fixed for images that do not
    have the model's own size. pinned: always fix it. The backends openvino and onnxruntime compute each row of a pass
    by itself where torch fixes their number. Either way, results have the same bits whatever else the server does."""
    exact_batch_class: int = Field(0, ge=0, le=64)
    """Rows of each forward pass where that number is fixed (see exact-batching), at least 2 and at most max-batch-size.
    A larger number makes a busy server faster and a lone request slower. 0 measures passes of 2, 4, 8 and 16 rows when
    a model is first loaded on a machine, and keeps the choice in cache-dir. Passes of images of more than twice the
    model's area have fewer. Servers that share a store should be given the same number, because a choice by measurement
    may differ between them; a stored inversion is always used with the number it was made with."""
    exact_batching_s: float = Field(60, gt=0)
    """Seconds that the measurement of exact-batching may take when a model is first loaded on a machine. If it takes
    longer, every pass has exact-batch-class rows, until "underpaint-server self-test" has measured the model
    completely. That makes a busy server slower and changes no result."""
    max_batch_size: int = Field(16, ge=2, le=256)
    """Largest number of rows (latents) in one forward pass. A larger number makes better use of the device and needs
    more of its memory."""
    reuse_bytes: int = Field(256 * _MIB, ge=0)
    """Device memory in bytes for what the engine keeps of its work to use it again: inverting the same image with the
    same options, encoding the same image or prompt, the masks of DiffEdit. The default is 256 MiB. 0 keeps nothing, and
    also computes separately what several running requests have in common. Results have the same bits with every
    value."""
    max_running: int = Field(16, ge=1)
    """Jobs of each priority that run at one time and share forward passes, so that none takes the places of another.
    Jobs that learn directions are not counted; learn-share limits those."""
    spare_engine: bool = True
    """Whether to keep a second engine process that has loaded its libraries, but no model and nothing on the device. If
    the engine process ends, a spare one replaces it several seconds sooner. It takes about 250 MB of memory."""
    stall_s: float = Field(10, ge=1, le=3600)
    """Seconds without any progress after which the engine process is replaced. During a forward pass it is replaced
    only after ten times the longest such pass so far, and not while it computes slowly on a busy machine."""
    queue_capacity: int = Field(64, ge=0)
    """Jobs of each priority that may wait in the queue while max-running jobs of it run. A call beyond that fails with
    QUEUE_FULL and says when to retry."""
    max_image_bytes: int = Field(16 * _MIB, ge=1)
    """Largest encoded image or mask that a request may contain, in bytes; the default is 16 MiB."""
    max_image_pixels: int = Field(6144 * 4096, ge=1)
    """Largest width times height of an image or mask in a request, in pixels; checked before it is decoded. The default
    is 6144 x 4096, which is enough for photos of 24 megapixels; larger ones also need more decoder-bytes."""
    max_image_aspect: float = Field(32, ge=1)
    """Largest ratio of the longer side of an image or mask in a request to its shorter side."""
    decoder_bytes: int = Field(1024 * _MIB, ge=512 * _MIB)
    """Memory in bytes that all processes that decode images may take together; an image that needs more than three
    quarters of it, or more CPU time than its size explains, is refused with IMAGE_TOO_LARGE. Decoding takes up to 24
    bytes a pixel. The default is 1 GiB."""
    max_message_bytes: int = Field(24 * _MIB, ge=1)
    """Largest gRPC message that is received or sent, in bytes; the default is 24 MiB."""
    request_bytes: int = Field(512 * _MIB, ge=1)
    """Largest total size of the requests, with their images, of all calls in progress, in bytes; a call beyond it fails
    with QUEUE_FULL. The default is 512 MiB."""
    max_connections: int = Field(1024, ge=1)
    """Connections to the gRPC port at one time; further ones are closed. The server raises its limit on open files
    (ulimit -n) to 200 more than that, as far as it may."""
    max_streams: int = Field(100, ge=1)
    """Calls in progress on one connection; a client's library holds back further ones until one has ended."""
    max_calls: int = Field(1024, ge=1)
    """Calls in progress on all connections, waiting streams included, from the arrival of their request on; one beyond
    that fails with QUEUE_FULL. Health checks are always answered."""
    request_arrival_s: float = Field(60, gt=0)
    """Seconds within which the request message of a call must have arrived completely, and each message of an upload;
    otherwise the call fails with REQUEST_INCOMPLETE."""
    max_slow_requests: int = Field(16, ge=1)
    """Requests at one time that take longer than a second to arrive. Each may hold as much memory as two messages of
    max-message-bytes. Beyond that one fails with QUEUE_FULL: the oldest if it has taken 10 s, else the newest."""
    max_steps: int = Field(200, ge=1, le=1000)
    """Largest number of steps that a request may ask for."""
    max_prompt_chars: int = Field(2000, ge=1)
    """Largest number of characters in a prompt."""
    max_mask_samples: int = Field(64, ge=1)
    """Largest number of noise samples that a request may ask for to compute a DiffEdit mask."""
    store_url: str = "memory:///"
    """URL of the object store for inversions, directions and operations: memory:/// (lost when the server stops),
    file:///path or s3://bucket/prefix. Several servers may share one file or S3 store."""
    store_bytes: int = Field(1024 * _MIB, ge=1)
    """Largest total size of the stored inversions, in bytes; beyond it the least recently used are deleted: of those
    that take more than 1/256 of it each if these fill more than half, else of the others. The default is 1 GiB."""
    max_inversion_bytes: int = Field(128 * _MIB, ge=1)
    """Largest size of one stored inversion, in bytes; inverting fails with IMAGE_TOO_LARGE beyond it, and an edit does
    not keep its inversion. The default is 128 MiB: fifty steps with the features of all sites of a model at 512 px take
    about 40 MiB."""
    store_ttl_s: float = Field(24 * 3600, gt=0)
    """Seconds after its last use at which a stored inversion expires; the default is one day."""
    max_directions: int = Field(1000, ge=1)
    """Stored directions, those being learned included; importing or learning one beyond that fails with
    DIRECTIONS_FULL. They are never deleted by the server."""
    max_directions_bytes: int = Field(64 * _MIB, ge=1)
    """Largest total size of the stored directions, in bytes; importing or learning one beyond it fails with
    DIRECTIONS_FULL. The default is 64 MiB; one takes a few kilobytes."""
    max_learning: int = Field(1, ge=0, le=64)
    """Directions that this server learns at one time. 0: it learns none and leaves them to other servers that share its
    store."""
    max_operations: int = Field(64, ge=1)
    """Operations that may be unfinished at one time, counted over all servers that share the store. A request for
    another one fails with OPERATIONS_FULL."""
    max_learning_rows: int = Field(200_000, ge=1)
    """Largest number of network rows that learning one direction may take; a request for more fails with FIELD_INVALID.
    16 images at the defaults and 50 steps take 42 000."""
    max_operations_rows: int = Field(1_000_000, ge=1)
    """Largest number of network rows of all unfinished operations, counted over all servers that share the store; a
    request for more fails with OPERATIONS_FULL. One alone is accepted; max-learning-rows limits it."""
    learn_checkpoint_every: int = Field(2, ge=1, le=200)
    """Optimiser steps between two saves of the state of a direction that is being learned. After a crash, the steps
    since the last save are repeated."""
    claim_ttl_s: float = Field(30, ge=0.2, le=3600)
    """Lease time of an operation, in seconds: if the server that runs it does not renew its claim for this long,
    another server that shares the store may take the operation over."""
    operation_ttl_s: float = Field(7 * 24 * 3600, gt=0)
    """Seconds after its end for which a finished operation can still be read; the default is 7 days."""
    replay_ttl_s: float = Field(600, gt=0)
    """Seconds for which the response to a request with a request_id is kept. A repeat of the request with the same
    request_id gets that response instead of running again, also from another server that shares the store."""
    replay_bytes: int = Field(256 * _MIB, ge=0)
    """Largest total size of the responses kept for repeats of a request_id, in bytes: of those in the memory of this
    server, and again of those in the store, unless that is memory too. Beyond it the oldest are dropped. The default is
    256 MiB; 0 keeps none."""
    rejoin_s: float = Field(2, ge=0, le=60)
    """Seconds for which the work of a request with a request_id goes on after its caller has left, so that a caller
    whose connection broke can repeat the request and get the answer of the same work. A request that is cancelled uses
    the device for as long."""
    drain_s: float = Field(120, ge=0)
    """Seconds that queued and running jobs get to finish after SIGTERM or SIGINT, while new ones are refused. What is
    left then is cancelled, and the server exits; a second signal does that at once."""
    cache_dir: str = ""
    """Directory for what the server has measured or made from its models and can make again; servers on one machine may
    share it. Empty: $XDG_CACHE_HOME/underpaint, or ~/.cache/underpaint. If files cannot be written there, a warning is
    logged and nothing is kept."""
    log_level: LogLevel = "info"
    """Lowest level of the log lines that are written."""

    @property
    def model_locations(self) -> tuple[tuple[str, str], ...]:
        """(id, location) of every model, the default model first. A location is a directory, a hub id or the name of an
        embedded model; an empty one is underpaint-mini."""
        pairs = tuple((name, location) for name, _, location in (spec.partition("=") for spec in self.models))
        return pairs or ((EMBEDDED_MODEL, ""),)

    @property
    def clip_directories(self) -> dict[str, str]:
        """Id of a model -> directory of its CLIP."""
        return {name: directory for name, _, directory in (spec.partition("=") for spec in self.clips)}

    @model_validator(mode="before")
    @classmethod
    def _split_lists(cls, values: dict[str, object]) -> dict[str, object]:
        for key in ("models", "clips"):
            value = values.get(key)
            if isinstance(value, str):
                values[key] = tuple(part.strip() for part in value.split(",") if part.strip())
        return values

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.exact_batch_class == 1:
            raise ValueError("exact_batch_class: a pass has at least 2 rows; give 2 to 64, or 0 for the default")
        self._check_pairs("models", self.models, "photos=/path/to/pipeline", directory_required=False)
        self._check_pairs("clips", self.clips, "photos=/path/to/clip", directory_required=True)
        known = self._known_models()
        for name in self.clip_directories:
            if name not in known:
                raise ValueError(f"clips: no model has the id '{name}'; the models are {', '.join(known)}")
        return self

    def _known_models(self) -> list[str]:
        return [name for name, _ in self.model_locations]

    @staticmethod
    def _check_pairs(setting: str, specs: Iterable[str], example: str, *, directory_required: bool) -> None:
        ids = set()
        for spec in specs:
            name, equals, directory = spec.partition("=")
            if not name or not equals or (directory_required and not directory):
                raise ValueError(f"{setting}: '{spec}' is not ID=DIRECTORY; write it as {example}")
            if not MODEL_ID.fullmatch(name):
                raise ValueError(
                    f"{setting}: '{name}' is no id: use 1 to 63 letters, digits, '.', '_' and '-', a letter or digit"
                    f" first, as in {example}"
                )
            if name in ids:
                raise ValueError(f"{setting}: the id '{name}' is given twice; every id names one directory")
            ids.add(name)


SELF_TEST_SETTINGS: Final = (
    "backend", "device", "dtype", "threads", "exact_batching", "exact_batch_class", "max_batch_size", "allow_network",
    "cache_dir", "log_level", "directory",
)  # fmt: skip
"""The settings that have an effect on ``self-test``; its ``--help`` lists only these."""
CHECK_SETTINGS: Final = (*SELF_TEST_SETTINGS, "exact_batching_s", "clips", "vgg")
"""The settings that have an effect on ``check-model``; its ``--help`` lists only these."""


class CheckSettings(Settings):
    """Load a checkpoint as the server would, run a short EDICT round trip on it, and print its properties and speed.

    Nothing is served. Exits with status 1 and the reason if the server could not serve the checkpoint. The server's
    other flags and all its environment variables are accepted too, and have no effect here.
    """

    model_config = SettingsConfigDict(cli_prog_name="underpaint-server check-model")

    directory: CliPositionalArg[str] = ""
    """Directory of a diffusers pipeline, or its hub id with --allow-network; empty is the embedded underpaint-mini."""

    @property
    def model_id(self) -> str:
        """The id that the checked model has here, and for which ``clips`` may name a directory: the directory's name
        without the characters that an id cannot have."""
        name = re.sub(r"[^A-Za-z0-9._-]+", "-", Path(self.directory).name)
        return name.lstrip("._-")[:63].rstrip("-") or EMBEDDED_MODEL

    def _known_models(self) -> list[str]:
        return list(dict.fromkeys((self.model_id, *super()._known_models())))


class SelfTestSettings(CheckSettings):
    """Measure completely whether the results of a model have the same bits at any load on this machine.

    Takes minutes, or hours for a large network on a CPU, and keeps what it finds in cache-dir, where a server that is
    started with the same settings finds it. Exits with status 1 if results would not be exact. The server's other flags
    and all its environment variables are accepted too, and have no effect here.
    """

    model_config = SettingsConfigDict(cli_prog_name="underpaint-server self-test")


EXPORT_SETTINGS: Final = (
    "models", "allow_network", "backend", "device", "dtype", "threads", "exact_batching", "exact_batching_s",
    "exact_batch_class", "max_batch_size", "cache_dir", "log_level",
)  # fmt: skip
"""The settings that have an effect on ``export``; its ``--help`` lists only these."""


class ExportSettings(Settings):
    """Load the models once, so that later starts of the server are fast: fills cache-dir.

    The networks are exported for the backends that compile them, and it is measured how exact they are on this machine.
    Nothing is served. Exits with status 1 if a model cannot be served, or if files cannot be written to cache-dir. The
    server's other flags and all its environment variables are accepted too, and have no effect here.
    """

    model_config = SettingsConfigDict(cli_prog_name="underpaint-server export")


# --- environment ------------------------------------------------------------------------------------------------------

_PREFIX: Final = "UNDERPAINT_"
_OTHERS: Final = ("TARGET",)
"""Variables with the server's prefix that the client reads."""
_SERVICE_LINK: Final = re.compile(
    r"UNDERPAINT_(\w+_)?(SERVICE_HOST|SERVICE_PORT(_\w+)?|PORT(_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?)?)"
)
"""What Kubernetes adds to the pods of a namespace for each Service whose name is or begins with underpaint."""


def unknown_variables(names: Iterable[str]) -> Iterator[str]:
    """For each environment variable with the server's prefix that is no setting: what is wrong, with the nearest name.

    Variables that the client reads, and those that Kubernetes adds for Services, are no mistakes.
    """
    fields = [field.upper() for field in Settings.model_fields]
    known = {f"{_PREFIX}{field}" for field in (*fields, *_OTHERS)}
    for name in sorted(names):
        upper = name.upper()
        if not upper.startswith(_PREFIX) or upper in known or _SERVICE_LINK.fullmatch(upper):
            continue
        nearest = difflib.get_close_matches(upper.removeprefix(_PREFIX), fields, 1, cutoff=0.7)
        advice = f"did you mean {_PREFIX}{nearest[0]}?" if nearest else "underpaint-server --help lists the settings"
        yield f"the environment variable {name} is not a setting; unset it, or correct its name: {advice}"
