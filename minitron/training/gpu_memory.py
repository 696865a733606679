"""What distillation holds on a GPU beside weights, gradients, optimiser and teacher: the tensors that live at once, at the moment that has most of them.

A micro-step has three such moments: the teacher at work on its largest layer; the loss, with everything kept for the backward pass; and a layer's own
backward pass, with what the layers before it have kept. Counted are the tensors of transformers' NemotronH as autograd keeps them and as autocast casts
them, and mamba-ssm's (mamba/kernel_memory.py). Left out: some 70 bytes a token of vectors in the loss, masks, and what torch's products take for themselves.
Rows longer than LONG_TOKENS go through their layers in parts (mamba/token_blocks.py): of_long.

D hidden, F ffn, V vocabulary; of attention Q query heads, K key-value heads, H head dim; of Mamba-2 W outputs of in_proj.
"""

from dataclasses import dataclass, replace

from distill.chunk_sizes import chunk_tokens
from memory_budget.architecture import Architecture
from memory_budget.parameters import expert_parameters, layer_parameters
from minitron.checkpoints.forward_memory import ATTENTION, layer_bytes, score_bytes
from minitron.checkpoints.forward_work import has_mask
from minitron.mamba import block_sizes
from minitron.mamba.kernel_memory import ScanMemory
from minitron.settings.training import Precision, TrainSettings

FLOAT32, BF16, INT64 = 4, 2, 8


@dataclass(frozen=True, slots=True)
class Moment:
    """Bytes at once: `activations` kept for the backward pass, `loss`, and a `layer` at work, the teacher's or the student's."""

    activations: int = 0
    loss: int = 0
    layer: int = 0

    @property
    def total(self) -> int:
        return self.activations + self.loss + self.layer


