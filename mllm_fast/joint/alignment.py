"""W, the map from the detector's vision embedding to the language model's image embeddings.

It comes from the supplement of arXiv 2405.14612.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as save_tensors
from torch import Tensor, nn

from ..core.errors import InputError, check_choice
from ..core.files import write_whole

KINDS = ("mlp", "projector", "transformer")
_ACTIVATIONS = {"gelu": nn.GELU, "relu": nn.ReLU}
_FORMAT = 1


@dataclass(frozen=True)
class AlignmentConfig:
    """The architecture of W.

    Attributes:
        kind: "mlp" maps each token alone, through `depth` hidden layers. "projector" has the shape of LLaVA's own
            projector, one hidden layer as wide as the language model. "transformer" reads the whole sequence.
        inputs: The number of values per token of E.
        outputs: The number of values per image embedding.
        hidden: The width of the hidden layers.
        layers: The number of layers of a "transformer".
        heads: The number of attention heads per layer of a "transformer".
        depth: The number of hidden layers of an "mlp".
        norm: Whether E is normalized first. It is a residual stream, so it has no fixed scale.
        activation: The activation, "gelu" or "relu".
        width: The number of values per token in the layers of a "transformer", to which a linear layer maps E first; 0
            for that of E, without such a layer. The paper's has that of the language model.
    """

    kind: str
    inputs: int
    outputs: int
    hidden: int
    layers: int = 2
    heads: int = 8
    depth: int = 2
    norm: bool = True
    activation: str = "gelu"
    width: int = 0

    def __post_init__(self) -> None:
        check_choice("kind", self.kind, KINDS)
        check_choice("activation", self.activation, list(_ACTIVATIONS))
        for name in ("inputs", "outputs", "hidden", "layers", "heads", "depth"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise InputError(f"{name} of an alignment is a number of at least 1, got {value!r}")
        if type(self.width) is not int or self.width < 0:
            raise InputError(f"width of an alignment is a number of 0 or more, got {self.width!r}")
        if self.kind == "transformer" and (self.width or self.inputs) % self.heads:
            raise InputError(
                f"{self.heads} heads do not divide the {self.width or self.inputs} numbers of a token; choose others"
            )


def _checksum(text: str, tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).cpu().numpy().data)
    return digest.hexdigest()


class Alignment(nn.Module):
    """The map W: [..., tokens, inputs] -> [..., tokens, outputs].

    Args:
        config: The architecture.
        pair: Fingerprints of the two models that W was trained between, {"owl": ..., "vlm": ...}. Empty if unknown.
        about: How W was trained, as plain JSON.
    """

    def __init__(self, config: AlignmentConfig, pair: dict[str, str] | None = None, about: dict | None = None):
        super().__init__()
        self.config, self.pair, self.about = config, dict(pair or {}), dict(about or {})
        c = config
        self.norm: nn.Module = nn.LayerNorm(c.inputs) if c.norm else nn.Identity()
        if c.kind == "transformer":
            width = c.width or c.inputs
            layer = nn.TransformerEncoderLayer(
                width, c.heads, c.hidden, dropout=0.0, activation=c.activation, batch_first=True, norm_first=True
            )
            wider = [nn.Linear(c.inputs, width)] if c.width else []
            encoder = nn.TransformerEncoder(layer, c.layers, enable_nested_tensor=False)
            self.body: nn.Module = nn.Sequential(*wider, encoder, nn.Linear(width, c.outputs))
        else:
            widths = [c.inputs, *([c.hidden] * (c.depth if c.kind == "mlp" else 1)), c.outputs]
            steps: list[nn.Module] = []
            for before, after in pairwise(widths):
                steps += [nn.Linear(before, after), _ACTIVATIONS[c.activation]()]
            self.body = nn.Sequential(*steps[:-1])

    def forward(self, tokens: Tensor) -> Tensor:
        """Map tokens of E without the class token, [..., n, inputs], to image embeddings, [..., n, outputs]."""
        lead = tokens.shape[:-2]
        return self.body(self.norm(tokens.reshape(-1, *tokens.shape[-2:]))).reshape(*lead, -1, self.config.outputs)

    def save(self, path: str | os.PathLike[str], dtype: torch.dtype | None = None) -> None:
        """Write W to a .safetensors file, atomically.

        Args:
            path: The file.
            dtype: The dtype of the weights in the file; by default, the dtype they have.

        Raises:
            InputError: If the file name does not end in .safetensors.
        """
        target = Path(path)
        if target.suffix != ".safetensors":
            raise InputError(f"{target}: an alignment is saved as .safetensors")
        tensors = {name: tensor.to(dtype or tensor.dtype).contiguous() for name, tensor in self.state_dict().items()}
        text = json.dumps({"config": asdict(self.config), "pair": self.pair, "about": self.about})
        head = {"mllm_fast_alignment": str(_FORMAT), "json": text, "sha256": _checksum(text, tensors)}
        write_whole(target, save_tensors(tensors, head))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Alignment:
        """Read a file that `save` wrote, as float32.

        Raises:
            InputError: If the file does not exist, is damaged, has another format, or has weights of other sizes than
                its settings say, or weights that are no finite numbers.
        """
        name = os.fspath(path)
        if not Path(name).is_file():
            raise InputError(f"{name}: there is no such file; give one that `mllm-fast joint train` wrote")
        try:
            with safe_open(name, "pt") as file:
                head: dict[str, Any] = file.metadata() or {}
                if "mllm_fast_alignment" not in head:
                    raise InputError(f"{name}: is no alignment; give a file that `mllm-fast joint train` wrote")
                if head["mllm_fast_alignment"] != str(_FORMAT):
                    raise InputError(
                        f"{name}: an alignment of format {head['mllm_fast_alignment']}, this release reads {_FORMAT};"
                        " update mllm-fast"
                    )
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            # files of earlier releases have no checksum
            if head.get("sha256", _checksum(head["json"], tensors)) != _checksum(head["json"], tensors):
                raise InputError(f"{name}: the file is damaged (its checksum does not fit); copy it again")
            found = json.loads(head["json"])
            config = AlignmentConfig(**found["config"])
            if max(config.depth, config.layers) > len(tensors):
                raise ValueError("more layers than tensors")
            with torch.device("meta"):  # no memory is taken for sizes that only the settings have
                alignment = cls(config, found["pair"], found["about"])
        except InputError:
            raise
        except (SafetensorError, OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
            raise InputError(f"{name}: the file is damaged ({type(error).__name__}); copy it again") from None
        wanted = {key: tuple(tensor.shape) for key, tensor in alignment.state_dict().items()}
        got = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
        if wanted != got:
            wrong = sorted(key for key in wanted.keys() | got.keys() if wanted.get(key) != got.get(key))
            raise InputError(
                f"{name}: {wrong[0]} is {got.get(wrong[0], 'absent')}, its settings say"
                f" {wanted.get(wrong[0], 'none')}; copy it again"
            )
        for key, tensor in tensors.items():
            if not bool(torch.isfinite(tensor).all()):
                raise InputError(f"{name}: {key} holds values that are not finite; copy it again")
        alignment.load_state_dict({key: tensor.float() for key, tensor in tensors.items()}, assign=True)
        return alignment.requires_grad_().eval()
