import pytest
from llamapro import LlamaConfig

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}


@pytest.mark.parametrize(
    "change, message",
    [
        ({"hidden_size": True}, "hidden_size must be a whole number, got True"),
        ({"hidden_size": 0}, "hidden_size must be from 1 to 2147483647, got 0"),
        ({"vocab_size": 10**30}, r"vocab_size must be from 1 to 2147483647, got 1000"),
        ({"num_hidden_layers": 200_000}, "num_hidden_layers must be from 1 to 1000, got 200000"),
        ({"num_attention_heads": 0}, "num_attention_heads must be from 1 to"),
        ({"num_key_value_heads": 0}, "num_key_value_heads must be from 1 to"),
        ({"rms_norm_eps": "1e-6"}, "rms_norm_eps must be a number, got '1e-6'"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps must be from 0 to 1e[+]38, got nan"),
        ({"rms_norm_eps": -1e-6}, "rms_norm_eps must be from 0"),
        ({"rope_theta": 10**400}, "rope_theta must be from 1e-38 to 1e[+]38, got 1000"),
        ({"rope_theta": 0}, "rope_theta must be from 1e-38"),
        ({"rope_theta": [1.0]}, r"rope_theta must be a number, got \[1.0\]"),
        ({"initializer_range": float("inf")}, "initializer_range must be from 0"),
        ({"attention_bias": "no"}, "attention_bias must be true or false, got 'no'"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings must be true or false, got 1"),
        ({"bos_token_id": 2**40}, "bos_token_id must be from -1"),
        ({"eos_token_id": "</s>"}, "eos_token_id must be whole numbers, got '</s>'"),
        ({"eos_token_id": [1, None]}, r"eos_token_id must be whole numbers, got \[1, None\]"),
        ({"eos_token_id": [1, 2**40]}, "eos_token_id must be from -1"),
        ({"rope_scaling": [1]}, r"rope_scaling must be an object, got \[1\]"),
        ({"rope_parameters": "linear"}, "rope_parameters must be an object, got 'linear'"),
        ({"rope_scaling": {"rope_type": ["x"]}}, r"rope type must be one of .* got \['x'\]"),
        ({"rope_scaling": {**LLAMA3, "factor": True}}, "positive factor, got True"),
        ({"rope_scaling": {**LLAMA3, "high_freq_factor": 1}}, "above low_freq_factor = 1.0, got 1"),
        ({"llama_pro": []}, r"llama_pro must be an object, got \[\]"),
        ({"llama_pro": {"new_blocks": "0"}}, "llama_pro.new_blocks must be distinct .* got '0'"),
        ({"llama_pro": {"new_blocks": [0.0]}}, r"llama_pro.new_blocks must be .* got \[0.0\]"),
        ({"layer_types": "full_attention"}, "layer_types must be full_attention"),
        ({"hidden_act": "x\ny" * 1000}, r"hidden_act must be 'silu', got 'x\\ny"),
    ],
)
def test_settings_of_wrong_kinds_are_refused_by_name(change, message):
    with pytest.raises(ValueError, match=message) as caught:
        LlamaConfig.from_dict({"model_type": "llama", **change})
    assert len(str(caught.value)) < 300 and "\n" not in str(caught.value)


def test_whole_numbers_may_stand_for_numbers():
    raw = {"model_type": "llama", "rope_theta": 500000, "rms_norm_eps": 0, "bos_token_id": -1}
    config = LlamaConfig.from_dict(raw)
    assert (config.rope_theta, config.rms_norm_eps, config.bos_token_id) == (500000, 0, -1)


def test_what_is_null_has_its_default():
    raw = dict.fromkeys(["rope_theta", "rope_scaling", "head_dim", "tie_word_embeddings"])
    read = LlamaConfig.from_dict({"model_type": "llama", **raw})
    assert read == LlamaConfig()
