"""Prompts: conversations in a tokenizer's own chat template, and the tags around reasoning. Loads no torch: a client of a server may have none."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

SWITCHES = {True: "/think", False: "/no_think"}  # in the system message, where a template knows no variable


@dataclass(frozen=True, slots=True)
class Tags:
    """Around reasoning: text, which the tokenizer at hand turns into tokens."""

    opening: str = "<think>"
    closing: str = "</think>"

    def ids(self, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
        return tuple(tokenizer(tag, add_special_tokens=False)["input_ids"] for tag in (self.opening, self.closing))


def write_prompt(tokenizer: PreTrainedTokenizerBase, prompt: str | Sequence[Mapping[str, str]], thinking: bool | None) -> str:
    """A user's message, or a conversation [{role, content}, …], in the tokenizer's chat template, reasoning switched on or off.

    A message stays as it is where there is no template. Raises ValueError where thinking is given and the template has no switch
    for it, and for a conversation without a template.
    """
    template = tokenizer.chat_template
    if not template:
        if thinking is not None:
            raise ValueError(f"thinking is {'on' if thinking else 'off'}, but the tokenizer has no chat template; leave thinking null")
        if not isinstance(prompt, str):
            raise ValueError("the prompt is a conversation, but the tokenizer has no chat template; give the prompt as text")
        return prompt
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else [dict(message) for message in prompt]
    variables = {}
    if thinking is not None:
        if "enable_thinking" in template:
            variables["enable_thinking"] = thinking
        elif any(switch in template for switch in SWITCHES.values()):
            _tell_system(messages, SWITCHES[thinking])
        else:
            raise ValueError(f"thinking is {'on' if thinking else 'off'}, but the chat template has no switch (enable_thinking, /think); leave thinking null")
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **variables)


def _tell_system(messages: list[dict[str, str]], switch: str) -> None:
    if messages and messages[0]["role"] == "system":
        messages[0]["content"] = f"{switch}\n{messages[0]['content']}"
    else:
        messages.insert(0, {"role": "system", "content": switch})
