"""Small decoder layers in the forms that vLLM's have, to be hooked without an engine."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

WIDTH = 8


class Half(nn.Module):
    """A branch: half of what it is given."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        return hidden_states * 0.5

    def forward_partials(self, hidden_states: Tensor) -> Tensor:
        """The same by another name."""
        return hidden_states * 0.5


class Heads(nn.Module):
    """Attention's inner module: two heads, each element of which is what it was given, squared."""

    num_heads, head_size = 2, 3

    def forward(self, x: Tensor) -> Tensor:
        return x[..., :6].square()


class Projection(nn.Module):
    """As vLLM's RowParallelLinear: returns its bias, or none, beside the output."""

    input_size = 6

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return nn.functional.pad(x, (0, WIDTH - 6)), None


class WithHeads(nn.Module):
    """As vLLM's attention."""

    def __init__(self) -> None:
        super().__init__()
        self.attn: Any = Heads()
        self.o_proj: Any = Projection()

    def forward(self, hidden_states: Tensor) -> Tensor:
        attn_output = self.attn(hidden_states)
        output: Tensor
        output, _ = self.o_proj(attn_output)
        return output


class GatedHeads(WithHeads):
    """As Qwen3-Next's: a gate stands between the heads and the projection."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        attn_output = self.attn(hidden_states)
        output: Tensor
        output, _ = self.o_proj(attn_output * hidden_states[..., :6].sigmoid())
        return output


class PlainNorm(nn.Module):
    """A norm of one tensor."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.normalize(x, dim=-1)


class AddNorm(nn.Module):
    """As vLLM's RMSNorm: with a residual, the norm of the sum, and the sum."""

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Any:
        if residual is None:
            return x / x.norm(dim=-1, keepdim=True)
        x = x + residual
        return x / x.norm(dim=-1, keepdim=True), x


class PassNorm(nn.Module):
    """As Cohere's: with a residual, the norm of the first, and the residual untouched."""

    def forward(self, hidden_states: Tensor, residuals: Tensor | None = None) -> Any:
        hidden_states = hidden_states / hidden_states.norm(dim=-1, keepdim=True)
        return hidden_states, residuals


class Layer(nn.Module):
    """Attention, MLP and their norms; its forward is made by those below."""

    def __init__(self, norm: type[nn.Module] = PlainNorm) -> None:
        super().__init__()
        self.self_attn: Any = Half()
        self.mlp: Any = Half()
        self.input_layernorm = norm()
        self.post_attention_layernorm = norm()


