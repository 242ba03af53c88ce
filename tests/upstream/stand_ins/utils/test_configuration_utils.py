"""Stands in for the table that transformers' `ConfigTester` reads: the fields every config has, none at its default."""

config_common_kwargs = {
    "architectures": ["SomeModel"],
    "chunk_size_feed_forward": 3,
    "dtype": "float16",
    "id2label": {0: "zero", 1: "one", 2: "two"},
    "is_encoder_decoder": True,
    "label2id": {"zero": 0, "one": 1, "two": 2},
    "output_attentions": True,
    "output_hidden_states": True,
    "problem_type": "regression",
    "return_dict": False,
}
