"""What of a teacher's config.json its student's keeps: all but what speaks of other files, other code, or another form of the weights."""

# Code beside the weights, which is never run here nor copied: every family that can be cut is built into transformers.
CODE_KEYS = ("auto_map", "custom_pipelines")
# Where a folder lay, what wrote it, and which of its files the weights were in.
PLACE_KEYS = ("_name_or_path", "name_or_path", "_commit_hash", "transformers_version", "transformers_weights")
# Of weights in another form: a quantised checkpoint is refused, an empty entry says nothing.
FORM_KEYS = ("quantization_config", "compression_config")
# Layers behind the last that foretell further tokens; transformers leaves their tensors out, so a student has none.
MTP_KEYS = ("num_nextn_predict_layers", "mtp_num_layers", "mtp_layers_block_type", "mtp_hybrid_override_pattern")


def kept_config(teacher: dict) -> dict:
    """The teacher's config.json without those; the number format by both of its names, `dtype` and the older `torch_dtype`."""
    dropped = {*CODE_KEYS, *PLACE_KEYS, *FORM_KEYS, *MTP_KEYS}
    config = {key: value for key, value in teacher.items() if key not in dropped}
    named = config.get("dtype") or config.get("torch_dtype")
    return config | ({"dtype": named, "torch_dtype": named} if named else {})