class Fused(Layer):
    """As Llama."""

    def __init__(self) -> None:
        super().__init__(AddNorm)

    def forward(
        self, positions: Tensor, hidden_states: Tensor, residual: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        if residual is None:
            residual = hidden_states
            hidden_states = self.input_layernorm(hidden_states)
        else:
            hidden_states, residual = self.input_layernorm(hidden_states, residual)
        hidden_states = self.self_attn(hidden_states=hidden_states)
        hidden_states, residual = self.post_attention_layernorm(hidden_states, residual)
        hidden_states = self.mlp(hidden_states)
        return hidden_states, residual


class Parallel(Layer):
    """As Cohere: a residual that is overwritten, and returned stale."""

    def __init__(self) -> None:
        super().__init__(PassNorm)

    def forward(
        self, positions: Tensor, hidden_states: Tensor, residual: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        residual = hidden_states
        hidden_states, residual = self.input_layernorm(hidden_states, residual)
        attention = self.self_attn(hidden_states)
        hidden_states = residual + attention + self.mlp(hidden_states)
        return hidden_states, residual


class Plain(Layer):
    """As GPT-2, and as StableLM where `stale`."""

    def __init__(self, factor: float = 1.0, *, stale: bool = False) -> None:
        super().__init__()
        self.residual_multiplier = factor
        self.stale = stale

    def forward(self, positions: Tensor, hidden_states: Tensor) -> Any:
        residual = hidden_states
        hidden_states = self.input_layernorm(hidden_states)
        hidden_states = self.self_attn(hidden_states)
        hidden_states = residual + hidden_states * self.residual_multiplier
        residual = hidden_states
        hidden_states = self.post_attention_layernorm(hidden_states)
        hidden_states = self.mlp(hidden_states)
        hidden_states = residual + hidden_states * self.residual_multiplier
        if self.stale:
            return hidden_states, residual
        return hidden_states


class NormAfter(Layer):
    """As EXAONE-4 and OLMo-2: branches read the stream, and are normalized before they join it."""

    def forward(self, positions: Tensor, hidden_states: Tensor) -> Tensor:
        residual = hidden_states
        hidden_states = self.self_attn(hidden_states)
        hidden_states = self.input_layernorm(hidden_states)
        hidden_states = residual + hidden_states
        residual = hidden_states
        hidden_states = self.mlp(hidden_states)
        hidden_states = self.post_attention_layernorm(hidden_states)
        hidden_states = residual + hidden_states
        return hidden_states


class Mixed(Layer):
    """One way or the other, by what is not known before it runs."""

    def __init__(self) -> None:
        super().__init__(AddNorm)

    def forward(
        self, positions: Tensor, hidden_states: Tensor, residual: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        if positions.numel() > 1:
            residual = hidden_states
            return residual + self.mlp(hidden_states), None
        hidden_states, residual = self.input_layernorm(hidden_states, residual)
        return self.mlp(hidden_states), residual


class Deferred(Layer):
    """As Inkling: the MLP's output is handed on beside the stream."""

    def forward(self, positions: Tensor, hidden_states: Tensor) -> Any:
        hidden_states = hidden_states + self.self_attn(self.input_layernorm(hidden_states))
        return hidden_states, self.mlp(hidden_states)


class Bypassing(Layer):
    """Its MLP is called by another method than forward."""

    def forward(self, positions: Tensor, hidden_states: Tensor) -> Any:
        hidden_states = hidden_states + self.self_attn(self.input_layernorm(hidden_states))
        out = self.mlp.forward_partials(self.post_attention_layernorm(hidden_states))
        return hidden_states + out


class Twice(Layer):
    """As LongCat-Flash: two attentions in a list that nobody calls."""

    def __init__(self) -> None:
        super().__init__()
        self.self_attn = nn.ModuleList([Half(), Half()])

    def forward(self, positions: Tensor, hidden_states: Tensor) -> Any:
        hidden_states = hidden_states + self.self_attn[0](self.input_layernorm(hidden_states))
        hidden_states = hidden_states + self.self_attn[1](self.input_layernorm(hidden_states))
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))


class Scaling(Layer):
    """As DeepSeek-V2: in float16 the stream itself is scaled."""

    def __init__(self) -> None:
        super().__init__(AddNorm)
        self.routed_scaling_factor = 16.0

    def forward(
        self, positions: Tensor, hidden_states: Tensor, residual: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        if residual is None:
            residual = hidden_states
            hidden_states = self.input_layernorm(hidden_states)
        else:
            hidden_states, residual = self.input_layernorm(hidden_states, residual)
        hidden_states = self.self_attn(hidden_states)
        if hidden_states.dtype == torch.float16:
            hidden_states *= 1.0 / self.routed_scaling_factor
            residual *= 1.0 / self.routed_scaling_factor
        hidden_states, residual = self.post_attention_layernorm(hidden_states, residual)
        return self.mlp(hidden_states), residual


class Mixer(Layer):
    """As Jamba's: no attention by name, and an output that is written into an argument."""

    def __init__(self) -> None:
        super().__init__()
        del self.self_attn
        self.mamba = Half()

    def forward(self, hidden_states: Tensor) -> Any:
        output = torch.empty_like(hidden_states)
        self.mamba(self.input_layernorm(hidden_states), output)
        hidden_states = hidden_states + output
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))


class Looped(Layer):
    """As IQuestLoopCoder's."""

    def forward(self, positions: Tensor, hidden_states: Tensor, loop_idx: int) -> Any:
        return hidden_states + self.mlp(hidden_states)


class Nameless(Layer):
    """Its stream has another name."""

    def forward(self, x: Tensor) -> Tensor:
        return x


class Deferring(Layer):
    """Leaves its sum over ranks to the next layer's norm."""

    def forward(self, hidden_states: Tensor, attn_in: Tensor | None = None) -> Tensor:
        return hidden_states + fused_allreduce_rms_norm(self.mlp(hidden_states))


def fused_allreduce_rms_norm(hidden_states: Tensor) -> Tensor:
    """As vLLM names it."""
    return hidden_states


class Model(nn.Module):
    """A stack of layers."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, hidden_states: Tensor) -> Tensor:
        positions = torch.zeros(1)
        residual: Any = None
        for layer in self.layers:
            if isinstance(layer, Fused | Parallel):
                hidden_states, residual = layer(positions, hidden_states, residual)
            else:
                returned = layer(positions, hidden_states)
                hidden_states = returned[0] if isinstance(returned, tuple) else returned
        return hidden_states + residual if isinstance(layer, Fused) else hidden_states
