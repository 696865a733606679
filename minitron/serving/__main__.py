"""`python -m minitron.serving PROMPT --model NAME --tokenizer DIR --budget 32`: a served model's reply as it comes.

Exit codes: 0 done · 2 the user's mistake, 1 no server or a failing one, either with one line on stderr · 130 interrupted.
"""

import argparse
import os
import sys
from collections.abc import Generator

from minitron.generation.prompts import Tags
from minitron.serving.client import Reply, ThinkingBudgetClient
from minitron.walk.shown import shown, without_secrets


def main(arguments: list[str] | None = None) -> int:
    """The command; gives the exit code."""
    options = _parser().parse_args(arguments)
    try:
        client = ThinkingBudgetClient(options.url, options.model, tokenizer=options.tokenizer, tags=Tags(*options.tags), timeout_seconds=options.timeout,
                                      longest_seconds=options.longest)  # fmt: skip
        thinking = None if options.thinking is None else options.thinking == "on"
        reply = _printed(client.stream(options.prompt, thinking_budget=options.budget, thinking=thinking, max_tokens=options.max_tokens))
    except BrokenPipeError:  # the reader, `head` say, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, OSError) as error:
        print(f"error: {shown(' '.join(str(error).split()))}", file=sys.stderr)
        return 2 if isinstance(error, ValueError) else 1
    except KeyboardInterrupt:
        return 130
    if reply.note:
        print(f"note: {shown(reply.note)}", file=sys.stderr)
    if reply.stopped:
        print(f"error: the server at {without_secrets(options.url)} stopped the reply ({shown(reply.stopped)})", file=sys.stderr)
        return 1
    closed = "closed here" if reply.closed_here else "closed by the model or still open"
    print(f"{reply.reasoning_tokens:,} tokens of reasoning, {closed}; {'ended' if reply.ended else 'cut off by --max-tokens'}", file=sys.stderr)
    return 0


def _printed(pieces: Generator[str, None, Reply]) -> Reply:
    while True:
        try:
            piece = next(pieces)
            print(shown(piece) if sys.stdout.isatty() else piece, end="", flush=True)
        except StopIteration as end:
            print()
            return end.value


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m minitron.serving", description="A served model's reply, under a thinking budget.", allow_abbrev=False)
    parser.add_argument("prompt", help="a user's message")
    parser.add_argument("--url", default="http://localhost:8000/v1", help="of an OpenAI-compatible server (default %(default)s)")
    parser.add_argument("--model", required=True, help="as the server names it")
    parser.add_argument("--tokenizer", required=True, metavar="DIR_OR_HUB_ID", help="the model's folder, or its Hub id")
    parser.add_argument("--budget", type=int, metavar="N", help="most tokens of reasoning (default: no limit)")
    parser.add_argument("--thinking", choices=("on", "off"), help="through the chat template's switch (default: the template's own)")
    parser.add_argument("--max-tokens", type=int, default=512, metavar="N", help="most tokens of the whole reply (default %(default)s)")
    parser.add_argument("--tags", nargs=2, default=("<think>", "</think>"), metavar=("OPEN", "CLOSE"), help="around reasoning (default <think> </think>)")
    parser.add_argument("--timeout", type=float, default=60, metavar="SECONDS", help="without a word from the server (default %(default)s)")
    parser.add_argument("--longest", type=float, default=3600, metavar="SECONDS", help="of one request, however much the server says (default %(default)s)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
