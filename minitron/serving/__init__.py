"""Using a served model: a client with a thinking budget for any OpenAI-compatible server."""

from minitron.serving.client import Reply, ThinkingBudgetClient

__all__ = ["Reply", "ThinkingBudgetClient"]
