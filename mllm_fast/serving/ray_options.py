"""The arguments of the Ray Serve application."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from ..core.errors import InputError
from ..vlm import VLM
from .settings import Settings


class Options(BaseModel):
    """The arguments of the application. Besides those below, all fields of `Settings` are accepted.

    Attributes:
        model: The model, see `VLM.from_pretrained`.
        name: The name by which requests call the model; `model` by default.
        device: See `VLM.from_pretrained`.
        dtype: See `VLM.from_pretrained`.
        backend: See `VLM.from_pretrained`.
        tp: How many processes the model of a replica is divided between, see `VLM.from_pretrained`.
        gpus: The number of GPUs of a replica: 0, or as many as `tp` if that is above 1.
        cpus: The number of CPUs of a replica.
        min_replicas: The smallest number of replicas.
        max_replicas: The largest number of replicas.
        target: How many requests in progress autoscaling aims at for each replica.
        ingresses: The number of processes that serve HTTP.
        api_keys: A file of API keys on the machines of the ingresses. The environment variable MLLM_FAST_API_KEYS may
            have more.
        log: Whether to log the requests.
    """

    model_config = ConfigDict(extra="allow")

    model: str = "shapes"
    name: str | None = None
    device: str | None = None
    dtype: str | None = None
    backend: str = "auto"
    tp: int = 1
    gpus: float = 0
    cpus: float = 1
    min_replicas: int = 1
    max_replicas: int = 1
    target: float = 32
    ingresses: int = 1
    api_keys: Path | None = None
    log: bool = True

    @property
    def settings(self) -> Settings:
        """The remaining arguments, as the settings of the service.

        Raises:
            InputError: An argument is unknown or out of range.
        """
        if self.tp < 1 or (self.tp > 1 and self.gpus not in (0, self.tp)):
            raise InputError(f"tp={self.tp} takes as many GPUs a replica, or none; got gpus={self.gpus:g}")
        known = {one.name: one for one in fields(Settings)}
        given = dict(self.model_extra or {})
        unknown = sorted(set(given) - set(known))
        if unknown:
            raise InputError(
                f"unknown options {', '.join(unknown)}; there are {', '.join([*type(self).model_fields, *known])}"
            )
        for name, value in given.items():
            if isinstance(value, str):  # `serve run` passes texts
                given[name] = _parsed(name, value)
        return Settings(**given)

    def load(self) -> VLM:
        """Load the model; with `tp` above 1 in each process of the replica."""
        return VLM.from_pretrained(
            self.model,
            device=self.device,
            dtype=self.dtype,
            backend=self.backend,
            max_pixels=self.settings.max_pixels,
            tp=self.tp if self.tp > 1 else None,
        )


def _parsed(name: str, text: str) -> Any:
    """Convert the text of a setting to its type."""
    if name == "keep":
        return None if text == "off" else (int(text) if text.isdigit() else float(text))
    if name == "remote_hosts":
        return tuple(one.strip().lower() for one in text.split(",") if one.strip())
    default = next(one.default for one in fields(Settings) if one.name == name)
    return type(default)(text) if isinstance(default, (int, float)) else text
