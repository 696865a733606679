"""Configs whose language model is one part among others: its own config is read, and what is left out is said."""

from memory_budget.configs.values import Config, shown

LANGUAGE_KEYS = ("text_config", "llm_config", "language_config", "thinker_config")
OTHERS = {"vision_config": "the vision tower", "vit_config": "the vision tower", "visual_config": "the vision tower", "audio_config": "the audio encoder",
          "sound_config": "the sound encoder", "speech_config": "the speech encoder", "talker_config": "the talker",
          "token2wav_config": "the vocoder"}  # fmt: skip
DEEPEST = 4
OUTER_KEYS = ("tie_word_embeddings", "quantization_config", "torch_dtype", "dtype")  # that count for the language part where it does not say them itself


def language_part(config: Config, known: frozenset[str]) -> tuple[Config, list[str]]:
    """The config of the language model within one, and notes on the rest; a config whose own model_type is known, or which nests none, as it is.

    Raises ValueError where the nested one is no object, or nests deeper than any published config.
    """
    notes: list[str] = []
    for _ in range(DEEPEST):
        key = next((key for key in LANGUAGE_KEYS if key in config), None)
        if key is None or isinstance(config.get("model_type"), str) and config["model_type"] in known:
            return config, notes
        inner = config[key]
        if not isinstance(inner, dict):
            raise ValueError(f"{key} ({shown(inner)}) must be an object, the config of the language model")
        left_out = list(dict.fromkeys(f"{what} ({other})" for other, what in OTHERS.items() if config.get(other)))
        rest = f"left out: {', '.join(left_out)} and what joins it to the language model" if left_out else "no other part is named in the config"
        notes.append(f"{key} of model_type {shown(config.get('model_type'))} is counted, the language model alone; {rest}")
        outer = {name: config[name] for name in OUTER_KEYS if name in config and name not in inner}
        config = {**outer, **inner}
    raise ValueError(f"the config nests language models {DEEPEST} deep; text_config must hold the sizes")
