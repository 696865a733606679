"""What is checked of a Llama's search before any work."""

import json
from pathlib import Path

import pytest

from minitron.search.space import check_search
from minitron.settings.run import BudgetSettings, Settings, TeacherSettings, WorkloadSettings
from minitron.settings.search import AxisSettings
from minitron.settings.teachers import teacher_architecture

CONFIG = {"model_type": "llama", "hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
          "head_dim": 32, "vocab_size": 2048, "tie_word_embeddings": True}  # fmt: skip


def searched(folder: Path, gib: float, **axes: list[int]) -> Settings:
    (folder / "config.json").write_text(json.dumps(CONFIG))
    made = Settings(runs_folder=str(folder / "runs"), teacher=TeacherSettings(path=str(folder)))
    made.budget, made.workload = BudgetSettings(name="small", device_gib=gib, cushion_fraction=0.0), WorkloadSettings(context_tokens=1024)
    for name, values in axes.items():
        setattr(made.search, name, AxisSettings(values=values))
    return made


def test_query_heads_follow_key_value_heads_in_the_least_that_is_needed(tmp_path):
    """Of KV heads alone: the smallest has one, and the two query heads that go with it."""
    roomy = searched(tmp_path, 1.0, key_value_heads=[1, 2])
    check_search(roomy, teacher_architecture(roomy))
    tight = searched(tmp_path, 0.001, key_value_heads=[1, 2])
    with pytest.raises(ValueError, match=r"fits none of the 2 candidates; the smallest, L4-H128-F192-A2-K1, needs at least"):
        check_search(tight, teacher_architecture(tight))


def test_both_kinds_of_heads_may_be_options(tmp_path):
    both = searched(tmp_path, 1.0, key_value_heads=[1, 2], attention_heads=[4])  # four query heads have two KV heads, however small one is alone
    check_search(both, teacher_architecture(both))
