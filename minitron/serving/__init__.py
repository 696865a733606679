"""Using a served model: a client with a thinking budget for any OpenAI-compatible server, and its command. It needs neither torch nor the rest of
the pipeline, but for how prompts are written.
"""
