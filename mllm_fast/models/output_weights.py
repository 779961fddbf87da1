"""The output projections by head: what one number of a head's output adds to the residual stream."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from ..kernels import weight_state, wide_type
from .findings import Site
from .linears import effective_weight, linear_state
from .norms import Norm

_STACKED_BYTES = 1 << 25  # output projections up to this size are kept together in one copy


@dataclass
class OutputWeights:
    """The O_j of all heads of a text model. They are cached while the weights stay as they are.

    Attributes:
        sites, outputs, post_norms, width, num_heads, head_dim: As in `TextModel`.
        post_norm: Returns what the norm behind a site's output projection computes, or None.
    """

    sites: tuple[Site, ...]
    outputs: tuple[Any, ...]
    post_norms: tuple[nn.Module | None, ...]
    width: int
    num_heads: int
    head_dim: int
    post_norm: Callable[[int], Norm | None]
    _views: dict[int, tuple[Any, Tensor, list[Tensor]]] = field(default_factory=dict, repr=False)
    _stacked: dict[str, Any] = field(default_factory=dict, repr=False)

    def projection(self, site: int, head: int) -> Tensor:
        """Return O_j, [hidden size, head dim]: what one number of a head's output adds to the residual stream.

        Smaller heads than the largest of the model end with zeros.
        A norm behind the output projection is folded in, without its scale, which differs from row to row
        (`write_scale`).
        """
        return self.of_heads(site)[1][head]

    def projections(self, device: torch.device, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
        """Yield O_j of all heads, transposed, for one range of sites after another.

        A small model yields all sites at once, from a copy that is cached. A larger one yields one site at a time.

        Yields:
            The slice of sites, and their O_j as [sites, heads, head dim, hidden size].
        """
        count = len(self.outputs)
        elsewhere = any(map(_offloaded, self.outputs))
        size = self.num_heads * self.head_dim * self.width
        if elsewhere or count * size * dtype.itemsize > _STACKED_BYTES:
            for site in range(count):
                yield slice(site, site + 1), self.of_heads(site)[0].to(device=device, dtype=dtype)[None]
            return
        state = device, dtype, *(self.write_state(site) for site in range(count))
        if self._stacked.get("state") != state:
            each = [self.of_heads(site)[0].to(device=device, dtype=dtype) for site in range(count)]
            self._stacked.update(state=state, weights=torch.stack(each))
        yield slice(0, count), self._stacked["weights"]

    def write_state(self, site: int) -> Any:
        """Return a value that changes whenever the weights behind a site's O_j do."""
        norm, output = self.post_norms[site], linear_state(self.outputs[site])
        return output if norm is None else (output, *(weight_state(parameter) for parameter in norm.parameters()))

    def of_heads(self, site: int, state: Any = None) -> tuple[Tensor, list[Tensor]]:
        """Return the O_j of a site, stacked [heads, head dim, hidden size] and one by one.

        They are cached while the weight stays in place: in a small model, making the views takes as long as using them.

        Args:
            site: The number of the site.
            state: What `write_state` just returned for it, if the caller has it.
        """
        state = self.write_state(site) if state is None else state
        kept = self._views.get(site)
        if kept is not None and kept[0] == state:
            return kept[1:]
        output = self.outputs[site]
        whole = self._folded(site, effective_weight(output))
        shape = self.sites[site].num_heads, self.sites[site].head_dim
        whole = whole.unflatten(1, shape).permute(1, 2, 0)
        whole = whole if shape[1] == self.head_dim else pad(whole, (0, 0, 0, self.head_dim - shape[1]))
        each = [one.mT for one in whole]
        if type(output) is not nn.Linear or output.weight.device.type == "meta":
            # keep only the last weight that is no view: callers ask for its heads in turn
            for other in [
                i for i in self._views if type(self.outputs[i]) is not nn.Linear or _offloaded(self.outputs[i])
            ]:
                del self._views[other]
        self._views[site] = state, whole, each
        return whole, each

    def _folded(self, site: int, weight: Tensor) -> Tensor:
        """Return the output projection's weight with the norm behind it and the multiplier folded in."""
        norm, multiplier = self.post_norm(site), self.sites[site].multiplier
        if norm is not None:
            weight = weight.to(wide_type(weight.dtype))
            weight = weight if norm.kind == "rms" else weight - weight.mean(0)
            weight = weight if norm.gain is None else weight * norm.gain.to(weight)[:, None]
        return weight if multiplier == 1 else multiplier * weight


def _offloaded(output: Any) -> bool:
    """Return whether a layer's weights lie elsewhere; a streamed explanation asks once a token."""
    if type(output) is nn.Linear:
        return output.weight.device.type == "meta"
    return any(parameter.device.type == "meta" for parameter in output.parameters())
