"""The settings of an answer: what the caller says, then the caller's `generation_config`, then the checkpoint's."""

from __future__ import annotations

import copy
import sys
from collections.abc import Mapping
from typing import Any

from ..core.errors import InputError
from .stop_strings import StopStrings

DEFAULT_TOKENS = 32  # the longest answer where neither the caller nor the checkpoint says one
# what runs the model otherwise than token by token over a growing cache
_RUNS_ELSEWHERE = (
    "guidance_scale",
    "assistant_model",
    "prompt_lookup_num_tokens",
    "assistant_early_exit",
    "custom_generate",
    "streamer",
    "cache_implementation",
    "past_key_values",
    "prefill_chunk_size",
    "penalty_alpha",
    "dola_layers",
)
# what an `Answer` has no place for
_OUTPUTS = (
    "return_dict_in_generate",
    "output_scores",
    "output_logits",
    "output_attentions",
    "output_hidden_states",
)


class GenerationSettings:
    """The settings of one call of transformers' `generate`, in its order: the caller's come before the checkpoint's.

    Args:
        model: The model; its `generation_config` is the checkpoint's.
        tokenizer: The tokenizer, for stop strings.
        max_new_tokens: The longest answer. By default what the configs say of it, or of `max_length`; 32 tokens if they
            say nothing.
        options: Further arguments of `generate`.
        greedy: Take the likeliest tokens unless the caller, not the checkpoint, says otherwise: for measurements.
        window: The model's context window, which a length of the checkpoint's own does not go beyond.

    Raises:
        InputError: `generation_config` is none, or `max_new_tokens` is no positive number.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        max_new_tokens: int | None = None,
        options: Mapping[str, Any] | None = None,
        greedy: bool = False,
        window: int | None = None,
    ):
        self._own, self._tokenizer, self._window = model.generation_config, tokenizer, window
        self._options = dict(options or {})
        self._config = self._options.pop("generation_config", None)
        if self._config is not None and not hasattr(self._config, "to_diff_dict"):
            raise InputError(
                f"generation_config is a GenerationConfig of transformers, got {type(self._config).__name__}"
            )
        if max_new_tokens is not None:
            self._options["max_new_tokens"] = max_new_tokens
        self._ours = {"do_sample": False} if greedy and self._given("do_sample") is None else {}
        most = self.get("max_new_tokens")
        if most is not None and (isinstance(most, bool) or not isinstance(most, int) or most < 1):
            raise InputError(f"max_new_tokens is at least 1, got {most}")

    def get(self, name: str, default: Any = None) -> Any:
        """Return what a setting is in the end."""
        if name in self._ours or name in self._options:
            found = self._ours.get(name, self._options.get(name))
        else:
            found = getattr(self._config, name, None)
            found = getattr(self._own, name, None) if found is None else found
        return default if found is None else found

    def limit(self, length: int) -> int:
        """Return the most tokens that an answer may have after a prompt of this length, padding included.

        Raises:
            InputError: `max_length` leaves no room for an answer.
        """
        most, whole = self.get("max_new_tokens"), self.get("max_length")
        if self._given("max_new_tokens") is None and self._given("max_length") is None:
            least = max(1, self.get("min_new_tokens", 0), self.get("min_length", 0) - length)
            room = (self._window or sys.maxsize) - length
            told = most or (max(DEFAULT_TOKENS, least) if whole is None else whole - length)
            return max(least, min(told, room))
        if self._given("max_new_tokens") is not None:
            return most
        if whole <= length:
            raise InputError(
                f"max_length is {whole}, and the prompt alone takes {length} tokens; give a larger one, or"
                " max_new_tokens, which does not count the prompt"
            )
        return whole - length

    @property
    def end_ids(self) -> set[int]:
        """The ids at which the model ends an answer."""
        end = self.get("eos_token_id")
        return {*(end if isinstance(end, (list, tuple)) else [end])} - {None}  # type: ignore[return-value]

    @property
    def stop_ids(self) -> set[int]:
        """The ids that end an answer and are not part of it; also the padding, after which generation continues."""
        return (self.end_ids or {self._tokenizer.eos_token_id}) | {self._tokenizer.pad_token_id} - {None}

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """The texts that end an answer and stay in it."""
        found = self.get("stop_strings", ())
        return (found,) if isinstance(found, str) else tuple(found)

    def check_single(self, what: str) -> None:
        """Raise InputError for settings that ask for several answers, or that run the model in another way.

        Args:
            what: What follows a single answer, for the message.
        """
        for name in ("num_beams", "num_return_sequences"):
            found = self.get(name, 1)
            if found != 1:
                whose = "" if self._given(name) is not None else f" by the checkpoint (pass {name}=1)"
                raise InputError(
                    f"{what} follows one sequence, got {name}={found}{whose}: call generate first and pass its"
                    " text to explain as answer="
                )
        for name in _RUNS_ELSEWHERE:
            given = self._given(name)
            if given is not None and (name, given) != ("cache_implementation", "static"):
                raise InputError(f"{what} runs the model token by token and takes no {name}; use VLM.generate")
        if self._given("use_cache") is False:
            raise InputError(f"{what} runs the model token by token over a cache; leave out use_cache=False")
        self.check_outputs(what)

    def check_outputs(self, what: str) -> None:
        """Raise InputError for settings that ask `generate` for more than the tokens."""
        for name in _OUTPUTS:
            if self._given(name):
                raise InputError(
                    f"{what} returns no {name}; call vlm.model.generate, inside vlm.knocked_out(...) or"
                    " vlm.recording() if you like"
                )

    def check_plain(self, what: str) -> None:
        """Raise InputError for settings with which several tokens of an answer are read at once."""
        for name in ("assistant_model", "prompt_lookup_num_tokens", "assistant_early_exit", "custom_generate"):
            if self._given(name) is not None:
                raise InputError(f"{what} cannot be had with {name}, which reads several tokens at once; leave it out")

    def arguments(self, length: int, **forced: Any) -> dict[str, Any]:
        """Return the arguments of `generate`.

        Args:
            length: The tokens of the prompt, padding included.
            forced: Arguments that take precedence, such as a cache.
        """
        given = {**self._options, **forced}
        given.pop("max_length", None)  # `limit` has taken it into account
        told: dict[str, Any] = {
            **self._ours,
            "max_length": None,
            "max_new_tokens": given.pop("max_new_tokens", None) or self.limit(length),
        }
        stops = self.stop_strings
        if stops:
            criteria = [*(given.pop("stopping_criteria", None) or ()), StopStrings(self._tokenizer, stops, length)]
            given |= {"stopping_criteria": criteria}
            given.pop("stop_strings", None)
            told["stop_strings"] = None
        if self._config is None:
            if not self.get("do_sample", False):
                # a checkpoint's own settings of sampling would only make transformers warn
                told = dict.fromkeys(("temperature", "top_p", "top_k")) | told
            return told | given
        # transformers warns of settings beside a config, so ours go into a copy of it
        config = copy.deepcopy(self._config)
        for name in [*told, *(name for name in forced if hasattr(config, name))]:
            setattr(config, name, told.get(name, given.pop(name, None)))
        # a None in a config is filled in from the checkpoint's: so the length is said in the one way that it says, too
        if getattr(self._own, "max_length", None) is not None and getattr(self._own, "max_new_tokens", None) is None:
            config.max_length, config.max_new_tokens = length + config.max_new_tokens, None
        unset = {"stop_strings": None} if getattr(self._own, "stop_strings", None) is not None else {}
        return given | unset | {"generation_config": config}

    def _given(self, name: str) -> Any:
        """Return what the caller says of a setting, or None."""
        return self._options.get(name, getattr(self._config, name, None))
