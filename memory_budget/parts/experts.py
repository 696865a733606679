"""Mixtures of experts: a router sends every token to some of them; shared ones, with or without a gate of their own, see all.

Letters: D hidden · E experts, F neurons of one, S neurons of the shared ones together.
"""

from dataclasses import dataclass
from typing import ClassVar

from memory_budget.parts.part import LayerParameters, Part, larger


@dataclass(frozen=True, slots=True, kw_only=True)
class Experts(Part):
    """`latent`: the width that routed experts read and write where it is another than D; two matrices go from and to it (NemotronH).

    bias: biases of the experts' matrices (`router_bias`: of the router's, a number an expert) · shared_gate: a row D that weighs the shared experts ·
    shared_bias: biases of the shared expert and of the latent projections.
    """

    kind: ClassVar[str] = "moe"
    letter: ClassVar[str] = "E"

    hidden: int
    experts: int
    experts_per_token: int
    neurons: int
    gated: bool = True
    bias: bool = False
    router_bias: bool = False
    shared_neurons: int = 0
    shared_gate: bool = False
    shared_bias: bool = False
    latent: int = 0

    @property
    def width(self) -> int:
        """What routed experts read and write."""
        has_latent = self.latent > 0
        return self.latent * has_latent + self.hidden * (1 - has_latent)

    def parameters(self, *, active_only: bool = False) -> LayerParameters:
        experts, inputs = self.experts_per_token if active_only else self.experts, 2 if self.gated else 1
        shared, latent = self.shared_neurons, self.latent
        has_shared, has_latent = shared > 0, latent > 0
        shared_biases = (inputs * shared + self.hidden * has_shared + latent + self.hidden * has_latent) * int(self.shared_bias)
        expert_biases = experts * (inputs * self.neurons + self.width) * int(self.bias)
        router = self.experts * (self.hidden + int(self.router_bias)) + self.hidden * int(self.shared_gate)
        return LayerParameters(
            matrices=(
                (inputs * experts, self.neurons, self.width),
                (experts, self.width, self.neurons),
                (inputs, shared, self.hidden),
                (1, self.hidden, shared),
                (1, latent, self.hidden),
                (1, self.hidden, latent),
            ),
            others=router + expert_biases + shared_biases,
        )

    def activation_bytes(self, tokens: int, number: int) -> int:
        """Per expert of a token its neurons (2·F, gated 3·F) and its output; the latent; in float32 a score per expert; or the shared expert's neurons if
        that is more."""
        inner = 3 if self.gated else 2
        routed = self.experts_per_token * (inner * self.neurons + self.width) + self.latent
        return larger(tokens * routed * number + tokens * self.experts * 4, tokens * inner * self.shared_neurons * number)
