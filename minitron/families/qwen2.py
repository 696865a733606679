"""Qwen2 and Qwen2.5, dense: Llama's blocks with biases on queries, keys and values (transformers' models/qwen2).

Its configuration class has no head_dim of its own: transformers uses one that is there, vLLM and llama.cpp take hidden size over heads whatever config.json
says (vllm/model_executor/models/qwen2.py, llama.cpp's src/models/qwen2.cpp). So hidden size and query heads are cut together (`FullHeads`), and students are
served.
"""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from memory_budget.architecture import Architecture
from minitron.families import qwen
from minitron.families.blocks import Blocks, block_family


def config(teacher: dict, architecture: Architecture) -> dict:
    return {"architectures": ["Qwen2ForCausalLM"], **qwen.windows(teacher, architecture)}


@dataclass(frozen=True, slots=True)
class FullHeads:
    """A coupling (nas.couplings): the query heads fill the hidden size. Of the two the one that is not given follows."""

    fields: tuple[str, ...] = ("hidden", "num_attention_heads")

    def holds(self, student: Architecture, teacher: Architecture) -> Any:
        """Number by number where sizes are arrays; not where one that follows is larger than the teacher's."""
        within = (student.hidden <= teacher.hidden) & (student.num_attention_heads <= teacher.num_attention_heads)
        return within & (student.hidden > 0) & (student.hidden == student.num_attention_heads * student.attention_head_dim)

    def follower(self, given: Collection[str]) -> str | None:
        if "hidden" in given:
            return None if "num_attention_heads" in given else "num_attention_heads"
        return "hidden" if "num_attention_heads" in given else None

    def size(self, field: str, student: Architecture, teacher: Architecture) -> Any:
        """0 where no whole number of heads fills it."""
        if field == "hidden":
            return student.num_attention_heads * teacher.attention_head_dim
        return student.hidden // teacher.attention_head_dim * (student.hidden % teacher.attention_head_dim == 0)

    def unit(self, field: str, teacher: Architecture) -> int:
        return teacher.attention_head_dim * teacher.num_key_value_heads if field == "hidden" else teacher.num_key_value_heads

    def __str__(self) -> str:
        return "hidden_size == num_attention_heads × head_dim"


FAMILY = block_family("qwen2", Blocks("qwen2", "Qwen2"), config=config, computing_too=qwen.COMPUTING, couplings=(FullHeads(),))