@dataclass(frozen=True, slots=True)
class MicroStep:
    """One micro-step of `rows` rows of `tokens` tokens. `casts` says that parameters and the residual stream are float32 and autocast casts what it needs
    (one process, ddp under bf16); else under bf16 the engine holds both in bf16 (fsdp2, zero2, zero3). `teacher_width` 0 is no teacher: its outputs are cached.
    """

    student: Architecture
    teacher: Architecture
    train: TrainSettings
    rows: int
    tokens: int
    teacher_width: int
    casts: bool
    by_heads: bool = True  # whether attention to a long row goes a key-value head at a time: not under ZeRO-3, which listens to its projections

    @property
    def is_long(self) -> bool:
        """Whether rows go through the layers in parts."""
        return self.tokens > block_sizes.LONG_TOKENS

    @property
    def largest(self) -> Moment:
        """The moment that needs most."""
        return max((self.of_teacher(), self.of_loss(), *map(self.of_backward, range(self.student.num_sublayers))), key=lambda moment: moment.total)

    @property
    def width(self) -> int:
        """Bytes of a number that products take."""
        return BF16 if self.train.precision is Precision.bf16 else FLOAT32

    @property
    def stream_bytes(self) -> int:
        """The residual stream [B, T, D], and the input of a checkpointed layer."""
        return self._all_tokens * self.student.hidden * (FLOAT32 if self.casts else self.width)

    def of_teacher(self) -> Moment:
        """Its embeddings, which its own forward method holds to the end, and its largest layer."""
        if not self.teacher_width:
            return Moment()
        states = self._all_tokens * self.teacher.hidden * self.teacher_width
        autocast = self.train.precision is Precision.bf16
        return Moment(layer=states + layer_bytes(self.teacher, self.teacher_width, self.rows, self.tokens, autocast=autocast))

    def of_loss(self) -> Moment:
        """All that layers keep, the last norm's input and normed output in float32; hidden states of both models, once as they come and once of the tokens
        that count, the student's gradient; of a chunk four sets of logits; the output matrix's gradient, and the matrix as it is multiplied."""
        student, per_token = self.student, 2 * self.width * self.student.hidden + FLOAT32 * self.student.hidden
        per_token += 2 * self.teacher_width * self.teacher.hidden
        chunk = min(self._all_tokens, chunk_tokens(student.vocab, on_cpu=False)) * student.vocab
        matrix = (FLOAT32 + (BF16 if self.casts and self.width == BF16 else 0)) * student.vocab * student.hidden
        loss = self._all_tokens * per_token + FLOAT32 * (4 if self.teacher_width else 3) * chunk + matrix
        last_norm = self.stream_bytes if self.is_long else 2 * FLOAT32 * student.hidden * self._all_tokens
        return Moment(activations=sum(map(self._held, range(student.num_sublayers))) + last_norm, loss=loss)

    def of_backward(self, layer: int) -> Moment:
        """The backward pass of one layer: what the layers up to it keep, itself as a whole, the residual's gradient, and its own gradients."""
        held, letter = sum(map(self._held, range(layer))), self.student.pattern[layer]
        if self.is_long:
            return Moment(activations=held, layer=self._long(layer))
        inputs = (2 if self.train.gradient_checkpointing == "host" else 1) if self._again(layer) else 0  # host: the next layer's is on its way back
        shared = 1 if inputs and (self.casts or self.width == FLOAT32) else 0  # the norm keeps its input itself where that is float32
        beside = sum(self._kept(self.student.pattern[other]) for other in range(layer - self._part(layer), layer)) if self._again(layer) else 0
        held -= self.stream_bytes if beside and inputs == 1 else 0  # the block's input, counted below
        return Moment(activations=held, layer=beside + self._kept(letter) + (inputs - shared + 1) * self.stream_bytes + self._gradients(letter))

    @property
    def _all_tokens(self) -> int:
        return self.rows * self.tokens

    def _again(self, layer: int) -> bool:
        """Whether a sublayer is computed again in the backward pass, with the block that it may be part of."""
        return bool(self.train.gradient_checkpointing) and layer // self.student.sublayers_per_layer % self.train.checkpoint_every == 0

    def _part(self, layer: int) -> int:
        """Which part of its layer a sublayer is."""
        return layer % self.student.sublayers_per_layer

    def _held(self, layer: int) -> int:
        """What a sublayer keeps between its forward and its backward pass."""
        if not self._again(layer):
            return 2 * self.stream_bytes if self.is_long else self._kept(self.student.pattern[layer])
        return 0 if self.train.gradient_checkpointing == "host" or self._part(layer) else self.stream_bytes

    def _long(self, layer: int) -> int:
        """A long row's layer in its backward pass: its input (from the host with the next one's), the residual's gradient, the normed input and what it takes
        to make gradients of that: those of the parts done, beside the part at work, or once more when they are joined; the norm's own come after.
        """
        letter, stream = self.student.pattern[layer], self.stream_bytes
        inputs = (2 if self.train.gradient_checkpointing == "host" else 1) if self._again(layer) else 0
        output = self._all_tokens * self.student.hidden * self.width if self.casts and self.width == BF16 else 0  # the mixer's, in what autocast casts to
        if letter in ATTENTION:
            heads = self.student.num_key_value_heads if self.by_heads else 1
            part = (self._mixer_kept(letter) + self._gradients(letter)) // heads + self._products(letter)
        elif letter == "E":  # which sees the whole row
            part = self._mixer_kept(letter) + self._gradients(letter) + self._products(letter)
        else:
            block = replace(self, tokens=block_sizes.largest_block(self.tokens))
            part = block._block_kept(letter) + block._block_gradients(letter) + block._products(letter) - block.stream_bytes
        return (inputs + 2) * stream + output + max(stream + part, 2 * stream)

    def _products(self, letter: str) -> int:
        """What autocast casts for a mixer's products: its input once, or for each of attention's three, and its matrices."""
        if not (self.casts and self.width == BF16):
            return 0
        matrices = BF16 * self._cast_matrices(letter)
        return self._all_tokens * (3 if letter in ATTENTION else 1) * self.width * self.student.hidden + matrices

    def _cast_matrices(self, letter: str) -> int:
        """Numbers of a layer's matrices that stay cast until its backward pass: an expert's are for its product alone."""
        numbers = sum(copies * out * into for copies, out, into in layer_parameters(self.student, letter).matrices)
        return numbers - (self.student.moe_num_experts * expert_parameters(self.student) if letter == "E" else 0)

    def _block_kept(self, letter: str) -> int:
        """Of a block: a Mamba-2 mixer as transformers computes it with a cache, convolution and scan by kernels, the gated norm in float32 by torch."""
        if letter == "-":
            return self._mixer_kept(letter)
        student, width = self.student, self.width
        convolved = 2 * student.mamba_conv_channels
        norm = 4 * FLOAT32 + 2 * width  # scan and gate, its silu and their product; normed, and as out_proj takes it
        return self._all_tokens * (width * (self._mamba_outputs + convolved + student.mamba_inner) + norm * student.mamba_inner)

    def _block_gradients(self, letter: str) -> int:
        return self._gradients(letter) if letter == "-" else self._all_tokens * 4 * FLOAT32 * self.student.mamba_inner

    def _kept(self, letter: str) -> int:
        """What a layer keeps that is not computed again: its norm's input and normed output in float32, and those of a second norm, the mixer's input once for
        every product of it, and the mixer's own; where autocast casts, also the layer's matrices in bf16."""
        student, width, casts = self.student, self.width, self.casts and self.width == BF16
        products = 3 if letter in ATTENTION and casts else 1
        norms = (1 + student.post_norms) * (2 * FLOAT32 * student.hidden + FLOAT32)
        norm = self._all_tokens * (norms + products * width * student.hidden)
        matrices = BF16 * self._cast_matrices(letter) if casts else 0
        return norm + matrices + self._mixer_kept(letter)

    def _mixer_kept(self, letter: str) -> int:
        """Mamba-2: in_proj's output and the kernel's own. Attention: queries, keys, values, their weighted sum, a float32 a query, and the
        scores where there is no fused kernel; with a mask, that as it is added, and keys and values for every query head. Feed-forward: relu and square; under
        bf16 autocast squares in float32, so that relu is there in both, and the square in bf16; gated, gate, its activation, up and their product.
        Experts: the same of a token's own and of the shared one; what its own read, their outputs, and two places; two float32 an expert of the router, and
        under bf16 what that reads in float32; of a latent that and the experts' sum."""
        student, width = self.student, self.width
        if letter == "M":
            return self._all_tokens * width * self._mamba_outputs + self._scan.mixer_keeps()
        if letter in ATTENTION:
            masked = has_mask(student, letter, self.tokens)
            heads = student.num_attention_heads, student.num_attention_heads if masked else student.num_key_value_heads
            kept = 2 * sum(heads) * student.attention_head_dim * width + FLOAT32 * heads[0] + width * self.tokens * masked
            return self._all_tokens * kept + score_bytes(student, letter, width, self.rows, self.tokens)
        of_neuron = 4 * width if student.ffn_gated else 2 * FLOAT32
        if letter == "-":
            return self._all_tokens * student.ffn * of_neuron
        routed = student.moe_experts_per_token * (student.moe_ffn * of_neuron + 2 * (student.moe_latent or student.hidden) * width + 2 * INT64)
        router = 2 * FLOAT32 * student.moe_num_experts + (FLOAT32 * student.hidden if width == BF16 else 0)
        return self._all_tokens * (routed + router + 2 * student.moe_latent * width + student.moe_shared_ffn * of_neuron)

    def _gradients(self, letter: str) -> int:
        """What a mixer's backward pass makes at once, less what it has let go of by then.

        Mamba-2: the gradients of its output and of in_proj's, and the kernel's own. Attention: gradients of the weighted sum, queries, keys and values, of
        the queries in float32 under bf16, of keys and values by query head. Feed-forward: torch's backward pass of a square holds gradient, input to the
        first power, that doubled, and the result, all float32, when the square kept for down_proj is gone.
        """
        student, width = self.student, self.width
        if letter == "M":
            output = self._all_tokens * student.hidden * width if self.casts and width == BF16 else 0
            return output + self._all_tokens * width * self._mamba_outputs + self._scan.mixer_back()
        if letter in ATTENTION:
            queries, keys = (heads * student.attention_head_dim for heads in (student.num_attention_heads, student.num_key_value_heads))
            by_head = 2 * queries * width if queries != keys else 0
            sums = FLOAT32 * (student.num_attention_heads + (queries if width == BF16 else 0))
            scores = 9 * score_bytes(student, letter, width, self.rows, self.tokens) // 4  # forward, beside those kept; two gradients backward are less
            return self._all_tokens * (2 * (queries + keys) * width + by_head + sums) + scores
        of_neuron = 3 * width if student.ffn_gated else 4 * FLOAT32 - width  # gated: of the product, and of what it was made of
        return self._experts_gradients(of_neuron) if letter == "E" else self._all_tokens * of_neuron * student.ffn

    def _experts_gradients(self, of_neuron: int) -> int:
        """The same of experts, at the largest of four moments (families/experts.py): the shared expert's neurons; then, without what that kept, float32
        gradients of the weighted outputs, of the outputs and of the weights; then, without the outputs too, what goes into the last matrices' products and
        comes out of them, with the gradients of one matrix of every expert, under bf16 beside the matrices put together and their gradients before they are
        cast; or the neurons of a token's own experts."""
        student, width, rows = self.student, self.width, self._all_tokens * self.student.moe_experts_per_token
        reads, neurons = student.moe_latent or student.hidden, student.moe_ffn
        shared_kept = self._all_tokens * student.moe_shared_ffn * (4 * width if student.ffn_gated else 2 * FLOAT32)
        matrices = (FLOAT32 + (2 * BF16 if width == BF16 else 0)) * student.moe_num_experts * neurons * reads
        weighted = 3 * FLOAT32 * rows * reads
        products = matrices + rows * width * (neurons + reads) - rows * reads * width
        return max(self._all_tokens * of_neuron * student.moe_shared_ffn,
                   max(weighted, products, rows * (of_neuron * neurons - reads * width)) - shared_kept)  # fmt: skip

    @property
    def _mamba_outputs(self) -> int:
        return self.student.mamba_inner + self.student.mamba_conv_channels + self.student.mamba_num_heads

    @property
    def _scan(self) -> ScanMemory:
        student = self.student
        sizes = student.mamba_num_heads, student.mamba_head_dim, student.mamba_num_groups, student.mamba_state_size
        return ScanMemory(*sizes, self.rows, self.tokens, self.width)
